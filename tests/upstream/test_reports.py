"""Known habits of upstreams, from a socket to the terminal event."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.reports import CASES, chunkings, ending_of, expected_ending
from tests.turnable import SocketLoop, run
from tests.upstream.one_job import run_job
from tests.upstream.raw import EVENT_STREAM, Peer, chunked, response, serving

if TYPE_CHECKING:
    from tests.upstream.one_job import Outcome

HEADS = {
    "chunked": EVENT_STREAM,
    "without a content type": b"",
    "as text": b"content-type: text/plain\r\n",
    "as a file": b"content-type: application/octet-stream\r\n",
}


async def outcome(answer: bytes) -> Outcome:
    """Run a job whose upstream answers every call with the same bytes."""
    async with serving(answer) as server:
        return await run_job(server.base_url, max_tries=2)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", CASES)
def test_habit_over_http_has_its_ending(name: str, head: str) -> None:
    """The content type does not matter, as it does not matter to the SDKs. Only retriable errors are called again."""
    case = CASES[name]
    pieces = chunkings(name, case["stream"])["at random 3"]
    got = run(outcome(chunked(*filter(None, pieces), headers=HEADS[head])), SocketLoop)
    if head != "chunked" and case["want"]["status"] == "failed":
        case = case | {"want": {name: value for name, value in case["want"].items() if name != "error_code"}}

    assert ending_of(got.end, case) == expected_ending(case)
    is_retried = got.end.status == "failed" and got.error.retriable
    assert got.end.tries == (2 if is_retried else 1)


@pytest.mark.parametrize("status", [200, 201, 206])
def test_stream_under_another_success_status_completes(status: int) -> None:
    """A stream is a stream."""
    body = b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    got = run(outcome(response(status, body, EVENT_STREAM)), SocketLoop)

    assert (got.end.status, got.text()) == ("completed", "a")


def test_error_inside_a_stream_has_the_responses_status() -> None:
    """Which is not always 200."""
    got = run(
        outcome(response(201, b'data: {"error":{"message":"m","code":400}}\n\n', EVENT_STREAM)), SocketLoop
    )

    assert (got.error.http_status, got.error.message, got.end.tries) == (201, "m", 1)


def test_json_answer_on_a_connection_that_stays_open_completes_at_the_timeout() -> None:
    """A whole document is an answer, although its end was not announced."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.say(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n"
            b'{"choices":[{"message":{"content":"a"},"finish_reason":"stop"}],"usage":{"total_tokens":3}}'
        )
        await peer.gone()

    async def play() -> Outcome:
        async with serving(serve) as server:
            return await run_job(server.base_url, max_tries=1)

    got = run(play(), SocketLoop)

    assert (got.end.status, got.text(), got.end.usage) == ("completed", "a", {"total_tokens": 3})
