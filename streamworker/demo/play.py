"""Run the demo, from the first line of output to the account.

Act 1: jobs stream side by side. Act 2: the second worker is killed, and its jobs begin again. Act 3: how each job ended.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console

from streamworker.client import Client, Delta, Ended
from streamworker.demo.account import audit, calls_of
from streamworker.demo.board import Board
from streamworker.demo.display import display_for
from streamworker.demo.jobs import DemoJob, practice_jobs, real_jobs
from streamworker.demo.panels import account
from streamworker.demo.stage import FIRST, PARTITIONS, SECOND, Stage, set_up
from streamworker.errors import StreamworkerError
from streamworker.kafka.partitioner import partition_of
from streamworker.kafka.sink import publish
from streamworker.wire.json import encode

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from streamworker.client import Job
    from streamworker.demo.display import Lines, Panels

__all__ = ["play"]

TIMEOUT_S: Final = 120.0
BEFORE_KILL_S: Final = 3.0
"""How long the jobs stream before the second worker is killed."""

_POLL_S: Final = 0.05


async def play(
    *, model: str | None, stays: bool = False, console: Console | None = None, speed: float = 1.0
) -> int:
    """Run the demo; return the exit code. A cancellation at any time stops every process and removes every file.

    With `stays`, everything runs on after the account, until the cancellation. `speed` divides the pauses of the practice
    upstream.

    Raises:
        StreamworkerError: a part does not start, does not answer, or takes too long.
    """
    console = console or Console(highlight=False)
    async with set_up(lambda line: console.print(line, soft_wrap=True, markup=False)) as stage:
        jobs = (
            practice_jobs(stage.run, speed=speed) if stage.practice else real_jobs(stage.run, _needed(model))
        )
        board = Board(time.monotonic)
        display = display_for(console, board, "streamworker demo · its page is starting")
        console.print(f"workers    {FIRST} and {SECOND}, joining their group", markup=False)
        first = await stage.wait_until_shared()
        async with Client(stage.settings) as client, display.running():
            await _within(_Play(stage, jobs, board, display, client, first).run(BEFORE_KILL_S / speed))
        await _conclude(stage, jobs, board, console)
        if stays:
            console.print(
                f"everything runs until Ctrl-C{'; the page is ' + stage.page.url if stage.page.is_served else ''}"
            )
            await asyncio.Event().wait()
    return 0


async def _within(work: Coroutine[None, None, None]) -> None:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await work
    except TimeoutError:
        raise StreamworkerError(f"the demo did not end within {TIMEOUT_S:g} s") from None
    except BaseExceptionGroup as group:
        known, _ = group.split(StreamworkerError)
        if known is None:
            raise
        raise _first_of(known) from None


def _first_of(group: BaseExceptionGroup[StreamworkerError]) -> StreamworkerError:
    """Return an error of a group of tasks: the others follow from it, or it from them."""
    first = group.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first


class _Play:
    """The first two acts."""

    def __init__(
        self,
        stage: Stage,
        jobs: Sequence[DemoJob],
        board: Board,
        display: Lines | Panels,
        client: Client,
        first: frozenset[int],
    ) -> None:
        self._first = first
        self._stage = stage
        self._jobs = jobs
        self._board = board
        self._display = display
        self._client = client

    async def run(self, before_kill_s: float) -> None:
        """Play both acts, the second one after `before_kill_s` seconds; return when every job has ended."""
        kills = self._stage.practice is not None
        acts = "Act 1 of 3" if kills else "Act 1 of 2"
        self._display.begin(f"{acts}: {len(self._jobs)} jobs stream side by side, on two workers")
        self._board.submit(self._jobs, self._worker_of)
        page = asyncio.create_task(self._announce_page())
        try:
            async with asyncio.TaskGroup() as group:
                for job in self._jobs:
                    group.create_task(self._follow(await self._submit(job)))
                if kills:
                    await self._kill(before_kill_s)
        finally:
            page.cancel()
            await asyncio.wait([page])

    def _is_of_second(self, key: bytes) -> bool:
        return partition_of(key, PARTITIONS) not in self._first

    def _worker_of(self, job: DemoJob) -> str:
        return SECOND if job.goes_to_second else FIRST

    async def _submit(self, job: DemoJob) -> Job:
        key = job.key(self._is_of_second)
        if "request" in job.value:
            return await self._client.submit_job(job.value, key=key.decode())
        topic = self._stage.settings.topics.jobs[0]
        await publish(self._stage.settings.kafka, topic, [(key, encode(job.value))])
        return self._client.job(job.job_id)

    async def _announce_page(self) -> None:
        page = self._stage.page
        page.start()
        served = await page.wait_until_served()
        self._display.title = f"streamworker demo · page {page.url}" if served else "streamworker demo"
        self._display.titled()

    async def _follow(self, submitted: Job) -> None:
        seen = False
        async for event in submitted.events():
            view = self._board.take(event.raw)
            if view is None:
                continue
            if isinstance(event, Delta):
                if not seen:
                    self._display.event(view, "first")
                seen = True
            else:
                self._display.event(view, "usage" if isinstance(event, Ended) else "started")

    async def _kill(self, after_s: float) -> None:
        victims = [job.job_id for job in self._jobs if job.goes_to_second]
        await self._streaming(victims)
        await asyncio.sleep(after_s)
        self._display.begin(f"Act 2 of 3: {SECOND} is killed. Its replacement begins its jobs again")
        self._stage.second.kill()
        for view in self._board.lose(SECOND, f"{SECOND} was killed; its replacement starts"):
            self._display.event(view, "lost")
        self._stage.second.replace()

    async def _streaming(self, job_ids: Sequence[str]) -> None:
        """Wait until each of the jobs has a text or has ended."""
        views = [self._board.views[job_id] for job_id in job_ids]
        while not all(view.text or not view.is_open for view in views):  # noqa: ASYNC110 - events arrive 10 times per second
            await asyncio.sleep(_POLL_S)


async def _conclude(stage: Stage, jobs: Sequence[DemoJob], board: Board, console: Console) -> None:
    number = "Act 3 of 3" if stage.practice else "Act 2 of 2"
    console.print(f"{number}: the account", style="bold cyan", markup=False)
    calls = calls_of(stage.practice, jobs) if stage.practice else {}
    console.print(account(board, calls))
    console.print(str(await audit(stage.settings)), style="bold", markup=False)
    console.print(board.totals(), style="dim", markup=False)
    for purpose, command in _next_commands(stage):
        console.print(f"\n{purpose}:", style="dim", markup=False)
        console.print(f"  {command}", soft_wrap=True, markup=False)


def _next_commands(stage: Stage) -> list[tuple[str, str]]:
    """Return what to type next, each with its purpose."""
    program = _program()
    look = "open the page" if stage.page.is_served else "look at it with other commands"
    return [
        (f"Keep everything running, and {look}", f"{program} demo --stay"),
        (
            "Test a client of your own on an upstream that fails as you tell it",
            f"{program} practice-upstream --help",
        ),
        ("Check your own broker and upstream", f"{program} check --config worker.toml"),
    ]


def _program() -> str:
    if Path(sys.argv[0]).name == "streamworker":
        return "streamworker"
    python = Path(sys.executable)
    home = Path.cwd()
    return f"{python.relative_to(home) if python.is_relative_to(home) else python} -m streamworker"


def _needed(model: str | None) -> str:
    if not model:
        raise StreamworkerError(
            "a configured upstream needs the name of a model: streamworker demo --model NAME"
        )
    return model
