"""Show the progress of a batch on standard error: a bar, lines, JSON objects, or nothing. A clock drives it."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Protocol

import click

from streamworker.cli.shared import HINT_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from streamworker.batch.engine import Engine

__all__ = ["MODES", "shown"]

MODES = ("auto", "bar", "plain", "json", "none")

BAR_S = 0.25
LINE_S = 10.0


class _View(Protocol):
    interval_s: float

    def show(self, engine: Engine) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class _Nothing:
    """Notes only."""

    interval_s = LINE_S

    def show(self, engine: Engine) -> None: ...

    def note(self, text: str) -> None:
        click.echo(text, err=True)

    def close(self) -> None: ...


class _Plain(_Nothing):
    """A line every ten seconds; the first one after three."""

    def show(self, engine: Engine) -> None:
        if engine.is_working:
            click.echo(engine.snapshot().plain_text(), err=True)
        else:
            click.echo(f"batch: {engine.phase} ({engine.lines:,} lines)", err=True)


class _Json(_Nothing):
    """An object every ten seconds."""

    def show(self, engine: Engine) -> None:
        state = "working" if engine.is_working else engine.phase
        click.echo(
            json.dumps({"type": "progress", "state": state, **engine.snapshot().as_object()}), err=True
        )

    def note(self, text: str) -> None:
        click.echo(json.dumps({"type": "note", "text": text}), err=True)


class _Bar(_Nothing):
    """A bar that is drawn four times per second."""

    interval_s = BAR_S

    def __init__(self) -> None:
        from rich.console import Console  # noqa: PLC0415 - of the extra `batch`
        from rich.progress import BarColumn, Progress, TextColumn  # noqa: PLC0415

        self._progress = Progress(
            BarColumn(bar_width=20),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            auto_refresh=False,
        )
        self._task = self._progress.add_task("", total=None)
        self._progress.start()

    def show(self, engine: Engine) -> None:
        if engine.is_working:
            snapshot = engine.snapshot()
            self._progress.update(
                self._task, total=snapshot.total, completed=snapshot.done, description=snapshot.bar_text()
            )
        else:
            self._progress.update(self._task, description=f"{engine.phase} ({engine.lines:,} lines)")
        self._progress.refresh()

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


def _view(mode: str) -> _View:
    """Return the view of a mode. `auto` is a bar on a terminal, if rich is installed, and lines elsewhere."""
    if mode in {"auto", "bar"}:
        if mode == "bar" or sys.stderr.isatty():
            try:
                return _Bar()
            except ImportError:
                if mode == "bar":
                    click.echo(
                        "--progress bar needs the extra `batch`: pip install 'streamworker[batch]'", err=True
                    )
        return _Plain()
    return {"plain": _Plain, "json": _Json, "none": _Nothing}[mode]()


class Shown:
    """The progress that is shown. `engine` is set when there is one."""

    def __init__(self, view: _View) -> None:
        self.engine: Engine | None = None
        self._view = view

    def note(self, text: str) -> None:
        """Print a text."""
        self._view.note(text)

    async def run(self) -> None:
        """Show the progress until cancelled."""
        await asyncio.sleep(min(HINT_S, self._view.interval_s))
        while True:
            if self.engine is not None:
                self._view.show(self.engine)
            await asyncio.sleep(self._view.interval_s)


@asynccontextmanager
async def shown(mode: str) -> AsyncIterator[Shown]:
    """Show progress within the block."""
    view = _view(mode)
    progress = Shown(view)
    task = asyncio.create_task(progress.run())
    try:
        yield progress
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        if progress.engine is not None and isinstance(view, _Bar):
            view.show(progress.engine)
        view.close()
