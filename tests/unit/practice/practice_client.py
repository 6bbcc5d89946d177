"""A client without an HTTP library, so that tests see the exact bytes."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from streamworker.practice import PracticeUpstream

MESSAGES = [{"role": "user", "content": "Count from 1 to 10."}]


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def request(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        lines = [f"{method} {path} HTTP/1.1", "host: practice", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    def ask(self, model: str, *, headers: dict[str, str] | None = None, **members: Any) -> None:
        body = {"model": model, "stream": True, "messages": MESSAGES} | members
        self.request("POST", "/v1/chat/completions", orjson.dumps(body), headers)

    async def head(self) -> tuple[int, dict[str, str]]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split(" ")[1]), headers

    async def whole(self) -> tuple[int, dict[str, str], Any]:
        """Read a response of known length; return its body as JSON."""
        status, headers = await self.head()
        body = await self.reader.readexactly(int(headers["content-length"]))
        return status, headers, orjson.loads(body)

    async def http_chunk(self) -> bytes | None:
        """Read one chunk of the transfer coding; return None for the last one. Raises IncompleteReadError."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        data = await self.reader.readexactly(size + 2)
        assert data[-2:] == b"\r\n"
        return data[:-2] or None

    async def http_chunks(self) -> list[bytes]:
        """Read all chunks of the transfer coding up to its end."""
        return [chunk async for chunk in self._until_last()]

    async def _until_last(self) -> AsyncIterator[bytes]:
        while (chunk := await self.http_chunk()) is not None:
            yield chunk


@asynccontextmanager
async def connected(upstream: PracticeUpstream) -> AsyncIterator[Connection]:
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", upstream.port)
        try:
            yield Connection(reader, writer)
        finally:
            writer.close()


async def answer(upstream: PracticeUpstream, model: str, **members: Any) -> list[bytes]:
    """Return the HTTP chunks of an answer with valid framing."""
    async with connected(upstream) as connection:
        connection.ask(model, **members)
        status, headers = await connection.head()
        assert (status, headers["content-type"]) == (200, "text/event-stream")
        return await connection.http_chunks()


def payloads(body: bytes) -> list[Any]:
    """Return the chunks of a body in the seed's format, without [DONE]."""
    lines = body.removesuffix(b"\n\n").split(b"\n\n")
    return [orjson.loads(line.removeprefix(b"data: ")) for line in lines if line != b"data: [DONE]"]


def contents(chunks: list[Any], choices: int = 1) -> list[str]:
    said = [""] * choices
    for chunk in chunks:
        for choice in chunk["choices"]:
            said[choice["index"]] += choice["delta"].get("content", "")
    return said


async def ended(upstream: PracticeUpstream, number: int = 1) -> Any:
    """Return the last of `number` calls when all of them have ended."""
    async with asyncio.timeout(5):
        await upstream.until(lambda: len(upstream.calls) >= number and not upstream.open_streams)
    return upstream.calls[-1]
