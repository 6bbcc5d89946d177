"""ACLs: which ones each command needs, which are missing, and the sentence about a missing one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import errors

from streamworker.config import KafkaSettings
from streamworker.errors import KafkaRefused
from streamworker.kafka.acls import (
    COMMANDS,
    Acl,
    RequiredAcls,
    acl_command,
    gateway_acls,
    missing_acls,
    principal_of,
    worker_acls,
)
from streamworker.kafka.clients import new_admin
from streamworker.kafka.compat import client_of
from streamworker.kafka.errors import translate_errors
from tests.memory_kafka import MemoryKafka
from tests.unit.kafka.fakes import settings

if TYPE_CHECKING:
    from streamworker.config import Settings

READ, WRITE = 1 << 3, 1 << 4
UNKNOWN = -(1 << 31)
NAMES = {
    "topics__jobs": "jobs",
    "topics__events": "events",
    "topics__dlq": "dlq",
    "topics__control": "control",
}


def made(**over: str) -> Settings:
    """Return settings with short names of topics."""
    return settings(**NAMES | over)


def short(acls: list[Acl]) -> set[str]:
    """Return `READ jobs` for each ACL, and `WRITE g.*` for one with a prefix."""
    return {f"{acl.operation} {acl.name}{'*' if acl.is_prefix else ''}" for acl in acls}


WORKER = {
    "READ jobs",
    "READ streamworker",
    "WRITE events",
    "WRITE dlq",
    "READ control",
    "WRITE streamworker.*",
}


@pytest.mark.parametrize(
    ("command", "over", "needed"),
    [
        ("run, check", {}, WORKER),
        ("run, check", {"worker__delivery": "at_least_once"}, WORKER - {"WRITE streamworker.*"}),
        ("run, check", {"topics__results": "results"}, WORKER | {"WRITE results"}),
        ("run, check", {"topics__jobs": "jobs,more"}, WORKER | {"READ more"}),
        ("run, check", {"topics__allowed_reply_to": "a,b"}, WORKER | {"WRITE a", "WRITE b"}),
        ("submit", {"topics__jobs": "jobs,more"}, {"WRITE jobs", "WRITE more"}),
        ("tail", {"topics__allowed_reply_to": "a"}, {"READ events", "READ a"}),
        ("audit", {"topics__results": "results"}, {"READ events", "READ results"}),
        ("cancel", {}, {"WRITE control"}),
        ("retry", {}, {"READ events", "READ jobs", "WRITE jobs"}),
        ("dlq", {}, {"READ dlq", "WRITE jobs"}),
        ("Python client", {}, {"WRITE jobs", "READ events", "WRITE control"}),
        (
            "Python client",
            {"topics__results": "results"},
            {"WRITE jobs", "READ events", "READ results", "WRITE control"},
        ),
        (
            "batch",
            {"topics__jobs": "jobs,slow", "topics__batch": "slow", "topics__results": "results"},
            {
                "WRITE slow",
                "READ slow",
                "READ results",
                "READ events",
                "WRITE control",
                "WRITE streamworker-batch.*",
            },
        ),
        (
            "batch",
            {"worker__delivery": "at_least_once"},
            {"WRITE jobs", "READ jobs", "READ events", "WRITE control"},
        ),
        ("gateway", {}, {"WRITE jobs", "READ events", "WRITE control"}),
        ("gateway", {"topics__batches": "batches"}, {"WRITE jobs", "READ events", "WRITE control"}),
        (
            "gateway",
            {"topics__batches": "batches", "topics__results": "results"},
            {
                *("WRITE jobs", "READ jobs", "READ events", "READ results", "WRITE control"),
                *("READ batches", "WRITE batches", "READ streamworker-batches", "WRITE streamworker-batch.*"),
            },
        ),
    ],
)
def test_command_needs_these_acls_and_no_others(command: str, over: dict[str, str], needed: set[str]) -> None:
    """An administrator grants what docs/security.md lists, which is made of this table."""
    assert short(COMMANDS[command](made(**over))) == needed


def test_acls_name_each_resource_and_operation_once() -> None:
    """The gateway reads and writes some topics for two purposes; one command per ACL is enough."""
    acls = gateway_acls(made(topics__batches="batches", topics__results="results"))
    named = [(acl.operation, acl.resource, acl.name) for acl in acls]

    assert len(set(named)) == len(named)


@pytest.mark.parametrize(
    ("over", "principal"),
    [
        ({}, "User:ANONYMOUS"),
        ({"security_protocol": "SSL"}, "User:ANONYMOUS"),
        (
            {"security_protocol": "SSL", "ssl_certfile": "c", "ssl_keyfile": "k"},
            "User:<name in the client certificate>",
        ),
        (
            {
                "security_protocol": "SASL_SSL",
                "sasl_mechanism": "PLAIN",
                "sasl_username": "u",
                "sasl_password": "p",
            },
            "User:u",
        ),
        (
            {"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER", "sasl_oauth_token_file": "f"},
            "User:<subject of the token>",
        ),
    ],
)
def test_principal_is_that_of_the_connection(over: dict[str, Any], principal: str) -> None:
    """A certificate counts only where the client is not authenticated by SASL."""
    assert principal_of(KafkaSettings(**over)) == principal


@pytest.mark.parametrize(
    ("acl", "text", "command"),
    [
        (
            Acl("READ", "TOPIC", "jobs", "read jobs"),
            "READ on topic jobs",
            "--operation READ --topic jobs",
        ),
        (Acl("READ", "GROUP", "g", "join"), "READ on group g", "--operation READ --group g"),
        (
            Acl("WRITE", "TRANSACTIONAL_ID", "g.", "commit", is_prefix=True),
            "WRITE on all transactional ids that begin with g.",
            "--operation WRITE --transactional-id g. --resource-pattern-type prefixed",
        ),
    ],
)
def test_acl_is_named_with_the_command_that_adds_it(acl: Acl, text: str, command: str) -> None:
    """The command can be pasted; the principal is quoted, because it may hold spaces."""
    assert str(acl) == text
    assert acl_command(acl, "User:a b") == (f"kafka-acls.sh --add --allow-principal 'User:a b' {command}")


# A refused request


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (errors.TopicAuthorizationFailedError("events"), ["WRITE on topic events"]),
        (errors.TopicAuthorizationFailedError({"jobs", "dlq"}), ["READ on topic jobs", "WRITE on topic dlq"]),
        (errors.GroupAuthorizationFailedError("streamworker"), ["READ on group streamworker"]),
        (
            errors.TransactionalIdAuthorizationFailed(),
            ["WRITE on all transactional ids that begin with streamworker."],
        ),
        (errors.ClusterAuthorizationFailedError(), ["WRITE on topic events", "WRITE on topic dlq"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_refused_request_names_the_acls_that_it_needs(error: Exception, named: list[str]) -> None:
    """One sentence each, with purpose and command; none for resources that the request does not concern."""
    described = RequiredAcls.of_worker(made()).describe(error)
    assert described is not None
    sentences = described.split("; ")

    assert [sentence.split(", to ")[0] for sentence in sentences] == [
        f"User:ANONYMOUS lacks {acl}" for acl in named
    ]
    assert all("kafka-acls.sh --add" in sentence for sentence in sentences)


@pytest.mark.parametrize(
    "error",
    [
        errors.TopicAuthorizationFailedError("another topic"),
        errors.TopicAuthorizationFailedError("streamworker"),  # the name of the group
        errors.TopicAuthorizationFailedError(),
        errors.KafkaConnectionError("events"),
        OSError("events"),
    ],
)
def test_other_error_is_not_described_as_a_missing_acl(error: Exception) -> None:
    """The general text about it is then better."""
    assert RequiredAcls.of_worker(made()).describe(error) is None


def test_error_that_is_translated_carries_the_sentence() -> None:
    """The worker reports the same text as `streamworker check`."""
    acls = RequiredAcls.of_worker(made())
    with (
        pytest.raises(KafkaRefused) as refused,
        translate_errors("reading jobs", acls),
    ):
        raise errors.TopicAuthorizationFailedError("jobs")
    [reported] = acls.describe_missing([acl for acl in worker_acls(made()) if acl.name == "jobs"])

    assert str(refused.value) == f"reading jobs: {reported}"


# Asking the broker


@pytest.fixture
def kafka(monkeypatch: pytest.MonkeyPatch) -> MemoryKafka:
    """A cluster with the topics of a worker."""
    kafka = MemoryKafka(jobs=1, events=1, dlq=1, control=1)
    kafka.install(monkeypatch)
    return kafka


async def missing(over: dict[str, str] | None = None) -> set[str]:
    """Return the missing ACLs of a worker."""
    config = made(**over or {})
    return short(await missing_acls(client_of(new_admin(config.kafka)), config, worker_acls(config)))


async def test_worker_with_all_rights_misses_none(kafka: MemoryKafka) -> None:
    """The transactional id is checked at its coordinator, by a request that cannot succeed."""
    assert await missing() == set()
    assert kafka.requests[-1] == (7, "AddOffsetsToTxnRequest")


@pytest.mark.parametrize(
    ("operations", "found"),
    [
        ({"jobs": WRITE}, {"READ jobs"}),
        ({"events": READ, "dlq": READ}, {"WRITE events", "WRITE dlq"}),
        ({"control": READ}, set()),
        ({"control": 0}, {"READ control"}),
        ({"jobs": UNKNOWN}, set()),
        ({"group": WRITE}, {"READ streamworker"}),
        ({"transaction": errors.TransactionalIdAuthorizationFailed.errno}, {"WRITE streamworker.*"}),
    ],
)
async def test_operation_that_the_broker_does_not_grant_is_missing(
    kafka: MemoryKafka, operations: dict[str, int], found: set[str]
) -> None:
    """Each operation has a bit; a broker that cannot say is trusted."""
    kafka.operations = operations

    assert await missing() == found


async def test_resource_that_may_not_be_described_lacks_every_operation(kafka: MemoryKafka) -> None:
    """The broker answers with an error, and with no bits."""
    kafka.hidden = {"jobs", "group"}

    assert await missing() == {"READ jobs", "READ streamworker"}


async def test_topic_that_does_not_exist_lacks_nothing(kafka: MemoryKafka) -> None:
    """It is reported as missing itself, with the command that creates it."""
    del kafka.topics["events"]
    kafka.operations = {"events": 0}

    assert await missing() == set()


@pytest.mark.parametrize("error", [errors.IncompatibleBrokerVersion("v8"), NotImplementedError()])
async def test_broker_that_is_older_than_kip_430_is_trusted(kafka: MemoryKafka, error: Exception) -> None:
    """It cannot say what is granted; the worker reports the first refusal."""
    kafka.errors["send"].append(error)

    assert await missing() == set()


async def test_group_coordinator_of_a_new_cluster_is_waited_for(kafka: MemoryKafka) -> None:
    """It is created at the first request, within seconds."""
    loop = asyncio.get_running_loop()
    kafka.errors["coordinator_lookup"].extend([errors.GroupCoordinatorNotAvailableError()] * 6)
    began = loop.time()

    assert await missing() == set()
    assert 4 <= loop.time() - began <= 5

    kafka.errors["coordinator_lookup"].extend([errors.GroupCoordinatorNotAvailableError()] * 7)
    with pytest.raises(errors.GroupCoordinatorNotAvailableError):
        await missing()


@pytest.mark.parametrize(
    ("lookups", "found"),
    [
        ([errors.GroupAuthorizationFailedError()], {"READ streamworker"}),
        ([None, errors.TransactionalIdAuthorizationFailed()], {"WRITE streamworker.*"}),
    ],
    ids=["group", "transactional id"],
)
async def test_coordinator_that_may_not_be_looked_up_is_a_missing_acl(
    kafka: MemoryKafka, monkeypatch: pytest.MonkeyPatch, lookups: list[Exception | None], found: set[str]
) -> None:
    """Some brokers refuse already this request."""
    answers = list(lookups)

    async def lookup(*_: Any) -> int:
        if answers and (error := answers.pop(0)) is not None:
            raise error
        return 7

    monkeypatch.setattr("tests.memory_kafka._Client.coordinator_lookup", lookup)

    assert await missing() == found


async def test_worker_without_transactions_asks_for_no_transactional_id(kafka: MemoryKafka) -> None:
    """With `delivery = "at_least_once"`."""
    kafka.operations = {"transaction": errors.TransactionalIdAuthorizationFailed.errno}

    assert await missing({"worker__delivery": "at_least_once"}) == set()
    assert "AddOffsetsToTxnRequest" not in {name for _, name in kafka.requests}
