"""The whole worker over ports in memory: assignments, jobs, drains."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from streamworker.errors import InstanceFenced, KafkaUnavailable, UpstreamError
from streamworker.model import Advice, CommitPoint, ErrorCode, JobError, TopicPartition
from streamworker.progress.offset_map import FULL, LIMIT, OffsetMap, decode_map, encode_map
from streamworker.testing import (
    MemoryClock,
    MemoryCommitStores,
    MemoryObserver,
    MemorySink,
    MemorySource,
    MemoryUpstream,
    Script,
    Step,
)
from streamworker.wire.job import read_job
from streamworker.worker.committer import STALLED_S
from streamworker.worker.stats import WorkerStats
from streamworker.worker.worker import Worker, WorkerLimits
from tests.turnable import quiet, run, until
from tests.unit.worker.bench import (
    JOBS,
    OTHER,
    events,
    job,
    make_intake,
    make_policy,
    make_queues,
    make_tools,
    read,
    said,
    summary,
    word,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable


FOREVER = asyncio.Event  # a step that never comes


class Bench:
    """A worker, and the world around it."""

    def __init__(self, *scripts: Script | Iterable[Step], **limits: Any) -> None:
        self.source = MemorySource()
        self.broker = MemoryCommitStores()
        self.sink = MemorySink()
        self.observer = MemoryObserver()
        self.upstream = MemoryUpstream(*(scripts or [said("a")]))
        self.clock = MemoryClock()
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.policy: dict[str, Any] = {"max_streams": 1000}
        self.others: dict[str, MemoryUpstream] = {}
        self.worker = self.new_worker(**limits)
        self.task: asyncio.Task[None] | None = None

    def new_worker(self, **limits: Any) -> Worker:
        given: dict[str, Any] = {"max_in_flight": 10, "drain_timeout_s": 100} | limits
        rules = {"max_deliveries": given.pop("max_deliveries", 3), "fair_by": given.pop("fair_by", "")}
        policies = {"default": make_policy(self.upstream, **self.policy)}
        for name, upstream in self.others.items():
            policies[name] = make_policy(upstream, name=name, models=())
        self.queues = make_queues(self.observer, policies, max_in_flight=given["max_in_flight"])
        return Worker(
            source=self.source,
            commit_stores=self.broker,
            intake=make_intake(self.sink, self.clock, policies, **rules),
            tools=make_tools(self.sink, self.clock, self.observer, self.queues),
            limits=WorkerLimits(**given),
            failure=self.failure,
        )

    async def start(self, *partitions: TopicPartition) -> None:
        await self.source.start(self.worker)
        self.task = asyncio.create_task(self.worker.run())
        if partitions:
            self.source.assign(*partitions)
            await self.opened(*partitions)

    async def opened(self, *partitions: TopicPartition) -> None:
        await until(lambda: self.worker.readiness()[0] and self.source.positions.keys() >= {*partitions})

    async def stop(self) -> None:
        """Go at once, as a second signal does."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        self.failure.cancel()

    async def drained(self) -> None:
        assert self.task is not None
        self.worker.drain()
        await self.task

    async def ended(self, count: int) -> None:
        """Wait for `count` terminal events."""
        await until(lambda: self.types()["usage"] >= count)

    def types(self) -> Counter[str]:
        return Counter(line.split()[0] for line in summary(self.broker.records()))

    def ends(self) -> dict[str, str]:
        """Return the status of every job that has ended; one terminal event each."""
        ends = [event for event in self.written() if event["type"] == "usage"]
        assert len({event["job_id"] for event in ends}) == len(ends)
        return {event["job_id"]: event["status"] for event in ends}

    def written(self) -> list[dict[str, Any]]:
        return events(record for record in self.broker.records() if record.topic_partition.topic != "dlq")

    def deliveries(self, partition: TopicPartition = JOBS) -> dict[int, int]:
        return dict(decode_map(*self.broker.points[partition]).deliveries)


@pytest.fixture
async def benches() -> AsyncIterator[list[Bench]]:
    """Benches that are stopped in the end."""
    made: list[Bench] = []
    yield made
    for bench in made:
        await bench.stop()


@pytest.fixture
def make(benches: list[Bench]) -> Any:
    def make(*scripts: Any, **limits: Any) -> Bench:
        benches.append(Bench(*scripts, **limits))
        return benches[-1]

    return make


async def test_worker_runs_jobs_of_its_partitions_to_their_ends(make: Any) -> None:
    """Every job has one `started` and one terminal event, and its offset is committed."""
    bench: Bench = make()
    for number in range(3):
        bench.source.put(JOBS, job(f"j{number}"))
        bench.source.put(OTHER, job(f"o{number}"))
    await bench.start(JOBS, OTHER)
    await bench.ended(6)

    assert set(bench.ends().values()) == {"completed"}
    assert len(bench.ends()) == 6
    assert bench.types() == {"started": 6, "usage": 6}
    assert [bench.broker.points[at].offset for at in (JOBS, OTHER)] == [3, 3]


async def test_worker_begins_where_the_partition_is_committed(make: Any) -> None:
    """A partition that is assigned again is read from its committed offset."""
    bench: Bench = make()
    for number in range(4):
        bench.source.put(JOBS, job(f"j{number}"))
    await bench.start(JOBS)
    await bench.ended(4)
    bench.source.put(JOBS, job("j4"))
    bench.source.assign()
    bench.source.assign(JOBS)
    await bench.ended(5)

    assert bench.upstream.calls[4].is_drained
    assert len(bench.upstream.calls) == 5


async def test_worker_before_a_partition_is_open_reads_nothing_of_it(make: Any) -> None:
    """The worker is not ready meanwhile."""
    bench: Bench = make()
    bench.source.put(JOBS, job("j"))
    bench.broker.opening.clear()
    await bench.start()
    bench.source.assign(JOBS)
    await asyncio.sleep(100)
    ready, details = bench.worker.readiness()
    assert not ready
    assert details["partitions_opening"] == ["jobs-0"]
    assert all(asked == frozenset() for asked, _ in bench.source.asked)
    bench.broker.opening.set()
    await bench.ended(1)

    assert bench.worker.readiness()[0]


async def test_worker_max_in_flight_is_respected(make: Any) -> None:
    """The bound holds over all partitions; a job begins when another one ends."""
    gate = asyncio.Event()
    bench: Bench = make([gate, *said("a")], max_in_flight=3)
    for number in range(8):
        bench.source.put(JOBS, job(f"j{number}"))
        bench.source.put(OTHER, job(f"o{number}"))
    await bench.start(JOBS, OTHER)
    await asyncio.sleep(50)
    assert bench.upstream.open_calls == 3
    assert len(bench.upstream.calls) == 3
    assert sum(bench.source.positions.values()) == 3  # what another worker has room for is left to it
    gate.set()
    await bench.ended(16)

    assert all(limit <= 3 for _, limit in bench.source.asked)


async def test_worker_job_whose_end_is_not_durable_is_in_flight(make: Any) -> None:
    """A crash would repeat its paid call, so such jobs must not pile up before a slow broker."""
    gate = asyncio.Event()
    bench: Bench = make([gate, *said("a")], max_in_flight=2)
    for number in range(6):
        bench.source.put(JOBS, job(f"j{number}"))
    await bench.start(JOBS)
    await asyncio.sleep(1)
    bench.broker.committing.clear()
    gate.set()
    await asyncio.sleep(50)
    assert bench.upstream.open_calls == 0
    assert len(bench.upstream.calls) == 2
    bench.broker.committing.set()
    await bench.ended(6)


async def test_worker_job_between_two_tries_is_not_in_flight(make: Any) -> None:
    """Another job uses its slot."""
    busy = JobError(ErrorCode.UPSTREAM_UNAVAILABLE, "busy", 503, retriable=True)
    late = Script([], before=[UpstreamError(busy, Advice(after_s=60))])
    bench: Bench = make(late, said("a"), max_in_flight=1)
    bench.policy["max_tries"] = 2
    bench.worker = bench.new_worker(max_in_flight=1)
    bench.source.put(JOBS, job("late"))
    bench.source.put(JOBS, job("next"))
    await bench.start(JOBS)
    await bench.ended(1)
    assert bench.ends() == {"next": "completed"}
    await bench.ended(2)

    assert bench.ends()["late"] == "completed"


async def test_worker_at_its_limit_goes_on_polling(make: Any) -> None:
    """Errors of the group must be seen, however long the jobs are."""
    bench: Bench = make([FOREVER()], max_in_flight=1)
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS)
    await until(lambda: bench.upstream.open_calls == 1)
    before = len(bench.source.asked)
    await asyncio.sleep(10)

    asked = bench.source.asked[before:]
    assert len(asked) >= 30
    assert all(partitions == frozenset() for partitions, _ in asked)


async def test_worker_broker_that_is_unavailable_is_polled_again(make: Any) -> None:
    """Fetching goes on when the broker is back."""
    bench: Bench = make()
    await bench.start(JOBS)
    bench.source.errors.extend([KafkaUnavailable("gone")] * 3)
    with capture_logs() as logs:
        await until(lambda: not bench.source.errors)
        bench.source.put(JOBS, job("j"))
        await bench.ended(1)

    assert [entry["event"] for entry in logs].count("kafka.unavailable") == 3
    assert bench.observer.all("kafka_failed") == [("poll",)] * 3


async def test_worker_that_is_fenced_by_its_instance_id_ends_and_polls_no_more(make: Any) -> None:
    """To poll on would join again, and fence the other process in turn."""
    bench: Bench = make([word("a"), FOREVER()])
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS)
    await until(lambda: bench.upstream.open_calls == 1)
    bench.source.errors.extend([InstanceFenced("the id is pod-0"), KafkaUnavailable("polled again")])
    assert bench.task is not None
    with pytest.raises(InstanceFenced, match="pod-0"):
        await bench.task

    assert len(bench.source.errors) == 1
    assert bench.upstream.open_calls == 0


async def test_worker_whose_commits_fail_is_not_ready_and_accepts_no_jobs(make: Any) -> None:
    """Their calls would be paid and could not be recorded. It goes on when commits succeed again."""
    bench: Bench = make()
    await bench.start(JOBS)
    bench.broker.committing.clear()
    bench.source.put(JOBS, job("first"))
    await asyncio.sleep(STALLED_S + 1)
    bench.source.put(JOBS, job("second"))
    await asyncio.sleep(10)
    is_ready, details = bench.worker.readiness()

    assert not is_ready
    assert (details["commits_failing"], details["jobs_open"]) == (["jobs-0"], 1)
    assert len(bench.upstream.calls) == 1
    bench.broker.committing.set()
    await bench.ended(2)
    assert bench.worker.readiness()[0]


async def test_worker_broker_that_is_unavailable_for_long_leaves_it_live(make: Any) -> None:
    """The poll loop turns: a restart would end every stream, and would not bring the broker back."""
    bench: Bench = make()
    await bench.start(JOBS)
    bench.source.errors.extend([KafkaUnavailable("gone")] * 100)
    await until(lambda: len(bench.source.errors) < 50)
    bench.clock.turn(600)
    await until(lambda: len(bench.source.errors) < 40)

    assert bench.worker.stats().poll_age_s < 2


async def test_worker_after_a_long_outage_confirms_its_membership_first(make: Any) -> None:
    """Its session may have ended meanwhile, although the poll loop turned."""
    bench: Bench = make()
    await bench.start(JOBS)
    bench.source.errors.extend([KafkaUnavailable("gone")] * 10)
    await until(lambda: len(bench.source.errors) < 5)
    bench.clock.turn(600)
    asked: list[int] = []

    async def confirm_membership() -> bool:
        asked.append(len(bench.upstream.calls))
        return True

    bench.source.confirm_membership = confirm_membership  # type: ignore[method-assign]
    bench.source.put(JOBS, job("j"))
    await bench.ended(1)

    assert asked == [0]


async def test_worker_tombstone_is_skipped_and_its_offset_committed(make: Any) -> None:
    """A record without a value is neither a job nor a fault."""
    bench: Bench = make()
    bench.source.put(JOBS, None)
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS)
    await until(lambda: bench.broker.points.get(JOBS, (0,))[0] == 2)

    assert bench.ends() == {"j": "completed"}
    assert bench.observer.all("tombstone_skipped") == [(JOBS,)]


async def test_worker_rejected_record_gets_a_dead_letter_and_a_terminal_event(make: Any) -> None:
    """An invalid record does not delay the jobs behind it."""
    bench: Bench = make()
    bench.source.put(JOBS, b"nonsense")
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS)
    await bench.ended(2)

    assert bench.ends() == {"jobs-0-0": "rejected", "j": "completed"}
    assert bench.types() == {"letter": 1, "started": 1, "usage": 2}
    (letter,) = [record for record in bench.broker.records() if record.topic_partition.topic == "dlq"]
    assert letter.value == b"nonsense"
    terminal = next(event for event in bench.written() if event["job_id"] == "jobs-0-0")
    assert terminal["seq"] == 0
    assert len(bench.observer.all("job_rejected")) == 1


async def test_worker_rejected_record_is_committed_with_its_letter(make: Any) -> None:
    """Its offset is in no earlier commit."""
    bench: Bench = make()
    bench.broker.committing.clear()
    bench.source.put(JOBS, b"nonsense")
    await bench.start(JOBS)
    await until(lambda: bench.broker.under_way)
    assert bench.observer.all("job_rejected") == []
    bench.broker.committing.set()
    await bench.ended(1)

    assert [(len(commit.records), commit.point.offset) for commit in bench.broker.commits] == [(2, 1)]


async def test_worker_job_with_reply_to_is_answered_there(make: Any) -> None:
    """All events of the job are in one partition of that topic."""
    bench: Bench = make(said("a", "b"))
    bench.source.put(JOBS, job("j", reply_to="replies"))
    await bench.start(JOBS)
    await bench.ended(1)

    targets = {record.topic_partition for record in bench.sink.records + bench.broker.records()}
    assert targets == {bench.sink.partition_for("replies", b"j")}


async def test_worker_partition_kept_through_a_rebalance_keeps_its_stream(make: Any) -> None:
    """No call is cancelled; records that arrive again are recognised by their offsets."""
    gate = asyncio.Event()
    bench: Bench = make([word("a"), gate, *said("b")])
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS)
    await until(lambda: bench.sink.records)
    bench.source.assign(JOBS, OTHER)
    await bench.opened(JOBS, OTHER)
    bench.source.seek(JOBS, 0)
    await until(lambda: bench.observer.all("record_skipped"))
    gate.set()
    await bench.ended(1)

    assert len(bench.upstream.calls) == 1
    assert bench.ends() == {"j": "completed"}
    assert bench.broker.opened == [JOBS, OTHER]
    assert bench.observer.all("partitions_changed") == [(1, 1, 0), (2, 1, 0)]


async def test_worker_partition_lost_cancels_its_calls_at_once_and_writes_nothing_more(make: Any) -> None:
    """The next owner runs the jobs; jobs of other partitions go on."""
    gate = asyncio.Event()
    bench: Bench = make([word("a"), gate, *said("b")])
    bench.source.put(JOBS, job("lost"))
    bench.source.put(OTHER, job("kept"))
    await bench.start(JOBS, OTHER)
    await until(lambda: len(bench.sink.records) == 2)
    bench.source.assign(OTHER)
    await quiet()
    assert bench.upstream.open_calls == 1
    written = len(bench.broker.records(JOBS))
    gate.set()
    await bench.ended(1)
    await asyncio.sleep(100)

    assert bench.ends() == {"kept": "completed"}
    assert len(bench.broker.records(JOBS)) == written
    assert Counter(read(record)["job_id"] for record in bench.sink.records) == {"lost": 1, "kept": 3}
    assert [(job.job_id, why) for job, why in bench.observer.all("job_abandoned")] == [("lost", "revoked")]  # type: ignore[attr-defined]
    assert bench.broker.closed == [JOBS]
    assert bench.observer.all("partitions_changed")[-1] == (1, 0, 1)


async def test_worker_partition_lost_while_being_opened_cancels_the_opening(make: Any) -> None:
    """It would fence the next owner."""
    bench: Bench = make()
    bench.broker.opening.clear()
    await bench.start()
    bench.source.assign(JOBS)
    await quiet()
    bench.source.assign()
    await quiet()
    bench.broker.opening.set()
    await asyncio.sleep(10)

    assert bench.source.positions == {}
    assert bench.broker.closed == [JOBS]
    assert bench.worker.readiness()[1]["partitions"] == 0


async def test_worker_out_of_the_group_in_between_reopens_everything(make: Any) -> None:
    """Another worker may have owned the partitions in between."""
    bench: Bench = make([word("a"), FOREVER()], said("b"))
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS, OTHER)
    await until(lambda: bench.sink.records)
    bench.source.assign(JOBS, OTHER, kept=())
    await bench.ended(1)

    assert Counter(bench.broker.opened) == {JOBS: 2, OTHER: 2}
    assert Counter(bench.broker.closed) == {JOBS: 1, OTHER: 1}
    assert bench.ends() == {"j": "completed"}
    causes = [event["cause"] for event in bench.written() if event["type"] == "started"]
    assert causes == ["new", "new"]  # no worker has died
    assert bench.upstream.open_calls == 0


async def test_worker_records_of_a_former_assignment_are_ignored(
    make: Any,
) -> None:
    """They arrive again in the present assignment."""
    bench: Bench = make()
    await bench.start(JOBS)
    bench.source.delivering.clear()
    bench.source.put(JOBS, job("j"))
    await until(lambda: bench.source.positions.get(JOBS) == 1)
    bench.source.assign()
    bench.source.assign(JOBS)
    await until(lambda: bench.source.positions.get(JOBS) == 0)
    calls = len(bench.upstream.calls)
    bench.source.delivering.set()
    await bench.ended(1)
    await asyncio.sleep(100)

    assert calls == 0
    assert len(bench.upstream.calls) == 1
    assert bench.ends() == {"j": "completed"}
    assert [event["cause"] for event in bench.written() if event["type"] == "started"] == ["new"]


async def test_worker_records_of_a_new_assignment_in_an_old_receive_are_read_again(make: Any) -> None:
    """They are skipped like stale records, so the worker seeks back."""
    bench: Bench = make()
    await bench.start(JOBS)
    await asyncio.sleep(1)
    bench.source.delivering.clear()
    bench.source.put(JOBS, job("j0"))
    await until(lambda: bench.source.positions.get(JOBS) == 1)
    bench.source.assign()
    bench.source.assign(JOBS)
    await bench.opened(JOBS)
    bench.source.seek(JOBS, 1)  # as if that receive had taken it from the new assignment
    bench.source.delivering.set()
    bench.source.put(JOBS, job("j1"))
    await bench.ended(2)

    assert bench.ends() == {"j0": "completed", "j1": "completed"}
    assert bench.broker.points[JOBS].offset == 2


async def test_worker_records_of_a_lost_partition_are_ignored(make: Any) -> None:
    """They belong to the next owner."""
    bench: Bench = make()
    await bench.start(JOBS)
    bench.source.delivering.clear()
    bench.source.put(JOBS, job("j"))
    await until(lambda: bench.source.positions.get(JOBS) == 1)
    bench.source.assign()
    bench.source.delivering.set()
    await asyncio.sleep(100)

    assert bench.upstream.calls == []
    assert bench.broker.commits == []


async def put_to_sleep(bench: Bench) -> None:
    """Stop the process for ten minutes while it holds a record."""
    await bench.start(JOBS)
    bench.source.delivering.clear()
    bench.source.put(JOBS, job("j"))
    await until(lambda: bench.source.positions.get(JOBS) == 1)
    bench.clock.turn(600)


def called(bench: Bench) -> list[str]:
    """Return the models of the upstream's calls, in order."""
    return [json.loads(call.body)["model"] for call in bench.upstream.calls]


def of(name: str, **members: Any) -> bytes:
    """A job whose model has this name, which `called` returns."""
    return job(name, request={"model": name, "messages": [{"role": "user", "content": "hi"}]}, **members)


async def test_worker_with_turns_accepts_jobs_while_every_slot_is_held(make: Any) -> None:
    """There must be something to choose from; `max_waiting` bounds it."""
    bench: Bench = make([word("a"), 1.0, *said("b")])
    bench.worker = bench.new_worker(
        max_in_flight=1, max_waiting=5, is_fair=True, topics=("jobs",), fair_by="metadata:tenant"
    )
    for number in range(9):
        bench.source.put(JOBS, of(f"bulk-{number}", metadata={"tenant": "bulk"}))
    await bench.start(JOBS)
    await until(lambda: bench.queues.waiting == 5)
    await asyncio.sleep(0.5)
    assert bench.queues.waiting <= 5
    bench.source.put(JOBS, of("rare", metadata={"tenant": "rare"}), offset=20)
    await bench.ended(10)

    assert len(bench.ends()) == 10
    assert called(bench).index("rare") <= 7


async def test_worker_takes_turns_by_the_record_key(make: Any) -> None:
    """The key is often a conversation or a tenant."""
    bench: Bench = make([word("a"), 1.0, *said("b")])
    bench.worker = bench.new_worker(max_in_flight=1, is_fair=True, topics=("jobs",), fair_by="key")
    for number in range(5):
        bench.source.put(JOBS, of(f"bulk-{number}"), key=b"bulk")
    bench.source.put(JOBS, of("rare"), key=b"rare")
    await bench.start(JOBS)
    await bench.ended(6)

    assert called(bench).index("rare") <= 2


async def test_worker_topic_with_a_backlog_leaves_room_for_another_topic(make: Any) -> None:
    """The bulk topic fills its share of `max_waiting` and no more."""
    bulk = TopicPartition("bulk", 0)
    bench: Bench = make([word("a"), 1.0, *said("b")])
    bench.worker = bench.new_worker(max_in_flight=1, max_waiting=4, topics=("jobs", "bulk"))
    for number in range(12):
        bench.source.put(bulk, of(f"bulk-{number}"))
    await bench.start(bulk, JOBS)
    await until(lambda: bench.queues.waiting == 2)
    bench.source.put(JOBS, of("chat"))
    await bench.ended(13)

    assert called(bench).index("chat") <= 2


async def test_worker_promised_partition_ends_its_streams_and_begins_no_job(make: Any) -> None:
    """Jobs that wait go to the partition's next owner; it accepts nothing new, and moves when it is idle."""
    bench: Bench = make([word("a"), 5.0, *said("b")])
    bench.policy["max_streams"] = 1
    bench.worker = bench.new_worker()
    for name in ("streams", "waits"):
        bench.source.put(JOBS, job(name))
    await bench.start(JOBS, OTHER)
    await until(lambda: bench.sink.records and bench.queues.waiting)
    assert bench.source.assign(JOBS, OTHER, promised=[JOBS]) == {JOBS}
    bench.source.put(JOBS, job("new"))
    assert bench.worker.readiness()[1]["partitions_promised"] == ["jobs-0"]
    assert bench.worker.stats().moves_waiting == 1
    await bench.ended(1)
    await quiet()
    assert bench.source.assign(OTHER) == frozenset()
    await asyncio.sleep(10)

    assert bench.ends() == {"streams": "completed"}
    assert len(bench.upstream.calls) == 1
    assert [why for _, why in bench.observer.all("job_abandoned")] == ["moved"]
    assert bench.observer.all("move_deferred") == [(JOBS, 1)]
    assert [(at, forced) for at, _, forced in bench.observer.all("move_completed")] == [(JOBS, False)]
    assert bench.observer.all("streams_cut") == []
    assert bench.broker.points[JOBS].offset == 1


async def test_worker_promised_partition_that_stays_after_all_runs_every_job_once(make: Any) -> None:
    """Records are read again from the lowest offset that has not ended."""
    bench: Bench = make([word("a"), 5.0, *said("b")])
    bench.policy["max_streams"] = 1
    bench.worker = bench.new_worker()
    for name in ("streams", "waits"):
        bench.source.put(JOBS, job(name))
    await bench.start(JOBS)
    await until(lambda: bench.sink.records and bench.queues.waiting)
    bench.source.assign(JOBS, promised=[JOBS])
    await quiet()
    bench.source.assign(JOBS)
    bench.source.put(JOBS, job("new"))
    await bench.ended(3)

    assert bench.ends() == dict.fromkeys(["streams", "waits", "new"], "completed")
    assert len(bench.upstream.calls) == 3
    assert bench.broker.points[JOBS].offset == 3


async def test_worker_assigned_a_promised_partition_opens_it_and_accepts_nothing(make: Any) -> None:
    """A static member that comes back is given its stored assignment."""
    bench: Bench = make()
    bench.source.put(JOBS, job("j"))
    await bench.start()
    bench.source.assign(JOBS, promised=[JOBS])
    await until(lambda: bench.worker.readiness()[0])
    await asyncio.sleep(10)
    assert bench.upstream.calls == []
    bench.source.assign(JOBS)
    await bench.ended(1)

    assert bench.broker.opened == [JOBS]


async def test_worker_that_loses_open_streams_reports_them(make: Any) -> None:
    """The partition was busy for longer than it may be, so its job is paid for twice."""
    bench: Bench = make([word("a"), FOREVER()])
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS)
    await until(lambda: bench.sink.records)
    bench.source.assign(JOBS, promised=[JOBS])
    bench.source.assign()
    await until(lambda: not bench.upstream.open_calls)

    assert bench.observer.all("streams_cut") == [(JOBS, 1)]
    assert [(at, forced) for at, _, forced in bench.observer.all("move_completed")] == [(JOBS, True)]


async def test_worker_records_that_arrive_during_a_rebalance_are_read_again_after_it(make: Any) -> None:
    """The worker has reported which of its partitions have open jobs: a new job may be cut."""
    bench: Bench = make()
    await bench.start(JOBS)
    bench.source.delivering.clear()
    bench.source.put(JOBS, job("j"))
    await until(lambda: bench.source.positions.get(JOBS) == 1)
    bench.worker.rebalancing()
    bench.source.delivering.set()
    await asyncio.sleep(1)
    assert bench.upstream.calls == []
    bench.source.assign(JOBS)
    await bench.ended(1)

    assert len(bench.upstream.calls) == 1


async def test_worker_draining_gives_up_partitions_as_their_jobs_end(make: Any) -> None:
    """The group moves an idle partition at once and a busy one after its streams."""
    bench: Bench = make([word("a"), 5.0, *said("b")])
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS, OTHER)
    await until(lambda: bench.sink.records)
    assert not bench.source.is_leaving
    bench.worker.drain()
    assert bench.source.is_leaving
    await quiet()
    assert bench.source.assign(JOBS, promised=[JOBS]) == {JOBS}
    await until(lambda: bench.broker.closed == [OTHER])
    assert bench.upstream.open_calls == 1
    assert bench.task is not None
    await bench.task

    assert bench.ends() == {"j": "completed"}
    assert bench.observer.all("streams_cut") == []


async def test_worker_suspended_past_its_session_confirms_its_membership_first(make: Any) -> None:
    """Another worker may own the records that it holds; they arrive again if the partition does."""
    bench: Bench = make()
    await put_to_sleep(bench)

    async def confirm_membership() -> bool:
        bench.source.assign(kept=())
        return False

    bench.source.confirm_membership = confirm_membership  # type: ignore[method-assign]
    bench.source.delivering.set()
    await asyncio.sleep(100)
    assert bench.upstream.calls == []
    bench.source.assign(JOBS)
    await bench.ended(1)

    assert len(bench.upstream.calls) == 1


async def test_worker_suspended_that_still_is_a_member_accepts_its_records(make: Any) -> None:
    """A static member is waited for."""
    bench: Bench = make()
    await put_to_sleep(bench)
    bench.source.delivering.set()
    await bench.ended(1)

    assert bench.observer.all("record_skipped") == []


async def test_worker_records_that_arrive_while_draining_are_not_accepted(make: Any) -> None:
    """They were requested before the drain began."""
    bench: Bench = make()
    await bench.start(JOBS)
    bench.source.delivering.clear()
    bench.source.put(JOBS, job("j"))
    await until(lambda: bench.source.positions.get(JOBS) == 1)
    bench.worker.drain()
    bench.source.delivering.set()
    await bench.drained()

    assert bench.upstream.calls == []
    assert bench.broker.points[JOBS].offset == 0


async def test_worker_fenced_drops_the_partition_and_takes_it_over_anew(make: Any) -> None:
    """The group still assigns the partition to this worker, so the other worker is the zombie."""
    bench: Bench = make([word("a"), FOREVER()], said("b"))
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS)
    await until(lambda: bench.sink.records)
    bench.broker.seize(JOBS)
    bench.source.put(JOBS, None)
    await bench.ended(1)

    assert bench.ends() == {"j": "completed"}
    assert [event["cause"] for event in bench.written() if event["type"] == "started"] == [
        "new",
        "redelivered",
    ]
    assert [why for _, why in bench.observer.all("job_abandoned")] == ["fenced"]
    assert bench.observer.all("partition_fenced") == [(JOBS,)]
    assert bench.broker.opened == [JOBS, JOBS]
    assert bench.upstream.open_calls == 0


async def test_worker_fenced_without_membership_waits_for_it(make: Any) -> None:
    """Two workers that take a partition over without owning it would fence each other forever."""
    bench: Bench = make()
    await bench.start(JOBS)
    bench.source.is_member = False
    bench.broker.seize(JOBS)
    bench.source.put(JOBS, None)
    await asyncio.sleep(100)
    assert bench.broker.opened == [JOBS]
    bench.source.is_member = True
    await until(lambda: bench.broker.opened == [JOBS, JOBS])
    await bench.opened(JOBS)

    assert bench.worker.readiness()[0]


async def test_worker_fenced_and_then_revoked_does_not_take_the_partition_back(make: Any) -> None:
    """The rebalance that explains the fence came late."""
    bench: Bench = make()
    await bench.start(JOBS)
    bench.source.is_member = False
    bench.broker.seize(JOBS)
    bench.source.put(JOBS, None)
    await asyncio.sleep(5)
    bench.source.assign()
    bench.source.is_member = True
    await asyncio.sleep(100)

    assert bench.broker.opened == [JOBS]
    assert bench.worker.readiness()[1]["partitions"] == 0


async def test_worker_job_that_crashes_is_delivered_again_then_dead_lettered(make: Any) -> None:
    """The worker goes on."""
    bench: Bench = make([ValueError("a bug")])
    bench.source.put(JOBS, job("j"))
    with capture_logs() as logs:
        await bench.start(JOBS)
        await bench.ended(1)

    assert len(bench.upstream.calls) == 3
    assert bench.types() == {"started": 4, "letter": 1, "usage": 1}
    assert bench.ends() == {"j": "failed"}
    terminal = bench.written()[-1]
    assert (terminal["error"]["code"], terminal["seq"]) == ("max_deliveries", 1)
    assert terminal["attempt"] == bench.written()[-2]["attempt"]
    assert [entry["event"] for entry in logs].count("job.crashed") == 3
    assert len(bench.observer.all("job_crashed")) == 3
    assert bench.broker.points[JOBS].offset == 1
    assert bench.upstream.open_calls == 0


async def test_worker_job_that_crashes_once_completes(make: Any) -> None:
    """Readers follow the second attempt."""
    bench: Bench = make([word("lost"), ValueError("a bug")], said("a"))
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS)
    await bench.ended(1)

    started = [event for event in bench.written() if event["type"] == "started"]
    assert [event["cause"] for event in started] == ["new", "redelivered"]
    assert bench.ends() == {"j": "completed"}
    assert bench.written()[-1]["attempt"] == started[-1]["attempt"]


async def test_worker_crashed_job_that_waits_is_returned_by_a_drain(
    make: Any,
) -> None:
    """It has not begun again; the delivery that crashed stays counted."""
    bench: Bench = make([ValueError("a bug")], [FOREVER()])
    bench.policy["max_streams"] = 1
    bench.worker = bench.new_worker(drain_timeout_s=5)
    for name in ("crashes", "streams"):
        bench.source.put(JOBS, job(name))
    await bench.start(JOBS)
    await until(lambda: bench.upstream.open_calls and len(bench.upstream.calls) == 2)
    await asyncio.sleep(10)  # its backoff is over: it stands in the line
    assert bench.queues.queues["default"].jobs_waiting == 1
    await bench.drained()

    abandoned = [(job.job_id, why) for job, why in bench.observer.all("job_abandoned")]  # type: ignore[attr-defined]
    assert abandoned == [("crashes", "drain"), ("streams", "drain_timeout")]
    assert bench.deliveries() == {0: 1}


async def test_worker_job_that_kills_worker_after_worker_becomes_a_dead_letter(make: Any) -> None:
    """Deliveries are committed before the job runs, so they are counted over the deaths of workers."""
    bench: Bench = make([word("a"), FOREVER()])
    bench.source.put(JOBS, job("j"))
    for delivery in (1, 2, 3):
        await bench.start(JOBS)
        await until(lambda: JOBS in bench.broker.points and bench.upstream.open_calls)
        assert (len(bench.upstream.calls), bench.deliveries()) == (delivery, {0: delivery})
        await bench.stop()
        bench.source.positions.clear()
        bench.failure = asyncio.get_running_loop().create_future()
        bench.worker = bench.new_worker()
    await bench.start(JOBS)
    await bench.ended(1)

    assert len(bench.upstream.calls) == 3
    assert bench.ends() == {"j": "failed"}
    assert bench.types()["letter"] == 1


async def test_worker_restarted_runs_no_finished_job_again(make: Any) -> None:
    """The offset map holds finished jobs behind an open one."""
    bench: Bench = make([FOREVER()], said("a"))
    for number in range(5):
        bench.source.put(JOBS, job(f"j{number}"))
    await bench.start(JOBS)
    await bench.ended(4)
    assert bench.broker.points[JOBS].offset == 0
    await bench.stop()
    bench.failure = asyncio.get_running_loop().create_future()
    bench.worker = bench.new_worker()
    await bench.start(JOBS)
    await bench.ended(5)

    assert bench.broker.points[JOBS].offset == 5
    assert set(bench.ends()) == {f"j{number}" for number in range(5)}
    assert len(bench.observer.all("record_skipped")) == 4


async def test_worker_drained_completes_open_jobs_and_accepts_no_more(make: Any) -> None:
    """SIGTERM interrupts no stream that ends in time."""
    bench: Bench = make([word("a"), 25.0, *said("b")])
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS)
    await until(lambda: bench.sink.records)
    bench.worker.drain()
    bench.source.put(JOBS, job("late"))
    assert not bench.worker.readiness()[0]
    await bench.drained()

    assert bench.ends() == {"j": "completed"}
    assert bench.broker.points[JOBS].offset == 1
    assert bench.observer.all("job_abandoned") == []
    assert bench.broker.closed == [JOBS]


async def test_worker_drained_goes_on_polling(make: Any) -> None:
    """A member that stops polling is removed from the group while its jobs still run."""
    bench: Bench = make([word("a"), 25.0, *said("b")])
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS)
    await until(lambda: bench.sink.records)
    before = len(bench.source.asked)
    await bench.drained()

    assert len(bench.source.asked) - before >= 90


async def test_worker_drain_timeout_returns_open_jobs_with_their_count_undone(make: Any) -> None:
    """The next owner's delivery counts as the first."""
    bench: Bench = make(said("a"), [word("a"), FOREVER()], drain_timeout_s=20)
    bench.source.put(JOBS, job("done"))
    bench.source.put(JOBS, job("open"))
    await bench.start(JOBS)
    await bench.ended(1)
    await until(lambda: bench.upstream.open_calls == 1)
    began = asyncio.get_running_loop().time()
    await bench.drained()

    assert round(asyncio.get_running_loop().time() - began) == 20
    assert bench.ends() == {"done": "completed"}
    assert bench.deliveries() == {}
    assert bench.broker.points[JOBS].offset == 1
    assert [(job.job_id, why) for job, why in bench.observer.all("job_abandoned")] == [  # type: ignore[attr-defined]
        ("open", "drain_timeout")
    ]
    assert bench.upstream.open_calls == 0


async def test_worker_drained_returns_jobs_that_wait_for_their_next_try_at_once(make: Any) -> None:
    """Their upstream refuses the key, for longer than the drain may last: no call is open. Their deliveries do not count."""
    refused = JobError(ErrorCode.AUTH, "the key is not valid", 401)
    bench: Bench = make(Script([], before=[UpstreamError(refused)]), drain_timeout_s=120)
    for name in ("refused", "waits"):
        bench.source.put(JOBS, job(name))
    await bench.start(JOBS)
    await until(lambda: len(bench.upstream.calls) == 1 and bench.upstream.open_calls == 0)
    began = asyncio.get_running_loop().time()
    await bench.drained()

    assert asyncio.get_running_loop().time() - began < 1
    abandoned = {(job.job_id, why) for job, why in bench.observer.all("job_abandoned")}  # type: ignore[attr-defined]
    assert abandoned == {("refused", "drain"), ("waits", "drain")}
    assert bench.deliveries() == {}
    assert bench.ends() == {}


async def test_worker_draining_returns_a_job_whose_call_fails_meanwhile(make: Any) -> None:
    """It would be tried again, and the upstream may be held for long; a stream beside it is not interrupted."""
    busy = JobError(ErrorCode.UPSTREAM_UNAVAILABLE, "busy", 503, retriable=True)
    fails = Script([], before=[10.0, UpstreamError(busy, Advice(after_s=60))])
    bench: Bench = make([word("a"), 25.0, *said("b")], fails, drain_timeout_s=120)
    bench.policy["max_tries"] = 2
    bench.worker = bench.new_worker(drain_timeout_s=120)
    for name in ("streams", "fails"):
        bench.source.put(JOBS, job(name))
    await bench.start(JOBS)
    await until(lambda: bench.upstream.open_calls == 2)
    began = asyncio.get_running_loop().time()
    await bench.drained()

    assert 20 < asyncio.get_running_loop().time() - began < 30
    assert bench.observer.all("job_abandoned")[0][1] == "drain"
    assert bench.ends() == {"streams": "completed"}
    assert (len(bench.upstream.calls), bench.deliveries()) == (2, {})


async def test_worker_draining_reports_its_open_jobs_and_the_time_that_is_left(make: Any) -> None:
    """A user who has pressed Ctrl-C waits for them, for minutes if the streams are long."""
    bench: Bench = make([word("a"), 10.5, *said("b")], drain_timeout_s=120)
    bench.source.put(JOBS, job("streams"))
    await bench.start(JOBS)
    await until(lambda: bench.upstream.open_calls == 1)
    with capture_logs() as logs:
        await bench.drained()

    reports = [line for line in logs if line["event"] == "worker.draining"]
    assert [line["jobs_open"] for line in reports] == [1, 1, 1, 1]
    assert [line["timeout_s"] for line in reports] == [120, 117, 114, 111]


async def test_worker_drained_writes_waiting_commits(make: Any) -> None:
    """Tombstones and dead letters are not open jobs, and are written too."""
    bench: Bench = make()
    await bench.start(JOBS)
    bench.broker.committing.clear()
    bench.source.put(JOBS, None)
    bench.source.put(JOBS, b"nonsense")
    await until(lambda: bench.broker.under_way)
    bench.worker.drain()
    await quiet()
    bench.broker.committing.set()
    await bench.drained()

    assert bench.broker.points[JOBS].offset == 2
    assert bench.types() == {"letter": 1, "usage": 1}


async def test_worker_rebalance_while_returning_jobs_takes_nothing_over(make: Any) -> None:
    """It would fence its own last commits."""
    bench: Bench = make([word("a"), FOREVER()], drain_timeout_s=1)
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS)
    await until(lambda: bench.sink.records)
    bench.worker.drain()
    bench.broker.committing.clear()
    await until(lambda: bench.broker.under_way)
    bench.source.assign(JOBS, OTHER)
    await quiet()
    bench.broker.committing.set()
    await bench.drained()

    assert bench.broker.opened == [JOBS]
    assert bench.deliveries() == {}


async def test_worker_cancelled_stops_at_once_and_leaves_no_task(make: Any) -> None:
    """A second signal finishes nothing and loses nothing."""
    bench: Bench = make([word("a"), FOREVER()])
    before = asyncio.all_tasks()
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS, OTHER)
    await until(lambda: bench.sink.records)
    assert bench.task is not None
    bench.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await bench.task

    assert bench.ends() == {}
    assert bench.deliveries() == {0: 1}
    assert asyncio.all_tasks() == before
    assert sorted(bench.broker.closed) == [JOBS, OTHER]
    assert [why for _, why in bench.observer.all("job_abandoned")] == ["stopped"]


async def test_worker_cancelled_while_releasing_a_partition_closes_it(make: Any) -> None:
    """A committer that stays open would hold its transaction and its connection."""
    bench: Bench = make([word("a"), FOREVER()])
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS)
    await until(lambda: bench.sink.records)
    bench.source.assign()
    await asyncio.sleep(0)
    await bench.stop()

    assert bench.broker.closed == [JOBS]
    assert [why for _, why in bench.observer.all("job_abandoned")] == ["revoked"]


async def test_worker_whose_sink_failed_ends_with_its_error(make: Any) -> None:
    """A restart is better than a stall."""
    bench: Bench = make([word("a"), FOREVER()])
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS)
    await until(lambda: bench.sink.records)
    bench.failure.set_exception(RuntimeError("the sink is broken"))
    assert bench.task is not None

    with pytest.raises(RuntimeError, match="the sink is broken"):
        await bench.task
    assert bench.upstream.open_calls == 0
    assert bench.ends() == {}


async def test_worker_with_a_bug_in_a_committer_ends_with_it(make: Any) -> None:
    """A committer that died silently would stall its partition."""
    bench: Bench = make()
    await bench.start(JOBS)
    bench.broker.commit_errors.append(ZeroDivisionError("a bug"))  # type: ignore[arg-type]
    bench.source.put(JOBS, None)
    assert bench.task is not None

    with pytest.raises(ZeroDivisionError):
        await bench.task


async def test_worker_stats_count_partitions_that_are_opening(make: Any) -> None:
    """An alert needs to know why a worker is not ready."""
    bench: Bench = make()
    assert bench.worker.stats() == WorkerStats()
    bench.broker.opening.clear()
    await bench.start()
    bench.source.assign(JOBS, OTHER)
    await quiet()
    assert replace(bench.worker.stats(), poll_age_s=0) == WorkerStats(partitions_opening=2)
    bench.broker.opening.set()
    await bench.opened(JOBS, OTHER)

    assert replace(bench.worker.stats(), poll_age_s=0) == WorkerStats(is_ready=True)
    assert bench.observer.all("rebalancing") == [()]


async def test_worker_stats_have_the_age_of_a_commit_that_hangs(make: Any) -> None:
    """And the number of entries that wait behind it."""
    bench: Bench = make([word("a"), FOREVER()])
    await bench.start(JOBS)
    bench.broker.committing.clear()
    bench.source.put(JOBS, job("j0"))
    await until(lambda: bench.broker.under_way)
    bench.source.put(JOBS, job("j1"))
    await asyncio.sleep(70)
    stuck = bench.worker.stats()
    bench.broker.committing.set()
    await until(lambda: bench.types()["started"] == 2)
    free = bench.worker.stats()

    assert 69 < stuck.commit_in_progress_s <= 71
    assert stuck.commit_pending_entries == 1
    assert (free.commit_in_progress_s, free.commit_pending_entries) == (0, 0)
    assert sum(len(records) for records, _ in bench.observer.all("committed")) == 2  # type: ignore[arg-type, misc]
    assert bench.observer.all("committed")[0][1] == pytest.approx(stuck.commit_in_progress_s, abs=0.1)


async def test_worker_stats_have_the_largest_map_and_the_age_of_the_drain(make: Any) -> None:
    """The map's share shows before any record is refused."""
    bench: Bench = make([word("a"), 25.0, *said("b")], max_in_flight=1)
    bench.broker.points[JOBS] = _point(0, [offset * offset + 1 for offset in range(1, 2200)])
    bench.source.put(JOBS, job("j0"), offset=0)
    await bench.start(JOBS, OTHER)
    await until(lambda: bench.sink.records)
    bench.worker.drain()
    bench.clock.turn(7)
    bench.worker.drain()

    assert bench.worker.stats().offset_map_fill > FULL / LIMIT
    assert bench.worker.stats().draining_s == 7
    assert not bench.worker.stats().is_ready


async def test_worker_full_map_with_nothing_open_goes_on(make: Any) -> None:
    """Only the records before the finished ones can make the map smaller, so they must be accepted."""
    bench: Bench = make(max_in_flight=1)
    bench.broker.points[JOBS] = _point(0, [offset * offset + 1 for offset in range(1, 2200)])
    bench.source.put(JOBS, job("j0"), offset=0)
    bench.source.put(JOBS, job("j1"), offset=1)
    await bench.start(JOBS)
    await bench.ended(2)

    assert bench.ends() == {"j0": "completed", "j1": "completed"}


async def test_worker_job_that_fails_after_its_durable_end_is_not_run_again(make: Any) -> None:
    """Telemetry may raise after the commit; nothing else follows from it."""
    bench: Bench = make()

    def job_ended(*_: object) -> None:
        raise ZeroDivisionError("a bug in telemetry")

    bench.observer.job_ended = job_ended  # type: ignore[assignment,method-assign]
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS)
    await bench.ended(1)
    await asyncio.sleep(100)

    assert len(bench.upstream.calls) == 1
    assert bench.types() == {"started": 1, "usage": 1}
    assert bench.task is not None
    assert not bench.task.done()


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The records with the value `trap`, whose reading raises."""
    tries = []

    def read(record: Any, **options: Any) -> Any:
        if record.value == b"trap":
            tries.append(record)
            raise ZeroDivisionError("a bug")
        return read_job(record, **options)

    monkeypatch.setattr("streamworker.worker.intake.read_job", read)
    return tries


async def test_worker_record_whose_reading_crashes_counts_as_delivered_for_the_next_owner(
    make: Any, tries: list[Any]
) -> None:
    """Otherwise a record that ends its workers would meet every owner as new."""
    bench: Bench = make(max_deliveries=100)
    bench.source.put(JOBS, b"trap")
    await bench.start(JOBS)
    await until(lambda: len(tries) == 2)
    bench.source.put(JOBS, job("j"))
    await bench.ended(1)

    assert bench.deliveries()[0] == len(tries) >= 2


async def test_worker_dead_letter_that_the_broker_refuses_for_its_size_has_coordinates_only(
    make: Any,
) -> None:
    """Its partition goes on: the jobs behind it would be called and never committed."""
    bench: Bench = make()
    bench.broker.max_record_bytes = 2000
    bench.source.put(JOBS, b"not a job" * 1000)
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS)
    await bench.ended(2)
    [letter] = [one for one in bench.broker.records() if one.topic_partition.topic == "dlq"]

    assert (letter.key, letter.value) == (b"jobs-0-0", None)
    assert bench.ends() == {"jobs-0-0": "rejected", "j": "completed"}


async def test_worker_record_whose_reading_crashes_becomes_a_dead_letter(make: Any, tries: list[Any]) -> None:
    """Each try counts as a delivery; the jobs behind it run meanwhile."""
    bench: Bench = make(max_deliveries=3)
    bench.source.put(JOBS, b"trap")
    bench.source.put(JOBS, job("j"))
    with capture_logs() as logs:
        await bench.start(JOBS)
        await bench.ended(1)
        assert bench.ends() == {"j": "completed"}
        await bench.ended(2)

    assert len(tries) == 3
    assert bench.ends() == {"j": "completed", "jobs-0-0": "rejected"}
    assert bench.written()[-1]["error"]["code"] == "max_deliveries"
    assert bench.types()["letter"] == 1
    assert [entry["event"] for entry in logs].count("intake.crashed") == 3


async def test_worker_jobs_of_one_upstream_wait_in_kafka_beyond_half_of_the_room(make: Any) -> None:
    """Their partition is blocked; the jobs of other partitions and upstreams run."""
    bench: Bench = make([FOREVER()], max_in_flight=2, max_waiting=8)
    bench.policy["max_streams"] = 1
    bench.others = {"other": MemoryUpstream(said("a"))}
    bench.worker = bench.new_worker(max_in_flight=2, max_waiting=8)
    for number in range(20):
        bench.source.put(JOBS, job(f"j{number}"))
        bench.source.put(OTHER, job(f"o{number}", upstream="other"))
    await bench.start(JOBS, OTHER)
    await bench.ended(20)
    await asyncio.sleep(10)

    assert {end[0] for end in bench.ends()} == {"o"}
    assert bench.queues.queues["default"].jobs_waiting <= 4
    assert bench.worker._jobs.open <= 5


async def test_worker_blocked_partition_goes_on_when_its_upstream_has_room(make: Any) -> None:
    """No record is lost by the wait."""
    gate = asyncio.Event()
    bench: Bench = make([gate, *said("a")], max_in_flight=10, max_waiting=8)
    bench.policy["max_streams"] = 1
    bench.others = {"other": MemoryUpstream(said("a"))}
    bench.worker = bench.new_worker(max_in_flight=10, max_waiting=8)
    for number in range(30):
        bench.source.put(JOBS, job(f"j{number}"))
    await bench.start(JOBS)
    await asyncio.sleep(10)
    gate.set()
    await bench.ended(30)

    assert len(bench.ends()) == 30
    assert bench.broker.points[JOBS].offset == 30


async def test_worker_holds_no_more_record_bytes_than_it_may(make: Any) -> None:
    """The bound holds for running and waiting jobs together; one record always fits."""
    gate = asyncio.Event()
    bench: Bench = make([gate, *said("a")], max_held_bytes=2500)
    for number in range(6):
        bench.source.put(JOBS, job(f"j{number}", metadata={"k": "x" * 1000}))
    await bench.start(JOBS)
    await asyncio.sleep(10)
    assert bench.worker.readiness()[1]["jobs_open"] == 2
    gate.set()
    await bench.ended(6)

    assert len(bench.ends()) == 6


async def test_worker_partition_that_moves_counts_no_delivery(make: Any) -> None:
    """A rebalance is not a death, however often it moves a long job."""
    bench: Bench = make([word("a"), FOREVER()])
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS)
    await until(lambda: bench.sink.records)
    assert bench.deliveries() == {0: 1}
    bench.worker.rebalancing()
    await until(lambda: bench.deliveries() == {})
    bench.source.assign()
    await asyncio.sleep(5)

    assert bench.deliveries() == {}


async def test_worker_partition_that_stays_counts_its_deliveries_again(make: Any) -> None:
    """A death after the rebalance counts."""
    bench: Bench = make([word("a"), FOREVER()])
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS)
    await until(lambda: bench.sink.records)
    bench.worker.rebalancing()
    await until(lambda: bench.deliveries() == {})
    bench.source.assign(JOBS, OTHER)
    await bench.opened(JOBS, OTHER)
    await until(lambda: bench.deliveries() == {0: 1})

    assert bench.upstream.open_calls == 1


async def test_worker_suspects_of_two_deaths_run_one_after_another(make: Any) -> None:
    """The next death has one possible cause; other jobs run meanwhile."""
    bench: Bench = make([10.0, *said("a")], max_deliveries=9)
    bench.broker.points[JOBS] = CommitPoint(0, encode_map(0, OffsetMap(deliveries={0: 2, 1: 2, 2: 3})))
    for number in range(5):
        bench.source.put(JOBS, job(f"j{number}"))
    await bench.start(JOBS)
    await asyncio.sleep(5)
    assert bench.upstream.open_calls == 3  # one suspect, two others
    await bench.ended(5)

    assert set(bench.ends().values()) == {"completed"}


async def test_worker_suspects_of_one_death_start_at_different_times(make: Any) -> None:
    """They are retried as usual, but not all at once."""
    bench: Bench = make([10.0, *said("a")])
    bench.broker.points[JOBS] = CommitPoint(
        0, encode_map(0, OffsetMap(deliveries=dict.fromkeys(range(8), 1)))
    )
    for number in range(8):
        bench.source.put(JOBS, job(f"j{number}"))
    await bench.start(JOBS)
    times = []
    for count in range(1, 9):
        await until(lambda: len(bench.upstream.calls) >= count, every_s=0.001)  # noqa: B023 - called at once
        times.append(asyncio.get_running_loop().time())

    assert times[-1] - times[0] > 0.1
    await bench.ended(8)


@pytest.mark.parametrize(
    ("job_id", "timestamp", "effect"),
    [("j", 0, "cancelled"), ("j", -60_000, "too_early"), ("k", 0, "no_open_job")],
)
async def test_worker_reports_the_effect_of_a_cancel_record(
    make: Any, job_id: str, timestamp: int, effect: str
) -> None:
    """A cancel record without effect is not silent."""
    bench: Bench = make([word("a"), FOREVER()])
    record = bench.source.put(JOBS, job("j"))
    await bench.start(JOBS)
    await until(lambda: bench.sink.records)
    bench.worker.cancel(job_id, record.timestamp + timestamp, "enough")

    assert bench.observer.all("cancel_received") == [(job_id, effect)]


def _point(committed: int, finished: list[int]) -> CommitPoint:
    metadata = encode_map(committed, OffsetMap(frozenset(finished)))
    while len(metadata) > FULL + 200:
        finished = finished[:-10]
        metadata = encode_map(committed, OffsetMap(frozenset(finished)))
    assert len(metadata) >= FULL
    return CommitPoint(committed, metadata)


class Chance:
    """A worker through rebalances, fences, crashes and restarts, and what every reader may rely on in the end."""

    async def play(self, moves: list[tuple[str, int]]) -> None:
        self.bench = Bench([word("a"), 3.0, *said("b")], max_in_flight=4, max_deliveries=1000)
        self.count = 0
        await self.bench.start(JOBS, OTHER)
        for move, number in moves:
            await getattr(self, move)(number)
        self.bench.broker.committing.set()
        self.bench.sink.keeping_up.set()
        self.bench.source.is_member = True
        self.bench.source.assign(JOBS, OTHER)
        await until(lambda: len(self.bench.ends()) == self.count, within_s=1000, every_s=1)
        await self.bench.drained()
        self.check()

    async def put(self, number: int) -> None:
        partition = (JOBS, OTHER)[number % 2]
        self.bench.source.put(partition, job(f"j{self.count}") if number % 5 else b"nonsense")
        self.count += 1

    async def rest(self, number: int) -> None:
        await asyncio.sleep(number / 7)

    async def assign(self, number: int) -> None:
        owned = [partition for bit, partition in ((1, JOBS), (2, OTHER)) if number & bit]
        promised = owned[: number % 4]
        self.bench.source.assign(*owned, kept=None if number % 3 else (), promised=promised)

    async def seize(self, number: int) -> None:
        self.bench.broker.seize((JOBS, OTHER)[number % 2])

    async def gate(self, number: int) -> None:
        gate = (self.bench.broker.committing, self.bench.sink.keeping_up)[number % 2]
        if gate.is_set():
            gate.clear()
        else:
            gate.set()

    async def member(self, number: int) -> None:
        self.bench.source.is_member = number % 2 == 0

    async def restart(self, number: int) -> None:
        await self.bench.stop()
        self.bench.failure = asyncio.get_running_loop().create_future()
        self.bench.worker = self.bench.new_worker(max_in_flight=4, max_deliveries=1000)
        await self.bench.start()
        self.bench.source.assign(JOBS, OTHER, kept=())

    def check(self) -> None:
        """Rules 2, 3, 4 of the contract, and that everything is committed."""
        assert len(self.bench.ends()) == self.count  # one terminal event each: `ends` holds that
        deltas = events(self.bench.sink.records)
        for end in self.bench.written():
            if end["type"] == "usage" and end["status"] != "rejected":
                starts = [
                    event["attempt"]
                    for event in self.bench.written()
                    if event["type"] == "started" and event["job_id"] == end["job_id"]
                ]
                assert starts[-1] == end["attempt"]
                seqs = [event["seq"] for event in deltas if event["attempt"] == end["attempt"]]
                assert seqs == list(range(1, end["seq"]))
        for partition in (JOBS, OTHER):
            end_of_log = len(self.bench.source.logs[partition])
            assert self.bench.broker.points.get(partition, (0,))[0] == end_of_log


MOVES = st.tuples(
    st.sampled_from(
        ["put", "put", "put", "rest", "rest", "rest", "assign", "seize", "gate", "member", "restart"]
    ),
    st.integers(0, 20),
)


@settings(max_examples=100)
@given(moves=st.lists(MOVES, min_size=5, max_size=50))
def test_worker_of_any_history_ends_every_job_once(moves: list[tuple[str, int]]) -> None:
    """One terminal event per job, of its latest attempt, after every delta."""
    run(Chance().play(moves))
