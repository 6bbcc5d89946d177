"""Admission: how much may be open at once, as marks on a level.

Above the high mark the tap is closed, at or below the low mark it opens again; between the two it stays as it is, so
that it does not flutter. What it closes is Kafka's fetching or a socket's reading, never the poll loop.
"""

from __future__ import annotations

__all__ = ["Watermarks"]


class Watermarks:
    """A level with two marks. `high` is the level at which the tap closes; `low` defaults to half of it."""

    __slots__ = ("high", "is_above_high", "level", "low")

    def __init__(self, high: int, low: int | None = None) -> None:
        if high < 1 or not 0 <= (low if low is not None else 0) < high:
            raise ValueError("marks need 0 <= low < high")
        self.high = high
        self.low = high // 2 if low is None else low
        self.level = 0
        self.is_above_high = False
        """Whether nothing more should be let in."""

    def add(self, amount: int) -> None:
        """Raise the level."""
        self.level += amount
        if self.level >= self.high:
            self.is_above_high = True

    def remove(self, amount: int) -> None:
        """Lower the level."""
        self.level -= amount
        assert self.level >= 0, "more was taken out than was put in"
        if self.level <= self.low:
            self.is_above_high = False

    @property
    def room(self) -> int:
        """How much fits below the high mark; 0 while closed."""
        return 0 if self.is_above_high else self.high - self.level
