"""Every setting, once. Each is an environment variable with the prefix ISTHMUS_, and a flag of `serve` overrides it."""

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.contract.audio import AudioLimits
from service.contract.bundle import MODALITIES, Bundle, Modality, read_bundle
from service.contract.images import ImageLimits
from service.contract.signature import SignatureError, public_key
from service.contract.videos import VideoLimits

_MOST_LANES = 4


REMOVED = {
    "worker_silence_s": "there are no workers any more, and the server that takes a job embeds it; to embed on several "
    "machines, use `python -m training embed --ray` and `python -m service load`",
    "jobs_root": "jobs take no folder of the server any more; `isthmus index FOLDER` sends the files of a folder, from "
    "any machine",
    "job_deliveries": "a part of a job is tried three times before its items are tried one by one",
}
"""Settings that earlier versions had, and what to do instead. A start that sets one of them is refused."""


class SettingsError(ValueError):
    """The service cannot start like this: the message names the setting and its value."""


class Limits(BaseModel):
    """What one request may hold."""

    model_config = ConfigDict(frozen=True)

    body_bytes: int = 64_000_000
    image_bytes: int = 25_000_000
    image_pixels: int = 40_000_000
    audio_bytes: int = 45_000_000
    audio_seconds: float = 1_800.0
    audio_decoded_bytes: int = 2**30
    audio_channels: int = 8
    video_bytes: int = 100_000_000
    video_seconds: float = 600.0
    video_pixels: int = 9_000_000
    video_frames: int = 16
    text_chars: int = 32_000
    inputs: int = 256
    top_k: int = 1_000

    @property
    def openai_inputs(self) -> int:
        """By default the 2,048 that OpenAI's endpoint takes, and that clients fill."""
        return 8 * self.inputs

    @property
    def of_images(self) -> ImageLimits:
        return ImageLimits(self.image_bytes, self.image_pixels)

    @property
    def of_sounds(self) -> AudioLimits:
        return AudioLimits(self.audio_bytes, self.audio_seconds, self.audio_decoded_bytes, self.audio_channels)

    @property
    def of_videos(self) -> VideoLimits:
        return VideoLimits(
            self.video_bytes, self.video_seconds, self.video_pixels, self.audio_channels, self.video_frames
        )


@dataclass(frozen=True)
class Gpus:
    """How towers use GPUs, where they get any."""

    devices: tuple[int, ...] = (0,)
    """A tower has a session on each of these; its calls go to them in turn."""
    graphs: bool = False
    """Record the image tower's calls (service/engine/cuda_graphs.py)."""
    engines: Path | None = None
    """Where TensorRT keeps what it compiles; else it compiles at every start."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="ISTHMUS_", extra="ignore", frozen=True, use_attribute_docstrings=True)

    bundle: Path = Path("starter")
    """Of the default model; its manifest's name is the model's."""
    more_bundles: Annotated[tuple[Path, ...], NoDecode] = ()
    """Further models, chosen by a request's `model`; separated by commas."""
    bundle_signers: Annotated[tuple[Path, ...], NoDecode] = ()
    """PEM files of Ed25519 public keys, separated by commas: only bundles that one of them signed are served
    (`python -m training sign`). Unset, unsigned ones are too."""
    model_aliases: Annotated[tuple[str, ...], NoDecode] = ()
    """Other names for models, as ALIAS=NAME, separated by commas: `text-embedding-3-small=starter` for a client whose
    model cannot be chosen."""
    licences: Literal["any", "commercial"] = "any"
    """commercial: a bundle is refused unless the licences of all its parts (data sets and encoders) allow commercial
    use; what is not known counts as not allowed."""
    modalities: Annotated[tuple[Modality, ...], NoDecode] = MODALITIES
    """The towers to load, of those that a bundle has; separated by commas."""
    unload_idle_s: float | None = Field(default=None, gt=0)
    """A tower without work for so long is closed, and opened again by the next input; unset, towers stay open."""
    store: Path = Path("store")
    """A directory, for one process; or the word `milvus`, for many."""
    milvus_uri: str = Field(default="http://127.0.0.1:19530", pattern=r"^(https?|tcp)://.+|^unix:.+|.+\.db$")
    """http://HOST:PORT/DATABASE; a store has a database to itself. A path that ends in .db is a Milvus Lite, which runs
    in this process."""
    milvus_token: SecretStr | None = None
    """An API key, or NAME:PASSWORD."""
    milvus_timeout_s: float = Field(default=5.0, gt=0, le=600)
    """For one call; past it, 503."""
    previews: bool = False
    """Keep of every image and sound that is stored from now on a preview (a picture of at most 480 pixels, the first 20
    seconds), in the store and its backups. Whoever may search may see it. Off, nothing of a client's media is kept."""
    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 is every address of this machine."""
    port: int = Field(default=8000, ge=0, le=65_535)
    """0 picks a free port."""
    root_path: str | None = Field(default=None, pattern=r"^(/[A-Za-z0-9._~-]+)+$")
    """The path that a proxy serves this under, such as /isthmus, whether it takes it off or not."""
    device: Literal["auto", "cpu", "cuda", "tensorrt"] = "auto"
    """auto: CUDA where ONNX Runtime has it and it works, else the CPU. The others are insisted on."""
    gpus: Annotated[tuple[int, ...], NoDecode] = (0,)
    """Numbers of the GPUs, separated by commas: a tower has a session on each, and its calls go to them in turn."""
    cuda_graphs: bool = False
    """Record the image tower's calls on a GPU once per batch size, and replay them."""
    tensorrt_engines: Path | None = None
    """Where TensorRT keeps what it compiles; unset, it compiles for minutes at every start."""
    precision: Literal["auto", "fp32", "fp16", "int8"] = "auto"
    """Of the towers; auto: what each tower's manifest entry says is the default on the device."""
    lanes: int = Field(default=0, ge=0, le=64)
    """Calls that a tower on the CPU runs at once; 0: as many as there are cores for `threads`, up to four. One call on
    many threads is quicker when it is alone, several on few get more done: 1.28 times as much on two cores
    (docs/LOG.md). A GPU runs one call at a time."""
    threads: int = Field(default=0, ge=0, le=1_024)
    """Of each call; 0: the cores, shared out among the lanes."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """debug also logs what exceptions say, which may quote a request; the others name only their kind and place."""
    slow_request_s: float | None = Field(default=10.0, gt=0)
    """A request that takes longer gets a warning in the log, with the time of each stage; unset, none does."""
    otlp_endpoint: str | None = Field(default=None, pattern=r"^https?://")
    """Where traces go by OTLP over HTTP, as http://collector:4318; needs the extra `otel`. Unset, none are made."""
    trace_share: float = Field(default=1.0, ge=0, le=1)
    """Of the requests that bring no trace of their own; the others are traced as their `traceparent` says."""
    min_free_bytes: int = Field(default=256 * 2**20, ge=0)
    """Of the disks that hold the store and the jobs. Uploads of jobs stop there, items and label sets at half of it,
    with 503; deletes go on. With less, /readyz names it, and goes on to be ready."""

    keys: Path | None = None
    """The file of API keys that `python -m service keys` writes. Unset, whoever reaches the port may read and write."""
    origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Sites whose pages may call the service from a browser (CORS), such as https://example.org; commas between."""
    hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Names that the service may be asked for by (Host) where it has no keys, beside addresses and localhost; commas
    between. Unset, any name will do, unless it listens on a loopback address: then none."""

    fetch: Literal["off", "https", "http"] = "off"
    """Whether URLs are inputs: over https, or over http too; to public addresses, unless `fetch_allow` says more."""
    fetch_allow: Annotated[tuple[str, ...], NoDecode] = ()
    """Names (`example.org`, `*.example.org`): if there are any, only these. Networks (`10.1.0.0/16`): besides public
    addresses. Separated by commas."""
    fetch_deny: Annotated[tuple[str, ...], NoDecode] = ()
    """Names and networks that are not fetched from, whatever else says so; a NAT64 prefix of your own belongs here."""
    fetch_ports: Annotated[tuple[int, ...], NoDecode] = ()
    """Unset, 443, and 80 for http; separated by commas."""
    fetch_timeout_s: float = Field(default=10.0, gt=0, le=300)
    """For one URL, from its name to its last byte."""
    fetch_concurrency: int = Field(default=16, gt=0, le=1_024)
    """URLs that are fetched at once; those of jobs, which come on top, are a quarter of that."""
    fetch_dns: str | None = None
    """The name server, ADDRESS or ADDRESS:PORT, such as one that knows no name of your network; unset, the system's."""
    fetch_ca: Path | None = None
    """A PEM file of authorities that are trusted besides the public ones."""

    redis_url: str | None = Field(default=None, pattern=r"^(redis|rediss|unix)://")
    """Of a Redis that processes share: the cache of vectors, and what keys may still spend. Unset, each has its own."""
    redis_timeout_s: float = Field(default=0.1, gt=0, le=10)
    """For one command; past it Redis is left alone for a second, and what it would have told counts as unknown."""
    cache_ttl_s: int = Field(default=7 * 86_400, gt=0)
    """How long Redis keeps a vector."""
    cache_bytes: int = Field(default=256 * 2**20, ge=0)
    """Of the in-process cache, used where there is no Redis."""

    max_body_bytes: int = Field(default=64_000_000, gt=0)
    """Of one request; past it, 413."""
    max_bodies_bytes: int = Field(default=400_000_000, gt=0)
    """Of all requests that are being read or answered, together; past it, 429 before a body is read."""
    max_unsent_bytes: int = Field(default=128_000_000, gt=0)
    """Of answers that clients have not read yet, together; past it, who has been behind for the longest is cut off."""
    max_image_bytes: int = Field(default=25_000_000, gt=0)
    """Of one image's file."""
    max_image_pixels: int = Field(default=40_000_000, gt=0)
    """Of one image, as it is decoded: width × height. A JPEG is decoded at a half, a quarter or an eighth of its sides
    where the tower takes no more, and only those pixels count."""
    max_audio_bytes: int = Field(default=45_000_000, gt=0)
    """Of one sound's file: half an hour of MP3 at 192 kbit/s, and as base64 less than a body."""
    max_audio_seconds: float = Field(default=1_800.0, gt=0)
    """Of one sound."""
    max_audio_decoded_bytes: int = Field(default=2**30, gt=0)
    """Of one sound, decoded, all channels: what is gone through block by block, and never held."""
    max_audio_channels: int = Field(default=8, gt=0)
    """Of one sound."""
    max_video_bytes: int = Field(default=100_000_000, gt=0)
    """Of one video's file; max_body_bytes comes first: raise that too."""
    max_video_seconds: float = Field(default=600.0, gt=0)
    """Of one video."""
    max_video_pixels: int = Field(default=9_000_000, gt=0)
    """Of a frame: 9,000,000 is 4K."""
    video_frames: int = Field(default=16, gt=0, le=256)
    """That are looked at, at most: the middles of so many stretches, and one a second of a shorter video."""
    max_text_chars: int = Field(default=32_000, gt=0)
    """Of one text; a longer one is refused. What a tower does not read of it is cut off, and the answer says so."""
    token_ids: bool = False
    """Take token ids at /v1/embeddings in place of texts, as made by clients with the bundle's own tokenizer, special
    tokens included. Ids of another tokenizer cannot be told from them, and would be the vectors of other texts."""
    max_inputs: int = Field(default=256, gt=0, le=100_000)
    """Of one request; at /v1/embeddings eight times as many, as OpenAI's clients send."""
    max_top_k: int = Field(default=1_000, gt=0, le=100_000)
    """Results that one query may ask for."""

    jobs: Path | None = None
    """Where the inputs and the progress of bulk jobs are kept, by one process; unset, `jobs` in the store's directory.
    Where the store is a Milvus, unset means that no jobs are taken."""
    jobs_keep_s: float = Field(default=7 * 86_400, gt=0)
    """How long a job that ended is remembered, with its errors and its Idempotency-Key."""
    max_jobs: int = Field(default=100, gt=0)
    """Unfinished; past it, 429."""
    max_job_bytes: int = Field(default=10_000_000_000, gt=0)
    """Of a job's input, unpacked."""
    max_job_items: int = Field(default=10_000_000, gt=0)
    """Of one job."""

    batch_images: int | None = Field(default=None, gt=0)
    """Items in one call of the image tower; unset, 8 on the CPU and 32 on a GPU."""
    batch_tokens: int | None = Field(default=None, gt=0)
    """Padded tokens (rows × longest) in one call of the text tower; unset, 512 on the CPU and 8,192 on a GPU."""
    batch_audio_seconds: float = Field(default=60.0, gt=0)
    """Seconds of sound in one call of the audio tower, as the tower hears it. A longer sound is a call of its own, of
    which so much is encoded at once on the CPU: memory goes by this, not by the sound's length."""
    queue_inputs: int = Field(default=1_024, gt=0)
    """Inputs of one modality that may be in work or waiting; past it, 429 with a Retry-After. A request of more inputs
    than that takes half of the room, and is fed through in pieces."""
    queue_s: float = Field(default=5.0, gt=0)
    """For which inputs of one modality may wait, at the pace that decoding and their tower keep lately; past it, 429. A
    key whose callers send a flood takes neither all of this nor of `queue_inputs`: another has a part of its own."""
    hang_s: float = Field(default=60.0, gt=0)
    """A model call that takes longer is taken to hang: new inputs of its modality get 503 at once, and /readyz and
    /healthz say so, until it ends. Longer than the longest call of the slowest tower."""
    decode_workers: int = Field(default=4, gt=0, le=256)
    """Threads of a model that decode and preprocess."""
    request_deadline_s: float = Field(default=60.0, gt=0)
    """For one request, whatever stages it has, once its body is there; past it, 504. Of one that stores something: for
    its vectors."""
    drain_s: float = Field(default=0.0, ge=0, le=600)
    """After SIGTERM the server works on for so long, and says in /readyz and by `Connection: close` that it is ending.
    Behind a proxy: longer than the proxy keeps idle connections to it, and than it takes to notice."""
    shutdown_grace_s: int = Field(default=20, gt=0)
    """For what is under way at the end; past it, 503."""

    @field_validator(
        "milvus_token",
        "redis_url",
        "root_path",
        "keys",
        "fetch_dns",
        "fetch_ca",
        "unload_idle_s",
        "batch_images",
        "batch_tokens",
        "slow_request_s",
        "otlp_endpoint",
        "jobs",
        mode="before",
    )
    @classmethod
    def _empty_is_unset(cls, value: Any) -> Any:
        return value or None

    @field_validator(
        "more_bundles",
        "model_aliases",
        "bundle_signers",
        "modalities",
        "gpus",
        "origins",
        "hosts",
        "fetch_allow",
        "fetch_deny",
        "fetch_ports",
        mode="before",
    )
    @classmethod
    def _separated(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("previews")
    @classmethod
    def _have_a_place(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("store") == Path("milvus"):
            raise ValueError("a Milvus store keeps no previews")
        return value

    @field_validator("gpus")
    @classmethod
    def _different(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) < len(value) or min(value) < 0:
            raise ValueError("name one GPU or more, each once, from 0 up")
        return value

    @field_validator("origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            if not re.fullmatch(r"https?://[a-z0-9.-]+(:[0-9]+)?", each):
                raise ValueError(f"{each!r} is no origin: write scheme://host or scheme://host:port, in lower case")
        return value

    @field_validator("model_aliases")
    @classmethod
    def _pairs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            if not re.fullmatch(r"[^=]{1,64}=[^=]+", each):
                raise ValueError(f"{each!r} is no alias: write ALIAS=NAME")
        if len({each.partition("=")[0] for each in value}) < len(value):
            raise ValueError("an alias is there twice")
        return value

    @property
    def aliases(self) -> dict[str, str]:
        """Names of models by their other names."""
        return dict(each.split("=") for each in self.model_aliases)

    @property
    def signers(self) -> tuple[Ed25519PublicKey, ...]:
        """Raises SettingsError."""
        try:
            return tuple(map(public_key, self.bundle_signers))
        except SignatureError as error:
            raise SettingsError(f"ISTHMUS_BUNDLE_SIGNERS: {error}") from None

    def read_bundle(self, path: Path | None = None, *, hashed: bool = False) -> Bundle:
        """The bundle at `path`, else the default one, on the conditions that are set. Raises BundleError.

        Unless all of it is `hashed` here, its files are checked as they are opened.
        """
        commercial = self.licences == "commercial"
        return read_bundle(path or self.bundle, self.signers, commercial=commercial, hashed=hashed)

    @property
    def jobs_folder(self) -> Path | None:
        return self.jobs or (None if self.store == Path("milvus") else self.store / "jobs")

    @property
    def least_free_bytes(self) -> int:
        """Where items stop: what an upload leaves is for the others."""
        return self.min_free_bytes // 2

    @property
    def towers_on_gpus(self) -> Gpus:
        return Gpus(self.gpus, self.cuda_graphs, self.tensorrt_engines)

    @property
    def cpu_lanes(self) -> int:
        cores = len(os.sched_getaffinity(0))
        return self.lanes or max(1, min(_MOST_LANES, cores // (self.threads or 1)))

    @property
    def call_threads(self) -> int:
        return self.threads or max(1, len(os.sched_getaffinity(0)) // self.cpu_lanes)

    @cached_property
    def limits(self) -> Limits:
        stated = {name: getattr(self, f"max_{name}") for name in Limits.model_fields if name != "video_frames"}
        return Limits(**stated, video_frames=self.video_frames)


def read_settings(**flags: Any) -> Settings:
    """Settings from the environment, overridden by flags that are not None. Raises SettingsError."""
    given = {name.lower() for name, value in os.environ.items() if value}
    if gone := [name for name in REMOVED if f"isthmus_{name}" in given]:
        advice = "\n".join(f"  ISTHMUS_{name.upper()}: {REMOVED[name]}" for name in gone)
        raise SettingsError(f"these settings no longer exist, unset them:\n{advice}")
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise SettingsError(first["msg"]) from None
        name = str(first["loc"][0])
        raise SettingsError(f"ISTHMUS_{name.upper()} is {first['input']!r}: {first['msg']}") from None
