"""Merging of deltas that follow one another, for readers and brokers that are paid per record.

Two deltas are merged if they differ in one text alone: the merged delta has both texts, joined. Any other delta
releases the held delta first, so that the order is the upstream's.

* **Live** (`events.coalesce_ms`): text of `content` and reasoning, in deltas that have no other member. The caller
  releases the held delta after a while.
* **Merged** (a job's `deltas: "merged"`): refusals, the arguments of a tool call and the input of a custom tool as
  well. A delta may also have members that many upstreams repeat in every delta: the role, nulls, empty texts, the id
  of the call, and equal members beside the delta.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from streamworker.model import ChunkDelta
from streamworker.wire.json import encode

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MAX_LIVE_BYTES", "MAX_MERGED_BYTES", "Coalescer", "Held"]

MAX_LIVE_BYTES = 4096
"""Of one hold, in UTF-8: 24 KiB of JSON at most, where every character is escaped. Far below any record limit."""

MAX_MERGED_BYTES = 65_536
"""Of one hold, in UTF-8, its other members included: 384 KiB of JSON at most, where every character is escaped."""

_LIVE_TEXTS = frozenset({"content", "reasoning_content", "reasoning"})
_TEXTS = _LIVE_TEXTS | {"refusal"}
_CALL_TEXTS = (("function", "arguments"), ("custom", "input"))
_CALL_MEMBERS = frozenset({"index", "id", "type"})


class _Place(NamedTuple):
    """Where a text stands. `path` names the members that lead to it, `rests` holds what stands beside each of them."""

    choice: int
    path: tuple[str, ...]
    rests: tuple[dict[str, Any], ...] = ({},)
    extra: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET

    def delta(self, text: str) -> ChunkDelta:
        """Return a choice delta with this text at this place."""
        if len(self.path) == 1:
            delta = self.rests[0] | {self.path[0]: text}
        else:
            calls, body, member = self.path
            around, fragment, beside = self.rests
            delta = around | {calls: [fragment | {body: beside | {member: text}}]}
        return ChunkDelta(self.choice, delta, extra=self.extra)


class Held:
    """Choice deltas that wait as one. `since_ms` is when the first one came, `parts` how many there are."""

    __slots__ = ("_place", "_text", "parts", "since_ms", "size")

    def __init__(self, place: _Place, since_ms: int, size: int) -> None:
        self._place = place
        self._text = bytearray()  # joined text would be copied for every part
        self.parts = 0
        self.since_ms = since_ms
        self.size = size

    @property
    def delta(self) -> ChunkDelta:
        """All held deltas as one."""
        return self._place.delta(self._text.decode("utf-8", "surrogatepass"))

    def is_at(self, place: _Place) -> bool:
        """Whether a text at this place may be added."""
        return self._place == place

    def add(self, text: bytes) -> None:
        """Add the text of one more delta."""
        self._text += text
        self.size += len(text)
        self.parts += 1


class Coalescer:
    """Holds deltas of one stream: `held` until the caller has published it and calls `drop`."""

    def __init__(self, *, merged: bool = False, max_bytes: int | None = None) -> None:
        """Hold text for a while, or, if `merged`, every delta that can be merged. `max_bytes` bounds one hold."""
        self.held: Held | None = None
        self._split: Callable[[ChunkDelta], tuple[_Place, str] | None] = _split if merged else _split_live
        self._counts_rests = merged
        self._max_bytes = max_bytes or (MAX_MERGED_BYTES if merged else MAX_LIVE_BYTES)

    def take(self, delta: ChunkDelta, now_ms: int) -> bool:
        """Hold a delta, or add it to what is held. If this is false, the held delta must be published before it."""
        found = self._split(delta)
        if found is None:
            return False
        place, text = found
        encoded = text.encode("utf-8", "surrogatepass")
        held = self.held
        if held is None:
            held = Held(place, now_ms, self._size_beside(place))
        elif not held.is_at(place):
            return False
        if held.size + len(encoded) > self._max_bytes:
            return False
        held.add(encoded)
        self.held = held
        return True

    def drop(self) -> None:
        """Forget the held delta: it is published."""
        self.held = None

    def _size_beside(self, place: _Place) -> int:
        """Return the encoded size of the members beside the text; a live hold has none."""
        if not self._counts_rests:
            return 0
        return len(encode([place.rests, None if place.extra is msgspec.UNSET else place.extra]))


def _split_live(delta: ChunkDelta) -> tuple[_Place, str] | None:
    """Split a delta that is nothing but one text; None for any other.

    A delta with the chunk's own members is not held: they have no bound, and a held delta must have one.
    """
    choice = delta.choice
    if len(delta.delta) != 1 or choice is None or delta.finish_reason is not None:
        return None
    if not (delta.logprobs is delta.chunk is delta.extra is msgspec.UNSET):
        return None
    [(member, text)] = delta.delta.items()
    return (_Place(choice, (member,)), text) if member in _LIVE_TEXTS and type(text) is str else None


def _split(delta: ChunkDelta) -> tuple[_Place, str] | None:
    """Split a delta into one text and everything else; None if it has no text, several, or more than can be merged."""
    if (plain := _split_live(delta)) is not None:  # nearly every delta
        return plain
    choice = delta.choice
    if choice is None or delta.finish_reason is not None or delta.logprobs is not msgspec.UNSET:
        return None
    if delta.chunk is not msgspec.UNSET or not _may_repeat(delta.extra):
        return None
    found = _split_delta(delta.delta)
    if found is None:
        return None
    path, rests, text = found
    return _Place(choice, path, rests, delta.extra), text


def _may_repeat(extra: dict[str, Any] | msgspec.UnsetType) -> bool:
    """Whether members mean the same if they come once or several times. An array does not: it may add to an earlier one."""
    return extra is msgspec.UNSET or not any(type(value) is list for value in extra.values())


_Split = tuple[tuple[str, ...], tuple[dict[str, Any], ...], str]


def _split_delta(delta: dict[str, Any]) -> _Split | None:
    """Find the one text of a delta. The other members have to be a role, nulls and empty texts."""
    member = ""
    for name, value in delta.items():
        if value is None or (name == "role" and type(value) is str):
            continue
        if name == "tool_calls":
            if delta.get(member):
                return None
            member = name
        elif name not in _TEXTS or type(value) is not str:
            return None
        elif not member or (not delta[member] and value):
            member = name
        elif value:
            return None
    if not member:
        return None
    around = {name: value for name, value in delta.items() if name != member}
    if member != "tool_calls":
        return (member,), (around,), delta[member]
    return _split_calls(delta[member], around)


def _split_calls(calls: Any, around: dict[str, Any]) -> _Split | None:
    """Find the one text of a delta that adds one fragment of a tool call and nothing else."""
    if type(calls) is not list or len(calls) != 1 or type(calls[0]) is not dict:
        return None
    [fragment] = calls
    for body, member in _CALL_TEXTS:
        if type(spoken := fragment.get(body)) is dict and type(text := spoken.get(member)) is str:
            rest = {name: value for name, value in fragment.items() if name != body}
            beside = {name: value for name, value in spoken.items() if name != member}
            if (
                _are_facts(rest, _CALL_MEMBERS)
                and _are_facts(beside, {"name"})
                and not beside.get(
                    "name"
                )  # a repeated name is appended where the call's name differs from it
            ):
                return ("tool_calls", body, member), (around, rest, beside), text
    return None


def _are_facts(members: dict[str, Any], known: frozenset[str] | set[str]) -> bool:
    """Whether all members are known, and of types whose values are equal only if they mean the same."""
    return known.issuperset(members) and all(
        value is None or type(value) is str or type(value) is int for value in members.values()
    )
