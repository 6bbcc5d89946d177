"""JSON decoding that tolerates common deviations, and exact encoding.

msgspec keeps integers of any size, where orjson silently converts those over 64 bits to floats. Both reject a
lone surrogate escape, which JSON's grammar allows (RFC 8259 §8.2) and which appears when an emoji is split
over two deltas. Python's `json` module reads these texts.
"""

from __future__ import annotations

import json
from math import isfinite
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "MAX_DEPTH",
    "InvalidJSON",
    "as_count",
    "decode",
    "decode_lenient",
    "decode_strict",
    "encode",
    "is_shallow",
    "replace_surrogates",
]

MAX_DEPTH = 128
"""Nesting levels that a text may have (serde_json uses the same number). A value is encoded deeper in the
call stack than it was decoded, so without this limit a value could be read and then fail to be written."""

MAX_COUNT = (1 << 53) - 1
"""Largest count that is believed: the largest integer that a double holds exactly. JSON itself has no limit."""

_DECODER = msgspec.json.Decoder()
_ENCODER = msgspec.json.Encoder()


class InvalidJSON(ValueError):
    """The text is not JSON or is nested too deeply. The message never repeats the text."""


def decode_strict(text: bytes) -> Any:
    """Decode one JSON text whose strings are valid Unicode, as nearly all are.

    Raises:
        InvalidJSON: the text is not strict JSON. `decode` may still read it.
    """
    try:
        return _not_too_deep(_DECODER.decode(text), text)
    except RecursionError:
        raise InvalidJSON("nested too deeply") from None
    except ValueError as error:  # the base class of msgspec's errors and of UnicodeDecodeError
        raise InvalidJSON(str(error)) from None


def decode(text: bytes) -> Any:
    """Decode one JSON text. Invalid UTF-8 becomes U+FFFD; strings may contain lone surrogates.

    Raises:
        InvalidJSON: the text is not JSON, contains a number outside the range of a double, or is nested too deeply.
    """
    try:
        return decode_strict(text)
    except InvalidJSON:
        pass
    return _decode_slowly(text, parse_constant=_refuse, parse_float=_finite)


def decode_lenient(text: bytes) -> Any:
    """Decode one JSON text as `decode` does, and also read what is invalid but has one meaning only.

    Strings may contain control characters. Numbers that are not finite (`NaN`, `-Infinity`, 1e999) become None.

    Raises:
        InvalidJSON: the text cannot be read, or is nested too deeply.
    """
    try:
        return decode_strict(text)
    except InvalidJSON:
        pass
    return _decode_slowly(text, parse_constant=_none, parse_float=_finite_or_none, strict=False)


def encode(value: Any) -> bytes:
    """Encode one value as compact JSON in UTF-8. Lone surrogates become U+FFFD."""
    try:
        return _ENCODER.encode(value)
    except UnicodeEncodeError:
        return _ENCODER.encode(replace_surrogates(msgspec.to_builtins(value)))


def replace_surrogates(value: Any) -> Any:
    """Return the value with every surrogate pair joined and every lone surrogate replaced by U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [replace_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {replace_surrogates(key): replace_surrogates(item) for key, item in value.items()}
    return value


def as_count(value: Any) -> int | None:
    """Return a decoded value if it is a believable count, an integer from 0 to `MAX_COUNT`; else None."""
    return value if type(value) is int and 0 <= value <= MAX_COUNT else None


def is_shallow(text: bytes) -> bool:
    """Whether the text is too short, or has too few brackets, to be nested too deeply. A cheap check that
    nearly always holds."""
    return len(text) <= 2 * MAX_DEPTH or text.count(b"[") + text.count(b"{") <= MAX_DEPTH


def _decode_slowly(text: bytes, **options: Any) -> Any:
    try:
        return _not_too_deep(json.loads(text.decode("utf-8", "replace"), **options), text)
    except RecursionError:
        raise InvalidJSON("nested too deeply") from None
    except ValueError as error:
        raise InvalidJSON(_reason(error)) from None


def _not_too_deep(value: Any, text: bytes) -> Any:
    if not is_shallow(text):
        level = [value]
        for _ in range(MAX_DEPTH):
            level = [item for container in level for item in _items(container)]
        if any(type(item) in {list, dict} for item in level):
            raise RecursionError
    return value


def _items(value: Any) -> Iterable[Any]:
    if type(value) is dict:
        return value.values()
    return value if type(value) is list else ()


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not isfinite(number):
        raise ValueError("a number beyond a double")
    return number


def _none(_: str) -> None:
    return None


def _finite_or_none(digits: str) -> float | None:
    number = float(digits)
    return number if isfinite(number) else None


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos}"
    return str(error)
