"""The demo's acts, with processes and Kafka in memory: what is submitted, killed, awaited and printed."""

from __future__ import annotations

import asyncio
import io
import json
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import pytest

pytest.importorskip("noida_db", reason="needs the demo extra")

from rich.console import Console

from streamworker.client.events import Delta, Ended, Restarted, Started
from streamworker.config import Settings
from streamworker.demo import account as account_module
from streamworker.demo import play as module
from streamworker.demo.account import Verdict, audit, calls_of
from streamworker.demo.jobs import practice_jobs
from streamworker.demo.play import _program, _within, play
from streamworker.demo.stage import PARTITIONS
from streamworker.errors import KafkaUnavailable, StreamworkerError
from streamworker.kafka.partitioner import partition_of
from streamworker.model import Coordinates
from tests.integration.stage import eventually
from tests.unit.batch.logs import events_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from streamworker.client.events import Event

RUN = "demo-1"
OF_FIRST = frozenset({0, 1})


class Second:
    """The second worker: what was done to it."""

    def __init__(self, world: World) -> None:
        self._world = world

    def kill(self) -> None:
        self._world.steps.append("killed")

    def replace(self) -> None:
        self._world.steps.append("replaced")
        self._world.is_replaced.set()


class Page:
    """A page that is served when the test says so, or never."""

    url = "http://127.0.0.1:1/"

    def __init__(self) -> None:
        self.is_served = False
        self.starts = 0
        self.answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def start(self) -> None:
        self.starts += 1

    async def wait_until_served(self) -> bool:
        self.is_served = await self.answer
        return self.is_served


class World:
    """Everything around the acts. A job of the second worker ends only after the worker was replaced."""

    def __init__(self, *, practice: bool) -> None:
        self.steps: list[str] = []
        self.keys: dict[str, str] = {}
        self.is_replaced = asyncio.Event()
        self.fault: Exception | None = None
        self.page = Page()
        calls = [SimpleNamespace(model="m"), SimpleNamespace(model="m")]
        self.stage: Any = SimpleNamespace(
            run=RUN,
            settings=Settings(),
            practice=SimpleNamespace(calls=calls) if practice else None,
            page=self.page,
            second=Second(self),
            wait_until_shared=self.wait_until_shared,
        )
        self.output = io.StringIO()

    async def wait_until_shared(self) -> frozenset[int]:
        self.steps.append("shared")
        return OF_FIRST

    @asynccontextmanager
    async def set_up(self, say: Any) -> AsyncIterator[Any]:
        say("broker     [in memory]")
        try:
            yield self.stage
        finally:
            self.steps.append("stopped")

    def client(self, _: Settings) -> World:
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def submit_job(self, value: dict[str, Any], *, key: str) -> Any:
        self.keys[value["job_id"]] = key
        return self.job(value["job_id"])

    async def publish(self, _: Any, topic: str, entries: list[tuple[bytes, bytes]]) -> None:
        assert topic == "streamworker.jobs"
        for key, value in entries:
            self.keys[json.loads(value)["job_id"]] = key.decode()

    def job(self, job_id: str) -> Any:
        return SimpleNamespace(events=lambda: self.events(job_id))

    async def events(self, job_id: str) -> AsyncIterator[Event]:
        """Yield the events of a job; those of a killed worker come twice."""
        if self.fault is not None:
            raise self.fault
        is_of_second = partition_of(self.keys[job_id].encode(), PARTITIONS) not in OF_FIRST
        if job_id.endswith("-invalid"):
            [*_, end] = events_of(job_id, [], end="rejected")
            yield Ended(json.dumps(end).encode(), 0)
            return
        if is_of_second and self.stage.practice:
            for event in _decoded(events_of(job_id, ["lost "], end=None), Started):
                yield event
            await self.is_replaced.wait()
        for event in _decoded(events_of(job_id, ["a ", "b"]), Restarted if is_of_second else Started):
            yield event

    async def audit(self, _: Settings) -> Verdict:
        return Verdict(8, 8, 0, 3)

    def text(self) -> str:
        return self.output.getvalue()


def _decoded(events: list[dict[str, Any]], start: type[Event]) -> Iterator[Event]:
    kinds = {"started": start, "delta": Delta, "usage": Ended}
    for event in events:
        yield kinds[event["type"]](json.dumps(event | {"observed": {"deltas": 2}}).encode(), 0)


@contextmanager
def world(*, practice: bool = True) -> Iterator[World]:
    """Return a world in place of Kafka and the processes."""
    made = World(practice=practice)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "set_up", made.set_up)
        patch.setattr(module, "Client", made.client)
        patch.setattr(module, "publish", made.publish)
        patch.setattr(module, "audit", made.audit)
        patch.setattr(module, "BEFORE_KILL_S", 0.01)
        patch.setattr(module, "_POLL_S", 0.001)
        yield made


async def played(made: World, **options: Any) -> str:
    """Play the demo on a terminal that is not one; return its output."""
    console = Console(file=made.output, width=120, color_system=None)
    assert await asyncio.wait_for(play(console=console, **{"model": None} | options), 10) == 0
    return made.text()


async def test_second_worker_is_killed_while_its_jobs_stream_and_is_replaced() -> None:
    """Act 2 begins when each of its jobs has a text; everything is stopped at the end."""
    with world() as made:
        made.page.answer.set_result(True)
        text = await played(made)

    assert made.steps == ["shared", "killed", "replaced", "stopped"]
    assert text.index("Act 1 of 3: 8 jobs") < text.index("Act 2 of 3: worker B is killed")
    assert text.index("Act 2 of 3") < text.index("Act 3 of 3: the account")
    assert text.count("worker B was killed; its replacement starts") == 3
    assert "audit: 8 jobs, 8 endings, 3 attempts superseded, 0 breaches" in text
    assert "streamworker demo · page http://127.0.0.1:1/" in text
    assert "broker     [in memory]" in text


async def test_jobs_are_submitted_to_the_worker_that_shall_run_them() -> None:
    """By keys whose partitions it owns; the record that is not a valid job is written as it is."""
    with world() as made:
        made.page.answer.set_result(False)
        await played(made)
    jobs = practice_jobs(RUN)

    assert set(made.keys) == {job.job_id for job in jobs}
    for job in jobs:
        assert (partition_of(made.keys[job.job_id].encode(), PARTITIONS) in OF_FIRST) != job.goes_to_second


async def test_real_upstream_has_two_acts_and_no_victim() -> None:
    """Its calls cost money: nothing is run twice."""
    with world(practice=False) as made:
        made.page.answer.set_result(False)
        text = await played(made, model="m")

    assert made.steps == ["shared", "stopped"]
    assert "Act 1 of 2: 4 jobs" in text
    assert "Act 2 of 2: the account" in text
    assert "killed" not in text


@pytest.mark.parametrize(("is_served", "advice"), [(True, "open the page"), (False, "other commands")])
async def test_next_commands_name_the_page_if_there_is_one(advice: str, *, is_served: bool) -> None:
    """It may have failed to start, which does not end the demo."""
    with world() as made:
        made.page.answer.set_result(is_served)
        text = await played(made)

    assert "Keep everything running, and" in text
    assert advice in text
    assert "demo --stay" in text
    assert "check --config worker.toml" in text


async def test_demo_stays_until_it_is_cancelled() -> None:
    """And then stops everything."""
    with world() as made:
        made.page.answer.set_result(True)
        console = Console(file=made.output, width=120, color_system=None)
        playing = asyncio.create_task(play(model=None, stays=True, console=console))
        await eventually(lambda: "until Ctrl-C" in made.text(), 10)
        assert "the page is http://127.0.0.1:1/" in made.text()
        assert made.steps[-1] == "replaced"
        playing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await playing

    assert made.steps[-1] == "stopped"


async def test_page_that_is_never_served_is_not_awaited() -> None:
    """The account does not wait for it."""
    with world() as made:
        await played(made)

    assert (made.page.starts, made.page.answer.cancelled()) == (1, True)


@pytest.mark.parametrize("fault", [KafkaUnavailable("the broker is gone"), StreamworkerError("lagged")])
async def test_failure_of_a_part_ends_the_demo_with_its_reason(fault: StreamworkerError) -> None:
    """One error, not a group of one for each job; everything is stopped."""
    with world() as made:
        made.fault = fault
        with pytest.raises(StreamworkerError, match=str(fault)):
            await played(made)

    assert made.steps[-1] == "stopped"


async def test_fault_of_the_program_is_not_hidden() -> None:
    """Only errors for people are reduced to their text."""

    async def fail() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(_raise(ZeroDivisionError()))

    with pytest.raises(BaseExceptionGroup) as raised:
        await _within(fail())
    assert raised.group_contains(ZeroDivisionError)


async def _raise(error: Exception) -> None:
    raise error


async def test_demo_that_takes_too_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A visitor is not left before a screen that does not change."""
    monkeypatch.setattr(module, "TIMEOUT_S", 0.01)
    with pytest.raises(StreamworkerError, match=r"the demo did not end within 0\.01 s"):
        await _within(asyncio.sleep(60))


@pytest.mark.parametrize(
    ("argument", "executable", "folder", "shown"),
    [
        ("/usr/bin/streamworker", "/usr/bin/python3", "/home/me", "streamworker"),
        ("/x/__main__.py", "/home/me/.venv/bin/python", "/home/me", ".venv/bin/python -m streamworker"),
        ("/x/__main__.py", "/usr/bin/python3", "/home/me", "/usr/bin/python3 -m streamworker"),
    ],
)
def test_program_is_named_as_it_was_called(
    monkeypatch: pytest.MonkeyPatch, argument: str, executable: str, folder: str, shown: str
) -> None:
    """So that the commands at the end can be copied."""
    monkeypatch.setattr("sys.argv", [argument])
    monkeypatch.setattr("sys.executable", executable)
    monkeypatch.setattr(Path, "cwd", lambda: Path(folder))

    assert _program() == shown


# The account


def test_calls_are_counted_by_the_model_of_each_job() -> None:
    """The model's name contains what the job's call shall do, so that it is the job's own."""
    jobs = practice_jobs(RUN)
    model = jobs[0].value["request"]["model"]
    practice: Any = SimpleNamespace(calls=[SimpleNamespace(model=name) for name in (model, model, "other")])
    calls = calls_of(practice, jobs)

    assert calls[jobs[0].job_id] == 2
    assert sum(calls.values()) == 2
    assert calls[f"{RUN}-invalid"] == 0


async def test_audit_reads_committed_events_and_counts_breaches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gap in an attempt and a job without an ending are breaches; a superseded attempt is not."""
    whole = events_of("a", ["x"])
    restarted = [*events_of("b", ["x"], end=None), *events_of("b", [], attempt="z")]
    gap = [event for event in events_of("c", ["x", "y"]) if event["seq"] != 1]
    open_ = events_of("d", ["x"], end=None)
    events = [*whole, *restarted, *gap, *open_]

    class Log:
        partitions = (0, 1)

        async def snapshot(self, partitions: list[Any]) -> AsyncIterator[Any]:
            assert [(at.topic, at.partition) for at in partitions] == [
                ("streamworker.events", 0),
                ("streamworker.events", 1),
            ]
            for offset, event in enumerate(events):
                at = Coordinates("streamworker.events", 0, offset)
                yield SimpleNamespace(value=json.dumps(event).encode(), at=at, key=event["job_id"].encode())

    @asynccontextmanager
    async def opened(_: Any, topic: str, *, committed_only: bool) -> AsyncIterator[Log]:
        assert (topic, committed_only) == ("streamworker.events", True)
        yield Log()

    monkeypatch.setattr(account_module, "open_log", opened)
    verdict = await audit(Settings())

    assert (verdict.jobs, verdict.endings, verdict.superseded) == (4, 3, 1)
    assert verdict.breaches >= 2
