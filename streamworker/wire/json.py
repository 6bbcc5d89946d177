"""JSON text to values and back, forgiving where upstreams are sloppy and exact where they are not.

msgspec keeps integers of any size (orjson turns those over 64 bits into floats in silence). Neither takes a lone
surrogate escape, which JSON's grammar allows (RFC 8259 §8.2) and which appears when an emoji is cut over two deltas;
there the standard library reads on.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "MAX_DEPTH",
    "InvalidJSON",
    "decode",
    "decode_strict",
    "encode",
    "is_shallow",
    "replace_surrogates",
]

MAX_DEPTH = 128
"""Levels that one text may nest, serde_json's number. What is read here is written elsewhere, deeper in the call stack:
without a limit of our own the same value could be read and then not written."""

_DECODER = msgspec.json.Decoder()
_ENCODER = msgspec.json.Encoder()


class InvalidJSON(ValueError):
    """Not JSON, or nested too deeply to be handled. The message never repeats the text."""


def decode_strict(text: bytes) -> Any:
    """Read one JSON text whose strings are clean Unicode; what nearly every text is.

    Raises:
        InvalidJSON: it is not that. `decode` may still read it.
    """
    try:
        return _not_too_deep(_DECODER.decode(text), text)
    except RecursionError:
        raise InvalidJSON("nested too deeply") from None
    except ValueError as error:  # msgspec's errors and UnicodeDecodeError both are
        raise InvalidJSON(str(error)) from None


def decode(text: bytes) -> Any:
    """Read one JSON text. Bytes that are not UTF-8 become U+FFFD; a string may hold lone surrogates.

    Raises:
        InvalidJSON: the text is no JSON, holds a number beyond a double, or is nested too deeply.
    """
    try:
        return decode_strict(text)
    except InvalidJSON:
        pass
    try:
        value = json.loads(text.decode("utf-8", "replace"), parse_constant=_refuse, parse_float=_finite)
        return _not_too_deep(value, text)
    except RecursionError:
        raise InvalidJSON("nested too deeply") from None
    except ValueError as error:
        raise InvalidJSON(_reason(error)) from None


def encode(value: Any) -> bytes:
    """Write one value as compact JSON in UTF-8; lone surrogates become U+FFFD."""
    try:
        return _ENCODER.encode(value)
    except UnicodeEncodeError:
        return _ENCODER.encode(replace_surrogates(msgspec.to_builtins(value)))


def replace_surrogates(value: Any) -> Any:
    """Return the value with every lone surrogate in its strings replaced by U+FFFD and every pair joined."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [replace_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {replace_surrogates(key): replace_surrogates(item) for key, item in value.items()}
    return value


def is_shallow(text: bytes) -> bool:
    """Whether a text is so short, or has so few brackets, that it cannot be nested too deeply; nearly every one is."""
    return len(text) <= 2 * MAX_DEPTH or text.count(b"[") + text.count(b"{") <= MAX_DEPTH


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
    if number in (float("inf"), float("-inf")):
        raise ValueError("a number beyond a double")
    return number


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos}"
    return str(error)
