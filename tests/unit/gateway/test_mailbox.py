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
    assert taken(mailbox) == [(7, Kind.DELTA), (8, Kind.ENDED)]
    assert mailbox.is_over


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
        (ended("j", 1), Opening.UNOPENED),
    ):
        mailbox = Mailbox("j", 0, 0, committed=100)
        mailbox.replay(0, value, FINAL)
        assert mailbox.opening is opening


def test_mailbox_of_a_search_ignores_the_rolled_back_end_of_a_rejected_job() -> None:
    """And values that are not events."""
    mailbox = Mailbox("j", 0, 0, committed=100)
    mailbox.replay(0, ended("j", 0), ABORTED)
    mailbox.replay(1, None, FINAL)
    mailbox.replay(2, b"{}", FINAL)
    assert mailbox.opening is Opening.PENDING
    mailbox.replay(3, started("j"), FINAL)
    assert taken(mailbox) == [(3, Kind.STARTED)]


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
        if is_committed:
            head = read_head(ended("j", 1))
            assert head is not None
            mailbox.committed(1, head, ended("j", 1))
        mailbox.readers_passed(tail=2, committed=2)
        assert mailbox.is_over is is_committed
        assert taken(mailbox) == ([(1, Kind.ENDED)] if is_committed else [])


def test_mailbox_that_is_closed_wants_nothing() -> None:
    """A pass that still has it does not feed it."""
    mailbox = Mailbox("j", 0, 0, committed=0)
    assert mailbox.wants_records
    mailbox.is_closed = True
    assert mailbox.is_stopped
    assert not mailbox.wants_records
