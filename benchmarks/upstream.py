"""The upstream of the benchmarks. It uses as little CPU as possible in Python, to leave it to the contenders.

It runs in a separate process on one port. The model name selects the stream: `bench?rate=20&burst=1&bytes=16` writes
`burst` deltas of `bytes` characters `rate` times a second until `POST /finish`; `bench?deltas=20` writes 20 deltas at once
and ends. Chunks are encoded beforehand; only the time of the write is inserted at the beginning of the text, as `@` and
sixteen digits: microseconds of CLOCK_MONOTONIC, which all processes of a machine share.

Every delta of a paced stream is a separate write on a socket with TCP_NODELAY, hence a separate packet.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from typing import NamedTuple, cast
from urllib.parse import parse_qsl

import uvloop

BACKLOG = 4096
STAMP_DIGITS = 16
_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
)
_STAMP = "@" + "0" * STAMP_DIGITS
_WORDS = " and so the model went on to say what it had to say, token by token"


class Manner(NamedTuple):
    """The pace of a stream: bursts per second, deltas per burst, characters per delta, deltas in total (0: no end)."""

    rate: float = 0.0
    burst: int = 1
    bytes: int = 24
    deltas: int = 0

    @classmethod
    def of(cls, model: str) -> Manner:
        """Parse a model name."""
        asked = dict(parse_qsl(model.partition("?")[2]))
        return cls(
            float(asked.get("rate", 0)),
            int(asked.get("burst", 1)),
            int(asked.get("bytes", 24)),
            int(asked.get("deltas", 0)),
        )


def stamp() -> bytes:
    """Return the current time in the format of a delta."""
    return b"%016d" % (time.monotonic_ns() // 1000)


def _frame(text: str) -> bytes:
    """Return a server-sent event as one chunk of chunked coding (RFC 9112 §7.1)."""
    event = f"data: {text}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


def _chunk(choices: list[object], **more: object) -> str:
    common = {
        "id": "chatcmpl-Bx5gFqzmW8tVh2uJ0pLrKd3sYcN1a",
        "object": "chat.completion.chunk",
        "created": 1_780_000_000,
        "model": "bench-2026-01-01",
        "service_tier": "default",
        "system_fingerprint": "fp_44709d6fcb",
    }
    return json.dumps({**common, "choices": choices, **more}, separators=(",", ":"))


def _delta(characters: int) -> tuple[bytes, bytes]:
    """Return the bytes before and after the time in the chunk of one delta."""
    text = _STAMP + (_WORDS * (characters // len(_WORDS) + 1))[: max(0, characters - len(_STAMP))]
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
    before, _, after = _frame(_chunk([choice])).partition(_STAMP.encode())
    return before + b"@", after


_LAST = (
    _frame(_chunk([{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]))
    + _frame(_chunk([], usage={"prompt_tokens": 9, "completion_tokens": 99, "total_tokens": 108}))
    + _frame("[DONE]")
    + b"0\r\n\r\n"
)


class Account:
    """Counts of what was written to all streams."""

    def __init__(self) -> None:
        self.written = 0
        self.withheld = 0
        self.streams: set[Connection] = set()

    def told(self) -> bytes:
        """Return the counts as JSON. `withheld`: deltas that were due while a reader did not read."""
        return json.dumps(
            {"written": self.written, "withheld": self.withheld, "open": len(self.streams)}
        ).encode()


class Connection(asyncio.Protocol):
    """One client connection, with one request at a time."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._timer: asyncio.TimerHandle | None = None
        self._is_choked = False
        self._manner = Manner()
        self._pieces = (b"", b"")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport of a new connection."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, _: Exception | None) -> None:
        """Stop the stream of a closed connection."""
        self._transport = None
        self._stop()

    def pause_writing(self) -> None:
        """Stop writing: the client does not read fast enough."""
        self._is_choked = True

    def resume_writing(self) -> None:
        """Continue writing."""
        self._is_choked = False

    def data_received(self, data: bytes) -> None:
        """Parse a request from the received bytes."""
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        length = 0
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name.strip().lower() == b"content-length":
                length = int(value)
        if len(body) >= length:
            self._received = body[length:]
            self._answer(head.split(b" ", 2)[1], body[:length])

    def _answer(self, target: bytes, body: bytes) -> None:
        if target.endswith(b"/chat/completions"):
            self._begin(Manner.of(json.loads(body)["model"]))
            return
        if target == b"/finish":
            for stream in list(self._account.streams):
                stream.finish()
        told = self._account.told()
        self._write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (len(told), told)
        )

    def _begin(self, manner: Manner) -> None:
        self._manner = manner
        self._pieces = _delta(manner.bytes)
        self._account.streams.add(self)
        self._write(_HEAD)
        if not manner.rate:
            self._write_deltas(manner.deltas)
            self.finish()
            return
        # Streams of real upstreams are not in step.
        self._due = self._loop.time() + random.random() / manner.rate
        self._timer = self._loop.call_at(self._due, self._beat)

    def _beat(self) -> None:
        self._due += 1 / self._manner.rate
        self._timer = self._loop.call_at(self._due, self._beat)
        if self._is_choked:
            self._account.withheld += self._manner.burst
        else:
            self._write_deltas(self._manner.burst)

    def _write_deltas(self, count: int) -> None:
        before, after = self._pieces
        self._write(b"".join([before + stamp() + after] * count))
        self._account.written += count

    def finish(self) -> None:
        """End the stream; the connection stays open."""
        self._stop()
        self._write(_LAST)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._account.streams.discard(self)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


async def serve(port: int) -> None:
    """Serve until killed."""
    account = Account()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(account), "127.0.0.1", port, backlog=BACKLOG)
    print("ready", flush=True)
    await server.serve_forever()


def main() -> None:
    """Parse arguments and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    uvloop.run(serve(parser.parse_args().port))


if __name__ == "__main__":
    main()
