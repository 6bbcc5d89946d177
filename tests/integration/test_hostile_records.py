"""Unusual records that other programs may write."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.integration.stage import Stage

# Only the pure Python build of aiokafka can write this; it must be chosen before the import.
_BAD_NAME = """
import asyncio, sys
from aiokafka import AIOKafkaProducer

class Name(str):
    def encode(self, *_):
        return b"\\xff\\xfe"

async def main():
    producer = AIOKafkaProducer(bootstrap_servers=sys.argv[1])
    await producer.start()
    await producer.send_and_wait(sys.argv[2], b"{}", headers=[(Name("zz"), b"x")], partition=1)
    await producer.stop()

asyncio.run(main())
"""


async def test_record_that_cannot_be_decoded_becomes_a_dead_letter(stage: Stage) -> None:
    """A header name that is not UTF-8: the record is skipped with its coordinates, and the jobs around it end."""
    await stage.open(partitions=2)
    async with stage.worker():
        await stage.submit("before", "practice?deltas=1", partition=1)
        await stage.ended("before")
        writer = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _BAD_NAME, stage.broker.bootstrap, stage.jobs_topic),
            env={**os.environ, "AIOKAFKA_NO_EXTENSIONS": "1"},
        )
        assert await writer.wait() == 0
        jobs = [f"after-{number}" for number in range(20)]
        for number, job_id in enumerate(jobs):
            await stage.submit(job_id, "practice?deltas=1", partition=number % 2)
        ends = await stage.ended(*jobs)
        unreadable = f"{stage.jobs_topic}-1-1"
        await stage.until(lambda: unreadable in stage.terminals())
        [letter] = await stage.dead_letters(1)

    assert {end["status"] for end in ends} == {"completed"}
    assert stage.breaches() == []
    assert stage.terminals()[unreadable]["status"] == "rejected"
    assert (letter.key, letter.value) == (unreadable.encode(), None)
    headers = dict(letter.headers)
    assert headers["__streamworker.errors.offset"] == b"1"
    assert b"cannot be decoded: a header name is not UTF-8" in headers["__streamworker.errors.message"]


async def test_record_whose_headers_do_not_fit_into_a_dead_letter_gets_one_with_coordinates_only(
    apache: Stage,
) -> None:
    """Two MiB of headers on a large job topic: without it the commit is refused for ever."""
    await apache.open(topic_settings={"max.message.bytes": "8000000"})
    await apache.set_topic(apache.dlq_topic, max_message_bytes="1048588")
    async with apache.worker():
        big = [("large", os.urandom(2 << 20))]
        await apache.submit_bytes(b"not a job", key=b"k" * 1000, headers=big)
        await apache.submit("after", "practice?deltas=1")
        await apache.ended("after")
        [letter] = await apache.dead_letters(1)

    names = {name.removeprefix("__streamworker.errors.") for name, _ in letter.headers}
    assert (letter.key, letter.value) == (f"{apache.jobs_topic}-0-0".encode(), None)
    assert "large" not in names
    assert {"topic", "partition", "offset", "code", "message"} <= names


async def test_header_without_a_value_is_accepted_and_kept_in_a_dead_letter(stage: Stage) -> None:
    """Kafka allows null as the value of a header."""
    await stage.open()
    job = {"job_id": "one", "request": {"model": "practice?deltas=1", "messages": stage.message("one")}}
    null_headers = [("traceparent", None), ("other", None)]
    async with stage.worker(worker__delivery="at_least_once"):
        await stage.submit_bytes(b"nonsense", headers=null_headers)  # type: ignore[arg-type]
        await stage.submit_bytes(json.dumps(job).encode(), headers=null_headers)  # type: ignore[arg-type]
        [end] = await stage.ended("one")
        [letter] = await stage.dead_letters(1)

    assert (end["status"], end["tries"]) == ("completed", 1)
    assert list(letter.headers[:2]) == null_headers


async def test_trace_state_that_is_too_long_is_dropped(stage: Stage) -> None:
    """It would make the `started` record larger than a topic accepts."""
    await stage.open()
    async with stage.worker():
        await stage.submit("one", "practice?deltas=1", headers=[("tracestate", b"a=" + b"x" * 600)])
        [end] = await stage.ended("one")

    assert end["status"] == "completed"
    assert "tracestate" not in stage.calls("one")[0].headers


async def test_request_chooses_no_url_header_or_key_by_members_that_clients_know(stage: Stage) -> None:
    """Members that client libraries read as arguments stay in the body, where the upstream decides about them."""
    await stage.open()
    members = {
        "extra_headers": {"x-injected": "1", "authorization": "Bearer mine"},
        "extra_query": {"a": "1"},
        "extra_body": {"stream": False},
        "base_url": "http://elsewhere.invalid/v1",
        "api_key": "mine",
        "timeout": 1,
    }
    request = {"model": "practice", "messages": stage.message("hostile"), "stream": False} | members
    headers = [
        ("authorization", b"Bearer mine"),
        ("x-injected", b"1"),
        ("traceparent", b"00-1\r\nx-injected: 1"),
    ]
    async with stage.worker():
        await stage.submit_bytes(
            json.dumps({"job_id": "hostile", "request": request}).encode(), headers=headers
        )
        [terminal] = await stage.ended("hostile")

    assert terminal["status"] == "completed"
    [call] = stage.calls("hostile")
    assert call.path == "/v1/chat/completions"
    assert call.body == request | {"stream": True, "stream_options": {"include_usage": True}}
    assert call.headers.keys() == {
        "host",
        "accept",
        "accept-encoding",
        "content-length",
        "content-type",
        "user-agent",
    } | ({"connection"} & call.headers.keys())
