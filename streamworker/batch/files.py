"""Local files: the input, the output files while they are incomplete (`.part`), and the run's record.

A torn last line is cut off when a file is opened. A file is locked (flock) while a run appends to it. It gets its name when
it is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import stat
from array import array
from pathlib import Path
from typing import IO, TYPE_CHECKING

from streamworker.batch.errors import OutputBusy, OutputError, RunRefused
from streamworker.batch.lines import LineSplitter
from streamworker.batch.plan import NotABatchLine, judge, read_prior
from streamworker.batch.ports import PriorEntry
from streamworker.batch.record import read_record, write_record

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence

    from streamworker.batch.index import LineIndex
    from streamworker.batch.record import RunRecord

__all__ = ["LocalInput", "LocalOutput", "LocalRunStore", "NoRunStore", "sibling"]

_CHUNK = 1 << 20
_APPEND_TIMEOUT_S = 3.0
"""How long a write is awaited when the run is stopped: a pipe may be full."""

_YIELD_LINES = 200
"""Lines that are read before other tasks run."""


def sibling(path: Path, suffix: str) -> Path:
    """Return the path with a suffix appended to its name."""
    return path.with_name(path.name + suffix)


class LocalInput:
    """A regular file on this machine."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        """`name` is for messages."""
        self._file = file
        self.name = name

    @classmethod
    def open(cls, path: Path) -> LocalInput:
        """Open a file. Raises RunRefused."""
        try:
            file = path.open("rb")
        except OSError as error:
            raise RunRefused(f"{path} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise RunRefused(f"{path} is not a regular file; use - for standard input")
        return cls(file, str(path))

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the file from its beginning."""
        offset = 0
        while chunk := await self.read(offset, _CHUNK):
            offset += len(chunk)
            yield chunk
            await asyncio.sleep(0)

    async def read(self, offset: int, length: int) -> bytes:
        """Return a part of the file. Raises OutputError."""
        try:
            return os.pread(self._file.fileno(), length, offset)
        except OSError as error:
            raise OutputError(f"{self.name} cannot be read: {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _Stream:
    """Standard output, or another file that is not a regular one: lines are written as they are, and never read back."""

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = name
        self._descriptor = descriptor
        self.exists = True

    def lock(self) -> None: ...
    def begin(self, *, anew: bool) -> None: ...
    def lines(self) -> Iterator[tuple[int, bytes]]:
        return iter(())

    def append(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            raise OutputError(f"{self.name} cannot be written: {error.strerror}") from error

    def sync(self) -> None: ...
    def close(self) -> None: ...
    def finish(self) -> None: ...


class _Part:
    """A regular file: `PATH.part` until it is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.part = sibling(path, ".part")
        self.name = str(path)
        self._descriptor = -1
        self._size = 0
        self._source = self.part  # the file whose lines earlier runs have written

    @property
    def exists(self) -> bool:
        """Whether the file has a line."""
        return self._size > 0

    @property
    def is_finished(self) -> bool:
        """Whether there is no part with lines."""
        return self._source is self.path or self._size == 0

    @property
    def is_part(self) -> bool:
        """Whether earlier runs have left the file incomplete."""
        return self._source is self.part

    def lock(self) -> None:
        """Open and lock the part. Raises OutputBusy, OutputError, RunRefused."""
        with _explained(self.part, "opened", RunRefused):
            while True:
                self._descriptor = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                self._flock(self._descriptor)
                with contextlib.suppress(
                    FileNotFoundError
                ):  # a run that ended meanwhile has renamed the file
                    if os.path.samestat(os.fstat(self._descriptor), self.part.stat()):
                        break
                os.close(self._descriptor)
            self._size = os.fstat(self._descriptor).st_size
            if self._size == 0 and self.path.exists():
                self._source = self.path
            elif self.path.exists():
                raise RunRefused(
                    f"{self.path} and {self.part} both have lines: delete the one that is not wanted, or use --overwrite"
                )

    def _flock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputBusy(
                f"another run writes {self.part}: wait for it, or stop it; nothing was sent"
            ) from None

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield offset and text of each whole line. Raises RunRefused for a file without batch lines."""
        splitter = LineSplitter(max_line_bytes=1 << 40)
        with _explained(self._source, "read"), self._source.open("rb") as file:
            while chunk := file.read(_CHUNK):
                for line in splitter.feed(chunk):
                    if line.text is not None:
                        yield line.offset, line.text
        if self._source is self.path:
            for line in splitter.finish():  # another program may have written the file
                yield line.offset, line.text or b""

    def begin(self, *, anew: bool) -> None:
        """Prepare to append: continue a finished file, cut off a torn line; with `anew`, delete all lines."""
        with _explained(self.part, "written"):
            if anew:
                os.ftruncate(self._descriptor, 0)
                self.path.unlink(missing_ok=True)
                self._source = self.part
                self._size = 0
                return
            if self._source is self.path:
                self._continue_finished()
            self._size = self._whole(os.fstat(self._descriptor).st_size)
            os.ftruncate(self._descriptor, self._size)
            os.lseek(self._descriptor, self._size, os.SEEK_SET)

    def _continue_finished(self) -> None:
        """Rename the finished file to the part, with the lock on it. Add an LF that another program may have left out."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        self._flock(descriptor)
        self.path.replace(self.part)
        os.close(self._descriptor)
        self._descriptor, self._source = descriptor, self.part
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            os.pwrite(descriptor, b"\n", size)

    def _whole(self, size: int) -> int:
        """Return the size without a torn last line."""
        end = size
        while end > 0:
            start = max(0, end - _CHUNK)
            if (found := os.pread(self._descriptor, end - start, start).rfind(b"\n")) >= 0:
                return start + found + 1
            end = start
        return 0

    def append(self, data: bytes) -> None:
        """Append whole lines. After a failure the file ends with its last whole line. Raises OutputError."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            written = len(data) - len(view)
            self._size += data.rfind(b"\n", 0, written) + 1
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
                os.lseek(self._descriptor, self._size, os.SEEK_SET)
            raise OutputError(
                f"{self.part} cannot be written: {error.strerror}; make room and run the same command again"
            ) from error
        self._size += len(data)

    def sync(self) -> None:
        with _explained(self.part, "synced"):
            os.fsync(self._descriptor)

    def rewrite(self, parts: Iterable[bytes]) -> None:
        """Replace the content of the part, atomically."""
        new = sibling(self.part, ".new")
        with _explained(new, "written"):
            descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                self._flock(descriptor)
                size = _write_all(descriptor, parts)
                os.fsync(descriptor)
                new.replace(self.part)
            except BaseException:
                os.close(descriptor)
                new.unlink(missing_ok=True)
                raise
            os.close(self._descriptor)
            self._descriptor, self._size = descriptor, size

    def kept(self, dropped: array[int]) -> Iterator[bytes]:
        """Yield the lines, with their LF, but for those at the dropped offsets."""
        at = 0
        for offset, text in self.lines():
            while at < len(dropped) and dropped[at] < offset:
                at += 1
            if at == len(dropped) or dropped[at] != offset:
                yield text + b"\n"

    def line_at(self, offset: int, length: int) -> bytes:
        """Return a part of the file."""
        return os.pread(self._descriptor, length, offset)

    def finish(self) -> None:
        """Give the file its name; an empty one is deleted."""
        with _explained(self.part, "renamed"):
            if self._size == 0:
                self.part.unlink()
            else:
                self.part.replace(self.path)
            _sync_directory(self.path.parent)

    def close(self) -> None:
        """Release the lock; delete the part if it is empty."""
        if self._descriptor < 0:
            return
        with contextlib.suppress(OSError):
            if os.fstat(self._descriptor).st_size == 0 and os.path.samestat(
                os.fstat(self._descriptor), self.part.stat()
            ):
                self.part.unlink()
        os.close(self._descriptor)
        self._descriptor = -1


class LocalOutput:
    """OUTPUT and ERRORS. They may be one file, and may be standard output. None stands for standard output."""

    def __init__(self, output: Path | None, errors: Path | None, *, stdout: int = 1) -> None:
        def opened(path: Path | None) -> _Part | _Stream:
            if path is None:
                return _Stream("standard output", stdout)
            if path.exists() and not path.is_file():
                return _Stream(str(path), os.open(path, os.O_WRONLY | os.O_CLOEXEC))
            return _Part(Path(os.path.realpath(path)))

        self._files = [opened(output)]
        self._files.append(self._files[0] if errors == output else opened(errors))
        self._buffers: list[list[bytes]] = [[], []]
        self.buffered = 0
        self._flushing = asyncio.Lock()
        self._failure: OutputError | None = None  # lines were lost: nothing may be written after them

    @property
    def is_resumable(self) -> bool:
        """Whether the output is a regular file that a later run can read."""
        return isinstance(self._files[0], _Part)

    @property
    def is_finished(self) -> bool:
        """Whether the files that exist have their names."""
        return all(isinstance(file, _Part) and file.is_finished for file in self._distinct)

    @property
    def names(self) -> Sequence[str]:
        """The names of the files that exist, once they are finished."""
        return [
            file.name
            for file in self._distinct
            if file.exists or (isinstance(file, _Part) and file.path.exists())
        ]

    @property
    def is_retrying(self) -> bool:
        """Whether a round of `--retry-failed` is unfinished."""
        return self._retried is not None and self._retried.exists()

    @property
    def _distinct(self) -> list[_Part | _Stream]:
        return self._files[:1] if self._files[0] is self._files[1] else self._files

    def lock(self) -> None:
        """Lock the files. Raises OutputBusy, RunRefused."""
        for file in self._distinct:
            file.lock()
        self._complete_move()

    async def prior(self) -> AsyncIterator[PriorEntry]:
        """Yield the lines of earlier runs. Raises RunRefused for a file that holds other lines."""
        if not self.is_resumable:
            return
        for number, file in enumerate(self._distinct):
            for count, (offset, text) in enumerate(file.lines(), 1):
                try:
                    prior = read_prior(text)
                except NotABatchLine:
                    raise RunRefused(
                        f"line {count} of {file.name} is not a line of a batch's output: use --overwrite to replace the "
                        "file, or -o to write another one"
                    ) from None
                yield PriorEntry(number, offset, prior)
                if count % _YIELD_LINES == 0:
                    await asyncio.sleep(0)
        for text in self._retried_lines():
            yield PriorEntry(1, -1, read_prior(text), is_retried=True)

    async def begin(self, *, anew: bool) -> None:
        """Prepare to append."""
        if (anew or not self.is_resumable) and self._retried is not None:
            self._retried.unlink(missing_ok=True)
        for file in self._distinct:
            file.begin(anew=anew or not self.is_resumable)

    async def drop(self, offsets: Mapping[int, array[int]]) -> None:
        """Remove lines of earlier runs."""
        for number, dropped in offsets.items():
            file = self._files[number]
            if dropped and isinstance(file, _Part):
                await asyncio.to_thread(file.rewrite, file.kept(dropped))

    async def retry(self, offsets: Mapping[int, array[int]]) -> None:
        """Move lines of earlier runs to `ERRORS.retried`. A move that is interrupted is completed by the next `lock`.

        `ERRORS.retried.new` exists from the moment when all lines are in it until they are removed from the other files.
        """
        if (path := self._retried) is None:
            return
        temporary = sibling(path, ".tmp")
        with _explained(path, "written"), temporary.open("wb") as file:
            for number, moved in offsets.items():
                part = self._files[number]
                assert isinstance(part, _Part)
                wanted = set(moved)
                file.writelines(text + b"\n" for offset, text in part.lines() if offset in wanted)
            file.flush()
            os.fsync(file.fileno())
        with _explained(path, "renamed"):
            temporary.replace(sibling(path, ".new"))
            _sync_directory(path.parent)
        await self.drop(offsets)
        with _explained(path, "renamed"):
            sibling(path, ".new").replace(path)
            _sync_directory(path.parent)

    def _complete_move(self) -> None:
        """Remove the lines of an interrupted `retry` from the other files. No job has been submitted for them yet."""
        path = self._retried
        if path is None or not sibling(path, ".new").exists():
            return
        with _explained(path, "read"), sibling(path, ".new").open("rb") as file:
            moved = {hash(line.rstrip(b"\n")) for line in file}
        for part in self._distinct:
            if isinstance(part, _Part) and part.is_part:
                dropped = array("Q", [offset for offset, text in part.lines() if hash(text) in moved])
                if dropped:
                    part.rewrite(part.kept(dropped))
        with _explained(path, "renamed"):
            sibling(path, ".new").replace(path)

    @property
    def _retried(self) -> Path | None:
        file = self._files[1]
        return sibling(file.path, ".retried") if isinstance(file, _Part) else None

    def _retried_lines(self) -> Iterator[bytes]:
        path = self._retried
        if path is not None and path.exists():
            with _explained(path, "read"), path.open("rb") as file:
                yield from (line for line in file if line.endswith(b"\n"))

    def write(self, line: bytes, *, is_error: bool) -> None:
        """Append a line to a buffer."""
        self._buffers[is_error].append(line)
        self.buffered += len(line)

    async def flush(self) -> None:
        """Write the buffered lines. Raises OutputError."""
        async with self._flushing:
            for number, file in enumerate(self._files):
                if self._failure is not None:
                    raise self._failure
                if lines := self._buffers[number]:
                    self._buffers[number] = []
                    data = b"".join(lines)
                    self.buffered -= len(data)
                    await self._append(file, data)

    async def _append(self, file: _Part | _Stream, data: bytes) -> None:
        """Append in a thread. A thread cannot be cancelled: it is awaited, so that no other one writes beside it."""
        writing = asyncio.ensure_future(asyncio.to_thread(file.append, data))
        try:
            await asyncio.shield(writing)
        except OutputError as error:
            self._failure = error
            raise
        except asyncio.CancelledError:
            await asyncio.wait([writing], timeout=_APPEND_TIMEOUT_S)
            if not writing.done():
                self._failure = OutputError(f"{file.name} does not take the lines that are written to it")
                writing.add_done_callback(lambda task: task.cancelled() or task.exception())
            elif isinstance(failure := writing.exception(), OutputError):
                self._failure = failure
            raise

    async def sync(self) -> bool:
        """Flush, and write the files to the disk. Raises OutputError."""
        await self.flush()
        for file in self._distinct:
            await asyncio.to_thread(file.sync)
        return self.is_resumable

    async def finish(self, index: LineIndex, *, sort: bool) -> Sequence[str]:
        """Give the files their names, ERRORS first. Raises OutputError."""
        await self.flush()
        output = self._files[0]
        if sort and isinstance(output, _Part):
            await asyncio.to_thread(_sort, output, index)
        await self.sync()
        for file in reversed(self._distinct):
            file.finish()
        if self._retried is not None:
            self._retried.unlink(missing_ok=True)
        return self.names

    async def close(self) -> None:
        """Flush and release the files."""
        try:
            if self._failure is None:  # else it was raised before
                await self.flush()
        finally:
            for file in self._distinct:
                file.close()


def _sort(file: _Part, index: LineIndex) -> None:
    """Rewrite a file in the order of the input. Lines that the input does not have are at the end."""
    offsets, lengths = array("Q", bytes(8 * len(index))), array("Q", bytes(8 * len(index)))
    others: list[tuple[int, int]] = []
    for offset, text in file.lines():
        _, line = judge(read_prior(text), index)
        if line >= 0 and not lengths[line]:
            offsets[line], lengths[line] = offset, len(text) + 1
        else:
            others.append((offset, len(text) + 1))
    places = [*((offset, length) for offset, length in zip(offsets, lengths, strict=True) if length), *others]
    file.rewrite(file.line_at(offset, length) for offset, length in places)


class LocalRunStore:
    """`OUTPUT.run.json`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def load(self) -> RunRecord | None:
        """Return the record of an unfinished run. Raises RunRefused."""
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunRefused(f"{self.path} cannot be read: {error.strerror}") from error
        try:
            return read_record(text)
        except ValueError as error:
            raise RunRefused(f"{self.path}: {error}; delete it, or use --overwrite") from None

    async def save(self, record: RunRecord) -> None:
        """Replace the record. Raises OutputError."""
        await asyncio.to_thread(self._save, record)

    def _save(self, record: RunRecord) -> None:
        new = sibling(self.path, ".new")
        with _explained(self.path, "written"):
            with new.open("wb") as file:
                file.write(write_record(record))
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
            _sync_directory(self.path.parent)

    async def remove(self) -> None:
        """Delete the record."""
        self.path.unlink(missing_ok=True)


class NoRunStore:
    """For a run whose output is not a regular file: its name alone identifies it."""

    async def load(self) -> RunRecord | None:
        """Return None."""
        return None

    async def save(self, record: RunRecord) -> None:
        """Keep no record."""

    async def remove(self) -> None:
        """Keep no record."""


@contextlib.contextmanager
def _explained(path: Path, verb: str, kind: type[OutputError | RunRefused] = OutputError) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise kind(f"{path} cannot be {verb}: {error.strerror or error}") from error


def _write_all(descriptor: int, parts: Iterable[bytes]) -> int:
    size = 0
    buffer = bytearray()
    for part in parts:
        buffer += part
        if len(buffer) >= _CHUNK:
            size += _write(descriptor, buffer)
    return size + _write(descriptor, buffer)


def _write(descriptor: int, buffer: bytearray) -> int:
    size = len(buffer)
    view = memoryview(bytes(buffer))
    while view:
        view = view[os.write(descriptor, view) :]
    buffer.clear()
    return size


def _sync_directory(path: Path) -> None:
    """Make renames in a directory durable, where the file system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
