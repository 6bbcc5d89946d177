"""What a run is asked to do, how it can be stopped, and how it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["BatchOptions", "Outcome", "Stop"]


class Stop(IntEnum):
    """How a run is stopped before its end. A greater one may follow a smaller one."""

    DRAIN = 1
    """Submit nothing more, and wait for what is in flight."""
    CANCEL = 2
    """Cancel what is in flight, and write what ends within five seconds."""
    NOW = 3
    """Write what has ended, and leave. What is in flight goes on, and the next run collects it."""


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """What a run does; docs/batch.md describes each option of the command."""

    run: str | None = None
    """The run's name, by which its records are found without its files. None: a new one, kept in the run's record."""
    is_new_run: bool = False
    """`run` was made for this batch: Kafka has none of its records unless the store has the run's record."""
    job_prefix: str = "b."
    topic: str
    window: int = 1000
    upstream: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    on_break: str = "restart"
    expires_in_s: float | None = None
    merges_deltas: bool = False
    skips_invalid: bool = False
    retry_failed: Literal["retriable", "all"] | None = None
    max_errors: int | None = None
    changed: Literal["fail", "keep", "rerun"] = "fail"
    resubmits_unknown: bool = False
    limit: int | None = None
    sorts: bool = False
    overwrites: bool = False
    cancels: bool = False
    """Submit nothing, cancel what is in flight, and stop."""
    stops_on_refusals: bool = True
    """Stop after many endings in a row with a refused key or an empty account. A run of the gateway would stop again at its next start."""
    fails_rest: bool = False
    """Lines that were not submitted when the run was cancelled end as `batch_cancelled`, and the run is finished."""
    timeout_s: float = 10.0
    """Time limit of the first connection to the brokers."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished run: every line is in one of the files. Times are in ms since the epoch."""

    run: str
    total: int
    completed: int
    failed: int
    files: Sequence[str]
    created: int
    expires: int | None
