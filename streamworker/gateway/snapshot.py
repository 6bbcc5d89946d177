"""A job as far as it came: the events of its valid attempt in, one `snapshot` event or one job object out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from streamworker.gateway.feeds import JobSnapshot
from streamworker.handover import Kind
from streamworker.stream.completion import CompletionAssembler
from streamworker.wire.json import encode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamworker.handover import Delivery

__all__ = ["SNAPSHOT_BYTES", "SnapshotBuilder"]

SNAPSHOT_BYTES = 16 << 20
"""Size of a message above which a snapshot leaves out log probabilities, then everything."""


class SnapshotBuilder:
    """Gathers one job. It holds the assembled message, and no events."""

    def __init__(self, job_id: str, *, limit_bytes: int = SNAPSHOT_BYTES) -> None:
        self._job_id = job_id
        self._assembler = CompletionAssembler(limit_bytes=limit_bytes)
        self._model: str | None = None
        self.attempt: str | None = None
        """The valid attempt; None before the first event."""
        self.seq = -1
        """Of the last event that is in the snapshot."""
        self.attempts_seen = 0
        self._ending: Mapping[str, Any] | None = None
        self._ending_value: bytes | None = None

    def add(self, delivery: Delivery) -> None:
        """Take the job's next event."""
        event: dict[str, Any] = msgspec.json.decode(delivery.value)
        self._assembler.read(event)
        self.attempt, self.seq = delivery.attempt, delivery.seq
        if delivery.kind in {Kind.STARTED, Kind.RESTARTED}:
            self.attempts_seen += 1
            model = event.get("model")
            self._model = model if isinstance(model, str) else None
            self._ending = self._ending_value = None
        elif delivery.kind is Kind.ENDED:
            self.attempts_seen = max(1, self.attempts_seen)
            self._ending, self._ending_value = event, delivery.value

    @property
    def has_ended(self) -> bool:
        """Whether the terminal event was added."""
        return self._ending is not None

    @property
    def choices(self) -> list[dict[str, Any]]:
        """The messages as far as they came, each with `choice`, `message` and `finish_reason`."""
        completion = self._assembler.completion()
        return [
            {
                "choice": choice["index"],
                "message": choice["message"],
                "finish_reason": choice["finish_reason"],
            }
            for choice in (completion or {}).get("choices", ())
        ]

    def event(self) -> bytes:
        """Return the value of the `snapshot` event."""
        snapshot: dict[str, Any] = {
            "type": "snapshot",
            "job_id": self._job_id,
            "attempt": self.attempt,
            "seq": self.seq,
            "choices": self.choices,
        }
        if omitted := self._assembler.omitted:
            snapshot["omitted"] = omitted
        return encode(snapshot)

    def job(self, cursor: str) -> JobSnapshot:
        """Return the job. `cursor` is that of the last event, or a place before the first one."""
        status = "waiting" if self.attempt is None else "running"
        if self._ending is not None:
            status = str(self._ending.get("status"))
        return JobSnapshot(
            job_id=self._job_id,
            status=status,
            attempt=self.attempt,
            attempts_seen=self.attempts_seen,
            model=self._model,
            cursor=cursor,
            choices=self.choices,
            ending=self._ending,
            ending_value=self._ending_value,
        )
