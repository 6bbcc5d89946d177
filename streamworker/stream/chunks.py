"""The chunk reader: server-sent events of a chat completion in, deltas out.

It accepts every known deviation from OpenAI's format, because neither the members of a chunk nor their types
can be relied on. Known members go to their places, unknown members to `extra`; nothing is added.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from streamworker.model import ChunkDelta, Done, StreamError, StreamItem
from streamworker.stream.provider_errors import error_in, error_of_object, has_words, may_be_error
from streamworker.stream.sse import BARE_JSON
from streamworker.stream.surrogates import SurrogateJoiner
from streamworker.stream.usage import generated_text
from streamworker.text import truncate
from streamworker.wire.json import (
    InvalidJSON,
    decode_lenient,
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

MAX_NULLS = 16
"""Names of unknown members that may be null on the fast path, per stream. vLLM sends three."""

_DONE = Done()
_BLANKS = b" \t\r\n\x0c"
# The chunk's own members. They are reported with the first delta and whenever one of them changes.
_CHUNK_MEMBERS = ("id", "object", "created", "model", "system_fingerprint", "service_tier")
# `obfuscation` is padding against traffic analysis and carries no information: it is dropped.
_KNOWN_IN_CHUNK = frozenset({*_CHUNK_MEMBERS, "choices", "usage", "error", "obfuscation"})
_KNOWN_IN_CHOICE = frozenset({"index", "delta", "finish_reason", "logprobs", "usage", "error"})
# An object with one of these members is a chunk.
_CHUNK_MARKS = frozenset({*_CHUNK_MEMBERS, "choices", "usage"})
_KEEP_ALIVES = frozenset({"ping", "pong", "heartbeat", "keepalive", "keep-alive", "keep_alive"})
_KEEP_ALIVE_MEMBERS = frozenset({*_KEEP_ALIVES, "time", "timestamp", "ts"})
# Finish reasons that say that generation failed: `error`, `network_error`, `failed`, `upstream_error`.
_FAILED = re.compile(r"(?i)(.*[\s_-])?(error|failed|failure)")


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


@lru_cache(maxsize=64)
def _usual_decoder(nulls: frozenset[str], choice_nulls: frozenset[str]) -> msgspec.json.Decoder[_UsualChunk]:
    """Return the decoder of usual chunks that also accepts these unknown members if they are null."""
    choice: Any = _UsualChoice
    chunk: Any = _UsualChunk
    if choice_nulls:
        choice = msgspec.defstruct("_UsualChoice", **_null_members(choice_nulls, _UsualChoice))
    if nulls or choice_nulls:
        fields = _null_members(nulls, _UsualChunk)
        fields["fields"].append(("choices", list[choice]))
        chunk = msgspec.defstruct("_UsualChunk", **fields)
    return msgspec.json.Decoder(chunk)


def _null_members(names: frozenset[str], base: type) -> dict[str, Any]:
    renamed = {f"null_{number}": name for number, name in enumerate(sorted(names))}
    return {
        "fields": [(field, None, None) for field in renamed],
        "bases": (base,),
        "rename": renamed,
        "kw_only": True,
        "forbid_unknown_fields": True,
        "gc": False,
    }


class ChunkReader:
    """Reads the events of one try. It reports chunks and usage to `ledger`; the attempt counts deltas when it
    publishes them."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._chunk: dict[str, Any] | None = None
        self._usual_members: tuple[Any, ...] | None = None  # of `_chunk`, if the fast path read it
        self.finish_reasons: dict[int, str | None] = {}
        """Choice index to reason; None while the choice is unfinished."""
        self._surrogates = SurrogateJoiner()
        self._held = self._surrogates.held
        self._nulls: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
        self._decode_usual = _usual_decoder(*self._nulls).decode
        # The first object that was neither a chunk nor a keep-alive, or a chunk that may be an error, until another
        # choice follows it.
        self._unexplained: StreamError | None = None

    @property
    def is_finished(self) -> bool:
        """Whether at least one choice was opened and every one has its finish reason."""
        return bool(self.finish_reasons) and None not in self.finish_reasons.values()

    @property
    def failure(self) -> StreamError | None:
        """The error of a stream that ended without an error frame: a finish reason that says that it failed, or, if a
        choice is unfinished or none was opened, an object that was not understood and that no choice followed."""
        return self._finish_failure or (None if self.is_finished else self._unexplained)

    @property
    def _finish_failure(self) -> StreamError | None:
        for index, reason in self.finish_reasons.items():
            if reason is not None and _FAILED.fullmatch(reason):
                return _finish_error(index, reason)
        return None

    @property
    def is_complete(self) -> bool:
        """Whether the whole answer was received: what follows cannot make it fail."""
        return self.is_finished and self.failure is None

    @property
    def has_loose_ends(self) -> bool:
        """Whether the next chunk may be read otherwise than an equal one before it: a half of a character is kept, the
        chunk's own members are to be repeated, a choice has its finish reason, or an object was not understood."""
        is_finished = any(reason is not None for reason in self.finish_reasons.values())
        return bool(self._held) or self._chunk is None or is_finished or self._unexplained is not None

    @property
    def chunk(self) -> dict[str, Any]:
        """The latest chunk's own members (id, model, created …); empty before the first chunk."""
        return self._chunk or {}

    def read(self, event: ServerSentEvent) -> Sequence[StreamItem]:
        """Read one event; return its deltas in the upstream's order, then the item that ends the stream, if any."""
        if event.type == "message" and not self._held and is_shallow(event.data):
            try:
                return self._usual_items(self._decode_usual(event.data))
            except (ValueError, RecursionError):  # ValueError covers msgspec's errors and UnicodeDecodeError
                pass
        return self._read_carefully(event)

    def read_document(self, document: bytes) -> list[StreamItem] | None:
        """Read a whole completion that the upstream sent instead of a stream: one delta per choice, then the end.

        Return None if the document is not a completion.
        """
        try:
            payload = decode_lenient(document)
        except InvalidJSON:
            return None
        if type(payload) is list and len(payload) == 1:
            payload = payload[0]
        choices = payload.get("choices") if type(payload) is dict else None
        if type(choices) is not list or not any(
            type(choice) is dict and type(choice.get("message")) is dict for choice in choices
        ):
            return None
        payload["choices"] = [_as_delta(choice) if type(choice) is dict else choice for choice in choices]
        items = self._object(replace_surrogates(payload), "message")
        return items if any(type(item) is StreamError for item in items) else [*items, _DONE]

    # The fast path

    def _usual_items(self, chunk: _UsualChunk) -> list[ChunkDelta]:
        reasons = self.finish_reasons
        if len(reasons) + len(chunk.choices) > MAX_CHOICES:
            raise ValueError("too many choices; the careful path reports which")
        if not reasons and any(choice.finish_reason is not None for choice in chunk.choices):
            raise ValueError("the careful path decides whether the first chunk is an error")
        self._ledger.chunks += 1
        items: list[ChunkDelta] = []
        for choice in chunk.choices:
            index, reason = choice.index, choice.finish_reason
            if "error" in choice.delta:
                raise ValueError("the careful path decides whether it is an error")
            if reason is not None or reasons.get(index, "") is not None:
                reason = self._finish(index, reason, choice.delta)
            delta = ChunkDelta(index, choice.delta, reason)
            if choice.logprobs is not None:
                delta.logprobs = choice.logprobs
            items.append(delta)
        if items:
            self._unexplained = None
        if items and (members := chunk.members) != self._usual_members:
            named = zip(_CHUNK_MEMBERS, members, strict=True)
            self._report_chunk(items[0], {name: value for name, value in named if value is not msgspec.UNSET})
            self._usual_members = members
        if chunk.usage:
            self._ledger.report(chunk.usage, final=self.is_finished)
        return items

    # The careful path

    def _read_carefully(self, event: ServerSentEvent) -> Sequence[StreamItem]:
        was_complete = self.is_complete
        items = self._items(event)
        if was_complete and any(type(item) is StreamError for item in items):
            return [item for item in items if type(item) is not StreamError]
        return items

    def _items(self, event: ServerSentEvent) -> list[StreamItem]:
        if event.type.lower() in _KEEP_ALIVES and event.data.strip(_BLANKS) != b"[DONE]":
            return []
        try:
            payload = decode_strict(event.data)
        except InvalidJSON:
            return self._read_leniently(event)
        if self._held:
            payload = self._repaired(payload)
        return self._payload_items(payload, event)

    def _read_leniently(self, event: ServerSentEvent) -> list[StreamItem]:
        try:
            payload = decode_lenient(_without_prefix(event.data))
        except InvalidJSON as error:
            return self._not_json(event, error)
        return self._payload_items(self._repaired(payload), event)

    def _payload_items(self, payload: Any, event: ServerSentEvent) -> list[StreamItem]:
        if type(payload) is list and len(payload) == 1:  # Google wraps errors in an array
            payload = payload[0]
        if type(payload) is dict:
            return self._object(payload, event.type)
        if payload is None or event.type == BARE_JSON:
            return []
        return [_protocol_error("an event whose data is not a JSON object", event.data)]

    def _not_json(self, event: ServerSentEvent, error: InvalidJSON) -> list[StreamItem]:
        text = _without_prefix(event.data).strip(_BLANKS)
        if text == b"[DONE]":
            return [_DONE]
        # An empty `data:` line is a keep-alive, and so is a comment inside of `data`.
        if not text or text.startswith(b":") or text.lower().decode("latin-1") in _KEEP_ALIVES:
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
            return self._unknown_items(payload)
        is_first = not self.finish_reasons
        items = self._chunk_items(payload)
        failure = error or (self._finish_failure if is_first else None)
        if failure is None:
            if may_be_error(payload, event_type):
                self._unexplained = error_of_object(payload)
            return items
        deltas = [item for item in items if isinstance(item, ChunkDelta)]
        if is_first and not any(any(generated_text(item.delta)) for item in deltas):
            # The frame is an error in the shape of a chunk. No text was generated, so another try can still
            # give the whole answer.
            self.finish_reasons.clear()
            self._chunk = None
            return [failure]
        return items if error is None else [*deltas, error]

    def _unknown_items(self, payload: dict[str, Any]) -> list[StreamItem]:
        """Pass on an object that is neither a chunk nor an error, unless it is a keep-alive."""
        extra = _unknown_members(payload, _KNOWN_IN_CHUNK)
        if not extra or _is_keep_alive(payload):
            return []
        if has_words(extra) or not self.finish_reasons:
            self._unexplained = self._unexplained or error_of_object(payload)
        return [ChunkDelta(None, {}, extra=extra)]

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
        if malformed is not None:
            return [*items, malformed]
        self._expect_nulls(payload)
        return items

    def _expect_nulls(self, payload: dict[str, Any]) -> None:
        """Let the fast path accept the unknown members that are null in this chunk."""
        nulls = frozenset(_null_names(payload, _KNOWN_IN_CHUNK))
        choice_nulls = frozenset(
            name for choice in payload.get("choices") or () for name in _null_names(choice, _KNOWN_IN_CHOICE)
        )
        expected = (nulls | self._nulls[0], choice_nulls | self._nulls[1])
        if expected != self._nulls and len(expected[0]) + len(expected[1]) <= MAX_NULLS:
            self._nulls = expected
            self._decode_usual = _usual_decoder(*expected).decode

    def _attach(self, payload: dict[str, Any], items: list[StreamItem]) -> None:
        """Attach the chunk's own and unknown members to its first delta, or to an event of their own if there
        is not a delta."""
        first = items[0] if items else None
        if extra := _unknown_members(payload, _KNOWN_IN_CHUNK):
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
        self._unexplained = None
        delta = choice.get("delta")
        if delta is None:  # Azure's annotation chunks have none
            delta = self._whole_message(choice)
        elif type(delta) is not dict:
            raise _Malformed("a delta that is not an object")
        index = _index(choice.get("index"))
        item = ChunkDelta(index, delta, self._finish(index, choice.get("finish_reason"), delta))
        if choice.get("logprobs") is not None:
            item.logprobs = choice["logprobs"]
        if extra := _unknown_members(choice, _KNOWN_IN_CHOICE):
            item.extra = extra
        return item

    def _whole_message(self, choice: dict[str, Any]) -> dict[str, Any]:
        """Remove and return the message of a whole completion that is sent as an event; empty if there is none, or if
        deltas of this choice came before, which it repeats."""
        message = choice.get("message")
        if not isinstance(message, dict) or _index(choice.get("index")) in self.finish_reasons:
            return {}
        del choice["message"]
        return message

    def _finish(self, index: int, reason: Any, delta: dict[str, Any]) -> str | None:
        """Record a choice's finish reason and return it if it is new. The last non-null reason counts.

        Text after a finish reason opens the choice again.
        """
        reasons = self.finish_reasons
        if index not in reasons:
            if len(reasons) >= MAX_CHOICES:
                raise _Malformed(f"more than {MAX_CHOICES} choices")
            reasons[index] = None
        elif reasons[index] is not None and any(generated_text(delta)):
            reasons[index] = None
        text = _reason(reason)
        if text is None or text == reasons[index]:
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

        A half that stays alone becomes U+FFFD.
        """
        choices = payload.get("choices") if isinstance(payload, dict) else None
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                index, is_last = _index(choice.get("index")), _reason(choice.get("finish_reason")) is not None
                if is_last and choice.get("delta") is None and any(key[0] == index for key in self._held):
                    choice["delta"] = {}
                if isinstance(delta := choice.get("delta"), dict):
                    self._surrogates.join(index, delta, is_last=is_last)
        return replace_surrogates(payload)


class _Malformed(Exception):
    """A chunk cannot be read. The message says why, without repeating the chunk's content."""


def _protocol_error(message: str, data: bytes) -> StreamError:
    return StreamError(
        message=f"the upstream sent {message}", frame=truncate(data.decode("utf-8", "replace")), protocol=True
    )


def _finish_error(index: int, reason: str) -> StreamError:
    message = f"the upstream ended choice {index} with finish_reason {reason!r}"
    return StreamError(message=message, frame="", kind=reason)


def _without_prefix(data: bytes) -> bytes:
    """Return an event's data without further `data:` prefixes, which some gateways add to events that have one."""
    for _ in range(3):
        if not data.startswith(b"data:"):
            break
        data = data[5:].lstrip(b" ")
    return data


def _as_delta(choice: dict[str, Any]) -> dict[str, Any]:
    """Return a whole completion's choice in the form that it has in a stream."""
    rest = {name: value for name, value in choice.items() if name != "message"}
    return rest | {"delta": choice.get("message")}


def _reason(reason: Any) -> str | None:
    """Return a finish reason as text. Some gateways send `""`, `"null"` or `"None"` instead of null."""
    if not isinstance(reason, str):
        return None if reason is None else truncate(str(reason), MAX_REASON_BYTES)
    return None if reason.lower() in {"", "null", "none"} else truncate(reason, MAX_REASON_BYTES)


def _unknown_members(members: dict[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """Return the unknown members that are not null."""
    if known.issuperset(members):
        return {}
    return {name: value for name, value in members.items() if value is not None and name not in known}


def _null_names(members: dict[str, Any], known: frozenset[str]) -> list[str]:
    if known.issuperset(members):
        return []
    return [
        name
        for name, value in members.items()
        if value is None and name not in known and len(name) <= MAX_REASON_BYTES
    ]


def _is_keep_alive(payload: dict[str, Any]) -> bool:
    kinds = (payload.get(name) for name in ("type", "event", "object", "status", "message"))
    return _KEEP_ALIVE_MEMBERS.issuperset(payload) or any(
        isinstance(kind, str) and kind.lower() in _KEEP_ALIVES for kind in kinds
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
