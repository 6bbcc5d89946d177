"""The offset tracker against a model that remembers everything, over rebalances, crashes and gaps."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from streamworker.progress.tracker import OffsetTracker
from tests.properties.work import work_of


class TopicPartition(RuleBasedStateMachine):
    """A log with gaps, a consumer that may crash, and the jobs that really finished."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[int] = []
        self.end = 0
        self.done: set[int] = set()  # as far as the present owner can know
        self.open: set[int] = set()
        self.committed: tuple[int, frozenset[int]] = (0, frozenset())
        self.next = 0  # index into the log
        self.tracker = OffsetTracker(0)
        self.position = 0

    @rule(gaps=st.lists(st.sampled_from([0, 0, 0, 1, 5]), min_size=1, max_size=5))
    def append(self, gaps: list[int]) -> None:
        """Append records; compaction and markers leave gaps."""
        for gap in gaps:
            self.log.append(self.end + gap)
            self.end += gap + 1

    @precondition(lambda self: self.next < len(self.log))
    @rule()
    def deliver(self) -> None:
        """Take the next record: it is run if, and only if, it is not finished."""
        offset = self.log[self.next]
        self.next += 1
        is_new = self.tracker.begin(offset)
        assert is_new is (offset not in self.done and offset not in self.open)
        if is_new:
            self.open.add(offset)

    @precondition(lambda self: self.next > 0)
    @rule(back=st.integers(1, 5))
    def rewind(self, back: int) -> None:
        """Deliver records again, as a rebalance does for a kept partition."""
        first = next(
            (n for n, offset in enumerate(self.log) if offset >= self.tracker.position), len(self.log)
        )
        self.next = max(self.next - back, min(first, self.next))

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        """Return some open records and read again from the position, as a partition does that stays after all."""
        returned = set(data.draw(st.lists(st.sampled_from(sorted(self.open))))) if self.open else set()
        self.tracker.give_back(returned)
        self.open -= returned
        self.next = next(
            (n for n, offset in enumerate(self.log) if offset >= self.tracker.position), len(self.log)
        )

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """Finish any open record."""
        offset = data.draw(st.sampled_from(sorted(self.open)))
        self.open.remove(offset)
        self.tracker.finish(offset)
        self.done.add(offset)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def finish_together(self, data: st.DataObject) -> None:
        """A commit knows beforehand what it will have finished, and changes nothing if it is refused."""
        offsets = data.draw(st.lists(st.sampled_from(sorted(self.open)), min_size=1, unique=True))
        before = self.tracker.position, self.tracker.finished_beyond
        after = self.tracker.after(offsets)
        assert (self.tracker.position, self.tracker.finished_beyond) == before
        if data.draw(st.booleans(), label="accepted"):
            for offset in offsets:
                self.tracker.finish(offset)
            self.open -= set(offsets)
            self.done |= set(offsets)
            assert (self.tracker.position, self.tracker.finished_beyond) == after

    @rule()
    def commit(self) -> None:
        """Commit."""
        assert self.tracker.position >= self.committed[0]
        self.committed = self.tracker.position, self.tracker.finished_beyond

    @rule()
    def restart(self) -> None:
        """Restart from the last commit; later ends are forgotten."""
        position, beyond = self.committed
        self.tracker = OffsetTracker(position, finished=beyond)
        self.done = {offset for offset in self.log if offset < position or offset in beyond}
        self.open.clear()
        self.next = next((n for n, offset in enumerate(self.log) if offset >= position), len(self.log))
        self.position = position

    @invariant()
    def position_never_passes_what_is_owed(self) -> None:
        """Every offset below the position is finished: a restart skips no job."""
        assert all(offset in self.done for offset in self.log if offset < self.tracker.position)
        assert all(offset >= self.tracker.position for offset in self.open)

    @invariant()
    def position_never_goes_back(self) -> None:
        """The position never moves back."""
        assert self.tracker.position >= self.position
        self.position = self.tracker.position

    @invariant()
    def what_is_finished_is_known(self) -> None:
        """Position and finished offsets beyond it are exactly the finished jobs: no job is run again."""
        position, beyond = self.tracker.position, self.tracker.finished_beyond
        assert beyond == {offset for offset in self.done if offset >= position}
        assert all(self.tracker.is_finished(offset) is (offset in self.done) for offset in self.log)
        assert self.tracker.incomplete == len(self.open)

    @invariant()
    def position_does_not_lag(self) -> None:
        """Without open records the position is behind every delivered one."""
        if not self.open and self.next and self.log[self.next - 1] in self.done:
            assert self.tracker.position > self.log[self.next - 1]


TopicPartition.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestPartition = TopicPartition.TestCase


def test_tracker_twice_the_offsets_are_twice_the_work() -> None:
    """The position moves in many small steps over many finished offsets and visits each once."""

    def delivery(size: int) -> int:
        tracker = OffsetTracker(0)
        for offset in range(size):
            tracker.begin(offset)
        for offset in range(1, size, 2):
            tracker.finish(offset)

        def move_on() -> None:
            for offset in range(0, size, 2):
                tracker.finish(offset)

        work = work_of(move_on)
        assert tracker.position == size
        return work

    assert delivery(2000) <= 2.2 * delivery(1000)
