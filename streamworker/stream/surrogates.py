"""Joins characters that a stream splits over two deltas.

A character beyond U+FFFF is a surrogate pair in JSON's escapes, and some upstreams end a delta between the two halves:
in text, in the arguments of a tool call, or wherever else they put strings.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["SurrogateJoiner"]

MAX_HELD = 128
"""Halves that are held at once, so that an upstream that sends halves under ever new names cannot use up memory."""

MAX_NAME = 64
"""Characters that a member's name may have if its text is joined. Known names such as `content` are shorter."""

MAX_DEPTH = 8
"""Levels of a delta in which text is joined. The known ones have at most four."""


class _Item(NamedTuple):
    """An item of an array: its `index` member, or else its position and its type."""

    number: int | None
    position: int
    type: str | None

    def members(self) -> dict[str, Any]:
        """Return the members that identify the item for the assembler of the deltas."""
        members: dict[str, Any] = {} if self.number is None else {"index": self.number}
        return members if self.type is None else members | {"type": self.type}


_Path = tuple[str | _Item, ...]


class SurrogateJoiner:
    """Holds the first half of a split character until the next delta of its choice names the same string."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, _Path], str] = {}
        """Choice and path of a string to the high surrogate that it ended with."""

    def join(self, choice: int, delta: dict[str, Any], *, is_last: bool) -> None:
        """Join the strings of a delta, in place. In a choice's last delta no half is held back any more."""
        self._join_members(choice, (), delta, is_last=is_last)
        if is_last:
            for key in [key for key in self.held if key[0] == choice]:
                _insert(delta, key[1], self.held.pop(key))

    def _join_members(self, choice: int, path: _Path, members: dict[str, Any], *, is_last: bool) -> None:
        for name, value in members.items():
            if isinstance(value, str):
                members[name] = self._join_text(choice, (*path, name), value, is_last=is_last)
            elif len(path) >= MAX_DEPTH:
                continue
            elif isinstance(value, dict):
                self._join_members(choice, (*path, name), value, is_last=is_last)
            elif isinstance(value, list):
                for position, item in enumerate(value):
                    if isinstance(item, dict):
                        step = _item(item, position)
                        self._join_members(choice, (*path, name, step), item, is_last=is_last)

    def _join_text(self, choice: int, path: _Path, text: str, *, is_last: bool) -> str:
        key = (choice, path)
        text = self.held.pop(key, "") + text
        if is_last or not "\ud800" <= text[-1:] <= "\udbff":
            return text
        if len(self.held) >= MAX_HELD or any(len(name) > MAX_NAME for name in path if isinstance(name, str)):
            return text
        self.held[key] = text[-1]
        return text[:-1]


def _item(item: dict[str, Any], position: int) -> _Item:
    index, kind = item.get("index"), item.get("type")
    kind = kind if isinstance(kind, str) and len(kind) <= MAX_NAME else None
    return _Item(index, 0, None) if type(index) is int else _Item(None, position, kind)


def _insert(members: dict[str, Any], path: _Path, half: str) -> None:
    """Put a half that stays alone into a delta, at the path of its string; drop it if a value of another type is there."""
    name, *rest = path
    assert isinstance(name, str)
    value = members.get(name)
    if not rest:
        if value is None or isinstance(value, str):
            members[name] = half + (value or "")
        return
    step = rest[0]
    if value is None:
        value = members[name] = [] if isinstance(step, _Item) else {}
    if isinstance(step, _Item):
        if isinstance(value, list):
            _insert(_find(value, step), tuple(rest[1:]), half)
    elif isinstance(value, dict):
        _insert(value, tuple(rest), half)


def _find(items: list[Any], step: _Item) -> dict[str, Any]:
    for position, item in enumerate(items):
        if isinstance(item, dict) and _item(item, position) == step:
            return item
    item = step.members()
    items.append(item)
    return item
