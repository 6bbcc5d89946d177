"""Build the index of an input, and collect its faults."""

from __future__ import annotations

import asyncio
from hashlib import sha256
from typing import TYPE_CHECKING

from streamworker.batch.identity import faulty_digest
from streamworker.batch.index import LineIndex, State
from streamworker.batch.lines import Fault, FaultCode, LineSplitter, Request, read_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streamworker.batch.jobs import JobWriter
    from streamworker.batch.lines import RawLine
    from streamworker.batch.ports import BatchInput

__all__ = ["SHOWN_FAULTS", "Intake"]

SHOWN_FAULTS = 20

_YIELD_LINES = 100
_MAX_REPEATED = 1000
"""Custom ids that are kept because they were repeated, of at most 1,024 bytes each."""

_MARGIN = 8192
"""A body that is this much below the limit of a job is not measured with the rest of the job."""


class Intake:
    """Reads an input once. Afterwards `index` has its lines, and `faults` the first faults as (line number, fault)."""

    def __init__(
        self, source: BatchInput, *, limit: int | None = None, max_job_bytes: int, writer: JobWriter
    ) -> None:
        """Read at most `limit` lines. A line whose job passes `max_job_bytes` is a fault."""
        self.index = LineIndex()
        self.faults: list[tuple[int, Fault]] = []
        self.faulty = 0
        self.bytes = 0
        self.models: dict[str, int] = {}
        """Lines by model, of the first hundred models."""
        self._source = source
        self._limit = limit
        self._max_job_bytes = max_job_bytes
        self._writer = writer
        self._hash = sha256()
        self._repeated: dict[int, str | None] = {}  # custom ids by line

    @property
    def sha256(self) -> str:
        """The digest of the file, or of what was read of it."""
        return self._hash.hexdigest()

    async def run(self) -> None:
        """Read the input. Raises OutputError."""
        splitter = LineSplitter()
        async for chunk in self._source.chunks():
            self._hash.update(chunk)
            self.bytes += len(chunk)
            if not await self._add_all(splitter.feed(chunk)):
                return
        await self._add_all(splitter.finish())

    async def _add_all(self, lines: Iterator[RawLine]) -> bool:
        for line in lines:
            if self._limit is not None and len(self.index) >= self._limit:
                return False
            await self._add(line)
            if len(self.index) % _YIELD_LINES == 0:
                await asyncio.sleep(0)  # a long input must not block other tasks
        return True

    async def _add(self, line: RawLine) -> None:
        read = read_line(line.text)
        if isinstance(read, Request):
            read = self._too_large(read) or await self._duplicate(read) or read
        position = (line.number, line.offset, line.length)
        if isinstance(read, Request):
            self.index.add(read.digest, read.custom_id, position)
            if read.model in self.models or len(self.models) < 100:
                self.models[read.model] = self.models.get(read.model, 0) + 1
            return
        self.faulty += 1
        if len(self.faults) < SHOWN_FAULTS:
            self.faults.append((line.number, read))
        self.index.add(self._faulty_digest(line), read.custom_id, position, State.FAULTY, read.code)

    def _too_large(self, request: Request) -> Fault | None:
        if len(request.body) < self._max_job_bytes - _MARGIN:
            return None
        _, value = self._writer.write(request, 1)
        if len(value) <= self._max_job_bytes:
            return None
        message = f"its job would have {len(value)} bytes, worker.max_job_bytes is {self._max_job_bytes}"
        return Fault(FaultCode.TOO_LARGE, message, request.custom_id)

    async def _duplicate(self, request: Request) -> Fault | None:
        index = self.index
        for line in index.named(request.custom_id):
            if await self._custom_id(line) == request.custom_id:
                message = f"custom_id is that of line {index.numbers[line]}"
                return Fault(FaultCode.DUPLICATE_CUSTOM_ID, message, request.custom_id)
        return None

    async def _custom_id(self, line: int) -> str | None:
        """Return the custom id of a line. The line is read again, once for all lines that repeat its id."""
        if line not in self._repeated:
            index = self.index
            text = await self._source.read(index.offsets[line], index.lengths[line])
            if len(self._repeated) >= _MAX_REPEATED:
                self._repeated.clear()
            self._repeated[line] = read_line(text).custom_id
        return self._repeated[line]

    def _faulty_digest(self, line: RawLine) -> bytes:
        """Return the digest of the first occurrence that is free. Equal lines may be many, so it is searched by halves."""
        text = line.text or b"%d" % line.length

        def is_used(occurrence: int) -> bool:
            return self.index.find(faulty_digest(text, occurrence)) is not None

        used, free = -1, 0
        while is_used(free):
            used, free = free, 2 * free + 1
        while free - used > 1:
            middle = (used + free) // 2
            used, free = (middle, free) if is_used(middle) else (used, middle)
        return faulty_digest(text, free)
