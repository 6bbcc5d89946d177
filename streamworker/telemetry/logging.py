"""Logging: one line per event to stdout, in one format for this package and for the libraries that it uses.

Events have dotted names in the past tense (`job.completed`), and fields for the details. Every record that a library
logs becomes an event called `library.logged`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import structlog

from streamworker.log_throttle import LogThrottle
from streamworker.redaction import Redactor
from streamworker.telemetry.rendering import Cleaner, Rendered, render_console, render_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger, Processor

__all__ = ["FLOORS", "LogFormat", "configure_logging"]

LogFormat = Literal["", "json", "console"]

FLOORS = {
    "aiokafka": logging.WARNING,  # its debug log prints keys and values: prompts; its info log is chatter
    "asyncio": logging.INFO,
    "httpcore": logging.INFO,  # its debug log prints headers
    "urllib3": logging.INFO,  # its debug log has a line for every export of traces
    "httpx": logging.WARNING,  # its info log has a line for every request; the job's own line is sufficient
}
"""Lowest level of each library's records, whatever the configuration says."""


def configure_logging(
    format: LogFormat,  # noqa: A002 - the setting's name
    level: str = "info",
    stream: BinaryIO | None = None,
    *,
    redact: Callable[[str], str] | None = None,
) -> None:
    """Send every log line of the process to `stream` (default: stdout); `redact` removes secrets from it.

    An empty `format` means console on a terminal and JSON elsewhere.

    May be called again: the last call is effective, except that a logger which was used before keeps its level.

    Raises:
        ValueError: `level` is not a valid log level.
    """
    number = _level(level)
    _OUT.open(stream)
    format = format or ("console" if _OUT.isatty() else "json")  # noqa: A001 - as the parameter
    _PROCESSORS[:] = [_pipeline(format, redact or Redactor(), colors=_OUT.isatty())]
    structlog.configure(
        processors=_PROCESSORS,
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.BytesLoggerFactory(_OUT),  # type: ignore[arg-type]  # BytesLogger only writes and flushes
        cache_logger_on_first_use=True,
    )
    _route_libraries(number)


_MAX_THROTTLES = 1000


def _level(name: str) -> int:
    number = logging.getLevelNamesMapping().get(name.upper())
    if number is None:
        raise ValueError(f"{name!r} is not a valid log level; use debug, info, warning, error or critical")
    return number


def _pipeline(format: LogFormat, redact: Callable[[str], str], *, colors: bool) -> Rendered:  # noqa: A002
    as_json = format == "json"
    return Rendered(
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _STRUCTURED_EXCEPTION if as_json else structlog.processors.format_exc_info,
        Cleaner(redact),
        render_json if as_json else render_console(colors=colors),
    )


# show_locals=False: local variables hold prompts and keys.
_STRUCTURED_EXCEPTION = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False, use_rich=False, max_frames=30)
)


def _route_libraries(level: int) -> None:
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, _Bridge):
            root.removeHandler(handler)
    root.addHandler(_Bridge())
    root.setLevel(level)
    for name, floor in FLOORS.items():
        logging.getLogger(name).setLevel(max(level, floor))


class _Bridge(logging.Handler):
    """A logging handler that passes the standard library's records on to structlog."""

    def __init__(self) -> None:
        super().__init__()
        self._log: FilteringBoundLogger = structlog.get_logger()
        self._throttles: dict[tuple[str, int, str], LogThrottle] = {}

    def emit(self, record: logging.LogRecord) -> None:
        # A library may set the level of one of its own loggers below the floor.
        if record.levelno < FLOORS.get(record.name.partition(".")[0], logging.NOTSET):
            return
        message = _message(record)
        repetition = self._throttle(record, message).failed(time.monotonic())
        if repetition is None:
            return
        fields: dict[str, Any] = {"logger": record.name, "message": message, **repetition}
        if record.exc_info:
            fields["exc_info"] = record.exc_info
        self._log.log(_nearest(record.levelno), "library.logged", **fields)

    def _throttle(self, record: logging.LogRecord, message: str) -> LogThrottle:
        """Return the throttle of this message: clients log the same lines many times a second while a broker is away."""
        key = (record.name, record.levelno, message)
        if key not in self._throttles:
            if len(self._throttles) >= _MAX_THROTTLES:
                self._throttles.clear()
            self._throttles[key] = LogThrottle()
        return self._throttles[key]


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - the library's format string does not match its arguments
        return record.msg if isinstance(record.msg, str) else f"<{type(record.msg).__qualname__}>"


def _nearest(level: int) -> int:
    """Round a custom level down to one that has a name."""
    return max(logging.DEBUG, min(level, logging.CRITICAL) // 10 * 10)


class _Lines:
    """A stream that never raises: lines that cannot be written are dropped."""

    def __init__(self) -> None:
        self._given: BinaryIO | None = None
        self._broken = False

    def open(self, stream: BinaryIO | None) -> None:
        """Write to `stream` from now on; None means stdout."""
        self._given, self._broken = stream, False

    @property
    def _stream(self) -> BinaryIO | None:
        # Look stdout up at every call: it is None in a process started without one, and tests replace it.
        return self._given or getattr(sys.stdout, "buffer", None)

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def write(self, data: bytes) -> int:
        self._try(lambda stream: stream.write(data))
        return len(data)

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def _try(self, act: Callable[[BinaryIO], object]) -> None:
        if self._broken or (stream := self._stream) is None:
            return
        try:
            act(stream)
        except BrokenPipeError as error:
            self._broken = True
            self._abandon(stream, error)
        except (OSError, ValueError):  # a full disk may get space, a closed file may be replaced
            pass

    def _abandon(self, stream: BinaryIO, error: OSError) -> None:
        """Redirect the descriptor to /dev/null: otherwise the interpreter's last flush fails and changes the exit code."""
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(
                f"streamworker: log output was closed ({error.strerror}); log lines are dropped\n"
            )


# Bound loggers keep a reference to these two, so they are changed in place and never replaced.
_PROCESSORS: list[Processor] = []
_OUT = _Lines()
