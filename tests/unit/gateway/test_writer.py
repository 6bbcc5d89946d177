"""The gateway's writer, with the real sink over a producer in memory."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from aiokafka.errors import MessageSizeTooLargeError

from streamworker.errors import KafkaRefused, RecordTooLarge
from streamworker.gateway.feeds import BrokerUnavailable
from streamworker.gateway.writer import KafkaWriter, NotAcknowledged
from tests.turnable import quiet
from tests.unit.kafka.fakes import FakeBroker, settings


@pytest.fixture
async def broker(monkeypatch: pytest.MonkeyPatch) -> FakeBroker:
    """Return the broker behind the writer's producer."""
    made = FakeBroker()
    topics = {"jobs": {0, 1}, "control": {0}}

    async def metadata(_: object) -> SimpleNamespace:
        return SimpleNamespace(partitions_for_topic=topics.get)

    monkeypatch.setattr("streamworker.kafka.producer.new_producer", made.new_producer)
    monkeypatch.setattr("streamworker.kafka.producer.fetch_all_metadata", metadata)
    return made


def writer(timeout_s: str = "5") -> KafkaWriter:
    """Return a writer to two topics."""
    loaded = settings(kafka__request_timeout_s=timeout_s)
    return KafkaWriter(loaded, ("jobs", "control"))


async def test_writer_that_has_not_started_writes_nothing(broker: FakeBroker) -> None:
    """A job that is submitted meanwhile is refused, and not kept."""
    one = writer()
    assert (one.is_ready, one.unacknowledged_bytes) == (False, 0)
    with pytest.raises(BrokerUnavailable, match="has not connected"):
        await one.write("jobs", b"k", b"v")

    assert broker.producers == []
    await one.stop()


async def test_write_returns_when_the_broker_has_acknowledged(broker: FakeBroker) -> None:
    """Until then its bytes are counted."""
    one = writer()
    await one.start()
    broker.is_answering.clear()
    writing = asyncio.create_task(one.write("jobs", b"k", b"value", (("h", b"1"),)))
    await quiet()
    assert not writing.done()
    assert one.unacknowledged_bytes > 0
    broker.is_answering.set()
    await writing

    assert (broker.values, one.unacknowledged_bytes, one.is_ready) == ([b"value"], 0, True)
    await one.stop()
    assert not one.is_ready
    assert broker.producers[0].is_closed


async def test_record_that_is_not_acknowledged_in_time_may_have_been_written(broker: FakeBroker) -> None:
    """The caller reports `submit_unknown`: a retry could be a second job."""
    one = writer("1")
    one._kafka = one._kafka.model_copy(update={"request_timeout_s": 0.02})
    await one.start()
    broker.is_answering.clear()
    with pytest.raises(NotAcknowledged, match=r"within 0\.02 s"):
        await one.write("jobs", b"k", b"late")
    broker.is_answering.set()
    await quiet()

    assert broker.values == [b"late"]
    await one.stop()


async def test_record_that_the_broker_refuses_for_its_size_raises(broker: FakeBroker) -> None:
    """And the next one is written."""
    one = writer()
    await one.start()
    broker.errors.append(MessageSizeTooLargeError())
    with pytest.raises(RecordTooLarge):
        await one.write("jobs", b"k", b"large")
    await one.write("jobs", b"k", b"small")

    assert broker.values == [b"small"]
    await one.stop()


async def test_writer_without_room_refuses_before_it_writes(broker: FakeBroker) -> None:
    """A broker that is away for long must not fill the memory."""
    one = writer()
    await one.start()
    assert one._sink is not None
    one._sink.has_room = False
    with pytest.raises(BrokerUnavailable, match="as many as may wait"):
        await one.write("jobs", b"k", b"v")

    assert broker.values == []
    await one.stop()


async def test_writer_whose_start_fails_closes_its_producer(
    broker: FakeBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is started again, and would leave a connection behind each time."""
    one = writer()

    async def refuse(_: object, topic: str) -> None:
        if topic == "control":
            raise KafkaRefused("topic control does not exist")

    monkeypatch.setattr("streamworker.gateway.writer.KafkaSink.require", refuse)
    with pytest.raises(KafkaRefused, match="topic control"):
        await one.start()

    assert not one.is_ready
    assert [producer.is_closed for producer in broker.producers] == [True]
