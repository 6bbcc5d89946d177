"""Run the examples of the docs against a worker and a broker."""

from __future__ import annotations

import asyncio
import re
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamworker.practice import expected_text

if TYPE_CHECKING:
    import pytest

    from tests.integration.stage import Stage

ROOT = Path(__file__).parents[2]


def code_of(page: str) -> str:
    """Return the Python example of a page."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert isinstance(code, str)
    return code


def execute(page: str, code: str) -> dict[str, Any]:
    """Execute code of a page; return the names that it defines."""
    names: dict[str, Any] = {}
    exec(compile(code, page, "exec"), names)
    return names


async def test_reader_example_yields_the_texts_of_jobs_that_ended(stage: Stage) -> None:
    """The reader in docs/delivery.md returns each job's terminal event and text, also of a restarted job."""
    await stage.open()
    model, broken = "practice?deltas=6", "practice?deltas=6&break_after=3&times=1"
    answers = execute("docs/delivery.md", code_of("docs/delivery.md"))["answers"]
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
    model, code = "practice?deltas=6", code_of("README.md")
    assert len([line for line in code.splitlines() if line]) <= 10
    assert code.count("apertus-70b-instruct") == code.count("range(1000)") == 1
    code = code.replace("apertus-70b-instruct", model).replace("range(1000)", "range(20)")
    async with stage.worker():
        await asyncio.to_thread(execute, "README.md", code)
    out = capsys.readouterr().out  # with the log lines of the worker
    texts = [expected_text(model, [message(n)])[0] for n in range(20)]

    assert expected_text(model, [{"role": "user", "content": "Conta da 1 a 10."}])[0] in out
    assert all(f" completed {text} " in out for text in texts)


def message(n: int) -> dict[str, str]:
    """Return the message of one of the many jobs."""
    return {"role": "user", "content": f"Quanto fa {n} per {n}?"}
