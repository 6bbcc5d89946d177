"""The hand-over of one job's events from two readers to one subscriber, situation by situation."""

from __future__ import annotations

import json
from typing import Any

from streamworker.handover import EventHead, Handover, Kind, read_head


def fed(feed: Any, offset: int, kind: str, attempt: str = "a", seq: int = 0, **members: Any) -> None:
    """Pass one event to a method of the hand-over."""
    value = json.dumps({"type": kind, "attempt": attempt, "seq": seq, **members}).encode()
    head = read_head(value)
    assert head is not None
    feed(offset, head, value)


def taken(handover: Handover) -> list[tuple[Kind, int]]:
    """Take every event that is ready."""
    deliveries = []
    while (delivery := handover.take()) is not None:
        deliveries.append((delivery.kind, delivery.offset))
    return deliveries


def test_handover_ending_waits_for_the_tail() -> None:
    """A terminal event that the committed reader has first is delivered after the deltas before it."""
    handover = Handover(tail=0, committed=0)
    fed(handover.tail, 0, "started")
    fed(handover.committed, 2, "usage", seq=2, status="completed")
    assert taken(handover) == [(Kind.STARTED, 0)]
    fed(handover.tail, 1, "delta", seq=1)
    assert taken(handover) == [(Kind.DELTA, 1)]
    assert handover.is_waiting
    handover.passed(tail=3)

    assert taken(handover) == [(Kind.ENDED, 2)]
    assert (handover.is_over, handover.is_waiting, handover.queued_bytes) == (True, False, 0)


def test_handover_event_of_an_unknown_type_takes_its_place() -> None:
    """It counts in `seq`, and is delivered to subscribers that pass everything on."""
    for delivers_others in (False, True):
        handover = Handover(tail=0, committed=0, delivers_others=delivers_others)
        fed(handover.tail, 0, "started")
        fed(handover.tail, 1, "progress", seq=1)
        fed(handover.tail, 2, "progress", "void", seq=2)
        fed(handover.tail, 3, "delta", seq=2)
        fed(handover.tail, 4, "delta", seq=1)
        others = [(Kind.OTHER, 1)] if delivers_others else []

        assert taken(handover) == [(Kind.STARTED, 0), *others, (Kind.DELTA, 3)]


def test_handover_provisional_ending_is_not_delivered() -> None:
    """A terminal event that only the tail has may be rolled back."""
    handover = Handover(tail=0, committed=0)
    fed(handover.tail, 0, "started")
    fed(handover.tail, 1, "usage", seq=1, status="completed")

    assert taken(handover) == [(Kind.STARTED, 0)]
    assert not handover.is_over


def test_handover_delivery_after_a_rolled_back_ending_is_shown_at_once() -> None:
    """No open transaction of another client delays the deltas of a job whose worker died."""
    handover = Handover(tail=0, committed=0)
    fed(handover.tail, 0, "started")
    fed(handover.tail, 1, "usage", seq=1, status="completed")
    fed(handover.tail, 3, "started", "b", cause="redelivered")
    fed(handover.tail, 4, "delta", "b", 1)

    assert taken(handover) == [(Kind.STARTED, 0), (Kind.RESTARTED, 3), (Kind.DELTA, 4)]


def test_handover_new_run_waits_for_the_end_of_the_run_before() -> None:
    """A subscriber gets the first run's terminal event, and nothing of the second run."""
    handover = Handover(tail=0, committed=0)
    fed(handover.tail, 0, "started")
    fed(handover.tail, 1, "usage", seq=1, status="failed")
    fed(handover.tail, 3, "started", "b", cause="new")
    assert taken(handover) == [(Kind.STARTED, 0)]
    fed(handover.committed, 1, "usage", seq=1, status="failed")

    assert taken(handover) == [(Kind.ENDED, 1)]


def test_handover_new_run_follows_when_the_committed_reader_passes_an_aborted_ending() -> None:
    """The position alone shows that the terminal event was rolled back."""
    handover = Handover(tail=0, committed=0)
    fed(handover.tail, 0, "started")
    fed(handover.tail, 1, "usage", seq=1, status="failed")
    fed(handover.tail, 3, "started", "b", cause="new")
    handover.passed(committed=3)

    assert taken(handover) == [(Kind.STARTED, 0), (Kind.RESTARTED, 3)]


def test_handover_events_of_another_attempt_are_dropped() -> None:
    """A worker whose session has expired still writes deltas."""
    handover = Handover(tail=0, committed=0)
    fed(handover.tail, 0, "started")
    fed(handover.tail, 1, "started", "b", cause="redelivered")
    fed(handover.tail, 2, "delta", "a", 1)
    fed(handover.tail, 3, "delta", "b", 1)
    fed(handover.tail, 4, "delta", "b", 1)

    assert taken(handover) == [(Kind.STARTED, 0), (Kind.RESTARTED, 1), (Kind.DELTA, 3)]


def test_handover_rejected_job_has_only_its_terminal_event() -> None:
    """It has no `started`, and is whole."""
    handover = Handover(tail=0, committed=0)
    fed(handover.tail, 0, "usage", status="rejected")
    fed(handover.committed, 0, "usage", status="rejected")
    delivery = handover.take()

    assert delivery is not None
    assert (delivery.kind, delivery.is_whole) == (Kind.ENDED, True)


def test_handover_live_subscriber_ignores_the_end_of_an_earlier_run() -> None:
    """A terminal event without the `started` that a subscriber of a new job must have seen is not its job's."""
    handover = Handover(tail=5, committed=0)
    fed(handover.committed, 4, "usage", "old", 7, status="completed")
    assert taken(handover) == []
    fed(handover.tail, 6, "started")

    assert taken(handover) == [(Kind.STARTED, 6)]


def test_handover_replay_that_begins_within_an_attempt_ends_with_a_part() -> None:
    """The job has ended, and the events before the beginning of the replay are unknown."""
    handover = Handover(tail=5, committed=9, is_replaying=True)
    fed(handover.replayed_committed, 6, "delta", seq=4)
    fed(handover.replayed_committed, 7, "usage", seq=5, status="completed")
    delivery = handover.take()

    assert delivery is not None
    assert (delivery.kind, delivery.is_whole) == (Kind.ENDED, False)


def test_handover_replay_of_a_failed_run_continues_with_the_next_one() -> None:
    """Of the terminal events of several runs the last one counts."""
    handover = Handover(tail=0, committed=9, is_replaying=True)
    fed(handover.replayed_committed, 0, "started")
    fed(handover.replayed_committed, 1, "usage", seq=1, status="failed")
    fed(handover.replayed_committed, 5, "started", "b", cause="new")
    fed(handover.replayed_committed, 6, "usage", "b", 1, status="cancelled")
    assert taken(handover) == [(Kind.STARTED, 0), (Kind.RESTARTED, 5)]
    handover.caught_up(tail=9, committed=9)

    assert taken(handover) == [(Kind.ENDED, 6)]


def test_handover_live_records_wait_for_the_end_of_the_replay() -> None:
    """They come once, after the replayed ones, whatever both have."""
    handover = Handover(tail=0, committed=1, is_replaying=True)
    fed(handover.tail, 2, "delta", seq=2)
    fed(handover.tail, 3, "delta", seq=3)
    fed(handover.committed, 4, "usage", seq=4, status="completed")
    fed(handover.replayed_committed, 0, "started")
    fed(handover.replayed, 1, "delta", seq=1)
    fed(handover.replayed, 2, "delta", seq=2)
    assert taken(handover) == [(Kind.STARTED, 0), (Kind.DELTA, 1), (Kind.DELTA, 2)]
    handover.caught_up(tail=5, committed=5)

    assert taken(handover) == [(Kind.DELTA, 3), (Kind.ENDED, 4)]


def test_handover_tail_behind_the_replay_repeats_nothing() -> None:
    """The committed reader may be ahead of the tail, which then returns what was replayed, a void attempt among it."""
    handover = Handover(tail=0, committed=3, is_replaying=True)
    fed(handover.replayed_committed, 0, "started")
    fed(handover.replayed_committed, 1, "delta", seq=1)
    fed(handover.replayed_committed, 2, "started", "b", cause="redelivered")
    handover.caught_up(tail=1, committed=3)
    taken(handover)
    fed(handover.tail, 0, "started")
    fed(handover.tail, 1, "delta", seq=1)
    fed(handover.tail, 2, "started", "b", cause="redelivered")
    fed(handover.tail, 3, "delta", "b", 1)

    assert taken(handover) == [(Kind.DELTA, 3)]


def test_handover_counts_the_bytes_of_everything_that_is_queued() -> None:
    """So that the caller can drop a subscriber that does not take its events."""
    handover = Handover(tail=0, committed=0)
    fed(handover.tail, 0, "started")
    before = handover.queued_bytes
    fed(handover.tail, 1, "delta", seq=1, delta={"content": "x" * 1000})
    assert 1000 < handover.queued_bytes - before < 1500
    taken(handover)

    assert handover.queued_bytes == 0


def test_read_head_of_a_value_that_is_not_an_event_is_none() -> None:
    """Anything may be written to a topic."""
    assert [read_head(value) for value in (None, b"", b"[]", b"\xff", b'{"type":"usage"}', b"[" * 9999)] == [
        None
    ] * 6
    assert read_head(b'{"type":"delta","attempt":"a","seq":3,"more":[]}') == EventHead("a", 3, "delta")


def test_handover_passes_deltas_until_something_waits_or_is_in_doubt() -> None:
    """And again when that is settled: the caller delivers what passes."""
    handover = Handover(tail=0, committed=0)
    passed: list[bool] = []

    def passes(offset: int, head: EventHead, _: bytes) -> None:
        passed.append(handover.passes(offset, head))

    fed(passes, 0, "delta", seq=0)  # no attempt is known
    fed(handover.tail, 0, "started")
    for offset, seq in [(1, 1), (2, 3), (2, 2), (2, 3), (3, 3)]:  # a gap; an offset that was passed
        fed(passes, offset, "delta", seq=seq)
    assert passed == [False, True, False, True, False, True]
    fed(passes, 4, "delta", "b", seq=4)
    fed(passes, 4, "usage", seq=4)
    assert passed[6:] == [False, False]
    fed(handover.tail, 4, "usage", seq=4, status="completed")
    fed(passes, 5, "delta", seq=4)  # whether the job has ended is not known
    handover.passed(committed=5)  # it was rolled back
    fed(handover.tail, 5, "started", "b", cause="redelivered")
    fed(passes, 6, "delta", "b", seq=1)
    assert passed[8:] == [False, True]
    assert handover.leave() == 7
    fed(passes, 7, "delta", "b", seq=2)
    handover.caught_up(tail=7, committed=7)
    fed(passes, 7, "delta", "b", seq=2)
    assert passed[10:] == [False, True]


def test_handover_ending_behind_deltas_that_passed_is_delivered_at_once() -> None:
    """The last one of them shows how far the tail has come."""
    handover = Handover(tail=0, committed=0)
    fed(handover.tail, 0, "started")
    fed(handover.tail, 1, "delta", seq=1)
    fed(handover.tail, 2, "delta", seq=2)
    fed(handover.committed, 2, "usage", seq=3, status="completed")
    assert [offset for _, offset in taken(handover)] == [0, 1, 2]
    assert not handover.is_over
    fed(handover.committed, 3, "usage", seq=3, status="completed")
    assert taken(handover) == []
    handover.passed(tail=4)
    assert taken(handover) == [(Kind.ENDED, 3)]
    fed(handover.tail, 4, "delta", seq=4)
    assert (taken(handover), handover.queued_bytes) == ([], 0)


def test_handover_joins_what_the_tail_returned_during_a_replay_with_what_waits() -> None:
    """In the order of their offsets."""
    handover = Handover(tail=0, committed=0, is_replaying=True)
    fed(handover.replayed, 0, "started")
    fed(handover.replayed, 1, "usage", seq=1, status="completed")
    fed(handover.replayed, 2, "started", "b", cause="new")  # waits for the terminal event before it
    fed(handover.tail, 3, "delta", "b", seq=1)
    fed(handover.tail, 4, "delta", "b", seq=2)
    handover.caught_up(tail=5, committed=0)
    assert taken(handover) == [(Kind.STARTED, 0)]
    handover.passed(committed=2)

    assert taken(handover) == [(Kind.RESTARTED, 2), (Kind.DELTA, 3), (Kind.DELTA, 4)]
    assert handover.queued_bytes == 0
