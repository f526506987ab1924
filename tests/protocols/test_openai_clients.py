"""Programs of other projects that speak OpenAI's protocol, as they are, against a live server: what they send is
embedded as what it is, or refused with advice."""

import base64
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from service.settings import Settings
from tests import npm, tiny_bundle
from tests.conftest import serving

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # before it is imported: tests ask nobody outside

WORDS = ["a photo of the dog", "red"]
IDS = [tiny_bundle.WORDS.index("red")]
ADVICE = "check_embedding_ctx_length=False"
CLIENT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const asked = JSON.parse(process.argv[3]);
const answers = [];
for (const body of asked) {
  try {
    const answer = body.messages
      ? await client.post("/embeddings", { body })
      : await client.embeddings.create(body);
    answers.push(answer.data.map((each) => each.embedding));
  } catch (error) {
    answers.push({ status: error.status, message: error.message });
  }
}
console.log(JSON.stringify(answers));
"""


@pytest.fixture(scope="module")
def ids_client(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Yield a client of a server whose operator lets clients have the bundle's tokenizer."""
    store = tmp_path_factory.mktemp("ids") / "store"
    with serving(Settings(bundle=bundle_dir, store=store, device="cpu", threads=1, token_ids=True)) as client:
        yield client


@pytest.fixture
def native(shared_client: httpx.Client) -> Callable[..., np.ndarray]:
    def embed(*inputs: Any) -> np.ndarray:
        answer = shared_client.post("/embed", json={"inputs": list(inputs)})
        assert answer.status_code == 200, answer.text
        return np.array([each["embedding"] for each in answer.json()["embeddings"]])

    return embed


@pytest.fixture
def closed() -> Iterator[httpx.Client]:
    """Yield a client that is closed, for programs that would leave their own open."""
    with httpx.Client(trust_env=False) as client:
        yield client


@pytest.fixture
def sound(wav: Callable[..., bytes]) -> str:
    return base64.b64encode(wav()).decode()


MODEL = {"model": "tiny"}


def shapes(picture: str, sound: str) -> list[dict[str, Any]]:
    """Bodies that each ask for the vector of the picture or of the sound, as clients of other servers write them."""
    url, heard = {"url": picture}, f"data:audio/wav;base64,{sound}"
    return [
        {"input": [picture]},
        {"input": picture},
        {"input": [picture], "modality": "image"},
        {"input": [picture.partition(",")[2]], "modality": "image"},
        {"input": [{"image": picture}]},
        {"input": [{"type": "image_url", "image_url": url}]},
        {"input": [{"content": [{"type": "image_url", "image_url": url}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]},
        {"input": [heard]},
        {"input": [sound], "modality": "audio"},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": sound}}]}]},
    ]


SOUNDS_FROM = 8
"""The shapes from here on are of the sound."""


def check(made: list[np.ndarray], native: Callable[..., np.ndarray], picture: str, sound: str) -> None:
    seen, heard = native({"image": picture}, {"audio": sound})
    for place, vector in enumerate(made):
        assert vector @ (seen if place < SOUNDS_FROM else heard) > 0.9999, place


@pytest.mark.client("openai")
def test_openai_for_python(
    shared_client: httpx.Client,
    ids_client: httpx.Client,
    native: Callable[..., np.ndarray],
    picture: str,
    sound: str,
) -> None:
    with openai.OpenAI(base_url=f"{shared_client.base_url}/v1", api_key="none", max_retries=0) as client:

        def ask(body: dict[str, Any]) -> np.ndarray:
            if "messages" in body:  # as vLLM's own examples do
                answer = client.post("/embeddings", cast_to=openai.types.CreateEmbeddingResponse, body=body | MODEL)
            else:
                known = {name: value for name, value in body.items() if name != "modality"}
                answer = client.embeddings.create(**known, **MODEL, extra_body={**body, **MODEL})
            return np.array(answer.data[0].embedding)

        check([ask(body) for body in shapes(picture, sound)], native, picture, sound)
        for ids in (IDS, [IDS]):
            with pytest.raises(openai.UnprocessableEntityError, match=ADVICE):
                client.embeddings.create(input=ids, **MODEL)
    with openai.OpenAI(base_url=f"{ids_client.base_url}/v1", api_key="none", max_retries=0) as client:
        many = client.embeddings.create(input=[IDS, IDS * 2], **MODEL)
        one = client.embeddings.create(input=IDS, **MODEL)
        for each in (*many.data, *one.data):
            assert np.allclose(each.embedding, native("red")[0], atol=1e-6)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the program and OpenAI's client for Node."""
    folder = tmp_path_factory.mktemp("node")
    npm.install(folder, "openai@6.49.0")
    (folder / "client.mjs").write_text(CLIENT)
    return folder


@pytest.mark.full
@pytest.mark.client("openai (npm)", version="6.49.0")
def test_openai_for_node(
    node: Path, shared_client: httpx.Client, native: Callable[..., np.ndarray], picture: str, sound: str
) -> None:
    asked = [body | MODEL for body in (*shapes(picture, sound), {"input": WORDS}, {"input": IDS})]
    command = ["node", "client.mjs", f"{shared_client.base_url}/v1", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=node, timeout=60)
    assert done.returncode == 0, done.stderr
    *media, texts, refused = json.loads(done.stdout)
    check([np.array(each[0]) for each in media], native, picture, sound)
    assert np.allclose(texts, native(*WORDS), atol=1e-6)
    assert refused["status"] == 422 and ADVICE in refused["message"]


@pytest.mark.full
@pytest.mark.client("langchain-openai")
def test_langchain(
    shared_client: httpx.Client,
    native: Callable[..., np.ndarray],
    picture: str,
    closed: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import tiktoken
    from langchain_openai import OpenAIEmbeddings

    def embeddings(**more: Any) -> OpenAIEmbeddings:
        url = f"{shared_client.base_url}/v1"
        return OpenAIEmbeddings(base_url=url, api_key="none", model="tiny", max_retries=0, http_client=closed, **more)

    texts = embeddings(check_embedding_ctx_length=False)
    assert np.allclose(texts.embed_documents(WORDS), native(*WORDS), atol=1e-6)
    assert np.allclose(texts.embed_query("red"), native("red")[0], atol=1e-6)
    assert native({"image": picture})[0] @ texts.embed_query(picture) > 0.9999
    # Its own vocabulary is a download; that of single bytes is as foreign to the bundle.
    single = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks=single, special_tokens={})
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda name: encoding)
    with pytest.raises(openai.UnprocessableEntityError, match=ADVICE):
        embeddings().embed_query("red")


@pytest.mark.full
@pytest.mark.client("llama-index-embeddings-openai")
def test_llama_index(
    shared_client: httpx.Client, native: Callable[..., np.ndarray], picture: str, closed: httpx.Client
) -> None:
    from llama_index.embeddings.openai import OpenAIEmbedding

    url = f"{shared_client.base_url}/v1"
    embedding = OpenAIEmbedding(model_name="tiny", api_base=url, api_key="none", max_retries=0, http_client=closed)
    assert np.allclose(embedding.get_text_embedding_batch(WORDS), native(*WORDS), atol=1e-6)
    assert np.allclose(embedding.get_query_embedding("red"), native("red")[0], atol=1e-6)
    assert native({"image": picture})[0] @ embedding.get_text_embedding(picture) > 0.9999


@pytest.mark.full
@pytest.mark.client("litellm")
def test_litellm(shared_client: httpx.Client, native: Callable[..., np.ndarray], picture: str, sound: str) -> None:
    import litellm

    def embed(provider: str, given: Any, **more: Any) -> np.ndarray:
        url = f"{shared_client.base_url}/v1"
        answer = litellm.embedding(f"{provider}/tiny", input=given, api_base=url, api_key="none", max_retries=0, **more)
        return np.array([each["embedding"] for each in answer.data])

    for provider in ("openai", "hosted_vllm"):
        assert np.allclose(embed(provider, WORDS), native(*WORDS), atol=1e-6)
        assert native({"image": picture})[0] @ embed(provider, [picture])[0] > 0.9999
    with pytest.raises(litellm.BadRequestError, match=ADVICE):
        embed("openai", [IDS])


@pytest.mark.client("langchain-community")
@pytest.mark.filterwarnings("ignore:`langchain-community` is being sunset:DeprecationWarning")
def test_langchains_client_of_infinity(shared_client: httpx.Client, native: Callable[..., np.ndarray]) -> None:
    from langchain_community.embeddings import InfinityEmbeddings

    embeddings = InfinityEmbeddings(model="tiny", infinity_api_url=f"{shared_client.base_url}/v1")
    assert np.allclose(embeddings.embed_documents(WORDS), native(*WORDS), atol=1e-6)
