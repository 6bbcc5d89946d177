"""Logging: one line per event, the same for us and for the libraries, to stdout.

Events have dotted names in the past tense (`job.completed`) and their facts as members. What a library logs becomes
an event called `library.logged`, so that our names stay ours.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import structlog

from streamworker.redaction import Redactor
from streamworker.telemetry.rendering import Cleaner, Rendered, render_console, render_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger, Processor

__all__ = ["FLOORS", "LogFormat", "configure_logging"]

LogFormat = Literal["json", "console"]

FLOORS = {
    "aiokafka": logging.WARNING,  # its debug log prints keys and values: prompts; its info log is chatter
    "asyncio": logging.INFO,
    "httpcore": logging.INFO,  # its debug log prints headers
    "urllib3": logging.INFO,  # its debug log says every export of traces
    "httpx": logging.WARNING,  # says every request at info: one line per job is ours
}
"""Libraries, and the level below which they are never heard, whatever the configuration says."""


def configure_logging(
    format: LogFormat,  # noqa: A002 - the setting's name
    level: str = "info",
    stream: BinaryIO | None = None,
    *,
    redact: Callable[[str], str] | None = None,
) -> None:
    """Send every log line of the process to `stream` (default: stdout), cleaned by `redact`.

    May be called again: the last call wins, except that a logger which has spoken already keeps its level.
    Raises ValueError for a level that is none.
    """
    number = _level(level)
    _OUT.open(stream)
    _PROCESSORS[:] = [_pipeline(format, redact or Redactor(), colors=_OUT.isatty())]
    structlog.configure(
        processors=_PROCESSORS,
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.BytesLoggerFactory(_OUT),  # type: ignore[arg-type]  # it writes and flushes, no more
        cache_logger_on_first_use=True,
    )
    _route_libraries(number)


_QUIET_S = 10.0
_MAX_SAID = 1000


def _level(name: str) -> int:
    number = logging.getLevelNamesMapping().get(name.upper())
    if number is None:
        raise ValueError(f"{name!r} is no log level; use debug, info, warning, error or critical")
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


# Local variables hold prompts and keys.
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
    """Hands the standard library's records to structlog."""

    def __init__(self) -> None:
        super().__init__()
        self._log: FilteringBoundLogger = structlog.get_logger()
        self._said: dict[tuple[str, int, str], _Said] = {}

    def emit(self, record: logging.LogRecord) -> None:
        # Some code sets the level of a logger below the pinned one's; the floor holds here, too.
        if record.levelno < FLOORS.get(record.name.partition(".")[0], logging.NOTSET):
            return
        message = _message(record)
        suppressed = self._repeats(record, message)
        if suppressed is None:
            return
        fields: dict[str, Any] = {"logger": record.name, "message": message}
        if suppressed:
            fields["repeats"] = suppressed
        if record.exc_info:
            fields["exc_info"] = record.exc_info
        self._log.log(_nearest(record.levelno), "library.logged", **fields)

    def _repeats(self, record: logging.LogRecord, message: str) -> int | None:
        """Return how often this was kept back since it was last said; None to keep it back again.

        A broker that is away makes its clients repeat themselves many times a second.
        """
        said = self._said.get(key := (record.name, record.levelno, message))
        if said is not None and record.created < said.until:
            said.suppressed += 1
            return None
        if len(self._said) >= _MAX_SAID:
            self._said.clear()
        self._said[key] = _Said(record.created + _QUIET_S)
        return said.suppressed if said is not None else 0


class _Said:
    """A line that a library said: not again before `until`, in seconds since the epoch."""

    __slots__ = ("suppressed", "until")

    def __init__(self, until: float) -> None:
        self.until = until
        self.suppressed = 0


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - a library's slip in its format string
        return record.msg if isinstance(record.msg, str) else f"<{type(record.msg).__qualname__}>"


def _nearest(level: int) -> int:
    """Round a level of somebody's own down to one that has a name."""
    return max(logging.DEBUG, min(level, logging.CRITICAL) // 10 * 10)


class _Lines:
    """A stream that lets nobody down: where it cannot be written to, lines are dropped and the worker works on."""

    def __init__(self) -> None:
        self._given: BinaryIO | None = None
        self._broken = False

    def open(self, stream: BinaryIO | None) -> None:
        """Write to this stream from now on; None is stdout."""
        self._given, self._broken = stream, False

    @property
    def _stream(self) -> BinaryIO | None:
        # stdout is looked up each time: it is None in a process started without one, and tests replace it.
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
        except (OSError, ValueError):  # a full disk may pass, a closed file may be replaced
            pass

    def _abandon(self, stream: BinaryIO, error: OSError) -> None:
        """Point the descriptor at nothing, or the interpreter's last flush fails and with it the exit code."""
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(
                f"streamworker: the log's reader went away ({error.strerror}); log lines are dropped\n"
            )


# Bound loggers keep what they first saw, so these two are changed in place and never replaced.
_PROCESSORS: list[Processor] = []
_OUT = _Lines()
