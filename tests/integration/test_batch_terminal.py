"""`streamworker batch` on a pseudo-terminal, under nohup, and in a pipe, on Apache Kafka."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import re
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from tests.integration.batches import Command, Files, lines_of, request, write_lines
from tests.integration.stage import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.stage import Stage

SLOW = "practice?deltas=4&pace_ms=300"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A process whose standard input, output and error are a pseudo-terminal of its own session."""

    def __init__(self, child: asyncio.subprocess.Process, descriptor: int) -> None:
        self.child = child
        self._descriptor = descriptor
        self._bytes = b""
        asyncio.get_running_loop().add_reader(descriptor, self._read)

    @property
    def text(self) -> str:
        return _ESCAPES.sub("", self._bytes.decode(errors="replace"))

    def _read(self) -> None:
        try:
            self._bytes += os.read(self._descriptor, 65536)
        except OSError:  # the process has ended
            asyncio.get_running_loop().remove_reader(self._descriptor)

    def press_ctrl_c(self) -> None:
        """Let the terminal send SIGINT to its foreground process."""
        os.write(self._descriptor, b"\x03")

    async def ends(self) -> int:
        code = await asyncio.wait_for(self.child.wait(), 60)
        asyncio.get_running_loop().remove_reader(self._descriptor)
        with contextlib.suppress(OSError):
            while more := os.read(self._descriptor, 65536):
                self._bytes += more
        os.close(self._descriptor)
        return code


async def start_on_terminal(stage: Stage, *arguments: str | Path) -> Terminal:
    ours, theirs = pty.openpty()
    code = "import os, fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\nfrom streamworker.cli import main; main()"
    environment = {**os.environ, **stage._environment({}), "TERM": "xterm", "COLUMNS": "160"}
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, "batch", *map(str, arguments)),
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    return Terminal(child, ours)


async def prepared(stage: Stage, directory: Path, model: str, count: int) -> Files:
    await stage.open(partitions=2, results_topic=f"{stage.events_topic}.results")
    files = Files.of(directory)
    write_lines(files.input, (request(f"request-{number}", model) for number in range(count)))
    return files


async def test_batch_on_a_terminal_draws_a_bar(apache: Stage, tmp_path: Path) -> None:
    """With its numbers, and the final lines below it."""
    files = await prepared(apache, tmp_path, SLOW, 12)
    async with apache.worker():
        terminal = await start_on_terminal(apache, files.input, "--window", "4")
        code = await terminal.ends()

    assert code == 0, terminal.text
    assert "━" in terminal.text
    assert re.search(r"\d+/12 +\d+ % · 0 failed · \d in flight · \d+\.\d lines/s", terminal.text), (
        terminal.text
    )
    assert "12 lines: 12 completed, 0 failed" in terminal.text


async def test_batch_on_a_terminal_takes_ctrl_c_once_and_twice(apache: Stage, tmp_path: Path) -> None:
    """The first one waits, the second one cancels; the cursor is shown again."""
    files = await prepared(apache, tmp_path, "practice?deltas=9999&pace_ms=50", 9)
    async with apache.worker():
        terminal = await start_on_terminal(apache, files.input, "--window", "3")
        await eventually(lambda: apache.practice.open_streams == 3, what=lambda: terminal.text)
        terminal.press_ctrl_c()
        await eventually(lambda: "stopping: 3 in flight; Ctrl-C again cancels them" in terminal.text)
        assert apache.practice.open_streams == 3
        terminal.press_ctrl_c()
        code = await terminal.ends()

    assert code == 130, terminal.text
    assert len(lines_of(files.errors.with_name(f"{files.errors.name}.part"))) == 3
    assert terminal._bytes.rstrip().rfind(b"\x1b[?25h") > terminal._bytes.rfind(b"\x1b[?25l")


@pytest.mark.long
async def test_batch_under_nohup_survives_its_terminal(apache: Stage, tmp_path: Path) -> None:
    """SIGHUP is ignored as nohup asks; without nohup it is a SIGTERM. Lines, and no bar, are in the log."""
    files = await prepared(apache, tmp_path, SLOW, 12)
    for prefix, codes in (("signal.SIG_IGN", {0}), ("signal.SIG_DFL", {3})):
        code = f"import signal; signal.signal(signal.SIGHUP, {prefix})\nfrom streamworker.cli import main; main()"
        async with apache.worker():
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", code, "batch", str(files.input), "--window", "4", "--overwrite"),
                env={**os.environ, **apache._environment({})},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            command, calls = Command(child), len(apache.practice.calls)
            await eventually(lambda: len(apache.practice.calls) > calls, what=lambda: command.text)  # noqa: B023
            command.send(signal.SIGHUP)
            assert await command.ends() in codes, command.text
        assert "\x1b" not in command.text
        assert command.output == b""


@pytest.mark.long
async def test_batch_whose_reader_has_ended_stops(apache: Stage, tmp_path: Path) -> None:
    """As `| head -1`: the next start with the same name writes everything again, and pays nothing twice."""
    files = await prepared(apache, tmp_path, SLOW, 8)
    async with apache.worker():
        reader, writer = os.pipe()
        arguments = ("batch", str(files.input), "-o", "-", "--batch-id", "pipe", "--window", "2")
        main = "from streamworker.cli import main; main()"
        environment = {**os.environ, **apache._environment({})}
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", main, *arguments),
            env=environment,
            stdout=writer,
            stderr=asyncio.subprocess.PIPE,
        )
        os.close(writer)
        os.close(reader)
        command = Command(child)
        assert await command.ends() == 3, command.text
        assert "standard output cannot be written" in command.text
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", main, *arguments),
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        command = Command(child)
        assert await command.ends() == 0, command.text

    assert len(command.output.splitlines()) == 8
    assert len(apache.practice.calls) == 8


async def test_batch_that_waits_for_its_input_is_interrupted_at_once(apache: Stage, tmp_path: Path) -> None:
    """Standard input stays open; nothing was sent."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from streamworker.cli import main; main()", "batch", "-"),
        env={**os.environ, **apache._environment({})},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    command = Command(child)
    await command.says("reading standard input")
    command.send(signal.SIGINT)

    assert await command.ends(10) == 130, command.text
    assert "interrupted; nothing was sent" in command.text
