"""From an event dict to one line of a log, whatever is in it.

Nothing here may raise, and nothing here may print what it does not know: a value of an unknown type is named by its
type, because the `repr` of a job is a prompt.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING, Any

import orjson
import structlog

from streamworker.text import truncate
from streamworker.wire.json import replace_surrogates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from structlog.typing import EventDict, Processor, WrappedLogger

__all__ = ["MAX_TEXT", "Cleaner", "Rendered", "render_console", "render_json"]

MAX_TEXT = 16_384
"""Bytes of one string in a log line. A traceback fits; a body that went astray does not."""

MAX_ITEMS = 256
MAX_DEPTH = 16  # an exception is four deep, each exception group around it adds two
_FIRST = ("timestamp", "level", "event")
MAX_INT_BITS = 1024


class Cleaner:
    """A processor that leaves only JSON's types, bounds them, and takes secrets out of every string."""

    def __init__(self, redact: Callable[[str], str]) -> None:
        self._redact = redact

    def __call__(self, _logger: WrappedLogger, _name: str, event_dict: EventDict) -> EventDict:
        """Return the same event, clean, with the members that people look for first in front."""
        first = {name: event_dict.pop(name) for name in _FIRST if name in event_dict}
        return {self._text(name): self._clean(value, 0) for name, value in {**first, **event_dict}.items()}

    def _clean(self, value: Any, depth: int) -> Any:
        if isinstance(value, str):
            return self._text(value)
        if value is None or isinstance(value, (bool, int, float)):
            return _number(value)
        if isinstance(value, Enum):
            return self._clean(value.value, depth)
        if isinstance(value, BaseException):
            return self._text(f"{type(value).__qualname__}: {value}")
        return self._collection(value, depth + 1)

    def _collection(self, value: Any, depth: int) -> Any:
        if isinstance(value, dict) and depth <= MAX_DEPTH:
            return {self._key(key): self._clean(item, depth) for key, item in _some(value.items())}
        if isinstance(value, (list, tuple, set, frozenset)) and depth <= MAX_DEPTH:
            return [self._clean(item, depth) for item in _some(value)]
        return f"<{type(value).__qualname__}>"

    def _key(self, key: Any) -> str:
        return self._text(key) if isinstance(key, str) else str(self._clean(key, MAX_DEPTH))

    def _text(self, text: str) -> str:
        # Redact first: a secret that the cut halves would no longer be known as one.
        text = truncate(self._redact(text), MAX_TEXT)
        return text if text.isascii() else str(replace_surrogates(text))


class Rendered:
    """A processor that runs others and always ends with a line: what one of them raises becomes a line of its own."""

    def __init__(self, *processors: Processor) -> None:
        self._processors = processors

    def __call__(self, logger: WrappedLogger, name: str, event_dict: EventDict) -> bytes:
        """Return the line, without its line end."""
        event = event_dict.get("event")
        value: Any = event_dict
        try:
            for processor in self._processors:
                value = processor(logger, name, value)
        except structlog.DropEvent:
            raise
        except Exception as error:  # noqa: BLE001 - a log call must not raise, whatever it was given
            return orjson.dumps({"level": "error", "event": "log.failed", **_failure(event, error)})
        assert isinstance(value, bytes)
        return value


def render_json(_logger: WrappedLogger, _name: str, event_dict: EventDict) -> bytes:
    """Render as JSON in UTF-8. Where orjson refuses (integers over 64 bits, surrogates), the standard library writes."""
    with suppress(TypeError):
        return orjson.dumps(event_dict, option=orjson.OPT_NON_STR_KEYS)
    return json.dumps(event_dict, default=lambda value: f"<{type(value).__qualname__}>").encode()


def render_console(*, colors: bool) -> Processor:
    """Return a renderer for people."""
    renderer = structlog.dev.ConsoleRenderer(
        colors=colors, exception_formatter=structlog.dev.plain_traceback, sort_keys=False
    )

    def render(logger: WrappedLogger, name: str, event_dict: EventDict) -> bytes:
        return renderer(logger, name, event_dict).encode("utf-8", "replace")

    return render


def _failure(event: Any, error: Exception) -> dict[str, str]:
    # Names of our own code only: the message of the exception may quote the value that caused it.
    name = event if isinstance(event, str) and event.isascii() else ""
    return {"failed_event": truncate(name, 200), "reason": type(error).__qualname__}


def _number(value: float | None) -> float | str | None:
    """Keep what JSON and its readers can hold; write the rest as text, for null would be a lie."""
    if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
        return f"<{value.bit_length()} bits>"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _some(items: Iterable[Any]) -> Iterable[Any]:
    return (item for _, item in zip(range(MAX_ITEMS), items, strict=False))
