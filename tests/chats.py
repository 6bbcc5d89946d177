"""Jobs' events as records, and what the OpenAI-compatible endpoint makes of them, for tests."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx2
import msgspec
import openai

from streamworker.gateway.chat_completion import ChatCompletion
from streamworker.gateway.chat_stream import ChatStream

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.streams import Played

JOB = "acme.0199"
NOW = 1_700_000_000_000


def encoded(event: Any) -> bytes:
    """Return an event's record value."""
    return msgspec.json.encode(event)


def started(attempt: str = "a-1", model: str = "m") -> bytes:
    """Return a `started`."""
    return encoded({"type": "started", "attempt": attempt, "seq": 0, "model": model, "ts": NOW})


def delta(members: dict[str, Any] | None = None, *, choice: int | None = 0, **more: Any) -> bytes:
    """Return a delta."""
    event = {"type": "delta", "seq": 1, "choice": choice, "delta": members or {}, "finish_reason": None}
    return encoded(event | more)


def text(content: str, **more: Any) -> bytes:
    """Return a delta of text."""
    return delta({"content": content}, **more)


def ended(status: str = "completed", **more: Any) -> bytes:
    """Return a terminal event."""
    event = {
        "type": "usage",
        "seq": 9,
        "status": status,
        "finish_reasons": {"0": "stop"},
        "usage": {"prompt_tokens": 15, "completion_tokens": 2},
        "usage_source": "upstream",
        "error": None,
    }
    return encoded(event | more)


def failed(code: str, status: str = "failed", **more: Any) -> bytes:
    """Return the terminal event of a job that did not complete."""
    error = {"code": code, "message": f"about {code}", "http_status": None, "retriable": True}
    error |= {name: more.pop(name) for name in ("http_status", "retriable", "retry_after_ms") if name in more}
    given = {"usage": None, "usage_source": "none", "finish_reasons": {}, "error": error}
    return ended(status, **(given | more))


def records_of(played: Played, attempt: str = "a-1") -> list[bytes]:
    """Return the events of one try, as records."""
    return [started(attempt), *(encoded(event) for event in (*played.deltas, played.end))]


class Chunks(NamedTuple):
    """What a response body says: its chunks, and how it ends."""

    chunks: list[dict[str, Any]]
    error: dict[str, Any] | None
    is_done: bool

    @property
    def text(self) -> str:
        """The content of the first choice."""
        return "".join(
            choice["delta"].get("content") or ""
            for chunk in self.chunks
            for choice in chunk["choices"]
            if choice["index"] == 0
        )


def frames(
    records: Iterable[bytes], *, merge: Sequence[bool] = (), job_id: str = JOB, **options: Any
) -> bytes:
    """Return the body of an event stream. `merge` says for each record, in turns, whether it may be merged."""
    stream = ChatStream(job_id, **options)
    body = b""
    for at, record in enumerate(records):
        kind = json.loads(record)["type"]
        if kind == "delta":
            is_merged = bool(merge) and merge[at % len(merge)]
            body += stream.delta(record, merge=is_merged)
            if not is_merged:
                assert stream.flush() == b""
        else:
            body += getattr(stream, {"usage": "ended"}.get(kind, kind))(record)
        if stream.is_over:
            break
    return body


def chunks_of(body: bytes) -> Chunks:
    """Read a body as the samples do that take one line as one event."""
    chunks, error, is_done = [], None, False
    for block in body.decode().split("\n\n")[:-1]:
        assert block.startswith("data: ")
        assert not is_done, "an event behind [DONE]"
        assert error is None, "an event behind an error"
        payload = block.removeprefix("data: ")
        assert "\n" not in payload
        assert "\r" not in payload
        if payload == "[DONE]":
            is_done = True
        elif "error" in (read := json.loads(payload)):
            error = read["error"]
        else:
            chunks.append(read)
    return Chunks(chunks, error, is_done)


def played_by(records: Iterable[bytes], **options: Any) -> Chunks:
    """Return what the records become."""
    return chunks_of(frames(records, **options))


def completion(records: Iterable[bytes], job_id: str = JOB, **options: Any) -> ChatCompletion:
    """Return what the records become without `stream`."""
    whole = ChatCompletion(job_id, **options)
    for record in records:
        kind = json.loads(record)["type"]
        getattr(whole, {"usage": "ended"}.get(kind, kind))(record)
    return whole


def read_by_openai(body: bytes) -> list[dict[str, Any]]:
    """Read a body with openai-python; return its chunks. Raises openai.APIError."""
    headers = {"content-type": "text/event-stream"}
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, headers=headers, content=body))
    with openai.OpenAI(
        api_key="none",
        base_url="http://gateway/v1",
        max_retries=0,
        http_client=httpx2.Client(transport=transport),
    ) as sdk:
        stream = sdk.chat.completions.create(model="m", messages=[], stream=True)
        return [chunk.model_dump(exclude_unset=True) for chunk in stream]
