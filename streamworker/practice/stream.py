"""A script played to one client: the deltas at their pace, up to the fault if there is one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

from streamworker.practice import text
from streamworker.practice.script import Fault
from streamworker.practice.wire import CLOSE_HEAD, EVENT_STREAM, ROLE, Chunks, error_body

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streamworker.practice.calls import Call, Outcome
    from streamworker.practice.peer import Peer
    from streamworker.practice.request import ChatRequest
    from streamworker.practice.script import Script

_ENDLESS_PIECE: Final = b"x" * 65536
ERROR_FRAME: Final = error_body(
    "The practice upstream failed as it was told to.", "server_error", "practice_fault"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What is to be said to one request."""

    answer_id: str
    script: Script
    chat: ChatRequest
    choices: int

    def pieces(self) -> Iterator[text.Piece]:
        return text.pieces(self.script, self.chat.messages, self.choices)

    def usage(self, completion: int) -> dict[str, int]:
        return text.usage(self.script, text.prompt_tokens(self.chat.messages), completion)

    @property
    def finish_reason(self) -> str:
        return "tool_calls" if self.script.tool_calls else "stop"


class Player:
    """Plays one answer; `play` says how it ended."""

    def __init__(self, peer: Peer, call: Call, answer: Answer) -> None:
        self._peer = peer
        self._call = call
        self._answer = answer
        self._script = answer.script
        self._chunks = Chunks(answer.answer_id, answer.script.name, answer.choices, answer.script.format)
        self._prompt_tokens = text.prompt_tokens(answer.chat.messages)
        self._total = text.count(answer.script, answer.choices)
        self._loop = asyncio.get_running_loop()
        self._due = 0.0

    async def play(self) -> Outcome:
        """Send the stream; raises ClientGoneError."""
        await self._head()
        await self._peer.pause(self._script.first_delta_ms / 1000)
        if self._script.fault and not self._script.after:
            return await self._go_wrong(self._script.fault)
        await self._roles()
        if self._script.endless_line:
            await self._endless()
        await self._deltas(self._script.after if self._script.fault else None)
        if self._script.fault:
            return await self._go_wrong(self._script.fault)
        await self._end()
        return "completed"

    async def _head(self) -> None:
        if self._script.framing == "close":
            await self._peer.send_close_head(CLOSE_HEAD)
        else:
            await self._peer.send_head(200, EVENT_STREAM)
        self._call.first_byte_at = self._peer.first_byte_at

    async def _roles(self) -> None:
        for choice in range(self._answer.choices):
            usage = self._usage_at(0) if self._script.usage == "running" else None
            await self._write(self._chunks.delta(choice, ROLE, None, usage))

    async def _deltas(self, stop: int | None) -> None:
        self._due = self._loop.time()
        for number, piece in enumerate(islice(self._answer.pieces(), stop), 1):
            if number > 1:
                await self._pace()
            finish, usage = self._extras(number)
            await self._write(self._chunks.delta(piece.choice, piece.delta, finish, usage))
            self._call.sent(piece.choice, piece.text)

    async def _pace(self) -> None:
        # Counted from when the last delta was due, so that the pace does not drift under load; a client that
        # blocked us is not flooded afterwards.
        now = self._loop.time()
        self._due = max(self._due + self._script.pace_ms / 1000, now)
        await self._peer.pause(self._due - now)

    def _extras(self, number: int) -> tuple[str | None, dict[str, int] | None]:
        """finish_reason and usage of delta `number` of all: each choice finishes on its own last delta."""
        if number <= self._total - self._answer.choices:
            return None, self._usage_at(number) if self._script.usage == "running" else None
        told = self._script.usage == "running" or (self._script.usage == "finish" and number == self._total)
        return self._answer.finish_reason, self._usage_at(number) if told else None

    def _usage_at(self, number: int) -> dict[str, int]:
        usage = text.usage(self._script, self._prompt_tokens, number)
        self._call.usage_sent = usage
        return usage

    async def _end(self) -> None:
        if not self._total:
            await self._bare_finish()
        if self._script.usage == "own" and self._answer.chat.include_usage:
            await self._write(self._chunks.usage(self._usage_at(self._total)))
        if not self._script.no_done:
            await self._write(self._chunks.done)
        await self._peer.end_body()

    async def _bare_finish(self) -> None:
        """Nothing was said: the finish reason rides on an empty delta."""
        for choice in range(self._answer.choices):
            told = self._script.usage in {"finish", "running"} and choice == self._answer.choices - 1
            usage = self._usage_at(0) if told else None
            await self._write(self._chunks.delta(choice, b"{}", self._answer.finish_reason, usage))

    async def _write(self, data: bytes) -> None:
        if not (size := self._script.chunk_bytes):
            await self._peer.send_body(data)
            return
        for start in range(0, len(data), size):
            await self._peer.send_body(data[start : start + size])
            await self._peer.pause(0)  # lets a reader in this process see each piece as a read of its own

    async def _endless(self) -> None:
        await self._write(self._chunks.endless)
        while True:
            await self._write(_ENDLESS_PIECE)
            await self._peer.pause(self._script.pace_ms / 1000)

    async def _go_wrong(self, fault: Fault) -> Outcome:
        match fault:
            case Fault.BREAK:
                self._peer.reset()
            case Fault.CUT_UTF8:
                await self._write(self._chunks.cut(0))
            case Fault.STALL:
                await self._peer.pause(None)
            case Fault.PING_STALL:
                await self._ping()
            case Fault.ERROR_FRAME | Fault.ERROR_THEN_DONE:
                await self._error(done=fault is Fault.ERROR_THEN_DONE)
            case Fault.CLOSE:
                pass
        return "fault"

    async def _ping(self) -> None:
        while True:
            await self._write(self._chunks.ping)
            await self._peer.pause(self._script.ping_ms / 1000)

    async def _error(self, *, done: bool) -> None:
        await self._write(self._chunks.error(ERROR_FRAME))
        if done:
            await self._write(self._chunks.done)
        await self._peer.end_body()
