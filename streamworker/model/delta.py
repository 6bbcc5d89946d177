"""What one chunk of an event stream says, as values."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["ChunkDelta", "Done", "StreamError", "StreamItem"]


class ChunkDelta(msgspec.Struct, gc=False):
    """One choice delta of one chunk, as the upstream sent it.

    `choice` is None for a chunk without choices that carried members we do not know. `chunk` holds the chunk's own
    members (id, model, created …) when one of them changed since the last delta. `extra` holds unknown members of the
    chunk and the choice.
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
    """The stream says that generation failed, or says something that is no chat completion.

    `protocol` is true for the second. `status` is the code in the frame where it is a number, HTTP-like.
    """

    message: str
    frame: str
    status: int | None = None
    kind: str | None = None
    protocol: bool = False


StreamItem = ChunkDelta | Done | StreamError
"""What the chunk reader hands out."""
