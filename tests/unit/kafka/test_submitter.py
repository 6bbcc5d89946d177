"""Submitting jobs of a batch: offsets, transactions, fencing, and what a failure leaves."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka.errors import KafkaConnectionError, MessageSizeTooLargeError

from streamworker.config import KafkaSettings
from streamworker.errors import Fenced, KafkaUnavailable, RecordTooLarge
from streamworker.kafka.partitioner import partition_of
from streamworker.kafka.submitter import PlainSubmitter, TransactionalSubmitter
from streamworker.kafka.transactions import TRANSACTION_TIMEOUT_S
from tests.memory_kafka import COMMITTED, MARKER, OPEN

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.memory_kafka import MemoryKafka

SETTINGS = KafkaSettings()
LINES = [(f"line {number}".encode(), f"job {number}".encode()) for number in range(20)]


def plain() -> PlainSubmitter:
    return PlainSubmitter(SETTINGS, "t", 2)


def transactional(run: str = "run") -> TransactionalSubmitter:
    return TransactionalSubmitter(SETTINGS, "t", 2, run)


KINDS = pytest.mark.parametrize("new", [plain, transactional], ids=["plain", "transactional"])


@KINDS
async def test_submitted_lines_are_in_their_keys_partitions(
    kafka: MemoryKafka, new: Callable[[], PlainSubmitter]
) -> None:
    """The result is the offset after the last record of each partition: where the next chunk of the run begins."""
    submitter = new()
    await submitter.open()
    first, second = await submitter.submit(LINES[:12]), await submitter.submit(LINES[12:])
    await submitter.close()

    records = {(one.key, one.value): one for one in kafka.records("t")}
    assert {line: one.partition for line, one in records.items()} == {
        line: partition_of(line[0], 2) for line in LINES
    }
    for chunk, ends in ((LINES[:12], first), (LINES[12:], second)):
        last = {records[line].partition: records[line].offset for line in chunk}
        assert ends == {partition: offset + 1 for partition, offset in last.items()}


async def test_chunk_is_committed_as_a_whole(kafka: MemoryKafka) -> None:
    """A reader of committed records sees all lines of a chunk or none; a failed chunk stays open."""
    submitter = transactional()
    await submitter.open()
    await submitter.submit(LINES[:1])
    kafka.errors["commit_transaction"].append(KafkaConnectionError("lost"))
    with pytest.raises(KafkaUnavailable, match="writing to t: lost"):
        await submitter.submit(LINES[:1])

    assert kafka.log("t", partition_of(LINES[0][0], 2)).states == [COMMITTED, MARKER, OPEN]
    await submitter.close()


async def test_open_fences_the_other_process_of_a_run(kafka: MemoryKafka) -> None:
    """The former one can write nothing more; a process of another run is not concerned."""
    former, latter, other = transactional(), transactional(), transactional("another run")
    for submitter in (former, other, latter):
        await submitter.open()
    with pytest.raises(Fenced, match="writing to t"):
        await former.submit(LINES)

    await latter.submit(LINES)
    await other.submit(LINES)
    assert len(kafka.records("t")) == 2 * len(LINES)
    for submitter in (former, other, latter):
        await submitter.close()


@KINDS
async def test_submitter_that_is_not_open_writes_nothing(
    kafka: MemoryKafka, new: Callable[[], PlainSubmitter]
) -> None:
    """Neither before `open` nor after `close`."""
    submitter = new()
    for _ in range(2):
        with pytest.raises(KafkaUnavailable, match="the producer of t is not open"):
            await submitter.submit(LINES)
        await submitter.open()
        await submitter.close()
    await submitter.close()

    assert kafka.records("t") == []


@KINDS
async def test_open_again_replaces_the_producer(
    kafka: MemoryKafka, new: Callable[[], PlainSubmitter]
) -> None:
    """As after each failure: the former producer is closed before the new one is started."""
    submitter = new()
    for _ in range(3):
        await submitter.open()
    await submitter.submit(LINES)

    assert [producer.is_closed for producer in kafka.producers] == [True, True, False]
    await submitter.close()


async def test_open_that_fails_closes_its_producer_and_names_its_purpose(kafka: MemoryKafka) -> None:
    """A user of two terminals must learn that the run is fenced, and where."""
    kafka.errors["start_producer"].append(KafkaConnectionError("no route"))
    with pytest.raises(
        KafkaUnavailable,
        match=r"fencing other runs \(transactional id run\) at localhost:9092: no route",
    ):
        await transactional().open()

    assert [producer.is_closed for producer in kafka.producers] == [True]


@pytest.mark.parametrize(
    ("error", "expected"),
    [(MessageSizeTooLargeError(), RecordTooLarge), (KafkaConnectionError("away"), KafkaUnavailable)],
    ids=["too large", "away"],
)
async def test_record_that_is_refused_fails_its_chunk(
    kafka: MemoryKafka, error: Exception, expected: type[Exception]
) -> None:
    """Whatever the other records of the chunk became, also if several were refused: no future is left unread."""
    submitter = transactional()
    await submitter.open()
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    kafka.errors["acknowledgement"].extend([error, error])
    with pytest.raises(expected, match="writing to t"):
        await submitter.submit(LINES)
    gc.collect()

    assert reported == []
    assert kafka.records("t") == []
    await submitter.close()


async def test_chunk_that_is_not_acknowledged_is_given_up(
    kafka: MemoryKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After twice the request timeout; aiokafka's idempotent producer would wait for ever."""
    submitter = plain()
    await submitter.open()
    loop = asyncio.get_running_loop()
    sent: list[asyncio.Future[Any]] = []

    async def send(*_: Any, **__: Any) -> asyncio.Future[Any]:
        sent.append(loop.create_future())
        return sent[-1]

    monkeypatch.setattr(kafka.producers[0], "send", send)
    began = loop.time()
    with pytest.raises(KafkaUnavailable, match="writing to t"):
        await submitter.submit(LINES)
    await submitter.close()

    limit_s = SETTINGS.request_timeout_s * 2
    assert limit_s <= loop.time() - began < limit_s + 1
    assert len(sent) == len(LINES)
    assert all(future.cancelled() for future in sent)


async def test_transaction_that_cannot_begin_is_a_kafka_error(
    kafka: MemoryKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiokafka checks the state of a producer by `assert`."""
    submitter = transactional()
    await submitter.open()

    async def begin() -> None:
        raise AssertionError("Invalid state transition")

    monkeypatch.setattr(kafka.producers[0], "begin_transaction", begin)
    with pytest.raises(KafkaUnavailable, match="cannot begin a transaction: Invalid state transition"):
        await submitter.submit(LINES)
    await submitter.close()


async def test_producers_are_idempotent_and_bounded_in_time(kafka: MemoryKafka) -> None:
    """An abandoned transaction blocks the readers for its timeout, which is short."""
    for submitter in (plain(), transactional()):
        await submitter.open()
        await submitter.close()
    first, second = (producer.arguments for producer in kafka.producers)

    assert first["enable_idempotence"] is second["enable_idempotence"] is True
    assert "transactional_id" not in first
    assert second["transactional_id"] == "run"
    assert second["transaction_timeout_ms"] == TRANSACTION_TIMEOUT_S * 1000
