"""The watch over a run: its time, its oldest line, and brokers and workers that do nothing. The clock is virtual."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from streamworker.batch import open_lines
from streamworker.batch.errors import RunStopped
from streamworker.batch.identity import JobIds, digest_of
from streamworker.batch.index import LineIndex, State
from streamworker.batch.ledger import Ledger
from streamworker.batch.open_lines import ANY_OPEN, OpenLines
from streamworker.batch.output import EndedJob
from streamworker.batch.progress import NO_START, STALL_S
from streamworker.batch.submission import OUTAGE_S
from streamworker.batch.watch import EXPIRY_GRACE_S, Expiry, Watch
from streamworker.config import Settings
from streamworker.errors import KafkaUnavailable
from tests.turnable import TurnableLoop, run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    Play = Callable[..., None]
IDS = JobIds("b.r.")
LINES = 4


class Case:
    """Four lines, their texts, and topics whose events grow as the test says."""

    name: str = "i.jsonl"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, expires_ms: int | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.notes: list[tuple[float, str]] = []
        self.cancelled: list[str] = []
        self.errors: list[tuple[str, str]] = []
        self.expired = self.reads = 0
        self.written = 0
        self.grows = 0
        self.fault: Exception | None = None
        self.looks: list[float] = []
        self.on_publish: Callable[[], None] = lambda: None
        self.index = LineIndex()
        self.texts: list[bytes] = []
        for number in range(LINES):
            body = {"model": "m", "messages": [number]}
            self.texts.append(json.dumps({"custom_id": f"c{number}", "body": body}).encode())
            self.index.add(digest_of(f"c{number}", body), f"c{number}", (number + 1, number, 1))
        self.ledger = Ledger(self.index, self, self.now)  # type: ignore[arg-type]  # only `write` is used
        self.lines = OpenLines(Settings(), self.ledger, self, IDS, "r")
        self.expiry = Expiry(expires_ms, self.ledger, self.lines, on_expired=self.note_expiry, note=self.note)
        self.watch = Watch(self.ledger, self, self, request_timeout_s=5, note=self.note)  # type: ignore[arg-type]  # in memory

        async def publish(_: Any, topic: str, entries: Any) -> None:
            assert topic == "streamworker.control"
            for key, value in list(entries):
                assert json.loads(value)["reason"] == "batch r"
                self.cancelled.append(key.decode())
            self.on_publish()

        monkeypatch.setattr(open_lines, "publish", publish)
        monkeypatch.setattr(time, "time_ns", lambda: int(self.now() * 1e9))

    def now(self) -> float:
        return self.loop.time()

    def note(self, text: str) -> None:
        self.notes.append((self.now(), text))

    def note_expiry(self) -> None:
        self.expired += 1

    def write(self, line: bytes, *, is_error: bool) -> None:
        assert is_error
        read = json.loads(line)
        assert read["error"]["retriable"] == read["error"]["code"].startswith("batch_")
        self.errors.append((read["custom_id"], read["error"]["code"]))

    def chunks(self) -> AsyncIterator[bytes]:
        raise NotImplementedError

    async def read(self, offset: int, length: int) -> bytes:
        del length
        self.reads += 1
        await asyncio.sleep(0)
        return self.texts[offset]

    async def events_written(self) -> int:
        self.looks.append(self.now())
        if self.fault is not None:
            raise self.fault
        self.written += self.grows
        return self.written

    async def watched(self, seconds: float) -> None:
        """Watch for a time."""
        try:
            async with asyncio.timeout(seconds):
                await self.watch.run(self.expiry.check)
        except TimeoutError:
            pass

    def states(self) -> str:
        """Return the first letter of each line's state."""
        return "".join(self.index.state(line).name[0] for line in range(LINES))

    def end(self, line: int, status: str = "failed") -> None:
        """End a job."""
        error = {"code": "x", "retriable": status == "cancelled"}
        job = EndedJob(job_id="j", attempt="a", status=status, usage_source="none", error=error)
        self.ledger.end(line, f"c{line}", job)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that runs a coroutine of a case on a loop whose clock jumps."""

    def played(work: Callable[[Case], Coroutine[Any, Any, None]], expires_s: float | None = None) -> None:
        async def of_case() -> None:
            now = asyncio.get_running_loop().time()
            await work(Case(monkeypatch, None if expires_s is None else round((now + expires_s) * 1000)))

        run(of_case(), TurnableLoop)

    return played


# The oldest line


def test_oldest_line_is_named_after_a_minute_without_an_ending(play: Play) -> None:
    """By its custom id, which is read from the input only then."""

    async def work(case: Case) -> None:
        case.grows = 1
        case.ledger.begin([1, 2])
        await case.watched(STALL_S - 2)
        assert (case.ledger.snapshot().oldest, case.reads) == (None, 0)
        await case.watched(4)
        oldest = case.ledger.snapshot().oldest
        assert oldest is not None
        assert (oldest[0], round(oldest[1])) == ("c1", 62)
        case.end(1)
        await case.watched(2)
        assert case.ledger.snapshot().oldest is None

    play(work)


# Workers and brokers


def test_run_without_a_worker_is_reported_every_ten_seconds(play: Play) -> None:
    """Two looks ten seconds apart find the same number of events."""

    async def work(case: Case) -> None:
        case.ledger.begin([0])
        begin = case.now()
        await case.watched(35)
        assert [text for _, text in case.notes] == [NO_START] * 3
        assert [round(at - begin) for at, _ in case.notes] == [11, 21, 31]

    play(work)


def test_run_whose_workers_write_events_is_quiet(play: Play) -> None:
    """A long answer has no ending for long, and that is not a fault."""

    async def work(case: Case) -> None:
        case.grows = 3
        case.ledger.begin([0])
        await case.watched(300)
        assert case.notes == []
        assert len(case.looks) == 30

    play(work)


def test_run_with_nothing_in_flight_asks_nothing(play: Play) -> None:
    """It waits for room or for its end, not for workers."""

    async def work(case: Case) -> None:
        await case.watched(60)
        assert (case.looks, case.notes) == ([], [])

    play(work)


def test_ending_begins_the_watch_anew(play: Play) -> None:
    """An upstream that was slow before is not reported for what it did then."""

    async def work(case: Case) -> None:
        case.ledger.begin([0, 1])
        await case.watched(8)
        case.end(0)
        await case.watched(8)
        await case.watched(8)
        assert case.notes == []
        case.index.set_state(1, State.PENDING)
        await case.watched(30)
        assert case.notes == []

    play(work)


@pytest.mark.parametrize("fault", [KafkaUnavailable("away"), TimeoutError("late")])
def test_brokers_that_do_not_answer_for_two_minutes_stop_the_run(play: Play, fault: Exception) -> None:
    """Not sooner: brokers restart. The jobs in flight go on, and the next start collects their endings."""

    async def work(case: Case) -> None:
        case.ledger.begin([0])
        case.fault = fault
        begin = case.now()
        with pytest.raises(
            RunStopped, match=f"the brokers do not answer: {fault}; run the same command again"
        ):
            await case.watched(1000)
        assert OUTAGE_S < case.now() - begin < OUTAGE_S + 12
        assert case.states() == "SPPP"

    play(work)


def test_broker_that_answers_again_is_forgiven(play: Play) -> None:
    """The two minutes are those since its last answer."""

    async def work(case: Case) -> None:
        case.ledger.begin([0])
        case.grows = 1
        for _ in range(3):
            case.fault = KafkaUnavailable("away")
            await case.watched(OUTAGE_S - 20)
            case.fault = None
            await case.watched(12)
        assert case.notes == []

    play(work)


# The run's time


def test_run_without_a_limit_never_expires(play: Play) -> None:
    """Whatever the clock says."""

    async def work(case: Case) -> None:
        await case.watched(3600)
        assert (case.expired, case.states()) == (0, "PPPP")

    play(work)


def test_lines_that_were_not_submitted_expire_at_once_and_the_others_after_a_grace(play: Play) -> None:
    """The workers end jobs by their own deadline, which tell what was generated."""

    async def work(case: Case) -> None:
        case.ledger.begin([1])
        case.index.set_state(2, State.UNKNOWN)
        await case.watched(9.5)
        assert (case.expired, case.ledger.is_expired, case.states()) == (0, False, "PSUP")
        await case.watched(2)
        assert (case.expired, case.ledger.is_expired, case.states()) == (1, True, "FSUF")
        assert case.errors == [("c0", "batch_expired"), ("c3", "batch_expired")]
        await case.watched(EXPIRY_GRACE_S - 3)
        assert (case.states(), case.cancelled) == ("FSUF", [])
        await case.watched(4)
        assert (case.expired, case.states()) == (1, "FFFF")
        assert case.cancelled == [IDS.job_id(case.index.digest(1), 0)]
        assert len([text for _, text in case.notes if "has expired (--expires-in)" in text]) == 1

    play(work, expires_s=10)


def test_ending_of_a_job_that_the_expired_run_has_cancelled_counts_once(play: Play) -> None:
    """It may come before its line fails: its line is not written a second time."""

    async def work(case: Case) -> None:
        case.ledger.begin([0, 1])
        case.on_publish = lambda: case.end(0, "cancelled")
        await case.watched(EXPIRY_GRACE_S + 2)
        assert sorted(case.errors) == [(f"c{number}", "batch_expired") for number in range(LINES)]

    play(work, expires_s=0)


def test_expired_run_that_is_complete_cancels_nothing(play: Play) -> None:
    """There is no job to cancel."""

    async def work(case: Case) -> None:
        await case.watched(EXPIRY_GRACE_S + 5)
        assert (case.states(), case.cancelled) == ("FFFF", [])

    play(work, expires_s=0)


# Lines without an ending


def test_cancellations_name_the_jobs_in_flight_in_their_round(play: Play) -> None:
    """Others cannot run. Without a job in flight, nothing is sent."""

    async def work(case: Case) -> None:
        case.on_publish = lambda: pytest.fail("nothing is in flight")
        await case.lines.cancel()
        case.on_publish = lambda: None
        case.index.set_round(2, 5)
        case.ledger.begin([0, 2])
        await case.lines.cancel()
        assert case.cancelled == [
            IDS.job_id(case.index.digest(0), 0),
            IDS.job_id(case.index.digest(2), 5),
        ]

    play(work)


def test_line_that_ends_while_its_custom_id_is_read_does_not_fail(play: Play) -> None:
    """Its own ending counts: text that was paid for is kept."""

    async def work(case: Case) -> None:
        case.ledger.begin([0])
        failing = asyncio.create_task(case.lines.fail("batch_cancelled", "m", *ANY_OPEN))
        await asyncio.sleep(0)
        case.end(0)
        await failing
        assert case.errors == [
            ("c0", "x"), *((f"c{number}", "batch_cancelled") for number in range(1, LINES))
        ]  # fmt: skip

    play(work)


def test_only_lines_in_the_given_states_fail(play: Play) -> None:
    """A line that is done stays as it is."""

    async def work(case: Case) -> None:
        case.ledger.begin([0, 1])
        case.end(0)
        case.index.set_state(2, State.UNKNOWN)
        await case.lines.fail("batch_x", "m", State.UNKNOWN)
        assert case.states() == "FSFP"
        assert case.errors == [("c0", "x"), ("c2", "batch_x")]

    play(work)
