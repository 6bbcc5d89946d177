"""The demo from its first line to its account: as lines, and in terminals of two sizes."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("noida_db", reason="needs the demo extra")

from rich.console import Console

from streamworker.demo.play import play
from tests.terminal import Terminal

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "streamworker", "demo"]
SIZES = [(80, 24), (140, 40)]

pytestmark = pytest.mark.embedded


def children() -> list[str]:
    """Return the command lines of the processes that this process started and that run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"PPid:\t{os.getpid()}\n" in status.read_text() and "State:\tZ" not in status.read_text():
                found.append(status.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def left_in(folder: Path) -> list[str]:
    """Return the names in a folder."""
    return [path.name for path in folder.iterdir()]


def environ(tmp_path: Path, **variables: str) -> dict[str, str]:
    return {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT), **variables}


@pytest.mark.timeout(120)
async def test_demo_kills_a_worker_and_every_job_ends_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three jobs begin again, the others go on, and the audit finds nothing. No file and no process is left."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = children()
    console = Console(file=io.StringIO(), force_terminal=False, width=100, highlight=False)
    code = await play(model=None, console=console, speed=2)
    text = console.file.getvalue()  # type: ignore[attr-defined]

    assert code == 0
    assert "\x1b" not in text
    for name in ("german", "japanese", "greek"):
        assert re.search(rf"^{name} +began again: attempt 2 on worker B$", text, re.MULTILINE)
        assert re.search(rf"^{name} +completed .* 2  began again, attempt 2$", text, re.MULTILINE)
    for name in ("italian", "tool"):
        assert re.search(rf"^{name} +completed .* 1 *$", text, re.MULTILINE)
    assert "audit: 8 jobs, 8 endings, 3 attempts superseded, 0 breaches" in text
    assert "demo --stay" in text
    assert (left_in(tmp_path), children()) == ([], before)


@pytest.mark.timeout(60)
def test_demo_in_a_terminal_shows_every_job_and_restores_the_screen_when_it_is_stopped(
    tmp_path: Path,
) -> None:
    """The first delta is on the screen within the time that processes need to start."""
    with Terminal(COMMAND, 80, 24, environ=environ(tmp_path), folder=tmp_path) as terminal:
        terminal.until(lambda: "streaming" in terminal.text, 30)
        terminal.until(lambda: "rejected" in terminal.text and "failed" in terminal.text, 10)
        assert terminal.text.count("╭") == terminal.text.count("╯") == 8
        assert "Act 1 of 3" in terminal.text
        terminal.process.terminate()
        assert terminal.finish(20) == 130
    assert "stopped; every process has ended" in terminal.after
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.timeout(120)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("colour", [True, False], ids=["colour", "without colour"])
def test_demo_fits_the_terminal_in_every_frame(
    tmp_path: Path, size: tuple[int, int], *, colour: bool
) -> None:
    """The borders of all panels stay where they are, through the kill and until the account."""
    width, _ = size
    panel = width // (width // 38)
    variables = {} if colour else {"NO_COLOR": "1"}
    with Terminal(
        COMMAND, *size, environ=environ(tmp_path, **variables), folder=tmp_path, draws=False
    ) as terminal:
        assert terminal.finish(60) == 0
    acts: set[str] = set()
    frames = 0
    for screen in terminal.frames(every=4):
        for number, line in enumerate(screen.display):
            if line[0] in "╭│╰":
                edges = [screen.buffer[number][x].data for x in range(panel - 1, width, panel)]
                assert set(edges) <= set("╮│╯ "), "\n".join(screen.display)
                assert edges[0] != " ", "\n".join(screen.display)
        frames += 1
        acts.update(re.findall(r"Act \d", screen.display[1]))

    assert acts == {"Act 1", "Act 2"}
    assert frames > 20
    assert "8 jobs, 8 endings" in terminal.after
    assert bool(re.search(rb"\x1b\[[0-9;]*3[1-7]m", terminal.raw)) == colour


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["demo", "--modle", "x"], "--modle"),
        (["demo", "--model", "x"], "set STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL"),
        (["--config", "worker.toml", "demo"], "the demo reads no configuration file"),
    ],
)
def test_demo_refuses_options_that_are_unknown_or_have_no_effect(options: list[str], message: str) -> None:
    """As every command: it is bad usage, and nothing is started."""
    done = subprocess.run(
        [*COMMAND[:-1], *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env=os.environ | {"PYTHONPATH": str(ROOT), "STREAMWORKER_CONFIG": "ignored.toml"},
    )

    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""
