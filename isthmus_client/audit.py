"""These checks ask any server with OpenAI's embeddings route: is its answer right, and does it say what is not?

Every check asks the server and compares its answers with each other, so that no reference model is needed. Vectors are
plain lists: the client has no numerical package.
"""

import base64
import math
import random
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import mul
from statistics import median
from typing import Any, Literal

import httpx2

Vector = list[float]
SAME, NEARLY = 1 - 1e-5, 1 - 1e-3
"""Cosine similarities of one text's vectors: from SAME on they are equal; below NEARLY an order of results changes."""
_LENGTHS_WORDS = (16, 32, 64, 128, 256, 512, 1_024, 2_048)
_MANY_INPUTS, _LONGEST_WORDS = 2_049, 40_000
_CLIENTS = 16
_NEAREST, _HUB_SHARE = 10, 0.6
_TRIES, _LONGEST_WAIT_S = 5, 60.0
_PAIRS = (
    ("fishing net", "The old fisherman sat in the harbour all morning and repaired the fishing net by hand."),
    ("wedding cake", "For the wedding the baker made a cake of five layers, which took her two whole days."),
    ("broken server", "Last night a broken server lost our mail, and nobody noticed it until the morning."),
    ("piano lesson", "Every Thursday after school the girl walks to her piano lesson and plays for an hour."),
    ("volcano eruption", "The eruption of the volcano covered three villages in ash and stopped all flights."),
    ("tax return", "Whoever earns money abroad must state it in the tax return, with the tax paid there."),
    ("sheep farm", "On the farm in the hills four hundred sheep are shorn each spring by the neighbours."),
    ("heart surgery", "The surgery on the patient's heart took nine hours, and he went home two weeks later."),
    ("chess champion", "The young champion lost only one game of chess in the whole tournament, by a blunder."),
    ("solar panels", "Solar panels on the roof of the factory give more power than its machines consume."),
    ("lost luggage", "The airline lost my luggage in Madrid and sent it home ten days after the holiday."),
    ("medieval castle", "The castle was built in medieval times to guard a bridge, and burned down twice."),
    ("football referee", "The referee stopped the football match when fog made it impossible to see the goal."),
    ("bird migration", "In autumn the migration of the birds begins, and storks fly over the strait."),
    ("coffee harvest", "Rain during the harvest spoiled much of the coffee, so that prices rose everywhere."),
    ("prison escape", "Two men made their escape from the prison through a tunnel that they had dug."),
    ("bread recipe", "This recipe for bread needs flour, water and salt, and a night of rest before baking."),
    ("space telescope", "The space telescope looks at galaxies whose light set out before the Earth was formed."),
    ("election results", "The results of the election came at midnight, and the opposition had won narrowly."),
    ("dentist appointment", "I moved my appointment with the dentist because the train was late once again."),
)
"""Subjects, and passages about them."""
_OTHER_SCRIPTS = ("海边的一只狗", "Поезд опаздывает", "كتاب على الطاولة", "नदी में नाव", "친구와 커피", "🎻🎶")


@dataclass(frozen=True)
class Finding:
    check: str
    state: Literal["ok", "note", "fault"]
    detail: str


@dataclass(frozen=True)
class Answer:
    status: int
    vectors: list[Vector] = field(default_factory=list)
    tokens: int | None = None
    said: frozenset[str] = frozenset()
    """The fields of the answer beside OpenAI's that say something, and those of the objects of `data`."""
    wrong: str | None = None
    """What is wrong with an answer of status 200; None where it has OpenAI's shape."""

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.wrong is None


class Api:
    """Asks one model of a server. Raises httpx2.HTTPError where no answer comes."""

    def __init__(self, client: httpx2.Client, route: str, model: str) -> None:
        self._client, self._route, self.model = client, route, model

    def ask(self, inputs: Any, **others: Any) -> Answer:
        body = {"model": self.model, "input": inputs} | others
        for number in range(_TRIES):
            try:
                response = self._client.post(self._route, json=body)
            except (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError):
                response = self._client.post(self._route, json=body)  # it was kept too long, or after an error
            if response.status_code != 429:
                break
            if number < _TRIES - 1:
                time.sleep(min(_wait_s(response.headers.get("retry-after"), 2.0**number), _LONGEST_WAIT_S))
        else:
            raise Limited(f"not checked: status 429 after {_TRIES} tries, as the server asks for a slower pace")
        if response.status_code != 200:
            return Answer(response.status_code)
        try:
            return _read(response.json(), base64_asked=others.get("encoding_format") == "base64")
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            return Answer(200, wrong=f"the answer has not OpenAI's shape ({type(error).__name__}: {error})")

    def vectors(self, texts: Sequence[str], at_once: int = 16) -> list[Vector]:
        """Return the vector of each text. Raises Unanswered."""
        vectors: list[Vector] = []
        for start in range(0, len(texts), at_once):
            batch = list(texts[start : start + at_once])
            answer = self.ask(batch)
            if not answer.ok or len(answer.vectors) != len(batch):
                raise Unanswered(f"{len(batch)} plain texts got {_outcome(answer)}")
            vectors += answer.vectors
        return vectors


class Unanswered(Exception):
    """Raised where a request that every check needs was not answered rightly."""


class Limited(Exception):
    """Raised where a server takes fewer requests than a check needs: this is no fault."""


def _wait_s(retry_after: str | None, otherwise: float) -> float:
    """Return the seconds that a Retry-After header asks to wait; it can also be a date, which is not read."""
    try:
        return max(0.0, float(retry_after or otherwise))
    except ValueError:
        return otherwise


_FIELDS = {"object", "data", "model", "usage", "id", "created", "index", "embedding"}


def _read(body: dict[str, Any], base64_asked: bool) -> Answer:
    vectors, said = [], {name for name, value in body.items() if value} - _FIELDS
    for place, row in enumerate(body["data"]):
        if row.get("index", place) != place:
            raise ValueError(f"index {row['index']} at place {place}")
        said |= {name for name, value in row.items() if value} - _FIELDS
        vector = row["embedding"]
        if isinstance(vector, str):
            raw = base64.b64decode(vector, validate=True)
            vector = list(struct.unpack(f"<{len(raw) // 4}f", raw))
        elif base64_asked:
            said.add("encoding_format was ignored")
        vectors.append([float(number) for number in vector])
    tokens = (body.get("usage") or {}).get("prompt_tokens")
    answer = Answer(200, vectors, tokens if isinstance(tokens, int) else None, frozenset(said))
    if any(not all(map(math.isfinite, vector)) or not any(vector) for vector in vectors):
        return Answer(200, vectors, answer.tokens, answer.said, "a vector is zero or not finite")
    return answer


def _outcome(answer: Answer) -> str:
    return answer.wrong or (f"status {answer.status}" if answer.status != 200 else f"{len(answer.vectors)} vectors")


def cosine(a: Vector, b: Vector) -> float:
    """Return the cosine similarity; 0 where the lengths differ."""
    return sum(map(mul, a, b)) / (math.hypot(*a) * math.hypot(*b) or 1.0) if len(a) == len(b) else 0.0


def _words(count: int, seed: int) -> str:
    generator = random.Random(seed)
    vocabulary = sorted({word.strip(".,").lower() for _, passage in _PAIRS for word in passage.split()})
    return " ".join(generator.choices(vocabulary, k=count))


def _probes() -> list[str]:
    """Return texts of one word to fifty-six, all different, in no order of length."""
    return [_words(1 + place * 5 % 12 * 5, place) for place in range(12)]


def batch(api: Api) -> Iterator[Finding]:
    texts = _probes()
    alone = [vector for text in texts for vector in api.vectors([text])]
    repeated = api.vectors(texts[-1:])[0]
    if cosine(alone[-1], repeated) < SAME:
        yield Finding("repeat", "fault", f"one text asked for twice: cosine {cosine(alone[-1], repeated):.6f}")
    else:
        yield Finding("repeat", "ok", "one text has one vector")
    together = api.vectors(texts, len(texts))
    nearest = [max(range(len(texts)), key=lambda other: cosine(vector, alone[other])) for vector in together]
    moved = sum(place != other for place, other in enumerate(nearest))
    if moved:
        yield Finding("order", "fault", f"{moved} of {len(texts)} vectors of a request are those of other inputs")
        return
    yield Finding("order", "ok", "vectors come in the order of the inputs")
    least = min(map(cosine, alone, together))
    detail = f"alone and among {len(texts)} texts: least cosine {least:.6f}"
    yield Finding("batch", "fault" if least < NEARLY else "note" if least < SAME else "ok", detail)
    with ThreadPoolExecutor(_CLIENTS) as threads:
        crossed = list(threads.map(lambda text: api.vectors([text])[0], texts * 4))
    worst = min(map(cosine, alone * 4, crossed))
    detail = f"{_CLIENTS} clients at once: least cosine {worst:.6f}"
    yield Finding("concurrency", "fault" if worst < NEARLY else "note" if worst < SAME else "ok", detail)


def truncation(api: Api) -> Iterator[Finding]:
    """Check that the end of a text changes its vector, or that the answer says that the end was not read."""
    short = api.ask("a dog")
    few = short.tokens
    for words in _LENGTHS_WORDS:
        head = _words(words, words)
        first, second = (api.ask(f"{head} {_words(24, seed)}") for seed in (1, 2))
        if 400 <= first.status < 500:
            yield Finding("truncation", "ok", f"a text of {words + 24} words is refused, with status {first.status}")
            return
        if not first.ok or not second.ok or not first.vectors or not second.vectors:
            yield Finding("truncation", "fault", f"a text of {words + 24} words gets {_outcome(first)}")
            return
        if cosine(first.vectors[0], second.vectors[0]) > 1 - 1e-9:
            longer = api.ask(f"{head} {_words(24 + words, 1)}")
            stays = None not in (few, first.tokens) and few != first.tokens == longer.tokens
            if first.said - short.said or stays:  # what every answer says tells of no text
                how = ", ".join(sorted(first.said - short.said)) or f"usage, which stays at {first.tokens} tokens"
                yield Finding("truncation", "note", f"only the first {words} words or fewer are read; told by {how}")
            else:
                yield Finding("truncation", "fault", f"words after the first {words} are not read, and nothing says so")
            return
    yield Finding("truncation", "ok", f"{_LENGTHS_WORDS[-1]} words are read to their end")


def shape(api: Api) -> Iterator[Finding]:
    text = _PAIRS[0][1]
    [vector] = api.vectors([text])
    half = len(vector) // 2
    fewer = api.ask(text, dimensions=half)
    if 400 <= fewer.status < 500:
        yield Finding("shape", "ok", f"{len(vector)} dimensions; `dimensions` is refused, with status {fewer.status}")
    elif not fewer.ok or [len(vector) for vector in fewer.vectors] != [half]:
        length = len(fewer.vectors[0]) if fewer.ok and fewer.vectors else _outcome(fewer)
        yield Finding("shape", "fault", f"`dimensions`: {half} were asked for, and {length} came")
    elif cosine(fewer.vectors[0], vector[:half]) < NEARLY:
        yield Finding("shape", "note", f"`dimensions`: {half} are not the first {half} of the whole vector")
    else:
        yield Finding("shape", "ok", f"{len(vector)} dimensions, or as many as are asked for")
    packed = api.ask(text, encoding_format="base64")
    if 400 <= packed.status < 500:
        yield Finding("base64", "note", f"refused with status {packed.status}: OpenAI's own client asks for it")
    elif not packed.ok or len(packed.vectors) != 1 or cosine(packed.vectors[0], vector) < SAME:
        yield Finding("base64", "fault", "read as little-endian float32 it is not the vector that comes as numbers")
    elif "encoding_format was ignored" in packed.said:
        yield Finding("base64", "note", "ignored: numbers come as JSON")
    else:
        yield Finding("base64", "ok", "the same numbers as JSON's")


def duplicates(api: Api) -> Iterator[Finding]:
    first, second = _PAIRS[0][1], _PAIRS[1][1]
    answer = api.ask([first, second, first])
    if not answer.ok or len(answer.vectors) != 3:
        yield Finding("duplicates", "fault", f"three inputs, of which two are equal, get {_outcome(answer)}")
    elif cosine(answer.vectors[0], answer.vectors[2]) < SAME or cosine(answer.vectors[0], answer.vectors[1]) > SAME:
        yield Finding("duplicates", "fault", "equal inputs have different vectors, or different ones the same")
    else:
        yield Finding("duplicates", "ok", "one vector for each input, also for equal ones")
    answers = [api.ask([text]) for text in _OTHER_SCRIPTS]
    usual = api.ask([first]).said
    vectors = [answer.vectors[0] for answer in answers if answer.ok and answer.vectors and not answer.said - usual]
    same = [sum(cosine(vector, compared) > SAME for compared in vectors) - 1 for vector in vectors]
    if any(same):
        detail = f"{sum(map(bool, same))} of {len(_OTHER_SCRIPTS)} texts of other scripts have a vector in common"
        yield Finding("unknown", "fault", f"{detail}, and nothing says so")
    else:
        refused = len(answers) - len(vectors)
        yield Finding(
            "unknown", "ok", "texts of other scripts differ" + (f"; {refused} are refused" if refused else "")
        )


def normalisation(api: Api) -> Iterator[Finding]:
    lengths = [math.hypot(*vector) for vector in api.vectors(_probes())]
    detail = f"vectors have lengths from {min(lengths):.4f} to {max(lengths):.4f}"
    yield Finding("normalisation", "ok" if max(abs(length - 1) for length in lengths) < 1e-3 else "fault", detail)


def tokens(api: Api) -> Iterator[Finding]:
    texts = [_PAIRS[0][1], _PAIRS[1][0], f"{_PAIRS[2][1]} {_PAIRS[3][1]}"]
    counts = [api.ask([text]).tokens for text in texts]
    total = api.ask(texts).tokens
    if total is None or not all(counts):
        yield Finding("tokens", "fault", f"usage counts {counts} for three texts, and {total} for all of them")
        return
    numbers = [count for count in counts if count is not None]
    absurd = [
        f"{count} for {len(text.split())} words"
        for count, text in zip(numbers, texts, strict=True)
        if not len(text.split()) <= count <= max(8, 0.7 * len(text))
    ]
    if absurd:
        yield Finding("tokens", "fault", f"usage counts {', '.join(absurd)}")
    elif total != sum(numbers):
        yield Finding("tokens", "fault", f"usage counts {numbers} for three texts, and {total} for all of them")
    else:
        yield Finding("tokens", "ok", "usage of many is the sum of each")


def limits(api: Api) -> Iterator[Finding]:
    """Check that what is too much or means nothing is refused with a status from 400 to 499, or answered in full."""
    cases: Sequence[tuple[str, Any, int | None]] = (
        (f"{_MANY_INPUTS:,} inputs", [f"word {place}" for place in range(_MANY_INPUTS)], _MANY_INPUTS),
        (f"a text of {_LONGEST_WORDS:,} words", [_words(_LONGEST_WORDS, 1)], 1),
        ("an empty text among others", ["a dog", "", "a cat"], 3),
        ("no input", [], None),
        ("an input that is an object", [{"planet": 3}], None),
    )
    faults, refusals = [], []
    for place, (request_kind, value, count) in enumerate(cases):
        try:
            answer = api.ask(value)
        except Limited:
            if place > 1:
                raise
            # Too much at once can be over a limit of tokens.
            refusals.append(f"{request_kind} (429)")
            continue
        except httpx2.HTTPError as error:
            faults.append(f"{request_kind} gets no answer ({type(error).__name__})")
            continue
        if 400 <= answer.status < 500:
            refusals.append(f"{request_kind} ({answer.status})")
        elif not answer.ok or len(answer.vectors) != count:
            faults.append(f"{request_kind} gets {_outcome(answer)}")
    yield Finding("limits", "fault" if faults else "ok", "; ".join(faults) or f"refused: {', '.join(refusals)}")
    unknown_model = Api(api._client, api._route, "no-such-model-3f9a").ask("a dog")
    state: Literal["ok", "note"] = "ok" if 400 <= unknown_model.status < 500 else "note"
    yield Finding("model", state, f"a model that does not exist gets status {unknown_model.status}")


def hubs(api: Api) -> Iterator[Finding]:
    """Check how often one text is among the nearest of the others (Radovanović, Nanopoulos and Ivanović, 2010)."""
    texts = [*(text for pair in _PAIRS for text in pair), *(_words(8, 100 + place) for place in range(60)), "it", "a"]
    vectors = _unit(api.vectors(texts))
    often = [0] * len(texts)
    for place, vector in enumerate(vectors):
        scores = [(sum(map(mul, vector, candidate)), n) for n, candidate in enumerate(vectors) if n != place]
        for _, n in sorted(scores, reverse=True)[:_NEAREST]:
            often[n] += 1
    most = max(often)
    share = most / (len(texts) - 1)
    detail = f"{texts[often.index(most)][:40]!r} is among the {_NEAREST} nearest of {share:.0%} of {len(texts)} texts"
    yield Finding("hubs", "fault" if share > _HUB_SHARE else "ok", detail)


def gap(api: Api) -> Iterator[Finding]:
    """Check that short texts and long ones are comparable: a text's partner comes before most texts of its own kind."""
    vectors = _unit(api.vectors([text for pair in _PAIRS for text in pair]))
    places = []
    for own in (0, 1):
        for place in range(own, len(vectors), 2):
            partner = sum(map(mul, vectors[place], vectors[place + 1 - 2 * own]))
            kin = (sum(map(mul, vectors[place], vectors[n])) for n in range(own, len(vectors), 2) if n != place)
            places.append(sum(score > partner for score in kin))
    shorts, longs = (median(places[part * len(_PAIRS) : (part + 1) * len(_PAIRS)]) for part in (0, 1))
    detail = f"before a subject's passage come {shorts:g} other subjects, before a passage's subject {longs:g} passages"
    yield Finding(
        "gap", "fault" if max(shorts, longs) > len(_PAIRS) / 4 else "ok", f"{detail} (medians of {len(_PAIRS)})"
    )


def _unit(vectors: Sequence[Vector]) -> list[Vector]:
    return [[number / (math.hypot(*vector) or 1.0) for number in vector] for vector in vectors]


CHECKS: Sequence[Callable[[Api], Iterator[Finding]]] = (
    *(batch, truncation, shape, duplicates, normalisation, tokens, limits, hubs, gap),
)


def audit(api: Api) -> Iterator[Finding]:
    """Yield every finding, as it is made. A check that gets no answer is a fault, and the others go on."""
    for check in CHECKS:
        try:
            yield from check(api)
        except Limited as error:
            yield Finding(check.__name__, "note", str(error))
        except Unanswered as error:
            yield Finding(check.__name__, "fault", str(error))
        except httpx2.HTTPError as error:
            yield Finding(check.__name__, "fault", f"no answer: {type(error).__name__}")


def connect(client: httpx2.Client, url: str, model: str | None) -> Api:
    """Return the API at an address: with or without /v1, or its route. Raises httpx2.HTTPError, ValueError, Limited."""
    base = url.rstrip("/").removesuffix("/embeddings")
    bases = [base] if base.endswith("/v1") or url.rstrip("/") != base else [f"{base}/v1", base]
    key_refused = False
    for place in bases:
        name = model
        if name is None:
            listed = client.get(f"{place}/models")
            key_refused = key_refused or listed.status_code in (401, 403)
            if listed.status_code != 200 or (name := _first(listed)) is None:
                continue
        answer = Api(client, f"{place}/embeddings", name).ask("a dog")
        key_refused = key_refused or answer.status in (401, 403)
        if answer.ok:
            return Api(client, f"{place}/embeddings", name)
        if answer.status not in (401, 403, 404):
            advice = "" if model else f" for {name}, the first model that it lists: name another by --model"
            raise ValueError(f"a request with one text got {_outcome(answer)}{advice}")
    if key_refused:
        raise ValueError("the key is refused, or there is none: name the variable that holds it by --key-env")
    raise ValueError("there is no embeddings route, or the model is unknown: name it by --model")


def _first(listed: httpx2.Response) -> str | None:
    """Return the first model of an answer of /models, which some servers give as a bare list."""
    try:
        body = listed.json()
        return str((body["data"] if isinstance(body, dict) else body)[0]["id"])
    except (ValueError, LookupError, TypeError):
        return None
