"""How many lines may be submitted now."""

from __future__ import annotations

__all__ = ["MAX_CHUNK_BYTES", "MAX_CHUNK_JOBS", "Window"]

MAX_CHUNK_JOBS = 200
MAX_CHUNK_BYTES = 1 << 20
"""Limits of one transaction. Readers of the job topic wait while a transaction is open."""


class Window:
    """Bounds the lines that are submitted and have not ended.

    Lines are submitted in chunks: a tenth of the window must be free before the next one. A transaction per ended line
    would cost more than the line.
    """

    def __init__(self, size: int) -> None:
        """`size` is at least 1."""
        if size < 1:
            raise ValueError("the window must be at least 1")
        self.size = size
        self._threshold = max(1, min(MAX_CHUNK_JOBS, size // 10))

    def room(self, in_flight: int) -> int:
        """Return how many lines may be submitted now; 0: wait for more endings."""
        free = self.size - in_flight
        return min(free, MAX_CHUNK_JOBS) if free >= self._threshold else 0
