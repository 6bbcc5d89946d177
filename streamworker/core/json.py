"""JSON text to values and back, forgiving where upstreams are sloppy and exact where they are not.

msgspec keeps integers of any size (orjson turns those over 64 bits into floats in silence). Neither takes a lone
surrogate escape, which JSON's grammar allows (RFC 8259 §8.2) and which appears when an emoji is cut over two deltas;
there the standard library reads on.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

__all__ = ["InvalidJSON", "decode", "decode_strict", "encode", "replace_surrogates"]

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
        return _DECODER.decode(text)
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
        return json.loads(text.decode("utf-8", "replace"), parse_constant=_refuse, parse_float=_finite)
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
