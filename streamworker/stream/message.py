"""One choice of a completion: the message that its deltas add up to, and the members beside the message."""

from __future__ import annotations

import binascii
from base64 import b64encode
from typing import TYPE_CHECKING, Any, ClassVar

from streamworker.stream.members import Members, append_text, clean, load, read_text
from streamworker.stream.reasoning_details import ReasoningDetails
from streamworker.stream.tool_calls import CallBody, ToolCalls

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamworker.stream.members import Load

__all__ = ["CHOICE_BYTES", "Choice"]

CHOICE_BYTES = len('{"index":0,"message":{"role":"assistant","content":null}},')
"""What a choice adds to the encoded result, at least."""

_BASE64_QUAD = 4
_ASSEMBLED = frozenset({"index", "message", "logprobs", "finish_reason"})
_REASONING = ("reasoning_content", "reasoning")


class Choice:
    """Gathers one choice. Methods that add something return by how many bytes the encoded result grew, at least."""

    __slots__ = (
        "_audio",
        "_details",
        "_extra",
        "_function_call",
        "_logprobs",
        "_members",
        "_reasoning",
        "_refusal",
        "_role",
        "_tool_calls",
        "content",
        "finish_reason",
    )

    def __init__(self) -> None:
        self.content: bytearray | None = None
        """UTF-8. None until a string came, even an empty one."""
        self.finish_reason: str | None = None
        """The last one that a delta brought."""
        self._role: str | None = None
        self._refusal: bytearray | None = None
        self._reasoning = bytearray()
        self._details: ReasoningDetails | None = None
        self._tool_calls: ToolCalls | None = None
        self._function_call: CallBody | None = None
        self._audio: _Audio | None = None
        self._members: Members | None = None
        self._extra: Members | None = None
        self._logprobs: Members | None = None

    def add(self, delta: dict[str, Any]) -> int:
        """Add one delta."""
        grown = 0
        for name, value in delta.items():
            if value is None or name in _REASONING:
                continue
            add = self._rules.get(name)
            grown += self._add_member(name, value) if add is None else add(self, value)
        return grown + self._add_reasoning(delta)

    def add_extra(self, name: str, value: Any) -> int:
        """Add an unknown member that stood beside the delta; it replaces nothing that is assembled."""
        if name in _ASSEMBLED:
            return 0
        if self._extra is None:
            self._extra = Members()
        return self._extra.set(name, value)

    def add_logprobs(self, logprobs: Any) -> int:
        """Append log probabilities. A value that is not an object, or has no members, is ignored."""
        if type(logprobs) is not dict or not logprobs:
            return 0
        gathered = self._logprobs
        if gathered is None:
            gathered = self._logprobs = Members()
        return sum(
            [
                gathered.extend(name, value) if type(value) is list else gathered.set(name, value)
                for name, value in logprobs.items()
            ]
        )

    def drop_logprobs(self) -> None:
        """Forget the log probabilities."""
        self._logprobs = None

    def value(self, index: int, finish_reason: str | None, load: Load = load) -> dict[str, Any]:
        """Return the choice."""
        value: dict[str, Any] = {"index": index, "message": self._message(load), "logprobs": None}
        if self._logprobs is not None:
            value["logprobs"] = {"content": None, "refusal": None} | self._logprobs.values(load)
        value["finish_reason"] = finish_reason
        return value if self._extra is None else value | self._extra.values(load)

    def _message(self, load: Load) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": self._role or "assistant",
            "content": None if self.content is None else read_text(self.content),
            "refusal": None if self._refusal is None else read_text(self._refusal),
        }
        if self._reasoning:
            message["reasoning_content"] = read_text(self._reasoning)
        if self._details is not None:
            message["reasoning_details"] = self._details.values(load)
        if self._tool_calls is not None and (calls := self._tool_calls.values(load)):
            message["tool_calls"] = calls
        if self._function_call is not None:
            message["function_call"] = self._function_call.value(load)
        if self._audio is not None:
            message["audio"] = self._audio.value(load)
        return message if self._members is None else message | self._members.values(load)

    def _add_role(self, role: Any) -> int:
        if self._role is not None or type(role) is not str or not role:
            return 0
        self._role = clean(role)
        return len(role) - len("assistant")

    def _add_content(self, content: Any) -> int:
        """Add a string, or a list of parts, whose texts are content and whose thoughts are reasoning."""
        if type(content) is str:
            return self._add_text(content)
        grown = 0
        for part in _objects(content):
            if type(text := part.get("text")) is str:
                grown += self._add_text(text)
            thinking = part.get("thinking")
            thoughts = (
                [thinking] if type(thinking) is str else [item.get("text") for item in _objects(thinking)]
            )
            grown += sum([append_text(self._reasoning, text) for text in thoughts if type(text) is str])
        return grown

    def _add_text(self, text: str) -> int:
        if self.content is None:
            self.content = bytearray()
        return append_text(self.content, text)

    def _add_refusal(self, refusal: Any) -> int:
        if type(refusal) is not str:
            return 0
        if self._refusal is None:
            self._refusal = bytearray()
        return append_text(self._refusal, refusal)

    def _add_reasoning(self, delta: dict[str, Any]) -> int:
        """Add a delta's reasoning from the first member that has some: others repeat it under another name."""
        for name in _REASONING:
            if type(text := delta.get(name)) is str and text:
                return append_text(self._reasoning, text)
        grown = 0
        for detail in _objects(delta.get("reasoning_details")):
            text = detail.get("text") or detail.get("summary")
            if type(text) is str:
                grown += append_text(self._reasoning, text)
        return grown

    def _add_details(self, details: Any) -> int:
        if type(details) is not list or not details:
            return 0
        if self._details is None:
            self._details = ReasoningDetails()
        return self._details.add(details)

    def _add_tool_calls(self, fragments: Any) -> int:
        if self._tool_calls is None:
            self._tool_calls = ToolCalls()
        return self._tool_calls.add(fragments)

    def _add_function_call(self, fragment: Any) -> int:
        if type(fragment) is not dict:
            return 0
        if self._function_call is None:
            self._function_call = CallBody("arguments")
        return self._function_call.add(fragment)

    def _add_audio(self, fragment: Any) -> int:
        if type(fragment) is not dict:
            return 0
        if self._audio is None:
            self._audio = _Audio()
        return self._audio.add(fragment)

    def _add_member(self, name: str, value: Any) -> int:
        if self._members is None:
            self._members = Members()
        return self._members.set(name, value)

    _rules: ClassVar[dict[str, Callable[[Choice, Any], int]]] = {
        "role": _add_role,
        "content": _add_content,
        "refusal": _add_refusal,
        "reasoning_details": _add_details,
        "tool_calls": _add_tool_calls,
        "function_call": _add_function_call,
        "audio": _add_audio,
    }
    """How each known member of a delta is added, where it is not null."""


class _Audio:
    """Base64 whose pieces may each be padded or be cut anywhere, a transcript, and other members."""

    __slots__ = ("_data", "_members", "_rest", "_transcript")

    def __init__(self) -> None:
        self._data = bytearray()
        self._rest = ""
        self._transcript = bytearray()
        self._members = Members()

    def add(self, fragment: dict[str, Any]) -> int:
        grown = 0
        for name, value in fragment.items():
            if name == "data":
                grown += self._add_data(value)
            elif name == "transcript":
                grown += append_text(self._transcript, value) if type(value) is str else 0
            else:
                grown += self._members.set(name, value)
        return grown

    def value(self, load: Load = load) -> dict[str, Any]:
        """Return the audio with every member that OpenAI's type requires; 0 is an expiry that has passed."""
        data = bytes(self._data) + _decoded(self._rest + "=" * (-len(self._rest) % _BASE64_QUAD))
        value = {"id": "", "expires_at": 0} | self._members.values(load)
        return value | {"data": b64encode(data).decode(), "transcript": read_text(self._transcript)}

    def _add_data(self, data: Any) -> int:
        if type(data) is not str:
            return 0
        text = self._rest + data
        whole = len(text) - len(text) % _BASE64_QUAD
        self._rest = text[whole:]
        self._data += _decoded(text[:whole])
        return len(data)


def _decoded(text: str) -> bytes:
    """Decode base64; text that is not base64 gives no bytes."""
    try:
        return binascii.a2b_base64(text)
    except ValueError:
        return b""


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if type(item) is dict] if type(value) is list else []
