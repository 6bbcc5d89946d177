"""The environment of a contender, and the events that the peers write."""

from __future__ import annotations

import os
import time
from typing import Any

BOOTSTRAP = os.environ.get("BENCH_BOOTSTRAP", "")
BASE_URL = os.environ.get("BENCH_BASE_URL", "")
JOBS = os.environ.get("BENCH_JOBS", "")
EVENTS = os.environ.get("BENCH_EVENTS", "")

PRODUCER: dict[str, Any] = {"acks": "all", "enable_idempotence": True, "compression_type": "lz4"}
DELTA_HEADERS = [("content-type", b"application/json"), ("streamworker-type", b"delta")]
USAGE_HEADERS = [("content-type", b"application/json"), ("streamworker-type", b"usage")]


def delta_event(
    job_id: str, attempt: str, seq: int, choice: int, delta: Any, finish_reason: Any
) -> dict[str, Any]:
    """Return a delta event in streamworker's shape."""
    return {
        "type": "delta",
        "job_id": job_id,
        "attempt": attempt,
        "seq": seq,
        "ts": time.time_ns() // 1_000_000,
        "choice": choice,
        "delta": delta,
        "finish_reason": finish_reason,
        "v": 1,
    }


def usage_event(job_id: str, attempt: str, seq: int, usage: Any) -> dict[str, Any]:
    """Return a terminal event with the members that the watcher reads."""
    return {
        "type": "usage",
        "job_id": job_id,
        "attempt": attempt,
        "seq": seq,
        "ts": time.time_ns() // 1_000_000,
        "status": "completed",
        "usage": usage,
        "usage_source": "upstream",
        "v": 1,
    }
