"""Run the examples of the docs against a worker and a broker."""

from __future__ import annotations

import asyncio
import re
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamworker.practice import expected_text

if TYPE_CHECKING:
    from tests.integration.stage import Stage

DOCS = Path(__file__).parents[2] / "docs"


def example(page: str) -> dict[str, Any]:
    """Execute the Python example of a page; return the names that it defines."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, page, "exec"), names)
    return names


async def test_reader_example_yields_the_texts_of_jobs_that_ended(stage: Stage) -> None:
    """The reader in docs/delivery.md returns each job's terminal event and text, also of a restarted job."""
    await stage.open()
    model, broken = "practice?deltas=6", "practice?deltas=6&break_after=3&times=1"
    answers = example("delivery.md")["answers"]
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
