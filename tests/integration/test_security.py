"""Kafka with TLS, SASL and ACLs: the minimal permissions of each command, and the messages when one is missing."""

from __future__ import annotations

import asyncio
import os
import re
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from structlog.testing import capture_logs

from streamworker.cli.commands import cli
from streamworker.client import Client
from streamworker.errors import KafkaError, KafkaRefused, KafkaUnavailable
from streamworker.kafka.acls import COMMANDS, worker_acls
from streamworker.kafka.compat import client_of
from streamworker.kafka.topics import TopicAdmin, open_admin
from tests.brokers.security import USER, unsigned_token
from tests.integration.secured import way_in
from tests.integration.stage import eventually

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.brokers.apache import ApacheKafka
    from tests.integration.secured import Acls
    from tests.integration.stage import Stage


def command(stage: Stage, *arguments: str) -> tuple[int, str]:
    """Run a command with the stage's settings."""
    environment = {f"STREAMWORKER_{name}": value for name, value in stage.variables.items()}
    result = CliRunner().invoke(cli, arguments, env={**os.environ, **environment}, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.return_value or 0, result.output


def checked(stage: Stage) -> tuple[int, str]:
    """Run `streamworker check` with the stage's settings."""
    return command(stage, "check")


@pytest.mark.parametrize("mechanism", ["PLAIN", "OAUTHBEARER", "mTLS"])  # SCRAM: below
async def test_worker_with_minimal_acls_runs_jobs(
    apache: Stage, acls: Acls, apache_kafka: ApacheKafka, tmp_path: Path, mechanism: str
) -> None:
    """Each listener and mechanism, with the ACLs of the table only: events, a dead letter and commits are written."""
    apache.variables |= way_in(apache_kafka, mechanism, tmp_path)
    await acls.give(worker_acls(apache.settings()))

    async with apache.worker():
        await apache.submit("one")
        await apache.submit_bytes(b"no job")
        [terminal] = await apache.ended("one")

        assert terminal["status"] == "completed"
        assert len(await apache.dead_letters(1)) == 1

    assert apache.breaches() == []
    assert (await apache.committed())[0].offset == 2


async def test_worker_without_an_acl_names_it_as_check_does(
    apache: Stage, acls: Acls, apache_kafka: ApacheKafka, tmp_path: Path
) -> None:
    """Each ACL in turn. `run` reports it when the broker refuses a request; both name the command that adds it."""
    apache.variables |= way_in(apache_kafka, "SCRAM-SHA-512", tmp_path)
    needed = worker_acls(apache.settings())
    await acls.give(needed)

    for acl in needed:
        await acls.take(acl)
        code, output = await asyncio.to_thread(checked, apache)
        [sentence] = re.findall("wrong   (User:.*)", output)  # this ACL and no other
        assert code == 1
        assert sentence.startswith(f"User:{USER} lacks {acl}, to {acl.purpose}: kafka-acls.sh --add ")
        assert f"--operation {acl.operation} " in sentence
        assert f" {acl.name}" in sentence
        assert sentence in await refusal_of_run(apache)
        await acls.give([acl])

    code, output = await asyncio.to_thread(checked, apache)
    assert "ok      rights\nok      topics\n" in output


async def refusal_of_run(stage: Stage) -> str:
    """Run a worker until it ends or logs that a partition cannot be opened; return the reason."""
    with capture_logs() as logs:
        running = asyncio.ensure_future(stage.worker().app.run())
        refused = {"partition.open_failed"}
        await eventually(lambda: running.done() or refused & {line["event"] for line in logs})
        running.cancel()
        await asyncio.wait([running])
    if not running.cancelled() and (error := running.exception()) is not None:
        assert isinstance(error, KafkaRefused)
        return str(error)
    return " ".join(line.get("reason", "") for line in logs)


@pytest.mark.parametrize(
    ("named", "arguments"),
    [
        ("submit", ("submit", "-m", "practice", "hello")),
        ("audit", ("audit",)),
        ("cancel", ("cancel", "job-1")),
        ("dlq", ("dlq", "replay", "--all")),
    ],
    ids=["submit", "audit", "cancel", "dlq"],
)
async def test_command_needs_the_acls_of_its_table_only(
    apache: Stage,
    acls: Acls,
    apache_kafka: ApacheKafka,
    tmp_path: Path,
    named: str,
    arguments: tuple[str, ...],
) -> None:
    """It succeeds with these ACLs and is refused without any."""
    apache.variables |= way_in(apache_kafka, "SCRAM-SHA-512", tmp_path)
    with pytest.raises(KafkaError):
        await asyncio.to_thread(command, apache, *arguments)

    await acls.give(COMMANDS[named](apache.settings()))

    assert (await asyncio.to_thread(command, apache, *arguments))[0] == 0


async def test_client_needs_the_acls_of_its_table_only(
    apache: Stage, acls: Acls, apache_kafka: ApacheKafka, tmp_path: Path
) -> None:
    """It submits, reads events and results, and cancels; no group and no transactional id is its own."""
    async with apache.worker():
        apache.variables |= way_in(apache_kafka, "PLAIN", tmp_path)
        settings = apache.settings()
        await acls.give(COMMANDS["Python client"](settings))
        async with Client(settings) as client:
            result = await client.complete(
                model="practice?deltas=3", messages=[{"role": "user", "content": "a"}], timeout=20
            )
            endless = await client.submit(
                model="practice?deltas=2&stall_after=1", messages=[{"role": "user", "content": "a"}]
            )
            await endless.cancel("done")
            ended = await endless.result(timeout=20)

        assert (result.status, ended.status) == ("completed", "cancelled")


@pytest.mark.long
async def test_acls_that_are_removed_while_a_worker_runs_lose_no_job(
    apache: Stage, acls: Acls, apache_kafka: ApacheKafka, tmp_path: Path
) -> None:
    """All of them, during a stream: the worker waits, and continues where it was when they are added again."""
    apache.variables |= way_in(apache_kafka, "SCRAM-SHA-256", tmp_path)
    needed = worker_acls(apache.settings())
    await acls.give(needed)

    async with apache.worker():
        jobs = [(f"job-{number}", "practice?deltas=30&pace_ms=20", 0) for number in range(3)]
        await apache.submit_many(jobs)
        await apache.until(lambda: apache.deltas("job-0") > 3)
        for acl in needed:
            await acls.take(acl)
        await eventually(lambda: [len(apache.calls(job_id)) for job_id, _, _ in jobs] == [1, 1, 1])
        await apache.submit("late")
        seen = len(apache.records)
        await asyncio.sleep(
            1.5
        )  # longer than the streams: their terminal events and the new job have to wait
        assert apache.terminals() == {}
        assert len(apache.records) - seen < 10
        await acls.give(needed)
        terminals = await apache.ended()

        assert {terminal["status"] for terminal in terminals} == {"completed"}

    assert apache.breaches() == []
    assert await apache.commit_breaches() == []


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "OAUTHBEARER", "mTLS"])
async def test_rotated_secret_is_used_for_the_next_connection(
    apache_kafka: ApacheKafka, apache: Stage, tmp_path: Path, mechanism: str
) -> None:
    """The file is read for each connection: a secret that is wrong for a while ends nothing permanently."""
    variables = way_in(apache_kafka, mechanism, tmp_path)
    secret = tmp_path / "secret"
    if mechanism == "mTLS":
        secret.write_bytes(apache_kafka.credentials.certificate.read_bytes())
        key = tmp_path / "key"
        key.write_bytes(apache_kafka.credentials.key.read_bytes())
        variables |= {"KAFKA__SSL_CERTFILE": str(secret), "KAFKA__SSL_KEYFILE": str(key)}
    valid, wrong = secret.read_text(), "rotated-too-early"
    apache.variables |= variables

    async with open_admin(apache.settings()) as admin:
        await admin.missing_acls()
        for text in (wrong, None):
            secret.unlink() if text is None else secret.write_text(text)
            await cut_connections(admin)
            with pytest.raises(KafkaUnavailable) as failure:
                await admin.missing_acls()
            assert wrong not in str(failure.value)

        secret.write_text(valid)
        await admin.missing_acls()


async def cut_connections(admin: TopicAdmin) -> None:
    """Close the connections, as a broker does that restarts or whose idle limit is over."""
    client = client_of(admin._admin)
    for connection in client._conns.values():
        connection.close()
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("mechanism", "over", "told"),
    [
        ("PLAIN", {"KAFKA__SASL_PASSWORD": "wrong"}, "Invalid username or password"),
        ("SCRAM-SHA-512", {"KAFKA__SASL_PASSWORD": "wrong"}, "invalid credentials"),
        (
            "PLAIN",
            {"KAFKA__SASL_USERNAME": "stranger"},
            "are kafka.sasl_mechanism, the user, and the password",
        ),
        ("OAUTHBEARER", {"secret": "no-token"}, 'the token is refused: {"status":"invalid_token"}'),
        ("OAUTHBEARER", {"secret": unsigned_token(lifetime_s=-60)}, "the token is refused"),
        (
            "PLAIN",
            {"KAFKA__SSL_CAFILE": ""},
            "did the authority in kafka.ssl_cafile sign the broker's certificate",
        ),
    ],
    ids=["password", "scram", "user", "token", "expired", "authority"],
)
async def test_worker_whose_credentials_are_refused_ends_with_the_reason(
    apache_kafka: ApacheKafka,
    apache: Stage,
    tmp_path: Path,
    mechanism: str,
    over: Mapping[str, str],
    told: str,
) -> None:
    """Waiting does not help. `check` reports the same reason."""
    apache.variables |= way_in(apache_kafka, mechanism, tmp_path)
    for name, value in over.items():
        if name == "secret":
            (tmp_path / "secret").write_text(value)
        else:
            apache.variables[name] = value
    apache.variables = {name: value for name, value in apache.variables.items() if value}

    with pytest.raises(KafkaRefused, match=re.escape(told)) as refusal:
        await apache.worker().app.run()
    code, output = await asyncio.to_thread(checked, apache)

    assert code == 1
    assert told in output
    assert "wrong" not in str(refusal.value)
    assert apache_kafka.credentials.password not in str(refusal.value) + output
