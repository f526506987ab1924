"""One deadline for a request, whatever stages it has."""

import asyncio
import json

import pytest

from service.api.deadline import Deadline
from service.errors import DeadlineExceeded
from service.runtime.deadline import within
from service.settings import Settings
from tests.conftest import on_a_loop
from tests.service.slow import Slow
from tests.service.test_serving import in_queue, until, with_towers

BODY = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.request", "body": b"}"}]
STAGES = 200
"""Of which each is shorter than the deadline, and all together are not."""


def ask(app, method: str, path: str, seconds: float = 0.05) -> list[dict]:
    """The messages of the answer."""
    coming, sent = iter(BODY), []

    async def receive():
        return next(coming)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path}
    asyncio.run(Deadline(app, seconds)(scope, receive, send))
    return sent


async def in_stages(scope, receive, send):
    assert (await receive())["more_body"]
    await asyncio.sleep(0.1)  # of the body's: it has a time of its own
    assert not (await receive()).get("more_body")
    for _ in range(STAGES):
        await asyncio.sleep(0.001)
    await send({"type": "http.response.start", "status": 200, "headers": []})


async def without_a_body(scope, receive, send):
    for _ in range(STAGES):
        await asyncio.sleep(0.001)
    await send({"type": "http.response.start", "status": 200, "headers": []})


@pytest.mark.parametrize(
    ("app", "method", "path", "advice"),
    [
        (in_stages, "POST", "/classify", "label set (PUT /label-sets/{name})"),
        (in_stages, "POST", "/search", "fewer parts"),
        (in_stages, "POST", "/search/batch", "fewer queries"),
        (in_stages, "POST", "/v1/embeddings", "fewer inputs"),
        (without_a_body, "GET", "/items", "ask for less"),
    ],
)
def test_it_is_of_all_stages_together_and_says_what_to_do(app, method: str, path: str, advice: str) -> None:
    start, body = ask(app, method, path)
    assert start["status"] == 504
    told = json.loads(body["body"])
    told = told.get("error", told)
    assert told["code"] == "deadline_exceeded" and advice in told.get("detail", told.get("message"))


def test_what_stores_something_is_not_broken_off() -> None:
    assert ask(in_stages, "PUT", "/label-sets/x")[0]["status"] == 200
    assert ask(in_stages, "POST", "/items")[0]["status"] == 200


def test_an_answer_that_has_begun_is_not_broken_off() -> None:
    async def streaming(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await without_a_body(scope, receive, send)

    assert [message["status"] for message in ask(streaming, "GET", "/jobs/x/errors")] == [200, 200]


@on_a_loop
async def test_another_timeout_is_no_deadline() -> None:
    with pytest.raises(TimeoutError):
        async with within(1):
            raise TimeoutError
    with pytest.raises(DeadlineExceeded):
        async with within(0):
            await asyncio.sleep(1)


def test_past_it_the_work_is_dropped(settings: Settings) -> None:
    hasty = settings.model_copy(update={"request_deadline_s": 0.05})
    with with_towers(hasty, lambda tower: Slow(tower, held=True)) as (_, client, towers):
        labels = [f"label {number}" for number in range(600)]
        late = client.post("/classify", json={"inputs": ["red"], "labels": labels, "templates": ["a {}", "the {}"]})
        assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
        assert "label_set" in late.json()["detail"]
        until(lambda: in_queue(client) == 0)
        towers["text"].released.set()
        until(lambda: client.post("/embed", json={"inputs": ["blue"]}).status_code == 200)
        assert towers["text"].rows < 300, "of 1,200 prompts"
