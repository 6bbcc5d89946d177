"""Events as a worker writes them, for tests that write a job's events themselves."""

from __future__ import annotations

import json
from typing import Any

from aiokafka.partitioner import murmur2


def said(*words: str) -> list[dict[str, str]]:
    """Return the messages of a request."""
    return [{"role": "user", "content": " ".join(words)}]


def home(job_id: str, partitions: int = 2) -> int:
    """Return the partition of a job's events."""
    return int(murmur2(job_id.encode()) & 0x7FFFFFFF) % partitions


def written(job_id: str, seq: int, kind: str, **members: Any) -> bytes:
    """Return an event as a worker writes it."""
    event = {"v": 1, "job_id": job_id, "attempt": "a", "seq": seq, "type": kind, "ts": 1_700_000_000_000}
    return json.dumps(event | members).encode()


def started(job_id: str, seq: int = 0) -> bytes:
    """Return a `started` event."""
    source = {"topic": "t", "partition": 0, "offset": 0}
    members = {"model": "m", "upstream": "u", "cause": "new", "source": source, "metadata": {}}
    return written(job_id, seq, "started", **members)


def delta(job_id: str, seq: int, text: str = "x") -> bytes:
    """Return a delta with this content."""
    return written(job_id, seq, "delta", choice=0, delta={"content": text}, finish_reason=None)


def ended(job_id: str, seq: int) -> bytes:
    """Return a terminal event."""
    members: dict[str, Any] = {
        "usage": None,
        "usage_source": "none",
        "error": None,
        "metadata": {},
        "finish_reasons": {},
    }
    return written(job_id, seq, "usage", status="completed", **members)
