"""Progress of a partition: deliveries, ends, and the points that are committed."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from streamworker.progress.offset_map import FULL, LIMIT, MAX_OFFSETS, OffsetMap, decode_map
from streamworker.progress.partition import MIN_LIMIT, PartitionProgress

if TYPE_CHECKING:
    from streamworker.model import CommitPoint


def make(committed: int = 0, offset_map: OffsetMap | None = None) -> PartitionProgress:
    return PartitionProgress(committed, offset_map or OffsetMap(), commit_id="me")


def restarted(point: CommitPoint) -> PartitionProgress:
    """Return the progress that the next owner restores from a commit."""
    return PartitionProgress(point.offset, decode_map(*point), commit_id="next")


def begin(progress: PartitionProgress, offset: int) -> int:
    """Accept a record and begin its job at once."""
    count = progress.begin(offset)
    if count:
        progress.count(offset)
    return count


def deliveries(point: CommitPoint) -> dict[int, int]:
    return dict(decode_map(*point).deliveries)


def test_progress_begin_counts_the_first_delivery() -> None:
    """A record that was never delivered has delivery 1."""
    assert begin(make(), 0) == 1


def test_progress_begin_of_open_or_finished_record_returns_0() -> None:
    """A rebalance delivers records again."""
    progress = make(5, OffsetMap(frozenset({7})))
    begin(progress, 5)
    begin(progress, 6)
    progress.finish(6)

    assert [begin(progress, offset) for offset in (4, 5, 6, 7)] == [0, 0, 0, 0]
    assert progress.incomplete == 1


def test_progress_deliveries_are_counted_across_restarts() -> None:
    """The count is committed before the job runs, so a crash cannot lose it."""
    progress = make()
    for delivery in range(1, 6):
        assert begin(progress, 3) == delivery
        progress = restarted(progress.point())


def test_progress_job_that_only_waited_is_not_counted() -> None:
    """A waiting job cannot have killed a worker; its delivery is counted when it begins."""
    progress = make()
    assert progress.begin(3) == 1
    point = progress.point()
    assert deliveries(point) == {}
    progress.count(3)

    assert deliveries(progress.point()) == {3: 1}


def test_progress_delivery_that_was_not_committed_does_not_count() -> None:
    """The next owner only knows what was committed."""
    progress = make()
    begin(progress, 0)
    point = progress.point()
    begin(restarted(point), 0)

    assert begin(restarted(point), 0) == 2


def test_progress_end_removes_the_count() -> None:
    """A finished job needs no count."""
    progress = make()
    for offset in (0, 1):
        begin(progress, offset)
    progress.finish(1)

    assert deliveries(progress.point()) == {0: 1}


def test_progress_count_of_a_compacted_record_is_dropped() -> None:
    """Compaction may remove a record between two deliveries; its count must not stay forever."""
    progress = make(0, OffsetMap(deliveries={0: 2, 5: 1}))
    begin(progress, 3)
    progress.finish(3)
    point = progress.point()

    assert point.offset == 4
    assert deliveries(point) == {5: 1}


def test_progress_point_of_a_commit_that_finishes_offsets_keeps_them_open() -> None:
    """A commit that is refused is repeated in parts, which finish fewer offsets."""
    progress = make()
    for offset in (0, 1, 2):
        begin(progress, offset)
    whole = progress.point(finishing=[0, 2])
    part = progress.point(finishing=[2])

    assert (whole.offset, deliveries(whole), decode_map(*whole).finished) == (1, {1: 1}, frozenset({2}))
    assert (part.offset, deliveries(part), decode_map(*part).finished) == (0, {0: 1, 1: 1}, frozenset({2}))
    assert progress.incomplete == 3


def test_progress_undo_count_removes_one_delivery() -> None:
    """Earlier deliveries are kept."""
    progress = make(0, OffsetMap(deliveries={1: 2}))
    for offset in (0, 1):
        begin(progress, offset)
    for offset in (0, 1):
        progress.undo_count(offset)
    point = progress.point()

    assert deliveries(point) == {1: 2}
    assert [begin(restarted(point), offset) for offset in (0, 1)] == [1, 3]


def test_progress_undo_count_and_finish_is_finished() -> None:
    """The terminal event was waiting to be committed when the worker stopped."""
    progress = make()
    begin(progress, 0)
    progress.undo_count(0)
    progress.finish(0)

    assert progress.point().offset == 1


def test_progress_finish_and_undo_count_is_finished() -> None:
    """The terminal event was being committed when the worker stopped."""
    progress = make()
    for offset in (0, 1):
        begin(progress, offset)
    progress.finish(1)
    progress.undo_count(1)
    point = progress.point()

    assert decode_map(*point).finished == {1}
    assert deliveries(point) == {0: 1}


def test_progress_no_two_points_are_equal() -> None:
    """A worker must recognise its own last commit in the log."""
    one, other = make(), PartitionProgress(0, OffsetMap(), commit_id="other")
    points = [progress.point() for progress in (one, other) for _ in range(50)]

    assert len(set(points)) == 100


def test_progress_with_a_large_map_is_full_until_it_shrinks() -> None:
    """No record is accepted whose progress could not be committed."""
    progress = make()
    chance = random.Random(1)
    open_offsets = [0]
    begin(progress, 0)
    for _ in range(LIMIT):
        offset = open_offsets[-1] + chance.randrange(2, 10_000)
        for taken in (offset, offset + 1):
            begin(progress, taken)
        open_offsets.append(offset)
        progress.finish(offset + 1)
        progress.point()
        if progress.is_full:
            break
    assert FULL <= progress.map_size < LIMIT
    for offset in open_offsets[: len(open_offsets) // 2]:
        progress.finish(offset)
    progress.point()

    assert not progress.is_full


def test_progress_with_a_large_map_and_nothing_open_is_not_full() -> None:
    """Only new records can make the map smaller; rejecting them would block the partition forever."""
    finished = frozenset(offset * offset for offset in range(1, 2000))
    progress = make(0, OffsetMap(finished))
    progress.point()
    assert progress.map_size >= FULL
    assert not progress.is_full
    begin(progress, 0)

    assert progress.is_full


def test_progress_with_too_many_finished_offsets_is_full() -> None:
    """A map holds a bounded number of offsets, however well they compress."""
    progress = make(0, OffsetMap(frozenset(range(1, MAX_OFFSETS // 2 + 1))))
    begin(progress, 0)
    progress.point()

    assert progress.map_size < 100
    assert progress.is_full


def test_progress_over_the_limit_omits_the_counts_first() -> None:
    """Running finished jobs again is worse than losing counts."""
    progress = make(0, OffsetMap(frozenset(offset**2 + 1 for offset in range(1, 1000))))
    for offset in range(1500):
        begin(progress, offset**3)
    point = progress.point()

    assert progress.is_cut
    assert progress.map_size > LIMIT >= len(point.metadata)
    assert decode_map(*point).finished
    assert deliveries(point) == {}


def test_progress_far_over_the_limit_omits_the_finished_offsets() -> None:
    """The broker would reject a larger commit every time; after a crash those jobs run again and none is
    lost."""
    progress = make()
    for offset in range(6000):
        begin(progress, offset * offset)
    for offset in range(1, 6000, 2):
        progress.finish(offset * offset)
    point = progress.point()

    assert progress.is_cut
    assert decode_map(*point) == OffsetMap(commit_id="me.1")
    assert point.offset == 0


def test_progress_within_the_limit_omits_nothing() -> None:
    """The usual case."""
    progress = make()
    begin(progress, 0)

    assert deliveries(progress.point()) == {0: 1}
    assert not progress.is_cut


def test_progress_with_a_small_limit_is_full_before_its_map_exceeds_it() -> None:
    """The broker's `offset.metadata.max.bytes` may be small: no finished job may be omitted from a commit."""
    progress = PartitionProgress(0, OffsetMap(), commit_id="0123456789ab", limit=64)
    accepted = 0
    while not progress.is_full:
        assert progress.begin(2 * accepted)
        if accepted:
            progress.finish(2 * accepted)
        progress.point()
        assert not progress.is_cut
        accepted += 1

    assert 10 < accepted < 5000
    assert progress.fill >= 0.75
    progress.finish(0)
    progress.point()
    assert not progress.is_full


def test_progress_whose_metadata_is_refused_halves_its_limit_down_to_a_bound() -> None:
    """Every broker accepts a map without offsets."""
    progress = make()
    for offset in range(4000):
        begin(progress, offset)
    for offset in random.Random(1).sample(range(1, 4000), 400):
        progress.finish(offset)
    size = len(progress.point().metadata)
    limits = []
    for _ in range(8):
        limits.append(progress.metadata_refused())
        assert len(progress.point().metadata) <= limits[-1]

    assert limits[:2] == [size // 2, size // 4]
    assert limits[-1] == MIN_LIMIT
    assert progress.is_full


def test_progress_map_without_offsets_fits_the_least_limit() -> None:
    """The commit id is at its longest."""
    progress = PartitionProgress(1 << 60, OffsetMap(), commit_id="0" * 32)

    assert len(progress.point().metadata) <= MIN_LIMIT


def test_progress_with_a_small_map_is_not_full_while_records_are_open() -> None:
    """Nor before the first point."""
    progress = make()
    assert not progress.is_full
    begin(progress, 0)
    begin(progress, 1)
    progress.point(finishing=[1])

    assert (progress.incomplete, progress.is_full, progress.is_cut) == (2, False, False)


def test_progress_map_of_exactly_the_limit_is_whole() -> None:
    """One character more is cut."""

    def of_limit(limit: int) -> PartitionProgress:
        progress = PartitionProgress(0, OffsetMap(frozenset(range(5, 900, 7))), commit_id="me", limit=limit)
        progress.point()
        return progress

    size = of_limit(LIMIT).map_size
    fits, exceeds = of_limit(size), of_limit(size - 1)

    assert (fits.is_cut, fits.fill) == (False, 1.0)
    assert (exceeds.is_cut, exceeds.map_size) == (True, size)
    assert len(fits.point().metadata) == size
    assert len(exceeds.point().metadata) < MIN_LIMIT


def test_progress_that_gives_records_back_accepts_them_once_more() -> None:
    """Their position is not passed meanwhile."""
    progress = make()
    for offset in (0, 1):
        progress.begin(offset)
    progress.give_back([0, 1])

    assert (progress.position, progress.incomplete) == (0, 0)
    assert (progress.begin(0), progress.incomplete) == (1, 1)


def test_progress_advances_over_offsets_without_records() -> None:
    """Transaction markers have offsets."""
    progress = make(5)
    progress.advance(9)

    assert (progress.position, progress.point().offset) == (9, 9)
