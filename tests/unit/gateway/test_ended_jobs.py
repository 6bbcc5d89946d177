"""The cache of ended jobs: bounded in bytes and in time."""

from __future__ import annotations

from typing import Any

from streamworker.gateway.ended_jobs import EndedJobs
from streamworker.gateway.feeds import JobSnapshot


def snapshot(job_id: str, text: str = "") -> JobSnapshot:
    choices: list[Any] = [{"choice": 0, "message": {"content": text}, "finish_reason": "stop"}]
    return JobSnapshot(
        job_id=job_id,
        status="completed",
        attempt="a",
        attempts_seen=1,
        model="m",
        cursor="0.1.1.e8b7be43.end",
        choices=choices,
        ending={},
        ending_value=b"{}",
    )


def test_ended_job_is_returned_until_it_is_stale_or_runs_again() -> None:
    """Another run of the job has another ending."""
    jobs = EndedJobs(fresh_s=60)
    jobs.add(b"j", one := snapshot("j"), now=100)
    assert jobs.get(b"j", now=159) is one
    assert jobs.get(b"other", now=159) is None
    assert jobs.get(b"j", now=160) is None
    assert jobs.size == 0
    jobs.add(b"j", one, now=200)
    jobs.forget(b"j")
    jobs.forget(b"j")
    assert jobs.get(b"j", now=200) is None
    assert jobs.size == 0


def test_ended_jobs_drop_the_one_that_was_used_least_recently() -> None:
    """The size of a message counts; a job that is added again counts once."""
    jobs = EndedJobs(limit_bytes=20_000)
    for name in (b"a", b"b", b"b", b"c"):
        jobs.add(name, snapshot(name.decode()), now=0)
    for _ in range(10):
        jobs.add(b"big", snapshot("big", "x" * 1000), now=0)
    size = jobs.size
    for number in range(20):
        assert jobs.get(b"a", now=0) is not None
        jobs.add(b"%d" % number, snapshot("n"), now=0)

    assert 4000 < size < 8000
    assert jobs.size <= 20_000
    assert jobs.get(b"a", now=0) is not None
    assert jobs.get(b"b", now=0) is None


def test_ended_job_that_is_larger_than_an_eighth_of_the_cache_is_not_kept() -> None:
    """It would displace too many others."""
    jobs = EndedJobs(limit_bytes=20_000)
    jobs.add(b"j", snapshot("j", "x" * 2000), now=0)
    assert jobs.get(b"j", now=0) is None
    assert jobs.size == 0


def test_ended_jobs_that_are_cleared_leave_room_for_others() -> None:
    """The topic was replaced, and their job ids may be used again."""
    jobs = EndedJobs(limit_bytes=20_000)
    jobs.add(b"j", snapshot("j"), now=0)
    jobs.clear()
    assert jobs.get(b"j", now=0) is None
    assert jobs.size == 0
    jobs.add(b"j", one := snapshot("j"), now=0)
    assert jobs.get(b"j", now=0) is one
