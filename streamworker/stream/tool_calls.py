"""Tool calls, put together from fragments of which providers agree on no member.

Which call a fragment belongs to:

* With an `index`, the last call that was opened with this index. Without one, the call with the fragment's `id`, else
  the last call.
* The fragment opens a new call if there is no such call, or if it brings both an id that is not that call's and a
  name. A new id alone is a changed id of the same call: some upstreams send a second id, or a random one per chunk.
  An id and a name under a used index are a second call: some upstreams write index 0 throughout.
* Without `index` and `id`, a name opens a new call, unless the last call has no name yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamworker.stream.members import Members, append_text, clean, load, read_text
from streamworker.wire.json import encode

if TYPE_CHECKING:
    from streamworker.stream.members import Load

__all__ = ["CallBody", "ToolCalls"]

_CALL_BYTES = len('{"id":"","type":"","function":{"name":"","arguments":""}},')
_TEXT_MEMBERS = {"function": "arguments", "custom": "input"}
_MAX_INDEX_DIGITS = 18


class CallBody:
    """The member `function`, `custom` or `function_call`: a name, and a text of which every fragment has a piece."""

    __slots__ = ("_members", "_name", "_text", "_text_member")

    def __init__(self, text_member: str) -> None:
        self._text_member = text_member
        self._name = bytearray()
        self._text = bytearray()
        self._members: Members | None = None

    @property
    def has_name(self) -> bool:
        """Whether a name came that is not empty."""
        return bool(self._name)

    def add(self, fragment: dict[str, Any]) -> int:
        """Add one fragment; return by how many bytes the result grew."""
        grown = 0
        for name, value in fragment.items():
            if name == "name":
                grown += self._add_name(value)
            elif name == self._text_member:
                grown += self._add_text(value)
            elif value is not None:
                if self._members is None:
                    self._members = Members()
                grown += self._members.set(name, value)
        return grown

    def value(self, load: Load = load) -> dict[str, Any]:
        """Return the name and the text, empty if they never came, and the other members."""
        value: dict[str, Any] = {"name": read_text(self._name), self._text_member: read_text(self._text)}
        return value if self._members is None else value | self._members.values(load)

    def _add_name(self, name: Any) -> int:
        if type(name) is not str or not name:
            return 0
        # Some upstreams repeat the name in every fragment.
        if self._name == name.encode("utf-8", "surrogatepass"):
            return 0
        return append_text(self._name, name)

    def _add_text(self, text: Any) -> int:
        if type(text) is str:
            return append_text(self._text, text)
        if type(text) in {
            dict,
            list,
        }:  # some servers send the arguments as an object instead of its JSON text
            return append_text(self._text, encode(text).decode())
        return 0


class _ToolCall:
    __slots__ = ("bodies", "id", "members", "type")

    def __init__(self) -> None:
        self.id: str | None = None
        self.type: str | None = None
        self.bodies: dict[str, CallBody] = {}
        self.members: Members | None = None

    @property
    def has_name(self) -> bool:
        return any(body.has_name for body in self.bodies.values())

    def add(self, fragment: dict[str, Any]) -> int:
        grown = 0
        for name, value in fragment.items():
            if name in _TEXT_MEMBERS:
                if type(value) is dict:
                    grown += self._body(name).add(value)
            elif name == "id":
                if self.id is None and (identifier := _text(value)) is not None:
                    self.id = identifier
                    grown += len(identifier)
            elif name == "type":
                if self.type is None and (kind := _text(value)) is not None:
                    self.type = kind
                    grown += len(kind)
            elif name != "index" and value is not None:
                if self.members is None:
                    self.members = Members()
                grown += self.members.set(name, value)
        return grown

    def value(self, position: int, load: Load) -> dict[str, Any]:
        kind = self.type or ("custom" if list(self.bodies) == ["custom"] else "function")
        value: dict[str, Any] = {"id": self.id or f"call_{position}", "type": kind}
        needed = kind if kind in _TEXT_MEMBERS else "function"
        for name, text_member in _TEXT_MEMBERS.items():
            if name in self.bodies or name == needed:
                value[name] = self.bodies.get(name, CallBody(text_member)).value(load)
        return value if self.members is None else value | self.members.values(load)

    def _body(self, name: str) -> CallBody:
        body = self.bodies.get(name)
        if body is None:
            body = self.bodies[name] = CallBody(_TEXT_MEMBERS[name])
        return body


class ToolCalls:
    """The tool calls of one choice, in the order in which they were opened."""

    __slots__ = ("_by_id", "_by_index", "_calls")

    def __init__(self) -> None:
        self._calls: list[_ToolCall] = []
        self._by_index: dict[int, _ToolCall] = {}
        self._by_id: dict[str, _ToolCall] = {}

    def add(self, fragments: Any) -> int:
        """Add the fragments of one delta; return by how many bytes the result grew."""
        if type(fragments) is not list:
            return 0
        return sum([self._add(fragment) for fragment in fragments if type(fragment) is dict])

    def values(self, load: Load = load) -> list[dict[str, Any]]:
        """Return the calls without `index`. One that never had an id is named by its position."""
        return [call.value(position, load) for position, call in enumerate(self._calls)]

    def _add(self, fragment: dict[str, Any]) -> int:
        index, identifier = _index(fragment.get("index")), _text(fragment.get("id"))
        call = self._continued(index, identifier)
        grown = 0
        if call is None or _opens(call, index, identifier, has_name=_has_name(fragment)):
            call = _ToolCall()
            grown = _CALL_BYTES
            self._calls.append(call)
            if index is not None:
                self._by_index[index] = call
        grown += call.add(fragment)
        if call.id is not None and call.id == identifier:
            self._by_id[identifier] = call
        return grown

    def _continued(self, index: int | None, identifier: str | None) -> _ToolCall | None:
        if index is not None:
            return self._by_index.get(index)
        if identifier is not None and identifier in self._by_id:
            return self._by_id[identifier]
        return self._calls[-1] if self._calls else None


def _opens(call: _ToolCall, index: int | None, identifier: str | None, *, has_name: bool) -> bool:
    """Whether a fragment that would continue a call opens another one."""
    if not has_name:
        return False
    if identifier is not None:
        return call.id is not None and call.id != identifier
    return index is None and call.has_name


def _has_name(fragment: dict[str, Any]) -> bool:
    bodies = [fragment.get(name) for name in _TEXT_MEMBERS]
    return any(type(body) is dict and _text(body.get("name")) is not None for body in bodies)


def _index(index: Any) -> int | None:
    """Read an index. `"0"` and 0.0 are 0. A value that is not a whole number is ignored, as null is."""
    if type(index) is int:
        return index
    if type(index) is float and index.is_integer():
        return int(index)
    if type(index) is str and index.isascii() and index.isdigit() and len(index) <= _MAX_INDEX_DIGITS:
        return int(index)
    return None


def _text(value: Any) -> str | None:
    return clean(value) if type(value) is str and value else None
