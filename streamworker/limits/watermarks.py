"""High and low watermarks on a level, for backpressure.

The level is above high from the high mark on, until it falls to the low mark. Between the two the state does
not change, so that it does not oscillate. Callers pause Kafka fetching or a socket, never the poll loop.
"""

from __future__ import annotations

__all__ = ["Watermarks"]


class Watermarks:
    """A level with two marks. `low` defaults to half of `high`."""

    __slots__ = ("high", "is_above_high", "level", "low")

    def __init__(self, high: int, low: int | None = None) -> None:
        if high < 1 or not 0 <= (low if low is not None else 0) < high:
            raise ValueError("marks need 0 <= low < high")
        self.high = high
        self.low = high // 2 if low is None else low
        self.level = 0
        self.is_above_high = False
        """Whether the caller should pause."""

    def add(self, amount: int) -> bool:
        """Raise the level; return whether it is above high."""
        self.level += amount
        if self.level >= self.high:
            self.is_above_high = True
        return self.is_above_high

    def remove(self, amount: int) -> None:
        """Lower the level."""
        self.level -= amount
        assert self.level >= 0, "more was taken out than was put in"
        if self.level <= self.low:
            self.is_above_high = False

    @property
    def room(self) -> int:
        """How much fits below the high mark; 0 while the level is above high."""
        return 0 if self.is_above_high else self.high - self.level
