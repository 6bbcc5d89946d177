"""One job's events as the body of an OpenAI event stream.

Each delta event becomes one chunk with the upstream's own members restored. `[DONE]` follows a completed job only: for
any other end there is an error frame, on which OpenAI's clients raise.

There is no I/O here. The caller passes the events of the valid attempt in their order, and writes what it gets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from streamworker.gateway.chat_errors import failure_of, superseded
from streamworker.model import ChunkDelta
from streamworker.stream.coalesce import Coalescer
from streamworker.stream.completion import MEMBERS_OF_THE_CHUNK, second_of
from streamworker.wire.json import encode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamworker.gateway.errors import ApiError

__all__ = ["PING", "ChatStream", "UsagePlace", "job_member"]

UsagePlace = Literal["chunk", "finish"]
"""Where usage is sent: in a last chunk without choices, or in the last chunk with a finish reason."""

PING: Final = b": ping\n\n"
"""The keep-alive: a comment. An `id` or `retry` field would make openai-python dispatch an event without data."""

_DONE: Final = b"data: [DONE]\n\n"
_MAX_MERGED_BYTES: Final = 1 << 16
"""Of merged text in one chunk, in UTF-8."""

_OWN_MEMBERS: Final = frozenset({"id", "object", "created", "model", "choices", "usage", "streamworker"})
"""Members that this module writes; an upstream's member of the same name would be there twice."""
_OWN_MEMBERS_OF_A_CHOICE: Final = _OWN_MEMBERS | {"index", "delta", "finish_reason", "logprobs"}

_NOTHING = msgspec.Raw(b"")


class _Delta(msgspec.Struct, gc=False):
    choice: int | None
    delta: msgspec.Raw
    finish_reason: str | None = None
    logprobs: msgspec.Raw = _NOTHING
    chunk: dict[str, Any] | None = None
    extra: dict[str, Any] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it has nothing beside the delta, as nearly every event."""
        return self.finish_reason is None and not (self.logprobs or self.chunk or self.extra)


_decode_delta = msgspec.json.Decoder(_Delta).decode
_decode = msgspec.json.Decoder().decode


class ChatStream:
    """Turns the events of one job into the frames of one response.

    `started`, `delta` and `ended` take the values of records, and return the bytes to write, which may be empty.
    """

    __slots__ = (
        "_attempt_has_begun",
        "_coalescer",
        "_created",
        "_extra",
        "_head",
        "_held",
        "_id",
        "_include_usage",
        "_is_visible",
        "_job_id",
        "_last_choice",
        "_model",
        "_place",
        "_repeated_roles",
        "_roles",
        "failure",
        "has_delta",
        "is_over",
    )

    def __init__(
        self, job_id: str, *, include_usage: bool = False, usage_place: UsagePlace = "chunk"
    ) -> None:
        self.has_delta = False
        """Whether a delta of a choice was read."""
        self.failure: ApiError | None = None
        """Why the stream ended without `[DONE]`."""
        self.is_over = False
        """Whether the last frame was returned."""
        self._job_id = job_id
        self._include_usage = include_usage
        self._place = usage_place
        self._attempt_has_begun = False
        self._is_visible = False
        self._roles: set[int] = set()  # choices whose role was sent
        self._repeated_roles: set[int] = set()  # of these, those whose role the new attempt sends again
        self._last_choice = 0
        self._coalescer = Coalescer(max_bytes=_MAX_MERGED_BYTES)
        self._extra: dict[str, Any] = {}  # of chunks without choices, for the next chunk with one
        self._held: bytes | None = None  # a chunk with a finish reason, without its end
        self._id, self._model, self._created = f"chatcmpl-{job_id}", "", 0
        self._head = self._head_of({})

    def started(self, value: bytes) -> bytes:
        """Take the `started` of an attempt. If text of a former attempt was sent, the stream ends with an error."""
        if self._is_visible:
            return self.fail(superseded(self._job_id))
        if self._attempt_has_begun:
            self._repeated_roles = set(self._roles)
            self._coalescer.drop()
            self._extra, self._held = {}, None
        self._attempt_has_begun = True
        event = _decode(value)
        self._model, self._created = str(event.get("model", "")), event.get("ts", 0) // 1000
        self._head = self._head_of({})
        return b""

    def delta(self, value: bytes, *, merge: bool = False) -> bytes:
        """Take a delta. With `merge`, text is held until another delta or `flush`: fewer chunks for a slow reader."""
        delta = _decode_delta(value)
        if delta.choice is None:
            return self._without_choice(delta)
        self.has_delta = True
        if merge and delta.is_plain:
            return self._merge(delta)
        return self.flush() + self._chunk(delta)

    def flush(self) -> bytes:
        """Return the text that is held for merging."""
        held = self._coalescer.held
        if held is None:
            return b""
        self._coalescer.drop()
        news = held.delta
        assert news.choice is not None
        return self._chunk(_Delta(news.choice, msgspec.Raw(encode(news.delta))))

    def ended(self, value: bytes) -> bytes:
        """Take the terminal event."""
        ending = _decode(value)
        frames = self.flush()
        self.failure = failure_of(ending, self._job_id)
        self.is_over = True
        if self.failure is None:
            return frames + self._last_chunk(ending) + _DONE
        if self._is_visible and ending.get("usage") is not None:
            frames += self._last_chunk(ending)
        return frames + self._released() + self._error(self.failure)

    def fail(self, failure: ApiError) -> bytes:
        """End the stream for a reason that is not the job's end."""
        self.failure = failure
        self.is_over = True
        return self.flush() + self._released() + self._error(failure)

    # Chunks

    def _merge(self, delta: _Delta) -> bytes:
        news = ChunkDelta(delta.choice, _decode(delta.delta))
        if self._coalescer.take(news, 0):
            return b""
        frames = self.flush()
        return frames if self._coalescer.take(news, 0) else frames + self._chunk(delta)

    def _without_choice(self, delta: _Delta) -> bytes:
        """Take an event of a chunk without choices."""
        if delta.chunk:
            self._head = self._head_of(delta.chunk)
        extra = _foreign(delta.extra or {})
        if not extra:
            return b""
        if self._place == "finish":  # for readers that take `choices[0]` of every chunk
            self._extra |= extra
            return b""
        return self.flush() + self._closed(self._head + b',"choices":[]' + _members(extra))

    def _chunk(self, delta: _Delta) -> bytes:
        assert delta.choice is not None
        frames = self._released()
        self._last_choice = delta.choice
        if delta.chunk:
            self._head = self._head_of(delta.chunk)
        body = self._without_repeated_role(delta.choice, delta.delta) if self._repeated_roles else delta.delta
        if not self._is_visible:
            self._note_visible(delta, body)
        of_choice, of_chunk = b"", b""
        if delta.extra or self._extra:
            of_choice, of_chunk = self._extras(delta.extra or {})
        if len(delta.logprobs):
            of_choice = b',"logprobs":' + bytes(delta.logprobs) + of_choice
        reason = b"null" if delta.finish_reason is None else encode(delta.finish_reason)
        chunk = b'%b,"choices":[{"index":%d,"delta":%b%b,"finish_reason":%b}]%b' % (
            (self._head, delta.choice, bytes(body), of_choice, reason, of_chunk)
        )
        if delta.finish_reason is not None and self._include_usage and self._place == "finish":
            self._held = chunk
            return frames
        return frames + self._closed(chunk)

    def _note_visible(self, delta: _Delta, body: msgspec.Raw) -> None:
        """Note whether this delta shows something that another attempt cannot take back."""
        members = _decode(body)
        if members.get("role"):
            self._roles.add(self._last_choice)
        self._is_visible = delta.finish_reason is not None or any(
            value not in (None, "", [], {}) for name, value in members.items() if name != "role"
        )

    def _without_repeated_role(self, choice: int, body: msgspec.Raw) -> msgspec.Raw:
        """Leave out the role of a new attempt: readers that add deltas up would have it twice."""
        members = _decode(body)
        if choice not in self._repeated_roles or "role" not in members:
            return body
        self._repeated_roles.discard(choice)
        del members["role"]
        return msgspec.Raw(encode(members))

    def _extras(self, extra: Mapping[str, Any]) -> tuple[bytes, bytes]:
        """Return the unknown members of the choice and of the chunk, encoded."""
        of_choice = {
            name: value
            for name, value in extra.items()
            if name not in MEMBERS_OF_THE_CHUNK and name not in _OWN_MEMBERS_OF_A_CHOICE
        }
        of_chunk = {name: value for name, value in extra.items() if name in MEMBERS_OF_THE_CHUNK}
        of_chunk, self._extra = self._extra | of_chunk, {}
        return _members(of_choice), _members(_foreign(of_chunk))

    def _head_of(self, chunk: Mapping[str, Any]) -> bytes:
        """Return the chunk's own members, encoded and without the closing brace."""
        identifier, model = chunk.get("id"), chunk.get("model")
        own = {
            "id": identifier if type(identifier) is str and identifier else self._id,
            "object": "chat.completion.chunk",
            "created": second_of(chunk.get("created")) or self._created,
            "model": model if type(model) is str and model else self._model,
        }
        return encode(own | _foreign(chunk))[:-1]

    # Ends

    def _last_chunk(self, ending: Mapping[str, Any]) -> bytes:
        """Return the chunk with the usage, if it was asked for, and with the unknown members that are still to be sent."""
        if not self._include_usage:
            return _frame(self._blank() + b"}") if self._extra else b""
        members = {"usage": ending.get("usage"), "streamworker": job_member(self._job_id, ending)}
        if self._place == "chunk":
            return _frame(self._head + b',"choices":[]' + _members(members) + b"}")
        held, self._held = self._held, None
        body = self._blank() if held is None else held + self._extras({})[1]
        return _frame(body + _members(members) + b"}")

    def _blank(self) -> bytes:
        """Return a chunk with an empty delta, without its end."""
        choice = b'{"index":%d,"delta":{},"finish_reason":null}' % self._last_choice
        return self._head + b',"choices":[' + choice + b"]" + self._extras({})[1]

    def _released(self) -> bytes:
        """Return the held chunk: another one followed, or the usage is not known."""
        held, self._held = self._held, None
        return b"" if held is None else _frame(held + b"}")

    def _closed(self, chunk: bytes) -> bytes:
        is_null = self._include_usage and self._place == "chunk"
        return _frame(chunk + (b',"usage":null}' if is_null else b"}"))

    def _error(self, failure: ApiError) -> bytes:
        return _frame(encode({"error": failure.value() | {"job_id": self._job_id}}))


def job_member(job_id: str, ending: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `streamworker` member beside the usage: what OpenAI's own members cannot express."""
    return {"job_id": job_id, "usage_source": ending.get("usage_source"), "status": ending.get("status")}


def _foreign(members: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if name not in _OWN_MEMBERS}


def _members(members: Mapping[str, Any]) -> bytes:
    """Return further members of an object, encoded."""
    return b"," + encode(members)[1:-1] if members else b""


def _frame(payload: bytes) -> bytes:
    if b"\n" in payload or b"\r" in payload:  # a line end between members would end the event
        payload = encode(_decode(payload))
    return b"data: %b\n\n" % payload
