"""The HTTP upstream, against the practice upstream and against sockets that misbehave."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import re
import shutil
import socket
import ssl
import subprocess
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import pytest
import trustme

from streamworker.config import UpstreamSettings
from streamworker.errors import UpstreamError
from streamworker.model import ErrorCode, JobError
from streamworker.upstream.client import ERROR_BODY_BYTES, HttpUpstream
from streamworker.upstream.dial import tls_context
from tests.upstream.raw import EVENT_STREAM, Peer, chunked, response, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from streamworker.practice import PracticeUpstream

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = chunked(EVENT, DONE)


def body(model: str = "practice", **members: Any) -> bytes:
    messages = [{"role": "user", "content": "hi"}]
    return json.dumps({"model": model, "messages": messages, "stream": True, **members}).encode()


@asynccontextmanager
async def client(base_url: str, **members: Any) -> AsyncIterator[HttpUpstream]:
    """A client that closes every connection in the end, within a time limit."""
    async with asyncio.timeout(20):
        upstream = HttpUpstream(UpstreamSettings(base_url=base_url, **members))
        try:
            yield upstream
        finally:
            await upstream.close()


async def read(upstream: HttpUpstream, data: bytes = b"{}") -> bytes:
    """Make one call; return its whole body."""
    async with upstream.call(data, {}) as answer:
        return b"".join([piece async for piece in answer])


async def refusal(base_url: str, data: bytes = b"{}", **members: Any) -> JobError:
    """Return the error with which a call fails before its body."""
    async with client(base_url, **members) as upstream:
        with pytest.raises(UpstreamError) as caught:
            async with upstream.call(data, {}):
                pytest.fail("the call was answered")
    return caught.value.error


async def break_of(answer: bytes | Callable[[Peer], Any]) -> tuple[bytes, JobError]:
    """Return what was read of a body before it broke, and the error."""
    pieces = []
    async with serving(answer) as server, client(server.base_url) as upstream:
        with pytest.raises(UpstreamError) as caught:
            async with upstream.call(b"{}", {}) as opened:
                async for piece in opened:
                    pieces.append(piece)  # noqa: PERF401 - pieces before the break are kept
    return b"".join(pieces), caught.value.error


def connections() -> int:
    """Count the open sockets of this process."""
    count = 0
    for number in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            count += str(number.readlink()).startswith("socket:")
    return count


async def back_to(before: int) -> None:
    """Wait until no more sockets are open than before."""
    async with asyncio.timeout(5):
        while connections() > before:  # noqa: ASYNC110 - the kernel sends no notification
            await asyncio.sleep(0.01)


# A successful call


async def test_http_upstream_returns_the_body_byte_for_byte(practice: PracticeUpstream) -> None:
    """Every byte in order, to the end of the stream."""
    async with client(practice.base_url) as upstream:
        text = await read(upstream, body("practice?deltas=5"))

    assert text.endswith(DONE)
    assert text.count(b'"content":') == 5


async def test_http_upstream_returns_deltas_as_they_arrive(practice: PracticeUpstream) -> None:
    """No layer waits for more bytes."""
    model = body("practice?deltas=3&stall_after=1")
    text = b""
    async with client(practice.base_url) as upstream, upstream.call(model, {}) as answer:
        async for piece in answer:
            text += piece
            if b'"content":' in text:
                break

    assert text.count(b'"content":') == 1


async def test_http_upstream_sends_the_expected_headers(practice: PracticeUpstream) -> None:
    """An uncompressed event stream, a JSON body, a user agent; other headers cannot override these."""
    given = {"traceparent": "00-1", "accept": "text/html"}
    async with client(practice.base_url) as upstream, upstream.call(body(), given) as answer:
        assert [piece async for piece in answer]

    (call,) = practice.calls
    headers = call.headers
    assert call.path == "/v1/chat/completions"
    assert headers["accept"] == "text/event-stream, application/json"
    assert headers["accept-encoding"] == "identity"
    assert headers["content-type"] == "application/json"
    assert headers["traceparent"] == "00-1"
    assert headers["user-agent"].startswith("streamworker/")
    assert "authorization" not in headers


async def test_http_upstream_with_a_trailing_slash_uses_the_same_path(
    practice: PracticeUpstream,
) -> None:
    """Both spellings are common."""
    async with client(practice.base_url + "/") as upstream:
        await read(upstream, body())

    assert practice.calls[0].path == "/v1/chat/completions"


@pytest.mark.parametrize(
    "kind", ["text/event-stream; charset=utf-8", "Text/Event-Stream", "text/event-stream ;x=y"]
)
async def test_http_upstream_accepts_any_spelling_of_an_event_stream(kind: str) -> None:
    """Parameters are allowed, in any case."""
    answer = chunked(EVENT, headers=f"content-type: {kind}\r\n".encode())
    async with serving(answer) as server, client(server.base_url) as upstream:
        assert await read(upstream) == EVENT


async def test_http_upstream_that_compresses_is_decompressed() -> None:
    """Some gateways compress although `identity` was requested."""
    answer = chunked(gzip.compress(EVENT + DONE), headers=EVENT_STREAM + b"content-encoding: gzip\r\n")
    async with serving(answer) as server, client(server.base_url) as upstream:
        assert await read(upstream) == EVENT + DONE


async def test_http_upstream_decompressing_many_keep_alives_yields_to_other_tasks() -> None:
    """A few kilobytes decompress to many megabytes, which arrive in one read."""
    packed = gzip.compress(b": ping\n\n" * 500_000)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    answer = chunked(packed, headers=EVENT_STREAM + b"content-encoding: gzip\r\n")
    async with (
        serving(answer) as server,
        client(server.base_url) as upstream,
        upstream.call(b"{}", {}) as body,
    ):
        task = asyncio.create_task(others())
        seen = [turns async for _ in body]
        task.cancel()

    assert len(seen) > 40
    assert all(before < after for before, after in pairwise(seen[1:]))


async def test_http_upstream_body_without_length_ends_with_the_connection() -> None:
    """A clean end is not an error of the client; the stream's reader decides whether it is complete."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.say(b"HTTP/1.1 200 OK\r\n" + EVENT_STREAM + b"connection: close\r\n\r\n" + EVENT)

    async with serving(serve) as server, client(server.base_url) as upstream:
        assert await read(upstream) == EVENT


# Responses that are not event streams

STATUSES = [
    (400, ErrorCode.UPSTREAM_REJECTED, False),
    (401, ErrorCode.AUTH, False),
    (402, ErrorCode.QUOTA, False),
    (403, ErrorCode.AUTH, False),
    (404, ErrorCode.UPSTREAM_REJECTED, False),
    (408, ErrorCode.UPSTREAM_REJECTED, True),
    (409, ErrorCode.UPSTREAM_REJECTED, True),
    (413, ErrorCode.UPSTREAM_REJECTED, False),
    (422, ErrorCode.UPSTREAM_REJECTED, False),
    (429, ErrorCode.RATE_LIMITED, True),
    (500, ErrorCode.UPSTREAM_UNAVAILABLE, True),
    (502, ErrorCode.UPSTREAM_UNAVAILABLE, True),
    (503, ErrorCode.UPSTREAM_UNAVAILABLE, True),
    (504, ErrorCode.UPSTREAM_UNAVAILABLE, True),
    (524, ErrorCode.UPSTREAM_UNAVAILABLE, True),
    (529, ErrorCode.UPSTREAM_UNAVAILABLE, True),
]


@pytest.mark.parametrize(("status", "code", "retriable"), STATUSES)
async def test_http_upstream_status_gives_code_and_retriable(
    status: int, code: ErrorCode, retriable: bool
) -> None:
    """With the upstream's own message, its body, and whether to retry."""
    text = b'{"error":{"message":"in its own words","type":null,"code":null}}'
    async with serving(response(status, text)) as server:
        error = await refusal(server.base_url)

    assert (error.code, error.http_status, error.retriable) == (code, status, retriable)
    assert (error.message, error.upstream) == ("in its own words", text.decode())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"error":{"message":"m","code":"x"}}', "m"),
        (b'{"error":"Unauthorized"}', "Unauthorized"),
        (b'{"object":"error","message":"m","code":400}', "m"),
        (b'{"detail":"Not Found"}', "Not Found"),
        (b'{"message":"m","id":"1"}', "m"),
        (b'{"error":"m","error_type":"generation"}', "m"),
        (b'[{"error":{"message":"m","status":"X"}}]', "m"),
        (b"<html><h1>502 Bad Gateway</h1></html>", "<html><h1>502 Bad Gateway</h1></html>"),
        (b"", "the upstream answered 500 with an empty body"),
        (b"\xff\xfe", "��"),
        (b'data: {"error":{"message":"m"}}\n\n', "m"),
    ],
)
async def test_http_upstream_error_body_is_read_in_any_shape(text: bytes, message: str) -> None:
    """JSON of many dialects, HTML, nothing, and invalid text."""
    async with serving(response(500, text)) as server:
        error = await refusal(server.base_url)

    assert error.message == message
    assert error.code is ErrorCode.UPSTREAM_UNAVAILABLE


async def test_http_upstream_empty_account_is_not_retriable() -> None:
    """Waiting does not help, although the status is 429."""
    text = b'{"error":{"message":"no credit","type":"insufficient_quota","code":"insufficient_quota"}}'
    async with serving(response(429, text)) as server:
        error = await refusal(server.base_url)

    assert (error.code, error.retriable) == (ErrorCode.QUOTA, False)


async def test_http_upstream_error_with_an_event_stream_body_is_an_error() -> None:
    """Some proxies answer a 429 that way."""
    text = b'data: {"error":{"message":"slow down"}}\n\n'
    async with serving(response(429, text, EVENT_STREAM)) as server:
        error = await refusal(server.base_url)

    assert error.code is ErrorCode.RATE_LIMITED
    assert "slow down" in error.message


async def test_http_upstream_huge_error_body_is_read_in_part() -> None:
    """Memory and time are bounded: the client closes an endless body."""
    said = 0

    async def serve(peer: Peer) -> None:
        nonlocal said
        await peer.request()
        await peer.say(b"HTTP/1.1 500 X\r\ncontent-length: 999999999999\r\n\r\n")
        while True:
            await peer.say(b"x" * 65536)
            said += 65536

    async with serving(serve) as server:
        error = await refusal(server.base_url)

    assert error.code is ErrorCode.UPSTREAM_UNAVAILABLE
    assert 2048 <= len(error.upstream or "") <= 4096
    assert said < 200 * ERROR_BODY_BYTES


async def test_http_upstream_error_body_that_hangs_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The status is known."""
    monkeypatch.setattr("streamworker.upstream.client.ERROR_BODY_TIMEOUT_S", 0.1)

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.say(b"HTTP/1.1 503 X\r\ncontent-length: 100\r\n\r\nbusy")
        await peer.gone()

    async with serving(serve) as server:
        error = await refusal(server.base_url)

    assert (error.code, error.message) == (ErrorCode.UPSTREAM_UNAVAILABLE, "busy")


async def test_http_upstream_error_body_that_breaks_is_read_to_the_break() -> None:
    """Also if the connection breaks."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.say(b"HTTP/1.1 503 X\r\ncontent-length: 100\r\n\r\nbusy")

    async with serving(serve) as server:
        error = await refusal(server.base_url)

    assert (error.code, error.http_status) == (ErrorCode.UPSTREAM_UNAVAILABLE, 503)


async def test_http_upstream_error_body_that_cannot_be_decompressed_keeps_its_status() -> None:
    """An invalid body does not change the meaning of the response."""
    headers = b"content-type: application/json\r\ncontent-encoding: gzip\r\n"
    async with serving(response(429, b"not gzip", headers)) as server:
        error = await refusal(server.base_url)

    assert (error.code, error.http_status) == (ErrorCode.RATE_LIMITED, 429)


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (200, b""),
        (200, b"content-type: text/html\r\n"),
        (200, b"content-type: application/json\r\n"),
        (200, b"content-type: text/plain\r\ncontent-type: text/event-stream\r\n"),
        (201, EVENT_STREAM),
        (206, b"content-type: application/octet-stream\r\n"),
    ],
)
async def test_http_upstream_returns_any_success_with_its_status_and_content_type(
    status: int, headers: bytes
) -> None:
    """The body's first bytes decide what it is, not its head."""
    async with (
        serving(response(status, EVENT, headers)) as server,
        client(server.base_url) as upstream,
        upstream.call(b"{}", {}) as answer,
    ):
        assert answer.status == status
        assert answer.content_type == ", ".join(re.findall("content-type: (.*)\r\n", headers.decode()))
        assert b"".join([piece async for piece in answer]) == EVENT


@pytest.mark.parametrize("encoding", [b"none", b"utf-8", b"identity, identity", b"", b"UTF-8, None"])
async def test_http_upstream_content_encoding_without_a_coding_is_ignored(encoding: bytes) -> None:
    """The body is read as it is."""
    headers = EVENT_STREAM + b"content-encoding: " + encoding + b"\r\n"
    async with serving(chunked(EVENT, headers=headers)) as server, client(server.base_url) as upstream:
        assert await read(upstream) == EVENT


async def test_http_upstream_error_has_the_time_of_the_next_call() -> None:
    """From the headers, else from the body; in ms, rounded up."""
    text = b'{"error":{"message":"Please try again in 1.2345s"}}'
    async with serving(response(429, text)) as server:
        assert (await refusal(server.base_url)).retry_after_ms == 1235
    async with serving(response(429, text, b"retry-after: 7\r\n")) as server:
        assert (await refusal(server.base_url)).retry_after_ms == 7000
    async with serving(response(429, b"{}")) as server:
        assert (await refusal(server.base_url)).retry_after_ms is msgspec.UNSET


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_http_upstream_redirect_is_not_followed(status: int) -> None:
    """The prompt and the key are sent to the configured address only."""
    async with serving(STREAM) as elsewhere:
        location = f"location: {elsewhere.base_url}/chat/completions\r\n".encode()
        async with serving(response(status, b"", location)) as server:
            error = await refusal(server.base_url)

    assert (error.code, error.http_status) == (ErrorCode.UPSTREAM_PROTOCOL, status)
    assert elsewhere.connections == 0


# No response at all


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def test_http_upstream_that_refuses_connections_is_unavailable() -> None:
    """No server listens now, but one may later."""
    error = await refusal(f"http://127.0.0.1:{free_port()}/v1")

    assert (error.code, error.retriable, error.http_status) == (ErrorCode.UPSTREAM_UNAVAILABLE, True, None)
    assert "cannot connect" in error.message


async def test_http_upstream_whose_name_is_unknown_is_unavailable() -> None:
    """`.invalid` never resolves."""
    error = await refusal("http://nowhere.invalid/v1")

    assert (error.code, error.retriable) == (ErrorCode.UPSTREAM_UNAVAILABLE, True)


async def test_http_upstream_that_does_not_accept_in_time_is_a_connect_timeout() -> None:
    """With a full backlog connection attempts hang."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
            error = await refusal(f"http://127.0.0.1:{port}/v1", connect_timeout_s=0.2)
        finally:
            for filler in fillers:
                filler.close()

    assert (error.code, error.retriable) == (ErrorCode.TIMEOUT_CONNECT, True)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """A self-signed certificate."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    where = tmp_path_factory.mktemp("tls")
    subject = ["-subj", "/CN=localhost", "-keyout", str(where / "key.pem"), "-out", str(where / "cert.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(where / "cert.pem", where / "key.pem")
    return context


async def test_http_upstream_with_an_untrusted_certificate_is_refused(certificate: ssl.SSLContext) -> None:
    """The prompt is not sent, and retrying does not help."""
    async with serving(STREAM, tls=certificate) as server:
        error = await refusal(server.base_url)

    assert (error.code, error.retriable) == (ErrorCode.UPSTREAM_UNAVAILABLE, False)
    assert "TLS connection" in error.message
    assert server.requests == []


async def test_http_upstream_shares_one_tls_context_per_process(
    certificate: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading the authorities blocks the loop for tens of milliseconds per context. The shared context
    verifies."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the authorities were read again")

    tls_context()
    for method in ("load_default_certs", "load_verify_locations"):
        monkeypatch.setattr(ssl.SSLContext, method, load)
    async with serving(STREAM, tls=certificate) as server:
        error = await refusal(server.base_url)
        host = server.base_url.replace("127.0.0.1", "localhost")
        other = await refusal(host)

    for one in (error, other):
        assert (one.code, one.retriable) == (ErrorCode.UPSTREAM_UNAVAILABLE, False)
        assert "TLS connection" in one.message


async def test_http_upstream_without_tls_is_refused() -> None:
    """`https` is configured where the server speaks `http`."""

    async def serve(peer: Peer) -> None:
        await peer.say(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with serving(serve) as server:
        error = await refusal(server.base_url.replace("http:", "https:"))

    assert (error.code, error.retriable) == (ErrorCode.UPSTREAM_UNAVAILABLE, False)
    assert "does it speak http?" in error.message


async def test_http_upstream_that_closes_before_the_answer_is_unavailable() -> None:
    """The upstream may have begun to generate, so the error is not a connect error."""

    async def serve(peer: Peer) -> None:
        await peer.request()

    async with serving(serve) as server:
        error = await refusal(server.base_url)

    assert (error.code, error.retriable) == (ErrorCode.UPSTREAM_UNAVAILABLE, True)
    assert "before it responded" in error.message


async def test_http_upstream_that_closes_inside_the_head_is_unavailable() -> None:
    """The head was valid as far as it came, so the server is not one of another protocol."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.say(b"HTTP/1.1 200 OK\r\ncontent-")

    async with serving(serve) as server:
        error = await refusal(server.base_url)

    assert (error.code, error.retriable) == (ErrorCode.UPSTREAM_UNAVAILABLE, True)
    assert "before it responded" in error.message


async def test_http_upstream_that_resets_before_the_answer_is_unavailable() -> None:
    """The same with RST."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        peer.reset()

    async with serving(serve) as server:
        error = await refusal(server.base_url)

    assert (error.code, error.retriable) == (ErrorCode.UPSTREAM_UNAVAILABLE, True)


@pytest.mark.parametrize(
    "garbage", [b"SSH-2.0-OpenSSH\r\n", b"\x00\x01\x02\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n"]
)
async def test_http_upstream_without_http_is_a_protocol_error(garbage: bytes) -> None:
    """Another service listens on the port."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.say(garbage)
        await peer.gone()

    async with serving(serve) as server:
        error = await refusal(server.base_url)

    assert error.code is ErrorCode.UPSTREAM_PROTOCOL


@pytest.mark.parametrize("endless", [b"x-more: y\r\n", b"x" * 1000])
async def test_http_upstream_with_endless_headers_is_a_protocol_error(endless: bytes) -> None:
    """Memory is bounded before the body, too."""
    said = 0

    async def serve(peer: Peer) -> None:
        nonlocal said
        await peer.request()
        await peer.say(b"HTTP/1.1 200 OK\r\n")
        while True:
            await peer.say(endless * 60)
            said += len(endless) * 60

    async with serving(serve) as server:
        error = await refusal(server.base_url)

    assert error.code is ErrorCode.UPSTREAM_PROTOCOL
    assert said < 100 << 20


# Bodies that break


@pytest.mark.parametrize(
    "model", ["practice?break_after=3", "practice?close_after=3", "practice?cut_utf8_after=3"]
)
async def test_http_upstream_that_breaks_in_the_body_loses_nothing_before_it(
    practice: PracticeUpstream, model: str
) -> None:
    """Reset or closed before the body's end: received bytes are returned, then the error is raised."""
    pieces: list[bytes] = []
    async with client(practice.base_url) as upstream:
        with pytest.raises(UpstreamError) as caught:
            async with upstream.call(body(model), {}) as answer:
                async for piece in answer:
                    pieces.append(piece)  # noqa: PERF401 - pieces before the break are kept

    error = caught.value.error
    assert b"".join(pieces).count(b'"content":') >= 3
    assert (error.code, error.http_status, error.retriable) == (ErrorCode.TRUNCATED, 200, True)


async def test_http_upstream_cut_inside_of_an_http_chunk_is_truncated() -> None:
    """The half is returned; the parser handles it."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.say(chunked(EVENT, ends=False) + b"ff\r\ndata: half")

    text, error = await break_of(serve)

    assert text == EVENT + b"data: half"
    assert error.code is ErrorCode.TRUNCATED


async def test_http_upstream_body_shorter_than_its_length_is_truncated() -> None:
    """A Content-Length that is not reached."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.say(b"HTTP/1.1 200 OK\r\n" + EVENT_STREAM + b"content-length: 9999\r\n\r\n" + EVENT)

    text, error = await break_of(serve)

    assert text == EVENT
    assert error.code is ErrorCode.TRUNCATED


async def test_http_upstream_with_an_invalid_chunk_size_is_an_error() -> None:
    """A chunk size that is not a number."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.say(chunked(EVENT, ends=False) + b"zz\r\nnonsense\r\n")
        await peer.gone()

    text, error = await break_of(serve)

    assert text in {EVENT, b""}
    assert error.code in {ErrorCode.TRUNCATED, ErrorCode.UPSTREAM_PROTOCOL}
    assert "closed the connection" not in error.message


async def test_http_upstream_body_that_cannot_be_decompressed_is_a_protocol_error() -> None:
    """The header says gzip, but the body is not compressed."""
    _, error = await break_of(chunked(EVENT, headers=EVENT_STREAM + b"content-encoding: gzip\r\n"))

    assert error.code in {ErrorCode.UPSTREAM_PROTOCOL, ErrorCode.TRUNCATED}
    assert error.http_status == 200


# Closing early, draining, cancelling


async def test_http_upstream_closed_early_closes_the_connection(practice: PracticeUpstream) -> None:
    """The upstream stops generating within a second."""
    async with client(practice.base_url) as upstream:
        async with upstream.call(body("practice?deltas=100000&pace_ms=5"), {}) as answer:
            async for _ in answer:
                break
        async with asyncio.timeout(1):
            await practice.until(lambda: practice.open_streams == 0)

    assert practice.calls[0].outcome == "client_closed"
    assert practice.calls[0].deltas_sent < 1000


async def test_http_upstream_drained_reuses_the_connection() -> None:
    """Reuse saves a handshake."""
    async with serving(STREAM) as server, client(server.base_url) as upstream:
        for _ in range(5):
            async with upstream.call(b"{}", {}) as answer:
                text = b""
                async for piece in answer:
                    text += piece
                    if DONE in text:
                        break
                await answer.drain()

    assert len(server.requests) == 5
    assert server.connections == 1


async def test_http_upstream_drained_waits_briefly_for_the_end() -> None:
    """The client does not wait for an upstream that sends `[DONE]` and keeps the body open."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.say(chunked(DONE, ends=False))
        await peer.gone()

    loop = asyncio.get_running_loop()
    async with (
        serving(serve) as server,
        client(server.base_url) as upstream,
        upstream.call(b"{}", {}) as answer,
    ):
        assert await anext(answer) == DONE
        began = loop.time()
        await answer.drain()

    assert loop.time() - began < 1


@pytest.mark.parametrize("left", ["cancelled", "in the block"])
async def test_http_upstream_closed_while_the_upstream_is_silent_closes_the_connection(
    practice: PracticeUpstream, left: str
) -> None:
    """The upstream would otherwise notice only when it writes again."""
    async with client(practice.base_url) as upstream:

        async def stream() -> None:
            async with upstream.call(body("practice?stall_after=1"), {}) as answer:
                async for piece in answer:
                    if left == "in the block" and b"content" in piece:
                        return

        task = asyncio.create_task(stream())
        await practice.until(lambda: practice.open_streams == 1)
        if left == "cancelled":
            while not practice.calls[0].deltas_sent:  # noqa: ASYNC110 - the call log sends no notification per delta
                await asyncio.sleep(0.005)
            task.cancel()
        await asyncio.wait([task])
        async with asyncio.timeout(1):
            await practice.until(lambda: practice.open_streams == 0)

    assert practice.calls[0].outcome == "client_closed"


PHASES = {
    "connecting": "",
    "waiting for the answer": "practice?slow_headers_ms=60000",
    "waiting for the first delta": "practice?first_delta_ms=60000",
    "reading": "practice?deltas=100000&pace_ms=2",
    "reading without a pause": "practice?deltas=1000000",
    "waiting between deltas": "practice?stall_after=2",
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("moments", [0, 1, 3, 10])
async def test_http_upstream_cancelled_in_any_phase_leaks_no_connection(
    practice: PracticeUpstream, phase: str, moments: int
) -> None:
    """Twenty calls, cancelled in different turns of the loop: every socket is closed, and the client still
    works."""
    model = PHASES[phase] or "practice"

    async def stream(upstream: HttpUpstream) -> None:
        async with upstream.call(body(model), {}) as answer:
            async for _ in answer:
                pass

    async with client(practice.base_url) as upstream:
        before = connections()
        tasks = [asyncio.create_task(stream(upstream)) for _ in range(20)]
        if PHASES[phase]:
            await practice.until(lambda: practice.open_streams == 20)
        for _ in range(moments):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        await practice.until(lambda: practice.open_streams == 0)
        assert (await read(upstream, body())).endswith(DONE)

    await back_to(before)


async def test_http_upstream_refused_repeatedly_leaks_no_connection(practice: PracticeUpstream) -> None:
    """After an error the connection is closed or reused."""
    before = connections()
    async with client(practice.base_url) as upstream:
        for _ in range(50):
            with pytest.raises(UpstreamError):
                await read(upstream, body("practice?status=500"))
        assert connections() <= before + 4

    await back_to(before)


async def test_http_upstream_runs_three_hundred_streams_at_once() -> None:
    """The client has no hidden limit; the worker limits streams."""
    there, all_there = [], asyncio.Event()

    async def hold(peer: Peer) -> None:
        there.append(await peer.request())
        if len(there) == 300:
            all_there.set()
        await all_there.wait()
        await peer.say(STREAM)
        await peer.gone()

    async with serving(hold) as server, client(server.base_url) as upstream:
        bodies = await asyncio.gather(*(read(upstream) for _ in range(300)))

    assert set(bodies) == {EVENT + DONE}


# Secrets


async def test_http_upstream_keeps_no_cookies() -> None:
    """Calls of different tenants share the client."""
    cookie = b"set-cookie: session=1; Path=/\r\n"
    answer = chunked(EVENT, headers=EVENT_STREAM + cookie)
    async with serving(answer) as server, client(server.base_url) as upstream:
        for _ in range(3):
            await read(upstream)

    assert len(server.requests) == 3
    assert not any("cookie" in headers for headers in server.requests)


async def test_http_upstream_key_is_read_for_each_call(tmp_path: Path) -> None:
    """A key can be rotated without a restart."""
    file = tmp_path / "key"
    async with serving(STREAM) as server, client(server.base_url, api_key_file=file) as upstream:
        for key in ("first-key", "second-key\n"):
            file.write_text(key)
            await read(upstream)

    keys = [headers["authorization"] for headers in server.requests]
    assert keys == ["bearer first-key", "bearer second-key"]


async def test_http_upstream_key_from_the_environment_is_sent(
    practice: PracticeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration names the variable."""
    monkeypatch.setenv("OUR_KEY", " sk-from-the-environment ")
    async with client(practice.base_url, api_key_env="OUR_KEY") as upstream:
        await read(upstream, body())

    assert practice.calls[0].headers["authorization"] == "present"


async def test_http_upstream_without_its_key_is_an_auth_error_and_sends_nothing(
    practice: PracticeUpstream, tmp_path: Path
) -> None:
    """A failed rotation may be repaired."""
    error = await refusal(practice.base_url, api_key_file=tmp_path / "gone")

    assert (error.code, error.retriable) == (ErrorCode.AUTH, True)
    assert "api_key_file" in error.message
    assert len(practice.calls) == 0


@pytest.mark.parametrize("key", [b"", b"sk-\xd0\xba", b"two\nlines", b"\xff\xfe"])
async def test_http_upstream_with_an_invalid_key_is_an_auth_error(
    practice: PracticeUpstream, tmp_path: Path, key: bytes
) -> None:
    """A key that is not valid in a header is neither sent nor repeated in the error."""
    file = tmp_path / "key"
    file.write_bytes(key)
    error = await refusal(practice.base_url, api_key_file=file)

    assert (error.code, error.retriable) == (ErrorCode.AUTH, True)
    assert "two" not in error.message
    assert len(practice.calls) == 0


async def test_http_upstream_scrub_removes_the_current_key(tmp_path: Path) -> None:
    """And any text that looks like a secret."""
    file = tmp_path / "key"
    file.write_text("plain-word-1")
    async with client("http://127.0.0.1:1/v1", api_key_file=file) as upstream:
        assert upstream.scrub("key plain-word-1, plain-word-2") == "key ***, plain-word-2"
        file.write_text("plain-word-2")
        assert upstream.scrub("key plain-word-1, plain-word-2") == "key plain-word-1, ***"
        file.unlink()
        assert upstream.scrub("Bearer abcdef sk-abcdefghijkl") == "Bearer *** ***"


# The models endpoint


async def test_http_upstream_lists_its_models(practice: PracticeUpstream) -> None:
    """`streamworker check` prints them."""
    async with client(practice.base_url) as upstream:
        assert "practice" in await upstream.models()


@pytest.mark.parametrize("text", [b"nonsense", b"[]", b'{"data":5}', b'{"data":[{}]}', b"null"])
async def test_http_upstream_models_in_another_shape_are_empty(text: bytes) -> None:
    """Not every upstream has such a list."""
    async with serving(response(200, text)) as server, client(server.base_url) as upstream:
        assert await upstream.models() == []


async def test_http_upstream_models_refused_raises() -> None:
    """`check` reports a wrong key before the first job does."""
    async with serving(response(401, b'{"error":"no"}')) as server, client(server.base_url) as upstream:
        with pytest.raises(UpstreamError, match="no"):
            await upstream.models()


# Headers, proxies and certificates


async def test_http_upstream_sends_the_configured_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable is read for each call, so that it can be rotated; the worker's own headers cannot be overridden."""
    headers = {"Api-Key": "env:OUR_KEY", "x-team": "blue"}
    async with serving(STREAM) as server, client(server.base_url, headers=headers) as upstream:
        for key in ("first-key", "second-key"):
            monkeypatch.setenv("OUR_KEY", key)
            await read(upstream)

    assert [(sent["api-key"], sent["x-team"]) for sent in server.requests] == [
        ("first-key", "blue"),
        ("second-key", "blue"),
    ]
    assert server.requests[0]["content-type"] == "application/json"


async def test_http_upstream_header_whose_variable_is_gone_is_an_auth_error() -> None:
    """Nothing is sent without it."""
    async with serving(STREAM) as server:
        error = await refusal(server.base_url, headers={"api-key": "env:NOT_SET_ANYWHERE"})

    assert (error.code, error.retriable) == (ErrorCode.AUTH, True)
    assert server.requests == []


async def test_http_upstream_scrub_removes_header_values_and_the_password_of_the_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Error bodies repeat headers."""
    monkeypatch.setenv("OUR_KEY", "in-a-variable")
    members = {
        "headers": {"a": "env:OUR_KEY", "b": "in-the-file"},
        "proxy": "http://user:hunter22@127.0.0.1:1",
    }
    async with client("http://127.0.0.1:1/v1", **members) as upstream:
        assert upstream.scrub("in-a-variable in-the-file hunter22 else") == "*** *** *** else"


async def test_http_upstream_that_cannot_reach_its_proxy_is_unavailable_without_the_password() -> None:
    """The error names the proxy by host and port."""
    proxy = f"http://user:hunter22@127.0.0.1:{free_port()}"
    error = await refusal("http://upstream.test/v1", proxy=proxy)

    assert (error.code, error.retriable) == (ErrorCode.UPSTREAM_UNAVAILABLE, True)
    assert "hunter22" not in error.message


async def test_http_upstream_calls_through_its_proxy() -> None:
    """Plain HTTP goes to the proxy with the whole URL and the proxy's credentials."""
    async with serving(STREAM) as server:
        proxy = server.base_url.removesuffix("/v1").replace("//", "//user:hunter22@")
        async with client("http://upstream.test/v1", proxy=proxy) as upstream:
            assert await read(upstream) == EVENT + DONE

    assert server.requests[0]["host"] == "upstream.test"
    assert server.requests[0]["proxy-authorization"].startswith("basic ")


async def test_http_upstream_trusts_the_authority_of_ca_file(tmp_path: Path) -> None:
    """And notices when the file is replaced, for new connections."""
    authority, other = trustme.CA(), trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    file = tmp_path / "ca.pem"
    other.cert_pem.write_to_path(str(file))
    async with serving(STREAM, tls=context) as server, client(server.base_url, ca_file=file) as upstream:
        with pytest.raises(UpstreamError, match="TLS connection"):
            await read(upstream)
        replacement = tmp_path / "new.pem"
        authority.cert_pem.write_to_path(str(replacement))
        replacement.rename(file)
        assert await read(upstream) == EVENT + DONE
        file.unlink()  # in the middle of the next replacement
        assert await read(upstream) == EVENT + DONE


async def test_http_upstream_keeps_no_prompt_while_the_answer_streams(practice: PracticeUpstream) -> None:
    """A thousand streams with long prompts would hold them for minutes."""
    prompt = body("practice?deltas=3", user="a needle")
    async with client(practice.base_url) as upstream, upstream.call(prompt, {}) as answer:
        del prompt
        gc.collect()
        held = [
            one for one in gc.get_objects() if isinstance(one, httpx.Request) and b"a needle" in one.content
        ]
        assert [piece async for piece in answer]

    assert held == []
