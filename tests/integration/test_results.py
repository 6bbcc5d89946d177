"""The results topic on Apache Kafka: one result per terminal event, equal to what a reader of the events assembles."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from streamworker.kafka.topics import RESULTS_CLEANUP, open_admin
from tests.integration.results import assembled, result_breaches, results_of
from tests.integration.test_dlq import command

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.stage import Stage

PARTITIONS = 2


async def test_results_of_workers_that_are_killed_equal_the_events(
    apache: Stage, topics: Callable[[str], str]
) -> None:
    """One per terminal event of any status, whichever worker wrote it; the audit finds no breach."""
    topic = topics("results")
    await apache.open(partitions=4, events_partitions=PARTITIONS, results_topic=topic)
    models = (
        "practice?deltas=60&pace_ms=40",
        "practice?deltas=9&tool_calls=2&reasoning&choices=2",
        "practice?deltas=5&break_after=3",
        "practice?status=400",
        "practice?deltas=40&pace_ms=10&logprobs",
    )
    as_one = {
        "worker__group_instance_id": "one"
    }  # the second does not wait for the end of the first one's session
    victim = await apache.process(**as_one)
    await victim.logged("worker.started")
    await apache.submit_many((f"job-{n}", models[n % len(models)], n % 4) for n in range(60))
    await apache.submit_bytes(b'{"job_id": "invalid", "nonsense": 1}')
    await apache.until(lambda: len(apache.terminals()) >= 10 and apache.practice.open_streams >= 5)
    await victim.kill()
    await apache.process(**as_one)
    await apache.ended(*(f"job-{n}" for n in range(60)), "invalid", limit_s=90)

    assert await result_breaches(apache, topic) == []
    attempts = {event["attempt"] for event in (record.event for record in apache.records)}
    assert len(attempts) > 61, "no job was running when the worker was killed"
    audited = await command(apache, "audit")
    assert (audited.code, "61 results: no breach" in audited.out) == (0, True), audited


@pytest.mark.parametrize(
    ("model", "limit", "omitted"),
    [
        ("practice?big_delta=50000&deltas=3", 1_000_000, []),
        ("practice?big_delta=900000&deltas=3", 1_000_000, []),
        ("practice?big_delta=600000&deltas=3&choices=2", 1_000_000, ["completion"]),
        ("practice?big_delta=1500000&deltas=3", 8_000_000, []),
        ("practice?deltas=500&logprobs", 32_768, ["logprobs"]),
    ],
)
async def test_result_of_each_size_is_written_within_its_limit(
    apache: Stage, topics: Callable[[str], str], model: str, limit: int, omitted: list[str]
) -> None:
    """What does not fit is left out and named; a larger topic takes all."""
    topic = topics("results")
    apache.variables["KAFKA__MAX_RESULT_BYTES"] = str(limit)
    if limit > 1_000_000:
        apache.variables["KAFKA__MAX_RECORD_BYTES"] = "2000000"
        apache.variables["WORKER__MAX_EVENT_BYTES"] = "3000000"
    large = {"max.message.bytes": "9000000"} if limit > 1_000_000 else None
    await apache.open(events_partitions=PARTITIONS, results_topic=topic, topic_settings=large)
    await apache.submit("sized", model)
    async with apache.worker():
        await apache.ended("sized")

    assert await result_breaches(apache, topic) == []
    [result] = (await results_of(apache, topic))["sized"]
    assert (result["status"], result["omitted"]) == ("completed", omitted)
    assert (result["completion"] is None) == (omitted == ["completion"])
    if omitted == ["logprobs"]:
        whole = assembled(apache, "sized")
        assert result["completion"]["choices"][0]["message"] == whole["choices"][0]["message"]
        assert result["completion"]["choices"][0]["logprobs"] is None


async def test_result_that_the_topic_refuses_is_written_without_its_completion(
    apache: Stage, topics: Callable[[str], str]
) -> None:
    """The topic was made smaller while the worker ran; other jobs are not affected."""
    topic = topics("results")
    await apache.open(events_partitions=PARTITIONS, results_topic=topic)
    async with apache.worker(kafka__compression="none"):  # the broker compares compressed sizes
        await apache.submit("before")
        await apache.ended("before")
        await apache.set_topic(topic, max_message_bytes="20000")
        await apache.submit("large", "practice?big_delta=50000&deltas=1")
        await apache.submit("small")
        await apache.ended("before", "large", "small")

    assert await result_breaches(apache, topic) == []
    results = await results_of(apache, topic)
    assert [results[job_id][0]["omitted"] for job_id in ("before", "large", "small")] == [
        [],
        ["completion"],
        [],
    ]


async def test_results_without_transactions_have_the_offset_of_started(
    apache: Stage, topics: Callable[[str], str]
) -> None:
    """`delivery = "at_least_once"` writes the same records."""
    topic = topics("results")
    await apache.open(events_partitions=PARTITIONS, results_topic=topic)
    await apache.submit_many((f"job-{n}", "practice?deltas=5", 0) for n in range(20))
    async with apache.worker(worker__delivery="at_least_once"):
        await apache.ended()

    assert await result_breaches(apache, topic) == []
    assert len(await results_of(apache, topic)) == 20


async def test_result_of_a_job_with_merged_deltas_is_whole(
    apache: Stage, topics: Callable[[str], str]
) -> None:
    """The same text in a tenth of the events."""
    topic = topics("results")
    await apache.open(events_partitions=PARTITIONS, results_topic=topic)
    model = "practice?deltas=200&tool_calls=2&pace_ms=2"
    await apache.submit("merged", model, deltas="merged")
    async with apache.worker():
        [terminal] = await apache.ended("merged")

    assert await result_breaches(apache, topic) == []
    assert terminal["seq"] * 10 < terminal["observed"]["deltas"]


async def test_results_topic_is_created_compacted_and_checked(
    apache: Stage, topics: Callable[[str], str]
) -> None:
    """With a week of retention; the broker takes a result of the configured size."""
    topic = topics("results")
    apache.variables |= {"TOPICS__RESULTS": topic, "KAFKA__MAX_RESULT_BYTES": "8000000"}
    await apache.open()
    created = await command(apache, "topics", "create")
    assert (created.code, f"created {topic} " in created.out) == (0, True), created
    async with asyncio.timeout(10):
        while "does not exist" in (checked := await command(apache, "topics", "check")).err:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.2)  # a broker may not know a topic yet that was just created
    assert checked.code == 0, checked
    async with open_admin(apache.settings()) as admin:
        facts = (await admin.describe())[topic]
        assert facts is not None
        assert facts.cleanup_policy == RESULTS_CLEANUP["cleanup.policy"]
        assert facts.max_message_bytes == 8_001_024
