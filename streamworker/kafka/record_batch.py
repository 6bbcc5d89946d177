"""Encode records as a batch of Kafka's format v2 (KIP-98).

The deltas of a stream have one key and one set of headers, which are encoded once, in an `Envelope`. aiokafka's builder
encodes them again for each record, and compresses with LZ4 at level 9, which clears 256 KiB of memory for each batch.
"""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING

from aiokafka.codec import gzip_encode, lz4_encode, snappy_encode, zstd_encode
from aiokafka.record.util import calc_crc32c

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from streamworker.kafka.envelope import Entry
    from streamworker.model import Headers

__all__ = ["RecordBatch", "encode_headers", "encode_key", "encode_records", "varint"]

_LZ4_LEVEL = 1
"""At level 9 a batch of a few records takes five times as long and is a few per cent smaller."""

_MAGIC = 2
_HEAD = struct.Struct(">qiibI")  # base offset, length, leader epoch, magic, CRC of what follows
_REST = struct.Struct(">hiqqqhii")  # attributes, last offset delta, first and last timestamp, producer, count
_BYTES_BEFORE_REST = 9
"""Of those that the length counts: leader epoch, magic and CRC."""


def _lz4(data: bytes) -> bytes:
    return bytes(lz4_encode(data, level=_LZ4_LEVEL))


_CODECS: dict[str, tuple[int, Callable[[bytes], bytes]]] = {
    "none": (0, bytes),
    "gzip": (1, gzip_encode),
    "snappy": (2, snappy_encode),
    "lz4": (3, _lz4),
    "zstd": (4, zstd_encode),
}


class RecordBatch:
    """A batch for `AIOKafkaProducer.send_batch`. It stands in for aiokafka's `BatchBuilder`, whose methods it has.

    It is complete from the beginning: nothing can be added, and all records have the time of its creation.
    """

    def __init__(self, entries: Sequence[Entry], *, compression: str) -> None:
        self.compression = compression
        self._codec, compress = _CODECS[compression]
        self._records = compress(encode_records(entries))
        self._count = len(entries)
        self._ts = time.time_ns() // 1_000_000
        self._producer_state = (-1, -1, 0)

    def record_count(self) -> int:
        """Return the number of records."""
        return self._count

    def closed(self) -> bool:
        """Whether no record can be added any more."""
        return True

    def close(self) -> None:
        """Allow no more records: there is nothing to do."""

    def size(self) -> int:
        """Return the size of the encoded batch in bytes."""
        return _HEAD.size + _REST.size + len(self._records)

    # aiokafka calls these names.

    def _set_producer_state(self, producer_id: int, producer_epoch: int, base_sequence: int) -> None:
        self._producer_state = (producer_id, producer_epoch, base_sequence)

    def _build(self) -> bytes:
        ts, count = self._ts, self._count
        rest = _REST.pack(self._codec, count - 1, ts, ts, *self._producer_state, count) + self._records
        head = _HEAD.pack(0, _BYTES_BEFORE_REST + len(rest), -1, _MAGIC, calc_crc32c(rest))
        return head + rest


def encode_records(entries: Sequence[Entry]) -> bytes:
    """Return the records of a batch, without its head; their timestamps are that of the batch."""
    parts: list[bytes] = []
    for number, (envelope, value, _) in enumerate(entries):
        offset, key, headers = varint(number), envelope.encoded_key, envelope.encoded_headers
        length, data = (_NULL, b"") if value is None else (varint(len(value)), value)
        size = 2 + len(offset) + len(key) + len(length) + len(data) + len(headers)
        # Attributes and the distance to the batch's timestamp are zero.
        parts += (varint(size), b"\0\0", offset, key, length, data, headers)
    return b"".join(parts)


def encode_key(key: bytes | None) -> bytes:
    """Return a record's key with its length."""
    return _NULL if key is None else varint(len(key)) + key


def encode_headers(headers: Headers) -> bytes:
    """Return a record's headers with their number."""
    parts = [varint(len(headers))]
    for name, value in headers:
        encoded = name.encode()
        parts += (varint(len(encoded)), encoded, encode_key(value))
    return b"".join(parts)


def varint(number: int) -> bytes:
    """Encode a number from zero on as a zigzag varint, as record lengths are."""
    number <<= 1
    if number < 0x80:
        return bytes((number,))
    if number < 0x4000:
        return bytes((number & 0x7F | 0x80, number >> 7))
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


_NULL = b"\x01"
"""The length -1, of what is null."""
