"""Kafka behind TLS, SASL and ACLs: what a worker has to be given, and what it says when it is not."""

from __future__ import annotations

import asyncio
import os
import re
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from streamworker.cli.commands import cli
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
async def test_worker_with_least_rights_runs_jobs(
    apache: Stage, acls: Acls, apache_kafka: ApacheKafka, tmp_path: Path, mechanism: str
) -> None:
    """Each way in, with the rights of the table and no other: jobs, deltas, terminal events, a dead letter, commits."""
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


async def test_worker_without_one_right_names_it(
    apache: Stage, acls: Acls, apache_kafka: ApacheKafka, tmp_path: Path
) -> None:
    """Each right in turn; `run` does not begin, and says the same as `check`, with the command that gives it."""
    apache.variables |= way_in(apache_kafka, "SCRAM-SHA-512", tmp_path)
    needed = worker_acls(apache.settings())
    await acls.give(needed)

    for acl in needed:
        await acls.take(acl)
        with pytest.raises(KafkaRefused) as refusal:
            async with asyncio.timeout(20):
                await apache.worker().app.run()

        told = str(refusal.value)
        assert told.startswith(f"User:{USER} lacks {acl}, to {acl.purpose}: kafka-acls.sh --add "), told
        assert f"--operation {acl.operation} " in told
        assert f" {acl.name}" in told
        assert ";" not in told  # that one and no other
        code, output = await asyncio.to_thread(checked, apache)
        assert code == 1
        assert f"wrong   {told}\n" in output
        await acls.give([acl])

    code, output = await asyncio.to_thread(checked, apache)
    assert "ok      rights\nok      topics\n" in output


@pytest.mark.parametrize(
    ("named", "arguments"),
    [
        ("submit", ("submit", "-m", "practice", "hello")),
        ("tail, audit", ("audit",)),
        ("cancel", ("cancel", "job-1")),
        ("dlq", ("dlq", "replay", "--all")),
    ],
    ids=["submit", "audit", "cancel", "dlq"],
)
async def test_command_needs_the_rights_of_its_table_only(
    apache: Stage,
    acls: Acls,
    apache_kafka: ApacheKafka,
    tmp_path: Path,
    named: str,
    arguments: tuple[str, ...],
) -> None:
    """With them it is done; with none of them it is refused."""
    apache.variables |= way_in(apache_kafka, "SCRAM-SHA-512", tmp_path)
    with pytest.raises(KafkaError):
        await asyncio.to_thread(command, apache, *arguments)

    await acls.give(COMMANDS[named](apache.settings()))

    assert (await asyncio.to_thread(command, apache, *arguments))[0] == 0


async def test_rights_that_are_taken_away_while_it_runs_lose_nothing(
    apache: Stage, acls: Acls, apache_kafka: ApacheKafka, tmp_path: Path
) -> None:
    """All of them, in the middle of a stream: the worker waits, and goes on where it was when they are given back."""
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
        )  # longer than the streams: what they end with has to wait, and so has what is new
        assert apache.terminals() == {}
        assert len(apache.records) - seen < 10
        await acls.give(needed)
        terminals = await apache.ended()

        assert {terminal["status"] for terminal in terminals} == {"completed"}

    assert apache.breaches() == []
    assert await apache.commit_breaches() == []


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "OAUTHBEARER", "mTLS"])
async def test_secret_that_is_rotated_serves_the_next_connection(
    apache_kafka: ApacheKafka, apache: Stage, tmp_path: Path, mechanism: str
) -> None:
    """It is read where it lies for each connection: one that is wrong for a while ends nothing for good."""
    variables = way_in(apache_kafka, mechanism, tmp_path)
    secret = tmp_path / "secret"
    if mechanism == "mTLS":
        secret.write_bytes(apache_kafka.credentials.certificate.read_bytes())
        key = tmp_path / "key"
        key.write_bytes(apache_kafka.credentials.key.read_bytes())
        variables |= {"KAFKA__SSL_CERTFILE": str(secret), "KAFKA__SSL_KEYFILE": str(key)}
    acl, wrong = secret.read_text(), "the-next-one-came-too-soon"
    apache.variables |= variables

    async with open_admin(apache.settings()) as admin:
        await admin.describe()
        for text in (wrong, None):
            secret.unlink() if text is None else secret.write_text(text)
            await cut_connections(admin)
            with pytest.raises(KafkaUnavailable) as failure:
                await admin.describe()
            assert wrong not in str(failure.value)

        secret.write_text(acl)
        await admin.describe()


async def cut_connections(admin: TopicAdmin) -> None:
    """As a broker does that restarts, or whose idle limit has passed."""
    client = client_of(admin._admin)
    for connection in client._conns.values():
        connection.close()
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("mechanism", "over", "told"),
    [
        ("PLAIN", {"KAFKA__SASL_PASSWORD": "wrong"}, "Invalid username or password"),
        ("SCRAM-SHA-512", {"KAFKA__SASL_PASSWORD": "wrong"}, "invalid credentials"),
        ("PLAIN", {"KAFKA__SASL_USERNAME": "nobody"}, "are kafka.sasl_mechanism, the user, and the password"),
        ("OAUTHBEARER", {"secret": "no-token"}, 'the token is refused: {"status":"invalid_token"}'),
        ("OAUTHBEARER", {"secret": unsigned_token(lifetime_s=-60)}, "the token is refused"),
        ("PLAIN", {"KAFKA__SSL_CAFILE": ""}, "is kafka.ssl_cafile the authority of the broker's certificate"),
    ],
    ids=["password", "scram", "user", "token", "expired", "authority"],
)
async def test_worker_that_is_not_let_in_says_why(
    apache_kafka: ApacheKafka,
    apache: Stage,
    tmp_path: Path,
    mechanism: str,
    over: Mapping[str, str],
    told: str,
) -> None:
    """And ends: no waiting will help. `check` says the same."""
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
