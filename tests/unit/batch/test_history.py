"""What the topics say of a run's earlier starts, over a log in memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from streamworker.batch import topics as topics_module
from streamworker.batch.errors import RunRefused
from streamworker.batch.history import History
from streamworker.batch.identity import MAX_ROUND
from streamworker.batch.index import LineIndex, State
from streamworker.batch.lines import Fault, FaultCode
from streamworker.batch.messages import changes_text, count_of_lines, faults_text, unfinished_text
from streamworker.batch.record import InputFacts, RunRecord
from streamworker.batch.topics import RunTopics
from streamworker.config import Settings
from streamworker.kafka.partitioner import partition_of
from streamworker.model import TopicPartition
from tests.unit.batch.logs import IDS, LogInMemory, digest, job_id

LINES = 12


class Case:
    """An input of twelve lines, and a run that began at offset 0 of every partition."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log = LogInMemory({"jobs": 3, "results": 3})
        monkeypatch.setattr(topics_module, "LogScanner", lambda _: self.log)
        self.topics = RunTopics(Settings(topics={"results": "results"}), "jobs", "t")
        self.index = LineIndex()
        for number in range(LINES):
            self.index.add(digest(number), f"c{number}", (number + 1, 0, 1))
        facts = InputFacts(path="i", bytes=1, sha256="x")
        start = {name: {str(number): 0 for number in range(3)} for name in ("jobs", "results")}
        self.record = RunRecord(run="r", created=1, input=facts, topics={}, start=start)

    async def open(self) -> History:
        """Open the topics, and return their history."""
        await self.topics.open()
        return History(self.topics, self.index, IDS, self.record)

    def submit(self, *jobs: tuple[int, int]) -> None:
        """Write the jobs of lines, each in a round."""
        for line, round_ in jobs:
            key = job_id(line, round_)
            self.log.write("jobs", partition_of(key.encode(), 3), key, b"{}")

    def lose(self, topic: str, partition: int) -> None:
        """Delete the records of a partition, of which there is one at least."""
        at = TopicPartition(topic, partition)
        self.log.write(topic, partition, None, b"")
        self.log.first[at] = len(self.log.records[at])

    def lines(self, state: State) -> set[int]:
        """Return the lines in a state."""
        return set(self.index.lines_in(state))

    def lines_of(self, partition: int, round_: int = 0) -> set[int]:
        """Return the lines whose jobs belong to a partition."""
        return {line for line in range(LINES) if partition_of(job_id(line, round_).encode(), 3) == partition}


@pytest.fixture
async def case(monkeypatch: pytest.MonkeyPatch) -> Case:
    """Return an input and empty topics."""
    return Case(monkeypatch)


async def test_lines_whose_jobs_are_in_the_topic_are_submitted(case: Case) -> None:
    """Those of other runs, and of lines that the input does not have, are ignored."""
    case.submit((0, 0), (5, 0), (999, 0))
    case.log.write("jobs", 0, "b.other." + "0" * 32, b"{}")
    await (await case.open()).mark_submitted()

    assert case.lines(State.SUBMITTED) == {0, 5}
    assert len(case.lines(State.PENDING)) == LINES - 2


async def test_line_that_has_ended_stays_as_it_is(case: Case) -> None:
    """Its job is in the topic, and its line in a file."""
    case.submit((0, 2), (1, 2))
    case.index.set_state(0, State.COMPLETED)
    case.index.set_state(1, State.FAILED)
    await (await case.open()).mark_submitted()

    assert (case.index.state(0), case.index.state(1)) == (State.COMPLETED, State.FAILED)
    assert (case.index.round(0), case.index.round(1)) == (0, 0)


@pytest.mark.parametrize(
    ("now", "jobs", "state", "round_"),
    [
        (0, [0], State.SUBMITTED, 0),
        (0, [0, 2, 1], State.SUBMITTED, 2),
        (2, [0, 1], State.PENDING, 2),
        (2, [1, 2], State.SUBMITTED, 2),
        (2, [3], State.SUBMITTED, 3),
    ],
)
async def test_last_round_of_a_line_counts(
    case: Case, now: int, jobs: list[int], state: State, round_: int
) -> None:
    """In whichever order the partitions are read; a round before the present one says nothing of it."""
    case.index.set_round(0, now)
    case.submit(*((0, number) for number in jobs))
    await (await case.open()).mark_submitted()

    assert (case.index.state(0), case.index.round(0)) == (state, round_)


@pytest.mark.parametrize(
    ("used", "wanted", "expected"), [([], 1, 1), ([0], 1, 1), ([1], 1, 2), ([3, 1], 2, 4), ([1], 3, 3)]
)
async def test_round_of_a_named_run_follows_those_that_were_used(
    case: Case, used: list[int], wanted: int, expected: int
) -> None:
    """A finished start leaves no record, and its ids must not be used again."""
    case.submit(*((line, round_) for line, round_ in enumerate(used)))

    assert await (await case.open()).next_round(wanted) == expected
    assert case.lines(State.SUBMITTED) == set()


async def test_run_whose_rounds_are_spent_is_refused(case: Case) -> None:
    """The name can be used no further."""
    case.submit((0, MAX_ROUND))
    history = await case.open()
    with pytest.raises(RunRefused, match=f"the run r has had {MAX_ROUND} rounds .*: use another --batch-id"):
        await history.next_round(1)


async def test_lines_are_known_where_no_record_was_deleted(case: Case) -> None:
    """Offsets before the run's first start do not matter."""
    for number in range(3):
        case.lose("jobs", number)
    case.record = case.record.with_offsets("jobs", {0: 1, 1: 1, 2: 1})
    history = await case.open()
    await history.find_losses()

    assert history.mark_unknown() == 0
    assert len(case.lines(State.PENDING)) == LINES


@pytest.mark.parametrize(("topic", "state"), [("jobs", State.PENDING), ("results", State.SUBMITTED)])
async def test_lines_of_a_partition_that_lost_records_are_unknown(
    case: Case, topic: str, state: State
) -> None:
    """A pending one may have been submitted, a submitted one may have ended; the others are as they were."""
    for line in range(LINES):
        case.index.set_state(line, state)
    case.index.set_state(min(case.lines_of(1)), State.COMPLETED)
    case.lose(topic, 1)
    history = await case.open()
    await history.find_losses()
    unknown = case.lines_of(1) - {min(case.lines_of(1))}

    assert history.mark_unknown() == len(unknown) > 0
    assert case.lines(State.UNKNOWN) == unknown
    assert case.lines(state) == set(range(LINES)) - case.lines_of(1)


@pytest.mark.parametrize(("topic", "state"), [("jobs", State.SUBMITTED), ("results", State.PENDING)])
async def test_loss_in_one_topic_does_not_matter_to_lines_of_the_other(
    case: Case, topic: str, state: State
) -> None:
    """A line that is known to be submitted needs no job record, one that is not has no ending."""
    for line in range(LINES):
        case.index.set_state(line, state)
    for number in range(3):
        case.lose(topic, number)
    history = await case.open()
    await history.find_losses()

    assert history.mark_unknown() == 0


async def test_unknown_lines_are_submitted_again_under_other_ids(case: Case) -> None:
    """The next round, as far as there is one."""
    for line, round_ in ((0, 0), (1, 4), (2, MAX_ROUND)):
        case.index.set_state(line, State.UNKNOWN)
        case.index.set_round(line, round_)
    (await case.open()).resubmit_unknown()

    assert case.lines(State.UNKNOWN) == set()
    assert [case.index.round(line) for line in range(4)] == [1, 5, MAX_ROUND, 0]


# Texts


@pytest.mark.parametrize(
    ("states", "reason", "text"),
    [
        ({}, "", "0 of 12 lines are done, 12 are not submitted; run the same command again to go on"),
        (
            {State.COMPLETED: 5, State.FAILED: 5, State.SUBMITTED: 2},
            "interrupted",
            "interrupted: 10 of 12 lines are done, 2 are in flight and go on; run the same command again to go on",
        ),
        (
            {State.COMPLETED: 10, State.UNKNOWN: 2},
            "",
            (
                "10 of 12 lines are done; of 2 nothing is known, because retention has deleted their records (line 11, 12): "
                "they may have been paid for; --resubmit-unknown runs them again"
            ),
        ),
    ],
)
def test_text_of_a_run_that_has_stopped(states: dict[State, int], reason: str, text: str) -> None:
    """What is done, what goes on, and how to continue."""
    index = LineIndex()
    left = [state for state, count in states.items() for _ in range(count)]
    for number in range(LINES):
        line = index.add(digest(number), f"c{number}", (number + 1, 0, 1))
        index.set_state(line, left[line] if line < len(left) else State.PENDING)

    assert unfinished_text(index, reason) == text


def test_text_names_the_first_twenty_unknown_lines() -> None:
    """A message has a limited length."""
    index = LineIndex()
    for number in range(1500):
        index.set_state(index.add(digest(number), "c", (number + 1, 0, 1)), State.UNKNOWN)
    text = unfinished_text(index, "")

    assert "0 of 1,500 lines are done; of 1,500 nothing is known" in text
    assert text.count(", ") == 1 + 20
    assert "19, 20, ...)" in text


@pytest.mark.parametrize(
    ("faulty", "shown", "text"),
    [
        (1, 1, "i.jsonl: 1 line is not valid; nothing was sent\n  line 5: invalid_url: m\ncorrect them"),
        (2, 2, "  line 5: invalid_url: m\n  line 5: invalid_url: m\ncorrect them"),
        (1002, 2, "i.jsonl: 1,002 lines are not valid; nothing was sent"),
        (1002, 2, "  line 5: invalid_url: m\n  and 1,000 more\ncorrect them"),
    ],
)
def test_text_of_faulty_lines(faulty: int, shown: int, text: str) -> None:
    """The first ones with their codes, and the number of the others, if there are any."""
    intake: Any = SimpleNamespace(
        faulty=faulty, faults=[(5, Fault(FaultCode.INVALID_URL, "m", None))] * shown
    )

    assert text in faults_text("i.jsonl", intake)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (1, "i.jsonl: 1 line is done, and edited since (line 7); nothing was sent"),
        (2, "i.jsonl: 2 lines are done, and edited since (line 7, 7); nothing was sent"),
        (
            1500,
            "i.jsonl: 1,500 lines are done, and edited since (line 7, 7, and 1,498 more); nothing was sent",
        ),
    ],
)
def test_text_of_edited_lines(changes: int, text: str) -> None:
    """With both ways to go on."""
    restore: Any = SimpleNamespace(changes=changes, changed=[7] * min(changes, 2))
    said = changes_text("i.jsonl", restore)

    assert said.startswith(text)
    assert "--changed rerun" in said
    assert "--changed keep" in said


def test_text_of_edited_lines_names_them_in_the_order_of_the_input() -> None:
    """The output file, from which they are read, has another order."""
    restore: Any = SimpleNamespace(changes=3, changed=[11, 2, 7])

    assert "(line 2, 7, 11)" in changes_text("i.jsonl", restore)


@pytest.mark.parametrize(("count", "text"), [(0, "0 lines are"), (1, "1 line is"), (2000, "2,000 lines are")])
def test_number_of_lines_has_its_verb(count: int, text: str) -> None:
    """One is not many."""
    assert count_of_lines(count) == text
