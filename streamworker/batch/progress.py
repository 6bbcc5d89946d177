"""What a run reports about its progress. A clock drives it: the caller passes the time, in seconds, with every call."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

__all__ = ["NO_START", "STALL_S", "Progress", "Snapshot", "duration"]

RATE_S = 120.0
"""Rates and the remaining time are those of the last two minutes."""

STALL_S = 60.0
"""Without an ending for this long, the oldest line in flight is named."""

NO_START = (
    "no job has started for 10 s: is a worker running, and is its upstream held back (metrics, /readyz)?"
)

_SAMPLE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The state of a run at one moment."""

    total: int
    completed: int
    failed: int
    in_flight: int
    lines_per_s: float
    tokens_per_s: float
    eta_s: float | None
    oldest: tuple[str, float] | None = None
    """The custom id and the age, in seconds, of the oldest line in flight, if no line has ended for a minute."""

    @property
    def done(self) -> int:
        """Lines that have ended."""
        return self.completed + self.failed

    def bar_text(self) -> str:
        """Return the text beside a progress bar."""
        share = f"{self.done / self.total:4.0%}".replace("%", " %") if self.total else " 0 %"
        parts = [
            f"{self.done:,}/{self.total:,} {share}",
            f"{self.failed:,} failed",
            f"{self.in_flight:,} in flight",
        ]
        parts += [
            f"{self.lines_per_s:.1f} lines/s",
            f"{_short(self.tokens_per_s)} tok/s",
            f"eta {duration(self.eta_s)}",
        ]
        return " · ".join(parts + [f"oldest {text}" for text in self._oldest()])

    def plain_text(self) -> str:
        """Return one line for a log."""
        text = (
            f"batch: {self.done}/{self.total} done, {self.failed} failed, {self.in_flight} in flight, "
            f"{self.lines_per_s:.1f} lines/s, eta {duration(self.eta_s)}"
        )
        return ", ".join([text, *(f"oldest in flight {text}" for text in self._oldest())])

    def as_object(self) -> dict[str, object]:
        """Return the members of a JSON object."""
        eta = None if self.eta_s is None else round(self.eta_s)
        return {
            "total": self.total,
            "completed": self.completed,
            "failed": self.failed,
            "in_flight": self.in_flight,
            "lines_per_s": round(self.lines_per_s, 1),
            "tokens_per_s": round(self.tokens_per_s, 1),
            "eta_s": eta,
            "oldest": None
            if self.oldest is None
            else {"custom_id": self.oldest[0], "age_s": round(self.oldest[1])},
        }

    def _oldest(self) -> list[str]:
        return [] if self.oldest is None else [f"{self.oldest[1]:.0f} s ({self.oldest[0][:80]})"]


class Progress:
    """Rates over the last two minutes, and the age of what is in flight."""

    def __init__(self, now: float) -> None:
        self._samples: deque[tuple[float, int, int]] = deque([(now, 0, 0)])  # time, lines, tokens
        self._ended_at = now
        self._lines = 0
        self._tokens = 0

    def ended(self, now: float, tokens: int) -> None:
        """Count a line that ended in this run."""
        self._lines += 1
        self._tokens += tokens
        self._ended_at = now

    def since_ending(self, now: float) -> float:
        """Return the seconds since a line has ended, or since the start."""
        return now - self._ended_at

    def rates(self, now: float) -> tuple[float, float]:
        """Return lines and tokens per second."""
        if now - self._samples[-1][0] >= _SAMPLE_S:
            self._samples.append((now, self._lines, self._tokens))
        while len(self._samples) > 1 and self._samples[1][0] <= now - RATE_S:
            self._samples.popleft()
        start, lines, tokens = self._samples[0]
        seconds = max(now - start, _SAMPLE_S)
        return (self._lines - lines) / seconds, (self._tokens - tokens) / seconds

    def snapshot(
        self,
        now: float,
        *,
        total: int,
        completed: int,
        failed: int,
        in_flight: int,
        oldest: tuple[str, float] | None,
    ) -> Snapshot:
        """Return the state. `oldest` is the custom id of the oldest line in flight, and when it was submitted."""
        lines, tokens = self.rates(now)
        left = total - completed - failed
        stalled = oldest is not None and self.since_ending(now) >= STALL_S
        return Snapshot(
            total=total,
            completed=completed,
            failed=failed,
            in_flight=in_flight,
            lines_per_s=lines,
            tokens_per_s=tokens,
            eta_s=left / lines if lines > 0 else (0.0 if left == 0 else None),
            oldest=(oldest[0], now - oldest[1]) if stalled and oldest is not None else None,
        )


def duration(seconds: float | None) -> str:
    """Return hours, minutes and seconds; `-` for an unknown duration."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"
