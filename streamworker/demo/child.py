"""A server as a child process that ends with this process, however this process ends."""

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
    from collections.abc import Callable, Mapping, Sequence

# In a process with threads only exec is safe after a fork, so a new interpreter requests a signal at the parent's death
# (PR_SET_PDEATHSIG = 1) and then executes the server. It compares the parent's id: the parent may have ended before.
_DIE_WITH_PARENT: Final = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"
    "if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])\n"
)
# The signal is sent when the *thread* that forked ends, so the fork runs in a thread that lives as long as the process.
_FORKER: Final = ThreadPoolExecutor(max_workers=1, thread_name_prefix="child-forker")
_POLL_S: Final = 0.02
_LOG_TAIL_BYTES: Final = 4000


class ChildError(RuntimeError):
    """The server did not start; the message ends with the end of its log."""


class Child:
    """One server process with its output in the file `log`. On Linux it is killed even if this process gets SIGKILL.

    It gets the variables of `environ`, by default those of this process. It has a session of its own, so that Ctrl-C in the terminal does not reach it: the drain still needs it.
    """

    def __init__(self, command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None) -> None:
        self._command = list(command)
        self._log = log
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def running(self) -> bool:
        """Whether the process was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self, ready: Callable[[bytes], bool], timeout_s: float) -> None:
        """Start, and wait until `ready` returns true for the log output since the start. Raises ChildError."""
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        self._process = _FORKER.submit(self._fork).result()
        atexit.register(self.kill)
        self.wait_until(ready, timeout_s)

    def wait_until(self, ready: Callable[[bytes], bool], timeout_s: float) -> None:
        """Wait until `ready` returns true for the log output since the start; kill the process otherwise. Raises ChildError."""
        try:
            self._wait(ready, time.monotonic() + timeout_s)
        except BaseException:
            self.kill()
            raise

    def _fork(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - the command comes from the caller
                self._mortal(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=None if self._environ is None else dict(self._environ),
            )

    def _mortal(self) -> list[str]:
        if sys.platform != "linux":
            return self._command
        return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *self._command]

    def _wait(self, ready: Callable[[bytes], bool], deadline: float) -> None:
        while not ready(self._logged()):
            if not self.running:
                raise ChildError(self._failure("ended during its start"))
            if time.monotonic() > deadline:
                raise ChildError(self._failure("did not become ready in time"))
            time.sleep(_POLL_S)

    def _logged(self) -> bytes:
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            return log.read()

    def _failure(self, what: str) -> str:
        return f"{Path(self._command[0]).name} {what}; its log ends:\n{self.log_end()}"

    def log_end(self) -> str:
        """Return the end of the log since the start."""
        return self._logged()[-_LOG_TAIL_BYTES:].decode(errors="replace")

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal if the process is running."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def pause(self) -> None:
        """Stop a running process with SIGSTOP; return when all of its threads have stopped."""
        if self._process is None or not self.running:
            return
        self._process.send_signal(signal.SIGSTOP)
        # The signal is asynchronous: a thread that runs may answer one more request. The process may end, too.
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def kill(self) -> None:
        """Kill the process."""
        self.send_signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        atexit.unregister(self.kill)

    def terminate(self, timeout_s: float) -> None:
        """Send SIGTERM; kill the process after `timeout_s` seconds."""
        self.send_signal(signal.SIGTERM)
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        self.kill()


def accepts(port: int, host: str = "127.0.0.1") -> bool:
    """Return whether a server accepts connections at this address."""
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def free_port(host: str = "127.0.0.1") -> int:
    """Return a free port below the range of outgoing connections.

    In that range a client that retries the port of a stopped server can connect to itself, and the server could not
    bind the port again.
    """
    return free_ports(1, host)[0]


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Return different ports, each as `free_port` returns one."""
    found: list[int] = []
    for port in random.sample(range(10_000, _first_ephemeral_port()), 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            found.append(port)
        if len(found) == count:
            return found
    raise ChildError("there is no free port")


def _first_ephemeral_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text("ascii").split()[0])
    except (OSError, ValueError):
        return 32_768
