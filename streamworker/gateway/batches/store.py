"""Where the contents of files are: a folder, or an object store (extra `objects`)."""

from __future__ import annotations

import asyncio
import os
import re
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote, urlsplit

from streamworker.errors import ConfigurationError, StreamworkerError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["FileStore", "FolderStore", "ObjectStore", "StoreError", "open_store"]

CHUNK = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}\Z")
_OBJECT_STORES = {"s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "memory"}


class StoreError(StreamworkerError):
    """The store cannot be read or written."""


class FileStore(Protocol):
    """Contents by name. A name consists of ASCII letters, digits, `_` and `-`."""

    async def write(self, name: str, chunks: AsyncIterator[bytes]) -> int:
        """Store the chunks under a name, or nothing; return the number of bytes. Raises StoreError."""
        ...

    def read(self, name: str) -> AsyncIterator[bytes]:
        """Yield the contents. Raises StoreError; FileNotFoundError if there is none of this name."""
        ...

    async def delete(self, name: str) -> None:
        """Delete the contents, if there are any. Raises StoreError."""
        ...


def open_store(url: str) -> FileStore:
    """Return the store of a URL: `file:///path`, or `s3://`, `gs://`, `az://` with a bucket and a prefix.

    Raises ConfigurationError.
    """
    parts = urlsplit(url)
    if parts.scheme == "file" and not parts.netloc and parts.path not in {"", "/"}:
        return FolderStore(Path(unquote(parts.path)))
    if parts.scheme in _OBJECT_STORES:
        return ObjectStore(_object_store(url))
    raise ConfigurationError(
        [
            f"batch.files: {_shown(url)} must be a folder such as file:///var/lib/streamworker/files, or s3://, gs:// or az://"
        ]
    )


def _object_store(url: str) -> Any:
    try:
        from obstore.store import from_url  # noqa: PLC0415 - an extra, imported only where it is used
    except ImportError:
        raise ConfigurationError(
            [f"batch.files: {_shown(url)} needs the extra `objects`: pip install 'streamworker[objects]'"]
        ) from None
    try:
        return from_url(url)
    except Exception as error:  # obstore raises many kinds of errors for a URL that it cannot use
        message = f"batch.files: {_shown(url)} cannot be used ({type(error).__name__})"
        raise ConfigurationError([message]) from error


class FolderStore:
    """A folder on this machine, or a volume that all gateways share. It is made when the first file is written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def write(self, name: str, chunks: AsyncIterator[bytes]) -> int:
        """Write a temporary file, make it durable, give it its name."""
        path = self._path(name)
        part = path.with_name(f".{name}.{os.getpid()}.part")
        try:
            await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
            try:
                size = await self._write(part, chunks)
                await asyncio.to_thread(part.replace, path)
            finally:
                with suppress(OSError):
                    part.unlink(missing_ok=True)
        except OSError as error:
            raise _failed(f"file {name} cannot be written", error) from error
        return size

    async def read(self, name: str) -> AsyncIterator[bytes]:
        """Yield the file in chunks of 1 MiB."""
        try:
            async with _opened(self._path(name), "rb") as file:
                while chunk := await asyncio.to_thread(file.read, CHUNK):
                    yield chunk
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _failed(f"file {name} cannot be read", error) from error

    async def delete(self, name: str) -> None:
        """Delete the file."""
        try:
            await asyncio.to_thread(self._path(name).unlink, missing_ok=True)
        except OSError as error:
            raise _failed(f"file {name} cannot be deleted", error) from error

    async def _write(self, part: Path, chunks: AsyncIterator[bytes]) -> int:
        size = 0
        async with _opened(part, "wb") as file:
            async for chunk in chunks:
                await asyncio.to_thread(file.write, chunk)
                size += len(chunk)
            await asyncio.to_thread(file.flush)
            await asyncio.to_thread(os.fsync, file.fileno())
        return size

    def _path(self, name: str) -> Path:
        return self._folder / _checked(name)


@asynccontextmanager
async def _opened(path: Path, mode: str) -> AsyncIterator[IO[bytes]]:
    """Open a file in a thread, and close it at the end of the block. Raises OSError.

    A cancellation does not stop the thread. It waits for the thread, because the caller may delete the file then; at a
    second one, the file is closed as soon as it is open.
    """
    opening = asyncio.ensure_future(asyncio.to_thread(path.open, mode))
    try:
        file = await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_unused)
        await asyncio.wait([opening])
        raise
    with file:
        yield file


def _close_unused(opening: asyncio.Future[IO[bytes]]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


class ObjectStore:
    """A bucket. Credentials are read from the environment, as the providers' own tools do."""

    def __init__(self, store: Any) -> None:
        """`store` is one of obstore's stores."""
        self._store = store

    async def write(self, name: str, chunks: AsyncIterator[bytes]) -> int:
        """Upload in parts. An upload that fails leaves no object."""
        from obstore import put_async  # noqa: PLC0415 - an extra

        size = 0
        failure: Exception | None = None

        async def counted() -> AsyncIterator[bytes]:
            nonlocal size, failure
            try:
                async for chunk in chunks:
                    size += len(chunk)
                    yield chunk
            except Exception as error:  # obstore raises an error of its own instead
                failure = error
                raise

        try:
            await put_async(self._store, _checked(name), counted(), chunk_size=8 * CHUNK)
        except StoreError:
            raise
        except Exception as error:
            raise failure or _failed(f"file {name} cannot be written", error) from error
        return size

    async def read(self, name: str) -> AsyncIterator[bytes]:
        """Yield the object in chunks of about 1 MiB."""
        from obstore import get_async  # noqa: PLC0415 - an extra

        try:
            found = await get_async(self._store, _checked(name))
            async for chunk in found.stream(min_chunk_size=CHUNK):
                yield bytes(chunk)
        except FileNotFoundError:
            raise
        except StreamworkerError:
            raise
        except Exception as error:
            raise _failed(f"file {name} cannot be read", error) from error

    async def delete(self, name: str) -> None:
        """Delete the object."""
        from obstore import delete_async  # noqa: PLC0415 - an extra

        try:
            await delete_async(self._store, _checked(name))
        except FileNotFoundError:
            return
        except StoreError:
            raise
        except Exception as error:
            raise _failed(f"file {name} cannot be deleted", error) from error


def _shown(url: str) -> str:
    """Return a URL without what may be a secret in it: user, password, query."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _checked(name: str) -> str:
    if not _NAME.match(name):
        raise StoreError(f"{name!r} is not a valid name of a file")
    return name


def _failed(what: str, error: Exception) -> StoreError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    return StoreError(f"{what}: {reason}")
