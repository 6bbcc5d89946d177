"""The chunk reader: server-sent events of a chat completion in, deltas out.

It accepts every known deviation from OpenAI's format, because neither the members of a chunk nor their types
can be relied on. Known members go to their places, unknown members to `extra`; nothing is added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from streamworker.model import ChunkDelta, Done, StreamError, StreamItem
from streamworker.stream.provider_errors import error_in
from streamworker.stream.usage import generated_text
from streamworker.text import truncate
from streamworker.wire.json import (
    InvalidJSON,
    decode,
    decode_strict,
    encode,
    is_shallow,
    replace_surrogates,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamworker.stream.sse import ServerSentEvent
    from streamworker.stream.usage import Ledger

__all__ = ["MAX_CHOICES", "ChunkReader"]

MAX_CHOICES = 128
"""Choices that a stream may open. No API offers more completions; openai-node has the same bound for tool calls."""

MAX_REASON_BYTES = 256
"""Limit for a finish reason, which is kept per choice until the end. The longest known reason has 30 bytes."""

MAX_JOINED_NAME = 64
"""Characters that a member's name may have if its text is joined over deltas. Known names such as `content`
are shorter."""

_DONE = Done()
_BLANKS = b" \t\r\n\x0c"
# The chunk's own members. They are reported with the first delta and whenever one of them changes.
_CHUNK_MEMBERS = ("id", "object", "created", "model", "system_fingerprint", "service_tier")
# `obfuscation` is padding against traffic analysis and carries no information: it is dropped.
_KNOWN_IN_CHUNK = frozenset({*_CHUNK_MEMBERS, "choices", "usage", "error", "obfuscation"})
_KNOWN_IN_CHOICE = frozenset({"index", "delta", "finish_reason", "logprobs", "usage"})
# An object with one of these members is a chunk. An object without any is a keep-alive.
_CHUNK_MARKS = frozenset({*_CHUNK_MEMBERS, "choices", "usage"})


class _UsualChoice(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    delta: dict[str, Any]
    index: int = 0
    finish_reason: str | None = None
    logprobs: Any = None


class _UsualChunk(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """The format of nearly every chunk, decoded in one call, in a third of the time of the careful path.

    Both paths must give the same result: a chunk with an error, an unknown member or a member of an
    unexpected type does not decode as this type.
    """

    choices: list[_UsualChoice]
    id: Any = msgspec.UNSET
    object: Literal["chat.completion.chunk"] | msgspec.UnsetType = msgspec.UNSET
    created: Any = msgspec.UNSET
    model: Any = msgspec.UNSET
    system_fingerprint: Any = msgspec.UNSET
    service_tier: Any = msgspec.UNSET
    usage: dict[str, Any] | None = None
    error: None = None
    obfuscation: Any = None

    @property
    def members(self) -> tuple[Any, ...]:
        """The values of `_CHUNK_MEMBERS`, in the same order."""
        return (self.id, self.object, self.created, self.model, self.system_fingerprint, self.service_tier)


_USUAL = msgspec.json.Decoder(_UsualChunk)


class ChunkReader:
    """Reads the events of one try. It reports chunks and usage to `ledger`; the attempt counts deltas when it
    publishes them."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._chunk: dict[str, Any] | None = None
        self._usual_members: tuple[Any, ...] | None = None  # of `_chunk`, if the fast path read it
        self.finish_reasons: dict[int, str | None] = {}
        """Choice index to reason; None while the choice is unfinished."""
        self._high_surrogates: dict[tuple[int, str], str] = {}

    @property
    def is_finished(self) -> bool:
        """Whether at least one choice was opened and every one has its finish reason."""
        return bool(self.finish_reasons) and None not in self.finish_reasons.values()

    @property
    def chunk(self) -> dict[str, Any]:
        """The latest chunk's own members (id, model, created …); empty before the first chunk."""
        return self._chunk or {}

    def read(self, event: ServerSentEvent) -> Sequence[StreamItem]:
        """Read one event; return its deltas in the upstream's order, then the item that ends the stream, if any."""
        if event.type == "message" and not self._high_surrogates and is_shallow(event.data):
            try:
                return self._usual_items(_USUAL.decode(event.data))
            except (ValueError, RecursionError):  # ValueError covers msgspec's errors and UnicodeDecodeError
                pass
        return self._read_carefully(event)

    def _usual_items(self, chunk: _UsualChunk) -> list[ChunkDelta]:
        if len(self.finish_reasons) + len(chunk.choices) > MAX_CHOICES:
            raise ValueError("too many choices; the careful path reports which")
        self._ledger.chunks += 1
        items: list[ChunkDelta] = []
        for choice in chunk.choices:
            delta = ChunkDelta(choice.index, choice.delta, self._finish(choice.index, choice.finish_reason))
            if choice.logprobs is not None:
                delta.logprobs = choice.logprobs
            items.append(delta)
        if items and (members := chunk.members) != self._usual_members:
            named = zip(_CHUNK_MEMBERS, members, strict=True)
            self._report_chunk(items[0], {name: value for name, value in named if value is not msgspec.UNSET})
            self._usual_members = members
        if chunk.usage:
            self._ledger.report(chunk.usage, final=self.is_finished)
        return items

    def _read_carefully(self, event: ServerSentEvent) -> list[StreamItem]:
        try:
            payload = decode_strict(event.data)
        except InvalidJSON:
            return self._read_leniently(event)
        if self._high_surrogates:
            payload = self._repaired(payload)
        return self._payload_items(payload, event)

    def _read_leniently(self, event: ServerSentEvent) -> list[StreamItem]:
        try:
            payload = decode(event.data)
        except InvalidJSON as error:
            return self._not_json(event, error)
        return self._payload_items(self._repaired(payload), event)

    def _payload_items(self, payload: Any, event: ServerSentEvent) -> list[StreamItem]:
        if type(payload) is list and len(payload) == 1:  # Google wraps errors in an array
            payload = payload[0]
        if type(payload) is dict:
            return self._object(payload, event.type)
        if payload is None:
            return []
        return [_protocol_error("an event whose data is not a JSON object", event.data)]

    def _not_json(self, event: ServerSentEvent, error: InvalidJSON) -> list[StreamItem]:
        text = event.data.strip(_BLANKS)
        if text == b"[DONE]":
            return [_DONE]
        if not text:  # an empty `data:` line is a keep-alive
            return []
        if event.type == "error":
            return [StreamError(message=truncate(event.text), frame=truncate(event.text))]
        return [_protocol_error(f"an event whose data is not JSON: {error}", event.data)]

    def _object(self, payload: dict[str, Any], event_type: str) -> list[StreamItem]:
        error = error_in(payload, event_type)
        if error is not None and not payload.get("choices"):
            self._report_usage(payload, None)
            return [error]
        if _CHUNK_MARKS.isdisjoint(payload):
            return []
        is_first = not self.finish_reasons
        items = self._chunk_items(payload)
        if error is None:
            return items
        deltas = [item for item in items if isinstance(item, ChunkDelta)]
        if is_first and not any(any(generated_text(item.delta)) for item in deltas):
            # The frame is an error in the shape of a chunk. No text was generated, so another try can still
            # give the whole answer.
            self.finish_reasons.clear()
            self._chunk = None
            return [error]
        return [*deltas, error]

    def _chunk_items(self, payload: dict[str, Any]) -> list[StreamItem]:
        """Read a chunk. Choices before a malformed choice are kept."""
        self._ledger.chunks += 1
        items: list[StreamItem] = []
        malformed = None
        choices = payload.get("choices") or []
        try:
            for choice in _array(choices):
                items.append(self._read_choice(choice))  # noqa: PERF401 - choices before a malformed one are kept
        except _Malformed as error:
            malformed = _protocol_error(str(error), encode(payload))
        self._attach(payload, items)
        self._report_usage(payload, choices)
        return items if malformed is None else [*items, malformed]

    def _attach(self, payload: dict[str, Any], items: list[StreamItem]) -> None:
        """Attach the chunk's own and unknown members to its first delta, or to an event of their own if there
        is not a delta."""
        first = items[0] if items else None
        if not _KNOWN_IN_CHUNK.issuperset(payload):
            extra = {name: payload[name] for name in payload if name not in _KNOWN_IN_CHUNK}
            if not isinstance(first, ChunkDelta) or (
                first.extra and not extra.keys().isdisjoint(first.extra)
            ):
                first = ChunkDelta(None, {})
                items.insert(0, first)
            first.extra = {**extra, **(first.extra or {})}
        if isinstance(first, ChunkDelta):
            self._usual_members = None
            self._report_chunk(first, {name: payload[name] for name in _CHUNK_MEMBERS if name in payload})

    def _report_chunk(self, first: ChunkDelta, chunk: dict[str, Any]) -> None:
        """Attach the chunk's own members to its first delta if they differ from those reported last."""
        if chunk != self._chunk:
            first.chunk = chunk
            # Readers may skip an event without a choice, so the next delta repeats the members.
            self._chunk = chunk if first.choice is not None else None

    def _read_choice(self, choice: Any) -> ChunkDelta:
        if type(choice) is not dict:
            raise _Malformed("a choice that is not an object")
        delta = choice.get("delta")
        if delta is None:  # Azure's annotation chunks have none
            delta = {}
        elif type(delta) is not dict:
            raise _Malformed("a delta that is not an object")
        index = _index(choice.get("index"))
        item = ChunkDelta(index, delta, self._finish(index, choice.get("finish_reason")))
        if choice.get("logprobs") is not None:
            item.logprobs = choice["logprobs"]
        if not _KNOWN_IN_CHOICE.issuperset(choice):
            item.extra = {name: choice[name] for name in choice if name not in _KNOWN_IN_CHOICE}
        return item

    def _finish(self, index: int, reason: Any) -> str | None:
        """Record a choice's finish reason and return it if it is new. The last non-null reason counts."""
        reasons = self.finish_reasons
        if index not in reasons:
            if len(reasons) >= MAX_CHOICES:
                raise _Malformed(f"more than {MAX_CHOICES} choices")
            reasons[index] = None
        if reason is None or reason == "":  # some gateways send "" instead of null
            return None
        text = truncate(reason if isinstance(reason, str) else str(reason), MAX_REASON_BYTES)
        if text == reasons[index]:
            return None
        reasons[index] = text
        return text

    def _report_usage(self, payload: dict[str, Any], choices: Any) -> None:
        usage = payload.get("usage")
        if not usage:
            usage = _vendor_usage(payload, choices)
        if usage and isinstance(usage, dict):
            self._ledger.report(usage, final=self.is_finished)

    def _repaired(self, payload: Any) -> Any:
        """Make every string valid Unicode; join characters that are split over two deltas.

        A character beyond U+FFFF is a surrogate pair in JSON's escapes, and some upstreams end a delta
        between the two. The first half is kept for the next delta of its choice and member. A half that stays
        alone becomes U+FFFD.
        """
        choices = payload.get("choices") if isinstance(payload, dict) else None
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict) and isinstance(delta := choice.get("delta"), dict):
                for name, text in delta.items():
                    if isinstance(text, str):
                        delta[name] = self._join(text, choice, name)
            if isinstance(choice, dict) and choice.get("finish_reason") is not None:
                self._flush_surrogates(choice)
        return replace_surrogates(payload)

    def _flush_surrogates(self, choice: dict[str, Any]) -> None:
        """Return the halves that are kept for a choice which ends without naming the member again."""
        index = _index(choice.get("index"))
        for key in [key for key in self._high_surrogates if key[0] == index]:
            if not isinstance(choice.get("delta"), dict):
                choice["delta"] = {}
            choice["delta"][key[1]] = self._high_surrogates.pop(key) + (choice["delta"].get(key[1]) or "")

    def _join(self, text: str, choice: dict[str, Any], name: str) -> str:
        key = (_index(choice.get("index")), name)
        text = self._high_surrogates.pop(key, "") + text
        is_last = choice.get("finish_reason") is not None
        is_split = not is_last and "\ud800" <= text[-1:] <= "\udbff"
        if is_split and len(self._high_surrogates) < MAX_CHOICES and len(name) <= MAX_JOINED_NAME:
            self._high_surrogates[key] = text[-1]
            return text[:-1]
        return text


class _Malformed(Exception):
    """A chunk cannot be read. The message says why, without repeating the chunk's content."""


def _protocol_error(message: str, data: bytes) -> StreamError:
    return StreamError(
        message=f"the upstream sent {message}", frame=truncate(data.decode("utf-8", "replace")), protocol=True
    )


def _index(index: Any) -> int:
    """Return a choice's index; a missing or invalid index is 0."""
    return index if type(index) is int else 0


def _array(choices: Any) -> list[Any]:
    if type(choices) is not list:
        raise _Malformed("a chunk whose choices are not an array")
    return choices


def _vendor_usage(payload: dict[str, Any], choices: Any) -> Any:
    """Return usage from where Groq (`x_groq`) and Moonshot (the choice) put it."""
    groq = payload.get("x_groq")
    if isinstance(groq, dict) and groq.get("usage"):
        return groq["usage"]
    listed = choices if isinstance(choices, list) else []
    found = [choice["usage"] for choice in listed if isinstance(choice, dict) and choice.get("usage")]
    return found[-1] if found else None
