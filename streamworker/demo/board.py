"""What the demo knows of its jobs: a text per job, how each ended, and figures of the last seconds."""

from __future__ import annotations

import unicodedata
from collections import Counter, deque
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from streamworker.stream.usage import generated_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from streamworker.demo.jobs import DemoJob

__all__ = ["Board", "JobView", "printable"]

WINDOW_S: Final = 2.0
"""Deltas per second are those of the last WINDOW_S seconds."""

MAX_TEXT_CHARS: Final = 20_000
"""Characters of a text that are kept for the display: more than fit on a screen."""


def printable(text: str) -> str:
    """Replace line breaks by spaces, and remove what moves the cursor, joins characters or has no width of its own.

    Terminals disagree on the width of joined characters; single ones have one or two cells everywhere.
    """
    kept = (" " if char in "\n\t\r\v\f\x85\u2028\u2029" else char for char in text)
    return "".join(
        char for char in kept if char == " " or not (unicodedata.category(char)[0] == "C" or _joins(char))
    )


def _joins(char: str) -> bool:
    return "\ufe00" <= char <= "\ufe0f" or "\U0001f3fb" <= char <= "\U0001f3ff"


class JobView:
    """One job as its panel shows it."""

    def __init__(self, job: DemoJob, worker: str) -> None:
        self.job = job
        self.worker = worker
        """Name of the worker that runs the job, as far as is known."""
        self.thoughts = ""
        self.text = ""
        self.tools = ""
        self.attempts = 0
        self.note = ""
        """Why the panel has no text, or what happened to the text that it had."""
        self.end: Mapping[str, Any] | None = None
        self.is_lost = False
        """Whether the worker of the job has died and no other attempt has begun."""

    @property
    def status(self) -> str:
        """Return `waiting`, `streaming`, or the status of the terminal event."""
        if self.end is not None:
            return str(self.end["status"])
        if self.is_lost:
            return "waiting"
        return "streaming" if self.text or self.thoughts or self.tools else "waiting"

    @property
    def is_open(self) -> bool:
        """Whether the job has not ended."""
        return self.end is None

    @property
    def reason(self) -> str:
        """Return the code and the message of the terminal event's error, or an empty text."""
        error = (self.end or {}).get("error")
        return f"{error['code']}: {printable(error['message'])}" if error else ""

    def start(self) -> None:
        """Begin an attempt: the text of a former one is void."""
        self.attempts += 1
        self.is_lost = False
        self.thoughts = self.text = self.tools = ""
        self.note = "" if self.attempts == 1 else f"began again: attempt {self.attempts}"

    def add(self, delta: dict[str, Any]) -> None:
        """Add the text, the reasoning and the tool-call fragments of a delta."""
        content, reasoning, _ = generated_text(delta)
        self.thoughts = (self.thoughts + printable(reasoning))[-MAX_TEXT_CHARS:]
        self.text = (self.text + printable(content))[-MAX_TEXT_CHARS:]
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            name, arguments = function.get("name") or "", function.get("arguments") or ""
            self.tools += printable(f" {name} " if name else arguments)


class Board:
    """All jobs. `clock` returns seconds that never jump back; `version` grows with every change."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.views: dict[str, JobView] = {}
        self.version = 0
        self.deltas = 0
        self._clock = clock
        self._submitted: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._recent: deque[float] = deque(maxlen=100_000)

    def submit(self, jobs: Sequence[DemoJob], worker_of: Callable[[DemoJob], str]) -> None:
        """Show the jobs from now on."""
        for job in jobs:
            self.views[job.job_id] = JobView(job, worker_of(job))
            self._submitted[job.job_id] = self._clock()
        self.version += 1

    def take(self, event: Mapping[str, Any]) -> JobView | None:
        """Add an event of a valid attempt; return the view of its job, or None for a job of others."""
        view = self.views.get(str(event["job_id"]))
        if view is None:
            return None
        self.version += 1
        if event["type"] == "started":
            view.start()
        elif event["type"] == "delta":
            self.deltas += 1
            self._recent.append(self._clock())
            self._first.setdefault(view.job.job_id, self._clock())
            view.add(event["delta"])
        elif event["type"] == "usage":
            view.end = event
        return view

    def lose(self, worker: str, note: str) -> list[JobView]:
        """Note that a worker died; return the views of its jobs that had not ended."""
        lost = [view for view in self.views.values() if view.worker == worker and view.is_open]
        for view in lost:
            view.note, view.is_lost = note, True
        self.version += 1
        return lost

    @property
    def open_streams(self) -> int:
        """Number of jobs that stream now."""
        return sum(
            view.status == "streaming" and not view.note.startswith("worker") for view in self.views.values()
        )

    @property
    def is_finished(self) -> bool:
        """Whether every job has ended."""
        return all(not view.is_open for view in self.views.values())

    def first_delta_ms(self, job_id: str) -> float | None:
        """Return the time from the submission to the first delta, in ms."""
        first = self._first.get(job_id)
        return None if first is None else (first - self._submitted[job_id]) * 1000

    def figures(self) -> str:
        """Return streams, deltas per second, median time to the first delta, and tokens by their source."""
        now = self._clock()
        while self._recent and self._recent[0] < now - WINDOW_S:
            self._recent.popleft()
        rate = len(self._recent) / WINDOW_S
        return f"{self.open_streams} streams   {rate:.0f} deltas/s   {self._latency()}   tokens: {self._tokens()}"

    def totals(self) -> str:
        """Return the number of deltas, the median time to the first delta, and tokens by their source."""
        return f"{self.deltas} deltas   {self._latency()}   tokens: {self._tokens()}"

    def _latency(self) -> str:
        firsts = [ms for job_id in self._first if (ms := self.first_delta_ms(job_id)) is not None]
        return f"first delta {median(firsts):.0f} ms" if firsts else "first delta -"

    def _tokens(self) -> str:
        sums: Counter[str] = Counter()
        for view in self.views.values():
            usage = (view.end or {}).get("usage") or {}
            if tokens := usage.get("completion_tokens"):
                sums[str((view.end or {})["usage_source"])] += tokens
        return ", ".join(f"{count} {_SOURCES.get(name, name)}" for name, count in sorted(sums.items())) or "-"


_SOURCES: Final = {"upstream": "reported", "upstream_partial": "partial"}
