"""`ControlReader`: every cancellation is reported at least once, whatever else the topic holds."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from aiokafka.errors import KafkaConnectionError
from structlog.testing import capture_logs

from streamworker.kafka.control import ControlReader
from streamworker.wire.control import write_cancel
from tests.memory_kafka import OPEN
from tests.turnable import until
from tests.unit.kafka.fakes import settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.memory_kafka import MemoryKafka


class Reading:
    """A control reader, and the cancellations that it reported."""

    def __init__(self) -> None:
        self.cancelled: list[tuple[str, int, str]] = []
        self.error: Exception | None = None
        self.reader = ControlReader(settings(topics__control="t"), self._cancel)

    def _cancel(self, job_id: str, timestamp: int, reason: str) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self.cancelled.append((job_id, timestamp, reason))

    @property
    def jobs(self) -> set[str]:
        """The ids of the cancelled jobs."""
        return {job_id for job_id, _, _ in self.cancelled}


@pytest.fixture
async def reading(kafka: MemoryKafka) -> AsyncIterator[Reading]:
    """A reader of the topic, which has closed every consumer afterwards."""
    reading = Reading()
    yield reading
    await reading.reader.stop()
    assert all(consumer.is_stopped for consumer in kafka.consumers)


def cancel(kafka: MemoryKafka, job_id: str, *, timestamp: int = 5, state: str = "committed") -> None:
    """Write a cancellation to the partition of its job."""
    kafka.write(
        "t", write_cancel(job_id, "why"), key=job_id.encode(), headers=(), timestamp=timestamp, state=state
    )


async def test_cancellations_of_the_past_are_known_when_start_returns(
    kafka: MemoryKafka, reading: Reading
) -> None:
    """A worker that restarts must not run a job that was cancelled before."""
    for number in range(10):
        cancel(kafka, f"job-{number}", timestamp=number)
    await reading.reader.start()

    assert sorted(reading.cancelled) == [(f"job-{number}", number, "why") for number in range(10)]


async def test_cancellation_that_is_written_later_is_reported(kafka: MemoryKafka, reading: Reading) -> None:
    """In every partition, and also within a transaction that is still open: a cancellation does not wait."""
    await reading.reader.start()
    for number in range(5):
        cancel(kafka, f"job-{number}", state=OPEN)

    await until(lambda: len(reading.jobs) == 5)


@pytest.mark.parametrize("value", [None, b"", b"noise", b'{"type": "pause"}', b'{"type":"cancel"}', b"\xff"])
async def test_record_that_is_not_a_cancellation_is_logged_and_skipped(
    kafka: MemoryKafka, reading: Reading, value: bytes | None
) -> None:
    """The log names its place, and the cancellations after it are reported."""
    kafka.write("t", value, partition=1)
    cancel(kafka, "job")
    with capture_logs() as logs:
        await reading.reader.start()

    assert reading.jobs == {"job"}
    assert {entry["at"] for entry in logs if entry["event"] == "control.record_ignored"} == {"t-1-0"}


async def test_reader_reads_from_the_beginning_again_after_a_failure(
    kafka: MemoryKafka, reading: Reading
) -> None:
    """What was written meanwhile is reported; repeated cancellations do no harm."""
    cancel(kafka, "before")
    await reading.reader.start()
    kafka.errors["getmany"].append(KafkaConnectionError("away"))
    kafka.errors["start"].extend([KafkaConnectionError("away")] * 3)
    kafka.changed()
    with capture_logs() as logs:
        await until(lambda: not kafka.errors["start"])
        cancel(kafka, "meanwhile")
        await until(lambda: "meanwhile" in reading.jobs)

    assert {entry["event"] for entry in logs} == {"control.unavailable"}


async def test_worker_starts_though_the_control_topic_cannot_be_read(
    kafka: MemoryKafka, reading: Reading
) -> None:
    """The failure is logged; the cancellations are reported as soon as the topic can be read."""
    cancel(kafka, "job")
    kafka.errors["start"].append(KafkaConnectionError("away"))
    with capture_logs() as logs:
        await reading.reader.start()
    assert [entry["event"] for entry in logs] == ["control.unavailable"]
    assert reading.jobs == set()

    await until(lambda: reading.jobs == {"job"})


async def test_start_is_bounded_though_the_topic_does_not_end(
    kafka: MemoryKafka, reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seconds: a broker that does not answer keeps no worker from starting."""
    loop = asyncio.get_running_loop()

    async def hang(_: object) -> None:
        await loop.create_future()

    with monkeypatch.context() as patch:
        patch.setattr("tests.memory_kafka.MemoryConsumer.start", hang)
        began = loop.time()
        await reading.reader.start()
        assert 10 <= loop.time() - began < 11
        await reading.reader.stop()


async def test_bug_of_the_receiver_does_not_end_the_reading(kafka: MemoryKafka, reading: Reading) -> None:
    """The error is logged with its traceback, and the record is read again."""
    await reading.reader.start()
    reading.error = ZeroDivisionError("a bug")
    with capture_logs() as logs:
        cancel(kafka, "job")
        await until(lambda: reading.jobs == {"job"})

    [crash] = [entry for entry in logs if entry["event"] == "control.crashed"]
    assert crash["exc_info"]
