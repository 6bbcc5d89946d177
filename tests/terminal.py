"""A program in a pseudo-terminal, and what its screen shows."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from typing import TYPE_CHECKING, Self

import pyte

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

__all__ = ["Terminal"]


class Terminal:
    """A terminal of `columns` by `lines` cells with one program. Use it as a context manager.

    Without `draws` the screen stays empty, and `frames` draws the output afterwards, which takes longer than the program itself.
    The alternate screen is `screen`, as pyte does not switch: what a program prints after it has left that screen is in `after`.
    """

    def __init__(
        self,
        command: Sequence[str],
        columns: int,
        lines: int,
        *,
        environ: Mapping[str, str] | None = None,
        folder: Path | None = None,
        draws: bool = True,
    ) -> None:
        self.screen = pyte.Screen(columns, lines)
        self.raw = b""
        self._draws = draws
        self._stream = pyte.ByteStream(self.screen)
        self._begun = time.monotonic()
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        variables = {**os.environ, "TERM": "xterm-256color", **(environ or {})}
        variables = {name: value for name, value in variables.items() if name not in {"COLUMNS", "LINES"}}
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=variables,
            cwd=folder,
            start_new_session=True,
        )
        os.close(slave)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        os.close(self._master)

    @property
    def seconds(self) -> float:
        """Seconds since the start of the program."""
        return time.monotonic() - self._begun

    @property
    def text(self) -> str:
        """The text on the screen."""
        return "\n".join(line.rstrip() for line in self.screen.display)

    @property
    def after(self) -> str:
        """The output since the program has left the alternate screen."""
        return self.raw.rpartition(b"\x1b[?1049l")[2].decode(errors="replace")

    def frames(self, every: int = 1) -> Iterator[pyte.Screen]:
        """Draw the output on a new screen; yield it after each frame, or after each `every`-th one. A frame begins at the top left."""
        screen = pyte.Screen(self.screen.columns, self.screen.lines)
        stream = pyte.ByteStream(screen)
        shown = self.raw.rpartition(b"\x1b[?1049l")[0]
        for number, part in enumerate(shown.split(b"\x1b[H")):
            stream.feed(b"\x1b[H" + part)
            if number % every == 0:
                yield screen

    def read(self, timeout_s: float = 0.2) -> bool:
        """Read what the program writes within `timeout_s`; return False after its end."""
        ready, _, _ = select.select([self._master], [], [], timeout_s)
        if not ready:
            return True
        try:
            data = os.read(self._master, 65_536)
        except OSError:  # EIO: the program has closed the terminal
            return False
        if not data:
            return False
        self.raw += data
        if self._draws:
            self._stream.feed(data)
        return True

    def until(self, condition: Callable[[], object], limit_s: float) -> None:
        """Read until the condition is true. Raises AssertionError with the screen after `limit_s` seconds."""
        limit = time.monotonic() + limit_s
        while not condition():
            is_running = self.read(0.05)
            assert is_running or condition(), f"the program has ended:\n{self.text}"
            assert time.monotonic() < limit, f"not within {limit_s} s:\n{self.text}"

    def finish(self, limit_s: float) -> int:
        """Read until the program ends; return its exit code."""
        limit = time.monotonic() + limit_s
        while self.read():
            assert time.monotonic() < limit, f"the program runs after {limit_s} s:\n{self.text}"
        return self.process.wait(10)
