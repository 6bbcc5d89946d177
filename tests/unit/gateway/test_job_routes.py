"""`/v1/jobs` and `/v1/tokens` over HTTP, with an event log and a writer in memory."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

import pytest
from multidict import CIMultiDict

from streamworker.errors import KafkaRefused, RecordTooLarge
from streamworker.gateway.feeds import BrokerUnavailable
from streamworker.gateway.idempotency import Memory
from streamworker.gateway.tokens import read_secrets
from streamworker.gateway.writer import NotAcknowledged
from tests.unit.gateway.served import ACME, OTHER, served

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.gateway.served import Served

JOB = {"request": {"model": "m", "messages": [{"role": "user", "content": "hi"}]}}


async def test_job_submitted_is_written_with_its_tenant_and_answered_202(gateway: Served) -> None:
    """The id begins with the tenant; the gateway sets `metadata.tenant`."""
    job = {**JOB, "metadata": {"tenant": "another", "page": "home"}, "key": "conversation 7"}
    status, value, headers = await gateway.call("POST", "/v1/jobs", json=job)

    assert status == 202
    job_id = value["job_id"]
    assert job_id.startswith("acme.")
    assert headers["Location"] == f"/v1/jobs/{job_id}"
    assert value["events_url"] == f"/v1/jobs/{job_id}/events?cursor={value['cursor']}&shard={value['shard']}"
    assert (value["object"], value["status"]) == ("job", "queued")
    [(topic, key, record)] = gateway.writer.records
    assert (topic, key) == ("streamworker.jobs", "conversation 7")
    assert record == {**JOB, "job_id": job_id, "metadata": {"tenant": "acme", "page": "home"}}


@pytest.mark.parametrize("path", ["/v1/jobs/acme.1", "/v1/jobs/other.1", "/nowhere"])
async def test_request_without_a_credential_is_401_or_404(gateway: Served, path: str) -> None:
    """There is no anonymous access."""
    status, value, headers = await gateway.call("GET", path, key=None)

    assert status == (404 if path == "/nowhere" else 401)
    assert value["error"]["code"] == ("not_found" if path == "/nowhere" else "unauthenticated")
    assert headers.get("WWW-Authenticate") == (None if path == "/nowhere" else "Bearer")


def raw(value: object) -> bytes:
    return json.dumps(value).encode()


JSON = {"Content-Type": "application/json"}
BIG = b'{"request":{"model":"m","messages":["' + b"x" * 1_000_000 + b'"]}}'

BAD_BODIES: list[tuple[str, bytes, dict[str, str], int, str]] = [
    ("/v1/jobs", b"", JSON, 400, "invalid_request"),
    ("/v1/jobs", b"nonsense", JSON, 400, "invalid_request"),
    ("/v1/jobs", b"[]", JSON, 400, "invalid_request"),
    ("/v1/jobs", b"null", JSON, 400, "invalid_request"),
    ("/v1/jobs", b"\xff\xfe{}", JSON, 400, "invalid_request"),
    ("/v1/jobs", b'{"request":' + b"[" * 5000, JSON, 400, "invalid_request"),
    ("/v1/jobs", b"{}", JSON, 400, "invalid_job"),
    ("/v1/jobs", raw({**JOB, "reply_to": "topic"}), JSON, 400, "invalid_job"),
    ("/v1/jobs", raw({**JOB, "misspelt": 1}), JSON, 400, "invalid_job"),
    ("/v1/jobs", raw({**JOB, "job_id": "acme.a b"}), JSON, 400, "invalid_job"),
    ("/v1/jobs", raw({**JOB, "job_id": 7}), JSON, 400, "invalid_job"),
    ("/v1/jobs", raw({**JOB, "metadata": []}), JSON, 400, "invalid_job"),
    ("/v1/jobs", raw({**JOB, "metadata": {"a": 1}}), JSON, 400, "invalid_job"),
    ("/v1/jobs", raw({**JOB, "deadline": "tomorrow"}), JSON, 400, "invalid_job"),
    ("/v1/jobs", raw({**JOB, "key": ""}), JSON, 400, "invalid_request"),
    ("/v1/jobs", raw({**JOB, "key": 7}), JSON, 400, "invalid_request"),
    ("/v1/jobs", raw({**JOB, "key": "x" * 513}), JSON, 400, "invalid_request"),
    ("/v1/jobs", raw({**JOB, "job_id": "other.1"}), JSON, 403, "outside_tenant"),
    ("/v1/jobs", BIG, JSON, 413, "too_large"),
    ("/v1/jobs", raw(JOB), {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
    (
        "/v1/jobs",
        raw(JOB),
        {"Content-Type": "application/x-www-form-urlencoded"},
        415,
        "unsupported_media_type",
    ),
    ("/v1/jobs", raw(JOB), {"Content-Type": "nonsense"}, 415, "unsupported_media_type"),
    ("/v1/jobs", raw(JOB), JSON | {"Content-Encoding": "gzip"}, 415, "unsupported_media_type"),
    ("/v1/jobs", raw(JOB), JSON | {"Idempotency-Key": ""}, 400, "invalid_request"),
    ("/v1/jobs", raw(JOB), JSON | {"Idempotency-Key": "x" * 201}, 400, "invalid_request"),
    ("/v1/jobs?token=write", raw(JOB), JSON, 400, "invalid_request"),
    ("/v1/jobs?ttl_s=5", raw(JOB), JSON, 400, "invalid_request"),
    ("/v1/jobs?token=read&ttl_s=0", raw(JOB), JSON, 400, "invalid_request"),
    ("/v1/jobs?token=read&ttl_s=3601", raw(JOB), JSON, 400, "invalid_request"),
    ("/v1/jobs?token=read&ttl_s=nan", raw(JOB), JSON, 400, "invalid_request"),
    ("/v1/jobs?unknown=1", raw(JOB), JSON, 400, "invalid_request"),
    ("/v1/jobs?token=read&token=read", raw(JOB), JSON, 400, "invalid_request"),
    ("/v1/jobs/acme.1/cancel", b"nonsense", JSON, 400, "invalid_request"),
    ("/v1/jobs/acme.1/cancel", b"[]", JSON, 400, "invalid_request"),
    ("/v1/jobs/acme.1/cancel", raw({"reason": 7}), JSON, 400, "invalid_request"),
    ("/v1/jobs/acme.1/cancel", raw({"reason": "x" * 501}), JSON, 400, "invalid_request"),
    ("/v1/jobs/acme.1/cancel", raw({"why": "x"}), JSON, 400, "invalid_request"),
    ("/v1/jobs/a%20b/cancel", b"", JSON, 400, "invalid_request"),
    ("/v1/jobs/other.1/cancel", b"", JSON, 404, "job_not_found"),
    ("/v1/jobs/acme.1/cancel", rb'{"\ud800":1}', JSON, 400, "invalid_request"),
    ("/v1/jobs", rb'{"request":{"model":"m","messages":[{}]},"\ud800":1}', JSON, 400, "invalid_job"),
    ("/v1/tokens", rb'{"jobs":["\ud800"]}', JSON, 400, "invalid_request"),
    ("/v1/tokens", b"{}", JSON, 400, "invalid_request"),
    ("/v1/tokens", raw({"jobs": []}), JSON, 400, "invalid_request"),
    ("/v1/tokens", raw({"jobs": ["acme.1"] * 65}), JSON, 400, "invalid_request"),
    ("/v1/tokens", raw({"jobs": "acme.1"}), JSON, 400, "invalid_request"),
    ("/v1/tokens", raw({"jobs": ["acme.1"], "scope": "submit"}), JSON, 400, "invalid_request"),
    ("/v1/tokens", raw({"jobs": ["acme.1"], "scope": 1}), JSON, 400, "invalid_request"),
    ("/v1/tokens", raw({"jobs": ["acme.1"], "ttl_s": 0}), JSON, 400, "invalid_request"),
    ("/v1/tokens", raw({"jobs": ["acme.1"], "ttl_s": 3601}), JSON, 400, "invalid_request"),
    ("/v1/tokens", raw({"jobs": ["acme.1"], "ttl_s": 1.5}), JSON, 400, "invalid_request"),
    ("/v1/tokens", raw({"jobs": ["acme.1"], "ttl_s": True}), JSON, 400, "invalid_request"),
    ("/v1/tokens", raw({"jobs": ["other.1"]}), JSON, 403, "outside_tenant"),
    ("/v1/tokens", raw({"jobs": ["acme*"]}), JSON, 403, "outside_tenant"),
    ("/v1/nothing", raw({}), JSON, 404, "not_found"),
    ("/v1/jobs/acme.1", raw({}), JSON, 405, "method_not_allowed"),
    ("/v1/files", raw({}), JSON, 501, "not_configured"),
    ("/v1/batches/b1/cancel", raw({}), JSON, 501, "not_configured"),
]


@pytest.mark.parametrize(("path", "body", "headers", "status", "code"), BAD_BODIES)
async def test_post_that_is_not_as_documented_has_its_status(
    gateway: Served, path: str, body: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    """One body for all errors, `x-should-retry` equal to `retriable`, and nothing is written."""
    found, value, sent = await gateway.call("POST", path, data=body, headers=headers)

    error = value["error"]
    assert (found, error["code"]) == (status, code), error
    assert error.keys() >= {"message", "type", "param", "code", "retriable"}
    assert sent["x-should-retry"] == str(error["retriable"]).lower() == "false"
    assert sent["Cache-Control"] == "no-store"
    assert sent["X-Content-Type-Options"] == "nosniff"
    assert gateway.writer.records == []


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/jobs/a%20b", 400, "invalid_request"),
        ("/v1/jobs/acme.%00", 400, "invalid_request"),
        ("/v1/jobs/" + "a" * 201, 400, "invalid_request"),
        ("/v1/jobs/acme.1?wait_s=61", 400, "invalid_request"),
        ("/v1/jobs/acme.1?wait_s=-1", 400, "invalid_request"),
        ("/v1/jobs/acme.1?wait_s=x", 400, "invalid_request"),
        ("/v1/jobs/acme.1?wait_s=inf", 400, "invalid_request"),
        ("/v1/jobs/acme.1?since=yesterday", 400, "invalid_request"),
        ("/v1/jobs/acme.1?since=2030-01-31", 400, "invalid_request"),
        ("/v1/jobs/acme.1?since=2030-01-31T12:00:00", 400, "invalid_request"),
        ("/v1/jobs/acme.1?since=2030-W05-4T12:00:00Z", 400, "invalid_request"),
        ("/v1/jobs/acme.1?since=20300131T120000Z", 400, "invalid_request"),
        ("/v1/jobs/acme.1?since=2030-02-31T12:00:00Z", 400, "invalid_request"),
        ("/v1/jobs/acme.1?wait_s=1_0", 400, "invalid_request"),
        ("/v1/jobs/acme.1?wait_s=%D9%A1", 400, "invalid_request"),
        ("/v1/jobs/acme.1?unknown=1", 400, "invalid_request"),
        ("/v1/jobs/acme.1?cursor=a.b.c-", 400, "invalid_cursor"),
        ("/v1/jobs/acme.no-such-job", 404, "job_not_found"),
        ("/v1/jobs/acme.1/events?replay=all", 400, "invalid_request"),
        ("/v1/jobs/acme.1/events?cursor=nonsense", 400, "invalid_cursor"),
        ("/v1/jobs/acme.1/events?cursor=1.2.3.4", 400, "invalid_cursor"),
        ("/v1/jobs/acme.1/events?cursor=-1.2.w", 400, "invalid_cursor"),
        ("/v1/jobs/acme.1/events?cursor=1.99999999999999999999.w", 400, "invalid_cursor"),
        ("/v1/jobs/acme.1/events?cursor=.end", 400, "invalid_cursor"),
        ("/v1/jobs/acme.1/events?cursor=0.0.w&cursor=0.0.w", 400, "invalid_request"),
        ("/v1/jobs", 405, "method_not_allowed"),
        ("/v1", 404, "not_found"),
        ("/%00", 404, "not_found"),
        ("//", 404, "not_found"),
    ],
)
async def test_get_that_is_not_as_documented_has_its_status(
    gateway: Served, path: str, status: int, code: str
) -> None:
    """Paths, parameters and cursors."""
    gateway.log.publish("acme.1", ["a"])
    found, value, headers = await gateway.call("GET", path)

    assert (found, value["error"]["code"]) == (status, code), value
    assert "x-should-retry" not in headers
    assert gateway.log.open_feeds == 0


@pytest.mark.parametrize(
    "since", ["2030-01-31T12:00:00Z", "2030-01-31t12:00:00.5z", "2030-01-31T12:00:00+01:00"]
)
async def test_get_with_an_empty_cursor_and_a_time_finds_the_job(gateway: Served, since: str) -> None:
    """A page may write both parameters whether it has values or not; a plus sign need not be escaped."""
    gateway.log.publish("acme.1", ["a"])
    status, value, _ = await gateway.call("GET", f"/v1/jobs/acme.1?cursor=&wait_s=0.5&since={since}")

    assert (status, value["status"]) == (200, "completed")


async def test_half_of_a_character_in_key_and_reason_is_replaced(gateway: Served) -> None:
    """JSON allows it in a string, and Kafka's keys are bytes of UTF-8."""
    job = b'{"request":{"model":"m","messages":[{}]},"key":"a' + rb"\ud800" + b'"}'
    submitted, _, _ = await gateway.call("POST", "/v1/jobs", data=job, headers=JSON)
    cancelled, _, _ = await gateway.call(
        "POST", "/v1/jobs/acme.1/cancel", data=rb'{"reason":"b\ud800"}', headers=JSON
    )

    assert (submitted, cancelled) == (202, 202)
    (_, key, _), (_, _, command) = gateway.writer.records
    assert (key, command["reason"]) == ("a\ufffd", "b\ufffd")


async def test_job_with_several_faults_names_all_of_them(gateway: Served) -> None:
    """As a rejection by a worker would."""
    job = {"request": {}, "on_break": "maybe", "misspelt": 1, "reply_to": "t"}
    _, value, _ = await gateway.call("POST", "/v1/jobs", json=job)

    faults = value["error"]["faults"]
    assert [fault.partition(":")[0] for fault in faults] == [
        "reply_to",
        "misspelt",
        "on_break",
        "request.model",
        "request.messages",
    ]
    assert all(fault in value["error"]["message"] for fault in faults)


async def test_job_is_written_byte_for_byte(gateway: Served) -> None:
    """Numbers and unknown members of the request are not touched."""
    body = b'{"request": {"model":"m","messages":[{}],"seed":12345678901234567890,"x":1e5,"y":1.0}, "job_id":"acme.1"}'
    written: list[bytes] = []
    write = gateway.writer.write

    async def keep(topic: str, key: bytes, value: bytes, headers: Any = ()) -> None:
        written.append(value)
        await write(topic, key, value, headers)

    gateway.writer.write = keep  # type: ignore[method-assign]
    await gateway.call("POST", "/v1/jobs", data=body, headers=JSON)

    assert b'{"model":"m","messages":[{}],"seed":12345678901234567890,"x":1e5,"y":1.0}' in written[0]


async def test_trace_context_of_the_request_is_that_of_the_job_record(gateway: Served) -> None:
    """Nothing else of the request's headers is."""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    given = {"traceparent": trace, "tracestate": "a=1", "baggage": "b=2"}
    await gateway.call("POST", "/v1/jobs", json=JOB, headers=given)
    carried = gateway.writer.headers
    await gateway.call("POST", "/v1/jobs", json=JOB, headers={"traceparent": "x" * 600})

    assert carried == (("traceparent", trace.encode()), ("tracestate", b"a=1"))
    assert gateway.writer.headers == ()


# The state of a job


async def test_state_of_an_ended_job_may_be_cached_by_its_attempt(gateway: Served) -> None:
    """A conditional request is 304 until another run follows."""
    gateway.log.publish("acme.1", ["a"])
    _, value, headers = await gateway.call("GET", "/v1/jobs/acme.1")
    etag = headers["ETag"]
    statuses = [
        (await gateway.call("GET", "/v1/jobs/acme.1", headers={"If-None-Match": given}))[0]
        for given in (etag, f'"other", {etag}', f"W/{etag}", "*", '"other"', "nonsense")
    ]
    lines = CIMultiDict([("If-None-Match", '"other"'), ("If-None-Match", etag)])
    lines["Authorization"] = f"Bearer {ACME}"
    async with gateway.http.get(f"{gateway.url}/v1/jobs/acme.1", headers=lines) as in_lines:
        statuses.append(in_lines.status)
    gateway.log.publish("acme.1", ["b"], attempt="a2")
    again, _, _ = await gateway.call("GET", "/v1/jobs/acme.1", headers={"If-None-Match": etag})

    assert (value["status"], value["ending"]["type"]) == ("completed", "usage")
    assert headers["Cache-Control"] == "private, max-age=3600"
    assert statuses == [304, 304, 304, 304, 200, 200, 304]
    assert again == 200


async def test_state_has_numbers_of_any_size(gateway: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstreams send members of every kind, and the message keeps them."""
    gateway.log.publish("acme.1", ["a"])
    seed = 1 << 70
    snapshot = gateway.log.snapshot

    async def with_seed(*arguments: Any, **options: Any) -> Any:
        found = await snapshot(*arguments, **options)
        message = {"role": "assistant", "content": "a", "seed": seed}
        return replace(found, choices=[{"choice": 0, "message": message, "finish_reason": "stop"}])

    monkeypatch.setattr(gateway.log, "snapshot", with_seed)
    status, value, _ = await gateway.call("GET", "/v1/jobs/acme.1")

    assert (status, value["choices"][0]["message"]["seed"]) == (200, seed)


async def test_state_is_waited_for(gateway: Served) -> None:
    """Until the end of the job, or for `wait_s`."""
    job_id = await gateway.submit()
    waiting = asyncio.create_task(gateway.call("GET", f"/v1/jobs/{job_id}?wait_s=30"))
    await asyncio.sleep(0.05)
    gateway.log.publish(job_id, ["a"])
    _, value, _ = await waiting
    _, early, headers = await gateway.call("GET", "/v1/jobs/acme.2?wait_s=0.05&cursor=0.0.w")

    assert value["status"] == "completed"
    assert (early["status"], early["ending"]) == ("waiting", None)
    assert headers["Cache-Control"] == "no-store"


# Kafka in trouble


@pytest.mark.parametrize(
    ("error", "status", "code", "retriable"),
    [
        (BrokerUnavailable("x"), 503, "broker_unavailable", True),
        (KafkaRefused("topic x does not exist"), 503, "broker_unavailable", True),
        (NotAcknowledged("no answer"), 503, "submit_unknown", False),
        (RecordTooLarge("x"), 413, "too_large", False),
        (RuntimeError("secret"), 500, "internal", False),
    ],
)
async def test_job_that_kafka_does_not_take_is_an_error(
    gateway: Served, error: Exception, status: int, code: str, retriable: bool
) -> None:
    """An SDK repeats it only where that cannot make a second job."""
    gateway.writer.errors = [error]
    found, value, headers = await gateway.call("POST", "/v1/jobs", json=JOB)

    assert (found, value["error"]["code"], value["error"]["retriable"]) == (status, code, retriable)
    assert headers["x-should-retry"] == str(retriable).lower()
    assert ("Retry-After" in headers) is (status == 503 and retriable)
    assert ("job_id" in value["error"]) is (code == "submit_unknown")
    assert "secret" not in json.dumps(value)


# Repeated requests


async def test_idempotency_key_gives_the_same_job(gateway: Served) -> None:
    """Also while the first request is still under way; another API key's are its own."""
    gateway.writer.gate = asyncio.Event()
    options: dict[str, Any] = {"json": JOB, "headers": {"Idempotency-Key": "order 7"}}
    requests = [asyncio.create_task(gateway.call("POST", "/v1/jobs", **options)) for _ in range(3)]
    await asyncio.sleep(0.05)
    gateway.writer.gate.set()
    answers = await asyncio.gather(*requests)
    other = await gateway.call("POST", "/v1/jobs", key=OTHER, **options)

    assert {status for status, _, _ in answers} == {202}
    assert len({value["job_id"] for _, value, _ in answers}) == 1
    assert sorted(headers.get("Idempotent-Replay", "false") for _, _, headers in answers) == [
        "false",
        "true",
        "true",
    ]
    assert other[1]["job_id"] != answers[0][1]["job_id"]
    assert len(gateway.writer.records) == 2
    assert gateway.metric("gateway_jobs_joined_total", cause="idempotency") == 2


async def test_idempotency_key_with_another_body_is_409(gateway: Served) -> None:
    """It names the job that the key made."""
    headers = {"Idempotency-Key": "k"}
    _, first, _ = await gateway.call("POST", "/v1/jobs", json=JOB, headers=headers)
    status, value, sent = await gateway.call(
        "POST", "/v1/jobs", json={**JOB, "max_wait_s": 1}, headers=headers
    )

    assert (status, value["error"]["code"]) == (409, "idempotency_mismatch")
    assert value["error"]["job_id"] == first["job_id"]
    assert sent["x-should-retry"] == "false"


async def test_idempotency_key_of_a_failed_request_may_be_used_again(gateway: Served) -> None:
    """Nothing was written. If that is not known, the job keeps its id, and workers skip the repetition."""
    headers = {"Idempotency-Key": "k"}
    gateway.writer.errors = [BrokerUnavailable("x"), NotAcknowledged("x")]
    statuses = [(await gateway.call("POST", "/v1/jobs", json=JOB, headers=headers))[0] for _ in range(3)]

    assert statuses == [503, 503, 202]
    [(_, _, unknown), (_, _, written)] = gateway.writer.records
    assert unknown["job_id"] == written["job_id"]


async def test_retry_of_an_sdk_joins_the_job_that_has_not_ended(gateway: Served) -> None:
    """An unchanged body alone is another job."""
    first, second = [await gateway.submit() for _ in range(2)]
    retry: dict[str, Any] = {"json": JOB, "headers": {"x-stainless-retry-count": "1"}}
    _, joined, headers = await gateway.call("POST", "/v1/jobs", **retry)
    gateway.log.publish(second, ["a"])
    _, anew, _ = await gateway.call("POST", "/v1/jobs", **retry)
    _, other, _ = await gateway.call("POST", "/v1/jobs", key=OTHER, **retry)

    assert first != second == joined["job_id"]
    assert headers["Idempotent-Replay"] == "true"
    assert anew["job_id"] not in {first, second}
    assert other["job_id"].startswith("other.")


def test_memory_forgets_the_oldest_and_the_expired() -> None:
    """Its size is bounded."""
    memory, task = Memory(keep_s=10, max_entries=3), cast("Any", None)
    for number in range(5):
        memory.add(number, b"", "acme.1", task, now=float(number))

    assert [number for number in range(5) if memory.find(number, 4.0)] == [2, 3, 4]
    assert [number for number in range(5) if memory.find(number, 13.5)] == [4]
    assert len(memory) == 1


# Read tokens


async def test_read_token_of_a_submitted_job_reads_that_job(gateway: Served) -> None:
    """And no other."""
    status, value, _ = await gateway.call("POST", "/v1/jobs?token=read&ttl_s=60", json=JOB)
    token, job_id = value["read_token"], value["job_id"]
    own, _, _ = await gateway.call("GET", f"/v1/jobs/{job_id}", key=token)
    other, _, _ = await gateway.call("GET", "/v1/jobs/acme.2", key=token)
    submits, _, _ = await gateway.call("POST", "/v1/jobs", key=token, json=JOB)

    assert (status, own, other, submits) == (202, 200, 404, 403)
    left_s = datetime.fromisoformat(value["read_token_expires_at"]).timestamp() - time.time()
    assert 55 < left_s <= 60


async def test_token_is_signed_for_jobs_of_the_tenant(gateway: Served) -> None:
    """With scope and lifetime."""
    body = {"jobs": ["acme.1", "acme.chat-*"], "scope": "read cancel", "ttl_s": 60}
    status, value, _ = await gateway.call("POST", "/v1/tokens", json=body)
    token = gateway.gateway.authenticator.tokens.verify(value["token"])

    assert status == 201
    assert token.jobs == ("acme.1", "acme.chat-*")
    assert token.scopes == {"read", "cancel"}
    assert datetime.fromisoformat(value["expires_at"]).timestamp() == token.expires_at


async def test_gateway_without_secrets_signs_no_token(tmp_path: Path) -> None:
    """501, because another replica would not either. The message says what is missing where; no job is submitted."""
    async with served(tmp_path) as gateway:
        gateway.gateway.authenticator.tokens._secrets = lambda: read_secrets(None)
        answers = [
            await gateway.call("POST", path, json=body)
            for path, body in [("/v1/tokens", {"jobs": ["acme.1"]}), ("/v1/jobs?token=read", JOB)]
        ]

    assert [status for status, _, _ in answers] == [501, 501]
    for _, body, _ in answers:
        assert (
            "a line kid:base64url-secret to the file of gateway.token_secrets_file"
            in body["error"]["message"]
        )
    assert gateway.writer.records == []
