"""Start and end of a child process."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from streamworker.demo.child import Child, ChildError, accepts, free_port, free_ports

PYTHON = sys.executable
SAYS_READY = [PYTHON, "-c", "import time; print('ready', flush=True); time.sleep(60)"]
LIMIT_S = 10


def ready(log: bytes) -> bool:
    return b"ready" in log


def gone(pid: int) -> bool:
    """Return whether the process has ended; without an init process that reaps orphans it stays a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not gone(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_child_restarted_after_kill_reads_only_new_log_output(tmp_path: Path) -> None:
    child = Child(SAYS_READY, tmp_path / "log")
    for _ in range(2):
        child.start(ready, LIMIT_S)
        assert child.running
        child.kill()
        assert not child.running
    assert (tmp_path / "log").read_bytes().split() == [b"ready", b"ready"]


def test_child_that_ends_during_its_start_raises_with_its_log(tmp_path: Path) -> None:
    child = Child([PYTHON, "-c", "raise SystemExit('no such option')"], tmp_path / "log")
    with pytest.raises(ChildError, match="no such option"):
        child.start(ready, LIMIT_S)


def test_child_that_is_never_ready_is_killed(tmp_path: Path) -> None:
    child = Child(SAYS_READY, tmp_path / "log")
    with pytest.raises(ChildError, match="in time"):
        child.start(lambda _: False, 0.05)
    assert not child.running


def test_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    deaf = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    )
    child = Child([PYTHON, "-c", deaf], tmp_path / "log")
    child.start(ready, LIMIT_S)
    child.terminate(0.05)
    assert not child.running


def test_child_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    answers = "import signal, time; signal.signal(10, lambda *_: print('here', flush=True)); print('ready', flush=True)"
    child = Child([PYTHON, "-c", f"{answers}\nwhile True: time.sleep(60)"], log)
    thread = threading.Thread(target=child.start, args=(ready, LIMIT_S))
    thread.start()
    thread.join()
    deadline = time.monotonic() + LIMIT_S
    while (Path("/proc/self/task") / str(thread.native_id)).exists():
        assert time.monotonic() < deadline
    # A death signal from that thread would have ended the server before.
    child.send_signal(signal.SIGUSR1)
    while b"here" not in log.read_bytes():
        assert child.running
        assert time.monotonic() < deadline
    child.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG of Linux")
def test_child_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = (
        "import os, pathlib, sys\n"
        "from streamworker.demo.child import Child\n"
        "child = Child([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'],"
        " pathlib.Path(sys.argv[1]))\n"
        "child.start(lambda log: log.endswith(b'\\n'), 10)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    log = tmp_path / "log"
    killed = subprocess.run([PYTHON, "-c", parent, str(log)], check=False, timeout=LIMIT_S)
    assert killed.returncode == -signal.SIGKILL
    wait_until_gone(int(log.read_text("ascii")))


def test_free_port_is_below_the_range_of_outgoing_connections() -> None:
    port = free_port()
    assert 10_000 <= port < 32_768 or not os.path.exists("/proc/sys")  # noqa: PTH110
    assert not accepts(port)


def test_free_ports_are_different_and_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ports of one server are asked for together: asked for one by one, two of them could be the same."""
    first, second = free_ports(2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        used = server.getsockname()[1]
        monkeypatch.setattr("random.sample", lambda *_: [used, second, first])
        assert first != second
        assert free_ports(2) == [second, first]
        with pytest.raises(ChildError, match="no free port"):
            free_ports(3)


def test_child_that_is_paused_has_no_running_thread(tmp_path: Path) -> None:
    """`pause` returns when every thread has stopped, not when the signal is sent."""
    works = "import hashlib, threading\nprint('ready', flush=True)\ndata = bytes(1 << 20)\n"
    works += "def work():\n  while True: hashlib.sha256(data)\n"
    works += "for _ in range(4): threading.Thread(target=work).start()"
    child = Child([PYTHON, "-c", works], tmp_path / "log")
    child.start(ready, LIMIT_S)
    try:
        for _ in range(50):
            child.pause()
            assert set(states(child)) == {"T"}
            child.send_signal(signal.SIGCONT)
    finally:
        child.kill()


def states(child: Child) -> list[str]:
    """Return the states of a child's threads, as proc(5) has them."""
    assert child._process is not None
    tasks = Path(f"/proc/{child._process.pid}/task").glob("*/stat")
    return [task.read_text("ascii").rsplit(")", 1)[1].split()[0] for task in tasks]


def test_child_that_has_ended_is_paused_at_once(tmp_path: Path) -> None:
    child = Child([PYTHON, "-c", "print('ready', flush=True)"], tmp_path / "log")
    child.pause()
    child.start(ready, LIMIT_S)
    child.pause()
    child.kill()
    child.pause()
    assert not child.running
