"""The engine with a job topic and a topic of endings in memory: stops, limits, expiry, retention, rounds."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from streamworker.batch import engine as module
from streamworker.batch import open_lines, watch
from streamworker.batch.engine import Engine
from streamworker.batch.errors import OutputError, RunRefused, RunStopped
from streamworker.batch.files import LocalInput, LocalOutput, LocalRunStore
from streamworker.batch.index import State
from streamworker.batch.options import BatchOptions, Stop
from streamworker.batch.progress import NO_START
from streamworker.config import Settings
from streamworker.errors import KafkaUnavailable
from tests.integration.batches import request
from tests.integration.stage import eventually
from tests.unit.batch.memory import Kafka, Topics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path


class Case:
    def __init__(self, directory: Path, count: int) -> None:
        self.kafka = Kafka()
        self.input, self.output, self.errors = (
            directory / name for name in ("i.jsonl", "o.jsonl", "e.jsonl")
        )
        self.store = LocalRunStore(directory / "o.jsonl.run.json")
        self.ids = [f"c{number}" for number in range(count)]
        self.notes: list[str] = []
        self.input.write_text("".join(json.dumps(request(name)) + "\n" for name in self.ids))
        self.results = "results"

    def engine(self, **options: Any) -> Engine:
        self.opened = LocalOutput(self.output, self.errors)
        self.opened.lock()
        self.source = LocalInput.open(self.input)
        settings = Settings(topics={"results": self.results})
        return Engine(
            settings,
            BatchOptions(topic="jobs", **options),
            self.source,
            self.opened,
            self.store,
            note=self.notes.append,
        )

    async def run(self, engine: Engine | None = None, **options: Any) -> Any:
        """Run to the end; return the outcome, or the exception that says why there is none."""
        engine = engine or self.engine(**options)
        try:
            return await asyncio.wait_for(engine.run(), 20)
        except (RunStopped, RunRefused, OutputError, KafkaUnavailable) as error:
            return error
        finally:
            self.source.close()
            await self.opened.close()

    def codes(self, path: Path | None = None) -> list[str]:
        path = path or (self.errors if self.errors.exists() else self.errors.with_name("e.jsonl.part"))
        return (
            [json.loads(line)["error"]["code"] for line in path.read_text().splitlines()]
            if path.exists()
            else []
        )


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Case]:
    def made(count: int) -> Case:
        case = Case(tmp_path, count)
        monkeypatch.setattr(module, "RunTopics", lambda *arguments: Topics(case.kafka, *arguments))

        async def publish(_: Any, topic: str, entries: Iterable[tuple[bytes, bytes]]) -> None:
            assert topic == "streamworker.control"
            case.kafka.cancelled += [key.decode() for key, _ in entries]

        monkeypatch.setattr(open_lines, "publish", publish)
        return case

    return made


async def test_run_ends_with_every_line_in_a_file(make: Callable[[int], Case]) -> None:
    """And leaves no record."""
    case = make(30)
    case.kafka.answer = lambda name: "failed" if name in {"c3", "c7"} else "completed"
    outcome = await case.run(window=7)

    assert (outcome.total, outcome.completed, outcome.failed) == (30, 28, 2)
    assert list(outcome.files) == [str(case.output), str(case.errors)]
    assert len(case.output.read_text().splitlines()) == 28
    assert await case.store.load() is None
    assert len(set(case.kafka.jobs)) == len(case.kafka.jobs) == 30


async def test_run_that_drains_writes_what_is_in_flight_and_is_run_again(make: Callable[[int], Case]) -> None:
    """The next start submits the rest, under the same name."""
    case = make(10)
    case.kafka.answer = lambda _: None
    engine = case.engine(window=4)
    running = asyncio.create_task(case.run(engine))
    await eventually(lambda: len(case.kafka.jobs) == 4)
    engine.stop(Stop.DRAIN, "interrupted")
    for job_id in case.kafka.jobs:
        case.kafka.end(job_id, "completed")
    error = await running

    assert isinstance(error, RunStopped)
    assert (
        str(error)
        == "interrupted: 4 of 10 lines are done, 6 are not submitted; run the same command again to go on"
    )
    case.kafka.answer = lambda _: "completed"
    assert (await case.run()).completed == 10
    assert len(set(case.kafka.jobs)) == len(case.kafka.jobs) == 10


async def test_run_that_is_stopped_at_once_leaves_its_jobs(make: Callable[[int], Case]) -> None:
    """They are collected by the next start."""
    case = make(3)
    case.kafka.answer = lambda _: None
    engine = case.engine()
    running = asyncio.create_task(case.run(engine))
    await eventually(lambda: len(case.kafka.jobs) == 3)
    engine.stop(Stop.NOW, "SIGTERM")
    engine.stop(Stop.DRAIN, "later")
    error = await running
    assert str(error).startswith("SIGTERM: 0 of 3 lines are done, 3 are in flight and go on")
    for job_id in list(case.kafka.jobs):
        case.kafka.end(job_id, "completed")

    assert (await case.run()).completed == 3
    assert len(case.kafka.jobs) == 3


@pytest.mark.parametrize("fails_rest", [False, True])
async def test_run_that_is_cancelled(
    make: Callable[[int], Case], monkeypatch: pytest.MonkeyPatch, fails_rest: bool
) -> None:
    """What is in flight is cancelled; the rest is left for a later run, or fails."""
    monkeypatch.setattr(module, "CANCEL_S", 0.2)
    case = make(6)
    case.kafka.answer = lambda _: None
    engine = case.engine(window=3, fails_rest=fails_rest)
    running = asyncio.create_task(case.run(engine))
    await eventually(lambda: len(case.kafka.jobs) == 3)
    engine.stop(Stop.CANCEL, "interrupted twice")
    await eventually(lambda: len(case.kafka.cancelled) == 3)
    for job_id in case.kafka.jobs[:2]:
        case.kafka.end(job_id, "cancelled", "cancelled")
    result = await running

    assert case.notes[-1] == "1 lines have not ended within 0.2 s of their cancellation"
    if fails_rest:
        assert (result.failed, case.codes()) == (6, ["batch_cancelled"] * 6)
    else:
        assert "2 of 6 lines are done, 1 are in flight and go on, 3 are not submitted" in str(result)
        assert case.codes() == ["batch_cancelled"] * 2


async def test_run_stops_by_itself_when_the_key_is_refused(make: Callable[[int], Case]) -> None:
    """After fifty endings in a row; a success between them counts."""
    case = make(200)
    case.kafka.answer = lambda name: "completed" if name == "c40" else "failed quota"
    error = await case.run(window=5)

    assert isinstance(error, RunStopped)
    assert "50 lines in a row have failed with quota: m" in str(error)
    assert 91 <= len(case.kafka.jobs) <= 100


async def test_run_of_the_gateway_goes_on_when_the_key_is_refused(make: Callable[[int], Case]) -> None:
    """A run that stopped by itself would stop again at its next start, and its batch would never end."""
    case = make(80)
    case.kafka.answer = lambda _: "failed quota"
    outcome = await case.run(window=5, stops_on_refusals=False)

    assert (outcome.completed, outcome.failed) == (0, 80)


async def test_run_stops_after_its_errors(make: Callable[[int], Case]) -> None:
    """What is in flight is awaited."""
    case = make(100)
    case.kafka.answer = lambda _: "failed"
    error = await case.run(max_errors=10, window=4)

    assert "(--max-errors 10)" in str(error)
    assert 10 <= len(case.codes()) == len(case.kafka.jobs) <= 14


async def test_run_expires(make: Callable[[int], Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that were not submitted at once; jobs that no worker ends after a grace; each is cancelled."""
    monkeypatch.setattr(watch, "_WATCH_S", 0.05)
    monkeypatch.setattr(watch, "EXPIRY_GRACE_S", 0.2)
    case = make(8)
    case.kafka.answer = lambda name: "completed" if name == "c0" else None
    outcome = await case.run(window=4, expires_in_s=0.3)

    assert (outcome.completed, outcome.failed) == (1, 7)
    assert case.codes() == ["batch_expired"] * 7
    assert len(case.kafka.cancelled) == len(case.kafka.jobs) - 1


async def test_run_that_has_expired_submits_nothing_more(
    make: Callable[[int], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time counts from the first start."""
    monkeypatch.setattr(watch, "EXPIRY_GRACE_S", 0.1)
    monkeypatch.setattr(watch, "_WATCH_S", 0.05)
    case = make(4)
    case.kafka.answer = lambda _: None
    engine = case.engine(window=2, expires_in_s=0.2)
    running = asyncio.create_task(case.run(engine))
    await eventually(lambda: len(case.kafka.jobs) == 2)
    engine.stop(Stop.NOW)
    await running
    await asyncio.sleep(0.3)
    outcome = await case.run(expires_in_s=3600)

    assert (outcome.failed, len(case.kafka.jobs)) == (4, 2)


@pytest.mark.parametrize("lost", ["lost_jobs", "lost_endings"])
async def test_lines_whose_records_were_deleted_are_listed(make: Callable[[int], Case], lost: str) -> None:
    """They may have been paid for: they run again on request, under another id."""
    case = make(3)
    case.kafka.answer = lambda _: None
    engine = case.engine()
    running = asyncio.create_task(case.run(engine))
    await eventually(lambda: len(case.kafka.jobs) == 3)
    engine.stop(Stop.NOW)
    await running
    setattr(case.kafka, lost, {0})
    case.kafka.answer = lambda _: "completed"
    error = await case.run()
    assert "of 3 nothing is known" in str(error)
    assert "line 1, 2, 3" in str(error)
    assert len(case.kafka.jobs) == 3
    outcome = await case.run(resubmits_unknown=True)

    assert outcome.completed == 3
    assert [job_id[-2:] for job_id in case.kafka.jobs[3:]] == [".1"] * 3


@pytest.mark.parametrize("lost", ["lost_jobs", "lost_endings"])
async def test_lines_whose_records_were_deleted_expire_with_the_run(
    make: Callable[[int], Case], lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not submitted again, and the run does not stay unfinished for ever."""
    monkeypatch.setattr(watch, "EXPIRY_GRACE_S", 0.0)
    case = make(3)
    case.kafka.answer = lambda _: None
    engine = case.engine(expires_in_s=0.2)
    running = asyncio.create_task(case.run(engine))
    await eventually(lambda: len(case.kafka.jobs) == 3)
    engine.stop(Stop.NOW)
    await running
    setattr(case.kafka, lost, {0})
    await asyncio.sleep(0.3)  # the run's time is over
    outcome = await case.run()

    assert (outcome.failed, len(case.kafka.jobs)) == (3, 3)
    assert case.codes() == ["batch_expired"] * 3


async def test_failed_lines_run_again_in_a_round_of_their_own(make: Callable[[int], Case]) -> None:
    """An interrupted round continues; the ending of an earlier round does not count."""
    case = make(4)
    case.kafka.answer = lambda name: "failed" if name in {"c1", "c2"} else "completed"
    assert (await case.run(run="night")).failed == 2
    case.kafka.answer = lambda _: None
    engine = case.engine(run="night", retry_failed="all")
    running = asyncio.create_task(case.run(engine))
    await eventually(lambda: len(case.kafka.jobs) == 6)
    engine.stop(Stop.NOW)
    await running
    assert [job_id[-2:] for job_id in case.kafka.jobs[4:]] == [".1", ".1"]
    case.kafka.end(case.kafka.jobs[4], "completed")
    case.kafka.end(case.kafka.jobs[5], "failed")
    outcome = await case.run(run="night", retry_failed="all")
    assert (outcome.completed, outcome.failed, len(case.kafka.jobs)) == (3, 1, 6)

    case.kafka.answer = lambda _: "completed"
    outcome = await case.run(run="night", retry_failed="all")
    assert (outcome.failed, [job_id[-2:] for job_id in case.kafka.jobs[6:]]) == (0, [".2"])
    assert sorted(path.name for path in case.input.parent.iterdir()) == ["i.jsonl", "o.jsonl"]


async def test_run_with_other_topics_is_refused(make: Callable[[int], Case]) -> None:
    """Its records are in the topics in which it was started."""
    case = make(2)
    case.kafka.answer = lambda _: None
    engine = case.engine()
    running = asyncio.create_task(case.run(engine))
    await eventually(lambda: case.kafka.jobs)
    engine.stop(Stop.NOW)
    await running
    case.results = "others"
    error = await case.run()

    assert isinstance(error, RunRefused)
    assert (
        "was started with jobs jobs, results results, and would go on with jobs jobs, results others"
        in str(error)
    )


async def test_cancel_ends_what_an_earlier_start_has_left(make: Callable[[int], Case]) -> None:
    """And submits nothing."""
    case = make(3)
    case.kafka.answer = lambda _: None
    engine = case.engine(window=2)
    running = asyncio.create_task(case.run(engine))
    await eventually(lambda: len(case.kafka.jobs) == 2)
    engine.stop(Stop.NOW)
    await running
    running = asyncio.create_task(case.run(cancels=True))
    await eventually(lambda: len(case.kafka.cancelled) == 2)
    for job_id in list(case.kafka.jobs):
        case.kafka.end(job_id, "cancelled", "cancelled")
    error = await running

    assert "2 of 3 lines are done, 1 are not submitted" in str(error)
    assert (case.codes(), len(case.kafka.jobs)) == (["batch_cancelled"] * 2, 2)


async def test_positions_of_the_record_advance_with_the_files(
    make: Callable[[int], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later start reads only the endings that are not in the files."""
    monkeypatch.setattr(module, "SYNC_S", 0.1)
    case = make(5)
    case.kafka.answer = lambda name: None if name == "c4" else "completed"
    engine = case.engine()
    running = asyncio.create_task(case.run(engine))

    def saved() -> int:
        record = engine.record
        return record.offsets("results")[0] if record else 0

    await eventually(lambda: saved() == 4)
    assert len(case.output.with_name("o.jsonl.part").read_text().splitlines()) == 4
    engine.stop(Stop.NOW)
    await running


async def test_output_that_cannot_be_written_stops_the_run(
    make: Callable[[int], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The positions stay behind the lost lines, so that the next start reads them again."""
    case = make(5)
    engine = case.engine()

    def full(_: bytes) -> None:
        raise OutputError("o.jsonl.part cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(case.opened._files[0], "append", full)
        error = await case.run(engine)
    assert isinstance(error, OutputError)
    assert engine.record is not None
    assert engine.record.offsets("results") == {0: 0}
    assert (await case.run()).completed == 5
    assert len(case.kafka.jobs) == 5


async def test_run_reports_that_no_job_starts(
    make: Callable[[int], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While events are written, workers are alive; when brokers do not answer for too long, the run stops."""
    monkeypatch.setattr(watch, "_WATCH_S", 0.02)
    monkeypatch.setattr(watch, "_NO_START_S", 0.05)
    case = make(1)
    case.kafka.answer = lambda _: None
    engine = case.engine()
    running = asyncio.create_task(case.run(engine))
    await eventually(lambda: NO_START in case.notes)
    engine.stop(Stop.NOW)
    await running

    async def events_written(_: Topics) -> int:
        raise KafkaUnavailable("gone")

    monkeypatch.setattr(Topics, "events_written", events_written)
    monkeypatch.setattr(watch, "OUTAGE_S", 0.1)
    error = await case.run()
    assert str(error) == "the brokers do not answer: gone; run the same command again"


async def test_reader_that_crashes_ends_the_run(make: Callable[[int], Case]) -> None:
    """With its exception: nothing would be collected any more."""
    case = make(1)
    case.kafka.answer = lambda _: None
    engine = case.engine()
    running = asyncio.create_task(case.run(engine))
    await eventually(lambda: case.kafka.jobs)
    assert case.kafka.follower is not None
    case.kafka.follower.tail.crashed.set_exception(KafkaUnavailable("crashed"))

    assert str(await running) == "crashed"


async def test_brokers_that_do_not_answer_in_time_are_reported(
    make: Callable[[int], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first connection has a time limit."""

    async def open_(_: Topics) -> None:
        await asyncio.sleep(60)

    case = make(1)
    monkeypatch.setattr(Topics, "open", open_)
    error = await case.run(timeout_s=0.1)

    assert isinstance(error, KafkaUnavailable)
    assert "no answer within 0.1 s; is kafka.bootstrap_servers right?" in str(error)
    assert not case.store.path.exists()


async def test_counts_and_snapshot_follow_the_run(make: Callable[[int], Case]) -> None:
    """For a program that shows them."""
    case = make(4)
    case.kafka.answer = lambda name: None if name == "c3" else "completed"
    engine = case.engine()
    running = asyncio.create_task(case.run(engine))
    await eventually(lambda: engine.counts()[State.COMPLETED] == 3)
    assert (engine.lines, engine.counts()[State.SUBMITTED], engine.is_working) == (4, 1, True)
    assert (engine.snapshot().done, engine.snapshot().in_flight) == (3, 1)
    engine.stop(Stop.NOW)
    await running
    assert not engine.is_working
