"""Bounds on what an upstream sends, from both sides of each bound."""

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


async def test_upstream_that_compresses_is_decompressed_in_bounded_pieces() -> None:
    """64 MiB arrive in 64 KB, and no piece is large."""
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
async def test_upstream_that_compresses_gives_the_original_body(encoding: bytes, packed: bytes) -> None:
    """For every coding, cut anywhere."""
    pieces = [packed[at : at + 1] for at in range(len(packed))]
    headers = EVENT_STREAM + b"content-encoding: " + encoding + b"\r\n"
    async with serving(chunked(*pieces, headers=headers)) as server, client(server.base_url) as upstream:
        assert await read(upstream) == EVENT + DONE


async def test_upstream_with_an_unknown_coding_is_refused() -> None:
    """Compressed bytes are not passed on as text."""
    headers = EVENT_STREAM + b"content-encoding: br\r\n"
    async with serving(chunked(EVENT, headers=headers)) as server, client(server.base_url) as upstream:
        with pytest.raises(UpstreamError) as caught:
            await read(upstream)

    assert caught.value.error.code is ErrorCode.UPSTREAM_PROTOCOL
    assert "content-encoding 'br' was not asked for" in caught.value.error.message


@pytest.mark.parametrize("size", [ERROR_BODY_BYTES, ERROR_BODY_BYTES + 1, 32 << 20])
@pytest.mark.parametrize("packed", [False, True])
async def test_upstream_error_body_is_read_up_to_a_bound(size: int, packed: bool) -> None:
    """2 KiB of an endless error reach the terminal event, compressed or not; before redaction twice as much."""
    body = b"x" * size
    answer = response(500, gzip.compress(body), GZIP) if packed else response(500, body)
    async with serving(answer) as server:
        error = await refusal(server.base_url)

    assert error.code is ErrorCode.UPSTREAM_UNAVAILABLE
    assert len(error.message) == len(error.upstream or "") == 4096


@pytest.mark.parametrize(
    "line", [b"x-%d: y\r\n", b"x-%d: " + b"y" * 8000 + b"\r\n", b"x%d"], ids=["many", "large", "one"]
)
async def test_upstream_with_endless_headers_is_refused(line: bytes) -> None:
    """In any form."""

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
