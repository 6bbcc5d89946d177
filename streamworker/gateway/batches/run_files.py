"""The engine's files in a gateway: the input is copied from the store, the output is built here and uploaded whole.

Both copies are temporary files without a name, so that nothing is left of a gateway that is killed. The results topic has the
endings: the next owner of the batch builds the output anew.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from typing import IO, TYPE_CHECKING

from streamworker.batch.errors import OutputError, RunStopped
from streamworker.batch.files import LocalInput
from streamworker.gateway.batches.records import FileRecord, RunRecordOfBatch, run_key
from streamworker.gateway.batches.store import StoreError

if TYPE_CHECKING:
    from array import array
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from streamworker.batch.index import LineIndex
    from streamworker.batch.ports import PriorEntry
    from streamworker.batch.record import RunRecord
    from streamworker.gateway.batches.records import BatchRecord
    from streamworker.gateway.batches.store import FileStore
    from streamworker.gateway.batches.topic import StateTopic

__all__ = ["RunOutput", "StateRunStore", "fetch_input", "output_file_id"]

_CHUNK = 1 << 20


async def fetch_input(store: FileStore, file: FileRecord) -> LocalInput:
    """Copy a file from the store. Raises StoreError, OutputError; FileNotFoundError."""
    copy = _temporary()
    try:
        async for chunk in store.read(file.id):
            await asyncio.to_thread(copy.write, chunk)
        await asyncio.to_thread(copy.flush)
    except OSError as error:
        copy.close()
        if isinstance(error, FileNotFoundError):
            raise
        raise OutputError(f"no room for a copy of {file.filename}: {error.strerror}") from error
    except BaseException:
        copy.close()
        raise
    return LocalInput(copy, file.filename)


def output_file_id(batch_id: str, *, is_error: bool) -> str:
    """Return the id of a batch's output file: each owner of the batch makes the same one."""
    return f"file-{batch_id.removeprefix('batch_')}{'e' if is_error else 'o'}"


class RunOutput:
    """The engine's `BatchOutput`: two temporary files, which `finish` uploads."""

    def __init__(
        self,
        batch: BatchRecord,
        store: FileStore,
        topic: StateTopic,
        *,
        kept_s: float,
        finalizing: Callable[[], Awaitable[None]],
    ) -> None:
        """`finalizing` is called before the upload; files expire after `kept_s` seconds."""
        self._batch = batch
        self._store = store
        self._topic = topic
        self._kept_s = kept_s
        self._finalizing = finalizing
        self._files: tuple[IO[bytes], IO[bytes]] = (_temporary(), _temporary())
        self._pending: tuple[list[bytes], list[bytes]] = ([], [])
        self._failure: OutputError | None = None
        self.buffered = 0
        self.output_file_id: str | None = None
        self.error_file_id: str | None = None

    is_finished = False
    is_retrying = False

    @property
    def names(self) -> Sequence[str]:
        """The ids of the files that were uploaded."""
        return [id_ for id_ in (self.output_file_id, self.error_file_id) if id_ is not None]

    async def prior(self) -> AsyncIterator[PriorEntry]:
        """Yield nothing: the lines are built from the results topic."""
        nothing: tuple[PriorEntry, ...] = ()
        for entry in nothing:
            yield entry

    async def begin(self, *, anew: bool) -> None:
        """Do nothing: the files are empty."""

    async def drop(self, offsets: Mapping[int, array[int]]) -> None:
        """Do nothing: there are no lines of earlier runs."""

    async def retry(self, offsets: Mapping[int, array[int]]) -> None:
        """Do nothing: there are no lines of earlier runs."""

    def write(self, line: bytes, *, is_error: bool) -> None:
        """Append a line to one of the files."""
        self._pending[is_error].append(line)
        self.buffered += len(line)

    async def flush(self) -> None:
        """Write the buffered lines. Raises OutputError, also where an earlier flush failed after it was cancelled."""
        if self._failure is not None:
            raise self._failure
        for file, lines in zip(self._files, self._pending, strict=True):
            if lines:
                data = b"".join(lines)
                lines.clear()
                self.buffered -= len(data)
                await self._append(file, data)

    async def _append(self, file: IO[bytes], data: bytes) -> None:
        """Write lines, which are buffered no longer: whole before this returns, also if it is cancelled meanwhile.

        A thread that has not begun when the future of its work is cancelled never begins, and the lines would be lost.
        """
        writing = asyncio.ensure_future(asyncio.to_thread(file.write, data))
        try:
            await asyncio.shield(writing)
        except OSError as error:
            raise _no_room(error) from error
        except asyncio.CancelledError:
            await asyncio.wait([writing])
            if isinstance(failure := writing.exception(), OSError):
                self._failure = _no_room(failure)
            raise

    async def sync(self) -> bool:
        """Flush. A later owner does not find these files, and reads all endings again."""
        await self.flush()
        return False

    async def finish(self, index: LineIndex, *, sort: bool) -> Sequence[str]:
        """Upload the files that have lines. Raises OutputError."""
        del index, sort
        await self.flush()
        await self._finalizing()
        self.output_file_id = await self._upload(is_error=False)
        self.error_file_id = await self._upload(is_error=True)
        return self.names

    async def close(self) -> None:
        """Release the temporary files."""
        for file in self._files:
            file.close()

    async def _upload(self, *, is_error: bool) -> str | None:
        file = self._files[is_error]
        await asyncio.to_thread(file.flush)
        if not os.fstat(file.fileno()).st_size:
            return None
        id_ = output_file_id(self._batch.id, is_error=is_error)
        kind = "error" if is_error else "output"
        try:
            size = await self._store.write(id_, _chunks(file))
        except StoreError as error:
            raise OutputError(str(error)) from error
        now = int(time.time())
        record = FileRecord(
            id=id_,
            tenant=self._batch.tenant,
            bytes=size,
            created_at=now,
            expires_at=now + int(self._kept_s),
            filename=f"batch_{kind}_{self._batch.id}.jsonl",
            purpose="batch_output",
        )
        await self._topic.write(id_, id_, record)
        return id_


def _no_room(error: OSError) -> OutputError:
    return OutputError(f"no room for the output of a batch: {error.strerror}")


def _temporary() -> IO[bytes]:
    return tempfile.TemporaryFile()


async def _chunks(file: IO[bytes]) -> AsyncIterator[bytes]:
    offset = 0
    while chunk := await asyncio.to_thread(os.pread, file.fileno(), _CHUNK, offset):
        offset += len(chunk)
        yield chunk


class StateRunStore:
    """The engine's `RunStore`: the record is in the state topic."""

    def __init__(self, topic: StateTopic, batch_id: str) -> None:
        self._topic = topic
        self._batch_id = batch_id

    async def load(self) -> RunRecord | None:
        """Return the record of the run, if an owner of the batch has submitted jobs."""
        return self._topic.table.run(self._batch_id)

    async def save(self, record: RunRecord) -> None:
        """Write the record, once. Raises RunStopped if another owner's record was first."""
        known = self._topic.table.run(self._batch_id)
        if known is None:
            await self._write(record)
            known = self._topic.table.run(self._batch_id)
        if known is not None and known.created != record.created:
            await self._write(known)  # the log's last record of a key stays, so it must be the first owner's
            raise RunStopped("another gateway has started this batch")

    async def remove(self) -> None:
        """Do nothing: the record is deleted with the batch."""

    async def _write(self, record: RunRecord) -> None:
        written = RunRecordOfBatch(batch_id=self._batch_id, record=record)
        await self._topic.write(self._batch_id, run_key(self._batch_id), written)
