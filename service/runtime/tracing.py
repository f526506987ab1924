"""OpenTelemetry traces requests, their stages and their batches; spans go to OTEL_EXPORTER_OTLP_ENDPOINT.

A request's span goes on with the trace that its `traceparent` names, and the answer's `traceparent` names the span.
Each stage of it is a span inside. A model call serves many requests and belongs to the trace of none: it is a trace of
its own, linked to the span of each request whose inputs it has, and they to it. Spans hold what the log holds, and
nothing that a client sent. OpenTelemetry is imported where traces are made, and nowhere else.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service import __version__
from service.runtime.logs import trace_id

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.trace import Span, Tracer

log = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
Attributes = Mapping[str, str | int | float]


@dataclass(frozen=True)
class Origin:
    """Holds the span of the request, or of its stage, that an input in a batch belongs to."""

    tracing: "Tracing"
    span: "Span"


class Tracing:
    """Makes spans and hands them to a processor."""

    def __init__(self, processor: "SpanProcessor") -> None:
        """Trace the requests that OTEL_TRACES_SAMPLER selects: by default all, unless their `traceparent` says no."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        resource = Resource.create({"service.name": "isthmus", "service.version": __version__})
        # A batch begins a trace, and is made only where a request in it is traced: no sampler is to ask again.
        samplers = (None, ALWAYS_ON)
        self._processor = processor
        self.requests, self.batches = (self._tracer(TracerProvider(sampler, resource)) for sampler in samplers)

    def _tracer(self, provider: "TracerProvider") -> "Tracer":
        provider.add_span_processor(self._processor)
        return provider.get_tracer("isthmus", __version__)

    @contextmanager
    def request(self, method: str, headers: Mapping[str, str]) -> "Iterator[Span]":
        """Make the span of a request, in the trace that its headers name, or in a new one."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        parent = TraceContextTextMapPropagator().extract(carrier, Context())
        with self.requests.start_as_current_span(
            method, parent, SpanKind.SERVER, record_exception=False, set_status_on_exception=False
        ) as span:
            token = current.set(self)
            noted = trace_id.set(f"{span.get_span_context().trace_id:032x}" if span.is_recording() else None)
            try:
                yield span
            finally:
                trace_id.reset(noted)
                current.reset(token)

    def close(self) -> None:
        """Send the remaining spans. Blocks."""
        self._processor.shutdown()


# State of the current request; tasks that it starts share it.
current: ContextVar[Tracing | None] = ContextVar("tracing", default=None)


def origin() -> Origin | None:
    """Return the origin of the current request's inputs; None where it is not traced."""
    tracing = current.get()
    if tracing is None:
        return None
    from opentelemetry.trace import get_current_span

    span = get_current_span()
    return Origin(tracing, span) if span.is_recording() else None


def stage(name: str) -> "AbstractContextManager[Span | None]":
    """Make a span inside that of the request at hand, where it has one."""
    tracing = current.get()
    if tracing is None:
        return nullcontext()
    return tracing.requests.start_as_current_span(name, record_exception=False, set_status_on_exception=False)


@contextmanager
def batch(origins: Sequence[Origin | None], attributes: Attributes) -> Iterator[None]:
    """Make the span of one model call; none where no input of it is traced."""
    traced = [origin for origin in origins if origin is not None]
    if not traced:
        yield
        return
    from opentelemetry.context import Context
    from opentelemetry.trace import Link

    spans = list({id(origin.span): origin.span for origin in traced}.values())
    links = [Link(span.get_span_context()) for span in spans]
    with traced[0].tracing.batches.start_as_current_span(
        "batch", Context(), attributes=attributes, links=links, record_exception=False
    ) as batch_span:
        for span in spans:
            if span.is_recording():  # a request whose client went away has ended before its input was dropped
                span.add_link(batch_span.get_span_context())
        yield


def finish(span: "Span", route: str, method: str, status: int, attributes: Attributes) -> None:
    """Set the attributes of a request's span that are known at its end."""
    from opentelemetry.trace import Status, StatusCode

    span.update_name(f"{method} {route}")
    span.set_attributes({"http.request.method": method, "http.route": route, "http.response.status_code": status})
    span.set_attributes(attributes)
    if status >= 500:
        span.set_status(Status(StatusCode.ERROR))


def traceparent(span: "Span") -> str:
    """Return the span as the value of a W3C traceparent header."""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def open_tracing() -> Tracing | None:
    """Open the tracing that OpenTelemetry's variables set; None without a collector, or without the extra `otel`."""
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("no traces are made: OTEL_EXPORTER_OTLP_ENDPOINT is set, and the extra `otel` is not installed")
        return None
    return Tracing(BatchSpanProcessor(OTLPSpanExporter()))
