"""Local files: parts, locks, records, standard output."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import threading
from array import array
from pathlib import Path
from typing import Any

import pytest

from streamworker.batch import files
from streamworker.batch.errors import OutputBusy, OutputError, RunRefused
from streamworker.batch.files import LocalInput, LocalOutput, LocalRunStore, NoRunStore
from streamworker.batch.identity import output_id
from streamworker.batch.index import LineIndex
from streamworker.batch.record import InputFacts, RunRecord, read_record, write_record
from tests.integration.stage import eventually


def digest(number: int) -> bytes:
    return bytes([number]) * 16


def line(number: int, *, is_error: bool = False, **members: Any) -> bytes:
    response = None if is_error else {"status_code": 200, "request_id": "r", "body": {"usage": None}}
    error = {"code": "timeout_idle", "message": "slow", "retriable": True} if is_error else None
    value = {"id": output_id(digest(number)), "custom_id": f"c{number}", "response": response, "error": error}
    return json.dumps(value | members).encode() + b"\n"


class Place:
    def __init__(self, directory: Path) -> None:
        self.output, self.errors = directory / "o.jsonl", directory / "e.jsonl"
        self.output_part, self.errors_part = directory / "o.jsonl.part", directory / "e.jsonl.part"
        self.retried = directory / "e.jsonl.retried"
        self.directory = directory

    def open(self) -> LocalOutput:
        return LocalOutput(self.output, self.errors)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def found(output: LocalOutput) -> list[tuple[int, str | None, bool]]:
    return [(entry.file, entry.line.custom_id, entry.is_retried) async for entry in output.prior()]


async def test_output_has_its_name_when_it_is_finished(place: Place) -> None:
    """Until then the lines are in the parts."""
    output = place.open()
    output.lock()
    await output.begin(anew=False)
    output.write(line(1), is_error=False)
    output.write(line(2, is_error=True), is_error=True)
    assert output.buffered == len(line(1) + line(2, is_error=True))
    assert await output.sync()
    assert (output.buffered, place.names()) == (0, ["e.jsonl.part", "o.jsonl.part"])

    assert await output.finish(LineIndex(), sort=False) == [str(place.output), str(place.errors)]
    await output.close()
    assert place.names() == ["e.jsonl", "o.jsonl"]
    assert place.output.read_bytes() == line(1)


async def test_output_without_a_line_makes_no_file(place: Place) -> None:
    """A batch without failures has no error file."""
    output = place.open()
    output.lock()
    await output.begin(anew=False)
    output.write(line(1), is_error=False)
    await output.finish(LineIndex(), sort=False)
    await output.close()

    assert place.names() == ["o.jsonl"]


async def test_output_that_is_closed_leaves_no_empty_part(place: Place) -> None:
    """A command that refuses its input leaves nothing."""
    output = place.open()
    output.lock()
    await output.close()

    assert place.names() == []


async def test_output_is_locked_by_one_run(place: Place) -> None:
    """The second one is refused, until the first one has closed it."""
    first, second = place.open(), place.open()
    first.lock()
    with pytest.raises(OutputBusy, match="another run writes"):
        second.lock()
    await first.begin(anew=False)
    first.write(line(1), is_error=False)
    await first.finish(LineIndex(), sort=False)
    await first.close()

    third = place.open()
    third.lock()
    assert await found(third) == [(0, "c1", False)]
    await third.close()


async def test_output_that_is_finished_continues(place: Place) -> None:
    """A grown input: the finished files become parts again. A file of another program may lack its last LF."""
    place.output.write_bytes(line(1) + line(2).rstrip())
    output = place.open()
    output.lock()
    assert output.is_finished
    assert await found(output) == [(0, "c1", False), (0, "c2", False)]
    await output.begin(anew=False)
    output.write(line(3), is_error=False)
    await output.sync()

    assert place.output_part.read_bytes() == line(1) + line(2) + line(3)
    assert not place.output.exists()
    with pytest.raises(OutputBusy):
        place.open().lock()
    await output.close()


async def test_output_and_part_that_both_have_lines_are_refused(place: Place) -> None:
    """The user has to say which one is wanted."""
    place.output.write_bytes(line(1))
    place.output_part.write_bytes(line(2))
    with pytest.raises(RunRefused, match="both have lines"):
        place.open().lock()


async def test_errors_that_were_renamed_before_a_crash_are_read(place: Place) -> None:
    """ERRORS has its name first; a crash between the two renames loses nothing."""
    place.errors.write_bytes(line(2, is_error=True))
    place.output_part.write_bytes(line(1))
    output = place.open()
    output.lock()

    assert await found(output) == [(0, "c1", False), (1, "c2", False)]
    assert not output.is_finished
    await output.close()


@pytest.mark.parametrize("text", [b"hello\n", b"[]\n", b'{"id":1}\n', b'{"custom_id":"a"}\nx\n', b"\x00\n"])
async def test_file_with_other_lines_is_refused(place: Place, text: bytes) -> None:
    """A file of the user's is never overwritten by accident."""
    place.output.write_bytes(text)
    output = place.open()
    output.lock()
    with pytest.raises(RunRefused, match="not a line of a batch's output"):
        await found(output)
    await output.close()
    assert place.output.read_bytes() == text


async def test_begin_anew_deletes_what_earlier_runs_have_written(place: Place) -> None:
    """`--overwrite`."""
    place.output.write_bytes(line(1))
    place.errors_part.write_bytes(line(2, is_error=True))
    place.retried.write_bytes(line(2, is_error=True))
    output = place.open()
    output.lock()
    await output.begin(anew=True)
    await output.finish(LineIndex(), sort=False)
    await output.close()

    assert place.names() == []


async def test_lines_are_dropped_by_their_offsets(place: Place) -> None:
    """The others keep their order, and lines are appended after them."""
    place.output_part.write_bytes(line(1) + line(2) + line(3))
    output = place.open()
    output.lock()
    await output.begin(anew=False)
    await output.drop({0: array("Q", [len(line(1))]), 1: array("Q")})
    output.write(line(4), is_error=False)
    await output.sync()

    assert place.output_part.read_bytes() == line(1) + line(3) + line(4)
    with pytest.raises(OutputBusy):
        place.open().lock()  # the new file is locked, too
    await output.close()


async def test_retried_lines_are_kept_aside_until_the_end(place: Place) -> None:
    """They count as not done, and are not lost if the round is never finished."""
    first, second = line(1, is_error=True), line(2, is_error=True)
    place.errors_part.write_bytes(first + second)
    output = place.open()
    output.lock()
    await output.begin(anew=False)
    assert not output.is_retrying
    await output.retry({0: array("Q"), 1: array("Q", [len(first)])})
    assert (place.errors_part.read_bytes(), place.retried.read_bytes()) == (first, second)
    await output.close()

    output = place.open()
    output.lock()
    assert output.is_retrying
    assert await found(output) == [(1, "c1", False), (1, "c2", True)]
    await output.begin(anew=False)
    await output.finish(LineIndex(), sort=False)
    await output.close()
    assert place.names() == ["e.jsonl"]


@pytest.mark.parametrize("is_dropped", [False, True])
async def test_move_of_retried_lines_that_was_interrupted_is_completed(
    place: Place, is_dropped: bool
) -> None:
    """The lines are in one place afterwards, whatever the moment of the crash was."""
    first, second = line(1, is_error=True), line(2, is_error=True)
    place.errors_part.write_bytes(first if is_dropped else first + second)
    (place.directory / "e.jsonl.retried.new").write_bytes(second)
    output = place.open()
    output.lock()

    assert await found(output) == [(1, "c1", False), (1, "c2", True)]
    await output.close()
    assert place.names() == ["e.jsonl.part", "e.jsonl.retried"]


async def test_sorted_output_is_in_the_order_of_the_input(place: Place) -> None:
    """Lines that the input does not have are at the end."""
    index = LineIndex()
    for number in (3, 1, 2):
        index.add(digest(number), f"c{number}", (1, 0, 1))
    output = place.open()
    output.lock()
    await output.begin(anew=False)
    for number in (1, 9, 2, 3):
        output.write(line(number), is_error=False)
    await output.finish(index, sort=True)
    await output.close()

    assert place.output.read_bytes() == line(3) + line(1) + line(2) + line(9)


async def test_one_file_for_both_kinds_of_lines(place: Place) -> None:
    """As vLLM writes them."""
    output = LocalOutput(place.output, place.output)
    output.lock()
    await output.begin(anew=False)
    output.write(line(1), is_error=False)
    output.write(line(2, is_error=True), is_error=True)
    assert await output.finish(LineIndex(), sort=False) == [str(place.output)]
    await output.close()

    assert place.output.read_bytes() == line(1) + line(2, is_error=True)


async def test_full_disk_keeps_whole_lines_and_writes_nothing_after_it(place: Place) -> None:
    """A file-size limit stands for a full disk: the write is short, the next one fails. No torn line stays."""
    output = place.open()
    output.lock()
    await output.begin(anew=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(line(1)) * 2 + 10, hard))
    try:
        for number in range(1, 5):
            output.write(line(number), is_error=False)
        with pytest.raises(OutputError, match="make room and run the same command again"):
            await output.flush()
        output.write(line(5), is_error=False)
        with pytest.raises(OutputError):
            await output.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    await output.close()

    assert place.output_part.read_bytes() == line(1) + line(2)


@pytest.mark.parametrize("fails", [False, True])
async def test_write_that_is_cancelled_is_awaited(place: Place, fails: bool) -> None:
    """No other line is written beside it, and its failure is not forgotten."""
    output = place.open()
    output.lock()
    await output.begin(anew=False)
    file = output._files[0]
    append, begun, end = file.append, threading.Event(), threading.Event()

    def slowly(data: bytes) -> None:
        begun.set()
        end.wait(5)
        if fails:
            raise OutputError("full")
        append(data)

    file.append = slowly  # type: ignore[method-assign]
    output.write(line(1), is_error=False)
    flushing = asyncio.create_task(output.flush())
    await eventually(begun.is_set)
    flushing.cancel()
    output.write(line(2), is_error=False)
    syncing = asyncio.create_task(output.sync())
    await asyncio.sleep(0.05)
    assert not flushing.done()
    file.append = append  # type: ignore[method-assign]
    end.set()
    with pytest.raises(asyncio.CancelledError):
        await flushing
    if fails:
        with pytest.raises(OutputError, match="full"):
            await syncing
    else:
        assert await syncing
        assert place.output_part.read_bytes() == line(1) + line(2)
    await output.close()


async def test_pipe_that_is_full_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stops, and says that its lines were not taken."""
    monkeypatch.setattr(files, "_APPEND_TIMEOUT_S", 0.05)
    reader, writer = os.pipe()
    output = LocalOutput(None, None, stdout=writer)
    output.write(b"x" * (1 << 20), is_error=False)
    flushing = asyncio.create_task(output.flush())
    await asyncio.sleep(0.1)
    flushing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await flushing
    with pytest.raises(OutputError, match="standard output does not take"):
        await output.sync()
    await output.close()
    os.close(reader)  # ends the thread: the write fails
    await asyncio.sleep(0.05)
    os.close(writer)


async def test_device_that_is_full_is_reported(tmp_path: Path) -> None:
    """/dev/full is not a regular file: it is written as it is, without a part."""
    output = LocalOutput(Path("/dev/full"), Path("/dev/full"))
    output.lock()
    await output.begin(anew=False)
    assert not output.is_resumable
    output.write(line(1), is_error=False)
    with pytest.raises(OutputError, match="No space left"):
        await output.flush()


async def test_standard_output_gets_lines_as_they_come(tmp_path: Path) -> None:
    """There is no part, nothing to read back, and no record to keep."""
    reader, writer = os.pipe()
    output = LocalOutput(None, None, stdout=writer)
    output.lock()
    assert await found(output) == []
    await output.begin(anew=False)
    output.write(line(1), is_error=False)
    output.write(line(2, is_error=True), is_error=True)
    assert not await output.sync()
    await output.finish(LineIndex(), sort=True)
    await output.close()
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        assert file.read() == line(1) + line(2, is_error=True)


async def test_directory_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    """Before anything is sent."""
    with pytest.raises(RunRefused, match="cannot be opened"):
        LocalOutput(tmp_path / "no" / "o.jsonl", None).lock()


def test_input_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """A missing file, a directory."""
    with pytest.raises(RunRefused, match="cannot be read"):
        LocalInput.open(tmp_path / "missing")
    with pytest.raises(RunRefused):
        LocalInput.open(tmp_path)
    with pytest.raises(RunRefused, match="not a regular file"):
        LocalInput.open(Path("/dev/null"))


async def test_input_is_read_by_offset(tmp_path: Path) -> None:
    """As lines are submitted."""
    path = tmp_path / "i"
    path.write_bytes(b"abcdef")
    source = LocalInput.open(path)

    assert await source.read(2, 3) == b"cde"
    assert [chunk async for chunk in source.chunks()] == [b"abcdef"]
    source.close()


# The record


def record() -> RunRecord:
    facts = InputFacts(path="i", bytes=5, sha256="x")
    return RunRecord(
        run="r", created=1, input=facts, topics={"jobs": "j", "results": "s"}, start={}, expires=7, round=2
    )


def test_record_is_read_back_with_offsets_by_partition() -> None:
    """Its member is called `from`."""
    written = record().with_offsets("j", {1: 5, 0: 3})

    assert json.loads(write_record(written))["from"] == {"j": {"0": 3, "1": 5}}
    assert read_record(write_record(written)) == written
    assert written.offsets("j") == {0: 3, 1: 5}
    assert written.offsets("s") == {}


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"[]", b"\xff", b'{"v":2}', write_record(record()).replace(b'"v": 1', b'"v": 2'),
     write_record(record().with_offsets("j", {0: 1})).replace(b'"0"', b'"x"')],
)  # fmt: skip
def test_record_that_cannot_be_read_is_refused(text: bytes) -> None:
    """By ValueError with a reason."""
    with pytest.raises(ValueError):
        read_record(text)


async def test_record_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """And removed at the end; a second removal does nothing."""
    store = LocalRunStore(tmp_path / "o.run.json")
    assert await store.load() is None
    await store.save(record())
    await store.save(record().with_offsets("j", {0: 9}))
    loaded = await store.load()
    assert loaded is not None
    assert loaded.offsets("j") == {0: 9}
    assert Place(tmp_path).names() == ["o.run.json"]
    await store.remove()
    await store.remove()
    assert await store.load() is None


async def test_record_that_is_damaged_is_refused(tmp_path: Path) -> None:
    """The message names the file and what to do."""
    path = tmp_path / "o.run.json"
    path.write_text("{")
    with pytest.raises(RunRefused, match=r"o\.run\.json: it is not the record of a run.*--overwrite"):
        await LocalRunStore(path).load()
    path.unlink()
    path.mkdir()
    with pytest.raises(RunRefused, match="cannot be read"):
        await LocalRunStore(path).load()


async def test_run_without_files_keeps_no_record() -> None:
    """Its name identifies it."""
    store = NoRunStore()
    await store.save(record())
    await store.remove()

    assert await store.load() is None
