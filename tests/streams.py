"""Event streams for tests: chunks as bytes, chunkings, and attempts that read them."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from streamworker.model import Coordinates, DeltaEvent, Job, UsageEvent
from streamworker.stream.attempt import Attempt, State
from streamworker.stream.chunks import ChunkReader
from streamworker.stream.sse import EventStreamParser, ServerSentEvent
from streamworker.stream.usage import Ledger

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from streamworker.model import StreamItem

NOW = 1_700_000_000_000


class Played(NamedTuple):
    """The events of one try."""

    deltas: list[DeltaEvent]
    end: UsageEvent

    def text(self, choice: int = 0, member: str = "content") -> str:
        """Join one string member of one choice."""
        return "".join(event.delta.get(member) or "" for event in self.deltas if event.choice == choice)


class Parsed(NamedTuple):
    """The events and the state of a parser after a stream."""

    events: list[ServerSentEvent]
    last_event_id: str
    reconnection_time: int | None
    overflowed: bool


def make_job(**members: Any) -> Job:
    """Return a small valid job."""
    given: dict[str, Any] = {
        "job_id": "job-1",
        "source": Coordinates("jobs", 3, 7),
        "timestamp": NOW - 40,
        "model": "m",
    }
    return Job(request={"model": msgspec.Raw(b'"m"')}, **(given | members))


def make_attempt(**options: Any) -> Attempt:
    """Return a new attempt."""
    given: dict[str, Any] = {"attempt_id": "a-1", "upstream": "default", "cause": "new", "now_ms": NOW}
    return Attempt(options.pop("job", None) or make_job(), **(given | options))


def listening(**options: Any) -> Attempt:
    """Return an attempt whose `started` is published and whose event stream is open."""
    attempt = make_attempt(**options)
    attempt.started()
    attempt.call()
    attempt.answer()
    return attempt


def play(pieces: bytes | Iterable[bytes], **options: Any) -> Played:
    """Run one try over a whole response body."""
    attempt = listening(**options)
    deltas: list[DeltaEvent] = []
    for piece in [pieces] if isinstance(pieces, bytes) else pieces:
        if not attempt.is_listening:
            break
        deltas += attempt.receive(piece, NOW + 10)
    if attempt.is_listening:
        deltas += attempt.close(NOW + 20)
    return Played(deltas, ended(attempt, NOW + 30))


def ended(attempt: Attempt, now_ms: int = NOW) -> UsageEvent:
    """Make no other try; return the terminal event."""
    if attempt.state is State.TRY_FAILED:
        attempt.end()
    return attempt.terminal(now_ms)


def data(*payloads: Any, end: bytes = b"\n\n") -> bytes:
    """Return an event stream: one `data` line per payload; bytes are taken as they are."""
    return b"".join(b"data: " + (p if type(p) is bytes else msgspec.json.encode(p)) + end for p in payloads)


def chunk(
    delta: dict[str, Any] | None = None, finish_reason: str | None = None, **members: Any
) -> dict[str, Any]:
    """Return a chunk with one choice in OpenAI's format."""
    choice = {"index": 0, "delta": delta or {}, "finish_reason": finish_reason}
    return {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [choice],
    } | members


def parse(pieces: bytes | Iterable[bytes], **options: Any) -> Parsed:
    """Run a parser over a whole stream."""
    parser = EventStreamParser(**options)
    events: list[ServerSentEvent] = []
    for piece in [pieces] if isinstance(pieces, bytes) else pieces:
        events += parser.feed(piece)
    events += parser.close()
    return Parsed(events, parser.last_event_id, parser.reconnection_time, parser.overflowed)


def read(*payloads: Any, event_type: str = "message", ledger: Ledger | None = None) -> list[StreamItem]:
    """Run a chunk reader over payloads; return its items."""
    reader = ChunkReader(ledger or Ledger())
    encoded = [p if type(p) is bytes else msgspec.json.encode(p) for p in payloads]
    return [item for payload in encoded for item in reader.read(ServerSentEvent(event_type, payload))]


def cut_at(text: bytes, cuts: Iterable[int]) -> list[bytes]:
    """Cut at positions, given in any order."""
    places = [0, *sorted({cut for cut in cuts if 0 < cut < len(text)}), len(text)]
    return [text[start:end] for start, end in pairwise(places)]


def bytewise(text: bytes) -> Sequence[bytes]:
    """Cut after each byte."""
    return [text[at : at + 1] for at in range(len(text))]


def eventwise(text: bytes) -> Sequence[bytes]:
    """Cut after each blank line that ends in LF, as upstreams flush."""
    return [piece for piece in re.split(rb"(?<=\n\n)", text) if piece]
