"""The commands, as people run them: processes, exit codes, what is printed and what to do about it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import TYPE_CHECKING, NamedTuple

import pytest

from streamworker.demo.child import free_port

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from streamworker.demo.broker import EmbeddedBroker
    from streamworker.practice import PracticeUpstream
    from tests.integration.stage import Stage

pytestmark = pytest.mark.embedded


class Result(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


class Cli:
    """Runs commands with one environment."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = {**os.environ, **environment}

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        """Start a command."""
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "streamworker", *arguments),
            env=self.environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def __call__(self, *arguments: str, stdin: bytes = b"", **environment: str) -> Result:
        """Run a command to its end."""
        cli = Cli({**self.environment, **environment})
        process = await cli.start(*arguments)
        try:
            out, err = await asyncio.wait_for(process.communicate(stdin), 30)
        except TimeoutError:
            process.kill()
            raise
        assert process.returncode is not None
        return Result(process.returncode, out.decode(), err.decode())


@pytest.fixture
def cli(embedded_broker: EmbeddedBroker, practice: PracticeUpstream, topics: Callable[[str], str]) -> Cli:
    """Commands against the embedded broker and the practice upstream, with topics of the test's own."""
    names = {
        f"STREAMWORKER_TOPICS__{name}": topics(name.lower()) for name in ("JOBS", "EVENTS", "CONTROL", "DLQ")
    }
    return Cli(
        {
            **names,
            "STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS": embedded_broker.bootstrap,
            "STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL": practice.base_url,
            "STREAMWORKER_WORKER__GROUP_ID": topics("group"),
            "STREAMWORKER_TELEMETRY__HTTP_HOST": "127.0.0.1",
            "STREAMWORKER_TELEMETRY__HTTP_PORT": "0",
        }
    )


async def test_commands_play_together(cli: Cli) -> None:
    """Topics, a worker, jobs in, text out, an audit: the whole of the README."""
    created = await cli("topics", "create", "--partitions", "2")
    assert (created.code, created.out.count("created ")) == (0, 4)
    assert (await cli("topics", "create")).out.count("exists ") == 4
    assert (await cli("topics", "check")).code == 0
    checked = await cli("check")
    assert (checked.code, [line.split()[0] for line in checked.out.splitlines()]) == (0, ["ok"] * 5)
    worker = await cli.start("run")
    try:
        submitted = await cli("submit", "-m", "practice?deltas=4", "-d", "tenant=a", "Why", "is", "it", "so?")
        job_id = submitted.out.strip()
        followed = await cli("tail", job_id)
        events = [json.loads(line) for line in (await cli("tail", "--json", job_id)).out.split("\n")[:-1]]
        piped = await cli(
            "submit", stdin=b'{"job_id":"p1","request":{"model":"practice?status=400","messages":[1]}}\n'
        )
        failed = await cli("tail", "p1")
        audited = await cli("audit", "--complete")
        astray = [
            await cli("submit", "-m", "practice", "--topic", "nowhere", "hi"),
            await cli("submit", "-m", "practice", "--reply-to", "nowhere", "hi"),
            await cli("cancel", ""),
        ]
    finally:
        worker.terminate()
        await worker.communicate()

    assert (submitted.code, followed.code, "completed" in followed.err) == (0, 0, True)
    assert "".join(event["delta"].get("content", "") for event in events[1:-1]) == followed.out.removesuffix(
        "\n"
    )
    assert [events[0]["type"], events[-1]["type"], events[-1]["metadata"]] == [
        "started",
        "usage",
        {"tenant": "a"},
    ]
    assert (piped.out, failed.code, "upstream_rejected" in failed.err) == ("p1\n", 1, True)
    assert (audited.code, audited.out.splitlines()[-1].startswith("2 jobs (1 completed, 1 failed)")) == (
        0,
        True,
    )
    assert worker.returncode == 0
    assert [one.code for one in astray] == [2, 2, 2]
    assert "topics.jobs" in astray[0].err
    assert "topics.allowed_reply_to" in astray[1].err
    assert "is no job id" in astray[2].err


async def test_cancel_ends_a_job_that_runs(cli: Cli) -> None:
    """`streamworker cancel` writes to the control topic that the worker reads."""
    await cli("topics", "create", "--partitions", "1")
    worker = await cli.start("run")
    try:
        await cli("submit", "--job-id", "long", "-m", "practice?deltas=9999&pace_ms=20", "go on")
        assert (await cli("cancel", "long", "--reason", "enough")).code == 0
        followed = await cli("tail", "long")
    finally:
        worker.terminate()
        await worker.communicate()

    assert (followed.code, "cancelled: enough" in followed.err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "stdin", "told"),
    [
        (["submit", "no model"], b"", "a prompt needs --model"),
        (["submit", "-m", "m", "-d", "broken", "x"], b"", "KEY=VALUE"),
        (["submit"], b"nonsense", "line 1 is not JSON"),
        (["submit"], b"[]", "not a JSON object"),
        (["submit"], b'{"requst":{}}', "requst: is not a member of a job"),
        (["submit", "-m", "m", "--deadline", "tomorrow", "x"], b"", "deadline: is not an RFC 3339 time"),
        (["frobnicate"], b"", "No such command"),
    ],
)
async def test_bad_usage_exits_with_2_and_says_what_is_wrong(
    cli: Cli, arguments: list[str], stdin: bytes, told: str
) -> None:
    """Before anything is written."""
    result = await cli(*arguments, stdin=stdin)

    assert (result.code, result.out) == (2, "")
    assert told in result.err


async def test_wrong_settings_are_told_all_at_once(cli: Cli, tmp_path: Path) -> None:
    """With their paths, the variable they came from, and no traceback."""
    file = tmp_path / "worker.toml"
    file.write_text('[kafka]\nsasl_password = "hunter2"\n[worker]\nmax_in_flight = 0\n')
    result = await cli("run", "--config", str(file), STREAMWORKER_WORKER__ORDERING="sideways")

    assert result.code == 2
    assert "worker.max_in_flight" in result.err
    assert "worker.ordering (STREAMWORKER_WORKER__ORDERING)" in result.err
    assert "kafka.sasl_password: a secret does not belong in this file" in result.err
    assert "hunter2" not in result.err + result.out
    assert "Traceback" not in result.err


async def test_check_says_which_part_is_wrong_and_what_to_do(cli: Cli) -> None:
    """Broker, topics, upstream and key each have their own line."""
    nowhere = f"127.0.0.1:{free_port()}"
    broker = await cli("check", STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS=nowhere)
    topics = await cli("check")
    upstream = await cli("check", STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL=f"http://{nowhere}/v1")

    assert (broker.code, topics.code, upstream.code) == (1, 1, 1)
    assert f"wrong   broker {nowhere}" in broker.out
    assert "is kafka.bootstrap_servers right?" in broker.out
    assert "does not exist: create it with `streamworker topics create`" in topics.out
    assert "wrong   upstream default" in upstream.out
    assert "is base_url right?" in upstream.out


async def test_key_that_is_not_there_is_a_fault_of_the_configuration(cli: Cli) -> None:
    """Before the first job would find out."""
    result = await cli("check", STREAMWORKER_UPSTREAMS__DEFAULT__API_KEY_ENV="NO_SUCH_KEY")

    assert result.code == 2
    assert "the environment variable NO_SUCH_KEY is not set" in result.err


async def test_worker_without_topics_says_how_to_make_them(cli: Cli) -> None:
    """And exits, for waiting does not help."""
    result = await cli("run")

    assert result.code == 1
    assert "create it with `streamworker topics create`" in result.err


async def test_audit_reports_a_breach_with_its_place(stage: Stage, topics: Callable[[str], str]) -> None:
    """Partition, offset, rule and job."""
    await stage.open(events_partitions=1)
    common = {"v": 1, "job_id": "j", "attempt": "a", "ts": 1}
    for seq, kind in ((0, "started"), (2, "delta"), (3, "usage")):
        value = json.dumps({**common, "seq": seq, "type": kind}).encode()
        await stage._producer.send_and_wait(stage.events_topic, value, key=b"j", partition=0)
    await stage._producer.send_and_wait(stage.events_topic, b"noise", key=b"j", partition=0)
    cli = Cli(stage._environment({}))
    result = await cli("audit")

    assert result.code == 1
    assert "partition 0 offset 1: gap: job j: seq 2 where 1 was due" in result.out
    assert "partition 0 offset 3: unreadable" in result.out
    assert result.out.splitlines()[-1].endswith("2 breaches")


def left_in(folder: Path) -> list[str]:
    """Return what is in a folder."""
    return [str(path) for path in folder.iterdir()]


def demo_environment(tmp_path: Path) -> dict[str, str]:
    """Return an environment for the demo in which nothing is set and what it leaves can be seen."""
    return {"TMPDIR": str(tmp_path), "COLUMNS": "100"}


async def test_demo_shows_every_job_and_leaves_nothing(tmp_path: Path) -> None:
    """Broker, upstream, worker and jobs, from nothing to a summary."""
    result = await Cli(demo_environment(tmp_path))("demo")

    assert (result.code, result.err) == (0, "")
    assert "8 jobs" in result.out
    for status in ("completed", "interrupted", "failed", "rejected"):
        assert status in result.out
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("after_s", [0.3, 0.8, 1.6])
async def test_demo_that_is_interrupted_leaves_nothing(tmp_path: Path, after_s: float) -> None:
    """Ctrl-C at any moment: no process, no file."""
    process = await Cli(demo_environment(tmp_path)).start("demo")
    await asyncio.sleep(after_s)  # a moment is what is tested, whichever it is
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), 20)

    # Before Python has its handler the signal itself is the exit code.
    assert process.returncode in {130, -signal.SIGINT}
    assert b"Traceback" not in err
    assert left_in(tmp_path) == []
