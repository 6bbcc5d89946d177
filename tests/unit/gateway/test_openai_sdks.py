"""What OpenAI's clients do with responses of every kind: the facts that the endpoint's format rests on.

The table has the same rows for both clients. A row whose outcome changes with a new version is a reason to look at the
format again.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import pytest
import pytest_asyncio

from tests.openai_sdks import PythonSDK, Sdk, node_sdk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.asyncio(loop_scope="module")


def frame(value: Any) -> bytes:
    """Return an event of an OpenAI stream."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


CHUNK = frame(
    {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}],
    }
)
WITH_MORE = CHUNK.replace(b'"id"', b'"streamworker": {"status": "completed"}, "id"')
DONE = b"data: [DONE]\n\n"
ERROR = {"message": "m", "type": "upstream_error", "param": None, "code": "truncated"}
ANSWER = json.dumps(
    {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}],
    }
).encode()


class Row(NamedTuple):
    """What a server sends, and what both clients make of it: the name of the raised class, or None."""

    body: bytes
    python: str | None
    node: str | None
    stream: bool = True
    status: int = 200
    headers: dict[str, str] = {}  # noqa: RUF012 - never changed
    is_cut: bool = False
    is_reset: bool = False
    calls: int = 1
    code: str | None = None
    text: str = "a"
    python_calls: int | None = None  # if not as many as node's
    events: tuple[str, ...] = ()
    """Types of the events that a stream of the Responses API yields; the row is one of that API then."""


FAILED = {"type": "response.failed", "sequence_number": 1, "response": {"id": "r", "object": "response"}}


def event(type_: str, value: Any) -> bytes:
    """Return an event of a stream of the Responses API."""
    return b"event: " + type_.encode() + b"\n" + frame(value)


UNREADABLE = "JSONDecodeError"
ROWS: dict[str, Row] = {
    "error frame": Row(CHUNK + frame({"error": ERROR}), "APIError", "APIError", code="truncated"),
    "error frame, then done": Row(
        CHUNK + frame({"error": ERROR}) + DONE, "APIError", "APIError", code="truncated"
    ),
    "error frame of that event type": Row(
        CHUNK + b"event: error\n" + frame({"error": ERROR}), "APIError", "APIError", code="truncated"
    ),
    "flat error of that event type": Row(CHUNK + b"event: error\n" + frame(ERROR), None, None),
    "end without done": Row(CHUNK, None, None),
    "cut stream": Row(CHUNK, "APIConnectionError", "TypeError", is_cut=True),
    "cut stream of a connection that is not kept": Row(
        CHUNK, "APIConnectionError", None, headers={"connection": "close"}, is_cut=True
    ),
    "reset stream of a connection that is not kept": Row(
        CHUNK, "APIConnectionError", None, headers={"connection": "close"}, is_cut=True, is_reset=True
    ),
    "ping": Row(b": ping\n\n" + CHUNK + b": ping\n\n" + DONE, None, None),
    "id, then ping": Row(b"id: 7\n" + CHUNK + b": ping\n\n" + CHUNK + DONE, UNREADABLE, None, text="aa"),
    "retry": Row(CHUNK + b"retry: 3000\n\n" + CHUNK + DONE, UNREADABLE, None, text="aa"),
    "unknown members": Row(WITH_MORE + DONE, None, None),
    "error body under 200": Row(json.dumps({"error": ERROR}).encode(), None, None, stream=False, text=""),
    "newlines, then the answer": Row(b"\n\n\n" + ANSWER, None, None, stream=False),
    "newlines, then a cut": Row(
        b"\n\n\n", "APIConnectionError", "TypeError", stream=False, is_cut=True, text="", python_calls=3
    ),
    "responses: failed": Row(
        event("response.failed", FAILED), None, None, text="", events=("response.failed",)
    ),
    "responses: flat error": Row(
        event("error", ERROR | {"type": "error", "sequence_number": 1}),
        None,
        None,
        text="",
        events=("error",),
    ),
    "responses: error object": Row(
        event("error", {"type": "error", "error": ERROR}), "APIError", "APIError", code="truncated"
    ),
    **{
        f"{status}, {said}": Row(
            json.dumps({"error": ERROR}).encode(),
            python,
            node,
            stream=stream,
            status=status,
            headers={"retry-after-ms": "1"} | ({} if said == "nothing" else {"x-should-retry": said}),
            calls=calls[said],
            code="truncated",
            text="",
        )
        for status, stream, python, node, calls in (
            (408, True, "APIStatusError", "APIError", {"nothing": 3, "false": 1}),
            (409, True, "ConflictError", "ConflictError", {"nothing": 3, "false": 1}),
            (429, False, "RateLimitError", "RateLimitError", {"nothing": 3, "false": 1}),
            (500, True, "InternalServerError", "InternalServerError", {"nothing": 3, "false": 1}),
            (503, False, "InternalServerError", "InternalServerError", {"nothing": 3, "false": 1}),
            (400, True, "BadRequestError", "BadRequestError", {"nothing": 1, "true": 3}),
        )
        for said in calls
    },
}


class Rows:
    """A server that answers `/<number>/chat/completions` and `/<number>/responses` with that row."""

    def __init__(self) -> None:
        self.retry_counts: list[str] = []
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:-2])
        await reader.readexactly(int(fields["content-length"]))
        self.retry_counts.append(fields["x-stainless-retry-count"])
        row = list(ROWS.values())[int(head.split("/")[1])]
        kind = "text/event-stream" if row.stream and row.status == 200 else "application/json"
        kept = {} if row.is_cut else {"connection": "close"}
        extra = "".join(f"{name}: {value}\r\n" for name, value in (kept | row.headers).items())
        writer.write(
            f"HTTP/1.1 {row.status} -\r\nContent-Type: {kind}\r\n{extra}"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        writer.write(f"{len(row.body):x}\r\n".encode() + row.body + b"\r\n")
        if not row.is_cut:
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        if row.is_reset:
            await asyncio.sleep(0.05)  # a reset discards what the client has not read
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
        await writer.wait_closed()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rows() -> AsyncIterator[Rows]:
    """The server of the rows."""
    async with Rows() as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["python", "node"])
async def sdk(request: pytest.FixtureRequest) -> AsyncIterator[Sdk]:
    """Each client in turn."""
    if request.param == "python":
        yield PythonSDK()
    else:
        async with node_sdk() as node:
            yield node


@pytest.mark.parametrize("name", ROWS)
async def test_client_does_with_a_response_what_the_format_rests_on(sdk: Sdk, rows: Rows, name: str) -> None:
    """Two tries follow the first one where the table has three calls; each names its number."""
    row, number = ROWS[name], list(ROWS).index(name)
    rows.retry_counts.clear()
    asked: dict[str, Any] = {"input": "a"} if name.startswith("responses") else {"messages": []}
    body = {"model": "m", "stream": row.stream, **asked}
    outcome = await sdk.ask(f"{rows.url}/{number}", "key", body, max_retries=2)

    expected = row.python if sdk.name == "python" else row.node
    assert outcome.error_class == expected
    calls = (row.python_calls if sdk.name == "python" else None) or row.calls
    assert rows.retry_counts == ["0", "1", "2"][:calls]
    if expected is None:
        assert (outcome.text, tuple(outcome.events)) == (row.text, row.events)
    elif row.code is not None:
        assert outcome.error is not None
        assert outcome.error["code"] == row.code
