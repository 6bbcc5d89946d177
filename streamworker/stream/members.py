"""Values that a stream delivers in parts, kept as encoded bytes.

Encoded JSON takes the memory that it will take in the result; the same values as Python objects take five to thirty
times as much. Every method that adds something returns by how many bytes the encoded result grew, at least.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from streamworker.wire.json import encode, replace_surrogates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Load = Callable[[bytes], Any]
    """Turns encoded JSON into a value of the result: decodes it, or wraps it in `msgspec.Raw`."""

__all__ = ["Members", "append_text", "clean", "load", "read_text"]

load: Load = msgspec.json.Decoder().decode
"""Decode one value that `Members` encoded."""

_FRAMING = 3
"""The quotes and the colon of a member's name."""


def append_text(buffer: bytearray, text: str) -> int:
    """Append a text to a UTF-8 buffer; return the bytes added. Lone surrogates are kept until `read_text`."""
    encoded = text.encode("utf-8", "surrogatepass")
    buffer += encoded
    return len(encoded)


def read_text(buffer: bytearray) -> str:
    """Decode a buffer. Surrogate pairs that were cut in two are joined; a lone surrogate becomes U+FFFD."""
    try:
        return buffer.decode()
    except UnicodeDecodeError:
        text: str = replace_surrogates(buffer.decode("utf-8", "surrogatepass"))
        return text


def clean(text: str) -> str:
    """Return a text without lone surrogates, which cannot be encoded; hardly any text has one."""
    if text.isascii():
        return text
    cleaned: str = replace_surrogates(text)
    return cleaned


class Members:
    """Members of one JSON object whose values have no rule of their own. An array is kept without its last bracket."""

    __slots__ = ("_encoded",)

    def __init__(self) -> None:
        self._encoded: dict[str, bytes | bytearray] = {}

    def set(self, name: str, value: Any) -> int:
        """Give a member a value: the last one wins, null is not a value, and an array may add to an earlier one.

        An array that begins with the earlier array replaces it (a running list); any other is appended to it.
        """
        if value is None:
            return 0
        name = clean(name)
        encoded = encode(value)
        former = self._encoded.get(name)
        if type(value) is not list:
            self._encoded[name] = encoded
        elif type(former) is bytearray and not _begins_with(encoded, former):
            return _append(former, encoded)
        else:
            self._encoded[name] = bytearray(encoded[:-1])
        return len(encoded) - (len(former) if former is not None else -len(name) - _FRAMING)

    def extend(self, name: str, values: list[Any]) -> int:
        """Append the values to the member's array, which is made if there is none."""
        former = self._encoded.get(clean(name))
        return _append(former, encode(values)) if type(former) is bytearray else self.set(name, values)

    def update(self, members: Iterable[tuple[str, Any]]) -> int:
        """Set several members."""
        return sum([self.set(name, value) for name, value in members])

    def values(self, load: Load = load) -> dict[str, Any]:
        """Return the members, in the order in which they came first."""
        return {name: load(_closed(encoded)) for name, encoded in self._encoded.items()}


def _closed(encoded: bytes | bytearray) -> bytes:
    return encoded if type(encoded) is bytes else bytes(encoded) + b"]"


def _begins_with(array: bytes, former: bytearray) -> bool:
    """Whether an encoded array begins with the elements of a former one, which lacks its last bracket."""
    return array.startswith(former) and (len(former) == 1 or array[len(former)] in b",]")


def _append(former: bytearray, array: bytes) -> int:
    """Append an encoded array to one that lacks its last bracket."""
    if len(array) == len(b"[]"):
        return 0
    before = len(former)
    if before > 1:
        former += b","
    former += array[1:-1]
    return len(former) - before
