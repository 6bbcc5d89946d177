"""Job ids that the client makes: UUIDs of version 7 (RFC 9562 section 5.7), which begin with the time."""

from __future__ import annotations

import re
import secrets
import time
from uuid import UUID

__all__ = ["new_job_id", "submitted_ms"]

_UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\Z", re.IGNORECASE)


def new_job_id(now_ms: int | None = None) -> str:
    """Return a new id: 48 bits of time in ms, 74 random bits."""
    time_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    number = (time_ms & (1 << 48) - 1) << 80 | 0x7 << 76 | secrets.randbits(12) << 64 | 0b10 << 62
    return str(UUID(int=number | secrets.randbits(62)))


def submitted_ms(job_id: str) -> int | None:
    """Return the time, in ms since the epoch, of an id that ends in a UUID of version 7; None for other ids."""
    found = _UUID7.search(job_id)
    return int(found[0].replace("-", "")[:12], 16) if found else None
