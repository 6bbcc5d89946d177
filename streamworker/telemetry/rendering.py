"""Rendering of an event dict as one log line.

The processors of this module never raise, and they never call `repr`: the `repr` of a job contains a prompt. A value of
an unknown type is replaced by the name of its type.
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
"""Maximum bytes of one string in a log line: enough for a traceback."""

MAX_ITEMS = 256
MAX_DEPTH = 16  # an exception has four levels, each exception group around it adds two
_FIRST = ("timestamp", "level", "event")
MAX_INT_BITS = 1024


class Cleaner:
    """A processor that converts values to JSON's types, bounds them, and removes secrets from every string."""

    def __init__(self, redact: Callable[[str], str]) -> None:
        self._redact = redact

    def __call__(self, _logger: WrappedLogger, _name: str, event_dict: EventDict) -> EventDict:
        """Return the cleaned event; timestamp, level and event come first."""
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
        # Redact before truncating: half a secret would not be recognized.
        text = truncate(self._redact(text), MAX_TEXT)
        return text if text.isascii() else str(replace_surrogates(text))


class Rendered:
    """A processor that runs others and always returns a line: an exception of one of them gives a `log.failed` line."""

    def __init__(self, *processors: Processor) -> None:
        self._processors = processors

    def __call__(self, logger: WrappedLogger, name: str, event_dict: EventDict) -> bytes:
        """Return the line without its line end."""
        event = event_dict.get("event")
        value: Any = event_dict
        try:
            for processor in self._processors:
                value = processor(logger, name, value)
        except structlog.DropEvent:
            raise
        except Exception as error:  # noqa: BLE001 - a log call must not raise
            return orjson.dumps({"level": "error", "event": "log.failed", **_failure(event, error)})
        assert isinstance(value, bytes)
        return value


def render_json(_logger: WrappedLogger, _name: str, event_dict: EventDict) -> bytes:
    """Render as JSON in UTF-8. Falls back to the standard library for integers over 64 bits and surrogates."""
    with suppress(TypeError):
        return orjson.dumps(event_dict, option=orjson.OPT_NON_STR_KEYS)
    return json.dumps(event_dict, default=lambda value: f"<{type(value).__qualname__}>").encode()


def render_console(*, colors: bool) -> Processor:
    """Return a renderer of readable text."""
    renderer = structlog.dev.ConsoleRenderer(
        colors=colors, exception_formatter=structlog.dev.plain_traceback, sort_keys=False
    )

    def render(logger: WrappedLogger, name: str, event_dict: EventDict) -> bytes:
        return renderer(logger, name, event_dict).encode("utf-8", "replace")

    return render


def _failure(event: Any, error: Exception) -> dict[str, str]:
    # Only the exception's type: its message may quote the value that caused it.
    name = event if isinstance(event, str) and event.isascii() else ""
    return {"failed_event": truncate(name, 200), "reason": type(error).__qualname__}


def _number(value: float | None) -> float | str | None:
    """Return a number that JSON readers can represent, or a text in its place."""
    if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
        return f"<{value.bit_length()} bits>"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _some(items: Iterable[Any]) -> Iterable[Any]:
    return (item for _, item in zip(range(MAX_ITEMS), items, strict=False))
