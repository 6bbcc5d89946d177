"""Show the board: as panels in a terminal, or as one line per event where the output is not a terminal."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, Protocol

from rich.live import Live

from streamworker.demo.panels import screen

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rich.console import Console

    from streamworker.demo.board import Board, JobView

__all__ = ["Display", "Lines", "Panels", "display_for"]

FRAMES_PER_S: Final = 10


class Display(Protocol):
    """Shows what happens."""

    title: str
    act: str

    def event(self, view: JobView, kind: str) -> None:
        """Show an event of a job: `started`, `first`, `usage` or `lost`."""

    def begin(self, act: str) -> None:
        """Show what is to be seen next."""

    def titled(self) -> None:
        """Show the title, which has changed."""

    def running(self) -> object:
        """Return an asynchronous context manager that shows the board meanwhile."""


class Lines:
    """One line per event that matters."""

    def __init__(self, console: Console, board: Board, title: str) -> None:
        self._console = console
        self._board = board
        self.title = title
        self.act = ""

    def begin(self, act: str) -> None:
        """Print the act."""
        self.act = act
        self._print(act)

    def titled(self) -> None:
        """Print the title."""
        self._print(self.title)

    def event(self, view: JobView, kind: str) -> None:
        """Print what happened to a job."""
        name = f"{view.job.name:<9}"
        if kind == "started":
            where = f" on {view.worker}" if view.worker else ""
            self._print(f"{name} started{where}" if view.attempts == 1 else f"{name} {view.note}{where}")
        elif kind == "first":
            first = self._board.first_delta_ms(view.job.job_id) or 0
            self._print(f"{name} first delta after {first:.0f} ms")
        elif kind == "lost":
            self._print(f"{name} {view.note}")
        else:
            deltas = (view.end or {}).get("observed", {}).get("deltas", 0)
            detail = f": {view.reason}" if view.reason else ""
            self._print(f"{name} {view.status} after {deltas} deltas{detail}")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Print nothing of its own: every line is printed when it is known."""
        yield

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)


class Panels:
    """Panels on the terminal's alternate screen, which leaves nothing in the scrollback."""

    def __init__(self, console: Console, board: Board, title: str) -> None:
        self._console = console
        self._board = board
        self.title = title
        self.act = ""

    def begin(self, act: str) -> None:
        """Show the act in the second line."""
        self.act = act

    def titled(self) -> None:
        """Do nothing: the next frame has the title."""

    def event(self, view: JobView, kind: str) -> None:
        """Do nothing: the next frame shows the board."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Paint a frame whenever something has changed, at most FRAMES_PER_S times per second."""
        with Live(console=self._console, screen=True, auto_refresh=False) as live:
            task = asyncio.create_task(self._paint(live))
            try:
                yield
            finally:
                task.cancel()
                await asyncio.wait([task])

    async def _paint(self, live: Live) -> None:
        painted: object = None
        while True:
            state = (self._board.version, self._board.figures(), self.title, self.act, self._console.size)
            if state != painted:
                live.update(screen(self._console, self._board, self.title, self.act), refresh=True)
                painted = state
            await asyncio.sleep(1 / FRAMES_PER_S)


def display_for(console: Console, board: Board, title: str) -> Lines | Panels:
    """Return the display that fits the output."""
    is_screen = console.is_terminal and not console.is_dumb_terminal
    return (Panels if is_screen else Lines)(console, board, title)
