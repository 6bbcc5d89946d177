"""Draw the board: a header, and a panel per job, in the size of the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console, RenderableType

    from streamworker.demo.board import Board, JobView

__all__ = ["COLOURS", "account", "screen"]

COLOURS: Final = {
    "completed": "green",
    "interrupted": "yellow",
    "failed": "red",
    "rejected": "red",
    "cancelled": "bright_black",
    "expired": "bright_black",
    "waiting": "yellow",
    "streaming": "cyan",
}
_HEADER_LINES: Final = 3
_MIN_WIDTH: Final = 38
_MIN_HEIGHT: Final = 5
_MAX_HEIGHT: Final = 14


def screen(console: Console, board: Board, title: str, act: str) -> RenderableType:
    """Return one whole frame: at most as many panels as fit, none of them cut."""
    width, height = console.size
    columns = max(1, width // _MIN_WIDTH)
    views = list(board.views.values())
    wanted = -(-len(views) // columns) or 1
    fitting = max(1, (height - _HEADER_LINES) // _MIN_HEIGHT)
    shown = views[: columns * min(wanted, fitting)]
    lines = max(_MIN_HEIGHT, min(_MAX_HEIGHT, (height - _HEADER_LINES) // min(wanted, fitting)))
    figures = board.figures()
    if len(shown) < len(views):
        figures = f"{len(views) - len(shown)} more jobs need a larger terminal   {figures}"
    header = [_line(title, "bold"), _line(act, "bold cyan"), _line(figures, "dim")]
    return Group(*header, _grid(console, shown, columns, width // columns, lines))


def _line(text: str, style: str) -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _grid(console: Console, views: Sequence[JobView], columns: int, width: int, height: int) -> Table:
    grid = Table.grid(padding=0)
    for _ in range(columns):
        grid.add_column(width=width)
    for start in range(0, len(views), columns):
        row = [panel(console, view, width, height) for view in views[start : start + columns]]
        grid.add_row(*row, *[""] * (columns - len(row)))
    return grid


def panel(console: Console, view: JobView, width: int, height: int) -> Panel:
    """Return the panel of a job: `width` cells and `height` lines, with the end of its text."""
    colour = COLOURS.get(view.status, "cyan")
    title = Text.assemble((view.job.name, "bold"), " ", (view.status, colour))
    if view.attempts > 1:
        title.append(f", attempt {view.attempts}", "bold yellow")
    subtitle = f"{view.job.title} · {view.worker}" if view.worker else view.job.title
    return Panel(
        _body(console, view, width - 4, height - 2),
        title=title,
        subtitle=Text(subtitle, "dim"),
        width=width,
        height=height,
        border_style=colour,
    )


def _body(console: Console, view: JobView, width: int, height: int) -> Text:
    """Return the last lines of reasoning, text and tool calls, below what there is to say of them."""
    text = Text()
    if view.thoughts:
        text.append(view.thoughts.rstrip() + " ", "dim italic")
    text.append(view.text)
    if view.tools:
        text.append(view.tools, "magenta")
    notes = [part for part in (view.note, view.reason) if part]
    if not text.plain and not notes and view.is_open:
        notes = ["waiting for its first delta"]
    said = [line for note in notes for line in Text(note, COLOURS.get(view.status, "")).wrap(console, width)]
    said = said[: height if not text.plain else max(1, height - 2)]
    lines = [*text.wrap(console, width)] if text.plain else []
    room = height - len(said)
    return Text("\n").join([*said, *lines[-room:]] if room else said)


def account(board: Board, calls: dict[str, int]) -> RenderableType:
    """Return the table of how each job ended. `calls` are the upstream calls by job id."""
    table = Table(box=None, pad_edge=False)
    for name in ("job", "status", "deltas", "tokens", "source", "calls", "why"):
        table.add_column(
            name, no_wrap=name != "why", justify="right" if name in {"deltas", "calls"} else "left"
        )
    for view in board.views.values():
        end = view.end or {}
        usage = end.get("usage") or {}
        tokens = "/".join(str(usage.get(kind, "-")) for kind in ("prompt_tokens", "completion_tokens"))
        table.add_row(
            view.job.name,
            Text(view.status, COLOURS.get(view.status, "")),
            str((end.get("observed") or {}).get("deltas", "")),
            tokens if usage else "-",
            str(end.get("usage_source", "-")),
            str(calls.get(view.job.job_id, end.get("tries", 0))),
            _why(view),
        )
    return table


def _why(view: JobView) -> str:
    error = (view.end or {}).get("error")
    again = f"began again, attempt {view.attempts}" if view.attempts > 1 else ""
    return ", ".join(filter(None, (again, str(error["code"]) if error else "")))
