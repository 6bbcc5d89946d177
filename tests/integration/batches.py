"""Batch files, and the command as a process, for the tests of `streamworker batch`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from openai.types.chat import ChatCompletion

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from tests.integration.stage import Stage

__all__ = [
    "Command",
    "Files",
    "calls_by_prompt",
    "lines_of",
    "request",
    "run_batch",
    "start_batch",
    "write_lines",
]

LIMIT_S = 60.0


def request(custom_id: str, model: str = "practice?deltas=2", **members: Any) -> dict[str, Any]:
    """Return a line. The prompt contains the custom id, so that upstream calls can be assigned to lines."""
    body = {"model": model, "messages": [{"role": "user", "content": f"prompt of {custom_id}"}], **members}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> Path:
    """Write a batch file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Read a batch file; none if it does not exist."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line] if path.exists() else []


class Files(NamedTuple):
    """The files of one batch."""

    input: Path
    output: Path
    errors: Path

    @classmethod
    def of(cls, directory: Path, name: str = "requests") -> Files:
        return cls(
            directory / f"{name}.jsonl",
            directory / f"{name}.out.jsonl",
            directory / f"{name}.out.errors.jsonl",
        )

    @property
    def record(self) -> Path:
        return self.output.with_name(f"{self.output.name}.run.json")

    @property
    def part(self) -> Path:
        return self.output.with_name(f"{self.output.name}.part")

    def leftovers(self) -> list[str]:
        """Return the names of files that a finished run must not leave."""
        known = {self.input.name, self.output.name, self.errors.name}
        return sorted(path.name for path in self.input.parent.iterdir() if path.name not in known)

    def check(self, ids: Iterable[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Assert that every line is in exactly one file, in the shapes of the OpenAI Batch API; return both files."""
        completed, failed = lines_of(self.output), lines_of(self.errors)
        found = Counter(line["custom_id"] for line in (*completed, *failed))
        assert found == Counter(ids), (found - Counter(ids), Counter(ids) - found)
        for line in completed:
            assert line["error"] is None
            assert line["response"]["status_code"] == 200
            ChatCompletion.model_validate(line["response"]["body"], strict=True)
        for line in failed:
            assert line["error"]["code"]
            assert line["error"]["message"]
        return completed, failed


def calls_by_prompt(stage: Stage) -> Counter[str]:
    """Return the number of upstream calls by prompt."""
    return Counter(call.body["messages"][0]["content"] for call in stage.practice.calls if call.body)


class Command:
    """A process of the command whose standard error is read as it comes."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self.child = child
        self.text = ""
        self.output = b""
        self._reading = [asyncio.create_task(self._read_errors())]
        if child.stdout is not None:
            self._reading.append(asyncio.create_task(self._read_output()))

    async def _read_errors(self) -> None:
        assert self.child.stderr is not None
        while chunk := await self.child.stderr.read(4096):
            self.text += chunk.decode()

    async def _read_output(self) -> None:
        assert self.child.stdout is not None
        while chunk := await self.child.stdout.read(65536):
            self.output += chunk

    async def says(self, text: str, limit_s: float = LIMIT_S) -> None:
        """Wait until standard error contains a text."""
        try:
            async with asyncio.timeout(limit_s):
                while text not in self.text:
                    assert self.child.returncode is None, self.text
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"no {text!r} in {limit_s} s: {self.text}") from None

    async def ends(self, limit_s: float = LIMIT_S) -> int:
        """Wait for the end of the process; return its exit code."""
        try:
            async with asyncio.timeout(limit_s):
                code = await self.child.wait()
        except TimeoutError:
            raise AssertionError(f"still running after {limit_s} s: {self.text}") from None
        await asyncio.gather(*self._reading)
        return code

    def send(self, number: int) -> None:
        self.child.send_signal(number)

    async def kill(self) -> None:
        """Kill the process with SIGKILL and wait for it."""
        with contextlib.suppress(ProcessLookupError):
            self.child.kill()
        await self.ends()


async def start_batch(
    stage: Stage, *arguments: str | Path, stdin: int | None = None, prelude: str = "", **over: object
) -> Command:
    """Start `streamworker batch` in a process. `over` are settings; `prelude` is Python code that runs before."""
    environment = {**os.environ, **stage._environment(over)}
    code = f"{prelude}\nfrom streamworker.cli import main; main()"
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, "batch", *map(str, arguments)),
        env=environment,
        stdin=asyncio.subprocess.DEVNULL if stdin is None else stdin,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    return Command(child)


async def run_batch(stage: Stage, *arguments: str | Path, **over: Any) -> tuple[int, str]:
    """Run the command to its end; return exit code and standard error."""
    command = await start_batch(stage, *arguments, **over)
    return await command.ends(), command.text
