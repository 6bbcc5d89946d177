"""Batches that the package encodes itself, held to aiokafka's encoder and decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import encode_varint
from hypothesis import example, given
from hypothesis import strategies as st

from streamworker.kafka.envelope import Envelope, SinkReceipt
from streamworker.kafka.record_batch import RecordBatch, varint
from tests.unit.kafka.fakes import records_of

if TYPE_CHECKING:
    from streamworker.kafka.envelope import Entry
    from streamworker.model import Headers

NOW_MS = 1_700_000_000_123
CODECS = ("none", "gzip", "snappy", "lz4", "zstd")
BYTES = (
    st.binary(max_size=200) | st.binary(min_size=60, max_size=70) | st.binary(min_size=8190, max_size=8200)
)
HEADERS = st.lists(st.tuples(st.text(max_size=8), st.none() | BYTES), max_size=3).map(tuple)
RECORDS = st.lists(st.tuples(st.none() | BYTES, st.none() | BYTES, HEADERS), min_size=1, max_size=70)
Record = tuple[bytes | None, bytes | None, "Headers"]


def entries(records: list[Record]) -> list[Entry]:
    return [
        (envelope := Envelope(SinkReceipt(), key, headers), value, envelope.size + len(value or b""))
        for key, value, headers in records
    ]


def batch_of(records: list[Record], compression: str = "none") -> RecordBatch:
    with patch("time.time_ns", lambda: NOW_MS * 1_000_000 + 999_999):
        return RecordBatch(entries(records), compression=compression)


def built_by_aiokafka(records: list[Record], **state: int) -> bytes:
    builder = DefaultRecordBatchBuilder(
        2, 0, is_transactional=0, producer_id=-1, producer_epoch=-1, base_sequence=0, batch_size=1 << 30
    )
    for number, (key, value, headers) in enumerate(records):
        builder.append(number, NOW_MS, key, value, list(headers))
    if state:
        builder.set_producer_state(**state)
    return bytes(builder.build())


@given(RECORDS)
@example([(None, None, ())])
@example([(b"", b"", (("", None), ("é", b"")))])
@example([(b"k", b"v", ())] * 8193)
def test_batch_has_the_bytes_of_aiokafkas_encoder(records: list[Record]) -> None:
    """Keys, values and headers of any size, none among them, at every length of a varint."""
    batch = batch_of(records)

    assert batch._build() == built_by_aiokafka(records)
    assert batch.size() == len(batch._build())
    assert batch.record_count() == len(records)
    assert batch.closed()


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**15 - 1), st.integers(0, 2**31 - 1))
def test_batch_has_the_state_of_its_producer(producer_id: int, epoch: int, sequence: int) -> None:
    """The broker recognizes a repeated batch by it. A batch that is sent again is the same."""
    records: list[Record] = [(b"k", b"v", ())]
    batch = batch_of(records)
    batch._set_producer_state(producer_id, epoch, sequence)
    batch.close()

    expected = built_by_aiokafka(
        records, producer_id=producer_id, producer_epoch=epoch, base_sequence=sequence
    )
    assert [batch._build(), batch._build()] == [expected, expected]


@pytest.mark.parametrize("compression", CODECS)
def test_batch_of_every_codec_is_decoded(compression: str) -> None:
    """By a consumer, which checks the checksum; repetitive records become small."""
    headers = (("content-type", b"application/json"), ("none", None))
    records: list[Record] = [(b"key-%d" % number, b"value " * 40, headers) for number in range(300)]
    batch = batch_of(records, compression)

    decoded = [(record.key, record.value, tuple(record.headers)) for record in records_of(batch)]
    assert decoded == records
    assert {record.timestamp for record in records_of(batch)} == {NOW_MS}
    assert compression == "none" or batch.size() < 300 * 240 / 4


def test_lz4_level_is_the_fast_one() -> None:
    """aiokafka's default clears 256 KiB for each batch, which cost more than everything else about it."""
    with patch("streamworker.kafka.record_batch.lz4_encode", return_value=b"") as encode:
        batch_of([(b"k", b"v", ())], "lz4")

    assert encode.call_args.kwargs == {"level": 1}


@given(st.integers(0, 2**40) | st.sampled_from([0, 63, 64, 8191, 8192, 2**20 - 1, 2**20, 2**27]))
def test_varint_is_that_of_aiokafka(number: int) -> None:
    """At every length."""
    expected = bytearray()
    encode_varint(number, expected.append)

    assert varint(number) == bytes(expected)


def test_envelope_knows_the_size_of_key_and_headers() -> None:
    """In bytes, without framing, as limits are checked."""
    assert Envelope(SinkReceipt(), None, ()).size == 0
    assert Envelope(SinkReceipt(), b"key", (("name", b"value"), ("n", None))).size == 3 + 9 + 1
