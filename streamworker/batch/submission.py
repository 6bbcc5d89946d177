"""Submit lines in chunks, as the window has room for them, and find out what became of a chunk that failed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from streamworker.batch.errors import OutputBusy, RunStopped
from streamworker.batch.index import State
from streamworker.batch.lines import Request, read_line
from streamworker.batch.window import MAX_CHUNK_BYTES, Window
from streamworker.errors import Fenced, KafkaError, KafkaRefused, RecordTooLarge

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamworker.batch.identity import JobIds, JobRef
    from streamworker.batch.jobs import JobWriter
    from streamworker.batch.ledger import Ledger
    from streamworker.batch.ports import BatchInput
    from streamworker.batch.topics import RunTopics

__all__ = ["OUTAGE_S", "Submission", "request_at"]

OUTAGE_S = 120.0
"""How long brokers may refuse or not answer before the run stops."""

_QUICK_S = 8.0
"""A transaction that was fenced sooner than this was fenced by another run. A later one may have been aborted for its age."""

_BACKOFF_S = 0.5


class Submission:
    """Submits the pending lines of a ledger in the order of the input."""

    def __init__(
        self,
        ledger: Ledger,
        source: BatchInput,
        topics: RunTopics,
        ids: JobIds,
        writer: JobWriter,
        *,
        window: int,
        note: Callable[[str], None],
    ) -> None:
        self.is_stopped = False
        """Set it to submit nothing more."""
        self._ledger = ledger
        self._source = source
        self._topics = topics
        self._ids = ids
        self._writer = writer
        self._note = note
        self._window = Window(window)
        self._cursor = 0
        self._most = window
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Look for room again: a line has ended, or `is_stopped` was set."""
        self._wake.set()

    async def run(self) -> None:
        """Submit until no line is pending, or `is_stopped` is set.

        Raises:
            OutputBusy: another run of this name is active.
            RunStopped: the input changed, or the brokers are unavailable for too long.
            KafkaRefused: a person has to change something.
        """
        index = self._ledger.index
        while not self.is_stopped and index.counts[State.PENDING]:
            self._wake.clear()
            room = min(self._window.room(self._ledger.submitted), self._most)
            chunk = await self._next_chunk(room) if room else []
            if chunk:
                await self._submit(chunk)
            else:
                await self._wake.wait()

    async def _next_chunk(self, room: int) -> list[tuple[int, Request, tuple[bytes, bytes]]]:
        index = self._ledger.index
        chunk: list[tuple[int, Request, tuple[bytes, bytes]]] = []
        size = 0
        while len(chunk) < room and size < MAX_CHUNK_BYTES:
            line = index.next_in(State.PENDING, self._cursor)
            if line < 0 and self._cursor:
                self._cursor = 0  # lines before it may be pending again
                line = index.next_in(State.PENDING, 0)
                if any(one == line for one, *_ in chunk):
                    break
            if line < 0:
                break
            request = await request_at(self._ledger, self._source, line)
            record = self._writer.write(request, index.round(line))
            if chunk and size + len(record[1]) > MAX_CHUNK_BYTES:
                break
            self._cursor = line + 1
            size += len(record[1])
            chunk.append((line, request, record))
        return chunk

    async def _submit(self, chunk: list[tuple[int, Request, tuple[bytes, bytes]]]) -> None:
        lines = [line for line, *_ in chunk]
        self._ledger.begin(lines)  # before they are written: an ending may come before the acknowledgement
        started = asyncio.get_running_loop().time()
        try:
            await self._topics.submit([record for *_, record in chunk])
        except RecordTooLarge as error:
            await self._recover(lines)
            self._refuse_or_split(chunk, error)
        except Fenced:
            if asyncio.get_running_loop().time() - started < _QUICK_S:
                raise OutputBusy(
                    f"another run is active under the name {self._ids.prefix.rstrip('.')}: this one has stopped, and "
                    "submits nothing more"
                ) from None
            await self._recover(lines)
        except KafkaRefused:
            raise
        except KafkaError as error:
            self._note(f"{error}; trying again")
            await self._recover(lines)
        else:
            self._most = min(self._most * 2, self._window.size)

    def _refuse_or_split(
        self, chunk: list[tuple[int, Request, tuple[bytes, bytes]]], error: RecordTooLarge
    ) -> None:
        if len(chunk) > 1:
            self._most = max(1, len(chunk) // 2)
            return
        line, request, _ = chunk[0]
        if self._ledger.index.is_in(line, State.PENDING):
            self._ledger.fail(
                line, request.custom_id, "too_large", f"{error}: raise the topic's max.message.bytes"
            )

    async def _recover(self, lines: list[int]) -> None:
        """Fence a failed transaction, and mark those of its lines as pending that are not in the topic."""
        start = dict(self._topics.jobs_positions)
        until = asyncio.get_running_loop().time() + OUTAGE_S
        found: set[JobRef] = set()
        while True:
            await asyncio.sleep(_BACKOFF_S)
            try:
                await self._topics.fence()
                await self._topics.read_jobs(self._ids, start, found.add)
                break
            except KafkaRefused:
                raise
            except KafkaError as error:
                if asyncio.get_running_loop().time() > until:
                    raise RunStopped(f"{error}; run the same command again") from error
        index = self._ledger.index
        rounds = {ref.digest: ref.round for ref in sorted(found, key=lambda ref: ref.round)}
        for line in lines:
            if index.is_in(line, State.SUBMITTED) and rounds.get(index.digest(line)) != index.round(line):
                self._ledger.revert(line)
        self._cursor = 0


async def request_at(ledger: Ledger, source: BatchInput, line: int) -> Request:
    """Read a valid line of the input again. Raises RunStopped if the input has changed."""
    index = ledger.index
    request = read_line(await source.read(index.offsets[line], index.lengths[line]))
    if not isinstance(request, Request) or request.digest != index.digest(line):
        raise RunStopped(
            f"{source.name} was changed while it was read (line {index.numbers[line]}): run the same command again"
        )
    return request
