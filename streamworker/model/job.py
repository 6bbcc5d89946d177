"""The job: one prompt, one upstream call wanted, one terminal event owed (contract §2)."""

from __future__ import annotations

from typing import Literal

import msgspec

from streamworker.model.record import Coordinates, Headers

__all__ = ["Job", "OnBreak", "Rejection"]

OnBreak = Literal["fail", "restart"]
"""What a stream that breaks after its first delta does."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A valid job.

    `request` holds the members of the chat-completions body as raw JSON, so that what we do not touch goes upstream
    byte for byte. `deadline` is in seconds since the epoch. `trace` are the W3C trace-context headers of the record.
    """

    job_id: str
    source: Coordinates
    timestamp: int
    model: str
    request: dict[str, msgspec.Raw]
    upstream: str | None = None
    deadline: float | None = None
    reply_to: str | None = None
    on_break: OnBreak = "fail"
    metadata: dict[str, str] = {}
    trace: Headers = ()


class Rejection(msgspec.Struct, frozen=True, kw_only=True):
    """A record that is not a valid job: what is owed is a dead letter and a `rejected` terminal event.

    `job_id` is as given if readable, else made of the record's coordinates. `faults` names every fault, and none of
    them repeats the record's content: prompts do not belong in headers and logs.
    """

    job_id: str
    source: Coordinates
    timestamp: int
    faults: tuple[str, ...]
    reply_to: str | None = None
    trace: Headers = ()
