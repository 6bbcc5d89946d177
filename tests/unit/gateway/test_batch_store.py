"""Contents of files in a folder and in an object store: the same rules for both."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import pytest

from streamworker.errors import ConfigurationError
from streamworker.gateway.batches.store import (
    CHUNK,
    FileStore,
    FolderStore,
    ObjectStore,
    StoreError,
    open_store,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine


async def chunks(*parts: bytes, failure: Exception | None = None) -> AsyncIterator[bytes]:
    """Yield parts, and fail behind them if asked to."""
    for part in parts:
        yield part
    if failure is not None:
        raise failure


async def content(store: FileStore, name: str) -> bytes:
    """Return the whole contents."""
    return b"".join([chunk async for chunk in store.read(name)])


def files_in(folder: Path) -> list[Path]:
    """Return the files below a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture(params=["folder", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FileStore:
    """Return an empty store of each kind."""
    if request.param == "folder":
        return open_store(f"file://{tmp_path}/files")
    return open_store("memory:///")


@pytest.mark.parametrize(
    "parts",
    [(), (b"",), (b"a",), (b"a", b"b" * 3 * CHUNK, b"c")],
    ids=["none", "empty", "one", "several chunks"],
)
async def test_contents_are_read_as_they_were_written(store: FileStore, parts: tuple[bytes, ...]) -> None:
    """Whatever the sizes; the number of bytes is returned."""
    assert await store.write("file-1", chunks(*parts)) == sum(map(len, parts))

    assert await content(store, "file-1") == b"".join(parts)


async def test_folder_is_made_with_those_above_it(tmp_path: Path) -> None:
    """When the first file is written."""
    store = open_store(f"file://{tmp_path}/var/lib/files")
    assert files_in(tmp_path) == []
    await store.write("file-1", chunks(b"a"))

    assert files_in(tmp_path) == [tmp_path / "var/lib/files/file-1"]


async def test_file_that_cannot_be_deleted_is_an_error_of_the_store(tmp_path: Path) -> None:
    """It names the file and the reason."""
    (tmp_path / "file-1").mkdir()
    with pytest.raises(StoreError, match=r"^file file-1 cannot be deleted: "):
        await FolderStore(tmp_path).delete("file-1")


async def test_contents_are_replaced(store: FileStore) -> None:
    """Another owner of a batch writes its output again."""
    await store.write("file-1", chunks(b"first"))
    await store.write("file-1", chunks(b"second"))

    assert await content(store, "file-1") == b"second"


async def test_contents_that_are_absent_raise_file_not_found(store: FileStore) -> None:
    """They may have been deleted behind the gateway's back."""
    with pytest.raises(FileNotFoundError):
        await content(store, "file-1")


async def test_deleted_contents_are_absent_and_are_deleted_again(store: FileStore) -> None:
    """Deleting is repeatable."""
    await store.write("file-1", chunks(b"a"))
    await store.delete("file-1")
    await store.delete("file-1")

    with pytest.raises(FileNotFoundError):
        await content(store, "file-1")


async def test_write_that_fails_raises_its_cause_and_leaves_nothing(store: FileStore, tmp_path: Path) -> None:
    """An upload that a client breaks off leaves neither a file nor a part of one."""
    with pytest.raises(LookupError, match="broken off"):
        await store.write("file-1", chunks(b"a" * CHUNK, failure=LookupError("broken off")))

    with pytest.raises(FileNotFoundError):
        await content(store, "file-1")
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("name", ["", ".", "../x", "a/b", "a.b", "ä", "a" * 81, "a\n"])
async def test_name_that_is_not_valid_is_refused(store: FileStore, name: str) -> None:
    """No name leaves the folder or the prefix."""
    with pytest.raises(StoreError, match="is not a valid name"):
        await store.write(name, chunks(b"a"))
    with pytest.raises(StoreError, match="is not a valid name"):
        await content(store, name)
    with pytest.raises(StoreError, match="is not a valid name"):
        await store.delete(name)


async def test_folder_that_cannot_be_made_is_reported_with_the_reason(tmp_path: Path) -> None:
    """The message has the file and the operating system's reason, and no path."""
    (tmp_path / "file").write_text("")
    store = FolderStore(tmp_path / "file" / "files")

    with pytest.raises(StoreError, match="file file-1 cannot be written: Not a directory"):
        await store.write("file-1", chunks(b"a"))
    with pytest.raises(StoreError, match="file file-1 cannot be read: Not a directory"):
        await content(store, "file-1")


class SlowFiles:
    """Path.open as on a slow volume: it returns when the test says so. Keeps the files that it has opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = asyncio.Event()
        self.may_open = threading.Event()
        self.opened: list[IO[bytes]] = []
        self.error: OSError | None = None
        loop, open_now = asyncio.get_running_loop(), Path.open

        def open_slowly(path: Path, mode: str) -> Any:
            loop.call_soon_threadsafe(self.asked.set)
            assert self.may_open.wait(10)
            if self.error is not None:
                raise self.error
            self.opened.append(cast("IO[bytes]", open_now(path, mode)))
            return self.opened[-1]

        monkeypatch.setattr(Path, "open", open_slowly)


async def reading(store: FolderStore) -> None:
    """Read a file that is there."""
    await anext(aiter(store.read("file-1")))


async def writing(store: FolderStore) -> None:
    """Write a file."""
    await store.write("file-2", chunks(b"a"))


@pytest.mark.parametrize("work", [reading, writing])
@pytest.mark.parametrize("cancellations", [1, 2])
async def test_file_that_is_opened_when_its_use_was_cancelled_is_closed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[FolderStore], Coroutine[Any, Any, None]],
    cancellations: int,
) -> None:
    """A thread that opens a file cannot be cancelled; the garbage collector must not have to close it."""
    store = FolderStore(tmp_path)
    await store.write("file-1", chunks(b"a"))
    files = SlowFiles(monkeypatch)
    task = asyncio.create_task(work(store))
    await files.asked.wait()
    for _ in range(cancellations):
        task.cancel()
        await asyncio.sleep(0)
    files.may_open.set()
    await asyncio.wait([task])

    assert task.cancelled()
    async with asyncio.timeout(10):
        while not (files.opened and files.opened[0].closed):  # noqa: ASYNC110 - a callback of the thread closes it
            await asyncio.sleep(0.001)


async def test_write_that_is_cancelled_while_its_file_is_opened_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread would create the file after its deletion."""
    files = SlowFiles(monkeypatch)
    task = asyncio.create_task(writing(FolderStore(tmp_path)))
    await files.asked.wait()
    task.cancel()
    await asyncio.sleep(0)
    files.may_open.set()
    await asyncio.wait([task])

    assert task.cancelled()
    assert files.opened
    assert files_in(tmp_path) == []


async def test_file_that_cannot_be_opened_when_its_use_was_cancelled_is_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of the thread is not reported as an exception that was never retrieved."""
    store = FolderStore(tmp_path)
    files = SlowFiles(monkeypatch)
    files.error = PermissionError(13, "Permission denied")
    task = asyncio.create_task(reading(store))
    await files.asked.wait()
    task.cancel()
    files.may_open.set()
    await asyncio.wait([task])

    assert task.cancelled()


def test_url_of_a_folder_may_have_escapes(tmp_path: Path) -> None:
    """`%20` is a blank."""
    store = open_store(f"file://{tmp_path}/a%20b")

    assert isinstance(store, FolderStore)
    assert store._folder == tmp_path / "a b"


@pytest.mark.parametrize(
    "url",
    ["", "files", "/files", "file://", "file:///", "file://host/files", "http://host/files", "ftp://a/b"],
)
def test_url_that_is_not_a_store_is_a_configuration_error(url: str) -> None:
    """The message names the setting and the forms that it may have."""
    with pytest.raises(ConfigurationError, match=r"batch\.files: .* must be a folder such as file:///"):
        open_store(url)


@pytest.mark.parametrize("url", ["s3://", "az://no-account/prefix"])
def test_url_that_the_object_store_refuses_is_a_configuration_error(url: str) -> None:
    """Credentials and bucket are checked when the gateway starts, as far as that is possible."""
    with pytest.raises(ConfigurationError, match=r"batch\.files: "):
        open_store(url)


@pytest.mark.parametrize(
    "url", ["ftp://user:secret@host/a", "http://host/a?sig=secret", "az://user:secret@x/p"]
)
def test_url_is_shown_without_its_secrets(url: str) -> None:
    """The message goes to standard error and to logs."""
    with pytest.raises(ConfigurationError) as refused:
        open_store(url)

    assert "secret" not in str(refused.value)


def test_object_store_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """obstore is not among the required packages."""
    monkeypatch.setitem(sys.modules, "obstore.store", None)

    with pytest.raises(ConfigurationError, match=r"pip install 'streamworker\[objects\]'"):
        open_store("s3://bucket/prefix")


async def test_object_store_that_fails_is_reported_without_its_url() -> None:
    """A URL may contain credentials."""

    class Fails:
        def __getattr__(self, name: str) -> Callable[..., None]:
            raise RuntimeError("https://user:secret@host/bucket")

    store = ObjectStore(Fails())

    with pytest.raises(StoreError, match="file file-1 cannot be written: ") as refused:
        await store.write("file-1", chunks(b"a"))
    with pytest.raises(StoreError, match="file file-1 cannot be read: "):
        await content(store, "file-1")
    with pytest.raises(StoreError, match="file file-1 cannot be deleted: "):
        await store.delete("file-1")
    assert "secret" not in str(refused.value)
