"""`check`, `topics` and the errors of all commands: what is wrong, where, and what to do about it."""

from __future__ import annotations

import asyncio
import io
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka.errors import (
    IncompatibleBrokerVersion,
    InvalidReplicationFactorError,
    KafkaConnectionError,
    TopicAlreadyExistsError,
)

from streamworker.cli import check as module
from streamworker.cli.commands import run_command
from streamworker.cli.extras import needs_extra
from streamworker.cli.one_token import ask_for_one_token
from streamworker.config import UpstreamSettings
from streamworker.errors import ConfigurationError, StreamworkerError, UpstreamError
from streamworker.kafka.topics import RESULTS_CLEANUP
from streamworker.model import ErrorCode, JobError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from tests.memory_kafka import MemoryKafka
    from tests.unit.cli.conftest import Outcome

TOPICS = ["streamworker.jobs", "streamworker.events", "streamworker.control", "streamworker.dlq"]


class Upstreams:
    """Upstreams by base URL: the models that they list and the chunks with which they answer, or their errors."""

    def __init__(self) -> None:
        self.models: dict[str, list[str] | JobError] = {}
        self.answers: list[list[bytes] | JobError] = []
        self.bodies: list[dict[str, Any]] = []
        self.closed = 0

    def new(self, settings: UpstreamSettings) -> Upstream:
        """Stand in for `HttpUpstream`."""
        return Upstream(self, settings)


class Upstream:
    """One client of an upstream, whose key is `s3cret`."""

    def __init__(self, upstreams: Upstreams, settings: UpstreamSettings) -> None:
        self._upstreams = upstreams
        self._settings = settings

    async def models(self) -> list[str]:
        found = self._upstreams.models.get(self._settings.base_url, ["m"])
        if isinstance(found, JobError):
            raise UpstreamError(found)
        return found

    def scrub(self, text: str) -> str:
        return text.replace("s3cret", "***")

    async def close(self) -> None:
        self._upstreams.closed += 1

    @asynccontextmanager
    async def call(self, body: bytes, _: Mapping[str, str]) -> AsyncIterator[AsyncIterator[bytes]]:
        self._upstreams.bodies.append(json.loads(body))
        answer = self._upstreams.answers.pop(0)
        if isinstance(answer, JobError):
            raise UpstreamError(answer)

        async def chunks() -> AsyncIterator[bytes]:
            for chunk in answer:
                yield chunk

        yield chunks()


@pytest.fixture
def upstreams(monkeypatch: pytest.MonkeyPatch) -> Upstreams:
    """The upstreams of the settings."""
    upstreams = Upstreams()
    monkeypatch.setattr(module, "HttpUpstream", upstreams.new)
    return upstreams


URL = "http://127.0.0.1:9"


def test_sound_installation_is_reported_line_by_line(
    kafka: MemoryKafka, upstreams: Upstreams, command: Callable[..., Outcome]
) -> None:
    """Exit code 0; every connection is closed."""
    ended = command("check")

    assert (ended.code, ended.err) == (0, "")
    assert ended.lines == [
        "ok      configuration",
        "ok      broker localhost:9092",
        "ok      rights",
        "ok      topics",
        f"ok      upstream default ({URL}/v1): 1 models",
    ]
    assert kafka.admins[0].is_closed
    assert upstreams.closed == 1


def test_missing_topic_and_small_limit_are_reported_and_the_upstreams_are_checked_too(
    kafka: MemoryKafka, upstreams: Upstreams, command: Callable[..., Outcome]
) -> None:
    """All faults at once: each run of a deployment takes minutes."""
    del kafka.topics["streamworker.events"]
    kafka.configurations["streamworker.dlq"] = {"max.message.bytes": "10"}
    ended = command("check")

    assert ended.code == 1
    assert [line for line in ended.lines if line.startswith("wrong")] == [
        "wrong   topic streamworker.events does not exist: create it with `streamworker topics create`",
        ended.lines[3],
    ]
    assert "streamworker.dlq accepts records of 10 bytes" in ended.lines[3]
    assert ended.lines[-1].startswith("ok      upstream")


def test_missing_acls_hide_the_topics(
    kafka: MemoryKafka, upstreams: Upstreams, command: Callable[..., Outcome]
) -> None:
    """A topic that may not be described looks like a missing one: it must not be reported as such."""
    kafka.hidden = {"streamworker.events"}
    ended = command("check")
    wrong = [line for line in ended.lines if line.startswith("wrong")]

    assert ended.code == 1
    assert len(wrong) == 1
    assert "lacks WRITE on topic streamworker.events" in wrong[0]
    assert "does not exist" not in ended.out


def test_broker_that_is_away_is_reported_and_the_upstreams_are_checked_too(
    kafka: MemoryKafka, upstreams: Upstreams, command: Callable[..., Outcome]
) -> None:
    """The admin client that could not start is closed."""
    kafka.errors["start_admin"].append(KafkaConnectionError("no route"))
    ended = command("check")

    assert ended.code == 1
    assert ended.lines[1].startswith("wrong   broker localhost:9092: connecting to localhost:9092: no route")
    assert ended.lines[2].startswith("ok      upstream")
    assert kafka.admins[0].is_closed


def test_limits_that_only_cost_performance_are_notes(
    kafka: MemoryKafka, upstreams: Upstreams, command: Callable[..., Outcome]
) -> None:
    """They do not fail the check."""
    kafka.configurations["1"] = {"offset.metadata.max.bytes": "100"}
    kafka.configurations["streamworker.jobs"] = {"retention.ms": "3600000"}
    ended = command("check")
    notes = [line for line in ended.lines if line.startswith("note")]

    assert ended.code == 0
    assert len(notes) == 2
    assert "topic streamworker.jobs keeps records for 1 h" in notes[0]
    assert "accept 100 bytes of offset metadata" in notes[1]


def test_old_broker_that_cannot_name_its_rights_is_ok(
    kafka: MemoryKafka, upstreams: Upstreams, command: Callable[..., Outcome]
) -> None:
    """Before KIP-430."""
    kafka.errors["send"].append(IncompatibleBrokerVersion("v8"))

    assert command("check").code == 0


# Upstreams


def refusal(code: ErrorCode, status: int | None = None, message: str = "refused: s3cret") -> JobError:
    return JobError(code, message, http_status=status)


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (ErrorCode.AUTH, "see api_key_env or api_key_file"),
        (ErrorCode.QUOTA, "has no credit"),
        (ErrorCode.UPSTREAM_UNAVAILABLE, "is it running"),
        (ErrorCode.TIMEOUT_CONNECT, "a proxy or a firewall"),
        (ErrorCode.UPSTREAM_PROTOCOL, "usually with /v1"),
        (ErrorCode.UPSTREAM_ERROR, "see the message"),
    ],
)
def test_upstream_that_refuses_is_wrong_with_advice_and_without_its_key(
    kafka: MemoryKafka, upstreams: Upstreams, command: Callable[..., Outcome], code: ErrorCode, advice: str
) -> None:
    """A provider's error may repeat the key."""
    upstreams.models[f"{URL}/v1"] = refusal(code)
    ended = command("check")

    assert ended.code == 1
    assert ended.lines[-1].startswith(f"wrong   upstream default ({URL}/v1): {code}: refused: ***; ")
    assert advice in ended.lines[-1]
    assert upstreams.closed == 1


@pytest.mark.parametrize(
    ("url", "models", "code", "line"),
    [
        (f"{URL}/v1", {f"{URL}/v1": 404}, 0, "ok      {what}: reachable, does not list its models"),
        (f"{URL}/v1", {f"{URL}/v1": 501}, 0, "ok      {what}: reachable, does not list its models"),
        (URL, {URL: 405, f"{URL}/v1": 404}, 0, "does not list its models; most base URLs end in /v1"),
        (f"{URL}/", {f"{URL}/": 404}, 1, "wrong   {what}: the API is at " + URL + "/v1; set base_url to it"),
        (URL, {URL: 403}, 1, "wrong   {what}: upstream_error: "),
    ],
)
def test_base_url_without_a_version_is_tried_with_one(
    kafka: MemoryKafka,
    upstreams: Upstreams,
    command: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    models: dict[str, int],
    code: int,
    line: str,
) -> None:
    """The most common mistake; an upstream that answers without a list of models is not wrong."""
    monkeypatch.setenv("STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL", url)
    upstreams.models |= {at: refusal(ErrorCode.UPSTREAM_ERROR, status) for at, status in models.items()}
    ended = command("check")

    assert ended.code == code
    assert line.format(what=f"upstream default ({url})") in ended.lines[-1]


# One real call


def chunk(**members: Any) -> bytes:
    return (
        b"data: " + json.dumps({"id": "1", "object": "chat.completion.chunk", **members}).encode() + b"\n\n"
    )


DELTA = chunk(choices=[{"index": 0, "delta": {"content": "Yes"}, "finish_reason": None}])
STOP = chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
USAGE = chunk(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6})
DONE = b"data: [DONE]\n\n"


def test_call_sends_one_request_to_each_upstream_that_serves_the_model(
    kafka: MemoryKafka, upstreams: Upstreams, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer is limited to one token."""
    monkeypatch.setenv("STREAMWORKER_UPSTREAMS__OTHER__BASE_URL", "http://127.0.0.1:8/v1")
    monkeypatch.setenv("STREAMWORKER_UPSTREAMS__OTHER__MODELS", "llama-*")
    monkeypatch.setenv("STREAMWORKER_UPSTREAMS__DEFAULT__MODELS", "gpt-*")
    upstreams.answers = [[DELTA, STOP, USAGE, DONE]]
    ended = command("check", "--call", "gpt-4o")
    [body] = upstreams.bodies

    assert ended.code == 0
    assert "call of gpt-4o at upstream default: first delta after " in ended.lines[-1]
    assert ended.lines[-1].endswith(" ms, with a usage report")
    assert (body["model"], body["max_tokens"], body["stream"]) == ("gpt-4o", 1, True)
    assert body["stream_options"] == {"include_usage": True}


def test_call_of_a_model_that_no_upstream_serves_is_wrong(
    kafka: MemoryKafka, upstreams: Upstreams, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is sent."""
    monkeypatch.setenv("STREAMWORKER_UPSTREAMS__DEFAULT__MODELS", "llama-*")
    ended = command("check", "--call", "gpt-4o")

    assert ended.code == 1
    assert ended.lines[-1] == "wrong   call: no upstream serves gpt-4o; see upstreams.*.models"
    assert upstreams.bodies == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ([DONE], "upstream_protocol: the event stream ended without a delta"),
        ([b'data: {"error": {"message": "overloaded s3cret"}}\n\n'], "overloaded ***"),
        (refusal(ErrorCode.AUTH, 401), "auth: refused: ***; the key is missing or wrong"),
        (refusal(ErrorCode.UPSTREAM_ERROR, 400), "upstream_error: refused: ***"),
    ],
    ids=["no delta", "error in the stream", "401", "400"],
)
def test_call_that_fails_is_wrong_with_the_reason(
    kafka: MemoryKafka, upstreams: Upstreams, command: Callable[..., Outcome], answer: Any, reason: str
) -> None:
    """Without the key, and with every client closed."""
    upstreams.answers = [answer]
    ended = command("check", "--call", "m")

    assert ended.code == 1
    assert reason in ended.lines[-1]
    assert upstreams.closed == 2


async def test_other_limit_is_used_where_the_first_one_is_refused() -> None:
    """Newer models of OpenAI refuse `max_tokens`; the second refusal is the answer."""
    advice = "Unsupported parameter: use 'max_completion_tokens' instead"
    settings = UpstreamSettings(base_url=URL, include_usage=False)
    upstreams = Upstreams()
    upstreams.answers = [refusal(ErrorCode.UPSTREAM_ERROR, 400, advice), [DELTA, STOP, DONE]]
    answer = await ask_for_one_token(upstreams.new(settings), settings, "m")  # type: ignore[arg-type]

    assert not answer.has_usage
    assert [sorted(body) for body in upstreams.bodies] == [
        ["max_tokens", "messages", "model", "stream"],
        ["max_completion_tokens", "messages", "model", "stream"],
    ]
    upstreams.answers = [refusal(ErrorCode.UPSTREAM_ERROR, 400, advice)] * 2
    with pytest.raises(UpstreamError):
        await ask_for_one_token(upstreams.new(settings), settings, "m")  # type: ignore[arg-type]
    assert upstreams.answers == []


async def test_call_that_does_not_end_is_given_up() -> None:
    """After the upstream's own limit for a first delta."""

    class Silent(Upstream):
        @asynccontextmanager
        async def call(self, body: bytes, _: Mapping[str, str]) -> AsyncIterator[AsyncIterator[bytes]]:
            async def chunks() -> AsyncIterator[bytes]:
                yield DELTA
                await asyncio.get_running_loop().create_future()

            yield chunks()

    settings = UpstreamSettings(base_url=URL, first_delta_timeout_s=0.05)
    with pytest.raises(UpstreamError) as failed:
        await ask_for_one_token(Silent(Upstreams(), settings), settings, "m")  # type: ignore[arg-type]

    assert failed.value.error.code == ErrorCode.TIMEOUT_FIRST_DELTA
    assert failed.value.error.message == "no complete answer within 0.05 s"


# Traces


@pytest.mark.parametrize(
    ("fault", "code", "line"),
    [
        (None, 0, "ok      traces"),
        ("404 Not Found", 1, "wrong   traces: 404 Not Found; is the collector running"),
    ],
)
def test_trace_collector_is_checked_where_traces_are_on(
    kafka: MemoryKafka,
    upstreams: Upstreams,
    command: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    fault: str | None,
    code: int,
    line: str,
) -> None:
    """The exporter is closed."""

    class Tracing:
        is_closed = False

        async def fault(self) -> str | None:
            return fault

        async def close(self) -> None:
            self.is_closed = True

    tracing = Tracing()
    monkeypatch.setattr(module, "open_tracing", lambda _: tracing)
    ended = command("check")

    assert ended.code == code
    assert ended.lines[-1].startswith(line)
    assert tracing.is_closed


def test_traces_that_cannot_be_sent_are_wrong(
    kafka: MemoryKafka, upstreams: Upstreams, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as with an extra that is not installed."""

    def refuse(_: Any) -> None:
        raise ConfigurationError(["otel: install it", "second fault"])

    monkeypatch.setattr(module, "open_tracing", refuse)
    ended = command("check")

    assert ended.code == 1
    assert ended.lines[-2:] == ["wrong   otel: install it", "wrong   second fault"]


# Topics


def test_topics_create_creates_those_that_are_missing(
    kafka: MemoryKafka, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the given number of partitions, three copies, and the configuration that their records need."""
    monkeypatch.setenv("STREAMWORKER_TOPICS__RESULTS", "results")
    monkeypatch.setenv("STREAMWORKER_KAFKA__MAX_RESULT_BYTES", "8000000")
    for name in TOPICS[1:]:
        del kafka.topics[name]
    ended = command("topics", "create", "--partitions", "5")

    assert ended.code == 0
    assert ended.lines == [
        *(f"created {name} with 5 partitions" for name in [*TOPICS[1:], "results"]),
        "exists  streamworker.jobs: 2 partitions, unchanged",
    ]
    assert {name: len(logs) for name, logs in kafka.topics.items()} == dict.fromkeys(
        [*TOPICS[1:], "results"], 5
    ) | {"streamworker.jobs": 2}
    assert {topic.replication_factor for topic in kafka.admins[0].created} == {3}
    limit = {"max.message.bytes": "8001024"}
    assert kafka.configurations["results"] == RESULTS_CLEANUP | limit
    assert kafka.configurations["streamworker.events"] == {}
    assert command("topics", "create").out.count("exists") == 5


@pytest.mark.parametrize(
    ("brokers", "options", "copies"), [(1, [], 1), (2, [], 2), (5, [], 3), (5, ["4"], 4)]
)
def test_topics_have_three_copies_or_as_many_as_there_are_brokers(
    kafka: MemoryKafka, command: Callable[..., Outcome], brokers: int, options: list[str], copies: int
) -> None:
    """Unless a number is given."""
    kafka.brokers = brokers
    del kafka.topics["streamworker.dlq"]
    command("topics", "create", *(["--replicas", *options] if options else []))

    assert [topic.replication_factor for topic in kafka.admins[0].created] == [copies]


def test_topic_that_the_broker_refuses_to_create_is_named(
    kafka: MemoryKafka, command: Callable[..., Outcome]
) -> None:
    """With its error; one that was created in the meantime by another process is not an error."""
    del kafka.topics["streamworker.dlq"], kafka.topics["streamworker.control"]
    kafka.errors["create streamworker.dlq"].append(InvalidReplicationFactorError())
    kafka.errors["create streamworker.control"].append(TopicAlreadyExistsError())
    ended = command("topics", "create")

    assert (ended.code, ended.out) == (1, "")
    assert "creating topics: streamworker.dlq: INVALID_REPLICATION_FACTOR" in ended.err
    assert "streamworker.control" not in ended.err


def test_topics_that_may_not_be_described_are_not_taken_for_missing(
    kafka: MemoryKafka, command: Callable[..., Outcome]
) -> None:
    """Creating them would fail with a message that says nothing."""
    kafka.hidden = {"streamworker.events"}
    ended = command("topics", "create")

    assert ended.code == 1
    assert "lacks WRITE on topic streamworker.events" in ended.err
    assert kafka.admins[0].created == []


def test_topics_check_prints_facts_and_faults_apart(
    kafka: MemoryKafka, command: Callable[..., Outcome]
) -> None:
    """Facts on standard output, faults on standard error."""
    del kafka.topics["streamworker.control"]
    kafka.configurations["streamworker.jobs"] = {"max.message.bytes": "2097152"}
    ended = command("topics", "check")

    assert ended.code == 1
    assert ended.lines == [
        "ok      streamworker.jobs: 2 partitions, 3 replicas, records up to 2097152 bytes",
        "ok      streamworker.events: 2 partitions, 3 replicas",
        "ok      streamworker.dlq: 1 partition, 3 replicas",
    ]
    assert ended.err == (
        "topic streamworker.control does not exist: create it with `streamworker topics create`\n"
    )


# Errors of all commands


def test_missing_key_is_a_fault_for_check_and_not_for_commands_that_call_no_upstream(
    kafka: MemoryKafka, upstreams: Upstreams, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator who cancels a job needs no API key."""
    monkeypatch.setenv("STREAMWORKER_UPSTREAMS__DEFAULT__API_KEY_ENV", "AN_ABSENT_KEY")
    ended = command("check")

    assert ended.code == 2
    assert "the environment variable AN_ABSENT_KEY is not set" in ended.err
    assert command("cancel", "j").code == 0


def test_fault_of_the_settings_is_bad_usage(
    kafka: MemoryKafka, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, as for a wrong option: trying again does not help."""
    monkeypatch.setenv("STREAMWORKER_TOPICS__JOBS", "a b")
    for arguments in (("check",), ("tail", "j"), ("cancel", "j"), ("dlq", "list"), ("topics", "check")):
        ended = command(*arguments)
        assert (ended.code, ended.out) == (2, "")
        assert "topics.jobs" in ended.err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (StreamworkerError("it failed"), 1, "error: it failed\n"),
        (ConfigurationError(["a: x", "b: y"]), 2, "the configuration cannot be used:\n  a: x\n  b: y\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_error_of_a_command_becomes_an_exit_code(
    kafka: MemoryKafka,
    command: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    text: str,
) -> None:
    """With one line, and without a traceback."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("streamworker.cli.cancel.settings_of", fail)
    ended = command("cancel", "j")

    assert ended.code == code
    assert ended.err.lstrip("\n") == text
    assert "Traceback" not in ended.err


def test_closed_pipe_ends_a_command_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `| head`: the interpreter must not complain at its exit that it cannot flush the output."""

    def fail(*_: Any, **__: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("streamworker.cli.cancel.settings_of", fail)
    monkeypatch.setattr("sys.stderr", stderr := io.StringIO())
    with pytest.raises(SystemExit) as ended:
        run_command(["cancel", "j"])

    assert ended.value.code == 0
    assert stderr.closed


@pytest.mark.parametrize(("name", "is_foreign"), [("uvicorn.config", True), ("streamworker.absent", False)])
def test_missing_package_of_an_extra_is_named_with_its_extra(name: str, is_foreign: bool) -> None:
    """A missing module of this project is a bug, and is not hidden."""
    expected = StreamworkerError if is_foreign else ModuleNotFoundError
    with pytest.raises(expected) as failed, needs_extra("gateway", "gateway"):
        raise ModuleNotFoundError(name=name)

    if is_foreign:
        assert str(failed.value).startswith(
            "gateway needs the gateway extra (uvicorn.config is not installed): pip install 'streamworker[gateway]'"
        )


def test_topics_check_notes_a_job_topic_with_one_partition(
    kafka: MemoryKafka, command: Callable[..., Outcome]
) -> None:
    """It works, so the exit code is 0; a second worker would wait."""
    kafka.topics["streamworker.jobs"] = kafka.topics["streamworker.jobs"][:1]
    for words in (["topics", "check"], ["check"]):
        ended = command(*words)
        (note,) = [line for line in ended.lines if line.startswith("note ")]
        assert "topic streamworker.jobs has 1 partition, so one worker runs all of its jobs" in note
    assert command("topics", "check").code == 0
