"""The demo, many times over: `python -m tests.chaos.demo --runs 20`, in terminals of two sizes, with and without colour.

Each run checks that the kill is seen, that the jobs of the killed worker begin again on the screen, that the audit finds no breach,
and that no file and no process is left. With --fresh it runs `make demo` in a new clone, whose first run finds empty package caches.
With --captures FOLDER it writes a frame of each kind of terminal, soon after the kill.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import click

from tests.terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["KINDS", "Kind", "Run", "capture", "judge", "play"]

ROOT = Path(__file__).parents[2]
FIRST_LIMIT_S = 25.0
"""Time to the first delta of a first run, which installs packages."""

LATER_LIMIT_S = 5.0
"""Time to the first delta of every other run."""

KILLED = "Act 2 of 3: worker B is killed"
LOST = "worker B was killed"
AGAIN = ", attempt 2"
"""In the title of a panel; its text repeats the words."""
VICTIMS = 3
"""Jobs of the worker that is killed."""

AUDIT = "audit: 8 jobs, 8 endings, 3 attempts superseded, 0 breaches"
LIMIT_S = 180.0
_LATER_FRAMES = 12  # after the last panel that begins again, so that its text has begun
_LEFT_S = 5.0


class Kind(NamedTuple):
    """A kind of terminal."""

    columns: int
    lines: int
    has_colour: bool

    @property
    def name(self) -> str:
        """Name of its capture, without a suffix."""
        return f"{self.columns}x{self.lines}{'' if self.has_colour else '-nocolour'}"


KINDS = [Kind(columns, lines, colour) for colour in (True, False) for columns, lines in ((80, 24), (140, 40))]


class Run(NamedTuple):
    """The results of one run of the demo. `first_delta_s` is None if no delta was seen."""

    kind: Kind
    code: int
    first_delta_s: float | None
    seconds: float
    breaches: list[str]

    def line(self) -> str:
        """Return the run as a line of the report."""
        first = "no delta" if self.first_delta_s is None else f"first delta {self.first_delta_s:5.2f} s"
        verdict = "; ".join(self.breaches) or "kill seen, audit without breaches, nothing left"
        return f"{self.kind.name:<16} {first}, {self.seconds:5.1f} s in all, exit code {self.code}: {verdict}"


def judge(terminal: Terminal, code: int) -> list[str]:
    """Return what a finished run of the demo should have shown and has not."""
    screens = ["\n".join(screen.display) for screen in terminal.frames()]
    after = re.sub(r"\x1b\[[0-9;]*m", "", terminal.after)
    checks = {
        f"the exit code is {code}": code == 0,
        "the kill is not announced": any(KILLED in screen for screen in screens),
        "no frame shows the lost jobs": any(screen.count(LOST) == VICTIMS for screen in screens),
        "no frame shows the jobs that began again": any(screen.count(AGAIN) == VICTIMS for screen in screens),
        "the audit does not confirm the endings": AUDIT in after,
        "there is a traceback": b"Traceback" not in terminal.raw,
    }
    return [fault for fault, holds in checks.items() if not holds]


def capture(terminal: Terminal) -> str:
    r"""Return the frame that a visitor sees soon after the kill, as text; an escape character is `\e`."""
    shown = terminal.raw.rpartition(b"\x1b[?1049l")[0].decode(errors="replace")
    frames = shown.split("\x1b[H")
    drawn = zip(frames, terminal.frames(), strict=False)
    begun = [
        number
        for number, (_, screen) in enumerate(drawn)
        if "\n".join(screen.display).count(AGAIN) == VICTIMS
    ]
    if not begun:
        return ""
    frame = frames[min(begun[0] + _LATER_FRAMES, begun[-1])]
    lines = re.sub(r"\x1b\[\??\d*[A-HJKlh]", "", frame).replace("\r", "").split("\n")
    return "".join(line.rstrip().replace("\x1b", r"\e") + "\n" for line in lines)


def play(command: Sequence[str], kind: Kind, folder: Path, variables: dict[str, str]) -> tuple[Run, str]:
    """Run the demo once in a terminal; return the run and its capture."""
    with tempfile.TemporaryDirectory(prefix="streamworker-demo-run-") as temporary:
        environ = {**variables, "TMPDIR": temporary, **({} if kind.has_colour else {"NO_COLOR": "1"})}
        size = kind.columns, kind.lines
        with Terminal(command, *size, environ=environ, folder=folder, draws=False) as terminal:
            first = _first_delta_s(terminal)
            code = terminal.finish(LIMIT_S)
            seconds = terminal.seconds
        breaches = judge(terminal, code) + left_behind(Path(temporary))
        return Run(kind, code, first, seconds, breaches), capture(terminal)


def _first_delta_s(terminal: Terminal) -> float | None:
    while b" streaming" not in terminal.raw and b"mstreaming" not in terminal.raw:
        if not terminal.read(0.02) or terminal.seconds > LIMIT_S:
            return None
    return terminal.seconds


def left_behind(folder: Path) -> list[str]:
    """Return the files in the run's folder of temporary files, and the processes that have it in their environment."""
    limit = time.monotonic() + _LEFT_S  # a process that was killed takes a moment to end
    while (running := _processes(folder)) and time.monotonic() < limit:
        time.sleep(0.1)
    return [f"left: {name}" for name in [*running, *(path.name for path in folder.iterdir())]]


def _processes(folder: Path) -> list[str]:
    found, mark = [], f"TMPDIR={folder}\0".encode()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in environ.read_bytes() + b"\0":
                found.append(environ.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
        except OSError:  # of another user, or it has ended
            continue
    return found


def slow(runs: Sequence[Run], *, is_fresh: bool) -> list[str]:
    """Return the runs whose first delta came too late. The first run of a fresh clone installs packages."""
    found = []
    for number, run in enumerate(runs):
        limit = FIRST_LIMIT_S if is_fresh and number == 0 else LATER_LIMIT_S
        if run.first_delta_s is not None and run.first_delta_s > limit:
            found.append(
                f"run {number + 1}: first delta after {run.first_delta_s:.1f} s, more than {limit:g} s"
            )
    return found


def summary(runs: Sequence[Run], *, is_fresh: bool) -> str:
    """Return the figures of all runs."""
    sound = sum(not run.breaches for run in runs)
    text = f"{sound} of {len(runs)} runs: the kill is seen, every job ends once, and nothing is left"
    times = [run.first_delta_s for run in runs if run.first_delta_s is not None]
    if is_fresh and times:
        text += f"; first delta of the first run, with empty package caches, {times.pop(0):.1f} s"
    if times:
        text += f"; first delta of the {'others' if is_fresh else 'runs'}: median {median(times):.1f} s, at most {max(times):.1f} s"
    return text


def _clone(folder: Path) -> tuple[list[str], Path, dict[str, str]]:
    """Clone the last commit; return the command of the demo, the folder of the clone, and variables with empty package caches."""
    clone = folder / "streamworker"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True, timeout=60)
    caches = {"PIP_CACHE_DIR": str(folder / "pip"), "UV_CACHE_DIR": str(folder / "uv")}
    return ["make", "demo"], clone, {**caches, "PYTHONPATH": ""}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.demo", description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--fresh", action="store_true", help="run `make demo` in a new clone")
    parser.add_argument(
        "--captures", type=Path, metavar="FOLDER", help="write a frame of each kind of terminal"
    )
    arguments = parser.parse_args()
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="streamworker-demo-chaos-") as temporary:
        command = [sys.executable, "-m", "streamworker", "demo"]
        folder, variables = ROOT, {"PYTHONPATH": str(ROOT)}
        if arguments.fresh:
            command, folder, variables = _clone(Path(temporary))
        for number in range(arguments.runs):
            run, frame = play(command, KINDS[number % len(KINDS)], folder, variables)
            runs.append(run)
            click.echo(f"{number + 1:>3} {run.line()} (load {os.getloadavg()[0]:.1f})")
            if arguments.captures is not None:
                arguments.captures.mkdir(parents=True, exist_ok=True)
                (arguments.captures / f"{run.kind.name}.txt").write_text(frame)
    late = slow(runs, is_fresh=arguments.fresh)
    click.echo("\n".join([summary(runs, is_fresh=arguments.fresh), *late]))
    return bool(late or any(run.breaches for run in runs))


if __name__ == "__main__":
    sys.exit(main())
