"""The gateway of the demo, in a process of its own: its page shows the same jobs in a browser."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from streamworker.config import PREFIX
from streamworker.demo.child import Child, free_port
from streamworker.demo.probe import get

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["Page"]

_HOST: Final = "127.0.0.1"
_POLL_S: Final = 0.2
_OK: Final = 200
_STOP_S: Final = 5.0
_MODELS: Final = (
    "practice?deltas=120&pace_ms=60",
    "practice?reasoning=20&deltas=60&pace_ms=60",
    "practice?deltas=60&pace_ms=60&break_after=30",
)
"""Models of the practice upstream that the page offers."""


class Page:
    """A gateway without authentication on the loopback address. `url` is the address of its page."""

    def __init__(self, command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> None:
        self._port = free_port(_HOST)
        self.url = f"http://{_HOST}:{self._port}/"
        settings = {"AUTH": "off", "HOST": _HOST, "PORT": str(self._port), "MODELS": ",".join(_MODELS)}
        own = {f"{PREFIX}GATEWAY__{name}": value for name, value in settings.items()}
        self._child = Child(command, folder / "gateway.log", {**variables, **own})
        self.is_served = False
        """Whether the page has been served once."""

    def start(self) -> None:
        """Start the process; it needs a second or two until it serves."""
        self._child.start(lambda _: True, timeout_s=1)

    def stop(self) -> None:
        """Drain it shortly, then kill it."""
        self._child.terminate(_STOP_S)

    async def wait_until_served(self) -> bool:
        """Return True as soon as the page is served, False if the process ends before."""
        while self._child.running:
            status, _ = await get(_HOST, self._port, "/")
            if status == _OK:
                self.is_served = True
                return True
            await asyncio.sleep(_POLL_S)
        return False
