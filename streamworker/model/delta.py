"""The content of one chunk of an event stream, as values."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["ChunkDelta", "Done", "StreamError", "StreamItem"]


class ChunkDelta(msgspec.Struct, gc=False):
    """One choice delta of one chunk, as the upstream sent it.

    `choice` is None for a chunk that has unknown members and no choices. `chunk` holds the chunk's own
    members (id, model, created …) if one of them changed since the last delta. `extra` holds the unknown
    members of the chunk and of the choice.
    """

    choice: int | None
    delta: dict[str, Any]
    finish_reason: str | None = None
    logprobs: Any = msgspec.UNSET
    chunk: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    extra: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class Done(msgspec.Struct, frozen=True):
    """The `[DONE]` sentinel."""


class StreamError(msgspec.Struct, frozen=True):
    """An error that the upstream reports inside its stream, or a payload that is not a chat completion.

    `protocol` is true for the second kind. `status` is the error's code where that is a number in HTTP's
    range, `kind` the error's code or type where that is a name.
    """

    message: str
    frame: str
    status: int | None = None
    kind: str | None = None
    protocol: bool = False
    retry_after_s: float | None = None


StreamItem = ChunkDelta | Done | StreamError
"""What the chunk reader returns."""
