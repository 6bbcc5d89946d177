"""Merging text deltas that follow one another, for readers and brokers that are paid per record.

Only what is nothing but text is merged: one string member, of one choice, with nothing beside it. Whatever else comes
first lets go of what is held, so that the order of everything is the upstream's.
"""

from __future__ import annotations

import msgspec

from streamworker.model import ChunkDelta

__all__ = ["MAX_HELD_CHARS", "Coalescer", "Held"]

MAX_HELD_CHARS = 1024
"""Of one hold: 4 KiB of UTF-8, and 6 KiB of JSON where every character is escaped: far below any record limit."""

_TEXT_MEMBERS = frozenset({"content", "reasoning_content", "reasoning"})


class Held(msgspec.Struct):
    """Text that waits. `since_ms` is when its first part came, `parts` how many choice deltas it is."""

    choice: int | None
    member: str
    text: str
    since_ms: int
    parts: int = 0

    @property
    def news(self) -> ChunkDelta:
        """All of it as one choice delta."""
        return ChunkDelta(self.choice, {self.member: self.text})


class Coalescer:
    """Holds text of one stream: `held` until the caller has let go of it."""

    def __init__(self) -> None:
        self.held: Held | None = None

    def take(self, news: ChunkDelta, now_ms: int) -> bool:
        """Hold a delta, or add it to what is held. If this says no, what is held has to leave before it."""
        member = _text_member(news)
        if member is None:
            return False
        text = news.delta[member]
        held = self.held
        if held is None:
            held = Held(news.choice, member, "", now_ms)
        elif held.choice != news.choice or held.member != member:
            return False
        if len(held.text) + len(text) > MAX_HELD_CHARS:
            return False
        held.text += text
        held.parts += 1
        self.held = held
        return True

    def drop(self) -> None:
        """Let go of what was held: it is published."""
        self.held = None


def _text_member(news: ChunkDelta) -> str | None:
    """Name the one member of a delta that is nothing but text; None for any other.

    A delta that tells the chunk's own members goes alone: they have no bound, and what is held has to have one.
    """
    if len(news.delta) != 1 or news.choice is None or news.finish_reason is not None:
        return None
    if not (news.logprobs is news.chunk is news.extra is msgspec.UNSET):
        return None
    [(member, text)] = news.delta.items()
    return member if member in _TEXT_MEMBERS and type(text) is str else None
