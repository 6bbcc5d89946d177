"""Recent records in memory: ranges without holes, fates of terminal events, bounds."""

from __future__ import annotations

from typing import NamedTuple

from streamworker.gateway.history import BLOCK_BYTES, RECORD_OVERHEAD, Block, History
from streamworker.gateway.mailbox import Fate, Mailbox, Opening
from tests.integration.events import delta, ended, started


class Record(NamedTuple):
    offset: int
    value: bytes | None
    key: bytes | None = b"j"


def records(begin: int, end: int, value: bytes = b"{}", key: bytes = b"j") -> list[Record]:
    return [Record(offset, value, key) for offset in range(begin, end)]


def block(begin: int, end: int, partition: int = 0) -> Block:
    made = Block(partition, begin)
    made.add(records(begin, end), end)
    return made


def test_history_covers_what_the_tail_returned_and_nothing_between() -> None:
    """A partition that was paused has a gap."""
    history = History()
    history.extend(0, 5, 10, records(5, 10))
    history.extend(0, 10, 12, ())
    history.extend(0, 20, 21, records(20, 21))

    covered = [offset for offset in range(30) if history.at(0, offset) is not None]
    assert covered == [*range(5, 12), 20]
    assert history.at(1, 5) is None
    assert [history.next_begin(0, offset) for offset in (0, 5, 19, 20)] == [5, 20, 20, None]


def test_history_small_batches_share_a_block_and_large_ones_do_not() -> None:
    """So that many small batches cost no block each."""
    history = History()
    for offset in range(100):
        history.extend(0, offset, offset + 1, records(offset, offset + 1))
    assert len(list(history)) == 1
    history.extend(0, 100, 101, [Record(100, b"x" * BLOCK_BYTES)])
    history.extend(0, 101, 102, records(101, 102))
    assert [one.begin for one in history] == [0, 101]


def test_history_drops_the_oldest_blocks_beyond_its_limit() -> None:
    """The newest one stays, even if it is too large alone."""
    history = History(limit_bytes=20 * RECORD_OVERHEAD + 10_000)
    for at in range(10):
        history.insert(block(at * 10, at * 10 + 10, partition=at % 2))
    assert history.size <= 20 * RECORD_OVERHEAD + 10_000
    assert history.at(0, 0) is None
    assert history.at(1, 90) is not None
    history.insert(block(1000, 2000))
    assert [one.begin for one in history] == [1000]
    assert history.size == next(iter(history)).size


def test_history_keeps_no_range_twice() -> None:
    """A scan and the tail, or two scans, may return the same records."""
    history = History()
    history.insert(block(10, 20))
    for begin, end in ((10, 20), (5, 11), (19, 30), (12, 13), (7, 7)):
        history.insert(block(begin, end))
    assert [(one.begin, one.end) for one in history] == [(10, 20)]
    history.insert(block(5, 10))
    history.insert(block(20, 22))
    assert [history.at(0, offset) is not None for offset in (5, 9, 10, 21, 22)] == [True] * 4 + [False]


def test_history_fate_of_a_terminal_event_is_known_when_the_committed_reader_has_passed_it() -> None:
    """Reported, not reported, or not passed."""
    history = History()
    end = ended("j", 1)
    history.extend(0, 0, 4, [Record(offset, end) for offset in range(4)])
    history.note_committed(0, 1)
    kept = history.at(0, 0)
    assert kept is not None
    fates = [kept.fate(offset, end, 3) for offset in range(4)]
    assert fates == [Fate.ABORTED, Fate.FINAL, Fate.ABORTED, Fate.OPEN]
    assert kept.fate(0, delta("j", 1), 3) is Fate.FINAL
    assert kept.fate(0, None, 3) is Fate.FINAL


def test_history_remembers_endings_that_the_committed_reader_reports_before_the_tail() -> None:
    """The two readers are independent connections."""
    history = History()
    history.note_committed(0, 1)
    history.extend(0, 0, 1, records(0, 1))
    history.note_committed(0, 2)
    last = history.extend(0, 1, 3, [Record(1, ended("j", 1)), Record(2, ended("j", 1))])

    assert last.committed == {1, 2}
    assert history._early[0] == set()


def test_history_forgets_what_is_undecided_when_a_partition_is_paused() -> None:
    """When it is read again, the committed reader begins later and does not report it."""
    history = History()
    history.insert(block(0, 5))
    history.insert(block(5, 9))
    history.note_committed(0, 20)
    history.drop_undecided(0, 7)
    assert [one.begin for one in history] == [0]
    assert 0 not in history._early
    history.drop(0)
    assert history.size == 0
    assert history.at(0, 0) is None


def test_history_replays_a_mailbox_as_far_as_it_reaches() -> None:
    """Through several blocks, until the first hole."""
    history = History()
    history.extend(0, 0, 2, [Record(0, started("j")), Record(1, b"{}", b"other")])
    blocks = Block(0, 2)
    blocks.add([Record(2, delta("j", 1))], 5)
    history.insert(blocks)
    mailbox = Mailbox("j", 0, 0, committed=100)
    history.replay(mailbox, 100)

    assert mailbox.position == 5
    assert mailbox.opening is Opening.FOUND
    offsets = []
    while (taken := mailbox.take()) is not None:
        offsets.append(taken.offset)
    assert offsets == [0, 2]


def test_history_replay_stops_where_a_mailbox_is_full() -> None:
    """Within a block; and goes on from there."""
    history = History()
    values = [started("j"), *[delta("j", seq) for seq in range(1, 10)]]
    history.extend(0, 0, 10, [Record(at, value) for at, value in enumerate(values)])
    mailbox = Mailbox("j", 0, 0, committed=100, limit_bytes=1000)
    taken = []
    while mailbox.position < 10:
        history.replay(mailbox, 100)
        assert mailbox.queued_bytes < 1500
        while (delivery := mailbox.take()) is not None:
            taken.append(delivery.offset)
    assert taken == list(range(10))


def test_block_finds_the_records_of_a_key_in_their_order() -> None:
    """Added in one batch or in several; a record may have no key and no value."""
    made = Block(0, 0)
    made.add([Record(0, b"a"), Record(1, b"b", b"other"), Record(2, None), Record(3, b"c", None)], 4)
    made.add([Record(4, b"d"), Record(6, b"e", b"other")], 7)

    assert made.of_key(b"j") == [(0, b"a"), (2, None), (4, b"d")]
    assert made.of_key(b"other") == [(1, b"b"), (6, b"e")]
    assert made.of_key(b"unknown") == []
    assert (made.begin, made.end) == (0, 7)
