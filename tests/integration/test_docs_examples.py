"""Run the examples of the docs against a worker and a broker."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sys
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamworker.practice import expected_text
from tests.brokers.requirement import need
from tests.integration.batches import request, write_lines
from tests.integration.gateways import gateway
from tests.terminal import Terminal

if TYPE_CHECKING:
    import pytest

    from tests.integration.stage import Stage

ROOT = Path(__file__).parents[2]


def blocks(page: str, language: str = "python") -> list[str]:
    """Return the examples of a page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def execute(page: str, code: str) -> dict[str, Any]:
    """Execute code of a page; return the names that it defines."""
    names: dict[str, Any] = {}
    exec(compile(code, page, "exec"), names)
    return names


async def test_reader_example_yields_the_texts_of_jobs_that_ended(stage: Stage) -> None:
    """The reader in docs/delivery.md returns each job's terminal event and text, also of a restarted job."""
    await stage.open()
    model, broken = "practice?deltas=6", "practice?deltas=6&break_after=3&times=1"
    (code,) = blocks("docs/delivery.md")
    answers = execute("docs/delivery.md", code)["answers"]
    async with stage.worker():
        jobs = {
            "plain": await stage.submit("plain", model),
            "restarted": await stage.submit("restarted", broken, on_break="restart"),
        }
        found: dict[str, tuple[str, str]] = {}
        async with (
            asyncio.timeout(30),
            aclosing(answers(stage.broker.bootstrap, stage.events_topic)) as ended,
        ):
            async for job_id, event, text in ended:
                found[job_id] = (event["status"], text)
                if len(found) == len(jobs):
                    break

    assert found == {
        "plain": ("completed", *expected_text(model, jobs["plain"].messages)),
        "restarted": ("completed", *expected_text(broken, jobs["restarted"].messages)),
    }


async def test_client_example_prints_the_deltas_of_a_job_and_the_results_of_many(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program of the README runs as it is, with fewer jobs; it has at most ten lines."""
    await stage.open()
    for name, value in stage.variables.items():
        monkeypatch.setenv(f"STREAMWORKER_{name}", value)
    model, (code, _) = "practice?deltas=6", blocks("README.md")
    assert len([line for line in code.splitlines() if line]) <= 10
    assert code.count("apertus-70b-instruct") == code.count("range(1000)") == 1
    code = code.replace("apertus-70b-instruct", model).replace("range(1000)", "range(20)")
    async with stage.worker():
        await asyncio.to_thread(execute, "README.md", code)
    out = capsys.readouterr().out  # with the log lines of the worker
    texts = [expected_text(model, [message(n)])[0] for n in range(20)]

    assert expected_text(model, [{"role": "user", "content": "Conta da 1 a 10."}])[0] in out
    assert all(f" completed {text} " in out for text in texts)


async def test_gateway_examples_of_the_readme_print_the_answer(apache: Stage, tmp_path: Path) -> None:
    """The `curl` line and the program with OpenAI's client run as they are, but for the port."""
    if shutil.which("curl") is None:
        need("curl is not on the PATH")
    await apache.open()
    (curl,) = re.findall(r"^\$ (curl .+)$", "".join(blocks("README.md", "console")), re.MULTILINE)
    _, code = blocks("README.md")
    assert (
        len([line for line in code.splitlines() if not line.startswith(("from ", "import ")) and line]) <= 5
    )
    program = tmp_path / "streamworker"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m streamworker "$@"\n')
    program.chmod(0o755)
    environ = {
        **os.environ,
        **apache._environment({}),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    async with apache.worker(), gateway(apache, gateway__auth="off", gateway__port=0) as served:
        here = f"localhost:{served.port}"
        events, text = await asyncio.gather(
            printed("bash", "-ec", curl.replace("localhost:8088", here), environ=environ),
            printed(sys.executable, "-c", code.replace("localhost:8088", here), environ=environ),
        )
    (expected,) = expected_text("apertus-70b-instruct", [{"role": "user", "content": "Conta da 1 a 10."}])
    data = [json.loads(line[6:]) for line in events.split("\n") if line.startswith("data: ")]

    assert text == expected
    assert [data[0]["type"], data[-1]["type"], data[-1]["status"]] == ["started", "usage", "completed"]
    assert "".join(event.get("delta", {}).get("content") or "" for event in data) == expected


async def test_batch_example_of_the_readme_shows_the_lines_of_a_real_run(
    apache: Stage, tmp_path: Path
) -> None:
    """Its lines are those of the command, but for the figures; the line of the progress too."""
    await apache.open(results_topic=f"{apache.events_topic}.results")
    (block,) = [text for text in blocks("README.md", "") if "$ streamworker batch" in text]
    command, *shown = block.splitlines()
    lines = [request(f"square-{n}", "practice?deltas=10&pace_ms=50") for n in range(20)]
    file = write_lines(tmp_path / command.split()[-1], lines)
    start = [sys.executable, "-m", "streamworker", *command.split()[2:-1], str(file)]
    async with apache.worker(worker__max_in_flight=4):
        with Terminal(start, 110, 24, environ=apache._environment({}), draws=False) as terminal:
            code = await asyncio.to_thread(terminal.finish, 60)
    real = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.raw.decode())

    assert code == 0, real
    for line in shown:
        assert shape(line) in {shape(part) for part in re.split(r"[\r\n]+", real)}, real


def shape(line: str) -> str:
    """Return a line of the progress without its figures."""
    figures = re.sub(r"[\d.,:]+k?", "1", re.sub(r"[━╸╺]+", "━", line))
    return " ".join(figures.split())


async def printed(*command: str, environ: dict[str, str]) -> str:
    """Run a program to its end; return what it printed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environ,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, err.decode()
    return out.decode()


def message(n: int) -> dict[str, str]:
    """Return the message of one of the many jobs."""
    return {"role": "user", "content": f"Quanto fa {n} per {n}?"}
