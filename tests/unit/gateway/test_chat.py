"""`/v1/chat/completions` over HTTP, with an event log and a writer in memory."""

from __future__ import annotations

import asyncio
import io
import json
from contextlib import asynccontextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from streamworker.gateway import chat
from streamworker.gateway.feeds import BrokerUnavailable, FeedLost
from streamworker.gateway.writer import NotAcknowledged
from tests.chats import chunks_of
from tests.unit.gateway.served import ACME, OTHER, READ_ONLY, Served, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"
USAGE = {"prompt_tokens": 1, "completion_tokens": 2}


async def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.005)


async def job_of(gateway: Served, number: int = 1) -> str:
    """Wait until `number` jobs are written; return the id of the last one."""
    await until(lambda: len(jobs(gateway)) >= number)
    return str(jobs(gateway)[number - 1]["job_id"])


def jobs(gateway: Served) -> list[dict[str, Any]]:
    return [value for topic, _, value in gateway.writer.records if topic == "streamworker.jobs"]


def cancels(gateway: Served) -> list[str]:
    """Return the ids of cancelled jobs."""
    return [value["job_id"] for topic, _, value in gateway.writer.records if topic == "streamworker.control"]


class Job:
    """Publishes the events of one job."""

    def __init__(self, gateway: Served, job_id: str) -> None:
        self.log = gateway.log
        self.id = job_id
        self.attempt = "a1"
        self.seq = 0

    def started(self, attempt: str = "a1") -> None:
        self.attempt, self.seq = attempt, -1
        self._append("started", {"model": "m"})

    def delta(self, members: dict[str, Any], finish: str | None = None, choice: int | None = 0) -> None:
        self._append("delta", {"choice": choice, "delta": members, "finish_reason": finish})

    def text(self, content: str) -> None:
        self.delta({"content": content})

    def ended(self, status: str = "completed", **more: Any) -> None:
        given = {
            "status": status,
            "finish_reasons": {"0": "stop"},
            "usage": USAGE,
            "usage_source": "upstream",
            "error": None,
        }
        self._append("usage", given | more)

    def failed(self, code: str, status: str = "failed", retriable: bool = True, **more: Any) -> None:
        error = {"code": code, "message": f"about {code}", "http_status": None, "retriable": retriable} | more
        self.ended(status, usage=None, usage_source="none", error=error)

    def _append(self, kind: str, value: dict[str, Any]) -> None:
        self.seq += 1
        common = {"v": 1, "job_id": self.id, "attempt": self.attempt, "ts": 0, "seq": self.seq, "type": kind}
        self.log.append(self.id, kind, common | value)


@asynccontextmanager
async def asking(
    gateway: Served,
    *,
    key: str = ACME,
    headers: Mapping[str, str] | None = None,
    number: int = 1,
    **members: Any,
) -> AsyncIterator[tuple[asyncio.Task[aiohttp.ClientResponse], Job]]:
    """Send a request; yield the task of its response, and its job."""
    sent = {"Authorization": f"Bearer {key}", **(headers or {})}
    task = asyncio.create_task(gateway.http.post(gateway.url + PATH, json=BODY | members, headers=sent))
    try:
        yield task, Job(gateway, await job_of(gateway, number))
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled() and task.exception() is None:
            task.result().close()


# The job


async def test_job_has_the_body_as_its_request(gateway: Served) -> None:
    """Byte for byte, with a deadline, a bound for waiting, and metadata that name the API."""
    raw = b'{ "messages":[{"role":"user","content":"Hi"}], "seed":123456789012345678901, "model":"m", "x":1.0e2 }'
    written: list[bytes] = []
    write = gateway.writer.write

    async def keep(topic: str, key: bytes, value: bytes, headers: Any = ()) -> None:
        written.append(value)
        await write(topic, key, value, headers)

    gateway.writer.write = keep  # type: ignore[method-assign]
    asked = gateway.http.post(
        gateway.url + PATH,
        data=raw,
        headers={"Authorization": f"Bearer {ACME}", "Content-Type": "application/json"},
    )
    task = asyncio.ensure_future(asked)
    job_id = await job_of(gateway)
    Job(gateway, job_id).failed("auth")
    response = await task

    assert raw in written[0]
    [job] = jobs(gateway)
    assert job_id.startswith("acme.")
    assert job["metadata"] == {"gateway": "chat", "tenant": "acme"}
    assert job["max_wait_s"] == 30
    assert job["deadline"].endswith("Z")
    assert response.headers["Streamworker-Job-Id"] == job_id
    assert gateway.metric("gateway_jobs_submitted_total", face="chat") == 1


async def test_header_lowers_the_deadline(gateway: Served) -> None:
    """`Streamworker-Timeout` is in seconds."""
    before = gateway.gateway.clock.now_ms()
    async with asking(gateway, headers={"Streamworker-Timeout": "5"}):
        [job] = jobs(gateway)
        deadline_ms = datetime.fromisoformat(job["deadline"]).timestamp() * 1000

    assert before + 5000 <= deadline_ms <= gateway.gateway.clock.now_ms() + 5000


@pytest.mark.parametrize(
    ("body", "headers", "status", "code", "param"),
    [
        (b"{", {}, 400, "invalid_request", None),
        (b"[]", {}, 400, "invalid_request", None),
        (b"\xff", {}, 400, "invalid_request", None),
        (b'{"messages":[1]}', {}, 400, "invalid_request", "model"),
        (b'{"model":"m"}', {}, 400, "invalid_request", "messages"),
        (json.dumps(BODY | {"stream": 1}).encode(), {}, 400, "invalid_request", "stream"),
        (
            json.dumps(BODY).encode(),
            {"Streamworker-Timeout": "x"},
            400,
            "invalid_request",
            "Streamworker-Timeout",
        ),
        (json.dumps(BODY).encode(), {"Content-Type": "text/plain"}, 415, "unsupported_media_type", None),
        (json.dumps(BODY).encode(), {"Idempotency-Key": "x" * 201}, 400, "invalid_request", None),
        (b'"' + b"x" * 1_100_000 + b'"', {}, 413, "too_large", None),
    ],
)
async def test_request_that_is_not_valid_makes_no_job(
    gateway: Served, body: bytes, headers: dict[str, str], status: int, code: str, param: str | None
) -> None:
    """The error names what is wrong, and SDKs do not try again."""
    sent = {"Content-Type": "application/json"} | headers
    got, value, answered = await gateway.call("POST", PATH, data=io.BytesIO(body), headers=sent)

    assert (got, value["error"]["code"], value["error"]["param"]) == (status, code, param)
    assert answered["x-should-retry"] == "false"
    assert gateway.writer.records == []


@pytest.mark.parametrize(("key", "status"), [(None, 401), ("swk_unknown", 401), (READ_ONLY, 403)])
async def test_caller_needs_the_submit_scope(gateway: Served, key: str | None, status: int) -> None:
    """Before anything is read."""
    got, _, _ = await gateway.call("POST", PATH, key=key, json=BODY)

    assert got == status
    assert gateway.writer.records == []


async def test_unknown_model_makes_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """404 `model_not_found`, as OpenAI answers."""
    monkeypatch.setattr(chat, "is_served", lambda _, model: model == "known")
    async with served(tmp_path) as gateway:
        status, value, _ = await gateway.call("POST", PATH, json=BODY)

        assert (status, value["error"]["code"], value["error"]["param"]) == (404, "model_not_found", "model")
        assert gateway.writer.records == []


async def test_gateway_without_kafka_is_503(gateway: Served) -> None:
    """SDKs may try again."""
    gateway.log.is_ready = False
    status, value, headers = await gateway.call("POST", PATH, json=BODY)

    assert (status, value["error"]["code"]) == (503, "broker_unavailable")
    assert headers["x-should-retry"] == "true"
    assert headers["Retry-After"].isdigit()


async def test_job_without_acknowledgement_is_named_and_not_retried(gateway: Served) -> None:
    """A retry could be a second job."""
    gateway.writer.errors = [NotAcknowledged("Kafka did not acknowledge the record")]
    status, value, headers = await gateway.call("POST", PATH, json=BODY)

    assert (status, value["error"]["code"]) == (503, "submit_unknown")
    assert value["error"]["job_id"] == jobs(gateway)[0]["job_id"]
    assert headers["x-should-retry"] == "false"


async def test_key_with_too_many_streams_is_429(tmp_path: Path) -> None:
    """Answers without `stream` are counted too: both keep a connection."""
    async with served(tmp_path, limits={"max_streams": 1}) as gateway, asking(gateway):
        status, value, headers = await gateway.call("POST", PATH, json=BODY)

        assert (status, value["error"]["code"]) == (429, "too_many_streams")
        assert headers["x-should-retry"] == "true"


# Streaming


async def test_stream_has_the_chunks_of_the_job(gateway: Served) -> None:
    """With the headers that keep proxies from holding it back, and the job's id."""
    async with asking(gateway, stream=True, stream_options={"include_usage": True}) as (asked, job):
        job.started()
        job.text("Ciao")
        response = await asked
        job.delta({"content": "!"}, finish="stop")
        job.ended()
        read = chunks_of(await response.read())

    assert response.status == 200
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-store, no-transform"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["Streamworker-Job-Id"] == job.id
    assert "Idempotent-Replay" not in response.headers
    assert read.text == "Ciao!"
    assert read.is_done
    assert read.chunks[-1]["usage"] == USAGE
    assert gateway.log.open_feeds == 0
    assert gateway.metric("gateway_events_delivered_total", face="chat") == 4
    assert gateway.metric("gateway_streams_closed_total", face="chat", reason="ended") == 1


async def test_stream_in_http_1_0_ends_with_its_connection(gateway: Served) -> None:
    """Although the client asks to keep the connection: it has no other sign of the end."""
    async with (
        aiohttp.ClientSession(version=aiohttp.HttpVersion10) as gateway.http,
        asking(gateway, headers={"Connection": "keep-alive"}, stream=True) as (asked, job),
        asyncio.timeout(5),
    ):
        job.started()
        job.text("Ciao")
        job.ended()
        read = chunks_of(await (await asked).read())

    assert (read.text, read.is_done) == ("Ciao", True)


async def test_usage_is_on_the_finish_chunk_where_that_is_configured(tmp_path: Path) -> None:
    """Every chunk has a choice then."""
    options = {"include_usage": True}
    async with (
        served(tmp_path, chat_usage="finish") as gateway,
        asking(gateway, stream=True, stream_options=options) as (asked, job),
    ):
        job.started()
        job.delta({"content": "Ciao"}, finish="stop")
        job.ended()
        read = chunks_of(await (await asked).read())

    [chunk] = read.chunks
    assert chunk["usage"] == USAGE


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("code", "status", "retriable", "more"),
    [
        ("rate_limited", 429, True, {"retry_after_ms": 7000}),
        ("upstream_unavailable", 503, True, {}),
        ("upstream_rejected", 422, False, {"http_status": 422}),
        ("auth", 502, False, {"http_status": 401}),
        ("cancelled", 409, False, {}),
        ("deadline", 504, True, {}),
        ("max_deliveries", 500, False, {}),
    ],
)
async def test_failure_before_the_first_delta_is_a_status(
    gateway: Served, stream: bool, code: str, status: int, retriable: bool, more: dict[str, Any]
) -> None:
    """Streaming or not, with the job's id and whether a retry makes sense."""
    async with asking(gateway, stream=stream) as (asked, job):
        job.started()
        job.failed(code, retriable=retriable, **more)
        response = await asked
        value = await response.json()

    assert response.status == status
    assert value["error"] == {
        "message": f"about {code}",
        "type": value["error"]["type"],
        "param": None,
        "code": code,
        "retriable": retriable,
        "job_id": job.id,
    }
    assert response.headers["x-should-retry"] == str(retriable).lower()
    assert response.headers["Streamworker-Job-Id"] == job.id
    if "retry_after_ms" in more:
        assert response.headers["Retry-After"] == "7"
    assert cancels(gateway) == []


async def test_role_delta_begins_the_response(gateway: Served) -> None:
    """Any delta of a choice is one; a failure behind it is an error frame."""
    async with asking(gateway, stream=True) as (asked, job):
        job.started()
        job.delta({"role": "assistant"})
        response = await asked
        job.failed("truncated", "interrupted")
        read = chunks_of(await response.read())

    assert response.status == 200
    assert len(read.chunks) == 1
    assert read.error is not None
    assert (read.error["code"], read.error["job_id"]) == ("truncated", job.id)
    assert not read.is_done


async def test_status_is_sent_after_the_hold_and_pings_keep_the_connection(tmp_path: Path) -> None:
    """A failure after that is an error frame."""
    async with (
        served(tmp_path, chat_status_hold_s=0.05, keep_alive_s=0.05) as gateway,
        asking(gateway, stream=True) as (asked, job),
    ):
        response = await asked
        assert response.status == 200
        assert await response.content.readuntil(b"\n\n") == b": ping\n\n"
        assert await response.content.readuntil(b"\n\n") == b": ping\n\n"
        job.started()
        job.failed("rate_limited")
        rest = (await response.read()).replace(b": ping\n\n", b"")
        read = chunks_of(rest)

    assert read.error is not None
    assert read.error["code"] == "rate_limited"
    assert read.chunks == []


async def test_chunk_without_choices_does_not_begin_the_response(gateway: Served) -> None:
    """It is sent with the first delta."""
    async with asking(gateway, stream=True) as (asked, job):
        job.started()
        job.log.append(
            job.id,
            "delta",
            {"attempt": "a1", "seq": 1, "choice": None, "delta": {}, "extra": {"prompt_filter_results": []}},
        )
        await asyncio.sleep(0.05)
        assert not asked.done()
        job.text("a")
        job.ended()
        read = chunks_of(await (await asked).read())

    assert [len(chunk["choices"]) for chunk in read.chunks] == [0, 1]


async def test_new_attempt_after_text_ends_the_stream_and_the_job(gateway: Served) -> None:
    """The client raises and has gone, so no client would read the rest."""
    async with asking(gateway, stream=True) as (asked, job):
        job.started()
        job.text("void")
        response = await asked
        job.started("a2")
        read = chunks_of(await response.read())
        await until(lambda: cancels(gateway) == [job.id])

    assert read.error is not None
    assert read.error["code"] == "attempt_superseded"


async def test_new_attempt_before_text_is_not_seen(gateway: Served) -> None:
    """The stream goes on with it."""
    async with asking(gateway, stream=True) as (asked, job):
        job.started()
        job.delta({"role": "assistant", "content": ""})
        response = await asked
        job.started("a2")
        job.text("valid")
        job.ended()
        read = chunks_of(await response.read())

    assert (read.text, read.is_done) == ("valid", True)


@pytest.mark.parametrize("error", [BrokerUnavailable("stopped"), FeedLost("j")])
async def test_failure_of_the_log_during_a_stream_is_an_error_frame(
    gateway: Served, error: Exception
) -> None:
    """It is never an end that looks like the answer's."""
    async with asking(gateway, stream=True) as (asked, job):
        job.started()
        job.text("a")
        response = await asked
        gateway.log.error = error
        gateway.log.changed.notify()
        read = chunks_of(await response.read())

    assert read.text == "a"
    assert read.error is not None
    assert (read.error["code"], read.error["job_id"]) == ("broker_unavailable", job.id)


@pytest.mark.parametrize("stream", [True, False])
async def test_failure_of_the_log_before_a_status_is_503_with_the_job(gateway: Served, stream: bool) -> None:
    """An SDK's retry joins the job."""
    async with asking(gateway, stream=stream) as (asked, job):
        gateway.log.error = BrokerUnavailable("stopped")
        gateway.log.changed.notify()
        response = await asked
        value = await response.json()

    assert (response.status, value["error"]["code"], value["error"]["job_id"]) == (
        503,
        "broker_unavailable",
        job.id,
    )
    assert response.headers["x-should-retry"] == "true"
    assert cancels(gateway) == []


@pytest.mark.parametrize("stream", [True, False])
async def test_feed_that_cannot_be_opened_is_503_with_the_job(gateway: Served, stream: bool) -> None:
    """The job is written by then."""
    open_, gateway.log.open = gateway.log.open, None  # type: ignore[method-assign, assignment]

    async def refuse(*_: object, **__: object) -> None:
        raise BrokerUnavailable("no answer")

    gateway.log.open = refuse  # type: ignore[method-assign, assignment]
    status, value, headers = await gateway.call("POST", PATH, json=BODY | {"stream": stream})
    gateway.log.open = open_  # type: ignore[method-assign]

    assert (status, value["error"]["job_id"]) == (503, jobs(gateway)[0]["job_id"])
    assert headers["Streamworker-Job-Id"] == value["error"]["job_id"]


async def test_event_that_cannot_be_read_is_an_error(gateway: Served) -> None:
    """A text that is left out in silence would be worse."""
    async with asking(gateway, stream=True) as (asked, job):
        job.started()
        job.text("a")
        response = await asked
        job.log.append(job.id, "delta", {"attempt": "a1", "seq": 2, "choice": "zero"})
        read = chunks_of(await response.read())

    assert read.error is not None
    assert read.error["code"] == "internal"


@pytest.mark.parametrize("stream", [True, False])
async def test_job_that_no_worker_ends_is_an_error_after_its_deadline(
    gateway: Served, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Without a worker no terminal event comes."""
    monkeypatch.setattr(chat, "DEADLINE_GRACE_S", 0.05)
    async with asking(gateway, stream=stream, headers={"Streamworker-Timeout": "0.05"}) as (asked, job):
        response = await asked
        value = await response.json()

    assert (response.status, value["error"]["code"], value["error"]["retriable"]) == (504, "deadline", False)
    assert value["error"]["job_id"] == job.id


async def test_slow_client_gets_merged_text(gateway: Served) -> None:
    """It gets the same text in fewer chunks."""
    texts = [f"{number} " + "x" * 300 for number in range(3000)]
    async with asking(gateway, stream=True) as (asked, job):
        job.started()
        job.text("begin ")
        response = await asked
        for text in texts:
            job.text(text)
            if job.seq % 50 == 0:
                await asyncio.sleep(0)
        job.ended()
        await asyncio.sleep(0.1)
        read = chunks_of(await response.read())

    assert read.text == "begin " + "".join(texts)
    assert read.is_done
    assert len(read.chunks) < len(texts)


# Not streaming


async def test_answer_without_stream_is_a_completion(gateway: Served) -> None:
    """With a length, the usage of the terminal event, and the job's id."""
    async with asking(gateway) as (asked, job):
        job.started()
        job.text("Ciao")
        job.text("!")
        job.ended()
        response = await asked
        value = await response.json()

    assert response.status == 200
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["Streamworker-Job-Id"] == job.id
    assert int(response.headers["Content-Length"]) > 0
    assert value["choices"][0]["message"]["content"] == "Ciao!"
    assert value["usage"] == USAGE


@pytest.fixture
def quick_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold the status of answers without `stream` for a moment only."""
    monkeypatch.setattr(chat, "STATUS_HOLD_S", 0.05)


@pytest.mark.usefixtures("quick_hold")
async def test_long_answer_begins_with_newlines(tmp_path: Path) -> None:
    """They keep the connection; JSON may begin with them."""
    async with served(tmp_path, keep_alive_s=0.03) as gateway, asking(gateway) as (asked, job):
        response = await asked
        assert response.status == 200
        assert await response.content.readexactly(2) == b"\n\n"
        job.started()
        job.text("late")
        job.ended()
        value = json.loads(await response.read())

    assert value["choices"][0]["message"]["content"] == "late"


@pytest.mark.usefixtures("quick_hold")
@pytest.mark.parametrize("cause", ["job", "log", "deadline"])
async def test_long_answer_that_fails_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    """An error body under a status of 200 would be read as an empty answer."""
    monkeypatch.setattr(chat, "DEADLINE_GRACE_S", 0.1)
    headers = {"Streamworker-Timeout": "0.1"} if cause == "deadline" else {}
    async with (
        served(tmp_path, keep_alive_s=0.03) as gateway,
        asking(gateway, headers=headers) as (asked, job),
    ):
        response = await asked
        await response.content.readexactly(1)
        with capture_logs() as logs:
            match cause:
                case "job":
                    job.failed("truncated", "interrupted")
                case "log":
                    gateway.log.error = BrokerUnavailable("stopped")
                    gateway.log.changed.notify()
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
            if cause != "job":
                await until(lambda: cancels(gateway) == [job.id])
            await until(lambda: any(line["event"] == "gateway.chat_cut" for line in logs))

    assert {line["log_level"] for line in logs} <= {"info"}
    assert cancels(gateway) == ([] if cause == "job" else [job.id])


# Disconnects


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("begun", ["queued", "started", "text"])
async def test_disconnect_cancels_the_job(gateway: Served, stream: bool, begun: str) -> None:
    """At once, also before the first delta, and without `stream` too."""
    async with asking(gateway, stream=stream) as (asked, job):
        if begun != "queued":
            job.started()
        if begun == "text":
            job.text("a")
            if stream:
                await asked
        await until(lambda: gateway.metric("gateway_streams_open", face="chat") == 1)
    await until(lambda: cancels(gateway) == [job.id])

    await until(lambda: gateway.gateway.limits.streams == 0)
    assert gateway.log.open_feeds == 0
    assert gateway.metric("gateway_streams_open", face="chat") == 0
    assert gateway.metric("gateway_streams_closed_total", face="chat", reason="disconnected") == 1


async def test_disconnect_before_the_acknowledgement_cancels_the_job(gateway: Served) -> None:
    """As soon as Kafka has it."""
    gateway.writer.gate = asyncio.Event()
    asked = asyncio.create_task(
        gateway.http.post(gateway.url + PATH, json=BODY, headers={"Authorization": f"Bearer {ACME}"})
    )
    await until(lambda: gateway.gateway.limits.streams == 1)
    assert gateway.metric("gateway_streams_open", face="chat") == 1
    await asyncio.sleep(0.05)
    asked.cancel()
    await asyncio.wait([asked])
    await asyncio.sleep(0.05)
    assert gateway.writer.records == []
    gateway.writer.gate.set()
    job_id = await job_of(gateway)

    await until(lambda: cancels(gateway) == [job_id])


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", ["header", "setting"])
async def test_disconnect_leaves_the_job_where_it_is_to_continue(
    tmp_path: Path, stream: bool, how: str
) -> None:
    """Its events can be read by its id."""
    settings: dict[str, Any] = {"chat_on_disconnect": "continue"} if how == "setting" else {}
    headers = {"Streamworker-On-Disconnect": "continue"} if how == "header" else {}
    async with served(tmp_path, **settings) as gateway:
        async with asking(gateway, stream=stream, headers=headers) as (_, job):
            job.started()
        await until(lambda: gateway.gateway.limits.streams == 0)
        await asyncio.sleep(0.05)

        assert cancels(gateway) == []


async def test_stop_of_the_gateway_cancels_no_job_and_leaves_the_body_unfinished(gateway: Served) -> None:
    """The client did not leave: another replica can deliver the rest."""
    async with asking(gateway, stream=True) as (asked, job):
        job.started()
        job.text("a")
        response = await asked
        await response.content.readuntil(b"\n\n")
        await gateway.server.stop()
        with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientConnectionError)):
            await response.read()

    assert cancels(gateway) == []


async def test_cancellation_that_fails_is_logged(gateway: Served) -> None:
    """There is no client to tell."""
    with capture_logs() as logs:
        async with asking(gateway, stream=True) as (_, job):
            job.started()
            gateway.writer.errors = [NotAcknowledged("Kafka did not acknowledge the record")]
        await until(lambda: any(line["event"] == "gateway.cancel_failed" for line in logs))

    [line] = [line for line in logs if line["event"] == "gateway.cancel_failed"]
    assert line["log_level"] == "warning"


async def test_client_that_does_not_read_is_disconnected_and_its_job_cancelled(tmp_path: Path) -> None:
    """`gateway.stall_s` after it took its last byte."""
    async with served(tmp_path, stall_s=0.2, keep_alive_s=0.05) as gateway:
        reader, writer = await asyncio.open_connection(*gateway.address, limit=1024)
        body = json.dumps(BODY | {"stream": True}).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ACME}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        job = Job(gateway, await job_of(gateway))
        job.started()
        for _ in range(100):  # reasoning is not text that one chunk would hold: 64 KiB each
            job.text("x" * 100_000)
        with capture_logs() as logs:
            await until(lambda: cancels(gateway) == [job.id])
        writer.close()
        del reader

    assert not [line for line in logs if line["log_level"] == "error"]


# Retries


def retry(count: int = 1) -> dict[str, str]:
    return {"x-stainless-retry-count": str(count)}


@pytest.mark.parametrize("stream", [True, False])
async def test_retry_of_an_sdk_joins_the_running_job(gateway: Served, stream: bool) -> None:
    """Both requests get the whole answer of one job."""
    async with (
        asking(gateway, stream=stream, headers=retry(0)) as (first, job),
        asking(gateway, stream=stream, headers=retry()) as (second, _),
    ):
        await until(lambda: gateway.log.open_feeds == 2)
        job.started()
        job.text("once")
        job.ended()
        answers = [await (await one).read() for one in (first, second)]
        joined = second.result()

    assert len(jobs(gateway)) == 1
    assert answers[0] == answers[1]
    assert joined.headers["Idempotent-Replay"] == "true"
    assert joined.headers["Streamworker-Job-Id"] == job.id


async def test_job_with_another_client_is_not_cancelled(gateway: Served) -> None:
    """The job is cancelled when the last client of it is gone."""
    async with asking(gateway, stream=True) as (_, job):
        async with asking(gateway, stream=True, headers=retry()):
            await until(lambda: gateway.log.open_feeds == 2)
        await until(lambda: gateway.log.open_feeds == 1)
        await asyncio.sleep(0.05)
        assert cancels(gateway) == []
    await until(lambda: cancels(gateway) == [job.id])


async def test_retry_after_a_disconnect_begins_a_new_job(gateway: Served) -> None:
    """The former one is being cancelled."""
    async with asking(gateway, stream=True):
        pass
    await until(lambda: len(cancels(gateway)) == 1)
    async with asking(gateway, stream=True, headers=retry(), number=2) as (_, second):
        assert second.id not in cancels(gateway)

    assert len(jobs(gateway)) == 2


async def test_retry_joins_a_job_that_continued_after_a_disconnect(gateway: Served) -> None:
    """That is what `continue` is for: the text is not paid for twice."""
    headers = {"Streamworker-On-Disconnect": "continue"}
    async with asking(gateway, stream=True, headers=headers) as (_, job):
        job.started()
        job.text("o")
    await until(lambda: gateway.log.open_feeds == 0)
    async with asking(gateway, stream=True, headers=headers | retry()) as (asked, _):
        await until(lambda: gateway.log.open_feeds == 1)
        job.text("nce")
        job.ended()
        read = chunks_of(await (await asked).read())

    assert (read.text, read.is_done) == ("once", True)
    assert len(jobs(gateway)) == 1


@pytest.mark.parametrize(
    ("key", "members", "headers"),
    [
        (ACME, {}, {}),
        (ACME, {}, {"x-stainless-retry-count": "0"}),
        (ACME, {}, {"x-stainless-retry-count": "one"}),
        (ACME, {"temperature": 1}, {"x-stainless-retry-count": "1"}),
        (OTHER, {}, {"x-stainless-retry-count": "1"}),
    ],
)
async def test_request_that_is_not_a_retry_begins_a_new_job(
    gateway: Served, key: str, members: dict[str, Any], headers: dict[str, str]
) -> None:
    """Another body, another key, or no word of a retry."""
    async with asking(gateway), asking(gateway, key=key, headers=headers, number=2, **members):
        pass

    assert len(jobs(gateway)) == 2


async def test_retry_after_the_job_ended_begins_a_new_job(gateway: Served) -> None:
    """It failed, or its answer was delivered."""
    async with asking(gateway) as (asked, job):
        job.started()
        job.failed("rate_limited")
        assert (await asked).status == 429
    async with asking(gateway, headers=retry(), number=2) as (_, second):
        assert second.id != job.id


async def test_idempotency_key_gives_the_same_job(gateway: Served) -> None:
    """For any client that sends one; another body under the same key is refused."""
    headers = {"Idempotency-Key": "k-1"}
    async with (
        asking(gateway, headers=headers) as (first, job),
        asking(gateway, headers=headers) as (second, _),
    ):
        job.started()
        job.text("once")
        job.ended()
        answers = [await (await one).json() for one in (first, second)]
    status, value, answered = await gateway.call("POST", PATH, json=BODY | {"n": 2}, headers=headers)

    assert answers[0] == answers[1]
    assert len(jobs(gateway)) == 1
    assert (status, value["error"]["code"], answered["x-should-retry"]) == (
        409,
        "idempotency_mismatch",
        "false",
    )
