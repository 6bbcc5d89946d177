"""The commands as processes: exit codes, output, and messages."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import TYPE_CHECKING, NamedTuple

import pytest
from click.testing import CliRunner

from streamworker import __version__
from streamworker.cli import shared
from streamworker.cli.commands import cli as commands
from streamworker.demo.child import free_port
from streamworker.errors import KafkaUnavailable
from tests.integration.events import delta, ended, home, started

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from streamworker.demo.broker import EmbeddedBroker
    from streamworker.practice import PracticeUpstream
    from tests.integration.stage import Stage

pytestmark = pytest.mark.embedded


class Result(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


class Cli:
    """Run commands in one environment."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = {**os.environ, **environment}

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        """Start a command; return its process."""
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "streamworker", *arguments),
            env=self.environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def __call__(self, *arguments: str, stdin: bytes = b"", **environment: str) -> Result:
        """Run a command to its end; return its result."""
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
    """Return a runner of commands with the embedded broker, the practice upstream, and topics of its own."""
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


async def test_commands_of_the_readme_work_together(cli: Cli) -> None:
    """Topics are created, jobs are submitted, run, printed and audited."""
    created = await cli("topics", "create", "--partitions", "2")
    assert (created.code, created.out.count("created ")) == (0, 4)
    again = await cli("topics", "create")
    assert (again.out.count("exists "), again.out.count(": 2 partitions, unchanged")) == (4, 4)
    assert (await cli("topics", "check")).code == 0
    letters = await cli("dlq", "list")
    assert (letters.code, letters.out) == (0, "")
    assert "has no dead letter" in letters.err
    checked = await cli("check")
    assert (checked.code, [line.split()[0] for line in checked.out.splitlines()]) == (0, ["ok"] * 5)
    worker = await cli.start("run")
    try:
        submitted = await cli("submit", "-m", "practice?deltas=4", "-d", "tenant=a", "Why", "is", "it", "so?")
        job_id = submitted.out.strip()
        followed = await cli("tail", job_id)
        events = [json.loads(line) for line in (await cli("tail", "--json", job_id)).out.split("\n")[:-1]]
        piped = await cli(
            "submit",
            stdin=b'\xef\xbb\xbf{"job_id":"p1","request":{"model":"practice?status=400","messages":[1]}}\r\n',
        )
        failed = await cli("tail", "p1")
        audited = await cli("audit", "--complete")
        misused = [
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
    assert [one.code for one in misused] == [2, 2, 2]
    assert "topics.jobs" in misused[0].err
    assert "topics.allowed_reply_to" in misused[1].err
    assert "is not a valid job id" in misused[2].err


async def test_cancel_of_a_running_job_ends_it(cli: Cli) -> None:
    """The worker reads the control topic."""
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
    ("arguments", "stdin", "message"),
    [
        (["submit", "no model"], b"", "a prompt needs --model"),
        (["submit", "-m", "m", "-d", "broken", "x"], b"", "KEY=VALUE"),
        (["submit"], b"nonsense", "line 1 is not JSON"),
        (["submit"], b"[]", "not a JSON object"),
        (["submit"], b'{"requst":{}}', "requst: is not a member of a job"),
        (["submit", "-m", "m", "--deadline", "tomorrow", "x"], b"", "deadline: is not an RFC 3339 time"),
        (["tail", "j", "--since", "yesterday"], b"", "is not a valid time: use 90m"),
        (["frobnicate"], b"", "No such command"),
    ],
)
def test_bad_usage_exits_with_2_and_a_message(arguments: list[str], stdin: bytes, message: str) -> None:
    """Nothing is written to Kafka: there is none."""
    result = CliRunner().invoke(commands, arguments, input=stdin)

    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


async def test_bad_usage_of_a_process_exits_with_2_and_a_message(cli: Cli) -> None:
    """Standard input is a pipe."""
    result = await cli("submit", stdin=b"nonsense")

    assert (result.code, result.out) == (2, "")
    assert "line 1 is not JSON" in result.err


async def test_tail_since_a_time_finds_a_job_that_ended_after_it(stage: Stage) -> None:
    """The text is printed as it is for a job that runs; events of other jobs are ignored."""
    await stage.open()
    for value in (
        started("other"),
        started("j"),
        delta("j", 1, "Hello"),
        delta("j", 2, " you"),
        ended("j", 3),
    ):
        job_id = json.loads(value)["job_id"]
        await stage._producer.send_and_wait(
            stage.events_topic, value, key=job_id.encode(), partition=home(job_id)
        )
    found = await Cli(stage._environment({}))("tail", "--since", "1h", "j")

    assert (found.code, found.out, found.err) == (0, "Hello you\n", "[completed]\n")


async def test_invalid_settings_are_all_reported_without_a_traceback(cli: Cli, tmp_path: Path) -> None:
    """Each fault has its path and its variable."""
    file = tmp_path / "worker.toml"
    file.write_text('[kafka]\nsasl_password = "hunter2"\n[worker]\nmax_in_flight = 0\n')
    result = await cli("run", "--config", str(file), STREAMWORKER_WORKER__ORDERING="sideways")

    assert result.code == 2
    assert "worker.max_in_flight" in result.err
    assert "worker.ordering (STREAMWORKER_WORKER__ORDERING)" in result.err
    assert "kafka.sasl_password: a secret does not belong in this file" in result.err
    assert "hunter2" not in result.err + result.out
    assert "Traceback" not in result.err


async def test_check_reports_which_part_is_wrong_and_what_to_do(cli: Cli) -> None:
    """Broker, topics and upstream have separate lines."""
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


async def test_check_of_a_base_url_without_its_version_names_the_right_one(
    cli: Cli, practice: PracticeUpstream
) -> None:
    """The URL with /v1 is tried when the upstream answers 404."""
    base_url = practice.base_url
    result = await cli("check", STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL=base_url.removesuffix("/v1"))

    assert result.code == 1
    assert f"the API is at {base_url}; set base_url to it" in result.out


async def test_check_call_sends_one_request_for_one_token(cli: Cli, practice: PracticeUpstream) -> None:
    """The result has the time to the first delta, or the upstream's error."""
    await cli("topics", "create")
    good = await cli("check", "--call", "practice?deltas=1")
    bad = await cli("check", "--call", "practice?status=400")

    assert good.code == 0
    assert "ok      call of practice?deltas=1 at upstream default: first delta after " in good.out
    assert "with a usage report" in good.out
    assert [call.body["max_tokens"] for call in practice.calls if call.model == "practice?deltas=1"] == [1]
    assert bad.code == 1
    assert "wrong   call of practice?status=400 at upstream default: upstream_rejected: " in bad.out


@pytest.fixture
async def silent_server() -> AsyncIterator[str]:
    """Yield the address of a server that accepts connections and never answers."""
    connections: list[asyncio.StreamWriter] = []

    def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    for writer in connections:
        writer.close()
    server.close()


@pytest.mark.parametrize(
    "command",
    [
        ["cancel", "j"],
        ["tail", "j"],
        ["audit"],
        ["retry", "--status", "failed"],
        ["dlq", "list"],
        ["dlq", "replay", "--all"],
        ["topics", "create"],
        ["topics", "check"],
        ["check"],
    ],
    ids=" ".join,
)
async def test_command_at_a_silent_broker_says_what_it_waits_for_and_gives_up(
    monkeypatch: pytest.MonkeyPatch, silent_server: str, command: list[str]
) -> None:
    """Every command that connects to Kafka has a message after a while and the option `--timeout`."""
    monkeypatch.setattr(shared, "HINT_S", 0.2)
    environment = {"STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS": silent_server}

    def message(error: BaseException | None) -> str:
        return "" if error is None else str(error)

    invoked = await asyncio.to_thread(
        lambda: CliRunner().invoke(
            commands, [*command, "--timeout", "0.6"], env=environment, standalone_mode=False
        )
    )

    assert f"{silent_server}, for at most 0.6 s ..." in invoked.stderr
    assert "no answer within 0.6 s" in invoked.stdout + message(invoked.exception)
    assert isinstance(invoked.exception, KafkaUnavailable) or invoked.return_value == 1


async def test_submit_to_a_silent_broker_gives_up_after_its_timeout(cli: Cli, silent_server: str) -> None:
    """The message comes after 3 s; the exit code is 1, and there is no traceback."""
    result = await cli(
        *("submit", "-m", "practice", "hi", "--timeout", "4"),
        STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS=silent_server,
    )

    assert result.code == 1
    assert f"{silent_server}, for at most 4 s ..." in result.err
    assert "no answer within 4 s" in result.err
    assert "Traceback" not in result.err


async def test_run_logs_version_settings_and_their_sources_at_its_start(cli: Cli, tmp_path: Path) -> None:
    """The first line names group, brokers, topics and upstreams, the file, and the variables that were read."""
    file = tmp_path / "worker.toml"
    file.write_text("[worker]\nmax_in_flight = 3\n")
    result = await cli("run", "--config", str(file))

    line = json.loads(result.out.splitlines()[0])
    assert (line["event"], line["version"]) == ("worker.starting", __version__)
    assert line["group"] == cli.environment["STREAMWORKER_WORKER__GROUP_ID"]
    assert line["brokers"] == cli.environment["STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS"]
    assert line["topics"]["events"] == cli.environment["STREAMWORKER_TOPICS__EVENTS"]
    assert line["upstreams"] == {"default": cli.environment["STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL"]}
    assert line["config_file"] == str(file)
    assert "STREAMWORKER_TOPICS__EVENTS" in line["variables"]


async def test_check_without_the_key_reports_a_configuration_fault(cli: Cli) -> None:
    """The fault is reported before any job runs."""
    result = await cli("check", STREAMWORKER_UPSTREAMS__DEFAULT__API_KEY_ENV="NO_SUCH_KEY")

    assert result.code == 2
    assert "the environment variable NO_SUCH_KEY is not set" in result.err


async def test_worker_without_topics_exits_with_the_command_that_creates_them(cli: Cli) -> None:
    """Waiting would not help."""
    result = await cli("run")

    assert result.code == 1
    assert "create it with `streamworker topics create`" in result.err


async def test_audit_of_an_invalid_topic_reports_each_breach(
    stage: Stage, topics: Callable[[str], str]
) -> None:
    """Each line names partition, offset, rule and job."""
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
    """Return the paths in a folder."""
    return [str(path) for path in folder.iterdir()]


def demo_environment(tmp_path: Path) -> dict[str, str]:
    """Return an environment for the demo, whose temporary files are in `tmp_path`."""
    return {"TMPDIR": str(tmp_path), "COLUMNS": "100"}


@pytest.mark.parametrize("after_s", [0.3, pytest.param(0.8, marks=pytest.mark.long), 1.6])
async def test_demo_that_is_interrupted_leaves_no_file(tmp_path: Path, after_s: float) -> None:
    """Ctrl-C may arrive at any time."""
    process = await Cli(demo_environment(tmp_path)).start("demo")
    await asyncio.sleep(after_s)  # the interruption at this time is tested
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), 20)

    # On a busy machine the interpreter itself may be starting, which ends it with the signal or 1, and a traceback of its own.
    if b"streamworker/cli" in err or b"Traceback" not in err:
        assert process.returncode in {130, -signal.SIGINT}
        assert b"Traceback" not in err
    assert left_in(tmp_path) == []
