"""Control records: bytes to a cancellation (contract §1)."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

__all__ = ["Cancel", "read_control", "write_cancel"]

NO_REASON = "cancelled by a control record"


class Cancel(msgspec.Struct, frozen=True, tag_field="type", tag="cancel"):
    """Asks every worker to end a job."""

    job_id: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    reason: str = NO_REASON
    v: Literal[1] = 1


def read_control(value: bytes) -> Cancel:
    """Read a control record's value. Members that are not known are ignored: new ones may come within `v` 1.

    Raises:
        ValueError: it is none that we know; the message says why.
    """
    try:
        return msgspec.json.decode(value, type=Cancel)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from None


def write_cancel(job_id: str, reason: str | None) -> bytes:
    """Return the value of a control record."""
    return msgspec.json.encode(Cancel(job_id, reason or NO_REASON))
