"""The index of lines."""

from __future__ import annotations

import tracemalloc
from hashlib import sha256

from streamworker.batch.index import LineIndex, State


def digest(number: int) -> bytes:
    return sha256(b"%d" % number).digest()[:16]


def index_of(count: int) -> LineIndex:
    index = LineIndex()
    for number in range(count):
        index.add(digest(number), f"id-{number}", (number + 1, number * 100, 99))
    return index


def test_index_finds_lines_by_digest_and_by_custom_id() -> None:
    """Also beyond several growths of its tables."""
    index = index_of(5000)

    assert len(index) == 5000
    for number in (0, 1, 31, 32, 33, 4999):
        assert index.find(digest(number)) == number
        assert number in list(index.named(f"id-{number}"))
        assert (index.numbers[number], index.offsets[number], index.lengths[number]) == (
            number + 1,
            number * 100,
            99,
        )
        assert index.digest(number) == digest(number)
    assert index.find(digest(5000)) is None
    assert list(index.named("other")) == []


def test_index_counts_lines_by_state() -> None:
    """Each change moves one line."""
    index = index_of(4)
    index.set_state(1, State.SUBMITTED)
    index.set_state(2, State.SUBMITTED)
    index.set_state(2, State.COMPLETED)
    index.set_state(3, State.FAILED)

    assert [index.counts[state] for state in State] == [1, 1, 1, 1, 0, 0]
    assert index.ended == 2
    assert list(index.lines_in(State.PENDING, State.SUBMITTED)) == [0, 1]
    assert index.next_in(State.FAILED, 0) == 3
    assert index.next_in(State.PENDING, 1) == -1


def test_index_keeps_rounds_and_faults() -> None:
    """A faulty line is not found by its custom id: another line may have it."""
    index = LineIndex()
    index.add(digest(0), "a", (1, 0, 9))
    line = index.add(digest(1), "a", (2, 10, 9), State.FAULTY, 3)
    index.set_round(0, 7)

    assert (index.round(0), index.round(1)) == (7, 0)
    assert (index.fault(0), index.fault(line)) == (0, 3)
    assert list(index.named("a")) == [0]


def test_index_needs_less_than_a_hundred_bytes_per_line() -> None:
    """A million lines of any size fit in a hundred megabytes."""
    tracemalloc.start()
    try:
        index = index_of(50_000)
        size, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert len(index) == 50_000
    assert size / 50_000 < 80
    assert peak / 50_000 < 100
