"""The records of the state topic, and the OpenAI objects that clients see of them.

Each file is one record. A batch is up to three, in one partition, so that no two processes write the same key: the batch
itself and the record of its run, written by its owner, and its cancellation, written by the gateway that was asked for it.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from streamworker.batch.record import RunRecord  # noqa: TC001 - msgspec reads annotations at run time

__all__ = [
    "ENDED",
    "STATUSES",
    "BatchRecord",
    "CancellationRecord",
    "FileRecord",
    "RunRecordOfBatch",
    "StateRecord",
    "cancellation_key",
    "file_value",
    "read_state",
    "run_key",
    "write_state",
]

STATUSES: Final = (
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
)
ENDED: Final = frozenset({"failed", "completed", "expired", "cancelled"})
"""The statuses after which a batch does not change."""


class FileRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="file"):
    """A file. Times are in seconds since the epoch. `tenant` is empty for files of keys without a tenant."""

    id: str
    tenant: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="batch"):
    """A batch. Times are in seconds since the epoch."""

    id: str
    tenant: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    metadata: dict[str, str] | None = None
    status: str = "validating"
    model: str | None = None
    errors: list[dict[str, Any]] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    ended_at: int | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: dict[str, Any] | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the batch does not change any more."""
        return self.status in ENDED


class CancellationRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="cancellation"):
    """The request to cancel a batch. The time is in seconds since the epoch."""

    batch_id: str
    requested_at: int


class RunRecordOfBatch(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="run"):
    """Where the records of a batch's jobs begin."""

    batch_id: str
    record: RunRecord


StateRecord = FileRecord | BatchRecord | CancellationRecord | RunRecordOfBatch

_DECODER = msgspec.json.Decoder(StateRecord)
_ENCODER = msgspec.json.Encoder()


def cancellation_key(batch_id: str) -> str:
    """Return the key of a batch's cancellation."""
    return f"{batch_id}.cancellation"


def run_key(batch_id: str) -> str:
    """Return the key of the record of a batch's run."""
    return f"{batch_id}.run"


def read_state(value: bytes) -> StateRecord:
    """Read the value of a record. Raises ValueError."""
    try:
        record: StateRecord = _DECODER.decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"it is not the state of a file or a batch: {error}") from None
    return record


def write_state(record: StateRecord) -> bytes:
    """Return the value of a record."""
    return _ENCODER.encode(record)


def file_value(file: FileRecord) -> dict[str, Any]:
    """Return OpenAI's file object."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }
