"""The mailbox: the place it begins at, its bound, and its way between replay and live."""

from __future__ import annotations

import pytest

from streamworker.gateway.cursors import Cursor, attempt8
from streamworker.gateway.mailbox import Fate, Mailbox, Opening
from streamworker.handover import Kind, read_head
from tests.integration.events import delta, ended, started

FINAL, ABORTED, OPEN = Fate.FINAL, Fate.ABORTED, Fate.OPEN
A = attempt8("a")


def tail(mailbox: Mailbox, offset: int, value: bytes) -> None:
    head = read_head(value)
    assert head is not None
    mailbox.tail(offset, head, value)


def taken(mailbox: Mailbox) -> list[tuple[int, Kind]]:
    found = []
    while (delivery := mailbox.take()) is not None:
        found.append((delivery.offset, delivery.kind))
    return found


def test_mailbox_behind_a_cursor_delivers_what_follows_its_event() -> None:
    """The event itself is compared and not delivered."""
    mailbox = Mailbox("j", 0, 5, committed=100, cursor=Cursor(0, 5, 1, A))
    assert mailbox.needs_its_record
    mailbox.replay(5, delta("j", 1), FINAL)
    assert mailbox.opening is Opening.FOUND
    assert not mailbox.needs_its_record
    mailbox.replay(6, delta("j", 1), FINAL)  # was delivered before
    mailbox.replay(7, delta("j", 2), FINAL)
    mailbox.replay(8, ended("j", 3), FINAL)
    assert (mailbox.has_ready, mailbox.next_kind) == (True, Kind.DELTA)
    assert taken(mailbox) == [(7, Kind.DELTA), (8, Kind.ENDED)]
    assert (mailbox.has_ready, mailbox.next_kind) == (False, None)
    assert mailbox.is_over
    assert mailbox.is_stopped
    assert not mailbox.wants_records


@pytest.mark.parametrize(
    ("offset", "value"),
    [(5, delta("j", 2)), (5, started("j")), (5, ended("j", 1)), (6, delta("j", 1))],
)
def test_mailbox_behind_a_cursor_whose_event_is_another_one_is_lost(offset: int, value: bytes) -> None:
    """Another number or type at the offset, or nothing there."""
    mailbox = Mailbox("j", 0, 5, committed=100, cursor=Cursor(0, 5, 1, A))
    mailbox.replay(offset, value, FINAL)
    assert mailbox.opening is Opening.LOST
    assert not mailbox.wants_records
    assert taken(mailbox) == []


def test_mailbox_behind_a_cursor_at_whose_offset_the_job_has_nothing_is_lost() -> None:
    """The record there belongs to another job, or retention deleted it."""
    mailbox = Mailbox("j", 0, 5, committed=100, cursor=Cursor(0, 5, 1, A))
    mailbox.passed(5)
    assert mailbox.wants_records
    mailbox.passed(6)
    assert mailbox.opening is Opening.LOST


def test_mailbox_of_a_search_begins_with_started_or_with_the_end_of_a_rejected_job() -> None:
    """Anything else means that the search began too late."""
    for value, opening in (
        (started("j"), Opening.FOUND),
        (ended("j", 0), Opening.FOUND),
        (delta("j", 1), Opening.UNOPENED),
        (delta("j", 0), Opening.UNOPENED),
        (ended("j", 1), Opening.UNOPENED),
    ):
        mailbox = Mailbox("j", 0, 0, committed=100)
        assert not mailbox.needs_its_record
        mailbox.replay(0, value, FINAL)
        assert mailbox.opening is opening
        assert mailbox.has_ready is (opening is Opening.FOUND)


def test_mailbox_of_a_search_ignores_the_rolled_back_end_of_a_rejected_job() -> None:
    """And values that are not events."""
    mailbox = Mailbox("j", 0, 0, committed=100)
    mailbox.replay(0, ended("j", 0), ABORTED)
    mailbox.replay(1, None, FINAL)
    mailbox.replay(2, b"{}", FINAL)
    assert mailbox.opening is Opening.PENDING
    mailbox.replay(3, started("j"), FINAL)
    assert taken(mailbox) == [(3, Kind.STARTED)]


def test_mailbox_replays_of_a_rolled_back_transaction_all_but_the_ending() -> None:
    """The attempt was read when it was open, and its deltas are valid; whether it ended is not."""
    mailbox = Mailbox("j", 0, 0, committed=100)
    mailbox.replay(0, started("j"), ABORTED)
    assert mailbox.opening is Opening.FOUND
    mailbox.replay(1, delta("j", 1), ABORTED)
    mailbox.replay(2, ended("j", 2), ABORTED)
    mailbox.replay(3, delta("j", 2), FINAL)
    mailbox.replay(4, ended("j", 3), FINAL)
    assert taken(mailbox) == [(0, Kind.STARTED), (1, Kind.DELTA), (3, Kind.DELTA), (4, Kind.ENDED)]


def test_mailbox_counts_every_offset_of_its_replay_once() -> None:
    """Positions only grow; without a limit the search goes on."""
    mailbox = Mailbox("j", 0, 10, committed=100)
    for position in (10, 13, 13, 11, 1000):
        mailbox.passed(position)
    assert (mailbox.position, mailbox.scanned) == (1000, 990)
    assert mailbox.opening is Opening.PENDING
    assert mailbox.wants_records


def test_mailbox_wants_records_from_half_of_its_limit_on() -> None:
    """What is queued may reach the limit, not exceed it: the replay stops, and goes on when half of that is taken."""
    record = delta("j", 1)
    size = len(record) + 200
    mailbox = Mailbox("j", 0, 0, committed=100, limit_bytes=len(started("j")) + 200 + 3 * size)
    mailbox.replay(0, started("j"), FINAL)
    for seq in (1, 2, 3):
        assert not mailbox.is_stopped
        mailbox.replay(seq, delta("j", seq), FINAL)
    assert mailbox.queued_bytes == mailbox.limit_bytes
    assert (mailbox.is_stopped, mailbox.wants_records) == (False, False)
    mailbox.replay(4, delta("j", 4), FINAL)
    assert mailbox.is_stopped
    while mailbox.queued_bytes > mailbox.limit_bytes // 2:
        assert not mailbox.wants_records
        mailbox.take()
    assert mailbox.wants_records
    mailbox.join(tail=5, committed=100)
    assert not mailbox.wants_records


def test_mailbox_at_exactly_half_of_its_limit_wants_records() -> None:
    """The bound itself is allowed."""
    sizes = [len(started("j")) + 200, len(delta("j", 1)) + 200]
    for excess in (0, 1):
        mailbox = Mailbox("j", 0, 0, committed=100, limit_bytes=2 * sum(sizes) - excess)
        mailbox.replay(0, started("j"), FINAL)
        mailbox.replay(1, delta("j", 1), FINAL)
        assert mailbox.wants_records is (excess == 0)


def test_mailbox_leaves_the_live_path_at_a_shared_limit() -> None:
    """The limit that mailboxes share is asked with what is queued here."""
    mailbox = Mailbox("j", 0, 0, committed=0)
    asked: list[int] = []

    def is_second(queued: int) -> bool:
        asked.append(queued)
        return len(asked) == 2

    mailbox.limit_reached = is_second
    mailbox.join(tail=0, committed=0)
    tail(mailbox, 0, started("j"))
    assert (mailbox.is_live, mailbox.has_left) == (True, False)
    tail(mailbox, 1, delta("j", 1))
    assert (mailbox.is_live, mailbox.has_left, mailbox.position) == (False, True, 2)
    assert asked == [len(started("j")) + 200, len(started("j")) + len(delta("j", 1)) + 400]


def test_mailbox_lets_the_next_deltas_pass_only_while_it_is_live_and_empty() -> None:
    """Otherwise they would overtake what is queued."""
    mailbox = Mailbox("j", 0, 0, committed=0)
    assert mailbox.direct() is None
    mailbox.join(tail=0, committed=0)
    assert mailbox.direct() is not None
    tail(mailbox, 0, started("j"))
    assert mailbox.direct() is None
    mailbox.take()
    assert mailbox.direct() is not None


def test_mailbox_search_ends_at_its_limit() -> None:
    """Unless the first event was found before."""
    spent, found = (Mailbox("j", 0, 0, committed=100, scan_limit=10) for _ in range(2))
    spent.passed(10)
    assert spent.wants_records
    spent.passed(11)
    assert spent.opening is Opening.SPENT
    found.replay(3, started("j"), FINAL)
    found.passed(50)
    assert found.opening is Opening.FOUND
    assert found.scanned == 50


def test_mailbox_that_joins_without_an_event_is_empty_and_live() -> None:
    """The job is in the queue."""
    mailbox = Mailbox("j", 0, 3, committed=3)
    mailbox.join(tail=9, committed=3)
    assert (mailbox.opening, mailbox.is_live) == (Opening.EMPTY, True)
    tail(mailbox, 9, started("j"))
    assert taken(mailbox) == [(9, Kind.STARTED)]


def test_mailbox_that_is_full_leaves_the_live_path_and_is_replayed_from_there() -> None:
    """It keeps what can be taken; the rest is in the log."""
    mailbox = Mailbox("j", 0, 0, committed=0, limit_bytes=1000)
    mailbox.join(tail=0, committed=0)
    tail(mailbox, 0, started("j"))
    for seq in range(1, 9):
        if mailbox.is_live:
            tail(mailbox, seq, delta("j", seq))
    assert not mailbox.is_live
    assert mailbox.has_left
    assert not mailbox.wants_records
    assert mailbox.queued_bytes <= 1500
    first = taken(mailbox)
    assert mailbox.wants_records
    assert mailbox.position == first[-1][0] + 1
    for offset in range(mailbox.position, 9):
        mailbox.replay(offset, delta("j", offset), OPEN)
        mailbox.passed(offset + 1)
        first += taken(mailbox)
    mailbox.join(tail=9, committed=0)
    tail(mailbox, 9, delta("j", 9))
    assert [offset for offset, _ in first + taken(mailbox)] == list(range(10))


def test_mailbox_undecided_ending_of_a_replay_waits_for_the_committed_reader() -> None:
    """And is dropped if that passes it without a report."""
    for is_committed in (True, False):
        mailbox = Mailbox("j", 0, 0, committed=0)
        mailbox.replay(0, started("j"), OPEN)
        mailbox.replay(1, ended("j", 1), OPEN)
        mailbox.passed(2)
        mailbox.join(tail=2, committed=0)
        assert taken(mailbox) == [(0, Kind.STARTED)]
        tail(mailbox, 2, delta("j", 2))
        assert mailbox.is_waiting
        if is_committed:
            head = read_head(ended("j", 1))
            assert head is not None
            mailbox.committed(1, head, ended("j", 1))
        mailbox.readers_passed(tail=3, committed=2)
        assert mailbox.is_over is is_committed
        assert not mailbox.is_waiting
        assert taken(mailbox) == ([(1, Kind.ENDED)] if is_committed else [(2, Kind.DELTA)])


def test_mailbox_that_is_closed_wants_nothing() -> None:
    """A pass that still has it does not feed it."""
    mailbox = Mailbox("j", 0, 0, committed=0)
    assert mailbox.wants_records
    mailbox.is_closed = True
    assert mailbox.is_stopped
    assert not mailbox.wants_records
