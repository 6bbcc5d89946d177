"""Producers: bounded start and stop, and the replacement of one that has failed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka.errors import KafkaConnectionError, TopicAuthorizationFailedError
from structlog.testing import capture_logs

from streamworker.config import KafkaSettings
from streamworker.errors import KafkaRefused, KafkaUnavailable, RecordTooLarge
from streamworker.kafka.clients import (
    close_consumer,
    close_producer,
    new_consumer,
    new_producer,
    start_producer,
)
from streamworker.kafka.errors import translate_errors
from streamworker.kafka.producer import ReplaceableProducer
from streamworker.kafka.sink import publish
from tests.memory_kafka import MemoryProducer
from tests.turnable import quiet, until

if TYPE_CHECKING:
    from tests.memory_kafka import MemoryKafka

SETTINGS = KafkaSettings()


async def hang(*_: Any) -> None:
    """Stand in for a method that does not return."""
    await asyncio.get_running_loop().create_future()


# Starting and stopping


async def test_start_without_an_answer_names_the_brokers_that_cannot_be_reached(
    kafka: MemoryKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiokafka has no limit: it asks for a producer id until a broker answers."""
    monkeypatch.setattr(MemoryProducer, "start", hang)
    producer: Any = new_producer(SETTINGS)
    with pytest.raises(KafkaUnavailable) as hanging, translate_errors("connecting a producer"):
        await start_producer(producer, 5)
    assert str(hanging.value) == (
        "connecting a producer: no broker answered within 5 s: the brokers accept connections; check whether their processes "
        "hang or are stopped, and their logs"  # and no advice on TLS
    )

    producer._client.failures = {"b:9": ConnectionRefusedError("refused")}
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(KafkaConnectionError, match=r"no broker answered within 5 s \(b:9: refused\)"):
        await start_producer(producer, 5)
    assert loop.time() - began == pytest.approx(5)


@pytest.mark.parametrize("ends", [True, False], ids=["ends when abandoned", "hangs"])
async def test_stop_that_hangs_abandons_the_batches(
    kafka: MemoryKafka, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """An idempotent producer waits for its batches for ever. The connections are closed whatever happens."""
    loop = asyncio.get_running_loop()
    abandoned = loop.create_future()
    producer: Any = new_producer(SETTINGS)
    producer._message_accumulator.fail_all = abandoned.set_result

    async def stop() -> None:
        await (abandoned if ends else loop.create_future())

    monkeypatch.setattr(producer, "stop", stop)
    began = loop.time()
    await close_producer(producer, 2)

    assert abandoned.done()
    assert loop.time() - began == pytest.approx(2 if ends else 3)
    assert producer._client.is_closed is not ends


async def test_stop_that_fails_closes_the_connections(kafka: MemoryKafka) -> None:
    """aiokafka's `stop` raises the error of its sender before it closes anything."""
    kafka.errors["stop_producer"].append(KafkaConnectionError("the sender failed"))
    producer: Any = new_producer(SETTINGS)
    await close_producer(producer, 2)
    await close_producer(None, 2)

    assert producer._client.is_closed


async def test_cancelled_close_abandons_the_batches_all_the_same(
    kafka: MemoryKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed by its second signal writes nothing later."""
    abandoned: list[object] = []
    producer: Any = new_producer(SETTINGS)
    producer._message_accumulator.fail_all = abandoned.append
    monkeypatch.setattr(producer, "stop", hang)
    closing = asyncio.create_task(close_producer(producer, 1000))
    await quiet()
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing

    assert len(abandoned) == 1
    assert producer._client.is_closed


async def test_consumer_is_closed_in_bounded_time_and_a_bug_is_raised(
    kafka: MemoryKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of Kafka say nothing new at the end; any other error is a bug."""
    loop = asyncio.get_running_loop()
    consumer: Any = new_consumer(SETTINGS, group_id=None)
    kafka.errors["stop"].append(KafkaConnectionError("away"))
    await close_consumer(consumer, 2)
    kafka.errors["stop"].append(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        await close_consumer(consumer, 2)
    monkeypatch.setattr(consumer, "stop", hang)
    began = loop.time()
    await close_consumer(consumer, 2)

    assert loop.time() - began == pytest.approx(2)


# Replacing


async def replaceable(*topics: str) -> ReplaceableProducer:
    """Return a started producer for these topics."""
    producer = ReplaceableProducer(SETTINGS, topics)
    await producer.start()
    return producer


async def test_failed_producer_is_replaced_once_for_all_senders(kafka: MemoryKafka) -> None:
    """Each sender reports the failure of the same producer; the second one finds a new one."""
    producer = await replaceable("t")
    failed = producer.current
    with capture_logs() as logs:
        await asyncio.gather(*(producer.replace(failed) for _ in range(5)))
    await quiet()

    assert producer.current is not failed
    assert [one.is_closed for one in kafka.producers] == [True, False]
    assert [entry["event"] for entry in logs] == ["sink.producer_replaced"]
    await producer.stop()
    assert all(one.is_closed for one in kafka.producers)


async def test_failed_producer_is_closed_when_its_other_batches_are_written(
    kafka: MemoryKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that takes; at a stop it is closed at once."""
    written = asyncio.Event()
    producer = await replaceable()
    monkeypatch.setattr(producer.current, "flush", written.wait)
    await producer.replace(producer.current)
    await asyncio.sleep(100)
    assert not kafka.producers[0].is_closed
    written.set()
    await until(lambda: kafka.producers[0].is_closed)

    monkeypatch.setattr(producer.current, "flush", hang)
    await producer.replace(producer.current)
    await quiet()
    await producer.stop()
    assert [one.is_closed for one in kafka.producers] == [True, True, True]


async def test_replacement_that_fails_is_raised_and_tried_again(kafka: MemoryKafka) -> None:
    """The failed producer stays the current one until there is a new one; no connection is left open."""
    producer = await replaceable("t")
    failed = producer.current
    kafka.errors["start_producer"].append(KafkaConnectionError("away"))
    with pytest.raises(KafkaUnavailable, match="connecting a producer to localhost:9092: away"):
        await producer.replace(failed)
    assert producer.current is failed
    assert [one.is_closed for one in kafka.producers] == [False, True]

    await producer.replace(failed)
    assert producer.current is kafka.producers[2]  # type: ignore[comparison-overlap]
    await producer.stop()


async def test_partitions_that_the_metadata_lost_are_remembered(kafka: MemoryKafka) -> None:
    """A broker that has just started may not know its topics; an added partition is noticed."""
    producer = await replaceable("t")
    assert producer.partitions("t") == 2
    kafka.create("t", 5)
    assert producer.partitions("t") == 5
    logs = kafka.topics.pop("t")
    assert producer.partitions("t") == 5
    assert producer.partitions("absent") is None
    kafka.topics["t"] = logs
    await producer.stop()


async def test_required_topic_that_does_not_exist_is_refused(kafka: MemoryKafka) -> None:
    """At once, and without creating it."""
    producer = await replaceable()
    await producer.require("t")
    with pytest.raises(KafkaRefused, match="topic absent does not exist: create it with"):
        await producer.require("absent")
    kafka.errors["fetch_all_metadata"].append(TopicAuthorizationFailedError("t"))
    with pytest.raises(KafkaRefused, match="reading the partitions of topic t: "):
        await producer.require("t")

    assert set(kafka.topics) == {"t"}
    await producer.stop()


# Publishing from commands


async def test_publish_returns_when_every_entry_is_acknowledged(kafka: MemoryKafka) -> None:
    """The producer is closed, also where there is more than the sink holds at once."""
    entries = [(b"%d" % number, b"x" * 40_000) for number in range(50)]
    await publish(KafkaSettings(max_unacknowledged_bytes=1 << 20), "t", entries)

    assert sorted(record.key for record in kafka.records("t")) == sorted(key for key, _ in entries)
    assert [one.is_closed for one in kafka.producers] == [True]


async def test_publish_of_an_entry_that_is_too_large_is_raised(kafka: MemoryKafka) -> None:
    """The others are written; the producer is closed."""
    kafka.max_value_bytes = 100
    with pytest.raises(RecordTooLarge):
        await publish(SETTINGS, "t", [(b"a", b"x" * 101), (b"b", b"x" * 100)])
    with pytest.raises(KafkaRefused, match="topic absent does not exist"):
        await publish(SETTINGS, "absent", [(b"a", b"x")])

    assert [record.key for record in kafka.records("t")] == [b"b"]
    assert all(one.is_closed for one in kafka.producers)
