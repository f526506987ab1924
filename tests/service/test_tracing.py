"""Traces, as an exporter in memory receives them: requests, their stages, and batches that are linked to requests."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from service.api.app import create_app
from service.runtime.tracing import Tracing
from service.settings import Settings
from tests.conftest import serving

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def traced(settings: Settings, ask) -> tuple[list[ReadableSpan], list[httpx.Response]]:
    """The spans of some requests, sent at once to an app, and the answers."""
    exporter = InMemorySpanExporter()
    app = create_app(settings, tracing=Tracing(SimpleSpanProcessor(exporter)))

    async def main() -> list[httpx.Response]:
        async with app.router.lifespan_context(app) as state:

            async def with_state(scope, receive, send):  # a server's part of the lifespan protocol
                await app(scope | {"state": dict(state)}, receive, send)

            transport = httpx.ASGITransport(with_state)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return list(await asyncio.gather(*(each(client) for each in ask)))

    answers = asyncio.run(main())
    return list(exporter.get_finished_spans()), answers


def embed(*texts: str, sampled: str | None = None):
    headers = {} if sampled is None else {"traceparent": f"00-{TRACE}-{PARENT}-{sampled}", "tracestate": "a=b"}
    return lambda client: client.post("/embed", json={"inputs": list(texts)}, headers=headers)


def named(spans: list[ReadableSpan], name: str) -> list[ReadableSpan]:
    return [span for span in spans if span.name == name]


def test_a_request_goes_on_with_the_trace_that_it_brings(settings: Settings) -> None:
    spans, [answer] = traced(settings, [embed("red", sampled="01")])
    [request] = named(spans, "POST /embed")
    assert request.kind is SpanKind.SERVER
    assert f"{request.context.trace_id:032x}" == TRACE
    assert request.parent is not None and f"{request.parent.span_id:016x}" == PARENT
    assert answer.headers["traceparent"] == f"00-{TRACE}-{request.context.span_id:016x}-01"
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["isthmus.model_ms"] >= 0
    stages = [span for span in spans if span.parent and span.parent.span_id == request.context.span_id]
    assert {span.name for span in stages} == {"read", "cache", "decode"}
    assert all(span.context.trace_id == request.context.trace_id for span in stages)


def test_a_batch_is_a_trace_of_its_own_linked_to_its_requests(settings: Settings) -> None:
    spans, answers = traced(settings, [embed("red", sampled="01"), embed("blue"), embed("green", "black")])
    assert {answer.status_code for answer in answers} == {200}
    requests = {span.context.span_id: span for span in named(spans, "POST /embed")}
    assert len({span.context.trace_id for span in requests.values()}) == 3
    batches = named(spans, "batch")
    assert sum(span.attributes["isthmus.items"] for span in batches) == 4
    linked: set[int] = set()
    for batch in batches:
        assert batch.parent is None and batch.attributes["isthmus.modality"] == "text"
        assert batch.context.trace_id not in {span.context.trace_id for span in requests.values()}
        for link in batch.links:
            linked.add(link.context.span_id)
            back = [each.context.span_id for each in requests[link.context.span_id].links]
            assert batch.context.span_id in back
    assert linked == set(requests)


def test_a_search_is_nested_as_its_stages_are(settings: Settings) -> None:
    async def both(client: httpx.AsyncClient) -> httpx.Response:
        await client.post("/items", json={"items": [{"id": "a", "text": "red"}]})
        return await client.post("/search", json={"query": "blue"})

    spans, [answer] = traced(settings, [both])
    assert answer.status_code == 200
    by_id = {span.context.span_id: span for span in spans}
    [index] = named(spans, "index")
    search = by_id[index.parent.span_id]
    assert (search.name, by_id[search.parent.span_id].name) == ("search", "POST /search")
    assert [by_id[span.parent.span_id].name for span in named(spans, "write")] == ["POST /items"]


def test_failures_are_marked_and_tell_nothing_that_was_sent(settings: Settings) -> None:
    def malformed(client):
        return client.post("/embed", json={"zyxwvu": 1})

    spans, answers = traced(settings.model_copy(update={"request_deadline_s": 1e-9}), [embed("zyxwvu"), malformed])
    assert [answer.status_code for answer in answers] == [504, 422]
    by_status = {span.attributes["http.response.status_code"]: span for span in named(spans, "POST /embed")}
    assert by_status[504].status.status_code is StatusCode.ERROR
    assert by_status[504].attributes["error.type"] == "deadline_exceeded"
    assert by_status[422].status.status_code is StatusCode.UNSET
    assert not [span for span in spans if "zyxwvu" in span.to_json()]


@pytest.mark.parametrize(("share", "sampled", "expected"), [("0", None, 0), ("0", "01", 1), ("1", "00", 0)])
def test_the_caller_decides_and_else_the_share(
    settings: Settings, share: str, sampled: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", share)
    spans, [answer] = traced(settings, [embed("red", sampled=sampled)])
    assert len(named(spans, "POST /embed")) == len(named(spans, "batch")) == expected
    assert int(answer.headers["traceparent"][-2:], 16) & 1 == expected


def test_a_traceparent_that_is_none_begins_a_new_trace(settings: Settings) -> None:
    wrong = lambda client: client.post("/embed", json={"inputs": ["red"]}, headers={"traceparent": "00-evil"})  # noqa: E731
    spans, [answer] = traced(settings, [wrong])
    [request] = named(spans, "POST /embed")
    assert request.parent is None and "evil" not in answer.headers["traceparent"]


def test_without_a_collector_nothing_is_made(settings: Settings) -> None:
    with serving(settings) as client:
        answer = client.post("/embed", json={"inputs": ["red"]}, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    assert answer.status_code == 200 and "traceparent" not in answer.headers


def test_traces_reach_a_collector(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Collector) as collector, ThreadPoolExecutor(1) as pool:
        pool.submit(collector.serve_forever)
        try:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}/")
            with serving(settings) as client:
                client.post("/embed", json={"inputs": ["red"]}).raise_for_status()
            # At its end the server sends what is left, before it has ended.
        finally:
            collector.shutdown()
    spans = [
        span.name for each in received for resource in each.resource_spans
        for scope in resource.scope_spans for span in scope.spans
    ]  # fmt: skip
    assert {"POST /embed", "batch", "decode"} <= set(spans)
