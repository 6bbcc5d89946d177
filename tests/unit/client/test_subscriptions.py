"""Subscriptions and awaited results: distribution, bounds and replays, on a topic in memory."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from streamworker.client import results, subscriptions
from streamworker.client.errors import Lagged
from streamworker.client.results import TopicResults
from streamworker.client.subscriptions import TopicSubscriptions
from streamworker.config import KafkaSettings
from streamworker.errors import KafkaUnavailable
from streamworker.handover import Kind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from streamworker.client.subscriptions import Subscription

LIMIT = 4000


class Topic:
    """A topic with one partition, its tails, and its scanner."""

    def __init__(self) -> None:
        self.records: list[Any] = []
        self.tails: list[Tail] = []
        self.error: Exception | None = None
        self.scanning = asyncio.Event()
        self.scanning.set()
        self.scans: list[tuple[int, int, bool]] = []

    def write(self, value: bytes | None, key: bytes = b"j") -> None:
        """Append a record."""
        self.records.append(SimpleNamespace(offset=len(self.records), key=key, value=value))

    def event(self, kind: str, seq: int, key: bytes = b"j", **members: Any) -> None:
        """Append an event."""
        self.write(json.dumps({"type": kind, "attempt": "a", "seq": seq, **members}).encode(), key)

    def read(self) -> None:
        """Let both tails read to the end."""
        for tail in self.tails:
            tail.read()

    def new_tail(self, _: object, __: str, on_records: Any, *, committed_only: bool) -> Tail:
        """Stand in for `TopicTail`."""
        self.tails.append(Tail(self, on_records))
        return self.tails[-1]

    async def offset_at(self, _: object, since_ms: int) -> int:
        """Take times for offsets."""
        return since_ms

    async def scan(
        self, _: object, start: int, stop: int, *, committed_only: bool
    ) -> AsyncIterator[list[Any]]:
        """Yield the records three by three."""
        self.scans.append((start, stop, committed_only))
        await self.scanning.wait()
        if self.error is not None:
            raise self.error
        for at in range(start, stop, 3):
            yield self.records[at : min(at + 3, stop)]


class Tail:
    """A tail that reads when the test says so."""

    def __init__(self, topic: Topic, on_records: Any) -> None:
        self.topic = topic
        self.positions: dict[int, int] = {}
        self.crashed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_records = on_records

    async def start(self) -> None:
        self.positions = {0: len(self.topic.records)}

    async def stop(self) -> None: ...

    def read(self) -> None:
        """Return what is new."""
        records = self.topic.records[self.positions[0] :]
        self.positions[0] = len(self.topic.records)
        self._on_records(0, records, self.positions[0])


@pytest.fixture
def topic(monkeypatch: pytest.MonkeyPatch) -> Topic:
    """The only topic."""
    topic = Topic()
    monkeypatch.setattr(subscriptions, "TopicTail", topic.new_tail)
    monkeypatch.setattr(results, "TopicTail", topic.new_tail)
    return topic


@pytest.fixture
async def readers(topic: Topic) -> AsyncIterator[TopicSubscriptions]:
    """The subscriptions to it."""
    readers = TopicSubscriptions(KafkaSettings(), "t", topic)  # type: ignore[arg-type]
    await readers.start()
    yield readers
    await readers.stop()


async def kinds(subscription: Subscription) -> list[Kind]:
    """Take every event to the end."""
    found = []
    async with asyncio.timeout(5):
        while (delivery := await subscription.next()) is not None:
            found.append(delivery.kind)
    return found


def whole_job(topic: Topic, key: bytes = b"j", deltas: int = 1) -> None:
    """Write a job from its beginning to its end."""
    topic.event("started", 0, key)
    for seq in range(1, deltas + 1):
        topic.event("delta", seq, key, delta={"content": "x" * 100})
    topic.event("usage", deltas + 1, key, status="completed")


async def test_subscription_gets_its_jobs_events_only(topic: Topic, readers: TopicSubscriptions) -> None:
    """Two subscribers of one job get the same; records of other jobs and noise are not theirs."""
    first, second = readers.subscribe("j", LIMIT), readers.subscribe("j", LIMIT)
    waiting = asyncio.create_task(kinds(first))
    await asyncio.sleep(0)
    topic.write(b"noise")
    topic.write(None)
    whole_job(topic, b"other")
    whole_job(topic)
    topic.read()

    assert await waiting == await kinds(second) == [Kind.STARTED, Kind.DELTA, Kind.ENDED]


async def test_subscription_over_its_limit_lags_and_its_neighbour_does_not(
    topic: Topic, readers: TopicSubscriptions
) -> None:
    """What was queued is dropped; nothing is queued afterwards."""
    small, large = readers.subscribe("j", LIMIT), readers.subscribe("j", 100 * LIMIT)
    whole_job(topic, deltas=20)
    topic.read()

    with pytest.raises(Lagged, match="job j was more than 4000 bytes behind"):
        await small.next()
    assert small.is_dropped
    assert small.handover.queued_bytes == 0
    assert (await kinds(large))[-1] is Kind.ENDED


async def test_subscription_that_joins_late_gets_the_log_and_then_the_live_records(
    topic: Topic, readers: TopicSubscriptions
) -> None:
    """The scan ends where the tails were; what they read meanwhile follows."""
    topic.event("started", 0)
    topic.event("delta", 1)
    topic.read()
    topic.scanning.clear()
    late = await readers.subscribe_late("j", LIMIT, since_ms=0)
    topic.event("delta", 2)
    topic.event("usage", 3, status="completed")
    topic.read()
    topic.scanning.set()

    assert await kinds(late) == [Kind.STARTED, Kind.DELTA, Kind.DELTA, Kind.ENDED]
    assert topic.scans == [(0, 2, True)]


async def test_subscription_late_at_a_completed_job_reads_no_further(
    topic: Topic, readers: TopicSubscriptions
) -> None:
    """The rest of the log is not scanned."""
    whole_job(topic)
    for _ in range(100):
        topic.write(b"{}", b"other")
    topic.read()
    fetched: list[int] = []
    scan = topic.scan

    async def counted(*arguments: Any, **rest: Any) -> AsyncIterator[list[Any]]:
        async for records in scan(*arguments, **rest):
            fetched.extend(record.offset for record in records)
            yield records

    topic.scan = counted  # type: ignore[method-assign]

    assert await kinds(await readers.subscribe_late("j", LIMIT, offset=0)) == [
        Kind.STARTED,
        Kind.DELTA,
        Kind.ENDED,
    ]
    assert fetched == [0, 1, 2]


async def test_subscription_replay_waits_for_a_slow_subscriber_outside_of_the_scan(
    topic: Topic, readers: TopicSubscriptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each scan continues at the record after the last one that was queued, whatever part of a batch that is."""
    monkeypatch.setattr(subscriptions, "REPLAY_BYTES", 700)
    monkeypatch.setattr(subscriptions, "_ROOM_S", 0.001)
    whole_job(topic, deltas=12)
    topic.read()
    late = await readers.subscribe_late("j", LIMIT, offset=0)
    found = []
    while (delivery := await late.next()) is not None:
        found.append(delivery.offset)
        await asyncio.sleep(0.005)

    assert found == list(range(14))
    assert len(topic.scans) > 2


async def test_subscription_whose_replay_fails_raises_the_error(
    topic: Topic, readers: TopicSubscriptions
) -> None:
    """Instead of waiting for ever."""
    topic.write(b"{}")
    topic.read()
    topic.error = KafkaUnavailable("away")
    late = await readers.subscribe_late("j", LIMIT, offset=0)

    with pytest.raises(KafkaUnavailable, match="away"):
        await late.next()


async def test_subscriptions_fail_when_a_reader_crashes(topic: Topic, readers: TopicSubscriptions) -> None:
    """A bug must not look like a job without events."""
    subscription = readers.subscribe("j", LIMIT)
    topic.tails[1].crashed.set_exception(ZeroDivisionError())

    with pytest.raises(ZeroDivisionError):
        await subscription.next()


async def test_subscription_that_ended_is_forgotten(topic: Topic, readers: TopicSubscriptions) -> None:
    """Also one whose replay runs; a second call does nothing."""
    topic.write(b"{}")
    topic.read()
    topic.scanning.clear()
    late = await readers.subscribe_late("j", LIMIT, offset=0)
    live = readers.subscribe("j", LIMIT)
    for subscription in (late, live, live):
        readers.unsubscribe(subscription)
    whole_job(topic)
    topic.read()

    assert readers._by_key == {}
    assert not any(readers._waiting.values())
    assert live.take() is None


# Results


def result(job_id: str, status: str = "completed", padding: int = 0) -> bytes:
    """Return a result record's value."""
    members: dict[str, Any] = {
        "v": 1,
        "job_id": job_id,
        "attempt": "a",
        "seq": 2,
        "type": "result",
        "ts": 1,
        "status": status,
        "usage": None,
        "usage_source": "none",
        "error": None,
        "metadata": {},
        "completion": {"choices": [{"message": {"content": "x" * padding}}]},
        "omitted": ["logprobs"],
    }
    return json.dumps(members).encode()


@pytest.fixture
async def found(topic: Topic) -> AsyncIterator[TopicResults]:
    """The results topic."""
    found = TopicResults(KafkaSettings(), "t", topic)  # type: ignore[arg-type]
    await found.start()
    yield found
    await found.stop()


@pytest.mark.parametrize("padding", [3, 100_000])
async def test_results_returns_the_result_of_an_expected_job(
    topic: Topic, found: TopicResults, padding: int
) -> None:
    """A large one is not kept; it is read again from its offset."""
    awaited = found.expect("j")
    topic.write(result("other"), b"other")
    topic.write(result("j", padding=padding))
    topic.read()
    read = await found.read(awaited)

    assert (read.job_id, read.status, len(read.text), read.omitted) == (
        "j",
        "completed",
        padding,
        ("logprobs",),
    )
    assert topic.scans == ([] if padding == 3 else [(1, 2, True)])


async def test_results_of_a_job_that_ended_before_are_found_and_the_last_one_counts(
    topic: Topic, found: TopicResults
) -> None:
    """The job was run again."""
    topic.write(result("j", "failed"))
    topic.write(None)
    topic.write(result("j", "cancelled"))
    topic.read()

    assert (await found.read(await found.find("j", 0))).status == "cancelled"


async def test_results_that_are_not_wanted_any_more_are_forgotten(topic: Topic, found: TopicResults) -> None:
    """One of two, then the other."""
    first, second = found.expect("j"), found.expect("j")
    found.forget(first)
    topic.write(result("j"))
    topic.read()
    assert (first.offset, second.offset) == (None, 0)
    found.forget(second)
    found.forget(second)

    assert found._by_key == {}
