"""Control records: read and write the value of a cancellation."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

__all__ = ["Cancel", "read_control", "write_cancel"]

NO_REASON = "cancelled by a control record"


class Cancel(msgspec.Struct, frozen=True, tag_field="type", tag="cancel"):
    """A request to every worker to cancel one job."""

    job_id: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    reason: str = NO_REASON
    v: Literal[1] = 1


def read_control(value: bytes) -> Cancel:
    """Read a control record's value. Unknown members are ignored, so that `v` 1 can gain members.

    Raises:
        ValueError: the value is not a control record of a known type; the message says why.
    """
    try:
        return msgspec.json.decode(value, type=Cancel)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from None


def write_cancel(job_id: str, reason: str | None) -> bytes:
    """Return the value of a control record that cancels the job."""
    return msgspec.json.encode(Cancel(job_id, reason or NO_REASON))
