"""The files of a batch's run in a gateway: a copy of the input, an output that is uploaded whole, one record of the run."""

from __future__ import annotations

import asyncio
import errno
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, Any

import msgspec
import pytest

from streamworker.batch.errors import OutputError, RunStopped
from streamworker.batch.index import LineIndex
from streamworker.batch.record import InputFacts, RunRecord
from streamworker.gateway.batches import run_files as module
from streamworker.gateway.batches.records import FileRecord, RunRecordOfBatch, run_key
from streamworker.gateway.batches.run_files import (
    RunOutput,
    StateRunStore,
    fetch_input,
    output_file_id,
)
from streamworker.gateway.batches.store import FolderStore, StoreError
from tests.unit.gateway.batches import BATCH, StateInMemory, StateLog, a_batch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator
    from pathlib import Path

FILE = FileRecord(
    id="file-1", tenant="acme", bytes=9, created_at=1, expires_at=2, filename="in.jsonl", purpose="batch"
)
RECORD = RunRecord(
    run=BATCH, created=5, input=InputFacts(path="in", bytes=1, sha256="x"), topics={}, start={"jobs": {"0": 7}}
)  # fmt: skip


class Full:
    """A temporary file on a disk without room."""

    def __init__(self) -> None:
        self.is_closed = False

    def write(self, _: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None: ...

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    """Return an empty folder."""
    return FolderStore(tmp_path)


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    """Yield parts."""
    for part in parts:
        yield part


# The input


async def test_input_is_a_copy_of_the_file(store: FolderStore, tmp_path: Path) -> None:
    """It may be deleted while the batch runs; messages name it as the client did."""
    await store.write("file-1", chunks(b"one\n", b"two\n"))
    source = await fetch_input(store, FILE)
    (tmp_path / "file-1").unlink()
    try:
        assert source.name == "in.jsonl"
        assert b"".join([chunk async for chunk in source.chunks()]) == b"one\ntwo\n"
        assert await source.read(4, 3) == b"two"
    finally:
        source.close()


async def test_input_that_is_absent_raises_file_not_found(store: FolderStore) -> None:
    """The batch fails for it, and is not tried again."""
    with pytest.raises(FileNotFoundError):
        await fetch_input(store, FILE)


async def test_input_without_room_for_a_copy_is_an_error_that_is_tried_again(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the reason, and no path of this machine; the copy is closed."""
    full = Full()
    monkeypatch.setattr(module, "_temporary", lambda: full)
    await store.write("file-1", chunks(b"one\n"))
    with pytest.raises(OutputError, match=r"no room for a copy of in\.jsonl: No space left on device"):
        await fetch_input(store, FILE)

    assert full.is_closed


async def test_input_that_the_store_cannot_read_closes_the_copy(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the store's own error is reported."""
    copies: list[IO[bytes]] = []
    temporary = module._temporary

    def opened() -> IO[bytes]:
        copies.append(temporary())
        return copies[0]

    async def away(_: FolderStore, name: str) -> AsyncIterator[bytes]:
        yield b"one"
        raise StoreError(f"file {name} cannot be read: away")

    monkeypatch.setattr(module, "_temporary", opened)
    monkeypatch.setattr(FolderStore, "read", away)
    with pytest.raises(StoreError, match="away"):
        await fetch_input(store, FILE)

    assert copies[0].closed


# The output


class Case:
    """An output, and the steps of its end."""

    def __init__(self, store: FolderStore) -> None:
        self.log = StateLog()
        self.state = StateInMemory(self.log)
        self.store = store
        self.steps: list[str] = []
        self.output = RunOutput(
            a_batch(), store, self.state, kept_s=1000, finalizing=self.finalizing  # type: ignore[arg-type]  # in memory
        )  # fmt: skip

    async def finalizing(self) -> None:
        """Note the step, and which files there are already."""
        self.steps.append(f"finalizing, {len(self.log.records)} records")

    async def content(self, name: str) -> bytes:
        """Return a stored file."""
        return b"".join([chunk async for chunk in self.store.read(name)])


@pytest.fixture
async def case(store: FolderStore) -> AsyncIterator[Case]:
    """Return an output, which is closed at the end."""
    made = Case(store)
    yield made
    await made.output.close()


async def test_output_is_uploaded_whole_after_the_batch_is_finalizing(case: Case) -> None:
    """Each file has a record of the batch's tenant, which comes after its contents."""
    for number in range(3):
        case.output.write(b'{"n":%d}\n' % number, is_error=number == 1)
    files = await case.output.finish(LineIndex(), sort=True)
    now = time.time()

    assert case.steps == ["finalizing, 0 records"]
    assert list(files) == list(case.output.names) == ["file-1o", "file-1e"]
    assert await case.content("file-1o") == b'{"n":0}\n{"n":2}\n'
    assert await case.content("file-1e") == b'{"n":1}\n'
    [errors] = case.state.table.files("acme", limit=1, ascending=True)
    assert (errors.id, errors.bytes, errors.filename) == ("file-1e", 8, "batch_error_batch_1.jsonl")
    assert now - 2 <= errors.created_at <= now
    assert errors.expires_at == errors.created_at + 1000


@pytest.mark.parametrize("is_error", [False, True])
async def test_output_without_lines_is_not_uploaded(case: Case, *, is_error: bool) -> None:
    """Its id is then null in OpenAI's object."""
    case.output.write(b"{}\n", is_error=is_error)
    await case.output.finish(LineIndex(), sort=False)

    assert (case.output.output_file_id is None, case.output.error_file_id is None) == (is_error, not is_error)
    assert case.output.names == [output_file_id(BATCH, is_error=is_error)]


async def test_output_of_every_owner_has_the_same_ids(store: FolderStore) -> None:
    """An owner that continues the work replaces what the former one has uploaded."""
    for text in (b"first\n", b"second\n"):
        case = Case(store)
        case.output.write(text, is_error=False)
        await case.output.finish(LineIndex(), sort=False)
        await case.output.close()

    assert await case.content("file-1o") == b"second\n"
    assert output_file_id("batch_x", is_error=True) == "file-xe"


async def test_output_counts_what_is_not_flushed(case: Case) -> None:
    """The reader of the results pauses by it. No line is found by a later owner."""
    case.output.write(b"12345\n", is_error=False)
    case.output.write(b"123\n", is_error=True)
    assert case.output.buffered == 10
    assert await case.output.sync() is False
    assert case.output.buffered == 0
    await case.output.flush()
    await case.output.begin(anew=True)
    await case.output.drop({})
    await case.output.retry({})

    assert [entry async for entry in case.output.prior()] == []
    assert await case.output.finish(LineIndex(), sort=False) == ["file-1o", "file-1e"]
    assert await case.content("file-1o") == b"12345\n"


@pytest.fixture
def busy() -> Iterator[threading.Event]:
    """The only thread of this loop, which is in use until the event is set."""
    released = threading.Event()
    yield released
    released.set()


async def in_a_busy_thread(released: threading.Event, flush: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Begin a flush that waits for a thread, and cancel it."""
    executor = ThreadPoolExecutor(1)
    asyncio.get_running_loop().set_default_executor(executor)
    executor.submit(released.wait)
    flushing = asyncio.create_task(flush)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    flushing.cancel()
    await asyncio.sleep(0)
    return flushing


async def test_output_has_the_lines_of_a_flush_that_was_cancelled_before_its_thread_began(
    case: Case, busy: threading.Event
) -> None:
    """They are buffered no longer: the end of the run cancels the task that flushes, and then uploads the files."""
    case.output.write(b"one\n", is_error=False)
    flushing = await in_a_busy_thread(busy, case.output.flush())
    assert not flushing.done()
    case.output.write(b"two\n", is_error=False)
    busy.set()
    with pytest.raises(asyncio.CancelledError):
        await flushing
    await case.output.finish(LineIndex(), sort=False)
    assert await case.content(output_file_id(BATCH, is_error=False)) == b"one\ntwo\n"
    await case.output.close()


async def test_output_of_a_flush_that_failed_after_it_was_cancelled_is_not_uploaded(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, busy: threading.Event
) -> None:
    """Its lines are lost, so the run fails and is tried again."""
    monkeypatch.setattr(module, "_temporary", Full)
    case = Case(store)
    case.output.write(b"one\n", is_error=False)
    flushing = await in_a_busy_thread(busy, case.output.flush())
    busy.set()
    with pytest.raises(asyncio.CancelledError):
        await flushing
    with pytest.raises(OutputError, match="no room for the output of a batch"):
        await case.output.finish(LineIndex(), sort=False)
    assert case.steps == []


async def test_output_without_room_stops_the_run(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts again later, from the results in Kafka."""
    monkeypatch.setattr(module, "_temporary", Full)
    case = Case(store)
    case.output.write(b"{}\n", is_error=False)
    with pytest.raises(OutputError, match="no room for the output of a batch: No space left on device"):
        await case.output.flush()


async def test_output_that_the_store_refuses_has_no_record(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No client finds a file without its contents."""

    async def refuse(*_: Any) -> int:
        raise StoreError("file file-1o cannot be written: away")

    monkeypatch.setattr(FolderStore, "write", refuse)
    case.output.write(b"{}\n", is_error=False)
    with pytest.raises(OutputError, match="cannot be written: away"):
        await case.output.finish(LineIndex(), sort=False)

    assert case.log.records == []
    assert case.output.names == []


async def test_output_of_an_owner_that_was_replaced_is_not_uploaded(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`finalizing` raises, and nothing is written after it."""

    async def replaced() -> None:
        raise RunStopped("another gateway")

    monkeypatch.setattr(case.output, "_finalizing", replaced)
    case.output.write(b"{}\n", is_error=False)
    with pytest.raises(RunStopped):
        await case.output.finish(LineIndex(), sort=False)
    with pytest.raises(FileNotFoundError):
        await case.content("file-1o")


async def test_large_output_is_uploaded_in_parts_without_a_gap(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read at offsets: the file's own position does not matter."""
    monkeypatch.setattr(module, "_CHUNK", 7)
    lines = [json.dumps({"n": number}).encode() + b"\n" for number in range(40)]
    for line in lines:
        case.output.write(line, is_error=False)
        await case.output.flush()
    await case.output.finish(LineIndex(), sort=False)

    assert await case.content("file-1o") == b"".join(lines)


# The record of the run


async def test_run_record_is_written_once(case: Case) -> None:
    """Offsets that advance are not: a later owner reads all endings again."""
    runs = StateRunStore(case.state, BATCH)  # type: ignore[arg-type]  # in memory
    assert await runs.load() is None
    await runs.save(RECORD)
    await runs.save(RECORD.with_offsets("results", {0: 99}))
    await runs.remove()

    assert await runs.load() == RECORD
    assert [key for key, _ in case.log.records] == [run_key(BATCH)]


@pytest.mark.parametrize("is_slow", [False, True], ids=["known before", "known after its own"])
async def test_run_record_of_another_owner_counts_if_it_was_first(case: Case, *, is_slow: bool) -> None:
    """The later one stops, and the log's last record is the first owner's: compaction keeps no other."""
    case.state.is_slow = is_slow
    case.log.append(run_key(BATCH), RunRecordOfBatch(batch_id=BATCH, record=RECORD))
    runs = StateRunStore(case.state, BATCH)  # type: ignore[arg-type]  # in memory
    late = msgspec.structs.replace(RECORD, created=6, start={"jobs": {"0": 99}})
    with pytest.raises(RunStopped, match="another gateway has started this batch"):
        await runs.save(late)

    assert await runs.load() == RECORD
    assert case.log.compacted().run(BATCH) == RECORD
    assert len(case.log.records) == (3 if is_slow else 2)
