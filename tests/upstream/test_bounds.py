"""What an upstream sends to make us grow: each bound from its near and its far side."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
import zlib
from typing import TYPE_CHECKING

import pytest

from streamworker.errors import UpstreamError
from streamworker.model import ErrorCode
from streamworker.upstream.client import ERROR_BODY_BYTES, UNPACKED_BYTES
from tests.upstream.raw import EVENT_STREAM, chunked, response, serving
from tests.upstream.test_http_upstream import DONE, EVENT, client, read, refusal

if TYPE_CHECKING:
    from tests.upstream.raw import Peer

GZIP = b"content-encoding: gzip\r\n"
BOMB = gzip.compress(bytes(64 << 20))


async def test_upstream_that_compresses_is_unpacked_in_bounded_pieces() -> None:
    """64 MiB come in 64 KB: no piece, and no sum of them that nobody asked for, is large."""
    async with (
        serving(chunked(BOMB, headers=EVENT_STREAM + GZIP)) as server,
        client(server.base_url) as upstream,
    ):
        tracemalloc.start()
        try:
            async with upstream.call(b"{}", {}) as answer:
                sizes = [len(piece) async for piece in answer]
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

    assert sum(sizes) == 64 << 20
    assert max(sizes) <= UNPACKED_BYTES
    assert peak < 8 << 20


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        (b"gzip", gzip.compress(EVENT) + gzip.compress(DONE)),
        (b"GZIP", gzip.compress(EVENT + DONE)),
        (b"deflate", zlib.compress(EVENT + DONE)),
        (b"identity", EVENT + DONE),
    ],
    ids=["two-members", "upper-case", "deflate", "identity"],
)
async def test_upstream_that_compresses_says_what_it_said(encoding: bytes, packed: bytes) -> None:
    """Whatever way, and cut anywhere."""
    pieces = [packed[at : at + 1] for at in range(len(packed))]
    headers = EVENT_STREAM + b"content-encoding: " + encoding + b"\r\n"
    async with serving(chunked(*pieces, headers=headers)) as server, client(server.base_url) as upstream:
        assert await read(upstream) == EVENT + DONE


async def test_upstream_that_compresses_in_a_way_that_was_not_asked_for_is_refused() -> None:
    """Not handed on as text that is none."""
    headers = EVENT_STREAM + b"content-encoding: br\r\n"
    async with serving(chunked(EVENT, headers=headers)) as server, client(server.base_url) as upstream:
        with pytest.raises(UpstreamError) as caught:
            await read(upstream)

    assert caught.value.error.code is ErrorCode.UPSTREAM_PROTOCOL
    assert "content-encoding 'br' was not asked for" in caught.value.error.message


@pytest.mark.parametrize("size", [ERROR_BODY_BYTES, ERROR_BODY_BYTES + 1, 32 << 20])
@pytest.mark.parametrize("packed", [False, True])
async def test_upstream_error_body_is_read_up_to_a_bound(size: int, packed: bool) -> None:
    """Of an error without end, packed or not, 2 KiB are told in the end; here, before secrets are taken out, twice that."""
    body = b"x" * size
    answer = response(500, gzip.compress(body), GZIP) if packed else response(500, body)
    async with serving(answer) as server:
        error = await refusal(server.base_url)

    assert error.code is ErrorCode.UPSTREAM_UNAVAILABLE
    assert len(error.message) == len(error.upstream or "") == 4096


@pytest.mark.parametrize(
    "line", [b"x-%d: y\r\n", b"x-%d: " + b"y" * 8000 + b"\r\n", b"x%d"], ids=["many", "large", "one"]
)
async def test_upstream_headers_without_end_are_refused(line: bytes) -> None:
    """However they are made."""

    async def endless(peer: Peer) -> None:
        await peer.request()
        await peer.say(b"HTTP/1.1 200 OK\r\n" + EVENT_STREAM)
        number = 0
        while True:
            await peer.say(line % number)
            await asyncio.sleep(0)
            number += 1

    async with serving(endless) as server:
        error = await refusal(server.base_url)

    assert error.code is ErrorCode.UPSTREAM_PROTOCOL
