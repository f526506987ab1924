"""The log is one JSON object per line on standard error, each with the request it belongs to.

What a client sent is in none of them: no text, file name, metadata, path or key. An exception is named by its kind and
place, since its own text may quote what it failed on; at level debug that is logged as well.
"""

import datetime
import logging
import logging.config
import traceback
from collections.abc import Iterator
from contextvars import ContextVar

import orjson

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
trace_id: ContextVar[str | None] = ContextVar("trace_id", default=None)

_OURS = (
    "service.engine.providers",
    "service.store.errors",
    "service.contract.bundle",
    "service.runtime.workers",
    "onnxruntime",
)
"""Modules whose exceptions mention bundles, stores and shapes, and never an input."""
caller: ContextVar[str | None] = ContextVar("caller", default=None)
"""The id of the key that the request at hand came with."""


class JsonFormatter(logging.Formatter):
    """A record's `fields` (a dict given as `extra`) become members of the object."""

    def __init__(self, quoting: bool = False) -> None:
        """Log exceptions as they are, with whatever they quote, where `quoting` is set."""
        super().__init__()
        self._quoting = quoting

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        message = record.getMessage()
        if not self._quoting and not record.name.startswith("service"):
            message = message.partition("\n")[0]  # asyncio goes on with the repr of a task and of its exception
        line: dict[str, object] = {
            "time": when,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
        }
        about = (("request_id", request_id.get()), ("trace_id", trace_id.get()), ("key", caller.get()))
        line |= {name: value for name, value in about if value} | getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            line["exception"] = self.formatException(record.exc_info) if self._quoting else "\n".join(described(error))
        return orjson.dumps(line, default=str).decode()


def described(error: BaseException) -> Iterator[str]:
    """Yield an exception, its causes, and where each was raised, without their texts but for what is safe to tell."""
    ids: set[int] = set()
    exception: BaseException | None = error
    while exception is not None and id(exception) not in ids:
        ids.add(id(exception))
        kind = type(exception)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        description = _safe_text(exception)
        yield f"{name}: {description}" if description else name
        for frame in traceback.extract_tb(exception.__traceback__):
            yield f"  {frame.filename}:{frame.lineno} in {frame.name}"
        if isinstance(exception, BaseExceptionGroup):
            for member in exception.exceptions:
                yield from (f"  | {line}" for line in described(member))
        exception = exception.__cause__ or (None if exception.__suppress_context__ else exception.__context__)


def _safe_text(error: BaseException) -> str | None:
    if name := getattr(error, "sqlite_errorname", None):
        return str(name)
    if isinstance(error, OSError):
        return error.strerror
    return str(error) if type(error).__module__.startswith(_OURS) else None


def configure(level: str) -> None:
    """Set up logging for the process: the service at `level`, everything else from warnings on."""
    # Who logs a line, from which thread and process, is in none of ours: the logging HOWTO says how not to look it up.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"json": {"()": JsonFormatter, "quoting": level == "debug"}},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
            "root": {"level": "WARNING", "handlers": ["stderr"]},
            "loggers": {"service": {"level": level.upper()}},
        }
    )
