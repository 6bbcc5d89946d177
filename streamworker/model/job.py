"""The job: one prompt, one upstream call, one terminal event."""

from __future__ import annotations

from typing import Literal

import msgspec

from streamworker.model.record import Coordinates, Headers

__all__ = ["Deltas", "Job", "OnBreak", "Rejection"]

OnBreak = Literal["fail", "restart"]
"""What happens to a job whose stream breaks after its first delta."""


Deltas = Literal["live", "merged"]
"""Whether each delta is published as it comes, or text is held and merged into few events."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A valid job.

    `request` holds the members of the chat-completions body as raw JSON, so that members which the worker
    does not change reach the upstream byte for byte. `deadline` is in seconds since the epoch. `max_wait_s`
    bounds the wait for an upstream that is held or limited. `trace` holds the record's W3C trace-context headers.
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
    deltas: Deltas = "live"
    max_wait_s: float | None = None
    metadata: dict[str, str] = {}
    trace: Headers = ()


class Rejection(msgspec.Struct, frozen=True, kw_only=True):
    """A record that is not a valid job. It gets a dead letter and a terminal event with status `rejected`.

    `job_id` is the record's own if it is readable, else made of the record's coordinates; `model` is None unless the
    record was read as a job. `faults` names
    every fault. No fault repeats the record's content, because faults appear in headers and logs, and prompts
    must not.
    """

    job_id: str
    source: Coordinates
    timestamp: int
    faults: tuple[str, ...]
    reply_to: str | None = None
    model: str | None = None
    trace: Headers = ()
