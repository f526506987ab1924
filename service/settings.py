"""Every setting stands here once: a variable of the environment (ISTHMUS_…), which a flag of `serve` overrides."""

import ipaddress
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.contract.audio import AudioLimits
from service.contract.bundle import Bundle, Modality, read_bundle
from service.contract.images import ImageLimits
from service.contract.signature import SignatureError, public_key
from service.contract.videos import VideoLimits
from service.errors import words_of

_MOST_LANES = 4
ProtocolName = Literal["openai", "jina", "cohere", "tei", "ollama", "mcp", "weaviate", "immich"]
_PATTERNS = {
    "origins": (
        r"https?://[a-z0-9.-]+(:[0-9]+)?",
        "origin: write scheme://host or scheme://host:port, in lower case",
    ),
    "model_aliases": (r"[^=]{1,64}=[^=]+", "alias: write ALIAS=NAME"),
    "protocol_keys": (
        rf"({'|'.join(get_args(ProtocolName))})=[0-9a-f]{{12}}",
        "PROTOCOL=ID: the ID is the 12 letters and digits after isthmus_",
    ),
}
"""The pattern that each part of a setting matches, and what is said where it does not."""


REMOVED = {
    "worker_silence_s": "there are no workers any more, and the server that takes a job embeds it; to embed on several "
    "machines, use `python -m training embed --ray` and `python -m service load`",
    "jobs_root": "jobs take no folder of the server any more; `isthmus index FOLDER` sends the files of a folder, from "
    "any machine",
    "job_deliveries": "a part of a job is tried three times before its items are tried one by one",
    "unload_idle_s": "a tower stays open; ISTHMUS_MODALITIES chooses which towers are opened",
    "cuda_graphs": "calls of a tower on a GPU are not recorded any more",
    "lanes": "set ISTHMUS_THREADS: a tower on the CPU runs as many calls at once as the cores allow",
    "batch_audio_seconds": "a call of the audio tower takes 60 seconds of sound",
    "hang_s": "a model call counts as hanging after 60 s, or after ISTHMUS_REQUEST_DEADLINE_S where that is longer",
    "slow_request_s": "a request that takes longer than 10 s is logged with the time of each stage",
    "otlp_endpoint": "set OTEL_EXPORTER_OTLP_ENDPOINT, OpenTelemetry's own variable",
    "trace_share": "set OTEL_TRACES_SAMPLER=parentbased_traceidratio and OTEL_TRACES_SAMPLER_ARG to the share, "
    "OpenTelemetry's own variables",
    "milvus_timeout_s": "a call to Milvus may take 5 s",
    "redis_timeout_s": "a command of Redis may take 0.1 s",
    "cache_ttl_s": "Redis keeps a vector for 7 days",
    "fetch_timeout_s": "a URL may take 10 s",
    "fetch_concurrency": "16 URLs are fetched at once",
    "max_jobs": "100 jobs may be unfinished",
    "max_job_items": "a job may have 10,000,000 items",
    "max_audio_bytes": "a sound file may be as large as ISTHMUS_MAX_BODY_BYTES",
    "max_video_bytes": "a video file may be as large as ISTHMUS_MAX_BODY_BYTES",
    "max_audio_decoded_bytes": "a decoded sound may have 1 GiB",
    "max_audio_channels": "a sound may have 8 channels",
    "max_video_pixels": "a frame of a video may have 9,000,000 pixels (4K)",
    "max_unsent_bytes": "answers that clients have not read yet may have 128 MB together",
}
"""Settings that earlier versions had, and what to do instead. A start that sets one of them is refused."""


class SettingsError(ValueError):
    """Raised where the service cannot start: the message names the setting and its value."""


class Limits(BaseModel):
    """Bounds what one request may hold."""

    model_config = ConfigDict(frozen=True)

    body_bytes: int = 64_000_000
    image_bytes: int = 25_000_000
    image_pixels: int = 40_000_000
    audio_bytes: int = 64_000_000
    audio_seconds: float = 1_800.0
    video_bytes: int = 64_000_000
    video_seconds: float = 600.0
    video_frames: int = 16
    text_chars: int = 32_000
    inputs: int = 256
    top_k: int = 1_000

    @property
    def openai_inputs(self) -> int:
        """Return how many inputs a request to OpenAI's route may have: by default 2,048, as OpenAI's own."""
        return 8 * self.inputs

    @property
    def of_images(self) -> ImageLimits:
        return ImageLimits(self.image_bytes, self.image_pixels)

    @property
    def of_sounds(self) -> AudioLimits:
        return AudioLimits(self.audio_bytes, self.audio_seconds)

    @property
    def of_videos(self) -> VideoLimits:
        return VideoLimits(self.video_bytes, self.video_seconds, frames=self.video_frames)


@dataclass(frozen=True)
class Gpus:
    """Says which GPUs the towers use, where they get any."""

    devices: tuple[int, ...] = (0,)
    """A tower has a session on each of these; its calls go to them in turn."""
    engines: Path | None = None
    """Where TensorRT keeps what it compiles; else it compiles at every start."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="ISTHMUS_", extra="ignore", frozen=True, use_attribute_docstrings=True)

    bundle: Path = Path("starter")
    """Folder of the default model's bundle. The name in its manifest is the model's name."""
    more_bundles: Annotated[tuple[Path, ...], NoDecode] = ()
    """Folders of further bundles, with commas between. A request chooses one by `model`."""
    bundle_signers: Annotated[tuple[Path, ...], NoDecode] = ()
    """PEM files of Ed25519 public keys, with commas between. Only bundles that one of these keys signed are served
    (`python -m training sign`). Unset, unsigned bundles are served too."""
    model_aliases: Annotated[tuple[str, ...], NoDecode] = ()
    """Other names for models, as ALIAS=NAME with commas between: `text-embedding-3-small=starter` for a client whose
    model name is fixed."""
    licences: Literal["any", "commercial"] = "any"
    """commercial: refuse a bundle unless the licences of all its data sets and encoders allow commercial use. A licence
    that is not stated counts as not allowing it."""
    modalities: Annotated[tuple[Modality, ...], NoDecode] = ()
    """Towers to open, of those that a bundle has; with commas between. Fewer towers take less memory. Unset, all."""
    store: Path = Path("store")
    """Folder of the store, for one server process; or the word `milvus`, for any number of them."""
    milvus_uri: str = Field(default="http://127.0.0.1:19530", pattern=r"^(https?|tcp)://.+|^unix:.+|.+\.db$")
    """Address of the Milvus, as http://HOST:PORT/DATABASE. The store needs a database of its own. A path that ends in
    .db is a Milvus Lite, which runs in the server's process."""
    milvus_token: SecretStr | None = None
    """API key of the Milvus, or NAME:PASSWORD."""
    previews: bool | None = None
    """Keep a small preview of every image and sound that is stored from now on: a picture of at most 480 pixels, the
    first 20 seconds. Previews are in the store and its backups, and whoever may search may see them. Without them no
    media of a client are kept. Unset, they are kept where the server listens on a loopback address, unless the store is
    a Milvus."""
    media: Annotated[tuple[Path, ...], NoDecode] = ()
    """Folders whose files may be read by GET /media/ID, with commas between: whoever may search sees the originals of
    items, and whoever may also write can read every file below that is not hidden. Links are not followed. `serve`
    takes --media once for each folder. Unset, no original file is given out."""
    host: str = "127.0.0.1"
    """Address to listen at. 0.0.0.0 means all addresses of this machine."""
    port: int = Field(default=8000, ge=0, le=65_535)
    """Port to listen at. 0 picks a free port."""
    root_path: str | None = Field(default=None, pattern=r"^(/[A-Za-z0-9._~-]+)+$")
    """Path under which a proxy serves this service, such as /isthmus. It works whether or not the proxy removes the
    path from requests."""
    device: Literal["auto", "cpu", "cuda", "tensorrt"] = "auto"
    """auto: CUDA where ONNX Runtime has it and it works, else the CPU. With any other value the start fails where the
    device does not work."""
    gpus: Annotated[tuple[int, ...], NoDecode] = (0,)
    """Numbers of the GPUs, with commas between. Every tower has a session on each GPU, and its calls take turns."""
    tensorrt_engines: Path | None = None
    """Folder where TensorRT keeps its compiled engines. Unset, it compiles for minutes at every start."""
    precision: Literal["auto", "fp32", "fp16", "int8"] = "auto"
    """Precision of the towers. auto: the default that the manifest gives each tower for the device."""
    threads: int = Field(default=0, ge=0, le=1_024)
    """Threads of one model call on the CPU. A tower runs as many calls at once as the cores allow. More threads answer
    a lone request sooner, fewer answer more requests per second. 0: up to four calls share the cores."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level that is logged. Only debug logs the text of exceptions, which may quote a request."""
    min_free_bytes: int = Field(default=256 * 2**20, ge=0)
    """Bytes to keep free on the disks of the store and the jobs. With less, uploads of jobs get 503; with less than
    half of it, items and label sets do too. Deletes still work, and /readyz names the disk and stays ready."""

    keys: Path | None = None
    """File of API keys, which `python -m service keys` writes. Unset, whoever reaches the port may read and write."""
    origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Web sites whose pages may call the service from a browser (CORS), such as https://example.org; with commas
    between."""
    hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Names that a server without keys answers to (Host), besides addresses and localhost; with commas between. Unset,
    it answers to any name, or to none where it listens on a loopback address."""

    protocols: Annotated[tuple[ProtocolName, ...], NoDecode] = ("openai", "jina")
    """Protocols of other servers that this one speaks too, with commas between (docs/integrations). Empty: none."""
    protocol_keys: Annotated[tuple[str, ...], NoDecode] = ()
    """Keys of clients that can send none, as PROTOCOL=ID with commas between: a request of that protocol without a key
    counts as one with the API key of that ID (`python -m service keys list`), with its scopes and limits. Whoever
    reaches the port has that key, then."""

    immich_upstream: str | None = None
    """Address of an Immich machine learning server, such as http://immich-ml:3003, for what this one does not do: faces
    and text in pictures. It is asked by the rules of fetching: an address that is not public must be in a network of
    ISTHMUS_FETCH_ALLOW. Unset, such requests are refused."""
    immich_upstream_key: SecretStr | None = None
    """Sent to it as `Authorization: Bearer`."""

    endpoint: str | None = None
    """Address of the embedding API that a bundle made by `isthmus attach` sends its texts to, such as
    https://api.example.com/v1/embeddings. It is asked by the rules of fetching, as Immich's upstream is."""
    endpoint_key: SecretStr | None = None
    """Sent to it as `Authorization: Bearer`."""

    fetch: Literal["off", "https", "http"] = "off"
    """Whether inputs may be URLs: over https only, or over http too. Only public addresses are fetched from, unless
    ISTHMUS_FETCH_ALLOW adds others."""
    fetch_allow: Annotated[tuple[str, ...], NoDecode] = ()
    """Names and networks, with commas between. Names (`example.org`, `*.example.org`): only these are fetched from.
    Networks (`10.1.0.0/16`): allowed besides public addresses."""
    fetch_deny: Annotated[tuple[str, ...], NoDecode] = ()
    """Names and networks that are never fetched from, with commas between. A NAT64 prefix of your own belongs here."""
    fetch_ports: Annotated[tuple[int, ...], NoDecode] = ()
    """Ports that are fetched from, with commas between. Unset: 443, and 80 for http."""
    fetch_dns: str | None = None
    """Name server for fetching, as ADDRESS or ADDRESS:PORT, such as one that knows no name of your network. Unset, the
    system's."""
    fetch_ca: Path | None = None
    """PEM file of certificate authorities to trust besides the public ones when fetching."""

    redis_url: str | None = Field(default=None, pattern=r"^(redis|rediss|unix)://")
    """Address of a Redis that server processes share, for the cache of vectors and the limits of keys. Unset, each
    process has its own."""
    cache_bytes: int = Field(default=256 * 2**20, ge=0)
    """Largest size of the cache of vectors in the process, in bytes. Used where there is no Redis."""

    max_body_bytes: int = Field(default=64_000_000, gt=0)
    """Largest request body, and largest sound or video file, in bytes. A larger body gets 413."""
    max_bodies_bytes: int = Field(default=400_000_000, gt=0)
    """Largest total of the bodies of all requests that are read or answered at one time, in bytes; of one API key, as
    much as the others leave free, which is half of it where there are none. Beyond it a request gets 429 before its
    body is read. Small bodies, of 100 kB by default, have an eighth more: large ones do not keep them out."""
    max_image_bytes: int = Field(default=25_000_000, gt=0)
    """Largest image file, in bytes."""
    max_image_pixels: int = Field(default=40_000_000, gt=0)
    """Largest decoded image, in pixels (width × height). A JPEG is decoded at a half, a quarter or an eighth of its
    sides where the tower takes no more, and only those pixels count."""
    max_audio_seconds: float = Field(default=1_800.0, gt=0)
    """Longest sound, in seconds."""
    max_video_seconds: float = Field(default=600.0, gt=0)
    """Longest video, in seconds."""
    video_frames: int = Field(default=16, gt=0, le=256)
    """Most frames of a video that are embedded: one per second, or evenly spaced ones of a longer video."""
    max_text_chars: int = Field(default=32_000, gt=0)
    """Longest text, in characters; a longer one is refused. A tower may read only the beginning of a text, and the
    answer then says so."""
    token_ids: bool = False
    """Accept token ids in place of texts at /v1/embeddings, from clients that use the bundle's own tokenizer and
    include its special tokens. Ids of another tokenizer cannot be recognised, and get the vectors of other texts."""
    max_inputs: int = Field(default=256, gt=0, le=100_000)
    """Most inputs of one request. /v1/embeddings takes eight times as many, because OpenAI's clients send so many."""
    max_top_k: int = Field(default=1_000, gt=0, le=100_000)
    """Most results of one query."""

    jobs: Path | None = None
    """Folder of one server process where the inputs and the progress of bulk jobs are kept. Unset, `jobs` in the
    store's folder; or, where the store is a Milvus, no jobs are taken."""
    jobs_keep_s: float = Field(default=7 * 86_400, gt=0)
    """Seconds that a job that ended is remembered, with its errors and its Idempotency-Key."""
    max_job_bytes: int = Field(default=10_000_000_000, gt=0)
    """Largest input of a job, unpacked, in bytes."""

    batch_images: int | None = Field(default=None, gt=0)
    """Images in one call of the image tower. Unset: 2 on the CPU, 32 on a GPU."""
    batch_tokens: int | None = Field(default=None, gt=0)
    """Padded tokens (rows × longest row) in one call of the text tower. Unset: 512 on the CPU, 8,192 on a GPU."""
    queue_inputs: int = Field(default=1_024, gt=0)
    """Most inputs of one modality that are embedded or wait. Beyond it a request gets 429 with a Retry-After. A request
    with more inputs than that uses half of the room and is embedded in parts."""
    queue_s: float = Field(default=5.0, gt=0)
    """Longest wait of an input, in seconds, estimated from the recent speed of its tower. Beyond it a request gets 429.
    One key cannot fill the whole queue: every other key keeps a part of it."""
    decode_workers: int = Field(default=4, gt=0, le=256)
    """Threads that decode and prepare the inputs of a model."""
    request_deadline_s: float = Field(default=60.0, gt=0)
    """Seconds until a request gets 504, counted from the end of its body. Of a request that stores items, only the time
    for their vectors counts."""
    drain_s: float = Field(default=0.0, ge=0, le=600)
    """Seconds that the server goes on after SIGTERM while it says in /readyz and by `Connection: close` that it is
    ending. Behind a proxy, longer than the proxy keeps idle connections and needs to notice."""
    shutdown_grace_s: int = Field(default=20, gt=0)
    """Seconds for the requests that are under way at the end. Those that are not done get 503."""

    @field_validator("*", mode="before")
    @classmethod
    def _as_variables_are(cls, value: Any, info: ValidationInfo) -> Any:
        """Split what has commas between its parts; an empty variable is an unset one."""
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, str) and get_origin(field.annotation) is tuple:
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return None if value == "" and field.default is None else value

    @field_validator("previews")
    @classmethod
    def _have_a_place(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        if value and info.data.get("store") == Path("milvus"):
            raise ValueError("a Milvus store keeps no previews")
        return value

    @field_validator("gpus")
    @classmethod
    def _different(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) < len(value) or min(value) < 0:
            raise ValueError("name one GPU or more, each once, from 0 up")
        return value

    @field_validator("origins", "model_aliases", "protocol_keys")
    @classmethod
    def _matching(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        pattern, advice = _PATTERNS[info.field_name or ""]
        for part in value:
            if not re.fullmatch(pattern, part):
                raise ValueError(f"{part!r} is no {advice}")
        return value

    @field_validator("model_aliases", "protocols", "protocol_keys")
    @classmethod
    def _each_once(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        names = [part.partition("=")[0] for part in value]
        if len(set(names)) < len(names):
            raise ValueError(f"{'an alias' if info.field_name == 'model_aliases' else 'a protocol'} is there twice")
        return value

    @field_validator("protocol_keys")
    @classmethod
    def _of_protocols_that_are_on(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for name, _, _ in (part.partition("=") for part in value):
            if name not in info.data.get("protocols", (name,)):
                raise ValueError(f"the protocol {name} is off: add it to ISTHMUS_PROTOCOLS, or leave its key out")
        return value

    @property
    def key_ids(self) -> dict[str, str]:
        """Return the ID of a key by the protocol whose requests without a key count as that key's."""
        return dict(pair.split("=") for pair in self.protocol_keys)

    @property
    def aliases(self) -> dict[str, str]:
        """Return the names of models by their aliases."""
        return dict(pair.split("=") for pair in self.model_aliases)

    @property
    def signers(self) -> tuple[Ed25519PublicKey, ...]:
        """Return the public keys of those who may sign bundles. Raises SettingsError."""
        try:
            return tuple(map(public_key, self.bundle_signers))
        except SignatureError as error:
            raise SettingsError(f"ISTHMUS_BUNDLE_SIGNERS: {error}") from None

    def read_bundle(self, path: Path | None = None, *, hashed: bool = False) -> Bundle:
        """Return the bundle at `path`, else the default one, on the conditions that are set. Raises BundleError.

        Unless all of it is `hashed` here, its files are checked as they are opened.
        """
        commercial = self.licences == "commercial"
        return read_bundle(path or self.bundle, self.signers, commercial=commercial, hashed=hashed)

    @property
    def keeps_previews(self) -> bool:
        if self.previews is not None:
            return self.previews
        return is_loopback(self.host) and self.store != Path("milvus")

    @property
    def jobs_folder(self) -> Path | None:
        return self.jobs or (None if self.store == Path("milvus") else self.store / "jobs")

    @property
    def least_free_bytes(self) -> int:
        """Return the free bytes below which no item is stored: what an upload leaves is for the others."""
        return self.min_free_bytes // 2

    @property
    def towers_on_gpus(self) -> Gpus:
        return Gpus(self.gpus, self.tensorrt_engines)

    @property
    def cpu_lanes(self) -> int:
        """Return how many calls a tower on the CPU runs at once."""
        cores = len(os.sched_getaffinity(0))
        return max(1, cores // self.threads) if self.threads else min(_MOST_LANES, cores)

    @property
    def call_threads(self) -> int:
        return self.threads or max(1, len(os.sched_getaffinity(0)) // self.cpu_lanes)

    @cached_property
    def limits(self) -> Limits:
        names = Limits.model_fields.keys() - {"audio_bytes", "video_bytes", "video_frames"}
        return Limits(
            **{name: getattr(self, f"max_{name}") for name in names},
            audio_bytes=self.max_body_bytes,
            video_bytes=self.max_body_bytes,
            video_frames=self.video_frames,
        )


def is_loopback(host: str) -> bool:
    """Return whether only programs of this machine can reach that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_settings(**flags: Any) -> Settings:
    """Return the settings of the environment, overridden by flags that are not None. Raises SettingsError."""
    variables = {name.lower() for name, value in os.environ.items() if value}
    if names := [name for name in REMOVED if f"isthmus_{name}" in variables]:
        advice = "\n".join(f"  ISTHMUS_{name.upper()}: {REMOVED[name]}" for name in names)
        raise SettingsError(f"these settings no longer exist, unset them:\n{advice}")
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise SettingsError(words_of(first)) from None
        name = str(first["loc"][0])
        raise SettingsError(f"ISTHMUS_{name.upper()} is {first['input']!r}: {words_of(first)}") from None
