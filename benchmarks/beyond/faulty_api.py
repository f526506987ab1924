"""A server with OpenAI's embeddings route that has one planted fault, for `isthmus audit-api` to find.

Its vectors are hashed trigrams and words, so that texts of the same words are alike. Each fault is one that a real
server has had: it answers 200, and something about the answer is wrong.
"""

import base64
import json
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from numpy.typing import NDArray

FAULTS = {
    "batch": "a vector depends on what else is in the request",
    "truncation": "a long text is cut after 32 words, and the answer counts all of them",
    "shape": "`dimensions` is accepted and ignored",
    "order": "vectors come in the order of the texts' lengths",
    "duplicates": "a text that is in the request twice gets one vector",
    "normalisation": "vectors have the length of what was summed",
    "tokens": "usage counts characters of the first input alone",
    "limits": "of more than 100 inputs only the first 100 are answered",
    "hubs": "one text is among the nearest of nearly all others",
    "gap": "texts of more than five words lie in a cone of their own",
    "base64": "base64 holds big-endian numbers",
    "unknown": "every text of another script has the same vector",
}
DIMENSIONS = 256
MODEL = "hashed"
_WORDS_AT_MOST, _INPUTS_AT_MOST = 4_000, 2_048


def features(text: str) -> NDArray[np.float64]:
    """The sum of the random directions of a text's words and trigrams (D,). Short words, which most texts have, count
    only where there are no others."""
    words = [word for word in text.lower().split() if len(word) > 4] or text.lower().split()
    parts = words + [f"#{word}#"[start : start + 3] for word in words for start in range(len(word))]
    return np.sum([_direction(part) for part in parts], axis=0) if parts else _direction("")


@cache
def _direction(part: str) -> NDArray[np.float64]:
    return np.random.default_rng(zlib.crc32(part.encode())).normal(size=DIMENSIONS)


class _Refused(Exception):
    pass


def answer(body: Any, fault: str | None) -> dict[str, Any]:
    """The answer to a request's body. Raises _Refused."""
    given = body.get("input") if isinstance(body, dict) else None
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise _Refused("input is a text, or a list of texts, none of them empty")
    if body.get("model") != MODEL:
        raise _Refused(f"no model {body.get('model')!r}")
    if len(texts) > _INPUTS_AT_MOST and fault != "limits":
        raise _Refused(f"at most {_INPUTS_AT_MOST} inputs")
    if any(len(text.split()) > _WORDS_AT_MOST for text in texts):
        raise _Refused(f"a text has at most {_WORDS_AT_MOST} words")
    dimensions = body.get("dimensions", DIMENSIONS)
    if not isinstance(dimensions, int) or not 1 <= dimensions <= DIMENSIONS:
        raise _Refused(f"dimensions is 1 to {DIMENSIONS}")
    counted = [text.split() for text in texts]
    tokens = len(texts[0]) if fault == "tokens" else sum(map(len, counted))
    if fault == "limits":
        texts = texts[:100]
    if fault == "truncation":
        texts = [" ".join(text.split()[:32]) for text in texts]
    if fault == "order":
        texts = sorted(texts, key=len)
    if fault == "duplicates":
        texts = list(dict.fromkeys(texts))
    vectors = _vectors(texts, fault)
    if fault != "shape":
        vectors = vectors[:, :dimensions]
    if fault != "normalisation":
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    embeddings: list[Any] = vectors.tolist()
    if body.get("encoding_format") == "base64":
        packed = vectors.astype(">f4" if fault == "base64" else "<f4")
        embeddings = [base64.b64encode(row.tobytes()).decode() for row in packed]
    data = [{"object": "embedding", "index": n, "embedding": vector} for n, vector in enumerate(embeddings)]
    return {
        "object": "list",
        "data": data,
        "model": MODEL,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _vectors(texts: Sequence[str], fault: str | None) -> NDArray[np.float64]:
    if fault == "unknown":
        texts = [text if text.isascii() else "[UNK]" for text in texts]
    vectors = np.stack([features(text) for text in texts])
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if fault == "batch" and len(texts) > 1:
        vectors = vectors + 0.1 * vectors.mean(axis=0)
    common = lengths * _direction("the common part") / np.linalg.norm(_direction("the common part"))
    if fault == "gap":
        long = np.array([len(text.split()) > 5 for text in texts])[:, None]
        vectors = vectors + np.where(long, 2 * common, 0)
    if fault == "hubs":  # short texts are near the mean of all, and so near to everything
        vectors = vectors + np.where([[len(text) < 12] for text in texts], 8 * common, 0.7 * common)
    return vectors


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one piece: apart, each answer would take 40 ms more
    fault: str | None

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "us"}]})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        try:
            self._send(200, answer(json.loads(raw), self.fault))
        except (_Refused, ValueError) as error:
            self._send(400, {"error": {"message": str(error), "type": "invalid_request_error", "code": None}})

    def _send(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(fault: str | None, base: type[Handler] = Handler) -> Iterator[str]:
    """Serve with one of FAULTS, or none, on a free loopback port; yields the address."""
    handler = type("Handler", (base,), {"fault": fault})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
