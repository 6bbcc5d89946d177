"""The demo's display: panels with the text of each job while it streams, then a table with how each job ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.columns import Columns
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from streamworker.reader import Notice
from streamworker.stream.usage import generated_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

    from streamworker.demo.jobs import DemoJob
    from streamworker.reader import Reading

__all__ = ["Picture"]

_WIDTH, _HEIGHT = 39, 3  # two panels side by side on 80 columns, and all of them on 24 lines
_COLOURS = {"completed": "green", "interrupted": "yellow", "failed": "red", "rejected": "magenta"}


class Picture:
    """The state of every panel, updated with an event reader's readings."""

    def __init__(self, jobs: Sequence[DemoJob]) -> None:
        self._views = {job.job_id: _View(job) for job in jobs}
        self.deltas = 0

    def take(self, reading: Reading) -> None:
        """Add an event to its panel."""
        view = self._views.get(str(reading.event["job_id"]))
        if view is not None and reading.notice is Notice.VALID:
            self.deltas += reading.event["type"] == "delta"
            view.take(reading.event)

    @property
    def is_finished(self) -> bool:
        """Whether every job has ended."""
        return all(view.usage is not None for view in self._views.values())

    def live(self) -> RenderableType:
        """Return the panels of the jobs."""
        return Columns([view.panel() for view in self._views.values()], padding=(0, 1))

    def result(self) -> RenderableType:
        """Return the table of how each job ended."""
        table = Table(box=None, pad_edge=False)
        for name in ("job", "status", "deltas", "tokens", "counted by", "total", "why"):
            table.add_column(name, no_wrap=True)
        for view in self._views.values():
            table.add_row(*view.row())
        return Group("", table)


class _View:
    def __init__(self, job: DemoJob) -> None:
        self._job = job
        self._text = Text()
        self.usage: Mapping[str, Any] | None = None

    def take(self, event: Mapping[str, Any]) -> None:
        if event["type"] == "delta":
            content, reasoning, _ = generated_text(event["delta"])
            self._text.append(reasoning, style="dim italic")
            self._text.append(content)
        elif event["type"] == "usage":
            self.usage = event

    def panel(self) -> Panel:
        status = str(self.usage["status"]) if self.usage else "…"
        colour = _COLOURS.get(status, "cyan")
        lines = Text(" ".join(self._text.plain.split()))[-(_WIDTH - 4) * _HEIGHT :]
        title = f"[bold]{self._job.job_id.rpartition('-')[2]}[/] [{colour}]{status}[/]"
        return Panel(
            lines,
            title=title,
            subtitle=self._job.title,
            width=_WIDTH,
            height=_HEIGHT + 2,
            border_style=colour,
        )

    def row(self) -> tuple[str, ...]:
        name = self._job.job_id.rpartition("-")[2]
        if self.usage is None:
            return name, "?", "", "", "", "", ""
        timing, error = self.usage["timing"], self.usage["error"]
        tokens = self.usage["usage"] or {}
        counted = "/".join(str(tokens.get(kind, "-")) for kind in ("prompt_tokens", "completion_tokens"))
        colour = _COLOURS.get(self.usage["status"], "cyan")
        return (
            name,
            f"[{colour}]{self.usage['status']}[/]",
            str(self.usage["observed"]["deltas"]),
            counted if tokens else "-",
            str(self.usage["usage_source"]),
            f"{timing['total']} ms",
            "" if error is None else str(error["code"]),
        )
