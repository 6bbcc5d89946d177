"""What `python -m tests.chaos.demo` accepts as a run of the demo, and what it reports."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.chaos.demo import (
    AGAIN,
    AUDIT,
    KILLED,
    KINDS,
    LOST,
    Kind,
    Run,
    capture,
    judge,
    left_behind,
    play,
    slow,
    summary,
)
from tests.terminal import Terminal

if TYPE_CHECKING:
    from pathlib import Path

KIND = KINDS[0]
LOST_FRAME = "\n".join([KILLED, *[LOST] * 3])
AGAIN_FRAME = "\n".join([KILLED, *[f"job \x1b[36mstreaming\x1b[0m{AGAIN}\nbegan again: attempt 2"] * 3])
WHOLE = ([LOST_FRAME, AGAIN_FRAME], AUDIT, 0)


def program(frames: list[str], after: str, code: int) -> list[str]:
    """Return a program that draws frames on the alternate screen, prints a text, and ends."""
    shown = "".join(f"\x1b[H{frame}" for frame in frames)
    text = f"\x1b[?1049h{shown}\x1b[?1049l\n{after}\n"
    return [sys.executable, "-c", f"import sys; print({text!r}, end='', flush=True); sys.exit({code})"]


@pytest.mark.parametrize(
    ("frames", "after", "code", "faults"),
    [
        (*WHOLE, []),
        ([LOST_FRAME, AGAIN_FRAME], f"\x1b[1m{AUDIT}\x1b[0m", 0, []),
        ([LOST_FRAME, AGAIN_FRAME], AUDIT, 1, ["the exit code is 1"]),
        ([AGAIN_FRAME], AUDIT, 0, ["no frame shows the lost jobs"]),
        ([LOST_FRAME], AUDIT, 0, ["no frame shows the jobs that began again"]),
        (
            [LOST_FRAME.replace(KILLED, "Act 1"), AGAIN_FRAME.replace(KILLED, "Act 1")],
            AUDIT,
            0,
            ["the kill is not announced"],
        ),
        (
            [LOST_FRAME, AGAIN_FRAME],
            AUDIT.replace("0 breaches", "1 breaches"),
            0,
            ["the audit does not confirm the endings"],
        ),
        (*WHOLE[:1], f"{AUDIT}\nTraceback (most recent call last):", 0, ["there is a traceback"]),
        (
            [],
            "",
            130,
            [
                "the exit code is 130",
                "the kill is not announced",
                "no frame shows the lost jobs",
                "no frame shows the jobs that began again",
                "the audit does not confirm the endings",
            ],
        ),
    ],
)
def test_run_is_sound_only_if_every_claim_was_on_the_screen(
    frames: list[str], after: str, code: int, faults: list[str]
) -> None:
    """Each claim that does not hold is named."""
    with Terminal(program(frames, after, code), KIND.columns, KIND.lines, draws=False) as terminal:
        assert judge(terminal, terminal.finish(20)) == faults


def test_capture_is_a_frame_after_the_kill_with_visible_escape_characters() -> None:
    """It is taken where all jobs of the killed worker have begun again, and keeps the colours as text."""
    later = [f"{AGAIN_FRAME}\nframe {number}" for number in range(20)]
    with Terminal(program([LOST_FRAME, *later], AUDIT, 0), KIND.columns, KIND.lines, draws=False) as terminal:
        terminal.finish(20)
    text = capture(terminal)

    assert text.splitlines() == [*AGAIN_FRAME.replace("\x1b", r"\e").split("\n"), "frame 12"]


def test_capture_of_a_run_without_a_kill_is_empty() -> None:
    """The report says what was not seen."""
    with Terminal(program([LOST_FRAME], AUDIT, 0), KIND.columns, KIND.lines, draws=False) as terminal:
        terminal.finish(20)

    assert capture(terminal) == ""


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_run_has_the_terminal_of_its_kind(tmp_path: Path, kind: Kind) -> None:
    """Size, NO_COLOR, and a folder of its own for temporary files."""
    code = (
        "import os, tempfile\n"
        "size = os.get_terminal_size()\n"
        "print('\\x1b[?1049l', size.columns, size.lines, os.environ.get('NO_COLOR'), tempfile.gettempdir(), ' streaming')\n"
        f"assert [size.columns, size.lines, os.environ.get('NO_COLOR')] == [{kind.columns}, {kind.lines}, {None if kind.has_colour else '1'!r}]\n"
        "assert 'streamworker-demo-run-' in tempfile.gettempdir()\n"
    )
    run, frame = play([sys.executable, "-c", code], kind, tmp_path, {})

    assert (run.kind, run.code, frame) == (kind, 0, "")
    assert run.first_delta_s is not None
    assert 0 < run.first_delta_s <= run.seconds < 20


def test_run_that_leaves_a_file_and_a_process_is_a_breach(tmp_path: Path) -> None:
    """Processes are found by their folder of temporary files, whatever their parent is."""
    (tmp_path / "broker").touch()
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", "input()"], env=environ, stdin=subprocess.PIPE) as process:
        found = left_behind(tmp_path)
        process.communicate(b"\n")

    assert found == [f"left: {sys.executable} -c input()", "left: broker"]
    (tmp_path / "broker").unlink()
    assert left_behind(tmp_path) == []


def runs(*first_deltas: float | None) -> list[Run]:
    return [Run(KIND, 0, first, 20.0, []) for first in first_deltas]


@pytest.mark.parametrize(
    ("first_deltas", "is_fresh", "late"),
    [
        ((24.9, 4.9), True, []),
        (
            (25.1, 5.1),
            True,
            [
                "run 1: first delta after 25.1 s, more than 25 s",
                "run 2: first delta after 5.1 s, more than 5 s",
            ],
        ),
        ((5.1, 4.9), False, ["run 1: first delta after 5.1 s, more than 5 s"]),
        ((None,), False, []),
    ],
)
def test_first_delta_has_a_limit(
    first_deltas: tuple[float | None, ...], late: list[str], *, is_fresh: bool
) -> None:
    """A longer one only for the first run of a fresh clone."""
    assert slow(runs(*first_deltas), is_fresh=is_fresh) == late


def test_summary_has_the_figures_of_the_report() -> None:
    """Sound runs, and the times of the first delta; the first run of a fresh clone apart."""
    several = [*runs(13.0, 2.0, 3.0, 2.5), Run(KIND, 1, None, 20.0, ["the exit code is 1"])]

    assert summary(several, is_fresh=True) == (
        "4 of 5 runs: the kill is seen, every job ends once, and nothing is left; first delta of the first run, with empty "
        "package caches, 13.0 s; first delta of the others: median 2.5 s, at most 3.0 s"
    )
    assert summary(runs(2.0), is_fresh=False).endswith("first delta of the runs: median 2.0 s, at most 2.0 s")
    assert several[-1].line() == "80x24            no delta,  20.0 s in all, exit code 1: the exit code is 1"
