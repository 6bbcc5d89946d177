"""CPU time and memory of other processes, from proc(5)."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["CPU_RESOLUTION_S", "Usage", "started", "usage_of"]

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
STOP_TIMEOUT_S = 3
CPU_RESOLUTION_S = 1 / _TICKS
"""The kernel counts a process's processor time in ticks of 10 ms."""


class Usage(NamedTuple):
    """Processor time in user and system mode, all threads, in seconds; resident memory in bytes."""

    cpu_s: float
    resident: int


def usage_of(pid: int) -> Usage:
    """Return the usage of a process. Processor time is a multiple of CPU_RESOLUTION_S."""
    # The second field is the command's name in brackets, which may contain any character.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Usage((int(fields[11]) + int(fields[12])) / _TICKS, pages * _PAGE)


@contextmanager
def started(
    arguments: list[str], environment: Mapping[str, str], log: Path, directory: Path | None = None
) -> Iterator[int]:
    """Run `python -m <arguments>` in a directory during the block; yield its process id. Its output goes to `log`."""
    with (
        log.open("wb") as told,
        subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env={**os.environ, **environment},
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=told,
        ) as process,
    ):
        try:
            yield process.pid
            if process.poll() is not None:
                raise SystemExit(f"{arguments[0]} ended with {process.returncode}; see {log}")
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:  # it is still draining
                process.kill()
