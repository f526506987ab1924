"""Lines of jobs that name URLs, fetched from web servers on the loopback network."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api.keys import create_key
from service.engine.inputs import Fused, Url
from service.jobs import run
from service.retrieval.indexing import NewItem
from service.runtime.quotas import Limit
from service.settings import Settings
from tests.conftest import serving
from tests.service.internet import Internet, Site, internet, options
from tests.service.jobs.processes import ended, errors, stored, submitted
from tests.service.media import b64

Make = Callable[..., bytes]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory, png: Make, wav: Make) -> Iterator[Internet]:
    with internet(tmp_path_factory.mktemp("internet")) as net:
        net.inner.give("/", png("red"))
        net.media.give("/red", png("red"))
        net.media.give("/tone", wav())
        net.media.give("/page", b"<html>no picture</html>")
        net.media.give("/absent", b"", 404)
        net.media.give("/down", b"", 503)
        yield net
        assert net.inner.asked == []


@pytest.fixture
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "FETCH_PAUSES_S", (0.0, 0.0, 0.0))


def recovers(site: Site, path: str, body: bytes, after: int) -> None:
    """503 so many times, then `body`."""
    asked = Counter[str]()

    def page(request: BaseHTTPRequestHandler) -> None:
        asked[path] += 1
        site.give("once", body if asked[path] > after else b"", 200 if asked[path] > after else 503)
        site.pages["once"](request)

    site.pages[path] = page


def codes(client: httpx.Client, id: str) -> list[tuple[int, str, str]]:
    return [(each["line"], each["id"], each["code"]) for each in errors(client, id)]


@pytest.mark.usefixtures("_no_pauses")
def test_urls_of_lines_are_fetched_and_those_that_fail_fail_alone(net: Internet, settings: Settings, png: Make) -> None:
    recovers(net.media, "/flaky", png("blue"), after=2)
    items: list[Any] = [
        {"id": "words", "text": "a red dog"},
        {"id": "picture", "image": net.url("/red")},
        {"id": "absent", "image": net.url("/absent")},
        {"id": "flaky", "image": net.url("/flaky")},
        {"id": "tone", "audio": net.url("/tone")},
        {"id": "down", "audio": net.url("/down")},
        {"id": "page", "image": net.url("/page")},
        {"id": "inner", "image": net.url("/", "127.0.0.1")},
        {"id": "data", "image": b64(png("red"))},
        # More than are fetched at once.
        *({"id": f"again {number}", "image": net.url("/red")} for number in range(20)),
    ]
    with serving(settings.model_copy(update=options(net, previews=True))) as client:
        id = submitted(client, items)
        job = ended(client, id)
        assert (job["state"], job["done"], job["failed"]) == ("done", 25, 4)
        assert codes(client, id) == [
            (3, "absent", "url_fetch_failed"),
            (6, "down", "url_fetch_failed"),
            (7, "page", "unsupported_media"),
            (8, "inner", "url_refused"),
        ]
        said = json.dumps(errors(client, id))
        assert not any(secret in said for secret in ("127.0.0", "media.test", str(net.port)))
        times = Counter(path for path, _ in net.media.asked)
        assert [times[path] for path in ("/absent", "/flaky", "/down", "/page")] == [1, 3, 4, 1]
        kinds = {id: each["modality"] for id, each in stored(client).items()}
        assert kinds == {"words": "text", "tone": "audio"} | {
            each["id"]: "image" for each in items if each["id"] in ("picture", "flaky", "data") or "again" in each["id"]
        }
        # What came of the URL is what comes of the data, and it has its preview.
        [same] = client.post("/score", json={"pairs": [{"a": {"image": b64(png("blue"))}, "b": "red"}]}).json()[
            "scores"
        ]
        assert same == pytest.approx(
            client.post("/score", json={"pairs": [{"a": {"image": net.url("/flaky")}, "b": "red"}]}).json()["scores"][0]
        )
        assert client.get("/previews/picture").headers["content-type"] == "image/jpeg"


@pytest.mark.usefixtures("_no_pauses")
def test_what_came_before_a_try_that_failed_is_paid_for_once(
    net: Internet, settings: Settings, tmp_path: Path, png: Make
) -> None:
    recovers(net.media, "/flaky", png("blue"), after=2)
    _, clear = create_key(tmp_path / "keys.json", "k", ["read", "write"], [Limit.parse("pixels=1000000/month")])
    with serving(settings.model_copy(update=options(net, keys=tmp_path / "keys.json"))) as client:
        client.headers["Authorization"] = f"Bearer {clear}"
        parts = [{"image": net.url("/red")}, {"image": net.url("/flaky")}]
        assert ended(client, submitted(client, [{"id": "fused", "compose": parts}]))["done"] == 1
        last = client.post("/embed", json={"inputs": [{"image": b64(png("green"))}]})
        left = int(last.headers["ratelimit"].split("r=")[1].split(";")[0])
        assert 1_000_000 - left == 3 * 40 * 30


def test_urls_are_fetched_a_few_at_a_time() -> None:
    def item(line: int, urls: int) -> NewItem:
        parts = tuple((Url("image", f"https://a/{line}/{number}"), 1.0) for number in range(urls))
        return NewItem(str(line), Fused(parts))

    items = {line: item(line, urls) for line, urls in enumerate([1, 3, 4, 1, 32, 2])}
    assert [list(group) for group in run._by_urls(items)] == [[0, 1, 2], [3], [4], [5]]


def test_what_is_fetched_counts_for_the_key_that_sent_the_job(
    net: Internet, settings: Settings, tmp_path: Path, png: Make
) -> None:
    limits = [Limit.parse("items=3/month"), Limit.parse("pixels=1000000/month")]
    _, clear = create_key(tmp_path / "keys.json", "k", ["read", "write"], limits)
    with serving(settings.model_copy(update=options(net, keys=tmp_path / "keys.json"))) as client:
        client.headers["Authorization"] = f"Bearer {clear}"
        id = submitted(client, [{"id": "url", "image": net.url("/red")}, {"id": "tone", "audio": net.url("/absent")}])
        assert ended(client, id)["done"] == 1
        left = client.post("/embed", json={"inputs": [{"image": b64(png("red"))}]})
        assert left.status_code == 200
        # Three items in all, and the pixels of one picture twice, as a request for it costs them.
        rows = dict(each.strip().split(";r=") for each in left.headers["ratelimit"].split(","))
        held = {name.split("/")[0].strip('"'): int(rest.split(";")[0]) for name, rest in rows.items()}
        assert held["items"] == 0
        assert 1_000_000 - held["pixels"] == 2 * 40 * 30
