"""Dead letters: looked at, and run again, without a loop."""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from click.testing import CliRunner

from streamworker.cli.commands import cli
from tests.integration.stage import Stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from streamworker.demo.broker import EmbeddedBroker
    from streamworker.practice import PracticeUpstream


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
async def stage(
    embedded_broker: EmbeddedBroker, practice: PracticeUpstream, topics: Callable[[str], str], tmp_path: Path
) -> AsyncIterator[Stage]:
    async with Stage(embedded_broker, practice, topics, tmp_path) as stage:
        await stage.open()
        yield stage


async def dlq(stage: Stage, *arguments: str) -> Result:
    """Run `streamworker dlq`."""
    return await command(stage, "dlq", *arguments)


async def command(stage: Stage, *arguments: str) -> Result:
    """Run a command in this process."""
    environment = {f"STREAMWORKER_{name}": value for name, value in stage.variables.items()}

    def run() -> Result:
        result = CliRunner().invoke(cli, arguments, env={**os.environ, **environment}, standalone_mode=False)
        if result.exception is not None:
            raise result.exception
        return Result(result.return_value or 0, result.stdout, result.stderr)

    return await asyncio.to_thread(run)


def job(job_id: str, **members: Any) -> bytes:
    return json.dumps(
        {
            "job_id": job_id,
            "request": {"model": "practice", "messages": [{"role": "user", "content": job_id}]},
        }
        | members
    ).encode()


async def test_dead_letters_are_listed_and_replayed_once_their_cause_is_gone(stage: Stage) -> None:
    """The upstream that was missing is configured: the same bytes, key and headers run, and only those asked for."""
    headers = (("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"), ("mine", b"\xff"))
    async with stage.worker():
        await stage.submit_bytes(job("late", upstream="other"), key=b"k", headers=headers)
        await stage.submit_bytes(b'{"\x1b[31mred": 1}')
        letters = await stage.dead_letters(2)
    [late] = [letter for letter in letters if letter.key == b"k"]
    late_at = f"{stage.dlq_topic}-0-{late.offset}"

    listed = await dlq(stage, "list")
    assert listed.code == 0
    assert f"{late_at}  " in listed.out
    assert "  unknown_upstream  late  upstream: no upstream of that name is configured\n" in listed.out
    assert f"  invalid_job  {stage.jobs_topic}-0-1  " in listed.out
    assert "\x1b" not in listed.out
    [told] = [
        json.loads(line)
        for line in (await dlq(stage, "list", "--json", "--code", "unknown_upstream")).out.splitlines()
    ]
    assert told | {"ts": 0, "source_ts": 0} == {
        "at": late_at,
        "ts": 0,
        "job_id": "late",
        "code": "unknown_upstream",
        "message": "upstream: no upstream of that name is configured",
        "source": {"topic": stage.jobs_topic, "partition": 0, "offset": 0},
        "source_ts": 0,
        "replays": 0,
        "bytes": len(late.value),
    }

    with pytest.raises(Exception, match="say which: --at, --code or --all"):
        await dlq(stage, "replay")
    dry = await dlq(stage, "replay", "--at", late_at, "--dry-run")
    assert dry == (
        0,
        f"would replay {late_at}: job late to {stage.jobs_topic}\n",
        "1 of 1 dead letters would be replayed\n",
    )
    done = await dlq(stage, "replay", "--at", late_at, "--at", "nowhere-0-0")
    assert done.code == 1
    assert done.out == f"replayed {late_at}: job late to {stage.jobs_topic}\n"
    assert "left    nowhere-0-0: there is no such dead letter\n" in done.err

    async with stage.worker(upstreams__other__base_url=stage.practice.base_url):
        await stage.until(lambda: stage.terminals().get("late", {}).get("status") == "completed")
    [call] = stage.practice.calls
    assert call.body["messages"] == [{"role": "user", "content": "late"}]
    told_last = await command(stage, "tail", "late")
    assert (told_last.code, "[the job was run again]" in told_last.err) == (0, True)
    assert told_last.out.strip() == call.content_sent[0].strip()


async def test_dead_letter_that_dies_again_is_not_replayed_for_ever(stage: Stage) -> None:
    """Each replay is counted in the job's own headers, which its next dead letter keeps; at the limit it is left alone."""
    async with stage.worker():
        await stage.submit_bytes(
            b"no job", key=b"k", headers=[("mine", b"1"), ("__streamworker.errors.code", b"forged")]
        )
        for replays in range(2):
            [*_, last] = await stage.dead_letters(replays + 1)
            assert [value for name, value in last.headers if name == "mine"] == [b"1"]
            assert (last.key, last.value) == (b"k", b"no job")
            result = await dlq(
                stage, "replay", "--at", f"{stage.dlq_topic}-0-{last.offset}", "--max-replays", "2"
            )
            assert (result.code, result.out.startswith("replayed")) == (0, True), result
        [*_, last] = await stage.dead_letters(3)

        assert dict(last.headers)["__streamworker.replays"] == b"2"
        assert [name for name, _ in last.headers].count("__streamworker.errors.code") == 1
        result = await dlq(stage, "replay", "--code", "invalid_job", "--max-replays", "2")
        assert result.code == 1
        assert (
            f"left    {stage.dlq_topic}-0-{last.offset}: it was replayed 2 times and died each time"
            in result.err
        )


async def test_dead_letter_names_no_topic_outside_of_the_job_topics(stage: Stage) -> None:
    """Whoever writes to the dead-letter topic cannot have us write to another one; what is none of ours is passed over."""
    names = {
        "code": b"c",
        "message": b"m",
        "topic": b"\x1b[2Jelsewhere",
        "partition": b"0",
        "offset": b"1",
        "timestamp": b"2",
    }
    headers = [("__streamworker.errors." + name, value) for name, value in names.items()]
    for given in (headers, headers[:-1], [*headers, ("__streamworker.errors.offset", b"x")]):
        await stage._producer.send_and_wait(stage.dlq_topic, b"{}", headers=given, partition=0)

    result = await dlq(stage, "replay", "--all")

    assert result.code == 1
    assert result.out == ""
    assert "its job topic \N{REPLACEMENT CHARACTER}[2Jelsewhere is not one of topics.jobs" in result.err
    assert "header __streamworker.errors.timestamp is missing" in result.err
    assert "header __streamworker.errors.offset is not a number" in result.err
