"""Where jobs begin, as the tail has seen it."""

from __future__ import annotations

from streamworker.gateway.known_jobs import KnownJobs, Place


def test_known_job_keeps_its_first_place_until_it_is_forgotten() -> None:
    """A second `started` is that of another attempt."""
    known = KnownJobs()
    known.add(b"j", Place(1, 7))
    known.add(b"j", Place(1, 9))
    assert known.get(b"j") == (1, 7)
    assert known.get(b"other") is None
    known.forget(b"j")
    known.forget(b"j")
    assert known.get(b"j") is None
    known.add(b"j", Place(1, 9))
    assert known.get(b"j") == (1, 9)


def test_known_jobs_drop_the_first_ones_above_the_limit() -> None:
    """A job that is added again counts once and keeps its age."""
    known = KnownJobs(limit=3)
    for key in (b"a", b"b", b"a", b"c", b"d"):
        known.add(key, Place(0, 1))
    assert len(known) == 3
    assert known.get(b"a") is None
    assert all(known.get(key) == (0, 1) for key in (b"b", b"c", b"d"))


def test_known_jobs_of_a_partition_are_dropped_alone() -> None:
    """The others keep their order."""
    known = KnownJobs(limit=2)
    known.add(b"a", Place(0, 1))
    known.add(b"b", Place(1, 1))
    known.drop(0)
    assert known.get(b"a") is None
    known.add(b"c", Place(0, 5))
    known.add(b"d", Place(0, 6))
    assert known.get(b"b") is None
    assert len(known) == 2
