"""Every test of the transport runs on both loops, and leaves neither a task nor a socket behind."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

FILES = Path("/proc/self/fd")


def pytest_asyncio_loop_factories(config: object, item: object) -> Mapping[str, Callable[[], object]]:
    """Run on asyncio's own loop and on uvloop."""
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
async def _nothing_is_left() -> AsyncIterator[None]:
    """Compare the tasks and the open sockets before and after a test. The event loop may report nothing."""
    tasks, sockets = asyncio.all_tasks(), _sockets()
    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, report: reports.append(report))
    yield
    gc.collect()
    assert reports == []
    tasks.add(asyncio.current_task() or next(iter(tasks)))
    for _ in range(200):
        if asyncio.all_tasks() <= tasks and _sockets() <= sockets:
            return
        gc.collect()
        await asyncio.sleep(0.01)
    assert asyncio.all_tasks() - tasks == set()
    assert _sockets() - sockets == set()


def _sockets() -> set[str]:
    """Return the open TCP sockets; the loops have socket pairs of their own."""
    found = set()
    for file in FILES.iterdir():
        try:
            target = str(file.readlink())
            if target.startswith("socket:"):
                with socket.socket(fileno=os.dup(int(file.name))) as sock:
                    if sock.family in {socket.AF_INET, socket.AF_INET6}:
                        found.add(target)
        except OSError:  # it was the directory itself
            continue
    return found
