"""A server as a child process that cannot outlive us, however we end."""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Between fork and exec in a process with threads only exec is safe, so the child asks for its own death
# (PR_SET_PDEATHSIG = 1) from a fresh interpreter and then becomes the server. The parent may be gone already
# by then: its id tells.
_DIE_WITH_PARENT: Final = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"
    "if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])\n"
)
# That signal comes when the *thread* that forked ends, and the caller's may be a pool's: this one stays.
_FORKER: Final = ThreadPoolExecutor(max_workers=1, thread_name_prefix="child-forker")
_POLL_S: Final = 0.02
_LOG_TAIL_BYTES: Final = 4000


class ChildError(RuntimeError):
    """The server did not come up; the message ends with the end of its log."""


class Child:
    """One server process, its output in `log`; on Linux it is killed with us even if we are (SIGKILL).

    It has a session of its own: Ctrl-C in the terminal must not reach it, we still need it while we drain.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._command = list(command)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def running(self) -> bool:
        """Started, and not ended by itself."""
        return self._process is not None and self._process.poll() is None

    def start(self, ready: Callable[[bytes], bool], timeout_s: float) -> None:
        """Start and wait until `ready`, which is given what was logged since; raises ChildError."""
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        self._process = _FORKER.submit(self._fork).result()
        atexit.register(self.kill)
        try:
            self._wait(ready, time.monotonic() + timeout_s)
        except BaseException:
            self.kill()
            raise

    def _fork(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(  # noqa: S603  # the command is the caller's own
                self._mortal(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _mortal(self) -> list[str]:
        if sys.platform != "linux":
            return self._command
        return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *self._command]

    def _wait(self, ready: Callable[[bytes], bool], deadline: float) -> None:
        while not ready(self._logged()):
            if not self.running:
                raise ChildError(self._failure("ended at its start"))
            if time.monotonic() > deadline:
                raise ChildError(self._failure("did not become ready in time"))
            time.sleep(_POLL_S)

    def _logged(self) -> bytes:
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            return log.read()

    def _failure(self, what: str) -> str:
        tail = self._logged()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        return f"{Path(self._command[0]).name} {what}; its log ends:\n{tail}"

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, if it is still there."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it now."""
        self.send_signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        atexit.unregister(self.kill)

    def terminate(self, timeout_s: float) -> None:
        """Let it end well within the time, or else end it."""
        self.send_signal(signal.SIGTERM)
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        self.kill()


def accepts(port: int, host: str = "127.0.0.1") -> bool:
    """Whether someone listens there."""
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def free_port(host: str = "127.0.0.1") -> int:
    """A port nobody listens on, below those that the system gives to outgoing connections.

    Among those a client that retries a stopped server's port ends up connected to itself one day, and the
    server cannot have its port back.
    """
    low = _first_ephemeral_port()
    for port in random.sample(range(10_000, low), 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise ChildError("found no free port")


def _first_ephemeral_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text("ascii").split()[0])
    except (OSError, ValueError):
        return 32_768
