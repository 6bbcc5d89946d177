"""Play a script to one client: send the writes at their pace, up to the fault if there is one."""

from __future__ import annotations

import asyncio
import zlib
from typing import TYPE_CHECKING, Any, Final

from streamworker.practice.errors import Words, frame
from streamworker.practice.moves import Move, Moves
from streamworker.practice.script import Fault

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streamworker.practice.calls import Call, Outcome
    from streamworker.practice.moves import Answer
    from streamworker.practice.peer import Peer

EVENT_STREAM: Final = (("content-type", "text/event-stream"), ("cache-control", "no-cache"))
MULTI_BYTE: Final = "🐟".encode()
WORDS: Final = "The practice upstream failed as its script says."
_ENDLESS_PIECE: Final = b"x" * 65536
_GARBAGE: Final = b"Internal Server Error"


def words(code: str | None, status: int) -> Words:
    """Return the content of an error of the script."""
    number = int(code) if code is not None and code.isdigit() else status
    return Words(WORDS, "server_error", code or "practice_fault", number)


class Player:
    """Play one answer."""

    def __init__(self, peer: Peer, call: Call, answer: Answer) -> None:
        self._peer = peer
        self._call = call
        self._answer = answer
        self._script = answer.script
        self._moves = Moves(answer)
        self._keepalive = self._script.speaks.keepalive is not None
        # Flush after every write, so that a compressed stream still arrives event by event.
        self._packer = zlib.compressobj(wbits=31) if self._script.encoding == "gzip" else None
        self._loop = asyncio.get_running_loop()
        self._due = 0.0

    async def play(self) -> Outcome:
        """Send the stream; return how it ended. Raises ClientGoneError."""
        await self._head()
        await self._first_silence()
        if self._script.fault and not self._script.after:
            return await self._go_wrong(self._script.fault)
        await self._send(self._moves.opening())
        if self._script.endless_line:
            await self._endless()
        await self._pieces(self._script.after if self._script.fault else None)
        if self._script.fault:
            return await self._go_wrong(self._script.fault)
        await self._send(self._moves.closing())
        await self._end_body()
        return "completed"

    async def _head(self) -> None:
        headers = list(EVENT_STREAM)
        if self._script.encoding is not None:
            headers.append(("content-encoding", "gzip"))
        length = self._moves.length() if self._script.framing == "length" else None
        await self._peer.send_head(200, headers, closes=self._script.framing == "close", length=length)
        self._call.first_byte_at = self._peer.first_byte_at
        if self._moves.events.start:
            await self._write(self._moves.events.start)

    async def _first_silence(self) -> None:
        left = self._script.first_delta_ms / 1000
        step = self._script.ping_ms / 1000 or left
        while self._keepalive and left > step > 0:
            await self._peer.pause(step)
            await self._write(self._moves.events.keepalive())
            left -= step
        await self._peer.pause(left)

    async def _send(self, moves: Iterable[Move]) -> None:
        for move in moves:
            await self._write(move.data)
            self._call.note(move)

    async def _pieces(self, stop: int | None) -> None:
        self._due = self._loop.time()
        number = 0
        for move in self._moves.pieces():
            if stop is not None and number + len(move.pieces) > stop:
                return
            if number:
                await self._pace()
            number += len(move.pieces)
            if self._keepalive:
                await self._write(self._moves.events.keepalive())
            await self._write(move.data)
            self._call.note(move)

    async def _pace(self) -> None:
        # Relative to the time when the last delta was due, so that the pace does not drift under load; a client that
        # blocked the server gets no burst afterwards.
        now = self._loop.time()
        self._due = max(self._due + self._script.pace_ms / 1000, now)
        await self._peer.pause(self._due - now)

    async def _write(self, data: bytes) -> None:
        if self._packer is None and self._script.chunk_bytes is None:
            await self._peer.send_body(data)
            self._call.sent.bytes += len(data)
            return
        size = self._script.chunk_bytes or len(data)
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            await self._peer.send_body(self._packed(piece))
            self._call.sent.bytes += len(piece)
            await self._peer.pause(0)  # lets a reader in this process read each piece separately

    def _packed(self, data: bytes) -> bytes:
        if self._packer is None:
            return data
        return self._packer.compress(data) + self._packer.flush(zlib.Z_SYNC_FLUSH)

    async def _end_body(self) -> None:
        if self._packer is not None:
            await self._peer.send_body(self._packer.flush())
        await self._peer.end_body()

    # Faults

    async def _go_wrong(self, fault: Fault) -> Outcome:
        match fault:
            case Fault.BREAK:
                self._peer.reset()
            case Fault.CUT:
                await self._cut()
            case Fault.CUT_UTF8:
                await self._write(self._unfinished("", b'"content":"') + MULTI_BYTE[:2])
            case Fault.END:  # end the HTTP framing; a compressed body stays incomplete
                await self._peer.end_body()
            case Fault.STALL:
                await self._peer.pause(None)
            case Fault.PING_STALL:
                await self._ping()
            case Fault.GARBAGE:
                await self._write(self._moves.events.data(_GARBAGE))
                await self._end_body()
            case Fault.ERROR_FRAME | Fault.ERROR_THEN_DONE:
                await self._error(done=fault is Fault.ERROR_THEN_DONE)
            case Fault.CLOSE:
                pass
        return "fault"

    async def _cut(self) -> None:
        data = self._unfinished("half a ", b"half")
        await self._peer.send_torn(self._packed(data))
        self._call.sent.bytes += len(data)

    async def _ping(self) -> None:
        while True:
            await self._write(self._moves.events.keepalive())
            await self._peer.pause(self._script.ping_ms / 1000)

    async def _error(self, *, done: bool) -> None:
        said = words(self._script.code, 500)
        written: list[Move] = []

        def chunk(choice: dict[str, Any]) -> dict[str, Any]:
            written.append(Move(b"", deltas=1, chunks=1))
            return self._moves.chunks.chunk([{"index": 0, **choice}])

        await self._write(frame(self._script.error, said, self._moves.events, chunk))
        for move in written:
            self._call.note(move)
        if done:
            await self._write(self._moves.events.done("plain"))
        await self._end_body()

    async def _endless(self) -> None:
        await self._write(self._unfinished("", b'"content":"'))
        while True:
            await self._write(_ENDLESS_PIECE)
            await self._peer.pause(self._script.pace_ms / 1000)

    def _unfinished(self, content: str, upto: bytes) -> bytes:
        chunk = self._moves.chunks.chunk([{"index": 0, "delta": {"content": content}}])
        return self._moves.events.unfinished(chunk, upto)
