"""The demo's gateway process: when its page counts as served."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from streamworker.demo.page import Page

if TYPE_CHECKING:
    from pathlib import Path

SERVER = """
import os, socket, time
time.sleep({delay})
with socket.create_server((os.environ["STREAMWORKER_GATEWAY__HOST"], int(os.environ["STREAMWORKER_GATEWAY__PORT"]))) as server:
    for status in {statuses!r}:
        peer, _ = server.accept()
        peer.recv(1000)
        peer.sendall(status)
        peer.close()
"""
OK, NOT_YET = b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 503 Service Unavailable\r\n\r\n"


def page(folder: Path, code: str) -> Page:
    return Page([sys.executable, "-c", code], folder, {})


@pytest.mark.parametrize(
    ("statuses", "delay", "served"),
    [
        ([OK], 0, True),
        ([NOT_YET, b"", OK], 0, True),
        ([OK], 0.4, True),
        ([NOT_YET], 0, False),
        ([b"\r\n"], 0, False),
        ([], 0, False),
    ],
)
async def test_page_is_served_when_it_answers_200(
    tmp_path: Path, statuses: list[bytes], delay: float, *, served: bool
) -> None:
    """A process that ends before has no page, and the demo goes on without."""
    gateway = page(tmp_path, SERVER.format(statuses=statuses, delay=delay))
    gateway.start()
    try:
        assert await gateway.wait_until_served() is served
        assert gateway.is_served is served
    finally:
        gateway.stop()


async def test_page_is_open_to_this_machine_only(tmp_path: Path) -> None:
    """It has no authentication, so it listens on the loopback address, and on a port of its own."""
    code = "import os; print({k: v for k, v in os.environ.items() if 'GATEWAY' in k})"
    first, second = page(tmp_path, code), page(tmp_path, code)
    first.start()
    assert not await first.wait_until_served()
    first.stop()
    written = (tmp_path / "gateway.log").read_text()

    assert first.url.startswith("http://127.0.0.1:")
    assert first.url != second.url
    assert "'STREAMWORKER_GATEWAY__HOST': '127.0.0.1'" in written
    assert "'STREAMWORKER_GATEWAY__AUTH': 'off'" in written


def test_page_that_was_never_started_can_be_stopped(tmp_path: Path) -> None:
    """The demo starts it late, so the demo may end before."""
    gateway = page(tmp_path, "")
    gateway.stop()

    assert not gateway.is_served
