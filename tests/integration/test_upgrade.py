"""Workers of the previous version and of this one share a group, and read each other's commits, on Apache Kafka."""

from __future__ import annotations

import asyncio
import contextlib
import io
import subprocess
import tarfile
from pathlib import Path
from signal import SIGTERM
from typing import TYPE_CHECKING

import pytest

from tests.integration.stage import Process, Stage, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.long

PREVIOUS = "79617ef"
"""The last commit whose workers move partitions with their open streams."""

PARTITIONS = 4
MODEL = "practice?deltas=20&pace_ms=100"  # takes two seconds

FORWARD, BACK = ("previous", "present"), ("present", "previous")


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of the previous version. Skips the test where the history does not have it."""
    archive = subprocess.run(
        ["git", "archive", PREVIOUS, "streamworker"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=False,
    )
    if archive.returncode:
        pytest.skip(f"the git history does not have the commit {PREVIOUS}, whose workers are started here")
    directory = tmp_path_factory.mktemp("previous")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as package:
        package.extractall(directory, filter="data")
    return directory


class Fleet:
    """Workers of both versions in one group."""

    def __init__(self, stage: Stage, previous: Path) -> None:
        self._stage = stage
        self._sources = {"previous": previous, "present": None}
        self.members: list[Process] = []

    async def join(self, version: str) -> Process:
        """Start a worker, and wait until the partitions are shared evenly."""
        self._stage.source = self._sources[version]
        process = await self._stage.process()
        self.members.append(process)
        await process.logged("worker.started")
        await self.settle()
        return process

    async def leave(self, process: Process) -> None:
        """Drain a worker to its end."""
        self.members.remove(process)
        process.signal(SIGTERM)
        assert await process.exit_code() == 0, process.tail()

    async def settle(self) -> None:
        """Wait until every partition has an owner, in equal parts."""
        await eventually(self._is_even, what=lambda: [process.tail() for process in self.members])

    def _is_even(self) -> bool:
        owned = [lines[-1]["owned"] for p in self.members if (lines := p.lines("partitions.changed"))]
        return len(owned) == len(self.members) and set(owned) == {PARTITIONS // len(owned)}


@contextlib.asynccontextmanager
async def load(stage: Stage) -> AsyncIterator[None]:
    """Submit jobs to all partitions in turn until the block ends, then wait for all of them."""

    async def submit() -> None:
        number = 0
        while True:
            await stage.submit(f"job-{number}", MODEL, partition=number % PARTITIONS)
            number += 1
            await asyncio.sleep(0.2)

    submitting = asyncio.create_task(submit())
    try:
        yield
    finally:
        submitting.cancel()
        await asyncio.wait([submitting])
    await stage.ended()


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("first", "second"), [FORWARD, BACK], ids=["upgrade", "downgrade"])
async def test_workers_of_both_versions_share_a_group_during_a_rollout(
    previous: Path, apache: Stage, first: str, second: str
) -> None:
    """Two workers are replaced one after another under load: every job ends once, with all its events in order."""
    await apache.open(partitions=PARTITIONS)
    fleet = Fleet(apache, previous)
    old = [await fleet.join(first), await fleet.join(first)]
    async with load(apache):
        for process in old:
            await fleet.leave(process)
            await fleet.join(second)

    assert apache.breaches() == []
    assert await apache.commit_breaches() == []
    assert not any(process.lines("rebalance.plan_failed") for process in apache.processes)
    for job in (
        apache.jobs
    ):  # a stream may be cut by a worker of the previous version, and not more than once a move
        assert 1 <= len(apache.calls(job.job_id)) <= 3, job.job_id


@pytest.mark.parametrize(("first", "second"), [FORWARD, BACK], ids=["upgrade", "downgrade"])
async def test_offset_map_of_the_other_version_is_read(
    previous: Path, apache: Stage, first: str, second: str
) -> None:
    """A worker dies with an open job before others that have ended: only the open one runs again."""
    await apache.open()
    sources = {"previous": previous, "present": None}
    apache.source = sources[first]
    dying = await apache.process()
    await apache.submit("open", "practice?deltas=40&pace_ms=100")
    await apache.until(lambda: apache.deltas("open"))
    ended = [f"job-{number}" for number in range(5)]
    await apache.submit_many([(job_id, "practice?deltas=3", 0) for job_id in ended])
    await apache.ended(*ended)
    await dying.kill()
    apache.source = sources[second]
    successor = await apache.process()
    [end] = await apache.ended("open")

    assert end["status"] == "completed"
    assert [len(apache.calls(job_id)) for job_id in ended] == [1] * 5
    assert len(apache.calls("open")) == 2
    causes = [event["cause"] for event in apache.all_events("open") if event["type"] == "started"]
    assert causes == ["new", "redelivered"]
    assert successor.lines("commit.offset_map_ignored") == []
    assert apache.breaches() == []
