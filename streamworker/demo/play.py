"""Run the demo, from the first line of output to the summary."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import orjson
from rich.console import Console
from rich.live import Live

from streamworker.demo.jobs import DemoJob, practice_jobs, real_jobs
from streamworker.demo.show import Picture
from streamworker.demo.stage import Stage, set_up
from streamworker.errors import StreamworkerError
from streamworker.kafka.log import open_log
from streamworker.kafka.sink import publish
from streamworker.model import TopicPartition
from streamworker.reader import EventReader
from streamworker.wire.event import read_event

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["play"]

TIMEOUT_S = 120.0


async def play(*, model: str | None, console: Console | None = None) -> int:
    """Run the demo; return the exit code. A cancellation at any time stops every process and removes every file."""
    console = console or Console()
    async with set_up(console.print) as stage:
        jobs = practice_jobs(stage.run) if stage.practice else real_jobs(stage.run, _needed(model))
        worker = asyncio.create_task(stage.app.run())
        try:
            return await _watched(stage, jobs, worker, console)
        finally:
            stage.app.drain()
            worker.cancel()
            await asyncio.wait([worker])


async def _watched(
    stage: Stage, jobs: Sequence[DemoJob], worker: asyncio.Task[None], console: Console
) -> int:
    """Show the jobs until they have ended. Raises StreamworkerError if the worker fails or the demo takes too long."""
    topics = stage.settings.topics
    line = f"worker     {stage.settings.worker.delivery}, {topics.jobs[0]} → {topics.events}"
    console.print(line, soft_wrap=True)
    show = asyncio.create_task(_show(stage, jobs, console))
    try:
        done, _ = await asyncio.wait([show, worker], timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise StreamworkerError(f"the demo did not end within {TIMEOUT_S:g} s")
        if worker in done:
            worker.result()
            raise StreamworkerError("the worker ended before its jobs")
        return show.result()
    finally:
        show.cancel()
        await asyncio.wait([show])


async def _show(stage: Stage, jobs: Sequence[DemoJob], console: Console) -> int:
    entries = [(job.job_id.encode(), orjson.dumps(job.value)) for job in jobs]
    await publish(stage.settings.kafka, stage.settings.topics.jobs[0], entries)
    begun = time.monotonic()
    picture = Picture(jobs)
    with Live(picture.live(), console=console, refresh_per_second=20, transient=False) as live:
        await _follow(stage, picture, live)
    seconds = time.monotonic() - begun
    console.print(picture.result())
    console.print(f"{len(jobs)} jobs, {picture.deltas} deltas in {seconds:.1f} s; one terminal event each")
    return 0


async def _follow(stage: Stage, picture: Picture, live: Live) -> None:
    reader = EventReader()
    topic = stage.settings.topics.events
    async with open_log(stage.settings.kafka, topic) as log:
        async for record in log.follow([TopicPartition(topic, number) for number in log.partitions]):
            for reading in reader.read(read_event(record.value or b"{}")):
                picture.take(reading)
            live.update(picture.live())
            if picture.is_finished:
                return


def _needed(model: str | None) -> str:
    if not model:
        raise StreamworkerError(
            "a configured upstream needs the name of a model: streamworker demo --model NAME"
        )
    return model
