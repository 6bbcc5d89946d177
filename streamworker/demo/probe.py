"""One HTTP request to a process of the demo."""

from __future__ import annotations

import asyncio
from typing import Final

__all__ = ["get"]

_ANSWER_S: Final = 2.0
_MAX_BYTES: Final = 65_536


async def get(host: str, port: int, path: str) -> tuple[int, bytes]:
    """Return status and body of `GET path`; status 0 if nothing answers in HTTP within two seconds."""
    try:
        async with asyncio.timeout(_ANSWER_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
                await writer.drain()
                head, _, body = (await reader.read(_MAX_BYTES)).partition(b"\r\n\r\n")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return 0, b""
    words = head.split(None, 2)
    return (int(words[1]), body) if len(words) > 1 and words[1].isdigit() else (0, b"")
