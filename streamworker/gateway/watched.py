"""A file whose content is read again when it changes."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Generic, TypeVar

import structlog

from streamworker.errors import ConfigurationError
from streamworker.log_throttle import LogThrottle

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["Watched"]

CHECK_S = 1.0
"""How often the file is looked at, at most."""

T = TypeVar("T")

log = structlog.get_logger()


class Watched(Generic[T]):
    """The content of a file as `read` understands it. The last valid content stays if a change is not valid."""

    def __init__(
        self, path: Path | None, read: Callable[[], T], *, clock: Callable[[], float] = monotonic
    ) -> None:
        """Read the file. Raises ConfigurationError."""
        self._path = path
        self._read = read
        self._clock = clock
        self._throttle = LogThrottle()
        self._version = self._stat()
        self._checked = clock()
        self._value = read()

    def get(self) -> T:
        """Return the content, read again if the file has changed. Never raises."""
        now = self._clock()
        if self._path is not None and now - self._checked >= CHECK_S:
            self._checked = now
            version = self._stat()
            if version != self._version:
                self._version = version
                self._reload(now)
        return self._value

    def _reload(self, now: float) -> None:
        try:
            self._value = self._read()
        except ConfigurationError as error:
            if (fields := self._throttle.failed(now)) is not None:
                path = str(self._path)
                log.error("gateway.file_refused", path=path, faults=error.faults, **fields)  # noqa: TRY400 - faults say it
        else:
            log.info("gateway.file_read", path=str(self._path))

    def _stat(self) -> tuple[int, int, int] | None:
        if self._path is None:
            return None
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return (stat.st_mtime_ns, stat.st_size, stat.st_ino)
