"""The sink against a broker that refuses, fails or does not answer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka.errors import NotLeaderForPartitionError
from structlog.testing import capture_logs

from streamworker.errors import KafkaRefused, RecordTooLarge
from streamworker.kafka.sink import KafkaSink
from streamworker.model import ProducerRecord, TopicPartition
from streamworker.testing import MemorySink
from tests.turnable import quiet
from tests.unit.kafka.fakes import FakeBroker, settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamworker.kafka.envelope import SinkReceipt

LINGER_S = 1.0
AT = TopicPartition("events", 0)


@pytest.fixture
async def fake(monkeypatch: pytest.MonkeyPatch) -> FakeBroker:
    broker = FakeBroker()
    monkeypatch.setattr("streamworker.kafka.producer.new_producer", broker.new_producer)
    return broker


async def started(**over: str) -> KafkaSink:
    sink = KafkaSink(settings(**over).kafka, ["events"], linger_s=LINGER_S)
    await sink.start()
    return sink


def publish(sink: KafkaSink, *values: bytes, receipt: SinkReceipt | None = None) -> SinkReceipt:
    receipt = receipt or sink.receipt()
    for value in values:
        sink.publish(ProducerRecord(AT, b"key", value), receipt)
    return receipt


async def test_first_record_of_a_job_takes_the_waiting_ones_along_at_once(fake: FakeBroker) -> None:
    """The time to the first delta does not depend on the linger."""
    sink = await started()
    older = publish(sink, b"older-0")
    await quiet()
    publish(sink, b"older-1", receipt=older)  # waits for the linger
    await quiet()
    assert fake.values == [b"older-0"]

    publish(sink, b"new-0")
    await quiet()

    assert fake.batches == [[b"older-0"], [b"older-1", b"new-0"]]
    await sink.stop()


async def test_first_record_of_a_job_leaves_directly_after_the_batch_in_flight(fake: FakeBroker) -> None:
    """Also where its partition has a batch in flight when it is published."""
    sink = await started()
    fake.is_answering.clear()
    publish(sink, b"older-0")
    await quiet()
    publish(sink, b"new-0")
    fake.is_answering.set()
    await quiet()

    assert fake.batches == [[b"older-0"], [b"new-0"]]
    await sink.stop()


async def test_batch_that_is_refused_for_its_size_is_written_in_order_in_smaller_ones(
    fake: FakeBroker,
) -> None:
    """Only a record that does not fit alone is refused, which fails its own receipt only."""
    sink = await started()
    fake.max_batch_bytes = 10
    good, bad = sink.receipt(), sink.receipt()
    for number in range(8):
        publish(sink, b"good-%d" % number, receipt=good)
    publish(sink, b"x" * 11, receipt=bad)
    publish(sink, b"good-8", receipt=good)

    await good.settled()
    with pytest.raises(RecordTooLarge, match="refused a record of 14 bytes for events-0"):
        await bad.settled()

    assert fake.values == [b"good-%d" % number for number in range(9)]
    await sink.stop()


async def test_batch_that_failed_is_written_by_another_producer_and_the_old_one_is_closed(
    fake: FakeBroker,
) -> None:
    """aiokafka's producer has lost its place in the sequence (aiokafka #1017)."""
    sink = await started()
    fake.errors.append(NotLeaderForPartitionError())

    await publish(sink, b"one", b"two").settled()

    assert fake.values == [b"one", b"two"]
    await quiet()
    assert [producer.is_closed for producer in fake.producers] == [True, False]
    await sink.stop()


async def test_sink_without_room_has_room_again_at_the_low_watermark(fake: FakeBroker) -> None:
    """Closed at the limit, open at half of it."""
    limit = 1 << 20
    sink = await started(kafka__max_unacknowledged_bytes=str(limit))
    fake.is_answering.clear()
    receipt = publish(sink, *[b"x" * (limit // 8)] * 7)
    assert sink.has_room
    publish(sink, b"x" * (limit // 8), receipt=receipt)
    assert not sink.has_room
    waiting = asyncio.ensure_future(sink.room())
    await quiet()
    assert not waiting.done()

    fake.is_answering.set()
    await waiting

    assert sink.has_room
    assert sink.unacknowledged_bytes <= limit // 2
    await sink.stop()


async def test_series_publishes_records_of_one_key_in_order_with_those_of_others(fake: FakeBroker) -> None:
    """A record of a series is a record like others: its receipt counts it, and it hurries if it is a job's first."""
    sink = await started()
    receipt = sink.receipt()
    series = sink.series(AT, b"key", (("name", b"value"),), receipt)
    assert series.publish(b"one") == len(b"keynamevalueone")
    await quiet()
    assert fake.values == [b"one"]  # a first record does not wait for the linger
    assert receipt.pending == 0

    series.publish(b"two")
    publish(sink, b"three", receipt=receipt)
    assert series.publish(None) == len(b"keynamevalue")
    assert receipt.pending == 3
    await receipt.settled()

    assert fake.batches == [[b"one"], [b"two", b"three", None]]
    assert sink.unacknowledged_bytes == 0
    await sink.stop()


async def test_series_of_a_sink_without_room_counts_its_bytes(fake: FakeBroker) -> None:
    """`has_room` is false as soon as the limit is reached."""
    sink = await started(kafka__max_unacknowledged_bytes=str(1 << 20))
    fake.is_answering.clear()
    series = sink.series(AT, b"key", (), sink.receipt())
    series.publish(b"x" * (1 << 19))
    assert sink.has_room
    series.publish(b"x" * (1 << 19))

    assert not sink.has_room
    assert sink.unacknowledged_bytes == (1 << 20) + 2 * len(b"key")
    fake.is_answering.set()
    await sink.room()
    await sink.stop()


async def test_series_of_another_sinks_receipt_is_refused(fake: FakeBroker) -> None:
    """It would never be acknowledged."""
    sink = await started()
    with pytest.raises(AssertionError, match="another sink"):
        sink.series(AT, b"key", (), MemorySink().receipt())
    await sink.stop()


@pytest.mark.parametrize("compression", ["none", "zstd"])
async def test_batches_are_compressed_as_the_setting_says(fake: FakeBroker, compression: str) -> None:
    """The producer's own setting is for transactions."""
    sink = await started(kafka__compression=compression)
    await publish(sink, b"value").settled()

    assert fake.compressions == [compression]
    await sink.stop()


async def test_partition_for_an_unknown_topic_is_refused(fake: FakeBroker) -> None:
    """With the command that creates it."""
    fake.partitions = 0
    sink = await started()

    with pytest.raises(KafkaRefused, match="topic other does not exist: create it with"):
        sink.partition_for("other", b"key")
    await sink.stop()


async def crash(sink: KafkaSink, _: FakeBroker) -> None:
    """Let a sender end by a bug."""

    def acknowledged(*_: object) -> None:
        raise ZeroDivisionError

    sink.acknowledged = acknowledged  # type: ignore[method-assign, assignment]
    publish(sink, b"one")
    await quiet()
    assert isinstance(sink.crashed.exception(), ZeroDivisionError)


async def break_stop(_: KafkaSink, fake: FakeBroker) -> None:
    """Let the producer's own `stop` raise what its sender died of."""
    fake.producers[0].stop_error = RuntimeError("Unexpected error during batch delivery")


@pytest.mark.parametrize("harm", [crash, break_stop])
async def test_stop_after_a_crash_closes_the_producer_and_does_not_raise(
    fake: FakeBroker, harm: Callable[[Any, Any], Any]
) -> None:
    """An open producer would keep its connections and its tasks for ever."""
    sink = await started()
    await harm(sink, fake)

    await sink.stop()

    assert [producer.is_closed for producer in fake.producers] == [True]


async def test_broker_that_never_answers_does_not_hold_up_stop(fake: FakeBroker) -> None:
    """What is in flight after two seconds is given up."""
    sink = await started()
    fake.is_answering.clear()
    publish(sink, b"one")
    began = asyncio.get_running_loop().time()
    with capture_logs() as logs:
        await sink.stop()

    assert asyncio.get_running_loop().time() - began <= 2.1
    assert logs == []
