"""The offset map: what a commit's metadata contains in addition to its offset.

It holds the finished offsets beyond the committed one, so that they are not run again; the number of
deliveries of each unfinished offset, so that a job that kills its worker cannot loop; and a commit id, by
which a worker recognises whether the last commit in the log is its own.

On the wire it is ASCII, at most `LIMIT` characters (the broker's default `offset.metadata.max.bytes`)::

    sw1:<commit id>:<form><base64 of the finished offsets>:<base64 of the deliveries>

`form` is `b` for a bitmap and `r` for run lengths, in upper case if compressed; the shortest form is used.
Numbers are LEB128 varints relative to the committed offset. A reader ignores a map of an unknown version or a
damaged map: more jobs are run again, none is lost.
"""

from __future__ import annotations

import binascii
import zlib
from base64 import b64decode, b64encode
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

__all__ = ["FULL", "LIMIT", "MAX_OFFSETS", "Damaged", "OffsetMap", "decode_map", "encode_map"]

LIMIT = 4096
"""Characters of a map; the broker's default `offset.metadata.max.bytes`."""

FULL = LIMIT * 3 // 4
"""From this size on a partition accepts no new records until its map has shrunk. Open jobs can still finish
within the rest."""

MAX_OFFSETS = 1 << 20
"""Finished offsets that a map may hold, so that decoding a damaged map cannot build a huge set."""

_VERSION = "sw1"
_MAX_INFLATED = MAX_OFFSETS // 8


class OffsetMap(NamedTuple):
    """The content of a map. `finished` and the keys of `deliveries` are at or beyond the committed offset."""

    finished: frozenset[int] = frozenset()
    deliveries: Mapping[int, int] = {}
    commit_id: str = ""


class Damaged(ValueError):
    """The metadata is not an offset map of a known version."""


def encode_map(committed: int, offset_map: OffsetMap) -> str:
    """Encode a map for a commit at this offset. The caller checks its length against `LIMIT`."""
    assert ":" not in offset_map.commit_id
    finished = sorted(offset - committed for offset in offset_map.finished)
    forms = [form + _text(data) for form, data in _candidates(finished)]
    deliveries = sorted((offset - committed, count) for offset, count in offset_map.deliveries.items())
    counted = _text(_shorter(_varints(_with_gaps(deliveries)))) if deliveries else ""
    return f"{_VERSION}:{offset_map.commit_id}:{min(forms, key=len, default='')}:{counted}"


def decode_map(committed: int, metadata: str) -> OffsetMap:
    """Decode a commit's metadata. Empty metadata is an empty map.

    Raises:
        Damaged: the metadata is not a map of a known version.
    """
    if not metadata:
        return OffsetMap()
    try:
        version, commit_id, finished, deliveries = metadata.split(":")
        if version != _VERSION:
            raise Damaged(f"the offset map is of version {version[:16]!r}")
        return OffsetMap(
            frozenset(committed + offset for offset in _read_finished(finished)),
            {committed + offset: count for offset, count in _read_deliveries(deliveries)},
            commit_id,
        )
    except (ValueError, IndexError, binascii.Error, zlib.error) as error:
        raise (
            error if isinstance(error, Damaged) else Damaged(f"the offset map is damaged: {error}")
        ) from None


def _candidates(finished: list[int]) -> Iterator[tuple[str, bytes]]:
    """Yield every form that `decode_map` accepts, which bounds the inflated size."""
    if finished:
        runs = _varints(_runs(finished))
        yield "r", runs
        if len(runs) <= _MAX_INFLATED:
            yield "R", zlib.compress(runs, 9)
        if finished[-1] < MAX_OFFSETS:
            bitmap = _bitmap(finished)
            yield from (("b", bitmap), ("B", zlib.compress(bitmap, 9)))


def _read_finished(text: str) -> list[int]:
    if not text:
        return []
    read: dict[str, Callable[[bytes], list[int]]] = {"b": _from_bitmap, "r": _from_runs}
    data = b64decode(text[1:], validate=True)
    if text[0].lower() not in read:
        raise Damaged("the offset map has an unknown form")
    return read[text[0].lower()](_inflated(data) if text[0].isupper() else data)


def _read_deliveries(text: str) -> Iterator[tuple[int, int]]:
    if text:
        data = b64decode(text, validate=True)
        numbers = list(_from_varints(_inflated(data[1:]) if data[:1] == b"z" else data[1:]))
        offset = -1
        for gap, count in zip(numbers[::2], numbers[1::2], strict=True):
            offset += gap + 1
            yield offset, count


def _bitmap(offsets: list[int]) -> bytes:
    bits = bytearray(offsets[-1] // 8 + 1)
    for offset in offsets:
        bits[offset // 8] |= 1 << offset % 8
    return bytes(bits)


def _from_bitmap(data: bytes) -> list[int]:
    return [index * 8 + bit for index, byte in enumerate(data) for bit in range(8) if byte >> bit & 1]


def _runs(offsets: list[int]) -> Iterator[int]:
    """Yield the lengths of alternating runs: unfinished, finished, unfinished …"""
    end = length = 0
    for offset in offsets:
        if offset == end + length and length:
            length += 1
            continue
        if length:
            yield length
        yield offset - (end + length)
        end, length = offset, 1
    yield length


def _from_runs(data: bytes) -> list[int]:
    offsets: list[int] = []
    at = 0
    for index, length in enumerate(_from_varints(data)):
        if index % 2:
            if len(offsets) + length > MAX_OFFSETS:
                raise Damaged("the offset map has a run of impossible length")
            offsets.extend(range(at, at + length))
        at += length
    return offsets


def _with_gaps(deliveries: list[tuple[int, int]]) -> Iterator[int]:
    last = -1
    for offset, count in deliveries:
        yield offset - last - 1
        yield count
        last = offset


def _varints(numbers: Iterable[int]) -> bytes:
    data = bytearray()
    for number in numbers:
        rest = number
        while rest > 0x7F:
            data.append(rest & 0x7F | 0x80)
            rest >>= 7
        data.append(rest)
    return bytes(data)


def _from_varints(data: bytes) -> Iterator[int]:
    number = shift = 0
    for byte in data:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield number
            number = shift = 0
        elif shift > 63:
            raise Damaged("the offset map has a number of impossible size")
    if shift:
        raise Damaged("the offset map ends inside a number")


def _shorter(data: bytes) -> bytes:
    packed = zlib.compress(data, 9)
    return b"z" + packed if len(packed) < len(data) else b"-" + data


def _inflated(data: bytes) -> bytes:
    """Decompress up to a bound."""
    machine = zlib.decompressobj()
    inflated = machine.decompress(data, _MAX_INFLATED)
    if machine.unconsumed_tail or not machine.eof:
        raise Damaged("the offset map does not decompress")
    return inflated


def _text(data: bytes) -> str:
    return b64encode(data).decode()
