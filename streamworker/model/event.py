"""The events that a worker publishes. The order of the fields is their order on the wire, after the `type` tag."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from streamworker.model.ending import JobError, Status, UsageSource

__all__ = [
    "Cause",
    "DeltaEvent",
    "Event",
    "Observed",
    "Result",
    "Source",
    "Started",
    "Timing",
    "UsageEvent",
    "Voided",
]

Cause = Literal["new", "redelivered", "restart"]
"""Why an attempt was opened."""


class Source(msgspec.Struct, frozen=True):
    """The coordinates of a record."""

    topic: str
    partition: int
    offset: int


class Started(msgspec.Struct, tag_field="type", tag="started", kw_only=True):
    """The first event of every attempt: `seq` 0. `ts` is ms since the epoch on the worker's clock."""

    v: Literal[1] = 1
    job_id: str
    attempt: str
    seq: int = 0
    ts: int
    model: str
    upstream: str
    cause: Cause
    source: Source
    metadata: dict[str, str]


class DeltaEvent(msgspec.Struct, tag_field="type", tag="delta", gc=False):
    """One choice delta. The fields are positional because one event is created per delta."""

    job_id: str
    attempt: str
    seq: int
    ts: int
    choice: int | None
    delta: dict[str, Any]
    finish_reason: str | None
    logprobs: Any = msgspec.UNSET
    chunk: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    extra: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    v: Literal[1] = 1


class Observed(msgspec.Struct, frozen=True):
    """Counts of what the worker received. Characters are Unicode code points; `bytes` counts the response
    body as received."""

    deltas: int = 0
    chunks: int = 0
    content_chars: int = 0
    reasoning_chars: int = 0
    bytes: int = 0


class Timing(msgspec.Struct, frozen=True):
    """Durations in ms: record timestamp to start, start to first delta (None without a delta), start to end."""

    queued: int | None
    first_delta: int | None
    total: int


class Voided(msgspec.Struct, frozen=True):
    """Calls that were paid for besides the attempt's last one: how many reported usage, and the sum of their reports."""

    calls: int
    usage: dict[str, Any]


class UsageEvent(msgspec.Struct, tag_field="type", tag="usage", kw_only=True):
    """The terminal event: the last event of a job, exactly one."""

    v: Literal[1] = 1
    job_id: str
    attempt: str
    seq: int
    ts: int
    status: Status
    finish_reasons: dict[str, str]
    usage: dict[str, Any] | None
    usage_source: UsageSource
    estimate_method: str | msgspec.UnsetType = msgspec.UNSET
    observed: Observed
    error: JobError | None
    timing: Timing
    tries: int
    voided: Voided | msgspec.UnsetType = msgspec.UNSET
    metadata: dict[str, str]


Event = Started | DeltaEvent | UsageEvent


class Result(UsageEvent, tag_field="type", tag="result", kw_only=True):
    """The terminal event and the whole completion. `omitted` names the parts that were left out for their size.

    `model` is None if the job record could not be read, `upstream` is None if none was chosen. `source` is the job record,
    `events` the attempt's `started` event: None if there is none or its offset is not known.
    """

    model: str | None
    upstream: str | None
    source: Source
    events: Source | None
    completion: dict[str, Any] | None
    omitted: list[str]
