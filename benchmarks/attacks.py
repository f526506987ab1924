"""Requests that are made to hurt: each as the bytes that go over the wire, with the one answer that is right for it.

`everything(seed)` makes them all. The files inside are those of `hostile_media`, which says what is right for each.
"""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import hostile_jobs as bulk
from benchmarks import hostile_media as media
from benchmarks.hostile_media import BAD, LARGE, OK, UNSUPPORTED

NONE = "not_found"
INVALID, MALFORMED, BODY = "invalid_request", "malformed_request", "body_too_large"
MULTIPART = "multipart/form-data"
ANY_OF_MEDIA = frozenset({OK, LARGE, UNSUPPORTED, BAD})
"""The codes of a damaged file: what is damaged may be what nobody reads."""


@dataclass(frozen=True)
class Attack:
    group: str
    name: str
    wire: bytes
    right: frozenset[str]
    """Codes of the problem that answers it, or `ok`."""
    ends: bool = False
    """Whether the client says that it sends no more."""
    job: bool = False
    """Whether what is right is told by the job that it makes, if it makes one."""
    sound_s: float = 0.0
    """How long a sound is that is right to be embedded."""
    goes_on: bool = False
    """Whether the client goes on to write once it is answered."""
    crowd: int = 0
    """Others that send the same before, and do not read what they are answered."""


def head(path: str, headers: Iterable[tuple[str, str]], method: str = "POST") -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode("latin-1")


def post(path: str, body: bytes, kind: str = "application/json", method: str = "POST") -> bytes:
    return head(path, [("Content-Type", kind), ("Content-Length", str(len(body)))], method) + body


def form(path: str, *parts: bytes, end: bytes = b"--x--\r\n") -> bytes:
    return post(path, b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + end, f"{MULTIPART}; boundary=x")


def part(data: bytes, name: str = "file", filename: str | None = "a", more: bytes = b"") -> bytes:
    named = "" if filename is None else f'; filename="{filename}"'
    return f'Content-Disposition: form-data; name="{name}"{named}\r\n'.encode("latin-1") + more + b"\r\n" + data


def _written(value: Any) -> bytes:
    return json.dumps(value).encode()


# Files


def of_files(seed: int) -> Iterator[Attack]:
    images = (
        media.pngs,
        media.tiffs,
        media.jpegs,
        media.gifs,
        media.bmps,
        media.webps,
        media.polyglots,
        media.strangers,
    )
    groups = {"images": images, "large images": (media.large,), "sounds": (media.wavs, media.sounds)}
    for group, makers in groups.items():
        for name, (right, data) in (entry for make in makers for entry in make().items()):
            sound_s = media.LONG_S.get(name, 0.0)
            yield Attack(group, name, form("/embed", part(data)), frozenset({right}), sound_s=sound_s)
    for name, (right, data) in media.strangers().items():
        # Called an image, or a sound, by who sends it: what it is is told by what is in it.
        for kind in ("image", "audio"):
            body = _written({"inputs": [{kind: base64.b64encode(data).decode()}]})
            # Of what begins as something that is read it is told that it is damaged.
            codes = {BAD, UNSUPPORTED} if right == BAD else {UNSUPPORTED}
            yield Attack("strangers", f"{name}, called {kind}", post("/embed", body), frozenset(codes))
    yield from of_damaged_files(seed, cuts=3, flips=5)


def of_damaged_files(seed: int, cuts: int, flips: int) -> Iterator[Attack]:
    for honest in (media.honest_images(), media.honest_sounds()):
        for name, data in media.damaged(honest, seed, cuts=cuts, flips=flips).items():
            yield Attack("damaged", name, form("/embed", part(data)), ANY_OF_MEDIA)


# JSON

_SMALL_PNG = base64.b64encode(media.picture(size=(8, 8))).decode()


def of_json(model: str, dimensions: int) -> Iterator[Attack]:
    def attack(path: str, name: str, body: bytes | Any, right: str, method: str = "POST") -> Attack:
        written = body if isinstance(body, bytes) else _written(body)
        return Attack("json", f"{path}: {name}", post(path, written, method=method), frozenset({right}))

    for name, (body, right) in _bodies().items():
        yield attack("/embed", name, body, right)
    yield from _texts(attack)
    numbers: Sequence[Any] = (0, -1, 10**18, 1.5, "8x", [], {}, dimensions + 1)
    for value in numbers:
        yield attack("/embed", f"dimensions of {value!r}", {"inputs": ["a"], "dimensions": value}, INVALID)
    for name, (picture, right) in _PICTURES.items():
        yield attack("/embed", f"an image of {name}", {"inputs": [{"image": picture}]}, right)
    yield attack("/embed", "an image of 15 MB of padding", {"inputs": [{"image": "=" * 15_000_000}]}, BAD)
    yield attack("/embed", "an image of 15 MB of white space", {"inputs": [{"image": " " * 15_000_000}]}, BAD)
    yield attack("/embed", "an image of 36 MB of As", {"inputs": [{"image": "A" * 36_000_000}]}, LARGE)
    inputs: Sequence[Any] = (None, 5, True, ["x"], {"image": "x", "text": "y"}, {"picture": "x"}, {}, {"file": "x"})
    for value in (*inputs, {"text": 5}):
        yield attack("/embed", f"an input of {value!r}", {"inputs": [value]}, INVALID)
    yield attack("/score", "500 pairs", {"pairs": [{"a": "x", "b": "y"}] * 500}, INVALID)
    yield from _searches(attack, dimensions)
    yield from _items(attack, dimensions)
    yield from _labels(attack)
    yield from _openai(attack, model)


def _bodies() -> Mapping[str, tuple[bytes, str]]:
    many = 19_000_000
    return {
        "100,000 lists in one another": (b'{"inputs":' + b"[" * 100_000, MALFORMED),
        "100,000 objects in one another": (b'{"a":' * 100_000, MALFORMED),
        "2,000 closed lists in one another": (b"[" * 2_000 + b"]" * 2_000, MALFORMED),
        "1,000 closed lists in one another": (b'{"inputs":[' + b"[" * 1_000 + b"]" * 1_000 + b"]}", INVALID),
        "19 MB of empty objects": (b'{"inputs":[' + b"{}," * (many // 3) + b"{}]}", BODY),
        "19 MB of objects": (b'{"inputs":[' + b'{"a":0},' * (many // 8) + b"{}]}", BODY),
        "19 MB of empty lists": (b'{"inputs":[' + b"[]," * (many // 3) + b"[]]}", BODY),
        "19 MB of numbers": (b'{"inputs":[' + b"0," * (many // 2) + b"0]}", BODY),
        "19 MB of short texts": (b'{"inputs":[' + b'"ab",' * (many // 5) + b'""]}', BODY),
        "19 MB of keys": (b'{"inputs":["a"]' + b"".join(b',"%d":0' % n for n in range(1_500_000)) + b"}", BODY),
        "200,000 keys": (b'{"inputs":["a"]' + b"".join(b',"%d":0' % n for n in range(200_000)) + b"}", INVALID),
        "19 MB of one text": (b'{"inputs":["' + b"a" * many + b'"]}', "invalid_input"),
        "19 MB of one text of brackets": (b'{"inputs":["' + b"{,[" * (many // 3) + b'"]}', "invalid_input"),
        "19 MB of escapes": (b'{"inputs":["' + b"\\u0041" * (many // 6) + b'"]}', "invalid_input"),
        "19 MB of white space": (b'{"inputs":' + b" " * many + b'["a"]}', OK),
        "a number of 1,000,000 digits": (b'{"inputs":["a"],"dimensions":' + b"1" * 1_000_000 + b"}", MALFORMED),
        "a fraction of 1,000,000 digits": (b'{"inputs":["a"],"dimensions":0.' + b"1" * 1_000_000 + b"}", INVALID),
        "1e400": (b'{"inputs":["a"],"dimensions":1e400}', MALFORMED),
        "-1e400": (b'{"inputs":["a"],"dimensions":-1e400}', MALFORMED),
        "1e308": (b'{"inputs":["a"],"dimensions":1e308}', INVALID),
        "2**64": (b'{"inputs":["a"],"dimensions":18446744073709551616}', INVALID),
        "2**63": (b'{"inputs":["a"],"dimensions":9223372036854775808}', INVALID),
        "NaN": (b'{"inputs":["a"],"dimensions":NaN}', MALFORMED),
        "Infinity": (b'{"inputs":["a"],"dimensions":-Infinity}', MALFORMED),
        "0x10": (b'{"inputs":["a"],"dimensions":0x10}', MALFORMED),
        "a leading zero": (b'{"inputs":["a"],"dimensions":010}', MALFORMED),
        "bytes that are no UTF-8": (b'{"inputs":["\xff\xfe"]}', MALFORMED),
        "an overlong slash": (b'{"inputs":["\xc0\xaf"]}', MALFORMED),
        "a surrogate in UTF-8": (b'{"inputs":["\xed\xa0\x80"]}', MALFORMED),
        "a code past Unicode": (b'{"inputs":["\xf4\x90\x80\x80"]}', MALFORMED),
        "half a character": (b'{"inputs":["\xe2\x82"]}', MALFORMED),
        "a lone surrogate": (b'{"inputs":["\\ud800"]}', MALFORMED),
        "surrogates the wrong way round": (b'{"inputs":["\\udc00\\ud800"]}', MALFORMED),
        "NUL in a text": (b'{"inputs":["a\\u0000b"]}', OK),
        "NUL in the JSON": (b'{"inputs":["a"]}\0', MALFORMED),
        "a mark of order": (b'\xef\xbb\xbf{"inputs":["a"]}', OK),
        "UTF-16": ('{"inputs":["a"]}'.encode("utf-16"), MALFORMED),
        "no body": (b"", MALFORMED),
        "null": (b"null", INVALID),
        "a list": (b"[]", INVALID),
        "a text": (b'"inputs"', INVALID),
        "a number": (b"1", INVALID),
        "two values": (b'{"inputs":["a"]}{"inputs":["a"]}', MALFORMED),
        "a comment": (b'{"inputs":["a"]}//', MALFORMED),
        "a trailing comma": (b'{"inputs":["a"],}', MALFORMED),
        "single quotes": (b"{'inputs':['a']}", MALFORMED),
        "half of it": (b'{"inputs":["a"', MALFORMED),
        "a key twice": (b'{"inputs":["a"],"inputs":[]}', INVALID),
        "a key of 1 MB": (b'{"' + b"k" * 1_000_000 + b'":0,"inputs":["a"]}', INVALID),
        "a raw line feed in a text": (b'{"inputs":["a\nb"]}', MALFORMED),
        "__proto__": (b'{"inputs":["a"],"__proto__":{"x":1}}', INVALID),
        "a class": (b'{"inputs":["a"],"__class__":"x"}', INVALID),
    }


def _texts(attack: Any) -> Iterator[Attack]:
    yield attack("/embed", "257 inputs", {"inputs": ["a"] * 257}, INVALID)
    yield attack("/embed", "no inputs", {"inputs": []}, INVALID)
    yield attack("/embed", "an empty text", {"inputs": [""]}, "invalid_input")
    yield attack("/embed", "a text too long", {"inputs": ["a" * 32_001]}, "invalid_input")
    # A tokenizer of words takes none that is so long: there is nothing in these that it knows.
    yield attack("/embed", "a word of 32,000 letters", {"inputs": ["a" * 32_000]}, "invalid_input")
    yield attack("/embed", "32,000 marks on one letter", {"inputs": ["a" + "\u0301\u0323" * 15_999]}, OK)
    yield attack("/embed", "32,000 invisible characters", {"inputs": ["a" + "\u200b" * 31_999]}, OK)
    hebrew = {"inputs": ["\u202e" + "\u05d0" * 31_999]}
    yield attack("/embed", "32,000 letters from right to left", hebrew, "invalid_input")
    pictures_of_letters = {"inputs": ["\U0001f469\u200d\U0001f52c" * 10_000]}
    yield attack("/embed", "32,000 pictures in a text", pictures_of_letters, "invalid_input")
    picture = "data:image/png;base64," + _SMALL_PNG
    yield attack("/embed", "a data: URI as a string", {"inputs": [picture]}, OK)
    yield attack("/embed", "a data: URI as a text", {"inputs": [{"text": picture}]}, "invalid_input")
    yield attack("/embed", "a data: URI as a string, damaged", {"inputs": ["data:image/png;base64,AAAA"]}, UNSUPPORTED)
    yield attack("/embed", "19 MB that begin as a data: URI", {"inputs": ["data:image/png;" + "a" * 19_000_000]}, BAD)


_PICTURES: Mapping[str, tuple[str, str]] = {
    "nothing": ("", BAD),
    "white space": (" \n", BAD),
    "no base64": ("!!!!", BAD),
    "base64 of one letter": ("A", BAD),
    "base64 padded in the middle": ("QUJD=QUJD", BAD),
    "other letters": ("фыва", BAD),
    "a data: URI of text": ("data:text/plain,hello", BAD),
    "a data: URI without data": ("data:image/png;base64,", BAD),
    "a data: URI without a comma": ("data:image/png;base64", BAD),
    "a data: URI of another kind": ("data:text/html;base64," + _SMALL_PNG, OK),
    "an http: URL": ("http://169.254.169.254/latest/meta-data", "url_fetch_disabled"),
    "an https: URL": ("https://localhost/", "url_fetch_disabled"),
    "an HTTPS: URL": ("HTTPS://[::1]/", "url_fetch_disabled"),
    "a file: URL": ("file:///etc/passwd", BAD),
    "a path": ("/etc/passwd", BAD),
    "a gopher: URL": ("gopher://localhost:6379/_FLUSHALL", BAD),
}


def _searches(attack: Any, dimensions: int) -> Iterator[Attack]:
    deep: Any = {"a": 1}
    for _ in range(100):
        deep = {"$not": deep}
    filters: Mapping[str, Any] = {
        "100 nots": deep,
        "10,000 alternatives": {"$or": [{"a": 1}] * 10_000},
        "2,000 values": {"a": {"$in": list(range(2_000))}},
        "700,000 values": {"a": list(range(700_000))},
        "an unknown operator": {"a": {"$where": "sleep(1)"}},
        "a pattern": {"a": {"$regex": "(a+)+$"}},
        "an object in an object": {"a": {"b": {"c": 1}}},
        "a list": [],
        "no alternatives": {"$or": []},
        "mixed bounds": {"a": {"$gt": 1, "$lt": "b"}},
        "NUL in a key": {"a\0b": 1},
        "a NUL in a value": {"a": "b\0"},
    }
    for name, value in filters.items():
        yield attack("/search", f"a filter of {name}", {"query": "a", "filter": value}, INVALID)
    yield attack("/search", "a filter that is SQL", {"query": "a", "filter": {"a') OR 1=1 --": "x"}}, OK)
    for value in (0, -1, 1_001, 10**15, 1.5, "10", True):
        yield attack("/search", f"a top_k of {value!r}", {"query": "a", "top_k": value}, INVALID)
    yield attack("/search", "a top_k of null", {"query": "a", "top_k": None}, OK)
    yield from _vectors(attack, dimensions)
    parts: Mapping[str, tuple[Any, str]] = {
        "33 parts": ([{"text": "a"}] * 33, INVALID),
        "no parts": ([], INVALID),
        "parts that add up to nothing": ([{"text": "a"}, {"text": "a", "weight": -1}], "invalid_input"),
        "weights of 0": ([{"text": "a", "weight": 0}], "invalid_input"),
        "huge weights": ([{"text": "a", "weight": 1e308}, {"text": "b", "weight": 1e308}], OK),
        "a weight that is a text": ([{"text": "a", "weight": "NaN"}], INVALID),
        "a compose in a compose": ([{"compose": []}], INVALID),
    }
    for name, (value, right) in parts.items():
        yield attack("/search", f"a compose of {name}", {"query": {"compose": value}}, right)
    yield attack("/search", "no query", {}, INVALID)
    yield attack("/search", "queries and a query", {"query": "a", "queries": ["a"]}, INVALID)
    yield attack("/search/batch", "257 queries", {"queries": ["a"] * 257}, INVALID)
    yield attack("/search/batch", "100 queries of 1,000", {"queries": ["a"] * 100, "top_k": 1_000}, INVALID)
    yield attack("/search/script", "17 steps", {"script": ["a"] * 17}, INVALID)
    yield attack("/search/script", "a script of one", {"script": ["a"]}, INVALID)
    yield attack("/search", "100,000 fields to include", {"query": "a", "include": ["vector"] * 100_000}, INVALID)
    yield attack("/search", "100,000 modalities", {"query": "a", "modalities": ["text"] * 100_000}, INVALID)
    yield attack("/search", "an id that is not there", {"query": {"id": "no such"}}, NONE)
    yield attack("/search", "a collection that is a path", {"query": "a", "collection": "../../etc"}, INVALID)
    for words in ('"', "NEAR(a b", "a* OR ^b", "col:a", "a AND NOT", "-" * 1_000, "'; DROP TABLE items; --", "\\"):
        yield attack("/search", f"the words {words[:20]!r}", {"query": "a", "keywords": {"query": words}}, OK)


def _vectors(attack: Any, dimensions: int) -> Iterator[Attack]:
    vectors: Mapping[str, Any] = {
        "no numbers": [],
        "zeros": [0.0] * dimensions,
        "one number too many": [0.1] * (dimensions + 1),
        "4,000,000 numbers": [0] * 4_000_000,
        "texts": ["a"] * dimensions,
        "lists": [[0.1]] * dimensions,
        "booleans": [True] * dimensions,
        "no base64": "!!",
        "base64 of three bytes": "AAAA",
        "base64 of what is no number": base64.b64encode(b"\0\0\xc0\x7f" * dimensions).decode(),
        "base64 of infinity": base64.b64encode(b"\0\0\x80\x7f" * dimensions).decode(),
    }
    # What the schema cannot know (the store's dimensions, a direction) is wrong with the input, not the request.
    inputs = ("zeros", "one number too many", "base64 of what is no number", "base64 of infinity")
    for name, value in vectors.items():
        right = "invalid_input" if name in inputs else INVALID
        yield attack("/search", f"a vector of {name}", {"query": {"vector": value}}, right)
    yield attack("/search", "a vector of huge numbers", {"query": {"vector": [1e308] * dimensions}}, OK)
    yield attack("/search", "a vector of tiny numbers", {"query": {"vector": [5e-324] * dimensions}}, OK)


def _items(attack: Any, dimensions: int) -> Iterator[Attack]:
    def item(**given: Any) -> Any:
        return {"items": [{"id": "hostile", "vector": [1.0] * dimensions} | given]}

    deep: Any = 0
    for _ in range(200):
        deep = [deep]
    metadata: Mapping[str, Any] = {
        "200 lists in one another": {"a": deep},
        "17,000 bytes": {"a": "x" * 17_000},
        "3,000,000 values": {"a": [0] * 3_000_000},
        "300,000 keys": {str(n): 0 for n in range(300_000)},
        "NUL": {"a": "\0"},
        "2**63": {"a": 2**63},
        "2**70": {"a": 2**70},
    }
    for name, value in metadata.items():
        yield attack("/items", f"metadata of {name}", item(metadata=value), INVALID)
    yield attack("/items", "metadata that are a list", item(metadata=[]), INVALID)
    for id in ("", "a" * 257, "a\0", "a\nb", "\x7f", 5, None, ["a"]):
        yield attack("/items", f"an id of {str(id)[:8]!r}", item(id=id), INVALID)
    yield attack("/items", "an id that is a path", item(id="../../../../etc/passwd"), OK)
    yield attack("/items", "an id that is SQL", item(id="'; DROP TABLE items; --"), OK)
    yield attack("/items", "an id twice", {"items": item()["items"] * 2}, INVALID)
    yield attack("/items", "257 items", {"items": [{"id": str(n), "text": "a"} for n in range(257)]}, INVALID)
    yield attack("/items", "a collection that is a path", item(collection="../x"), INVALID)
    yield attack("/items", "an item of two inputs", item(text="a"), INVALID)
    yield attack("/items", "a file by name", {"items": [{"id": "a", "file": "/etc/passwd"}]}, INVALID)
    yield attack("/items/delete", "an empty filter", {"filter": {}}, INVALID)
    moves = [{"id": f"{n}", "to": f"{n}x"} for n in range(1_001)]
    yield attack("/items/move", "1,001 moves", {"moves": moves}, INVALID)
    yield attack("/items/delete", "10,001 ids", {"ids": ["a"] * 10_001}, INVALID)
    yield attack("/items/delete", "10,000 ids that are none", {"ids": [5] * 10_000}, INVALID)
    yield attack("/items/delete", "ids and a filter", {"ids": ["a"], "filter": {"a": 1}}, INVALID)
    for name in ("..%2f..%2fx", "%00", "a" * 65, "a%20b", ".hidden", "-x", "%ff"):
        right = "route_not_found" if "2f" in name else INVALID
        yield attack(f"/collections/{name}", "create", {}, right, "PUT")
    yield attack("/collections/hostile", "17 keyword fields", {"keywords": [str(n) for n in range(17)]}, INVALID, "PUT")
    yield attack("/collections/hostile", "an unknown index", {"index": "magic"}, INVALID, "PUT")


def _labels(attack: Any) -> Iterator[Attack]:
    def classify(name: str, right: str = INVALID, **asked: Any) -> Attack:
        made: Attack = attack("/classify", name, {"inputs": ["a"]} | asked, right)
        return made

    yield classify("10,001 labels", labels=[str(n) for n in range(10_001)])
    yield classify("10,000 labels of 40 unknown fields", labels=[{str(n): 0 for n in range(40)}] * 10_000)
    yield classify("no labels", labels=[])
    yield classify("a label twice", labels=["a", "a"])
    yield classify("a label of 1,001 letters", labels=["a" * 1_001])
    yield classify("a label of a lone NUL", labels=["\0"])
    yield classify("a label set that is not there", NONE, label_set="none")
    for template in ("no place", "{} {}", "{0.__class__}", "{", "%s"):
        yield classify(f"a template of {template!r}", labels=["a"], templates=[template])
    yield classify("a template with more in it", OK, labels=["a"], templates=["{} {x.__class__}"])
    yield classify("100,000 templates", labels=["a"], templates=["{}"] * 100_000)
    kinds = {str(n): ["{}"] for n in range(100_000)}
    yield classify("100,000 kinds of templates", labels=["a"], templates=kinds)
    grid = {"rows": 16, "columns": 17}
    yield classify("a grid of 16 x 17", inputs=[{"image": _SMALL_PNG}], labels=["a"], grid=grid)
    yield classify("a threshold of 2", labels=["a"], threshold=2)
    yield attack("/label-sets/..%2fx", "create", {"labels": ["a"]}, "route_not_found", "PUT")
    taught = {"labels": ["a"], "off_topic": ["b"]}
    yield attack("/label-sets/hostile", "off topic without examples", taught, INVALID, "PUT")


def _openai(attack: Any, model: str) -> Iterator[Attack]:
    inputs: Mapping[str, tuple[Any, str]] = {
        "an empty text": ("", "invalid_input"),
        "no inputs": ([], INVALID),
        "no token ids": ([[]], INVALID),
        "a token id": ([1], INVALID),
        "a negative token id": ([-1], INVALID),
        "a token id of 2**31": ([2**31], INVALID),
        "a token id of 2**63": ([2**63], INVALID),
        "a picture as a data: URI": ("data:image/png;base64," + _SMALL_PNG, OK),
        "a part of a message": ([{"type": "image_url", "image_url": {"url": "data:;base64," + _SMALL_PNG}}], OK),
        "a part of another kind": ([{"type": "image_pil", "image_pil": _SMALL_PNG}], INVALID),
        "a message of two parts": ({"content": [{"type": "text", "text": "a"}] * 2}, INVALID),
        "a message of 100,000 parts": ({"content": [{"type": "text", "text": ""}] * 100_000}, INVALID),
        "200 nested messages": ([{"content": {"content": {"content": "a"}}}] * 200, INVALID),
        "emoji": ("\U0001f389\U0001f389", "invalid_input"),
        "a token id of 1.5": ([[1.5]], INVALID),
        "a token id that is a truth": ([[True]], INVALID),
        "8,000,000 token ids": ([1] * 8_000_000, BODY),
        "32,001 token ids": ([1] * 32_001, INVALID),
        "ids and texts": ([1, "a"], INVALID),
        "nothing": (None, INVALID),
        "2,048 texts": (["a"] * 2_048, OK),
        "2,049 texts": (["a"] * 2_049, INVALID),
    }
    for name, (value, right) in inputs.items():
        yield attack("/v1/embeddings", f"an input of {name}", {"model": model, "input": value}, right)
    yield attack("/v1/embeddings", "another model", {"model": "gpt", "input": "a"}, "model_not_found")
    yield attack("/v1/embeddings", "a model of 1 MB", {"model": "m" * 1_000_000, "input": "a"}, "model_not_found")
    yield attack("/v1/embeddings", "no model", {"input": "a"}, INVALID)
    fields = {"embedding_type": "binary", "modality": "smell", "truncate": "START", "prompt": "b"}
    for field, value in (fields | {"encoding_format": "hex"}).items():
        yield attack("/v1/embeddings", f"a {field} of {value}", {"model": model, "input": "a", field: value}, INVALID)
    messages = [{"role": "user", "content": "a"}] * 100_000
    yield attack("/v1/embeddings", "100,000 messages", {"model": model, "messages": messages}, INVALID)


# Forms


def of_forms() -> Iterator[Attack]:
    png = media.picture(size=(8, 8))
    nested = part(b"--y\r\n\r\n--y--", more=b"Content-Type: multipart/mixed; boundary=y\r\n")

    def sent(body: bytes, boundary: str = "; boundary=x") -> bytes:
        return post("/embed", body, MULTIPART + boundary)

    def request(body: bytes, *others: bytes) -> bytes:
        return form("/embed", part(body, "request", None), *others)

    forms: Mapping[str, tuple[bytes, str]] = {
        "without a boundary": (sent(b"--x\r\n", ""), MALFORMED),
        "of an empty boundary": (sent(b"--\r\n", "; boundary="), MALFORMED),
        "of a boundary of 1,000 letters": (sent(b"--x\r\n", "; boundary=" + "x" * 1_000), MALFORMED),
        "of another boundary": (sent(b"--y\r\n" + part(png) + b"\r\n--y--\r\n"), MALFORMED),
        "of no parts": (form("/embed"), INVALID),
        "of an empty body": (sent(b""), MALFORMED),
        "of 100,000 files": (form("/embed", *[part(b"")] * 100_000), MALFORMED),
        "of 257 files": (form("/embed", *[part(png)] * 257), MALFORMED),
        "of 100,000 fields": (form("/embed", *[part(b"", "a", None)] * 100_000), MALFORMED),
        "of two requests": (request(b"{}", part(b"{}", "request", None)), MALFORMED),
        "of a request that is no JSON": (request(b"{", part(png)), MALFORMED),
        "of a request that is a list": (request(b"[]", part(png)), MALFORMED),
        "of a request that brings files": (request(b'{"inputs":[{"file":"x"}]}'), INVALID),
        "of a request of 19 MB of objects": (request(b'{"inputs":[' + b"{}," * 6_000_000 + b"{}]}"), BODY),
        "of a part of another name": (form("/embed", part(png, "picture")), MALFORMED),
        "of a file without a name": (form("/embed", part(png, filename=None)), MALFORMED),
        "of a part without a name": (form("/embed", b"Content-Disposition: form-data\r\n\r\nx"), MALFORMED),
        "of a part without headers": (form("/embed", b"\r\nx"), MALFORMED),
        "of a header of 1 MB": (form("/embed", part(png, more=b"X-A: " + b"a" * 1_000_000 + b"\r\n")), MALFORMED),
        "of 10,000 headers": (form("/embed", part(png, more=b"X-A: a\r\n" * 10_000)), MALFORMED),
        "of a file name of 1 MB": (form("/embed", part(png, filename="a" * 1_000_000)), MALFORMED),
        "of a file name that is a path": (form("/embed", part(png, filename="../../../../etc/cron.d/x")), OK),
        "of an item whose name is a path": (form("/items", part(png, filename="../../../../etc/cron.d/x")), OK),
        "of an item whose name has a NUL": (form("/items", part(png, filename="a\0b")), INVALID),
        "of an item without a name": (form("/items", part(png, filename="")), INVALID),
        "of a header that is no header": (form("/embed", b"no colon here\r\n\r\nx"), MALFORMED),
        "of a coded part": (
            form("/embed", part(base64.b64encode(png), more=b"Content-Transfer-Encoding: base64\r\n")),
            UNSUPPORTED,
        ),
        "of a form in a form": (form("/embed", nested), UNSUPPORTED),
        "that does not end": (form("/embed", part(png), end=b""), MALFORMED),
        "that ends in its headers": (sent(b"--x\r\nContent-Disposition: form-da"), MALFORMED),
        "of 19 MB before it begins": (
            sent(b"a" * 19_000_000 + b"\r\n--x\r\n" + part(png) + b"\r\n--x--\r\n"),
            MALFORMED,
        ),
        "of 19 MB after it ends": (form("/embed", part(png), end=b"--x--\r\n" + b"a" * 19_000_000), OK),
        "of a file of 19 MB": (form("/embed", part(bytes(19_000_000))), UNSUPPORTED),
        "of a png of 30 MB": (form("/embed", part(png + bytes(30_000_000))), LARGE),
        "of a file that is empty": (form("/embed", part(b"")), BAD),
        "for a route that takes none": (form("/v1/embeddings", part(png)), "unsupported_body"),
        "of 19 MB of almost boundaries": (form("/embed", part(b"\r\n--" * 4_700_000)), UNSUPPORTED),
    }
    for name, (wire, right) in forms.items():
        yield Attack("forms", f"a form {name}", wire, frozenset({right}))


def of_other_bodies() -> Iterator[Attack]:
    kinds = ("text/plain", "application/xml", "application/x-www-form-urlencoded", "application/octet-stream")
    for kind in (*kinds, "multipart/mixed; boundary=x", "image/png"):
        yield Attack("forms", f"a body of {kind}", post("/embed", b"a=b", kind), frozenset({"unsupported_body"}))
    other = post("/embed", b'{"inputs":["a"]}', "application/json; charset=utf-7")
    yield Attack("forms", "JSON of another character set", other, frozenset({OK}))


# HTTP itself

HEADERS = "headers_too_large"


_BODY = b'{"inputs":["a"]}'
_LENGTH = ("Content-Length", "16")


def _embed(*headers: tuple[str, str], sent: bytes = _BODY) -> bytes:
    return head("/embed", [("Content-Type", "application/json"), *headers]) + sent


def _said(length: object, sent: bytes = _BODY) -> bytes:
    return _embed(("Content-Length", str(length)), sent=sent)


def _chunks(sent: bytes, end: bytes = b"\r\n0\r\n\r\n") -> bytes:
    return _embed(("Transfer-Encoding", "chunked"), sent=sent + end)


def _get(path: str, *headers: tuple[str, str]) -> bytes:
    return head(path, headers, "GET")


def of_http() -> Iterator[Attack]:
    for wires, ends in ((_lengths(), False), (_heads(), False), (_ends(), True)):
        for name, (wire, right) in wires.items():
            yield Attack("http", name, wire, frozenset({right}), ends)


def _lengths() -> Mapping[str, tuple[bytes, str]]:
    return {
        "a length of 10**30": (_said(10**30), MALFORMED),
        "a length of -1": (_said(-1), MALFORMED),
        "a length of 0x10": (_said("0x10"), MALFORMED),
        "a length of two numbers": (_said("16, 16"), MALFORMED),
        "two lengths": (_embed(_LENGTH, ("Content-Length", "5")), MALFORMED),
        "a length and chunks": (
            _embed(("Transfer-Encoding", "chunked"), ("Content-Length", "4"), sent=b"0\r\n\r\n"),
            MALFORMED,
        ),
        "chunks of 65 MB": (_chunks((b"100000\r\n" + b" " * 2**20 + b"\r\n") * 62, b"0\r\n\r\n"), BODY),
        "a chunk that says 2**64": (_chunks(b"10000000000000000\r\nx", b""), MALFORMED),
        "a chunk of no number": (_chunks(b"zz\r\n" + _BODY, b""), MALFORMED),
        "a chunk of a negative size": (_chunks(b"-5\r\n" + _BODY, b""), MALFORMED),
        "a chunk that is longer than it says": (_chunks(b"2\r\n" + _BODY), MALFORMED),
        "a chunk's extension of 1 MB": (_chunks(b"10;" + b"a" * 1_000_000 + b"\r\n" + _BODY), HEADERS),
        "a chunk's extension of 10,000 bytes": (_chunks(b"10;" + b"a" * 10_000 + b"\r\n" + _BODY), OK),
        "trailers of 1 MB": (_chunks(b"10\r\n" + _BODY, b"\r\n0\r\n" + b"a:\r\n" * 250_000), HEADERS),
        "trailers of 10,000 bytes": (_chunks(b"10\r\n" + _BODY, b"\r\n0\r\n" + b"a:\r\n" * 2_500 + b"\r\n"), OK),
        "a length of 5,001 digits": (_said("0" * 4_999 + "16"), OK),
        "a length of 5,001 digits that means it": (_said("1" * 5_001), MALFORMED),
        "16 chunks of a byte": (_chunks(b"".join(b"1\r\n%c\r\n" % byte for byte in _BODY), b"0\r\n\r\n"), OK),
        "an unknown coding of transfer": (_embed(("Transfer-Encoding", "gzip, identity")), MALFORMED),
        "a coding of content": (_embed(("Content-Encoding", "gzip"), _LENGTH), "unsupported_body"),
    }


def _heads() -> Mapping[str, tuple[bytes, str]]:
    h2c = [("Upgrade", "h2c"), ("Connection", "Upgrade, HTTP2-Settings")]
    socket = [("Upgrade", "websocket"), ("Connection", "Upgrade")]
    socket += [("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="), ("Sec-WebSocket-Version", "13")]
    return {
        "a header of 100,000 bytes": (_get("/healthz", ("X-A", "a" * 100_000)), HEADERS),
        "20,000 headers": (_get("/healthz", *[("X-A", "a")] * 20_000), HEADERS),
        "a header of 20 MB that does not end": (b"GET /healthz HTTP/1.1\r\nX-A: " + b"a" * 20_000_000, HEADERS),
        "a path of 100,000 bytes": (_get("/" + "a" * 100_000), HEADERS),
        "a path of 20 MB": (b"GET /" + b"a" * 20_000_000, HEADERS),
        "a path of 60,000 bytes": (_get("/" + "a" * 60_000), "route_not_found"),
        "a name of a header that is empty": (b"GET /healthz HTTP/1.1\r\n: a\r\n\r\n", MALFORMED),
        "a space in a header's name": (b"GET /healthz HTTP/1.1\r\nHost : a\r\n\r\n", MALFORMED),
        "NUL in a header": (b"GET /healthz HTTP/1.1\r\nX-A: a\0b\r\n\r\n", MALFORMED),
        "a folded header": (b"GET /healthz HTTP/1.1\r\nX-A: a\r\n b\r\n\r\n", MALFORMED),
        "a bare carriage return": (b"GET /healthz HTTP/1.1\r\nX-A: a\rX-B: b\r\n\r\n", MALFORMED),
        "an unknown version": (b"GET /healthz HTTP/9.9\r\n\r\n", MALFORMED),
        "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", MALFORMED),
        "TLS": (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(300), MALFORMED),
        "SMTP": (b"EHLO isthmus\r\n\r\n", MALFORMED),
        "Redis": (b"*1\r\n$8\r\nFLUSHALL\r\n\r\n", MALFORMED),
        "noise": (bytes(range(256)) * 40, MALFORMED),
        "an unknown method": (head("/embed", [], "BREW"), MALFORMED),
        "a method that is not taken": (head("/embed", [], "TRACE"), "method_not_allowed"),
        "CONNECT": (b"CONNECT example.com:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", MALFORMED),
        "an absolute path": (_get("http://example.com/healthz"), OK),
        "a path up and up": (_get("/../../../../etc/passwd"), "route_not_found"),
        "a coded path up and up": (_get("/items/%2e%2e%2f%2e%2e%2fetc%2fpasswd"), NONE),
        "a path of coded NUL": (_get("/items/%00"), INVALID),
        "a path that is no UTF-8": (_get("/items/%ff%fe"), NONE),
        "a query of 60,000 bytes": (_get("/items?cursor=" + "a" * 60_000), INVALID),
        "10,000 parameters": (_get("/items?" + "a=b&" * 10_000), OK),
        "a limit of 10**30": (_get(f"/items?limit={10**30}"), INVALID),
        "a cursor that is none": (_get("/items?cursor=%27%20OR%201=1"), INVALID),
        "a web socket": (_get("/embed", *socket), "method_not_allowed"),
        "an upgrade to h2c": (_get("/healthz", *h2c, ("HTTP2-Settings", "AAMAAABkAAQAAP__")), OK),
        "an upgrade to h2c, and a body": (_embed(_LENGTH, *h2c), OK),
        "a request id that breaks lines": (_get("/healthz", ("X-Request-ID", "a%0d%0aSet-Cookie: b")), OK),
        "an expectation": (_embed(_LENGTH, ("Expect", "a-miracle")), OK),
    }


def _ends() -> Mapping[str, tuple[bytes, str]]:
    return {
        "a length of 2**63": (_said(2**63), BODY),
        "a length of 64,000,001": (_said(64_000_001), BODY),
        "a length that is too long": (_said(len(_BODY) + 50), MALFORMED),
        "a length that is too short": (_said(5), MALFORMED),
        "a body that does not come": (_said(1_000, b""), MALFORMED),
        "chunks that do not end": (_chunks(b"10\r\n" + _BODY, b"\r\n"), MALFORMED),
        "half a request line": (b"GET /hea", MALFORMED),
        "half a head": (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-", MALFORMED),
    }


def of_http_without_end() -> Iterator[Attack]:
    """Requests of a client that is answered, and goes on to write."""
    health = head("/healthz", [("Transfer-Encoding", "chunked")], "GET")
    wires = {
        "25 MB of trailers": health + b"0\r\n" + b"a:\r\n" * 6_250_000,
        "a trailer of 25 MB": health + b"0\r\na:" + b"a" * 25_000_000,
        "an extension of 25 MB": health + b"1;" + b"a" * 25_000_000,
        "a chunk's size of 25 MB": health + b"0" * 25_000_000,
        "a body of 25 MB that nobody reads": health + (b"100000\r\n" + b" " * 2**20 + b"\r\n") * 25,
        "25 MB of requests": head("/healthz", [], "GET") * 600_000,
        "25 MB of empty lines": head("/healthz", [], "GET") + b"\r\n" * 12_500_000,
    }
    for name, wire in wires.items():
        yield Attack("http", f"{name}, after the answer", wire, frozenset({OK}), goes_on=True)


def of_crowds(model: str) -> Iterator[Attack]:
    """More is written to them than anybody has memory for, and they do not read."""
    large = post("/v1/embeddings", _written({"model": model, "input": ["a"] * 2_048}))
    yield Attack("crowds", "60 that do not read 16 MB each", large, frozenset({OK}), crowd=60)


# Jobs


def of_jobs() -> Iterator[Attack]:
    def attack(name: str, wire: bytes, right: str) -> Attack:
        return Attack("jobs", name, wire, frozenset({right}), job=True)

    for name, (data, right) in bulk.archives().items():
        yield attack(f"a tar {name}", post("/jobs", data, "application/x-tar"), right)
    for name, (data, right) in bulk.lines().items():
        yield attack(f"JSONL {name}", post("/jobs", data, "application/jsonl"), right)
    good = b'{"id":"keyed","text":"a text"}'
    keys = {"of 256 letters": ("k" * 256, INVALID), "that is empty": ("", INVALID), "of spaces": ("a b", OK)}
    for name, (key, right) in keys.items():
        kind, length = ("Content-Type", "application/jsonl"), ("Content-Length", str(len(good)))
        yield attack(f"a key {name}", head("/jobs", [kind, length, ("Idempotency-Key", key)]) + good, right)
    kinds = ("text/plain", "application/json", "application/zip", "application/x-7z-compressed")
    for other in (*kinds, f"{MULTIPART}; boundary=x"):
        yield attack(f"a body of {other}", post("/jobs", good, other), "unsupported_body")
    for collection in ("../x", "", "a" * 10_000, "%00"):
        wire = post(f"/jobs?collection={collection}", good, "application/jsonl")
        yield attack(f"a collection {collection[:8]!r}", wire, INVALID)
    unknown = {"/jobs/..%2f..%2fetc%2fpasswd": "route_not_found", "/jobs/%00": NONE, "/jobs/" + "a" * 10_000: NONE}
    for path, code in unknown.items():
        for method in ("GET", "DELETE"):
            yield attack(f"{method} {path[:24]}", head(path, [], method), code)
    yield attack("errors of another", head("/jobs/x/errors", [], "GET"), NONE)


def everything(seed: int, model: str, dimensions: int) -> Iterator[Attack]:
    yield from of_http()
    yield from of_http_without_end()
    yield from of_crowds(model)
    yield from of_forms()
    yield from of_other_bodies()
    yield from of_json(model, dimensions)
    yield from of_jobs()
    yield from of_files(seed)
