"""openai-python and openai-node on the gateway, with Apache Kafka, the worker and the practice upstream."""

from __future__ import annotations

import asyncio
import secrets
from itertools import count
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
import pytest_asyncio

from streamworker.gateway import chat
from streamworker.practice import PracticeUpstream, expected_text, expected_tool_calls
from streamworker.telemetry.metrics import PREFIX
from tests.integration.gateways import KEY, Gateway, gateway, gateway_process, open_keys
from tests.integration.stage import Stage, eventually
from tests.openai_sdks import Outcome, PythonSDK, Sdk, node_sdk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from streamworker.practice import Call
    from tests.brokers.apache import ApacheKafka

pytestmark = pytest.mark.asyncio(loop_scope="module")

SLOW = "practice?deltas=9999&pace_ms=10"
UPSTREAMS = {
    "default": {"models": "practice*,named-model", "idle_timeout_s": "1", "max_tries": "1"},
    # Each of these is held by its own failures.
    "limited": {"models": "limited*"},
    "refused": {"models": "refused*"},
    "empty": {"models": "empty*"},
    "down": {"models": "down*", "max_tries": "1"},
    "late": {"models": "late*", "max_tries": "1", "first_delta_timeout_s": "0.5"},
}


class Room:
    """A stage with a worker, and gateways in front of it."""

    def __init__(self, stage: Stage, served: Gateway, finish: Gateway) -> None:
        self.stage = stage
        self.served = served
        self.finish = finish
        """A gateway with `chat_usage = "finish"` and a short status hold."""
        self._numbers = count()

    def prompt(self) -> list[dict[str, str]]:
        """Return a prompt that no other call has."""
        return [{"role": "user", "content": f"question {next(self._numbers)}"}]

    async def ask(
        self, sdk: Sdk, body: dict[str, Any], *, on: Gateway | None = None, **options: Any
    ) -> Outcome:
        """Run one chat completion."""
        url = f"http://127.0.0.1:{(on or self.served).port}/v1"
        return await sdk.ask(url, options.pop("api_key", KEY), body, **options)

    def calls(self, messages: object) -> list[Call]:
        """Return the upstream's calls with this prompt."""
        return [call for call in self.stage.practice.calls if call.body and call.body["messages"] == messages]

    def started(self) -> list[str]:
        """Return the ids of all jobs that have started, in their order."""
        return [record.event["job_id"] for record in self.stage.records if record.event["type"] == "started"]

    def jobs(self) -> int:
        """Return the number of jobs that have ended."""
        return len(self.stage.terminals())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def room(apache_kafka: ApacheKafka, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Room]:
    """One room for all tests of this file."""
    directory = tmp_path_factory.mktemp("chat")
    async with (
        PracticeUpstream() as practice,
        Stage(apache_kafka, practice, lambda name: f"chat.{name}.{secrets.token_hex(4)}", directory) as stage,
    ):
        open_keys(stage, directory)
        for name, settings in UPSTREAMS.items():
            prefix = f"UPSTREAMS__{name.upper()}__"
            stage.variables[f"{prefix}BASE_URL"] = practice.base_url
            stage.variables |= {f"{prefix}{key.upper()}": value for key, value in settings.items()}
        await stage.open(events_partitions=2)
        wait = {"gateway__chat_max_wait_s": 0.4, "gateway__keep_alive_s": 0.2}
        async with (
            stage.worker(),
            gateway(stage, **wait) as served,
            gateway(stage, **wait, gateway__chat_usage="finish", gateway__chat_status_hold_s=0.2) as finish,
        ):
            yield Room(stage, served, finish)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["python", "node"])
async def sdk(request: pytest.FixtureRequest) -> AsyncIterator[Sdk]:
    """Each client in turn."""
    if request.param == "python":
        yield PythonSDK()
    else:
        async with node_sdk() as node:
            yield node


# Answers


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("place", ["chunk", "finish"])
async def test_text_and_usage_are_those_of_the_upstream(
    room: Room, sdk: Sdk, stream: bool, place: str
) -> None:
    """Streaming or not, wherever usage is sent; the `streamworker` member names the job."""
    model, messages = "practice?deltas=12", room.prompt()
    options = {"stream_options": {"include_usage": True}} if stream else {}
    body = {"model": model, "messages": messages, "stream": stream, **options}
    outcome = await room.ask(sdk, body, on=room.finish if place == "finish" else room.served)

    assert outcome.error is None
    assert [outcome.text] == expected_text(model, messages)
    assert outcome.finish == {"0": "stop"}
    assert outcome.streamworker is not None
    [ending] = await room.stage.ended(outcome.streamworker["job_id"])
    assert outcome.usage == ending["usage"]
    assert outcome.streamworker == {
        "job_id": ending["job_id"],
        "usage_source": "upstream",
        "status": "completed",
    }
    assert ending["metadata"] == {"gateway": "chat", "tenant": "acme"}


async def test_usage_is_not_sent_without_being_asked_for(room: Room, sdk: Sdk) -> None:
    """As OpenAI does it."""
    body = {"model": "practice?deltas=2", "messages": room.prompt(), "stream": True}
    outcome = await room.ask(sdk, body)

    assert (outcome.error, outcome.usage) == (None, None)


@pytest.mark.parametrize("stream", [True, False])
async def test_every_choice_is_delivered(room: Room, sdk: Sdk, stream: bool) -> None:
    """`n=2`: both texts, each with its finish reason."""
    model, messages = "practice?deltas=6", room.prompt()
    body = {"model": model, "messages": messages, "n": 2, "stream": stream}
    outcome = await room.ask(sdk, body)

    assert outcome.error is None
    assert list(outcome.texts.values()) == expected_text(model, messages, 2)
    assert outcome.finish == {"0": "stop", "1": "stop"}


@pytest.mark.parametrize("stream", [True, False])
async def test_tool_calls_are_delivered(room: Room, sdk: Sdk, stream: bool) -> None:
    """Names and arguments, put together from their fragments."""
    model, messages = "practice?deltas=0&tool_calls=2&shape=openai", room.prompt()
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    body = {"model": model, "messages": messages, "tools": tools, "stream": stream}
    outcome = await room.ask(sdk, body)

    assert outcome.error is None
    expected = [call["function"] for call in expected_tool_calls(model)]
    assert [outcome.calls["0"][at] for at in ("0", "1")] == expected
    assert outcome.finish == {"0": "tool_calls"}


@pytest.mark.parametrize("shape", ["azure", "vllm", "llamacpp", "deepseek", "mistral", "openrouter", "xai"])
async def test_streams_of_all_shapes_of_upstreams_are_read(room: Room, sdk: Sdk, shape: str) -> None:
    """Chunks without choices, members of the upstream's own, keep-alives."""
    model, messages = f"practice?deltas=4&shape={shape}&content_as=text", room.prompt()
    body = {"model": model, "messages": messages, "stream": True}
    outcome = await room.ask(sdk, body, on=room.finish)

    assert outcome.error is None
    assert [outcome.text] == expected_text(model, messages)


async def test_pings_before_the_first_delta_are_ignored(room: Room, sdk: Sdk) -> None:
    """The status is sent after the hold, comments keep the connection."""
    model, messages = "practice?deltas=3&first_delta_ms=800", room.prompt()
    outcome = await room.ask(sdk, {"model": model, "messages": messages, "stream": True}, on=room.finish)

    assert outcome.error is None
    assert [outcome.text] == expected_text(model, messages)


async def test_newlines_before_a_long_answer_are_ignored(
    room: Room, sdk: Sdk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer without `stream` that takes longer than its status is held."""
    monkeypatch.setattr(chat, "STATUS_HOLD_S", 0.1)
    model, messages = "practice?deltas=3&first_delta_ms=600", room.prompt()
    outcome = await room.ask(sdk, {"model": model, "messages": messages})

    assert outcome.error is None
    assert [outcome.text] == expected_text(model, messages)


# Errors

STATUSES = [
    # model, class, status, code
    ("practice?status=400", "BadRequestError", 400, "upstream_rejected"),
    ("practice?status=404", "NotFoundError", 404, "upstream_rejected"),
    ("practice?status=422", "UnprocessableEntityError", 422, "upstream_rejected"),
    ("limited?status=429", "RateLimitError", 429, "rate_limited"),
    ("refused?status=401", "InternalServerError", 502, "auth"),
    ("empty?status=402", "InternalServerError", 502, "quota"),
    ("down?status=503", "InternalServerError", 503, "upstream_unavailable"),
    ("late?first_delta_ms=5000", "InternalServerError", 504, "timeout_first_delta"),
    ("unknown-model", "NotFoundError", 404, "model_not_found"),
]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("model", "name", "status", "code"), STATUSES, ids=[row[0] for row in STATUSES])
async def test_failure_before_the_first_delta_raises_the_class_of_its_status(
    room: Room, sdk: Sdk, stream: bool, model: str, name: str, status: int, code: str
) -> None:
    """An upstream that is held is an error after `chat_max_wait_s`."""
    body = {"model": model, "messages": room.prompt(), "stream": stream}
    outcome = await room.ask(sdk, body)

    assert outcome.error == {"class": name, "code": code, "status": status}


BREAKS = [
    ("practice?deltas=6&break_after=3", "truncated"),
    ("practice?deltas=6&close_after=3", "truncated"),
    ("practice?deltas=6&end_after=3", "truncated"),
    ("practice?deltas=6&error_frame_after=3", "upstream_error"),
    ("practice?deltas=6&error_then_done_after=3", "upstream_error"),
    ("practice?deltas=6&garbage_after=3", "upstream_protocol"),
    ("practice?deltas=6&stall_after=3", "timeout_idle"),
]


@pytest.mark.parametrize(("model", "code"), BREAKS, ids=[row[0] for row in BREAKS])
async def test_failure_after_text_raises_with_its_code(room: Room, sdk: Sdk, model: str, code: str) -> None:
    """A stream that breaks never looks like one that ends."""
    outcome = await room.ask(sdk, {"model": model, "messages": room.prompt(), "stream": True})

    assert outcome.text
    assert outcome.error_class == "APIError"
    assert outcome.error is not None
    assert outcome.error["code"] == code


@pytest.mark.parametrize(("model", "code"), BREAKS[:1] + BREAKS[-1:], ids=["break", "stall"])
async def test_answer_without_stream_that_breaks_raises(room: Room, sdk: Sdk, model: str, code: str) -> None:
    """A part of an answer is not an answer."""
    outcome = await room.ask(sdk, {"model": model, "messages": room.prompt()})

    assert outcome.text == ""
    assert outcome.error_class == "InternalServerError"
    assert outcome.error is not None
    assert outcome.error["code"] == code


async def test_failure_after_newlines_is_a_cut_connection(
    room: Room, sdk: Sdk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both clients would take an error body under a status of 200 for an answer."""
    monkeypatch.setattr(chat, "STATUS_HOLD_S", 0.1)
    model = "practice?deltas=6&pace_ms=100&break_after=4"
    outcome = await room.ask(sdk, {"model": model, "messages": room.prompt()})

    assert outcome.error_class == ("APIConnectionError" if sdk.name == "python" else "TypeError")


@pytest.mark.parametrize(
    ("model", "limit_s", "expected"),
    # The first delta of SLOW comes within its limit, also to the first call of the worker.
    [(SLOW, "2", "APIError"), ("practice?first_delta_ms=9000", "0.5", "InternalServerError")],
)
async def test_deadline_of_the_client_is_the_jobs(
    room: Room, sdk: Sdk, model: str, limit_s: str, expected: str
) -> None:
    """`Streamworker-Timeout` ends the job, and with it the call, before or after the first delta."""
    messages = room.prompt()
    body = {"model": model, "messages": messages, "stream": True}
    outcome = await room.ask(sdk, body, headers={"Streamworker-Timeout": limit_s})

    assert outcome.error_class == expected
    assert outcome.error is not None
    assert outcome.error["code"] == "deadline"
    [call] = room.calls(messages)
    await eventually(lambda: call.outcome == "client_closed")


@pytest.mark.parametrize("stream", [True, False])
async def test_job_that_another_client_cancels_raises(room: Room, sdk: Sdk, stream: bool) -> None:
    """By its id, from anywhere. 409 is not retried: the answer says so."""
    begun, messages = len(room.started()), room.prompt()
    body = {"model": SLOW, "messages": messages, "stream": stream}
    asked = asyncio.create_task(room.ask(sdk, body, max_retries=2))
    await eventually(lambda: len(room.started()) > begun, 10)
    job_id = room.started()[begun]
    response = await room.served.http.post(f"/v1/jobs/{job_id}/cancel")
    outcome = await asked

    assert response.status_code == 202
    assert outcome.error is not None
    assert outcome.error["code"] == "cancelled"
    assert outcome.error_class == ("APIError" if stream else "ConflictError")
    await eventually(lambda: job_id in room.stage.terminals())
    assert len(room.calls(messages)) == 1


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"model": "practice", "messages": []}, "BadRequestError"),
        (
            {"model": "practice", "messages": [1], "stream_options": {"include_usage": "yes"}},
            "BadRequestError",
        ),
    ],
)
async def test_request_that_is_not_valid_raises(
    room: Room, sdk: Sdk, body: dict[str, Any], expected: str
) -> None:
    """Before a job is made."""
    before = room.jobs()
    outcome = await room.ask(sdk, body)

    assert outcome.error == {"class": expected, "code": "invalid_request", "status": 400}
    assert room.jobs() == before


async def test_wrong_key_raises(room: Room, sdk: Sdk) -> None:
    """The client's class for 401."""
    outcome = await room.ask(sdk, {"model": "practice", "messages": room.prompt()}, api_key="swk_wrong")

    assert outcome.error == {"class": "AuthenticationError", "code": "unauthenticated", "status": 401}


async def test_responses_api_raises_at_once(room: Room, sdk: Sdk) -> None:
    """It is not served: the client's class for 404, after one request."""
    before = _not_found(room)
    outcome = await room.ask(sdk, {"model": "practice", "input": "Hi", "stream": True}, max_retries=2)

    assert outcome.error == {"class": "NotFoundError", "code": "not_found", "status": 404}
    assert _not_found(room) == before + 1


def _not_found(room: Room) -> float:
    registry = room.served.metrics.registry
    return registry.get_sample_value(f"{PREFIX}gateway_errors_total", {"code": "not_found"}) or 0.0


# Retries


@pytest.mark.parametrize(
    ("model", "jobs"), [("down?status=503&deltas=1", 2), ("practice?status=405&deltas=1", 1)]
)
async def test_failure_is_retried_by_the_client_only_if_that_may_help(
    room: Room, sdk: Sdk, model: str, jobs: int
) -> None:
    """`x-should-retry` is the terminal event's `retriable`: each try is another job."""
    before = room.jobs()
    outcome = await room.ask(sdk, {"model": model, "messages": room.prompt()}, max_retries=1)

    assert outcome.error_class == "InternalServerError"
    await eventually(lambda: room.jobs() == before + jobs)


async def test_retry_after_a_timeout_joins_the_job_that_continues(room: Room, sdk: Sdk) -> None:
    """One call of the upstream, paid for once, whose answer the second try gets."""
    model, messages = "practice?deltas=3&first_delta_ms=1800", room.prompt()
    outcome = await room.ask(
        sdk,
        {"model": model, "messages": messages},
        timeout_s=1,
        max_retries=3,
        headers={"Streamworker-On-Disconnect": "continue"},
    )

    assert outcome.error is None
    assert [outcome.text] == expected_text(model, messages)
    assert len(room.calls(messages)) == 1


# Disconnects


async def test_client_that_leaves_a_stream_cancels_its_job(room: Room, sdk: Sdk) -> None:
    """The upstream's stream is closed, and the terminal event says `cancelled`."""
    messages, begun = room.prompt(), len(room.started())
    outcome = await room.ask(sdk, {"model": SLOW, "messages": messages, "stream": True}, stop_after=3)
    [call] = room.calls(messages)
    await eventually(lambda: call.outcome == "client_closed", 5)
    [ending] = await room.stage.ended(room.started()[begun])

    assert outcome.chunks == 3
    assert (ending["status"], ending["error"]["code"]) == ("cancelled", "cancelled")


@pytest.mark.parametrize("stream", [True, False])
async def test_client_that_leaves_before_the_first_delta_cancels_its_job(
    room: Room, sdk: Sdk, stream: bool
) -> None:
    """Streaming or not: the upstream does not generate for a client that is gone."""
    messages, begun = room.prompt(), len(room.started())
    body = {"model": "practice?first_delta_ms=60000", "messages": messages, "stream": stream}
    outcome = await room.ask(sdk, body, abort_after_s=1)
    [call] = room.calls(messages)
    await eventually(lambda: call.outcome == "client_closed", 5)
    [ending] = await room.stage.ended(room.started()[begun])

    assert outcome.error is not None
    assert ending["status"] == "cancelled"


async def test_gateway_that_dies_leaves_the_stream_unfinished(room: Room, sdk: Sdk) -> None:
    """Both clients raise; the job goes on, and its events can be read at another gateway."""
    async with gateway_process(room.stage) as (dying, process):
        messages = room.prompt()
        body = {"model": "practice?deltas=100&pace_ms=20", "messages": messages, "stream": True}
        asked = asyncio.create_task(room.ask(sdk, body, on=dying))
        await eventually(lambda: room.calls(messages) and room.calls(messages)[0].sent.deltas > 10)
        await process.kill()
        outcome = await asked

    assert outcome.text
    assert outcome.error_class == ("APIConnectionError" if sdk.name == "python" else "TypeError")
    [call] = room.calls(messages)
    await eventually(lambda: call.outcome == "completed", 10)


# Models


async def test_models_are_listed_and_found(room: Room) -> None:
    """Names, not patterns."""
    client = openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{room.served.port}/v1", api_key=KEY, max_retries=0
    )
    async with client:
        names = [model.id async for model in client.models.list()]
        found = await client.models.retrieve("named-model")
        with pytest.raises(openai.NotFoundError) as raised:
            await client.models.retrieve("practice")

    assert names == ["named-model"]
    assert found.object == "model"
    assert raised.value.code == "model_not_found"


# Responses as they are on the wire


async def test_stream_is_comments_and_data_alone(room: Room) -> None:
    """No `id`, `event` or `retry` field, which openai-python cannot read; `[DONE]` is last."""
    body = {
        "model": "practice?deltas=3&first_delta_ms=600",
        "messages": room.prompt(),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{room.finish.port}", timeout=20) as http:
        response = await http.post(
            "/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}
        )

    lines = [line for line in response.text.split("\n") if line]
    assert {line.partition(" ")[0] for line in lines} == {":", "data:"}
    assert response.text.endswith("data: [DONE]\n\n")
    assert response.headers["streamworker-job-id"].startswith("acme.")
    assert "connection" not in response.headers
