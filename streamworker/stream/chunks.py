"""The chunk reader: server-sent events of a chat completion in, deltas out.

It takes every shape in the wire facts (§2-§7): nothing about a chunk is safe, neither its members nor their types.
What it knows it places, what it does not know it keeps under `extra`, and it adds nothing.
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
"""Choices a stream may open. openai-node's bound for tool calls; no API offers more completions than that."""

MAX_REASON_BYTES = 256
"""Of a finish reason, which every choice keeps until the end. None that we know of is longer than 30."""

MAX_HALF_NAME = 64
"""Characters of a member's name, such as `content`, whose text is joined over deltas."""

_DONE = Done()
_BLANKS = b" \t\r\n\x0c"
# The chunk's own members, told with the first delta and whenever one of them changes.
_CHUNK_MEMBERS = ("id", "object", "created", "model", "system_fingerprint", "service_tier")
# `obfuscation` is padding against traffic analysis: dropped, as it is meant to be.
_KNOWN_IN_CHUNK = frozenset({*_CHUNK_MEMBERS, "choices", "usage", "error", "obfuscation"})
_KNOWN_IN_CHOICE = frozenset({"index", "delta", "finish_reason", "logprobs", "usage"})
# One of these makes an object a chunk; without any it is a ping of some kind.
_CHUNK_MARKS = frozenset({*_CHUNK_MEMBERS, "choices", "usage"})


class _UsualChoice(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    delta: dict[str, Any]
    index: int = 0
    finish_reason: str | None = None
    logprobs: Any = None


class _UsualChunk(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """What nearly every chunk is: read into its places in one go, a third of the time. All else is read the long way.

    It has to mean the same on both ways: no error, no unknown member, nothing of a type that needs a decision.
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
        """The values of `_CHUNK_MEMBERS`, in their order."""
        return (self.id, self.object, self.created, self.model, self.system_fingerprint, self.service_tier)


_USUAL = msgspec.json.Decoder(_UsualChunk)


class ChunkReader:
    """Reads the events of one try. Books chunks and usage reports into `ledger`; deltas are booked when published."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._chunk: dict[str, Any] | None = None
        self._usual_members: tuple[Any, ...] | None = None  # of `_chunk`, where the last one was usual
        self.finish_reasons: dict[int, str | None] = {}
        """Choice index → reason; None while the choice is unfinished."""
        self._halves: dict[tuple[int, str], str] = {}

    @property
    def is_finished(self) -> bool:
        """Whether every choice that was opened has its finish reason, and one was opened."""
        return bool(self.finish_reasons) and None not in self.finish_reasons.values()

    @property
    def chunk(self) -> dict[str, Any]:
        """The latest chunk's own members: id, model, created …; empty before the first."""
        return self._chunk or {}

    def read(self, event: ServerSentEvent) -> Sequence[StreamItem]:
        """Read one event: its deltas in the upstream's order, then what ends the stream, if this does."""
        if event.type == "message" and not self._halves and is_shallow(event.data):
            try:
                return self._usual_news(_USUAL.decode(event.data))
            except (ValueError, RecursionError):  # msgspec's errors and UnicodeDecodeError are the first
                pass
        return self._read_closely(event)

    def _usual_news(self, chunk: _UsualChunk) -> list[ChunkDelta]:
        if len(self.finish_reasons) + len(chunk.choices) > MAX_CHOICES:
            raise ValueError("the long way says which choice is one too many")
        self._ledger.chunks += 1
        news: list[ChunkDelta] = []
        for choice in chunk.choices:
            delta = ChunkDelta(choice.index, choice.delta, self._finish(choice.index, choice.finish_reason))
            if choice.logprobs is not None:
                delta.logprobs = choice.logprobs
            news.append(delta)
        if news and (members := chunk.members) != self._usual_members:
            told = zip(_CHUNK_MEMBERS, members, strict=True)
            self._tell_chunk(news[0], {name: value for name, value in told if value is not msgspec.UNSET})
            self._usual_members = members
        if chunk.usage:
            self._ledger.report(chunk.usage, final=self.is_finished)
        return news

    def _read_closely(self, event: ServerSentEvent) -> list[StreamItem]:
        try:
            payload = decode_strict(event.data)
        except InvalidJSON:
            return self._read_leniently(event)
        if self._halves:
            payload = self._repaired(payload)
        return self._payload_news(payload, event)

    def _read_leniently(self, event: ServerSentEvent) -> list[StreamItem]:
        try:
            payload = decode(event.data)
        except InvalidJSON as error:
            return self._not_json(event, error)
        return self._payload_news(self._repaired(payload), event)

    def _payload_news(self, payload: Any, event: ServerSentEvent) -> list[StreamItem]:
        if type(payload) is list and len(payload) == 1:  # Google wraps errors in an array
            payload = payload[0]
        if type(payload) is dict:
            return self._object(payload, event.type)
        if payload is None:
            return []
        return [_protocol_fault("an event whose data is no JSON object", event.data)]

    def _not_json(self, event: ServerSentEvent, error: InvalidJSON) -> list[StreamItem]:
        text = event.data.strip(_BLANKS)
        if text == b"[DONE]":
            return [_DONE]
        if not text:  # a bare `data:` is a keep-alive
            return []
        if event.type == "error":
            return [StreamError(message=truncate(event.text), frame=truncate(event.text))]
        return [_protocol_fault(f"an event whose data is no JSON: {error}", event.data)]

    def _object(self, payload: dict[str, Any], event_type: str) -> list[StreamItem]:
        fault = error_in(payload, event_type)
        if fault is not None and not payload.get("choices"):
            self._book_usage(payload, None)
            return [fault]
        if _CHUNK_MARKS.isdisjoint(payload):
            return []
        is_first = not self.finish_reasons
        news = self._chunk_news(payload)
        if fault is None:
            return news
        deltas = [one for one in news if isinstance(one, ChunkDelta)]
        if is_first and not any(any(generated_text(one.delta)) for one in deltas):
            # The error only looks like a chunk. Nothing was said, so that another try may say it all.
            self.finish_reasons.clear()
            self._chunk = None
            return [fault]
        return [*deltas, fault]

    def _chunk_news(self, payload: dict[str, Any]) -> list[StreamItem]:
        """Read a chunk. What comes before a malformed choice is kept."""
        self._ledger.chunks += 1
        news: list[StreamItem] = []
        malformed = None
        choices = payload.get("choices") or []
        try:
            for choice in _array(choices):
                news.append(self._choice_news(choice))  # noqa: PERF401 - those before a failure are kept
        except _Malformed as error:
            malformed = _protocol_fault(str(error), encode(payload))
        self._attach(payload, news)
        self._book_usage(payload, choices)
        return news if malformed is None else [*news, malformed]

    def _attach(self, payload: dict[str, Any], news: list[StreamItem]) -> None:
        """Put what belongs to the whole chunk on its first delta, or on an event of its own where there is none."""
        first = news[0] if news else None
        if not _KNOWN_IN_CHUNK.issuperset(payload):
            extra = {name: payload[name] for name in payload if name not in _KNOWN_IN_CHUNK}
            if not isinstance(first, ChunkDelta) or (
                first.extra and not extra.keys().isdisjoint(first.extra)
            ):
                first = ChunkDelta(None, {})
                news.insert(0, first)
            first.extra = {**extra, **(first.extra or {})}
        if isinstance(first, ChunkDelta):
            self._usual_members = None
            self._tell_chunk(first, {name: payload[name] for name in _CHUNK_MEMBERS if name in payload})

    def _tell_chunk(self, first: ChunkDelta, chunk: dict[str, Any]) -> None:
        """Let a chunk's first delta tell the chunk's own members, if they are not what was told last."""
        if chunk != self._chunk:
            first.chunk = chunk
            # An event without choice is no delta: who skips it hears the next one tell all again.
            self._chunk = chunk if first.choice is not None else None

    def _choice_news(self, choice: Any) -> ChunkDelta:
        if type(choice) is not dict:
            raise _Malformed("a choice that is no object")
        delta = choice.get("delta")
        if delta is None:  # Azure's annotations have none
            delta = {}
        elif type(delta) is not dict:
            raise _Malformed("a delta that is no object")
        index = _index(choice.get("index"))
        news = ChunkDelta(index, delta, self._finish(index, choice.get("finish_reason")))
        if choice.get("logprobs") is not None:
            news.logprobs = choice["logprobs"]
        if not _KNOWN_IN_CHOICE.issuperset(choice):
            news.extra = {name: choice[name] for name in choice if name not in _KNOWN_IN_CHOICE}
        return news

    def _finish(self, index: int, reason: Any) -> str | None:
        """Note a choice's finish reason; the last non-null wins, and a repeated one is told once."""
        reasons = self.finish_reasons
        if index not in reasons:
            if len(reasons) >= MAX_CHOICES:
                raise _Malformed(f"more than {MAX_CHOICES} choices")
            reasons[index] = None
        if reason is None or reason == "":  # some gateways write "" where others write null
            return None
        told = truncate(reason if isinstance(reason, str) else str(reason), MAX_REASON_BYTES)
        if told == reasons[index]:
            return None
        reasons[index] = told
        return told

    def _book_usage(self, payload: dict[str, Any], choices: Any) -> None:
        usage = payload.get("usage")
        if not usage:
            usage = _elsewhere(payload, choices)
        if usage and isinstance(usage, dict):
            self._ledger.report(usage, final=self.is_finished)

    def _repaired(self, payload: Any) -> Any:
        """Make every string clean Unicode, joining characters that were cut in two over deltas.

        A character beyond U+FFFF is two surrogates in JSON's escapes, and some upstreams end a delta between them. The
        first half waits for the next delta of its choice and member; a half that stays alone becomes U+FFFD.
        """
        choices = payload.get("choices") if isinstance(payload, dict) else None
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict) and isinstance(delta := choice.get("delta"), dict):
                for name, text in delta.items():
                    if isinstance(text, str):
                        delta[name] = self._join(text, choice, name)
            if isinstance(choice, dict) and choice.get("finish_reason") is not None:
                self._release(choice)
        return replace_surrogates(payload)

    def _release(self, choice: dict[str, Any]) -> None:
        """Give out what waits for a choice that ends without naming the member again."""
        index = _index(choice.get("index"))
        for place in [place for place in self._halves if place[0] == index]:
            if not isinstance(choice.get("delta"), dict):
                choice["delta"] = {}
            choice["delta"][place[1]] = self._halves.pop(place) + (choice["delta"].get(place[1]) or "")

    def _join(self, text: str, choice: dict[str, Any], name: str) -> str:
        place = (_index(choice.get("index")), name)
        text = self._halves.pop(place, "") + text
        is_last = choice.get("finish_reason") is not None
        is_half = not is_last and "\ud800" <= text[-1:] <= "\udbff"
        if is_half and len(self._halves) < MAX_CHOICES and len(name) <= MAX_HALF_NAME:
            self._halves[place] = text[-1]
            return text[:-1]
        return text


class _Malformed(Exception):
    """A chunk that cannot be read; the message says why, without its content."""


def _protocol_fault(message: str, data: bytes) -> StreamError:
    return StreamError(
        message=f"the upstream sent {message}", frame=truncate(data.decode("utf-8", "replace")), protocol=True
    )


def _index(index: Any) -> int:
    """Read a choice's index; a missing or unusable one is 0."""
    return index if type(index) is int else 0


def _array(choices: Any) -> list[Any]:
    if type(choices) is not list:
        raise _Malformed("a chunk whose choices are no array")
    return choices


def _elsewhere(payload: dict[str, Any], choices: Any) -> Any:
    """Look where some put usage: Groq under `x_groq`, Moonshot in the choice."""
    groq = payload.get("x_groq")
    if isinstance(groq, dict) and groq.get("usage"):
        return groq["usage"]
    listed = choices if isinstance(choices, list) else []
    found = [choice["usage"] for choice in listed if isinstance(choice, dict) and choice.get("usage")]
    return found[-1] if found else None
