"""Logs, traces and metrics: one call at start, the same in every process."""

import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import httpx
import structlog
from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from mojomesh_chassis.settings import MeshSettings

log: structlog.stdlib.BoundLogger = structlog.get_logger()
tracer = trace.get_tracer("mojomesh")


class JsonLinesExporter(SpanExporter):
    """Appends finished spans to a file, one JSON object a line: traces for a laptop, without a collector."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("a", buffering=1)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        for span in spans:
            self._file.write(json.dumps(json.loads(span.to_json()), separators=(",", ":")) + "\n")
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self._file.close()


def start_telemetry(service: str, settings: MeshSettings) -> None:
    """Send logs as JSON lines to standard error, and spans to the collector or the folder that settings name, if any."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service, replica=settings.replica)
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format='{"level":"%(levelname)s","logger":"%(name)s","event":"%(message)s"}'
    )
    if settings.otlp_endpoint or settings.traces:
        provider = TracerProvider(resource=Resource.create({"service.name": service, "service.instance.id": settings.replica}))
        exporter: SpanExporter = OTLPSpanExporter() if settings.otlp_endpoint else JsonLinesExporter(_spans_file(service, settings.traces))
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=500))
        trace.set_tracer_provider(provider)


def log_beside_answers() -> None:
    """Send logs to standard error, for a command, which answers on standard output."""
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))


def _spans_file(service: str, folder: Path | None) -> Path:
    return (folder or Path()) / f"{service}.jsonl"


def carried_trace(headers: Mapping[str, str]) -> trace.SpanContext:
    """The span context that `headers` carry (W3C `traceparent`); an invalid one when they carry none."""
    return trace.get_current_span(propagate.extract(headers)).get_span_context()


def links(contexts: Iterable[trace.SpanContext]) -> list[trace.Link]:
    """Links to at most 100 different spans: a batch has many causes."""
    known = {context.span_id: context for context in contexts if context.is_valid}
    return [trace.Link(context) for context in list(known.values())[:100]]


def trace_headers() -> dict[str, str]:
    """The current trace as headers to send on."""
    headers: dict[str, str] = {}
    propagate.inject(headers)
    return headers


def asking(settings: MeshSettings, timeout_s: float = 10.0) -> httpx.AsyncClient:
    """A client for asking other services: carries the trace and the token."""

    async def carry(request: httpx.Request) -> None:
        request.headers.update(trace_headers())

    return httpx.AsyncClient(
        headers={"Authorization": f"Bearer {settings.token}"}, timeout=timeout_s, event_hooks={"request": [carry]}, trust_env=False
    )
