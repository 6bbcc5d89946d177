"""`reasoning_details`, the array in which OpenRouter streams signed, summarised and encrypted reasoning.

An upstream checks the signature of an entry against the entry's whole text, so the fragments of one entry have to be
merged and those of two entries must not be. OpenRouter writes index 0 for every entry of a stream, so the index alone
does not tell entries apart. A fragment continues the entry before it if type and index are equal, unless

* both have an `id` and these differ, or
* the entry has its signature, and the fragment brings more text with another signature or with none, or
* the fragment has no index and is not the first one of its delta.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamworker.stream.members import Members, append_text, load, read_text
from streamworker.wire.json import encode

if TYPE_CHECKING:
    from streamworker.stream.members import Load

__all__ = ["ReasoningDetails"]

_TEXTS = ("text", "summary", "data")
_IDENTITY = ("type", "index", "id", "signature")


class ReasoningDetails:
    """The entries of one choice. All but the last one are complete, and kept encoded."""

    __slots__ = ("_complete", "_last")

    def __init__(self) -> None:
        self._complete: list[bytes] = []
        self._last: _Entry | None = None

    def add(self, fragments: list[Any]) -> int:
        """Add the fragments of one delta; return by how many bytes the encoded result grew, at least."""
        grown = 0
        for position, fragment in enumerate(fragments):
            if type(fragment) is not dict:
                self._complete_last()
                self._complete.append(encode(fragment))
                grown += len(self._complete[-1])
                continue
            if self._last is None or not self._last.is_continued_by(fragment, is_first=position == 0):
                self._complete_last()
                self._last = _Entry()
            grown += self._last.add(fragment)
        return grown

    def values(self, load: Load = load) -> list[Any]:
        """Return the entries."""
        values = [load(encoded) for encoded in self._complete]
        return values if self._last is None else [*values, self._last.value(load)]

    def _complete_last(self) -> None:
        if self._last is not None:
            self._complete.append(encode(self._last.value()))
            self._last = None


class _Entry:
    __slots__ = ("_identity", "_members", "_texts")

    def __init__(self) -> None:
        self._identity: dict[str, Any] = {}
        self._texts: dict[str, bytearray] = {}
        self._members = Members()

    def is_continued_by(self, fragment: dict[str, Any], *, is_first: bool) -> bool:
        known = self._identity
        if not known.get("type") or fragment.get("type") != known["type"]:
            return False
        index = fragment.get("index")
        if index != known.get("index") or (index is None and not is_first):
            return False
        identifier, signature = fragment.get("id"), fragment.get("signature")
        if identifier and known.get("id") and identifier != known["id"]:
            return False
        is_signed = known.get("signature") and signature != known["signature"]
        return not (is_signed and any(fragment.get(name) for name in _TEXTS))

    def add(self, fragment: dict[str, Any]) -> int:
        grown = 0
        for name, value in fragment.items():
            if name in _TEXTS:
                if type(value) is str:
                    grown += append_text(self._texts.setdefault(name, bytearray()), value)
                continue
            if name in _IDENTITY and value is not None:
                self._identity[name] = value
            grown += self._members.set(name, value)
        return grown

    def value(self, load: Load = load) -> dict[str, Any]:
        return self._members.values(load) | {name: read_text(text) for name, text in self._texts.items()}
