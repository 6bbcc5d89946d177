"""Jobs that run again: `dlq replay` for dead letters, `retry` for ended jobs."""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from click.testing import CliRunner

from streamworker.cli.commands import cli
from streamworker.config import KafkaSettings
from streamworker.kafka.log import open_log
from streamworker.model import TopicPartition
from tests.integration.stage import Stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from streamworker.demo.broker import EmbeddedBroker
    from streamworker.model import ConsumerRecord
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
    """Run `streamworker dlq` in this process."""
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


async def job_records(stage: Stage) -> AsyncIterator[ConsumerRecord]:
    """Yield the records of the jobs topic."""
    async with open_log(KafkaSettings(bootstrap_servers=stage.broker.bootstrap), stage.jobs_topic) as log:
        async for record in log.snapshot([TopicPartition(stage.jobs_topic, 0)]):
            yield record


def job(job_id: str, **members: Any) -> bytes:
    return json.dumps(
        {
            "job_id": job_id,
            "request": {"model": "practice", "messages": [{"role": "user", "content": job_id}]},
        }
        | members
    ).encode()


async def test_dead_letter_that_is_replayed_runs_with_the_same_bytes_key_and_headers(stage: Stage) -> None:
    """Only the selected dead letter is replayed, after the missing upstream was configured."""
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
    [listed_json] = [
        json.loads(line)
        for line in (await dlq(stage, "list", "--json", "--code", "unknown_upstream")).out.splitlines()
    ]
    assert listed_json | {"ts": 0, "source_ts": 0} == {
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

    with pytest.raises(Exception, match="--at, --code or --all is required"):
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
    tailed = await command(stage, "tail", "late")
    assert (tailed.code, "[the job was run again: ignore the text above]" in tailed.err) == (0, True)
    assert tailed.out.strip() == call.content_sent[0].strip()
    assert (await command(stage, "audit")).code == 0


async def test_dead_letter_that_fails_again_is_replayed_up_to_the_limit(stage: Stage) -> None:
    """Each replay is counted in a header of the job, which the next dead letter keeps."""
    async with stage.worker():
        await stage.submit_bytes(
            b"not a job", key=b"k", headers=[("mine", b"1"), ("__streamworker.errors.code", b"forged")]
        )
        for replays in range(2):
            [*_, last] = await stage.dead_letters(replays + 1)
            assert [value for name, value in last.headers if name == "mine"] == [b"1"]
            assert (last.key, last.value) == (b"k", b"not a job")
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
            f"left    {stage.dlq_topic}-0-{last.offset}: it was replayed 2 times and failed each time"
            in result.err
        )


async def test_dead_letter_with_another_topic_or_invalid_headers_is_not_replayed(stage: Stage) -> None:
    """A forged dead letter cannot make the command write to a topic that is not a job topic."""
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


async def test_rejected_job_that_is_replayed_and_rejected_again_is_not_a_breach(stage: Stage) -> None:
    """Its record has the header `streamworker-rerun`; without the header the second rejection is a breach."""
    async with stage.worker():
        await stage.submit_bytes(b'{"job_id": "bad", "requst": 1}')
        [letter] = await stage.dead_letters(1)
        await dlq(stage, "replay", "--at", f"{stage.dlq_topic}-0-{letter.offset}")
        [_, second] = await stage.dead_letters(2)
        replayed = await command(stage, "audit")
        await stage.submit_bytes(b'{"job_id": "worse", "requst": 1}')
        await stage.submit_bytes(b'{"job_id": "worse", "requst": 1}')
        await stage.dead_letters(4)
        duplicated = await command(stage, "audit")

    assert dict(second.headers)["streamworker-rerun"] == b"1"
    assert (replayed.code, "no breach" in replayed.out) == (0, True)
    assert (duplicated.code, "job worse: another terminal event" in duplicated.out) == (1, True)


async def test_retry_submits_the_selected_jobs_again_under_their_ids(stage: Stage) -> None:
    """The jobs run again with their key and headers, and the last run counts for `retry`, `tail` and `audit`."""
    flaky = {
        "request": {"model": "practice?status=400&times=2", "messages": [{"role": "user", "content": "x"}]}
    }
    async with stage.worker():
        await stage.submit_bytes(job("done"))
        await stage.submit_bytes(
            job("flaky", **flaky), key=b"k", headers=[("mine", b"1"), ("streamworker-rerun", b"0")]
        )
        await stage.submit_bytes(json.dumps(flaky).encode())
        await stage.until(lambda: len(stage.terminals()) == 3)
        anonymous = f"{stage.jobs_topic}-0-2"

        dry = await command(stage, "retry", "--code", "upstream_rejected", "--dry-run")
        again = await command(stage, "retry", "--status", "failed", "--since", "1h")
        await stage.until(lambda: all(end["status"] == "completed" for end in stage.terminals().values()))
        nothing = await command(stage, "retry", "--status", "failed")
        tailed = await command(stage, "tail", "flaky")
        audited = await command(stage, "audit", "--complete")

    assert (dry.code, sorted(line.split()[2] for line in dry.out.splitlines())) == (
        0,
        sorted(["flaky:", f"{anonymous}:"]),
    )
    assert dry.err == "2 of 2 selected jobs would be submitted again\n"
    assert (again.code, again.out.count("submitted ")) == (0, 2)
    assert (nothing.code, nothing.err) == (0, "0 of 0 selected jobs submitted again\n")
    assert (tailed.code, "[the job was run again: ignore the text above]" in tailed.err) == (0, True)
    assert (audited.code, audited.out.splitlines()[-1].startswith("3 jobs (3 completed)")) == (0, True)
    assert "2 further runs" in audited.out
    assert len(stage.practice.calls) == 5
    [resubmitted] = [
        record async for record in job_records(stage) if record.at.offset > 2 and record.key == b"k"
    ]
    assert resubmitted.headers == (("mine", b"1"), ("streamworker-rerun", b"1"))
