"""The hand-over: each subscriber gets what `EventReader` gives for the topic with its committed terminal events."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from streamworker.handover import Delivery, Handover, Kind, read_head
from streamworker.reader import EventReader, Notice

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(kw_only=True)
class Entry:
    """One record of the partition. `value` is None for records of other jobs and for transaction markers."""

    value: bytes | None = None
    is_aborted: bool = False
    ends_at: int | None = None
    """The offset of its transaction's marker; None outside of transactions."""

    @property
    def event(self) -> dict[str, Any]:
        assert self.value is not None
        event: dict[str, Any] = json.loads(self.value)
        return event


@dataclass
class Log:
    """A partition, written entry by entry, and the transactions that are open in it."""

    entries: list[Entry] = field(default_factory=list)
    open: dict[str, list[Entry]] = field(default_factory=dict)

    def write(self, transaction: str | None = None, **event: Any) -> None:
        value = json.dumps({"v": 1, "job_id": "j", "ts": 0, **event}).encode() if event else None
        entry = Entry(value=value)
        self.entries.append(entry)
        if transaction is not None:
            self.open.setdefault(transaction, []).append(entry)

    def end(self, transaction: str, *, is_aborted: bool = False) -> None:
        for entry in self.open.pop(transaction, ()):
            entry.ends_at, entry.is_aborted = len(self.entries), is_aborted
        self.entries.append(Entry())

    def stable(self, length: int) -> int:
        """Return the last stable offset when the log had this length."""
        open_ = [at for at, entry in enumerate(self.entries[:length]) if (entry.ends_at or -1) >= length]
        return min(open_, default=length)


@st.composite
def logs(draw: st.DrawFn, *, reruns: bool) -> Log:
    """Draw the history of one job, with zombies, rolled back terminal events and strangers' transactions.

    With `reruns`, a job that failed may be run again.
    """
    log, number, ended = Log(), 0, ""
    _some_noise(draw, log)
    while number < 5 and not (ended and (ended == "completed" or not reruns or draw(st.booleans()))):
        number += 1
        is_new = number == 1 or bool(ended)
        cause = "new" if is_new else draw(st.sampled_from(["new", "redelivered", "restart"]))
        ended = _run_attempt(draw, log, number, cause)
    for name in list(log.open):
        log.end(name)
    _some_noise(draw, log)
    return log


def _run_attempt(draw: st.DrawFn, log: Log, number: int, cause: str) -> str:
    """Write one attempt; return the status of its committed terminal event, or an empty string."""
    attempt, zombie = f"a{number}", f"a{number - 1}" if number > 1 else ""
    log.write("ours", type="started", attempt=attempt, seq=0, cause=cause)
    if draw(st.integers(0, 9)) == 9:  # its transaction is rolled back; deltas wait for it, so there are none
        _noise(draw, log)
        log.end("ours", is_aborted=True)
        return ""
    if draw(st.booleans()):
        log.end("ours")
    deltas = draw(st.integers(0, 4))
    for seq in range(1, deltas + 1):
        log.write(type="delta", attempt=attempt, seq=seq)
        if draw(st.booleans()):
            _noise(draw, log, zombie)
    if "ours" in log.open:
        log.end("ours")
    if draw(st.integers(0, 3)) == 3:
        return ""
    status: str = draw(st.sampled_from(["completed", "failed"]))
    log.write("ours", type="usage", attempt=attempt, seq=deltas + 1, status=status)
    _some_noise(draw, log, zombie)
    is_aborted = draw(st.booleans())
    log.end("ours", is_aborted=is_aborted)
    return "" if is_aborted else status


def _some_noise(draw: st.DrawFn, log: Log, zombie: str = "") -> None:
    for _ in range(draw(st.integers(0, 3))):
        _noise(draw, log, zombie)


def _noise(draw: st.DrawFn, log: Log, zombie: str = "") -> None:
    match draw(st.integers(0, 4)):
        case 4:
            log.write("stranger")
        case 3 if "stranger" in log.open:
            log.end("stranger", is_aborted=draw(st.booleans()))
        case 2 if zombie:
            log.write(type="delta", attempt=zombie, seq=draw(st.integers(1, 9)))
        case _:
            log.write()


Steps = list[tuple[str, int]]

STEPS = st.lists(st.tuples(st.sampled_from(["grow", "tail", "committed"]), st.integers(1, 8)), max_size=40)
"""What happens: the log grows by a number of records, or a reader reads at most a number of them."""


class Readers:
    """The tail and the committed reader of one process, with a subscriber."""

    def __init__(self, log: Log, steps: Steps) -> None:
        self.log = log
        self.length = self.tail = self.committed = 0
        self.subscriber: Handover | None = None
        self.delivered: list[Delivery] = []
        self._steps = iter(steps)

    def step(self) -> bool:
        """Let the log grow, or one of the readers read some of it; return whether there was a step left."""
        kind, count = next(self._steps, ("", 0))
        match kind:
            case "grow":
                self.length = min(len(self.log.entries), self.length + count)
            case "tail":
                self._read_tail(min(self.length, self.tail + count))
            case "committed":
                self._read_committed(min(self.log.stable(self.length), self.committed + count))
        self._take()
        return bool(kind)

    def finish(self) -> None:
        """Take all steps that are left; then let both readers read to the end."""
        while self.step():
            pass
        self.length = len(self.log.entries)
        self._read_tail(self.length)
        self._read_committed(self.length)
        self._take()

    def _read_tail(self, to: int) -> None:
        for offset in range(self.tail, to):
            if (value := self.log.entries[offset].value) is not None and self.subscriber is not None:
                self._give(self.subscriber.tail, offset, value)
        self.tail = max(self.tail, to)
        if self.subscriber is not None:
            self.subscriber.passed(tail=self.tail)

    def _read_committed(self, to: int) -> None:
        for offset in range(self.committed, to):
            entry = self.log.entries[offset]
            if entry.value is not None and not entry.is_aborted and self.subscriber is not None:
                self._give(self.subscriber.committed, offset, entry.value)
        self.committed = max(self.committed, to)
        if self.subscriber is not None:
            self.subscriber.passed(committed=self.committed)

    def _give(self, feed: Any, offset: int, value: bytes) -> None:
        head = read_head(value)
        assert head is not None
        feed(offset, head, value)

    def _take(self) -> None:
        while self.subscriber is not None and (delivery := self.subscriber.take()) is not None:
            self.delivered.append(delivery)

    def join_live(self) -> None:
        """Subscribe at the readers' positions."""
        self.subscriber = Handover(tail=self.tail, committed=self.committed)

    def join_late(self) -> None:
        """Replay the log from its beginning, while the readers go on: one step after each record."""
        subscriber = self.subscriber = Handover(tail=0, committed=self.committed, is_replaying=True)
        stop_committed, stop = self.committed, self.tail
        for offset in range(stop_committed):
            entry = self.log.entries[offset]
            if entry.value is not None and not entry.is_aborted:
                self._give(subscriber.replayed_committed, offset, entry.value)
            self.step()
        for offset in range(stop_committed, stop):
            if (value := self.log.entries[offset].value) is not None:
                self._give(subscriber.replayed, offset, value)
            self.step()
        subscriber.caught_up(tail=self.tail, committed=self.committed)
        self._take()


def valid(log: Log) -> Iterator[tuple[Kind, int]]:
    """Yield what `EventReader` gives for the topic whose aborted terminal events are left out, to the first end."""
    reader, is_first = EventReader(), True
    for offset, entry in enumerate(log.entries):
        if entry.value is None or (entry.is_aborted and entry.event["type"] == "usage"):
            continue
        event = entry.event
        for reading in reader.read(event):
            if reading.notice is not Notice.VALID:
                continue
            if event["type"] == "started":
                yield (Kind.STARTED if is_first else Kind.RESTARTED), offset
                is_first = False
            else:
                yield (Kind.ENDED if event["type"] == "usage" else Kind.DELTA), offset
            if event["type"] == "usage":
                return


def last_attempt(deliveries: list[tuple[Kind, int]]) -> list[int]:
    """Return the offsets from the last `started` on."""
    begins = [at for at, (kind, _) in enumerate(deliveries) if kind in {Kind.STARTED, Kind.RESTARTED}]
    return [offset for _, offset in deliveries[begins[-1] if begins else 0 :]]


@settings(max_examples=100)
@given(logs(reruns=True), STEPS)
def test_handover_live_subscriber_gets_what_the_event_reader_gives(log: Log, steps: Steps) -> None:
    """For any interleaving of the two readers, with zombies, restarts, rolled back and repeated endings."""
    readers = Readers(log, steps)
    readers.join_live()
    readers.finish()

    assert [(one.kind, one.offset) for one in readers.delivered] == list(valid(log))
    assert readers.subscriber is not None
    assert readers.subscriber.queued_bytes == 0


@settings(max_examples=100)
@given(logs(reruns=False), STEPS, STEPS)
def test_handover_late_subscriber_has_the_valid_attempt_in_the_end(
    log: Log, before: Steps, after: Steps
) -> None:
    """A replay and the live records join without gap and without repetition, wherever the subscriber joins."""
    readers = joined_late(log, before, after)

    offsets = [one.offset for one in readers.delivered]
    assert offsets == sorted(set(offsets))
    assert last_attempt([(one.kind, one.offset) for one in readers.delivered]) == last_attempt(
        list(valid(log))
    )


@settings(max_examples=100)
@given(logs(reruns=True), STEPS, STEPS)
def test_handover_late_subscriber_of_repeated_runs_ends_with_a_whole_one(
    log: Log, before: Steps, after: Steps
) -> None:
    """If the job had several runs, the events from the last `started` to the end are those of one of them."""
    readers = joined_late(log, before, after)

    ends = [offset for offset, entry in enumerate(log.entries) if _is_committed_end(entry)]
    begins = [at for at, entry in enumerate(log.entries) if entry.value and entry.event["type"] == "started"]
    end = readers.delivered[-1]
    if end.kind is not Kind.ENDED:
        assert max(begins) > max(ends, default=-1)
        return
    assert (end.kind, end.offset in ends, end.is_whole) == (Kind.ENDED, True, True)
    attempt = log.entries[end.offset].event["attempt"]
    of_run = [
        offset
        for offset, entry in enumerate(log.entries[: end.offset + 1])
        if entry.value and entry.event["attempt"] == attempt
    ]
    assert last_attempt([(one.kind, one.offset) for one in readers.delivered]) == of_run


def joined_late(log: Log, before: Steps, after: Steps) -> Readers:
    """Let the readers read, join, and let them read to the end."""
    readers = Readers(log, [*before, *after])
    for _ in before:
        readers.step()
    readers.join_late()
    readers.finish()
    return readers


def _is_committed_end(entry: Entry) -> bool:
    return entry.value is not None and entry.event["type"] == "usage" and not entry.is_aborted
