"""One job over the transport that pushes bodies and over those that are pulled: the results are the same."""

from __future__ import annotations

import asyncio
import gzip
from typing import TYPE_CHECKING

import httpx
import pytest

from streamworker.model import ErrorCode, Status
from streamworker.upstream.transport import HttpTransport
from tests.streams import chunk, data
from tests.upstream.one_job import run_job
from tests.upstream.raw import EVENT_STREAM, Peer, chunked, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.upstream.one_job import Outcome

WORDS = [data(chunk({"content": word})) for word in ("one ", "two ", "three")]
REST = data(chunk({}, "stop"), b"[DONE]")

TRANSPORTS: dict[str, Callable[[], httpx.AsyncBaseTransport]] = {
    "pushed": HttpTransport,
    "pulled": lambda: httpx.AsyncHTTPTransport(verify=False),
}


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> httpx.AsyncBaseTransport:
    """Each transport."""
    return TRANSPORTS[request.param]()


async def play(
    transport: httpx.AsyncBaseTransport, *says: bytes, headers: bytes = EVENT_STREAM, ends: bool = True
) -> Outcome:
    """Run one job with one try; the upstream sends each piece for itself, then closes the connection."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.say(b"HTTP/1.1 200 OK\r\n" + headers + b"transfer-encoding: chunked\r\n\r\n")
        for piece in says:
            await peer.say(b"%x\r\n%b\r\n" % (len(piece), piece))
            await asyncio.sleep(0.005)
        if ends:
            await peer.say(b"0\r\n\r\n")

    async with serving(serve) as server:
        return await run_job(server.base_url, max_tries=1, transport=transport)


async def test_transport_any_gives_the_whole_answer(transport: httpx.AsyncBaseTransport) -> None:
    """Each delta in order, and the end."""
    outcome = await play(transport, *WORDS, REST)

    assert (outcome.end.status, outcome.text()) == (Status.COMPLETED, "one two three")


async def test_transport_any_gives_many_deltas_of_one_read_in_order(
    transport: httpx.AsyncBaseTransport,
) -> None:
    """Far more than are published per turn of the loop."""
    words = [f"{number} " for number in range(1000)]
    outcome = await play(transport, b"".join(data(chunk({"content": word})) for word in words), REST)

    assert (outcome.end.status, outcome.text()) == (Status.COMPLETED, "".join(words))


async def test_transport_any_keeps_what_precedes_a_break(transport: httpx.AsyncBaseTransport) -> None:
    """The connection is closed inside the stream."""
    outcome = await play(transport, *WORDS, ends=False)

    assert (outcome.end.status, outcome.code) == (Status.INTERRUPTED, ErrorCode.TRUNCATED)
    assert outcome.text() == "one two three"


async def test_transport_any_decompresses(transport: httpx.AsyncBaseTransport) -> None:
    """Compressed bodies are pulled in any case, because they are decompressed in bounded steps."""
    packed = gzip.compress(b"".join(WORDS) + REST)
    outcome = await play(transport, packed, headers=EVENT_STREAM + b"content-encoding: gzip\r\n")

    assert (outcome.end.status, outcome.text()) == (Status.COMPLETED, "one two three")


async def test_transport_any_is_closed_by_a_cancellation(transport: httpx.AsyncBaseTransport) -> None:
    """The upstream sees the connection close, and no task is left."""
    closed = asyncio.Event()

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.say(chunked(WORDS[0], ends=False))
        await peer.gone()
        closed.set()

    async with serving(serve) as server:
        tasks = asyncio.all_tasks()
        outcome = await run_job(server.base_url, cancel_at_s=0.1, transport=transport)
        await asyncio.wait_for(closed.wait(), 5)
        left = {task.get_name() for task in asyncio.all_tasks() - tasks}

    assert (outcome.end.status, outcome.text()) == (Status.CANCELLED, "one ")
    assert "pump" not in left


async def test_transport_without_sockets_gives_the_whole_answer() -> None:
    """`httpx.MockTransport` serves tests of others."""

    async def body() -> AsyncIterator[bytes]:
        for piece in (*WORDS, REST):
            yield piece

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=body())

    outcome = await run_job("http://upstream/v1", transport=httpx.MockTransport(answer))

    assert (outcome.end.status, outcome.text()) == (Status.COMPLETED, "one two three")
