"""The examples of docs/pipelines.md that read results, on Apache Kafka."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.brokers.apache import fetched
from tests.integration.test_brokers import create, producer

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.brokers.apache import ApacheKafka

ROOT = Path(__file__).parents[2]
EXPECTED = [("j0", "completed", "answer 0"), ("j1", "failed", None), ("j2", "completed", "answer 2")]


def blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a page in one language."""
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def result(job_id: str, status: str, text: str | None) -> bytes:
    """Return the value of a result record."""
    message = {"role": "assistant", "content": text}
    completion = {"choices": [{"index": 0, "message": message}]} if text else None
    return json.dumps(
        {"type": "result", "job_id": job_id, "status": status, "completion": completion}
    ).encode()


async def write_results(broker: ApacheKafka, topic: str, transactional_id: str) -> None:
    """Write a result in a transaction that is rolled back, then the expected results and a tombstone."""
    await create(broker, topic)
    async with producer(broker, transactional_id=transactional_id) as client:
        for is_kept in (False, True):
            await client.begin_transaction()
            for row in EXPECTED if is_kept else [("j9", "completed", "rolled back")]:
                await client.send_and_wait(topic, result(*row), key=row[0].encode())
            if is_kept:
                await client.send_and_wait(topic, None, key=b"erased")
            await (client.commit_transaction() if is_kept else client.abort_transaction())


async def test_pipelines_python_example_yields_committed_results(
    apache_kafka: ApacheKafka, topics: Callable[[str], str]
) -> None:
    """The id, the status and the text of each."""
    topic = topics("results")
    await write_results(apache_kafka, topic, topics("tx"))
    names: dict[str, Any] = {}
    exec(compile(blocks("docs/pipelines.md", "python")[0], "pipelines.md", "exec"), names)
    found = []
    async with (
        asyncio.timeout(30),
        aclosing(names["results"](apache_kafka.bootstrap, topic, topics("group"))) as results,
    ):
        async for row in results:
            found.append(row)
            if len(found) == len(EXPECTED):
                break

    assert found == EXPECTED


async def test_pipelines_java_example_prints_committed_results(
    apache_kafka: ApacheKafka, topics: Callable[[str], str], tmp_path: Path
) -> None:
    """Compiled and run with the jars of the broker."""
    topic = topics("results")
    await write_results(apache_kafka, topic, topics("tx"))
    source = tmp_path / "Results.java"
    source.write_text(blocks("docs/pipelines.md", "java")[0])
    java = await asyncio.create_subprocess_exec(
        *(
            shutil.which("java") or "java",
            "-cp",
            f"{fetched()}/*",
            str(source),
            apache_kafka.bootstrap,
            topic,
        ),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert java.stdout is not None
    lines: list[str] = []
    try:
        async with asyncio.timeout(80):
            while len(lines) < len(EXPECTED):
                line = await java.stdout.readline()
                assert line, "the program ended"
                if line.startswith(b"j"):
                    lines.append(line.decode().strip())
    finally:
        java.kill()
        await java.wait()

    assert lines == [f"{job_id} {status} {text or ''}".strip() for job_id, status, text in EXPECTED]
