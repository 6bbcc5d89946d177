"""Test a worker between a real broker and the practice upstream: events, bad input, faults, crashes, signals, outages."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from streamworker.demo.child import free_port
from streamworker.practice import PracticeUpstream, expected_text, expected_usage
from tests.integration.checker import text_of
from tests.integration.forwarding import forwarded
from tests.integration.stage import Stage, eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from streamworker.demo.broker import EmbeddedBroker
    from tests.brokers.apache import ApacheKafka

DELIVERIES = pytest.mark.parametrize("delivery", ["exactly_once", "at_least_once"])
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


# Jobs that complete


@DELIVERIES
async def test_completed_job_has_its_deltas_in_order_and_one_usage_event(stage: Stage, delivery: str) -> None:
    """One prompt results in `started`, each delta verbatim, and one `usage` with the upstream's own numbers."""
    await stage.open()
    model = "practice?deltas=12&choices=2&pace_ms=2&usage=own"
    async with stage.worker(worker__delivery=delivery):
        job = await stage.submit("one", model, metadata={"tenant": "a"})
        [end] = await stage.ended("one")
    events = stage.events("one")

    assert stage.breaches() == []
    assert [event["type"] for event in events] == ["started"] + ["delta"] * (len(events) - 2) + ["usage"]
    assert events[0] | {"attempt": "", "ts": 0} == {
        "v": 1,
        "type": "started",
        "job_id": "one",
        "attempt": "",
        "seq": 0,
        "ts": 0,
        "model": model,
        "upstream": "default",
        "cause": "new",
        "source": {"topic": stage.jobs_topic, "partition": job.partition, "offset": job.offset},
        "metadata": {"tenant": "a"},
    }
    assert [text_of(events, choice) for choice in (0, 1)] == expected_text(model, job.messages)
    assert (end["status"], end["error"], end["tries"]) == ("completed", None, 1)
    assert (end["usage"], end["usage_source"]) == (expected_usage(model, job.messages), "upstream")
    assert (end["finish_reasons"], end["metadata"]) == ({"0": "stop", "1": "stop"}, {"tenant": "a"})
    assert len(stage.calls("one")) == 1


@DELIVERIES
async def test_two_hundred_jobs_over_four_partitions_all_end_once_and_are_committed(
    apache: Stage, delivery: str
) -> None:
    """No rule for readers is broken, each job is called once, and the committed offset is past the last job."""
    await apache.open(partitions=4, events_partitions=3)
    jobs = [
        (f"job-{number}", f"practice?deltas={5 + number % 20}&pace_ms=3", number % 4) for number in range(200)
    ]
    async with apache.worker(worker__delivery=delivery, worker__commit_interval_s=0.2):
        await apache.submit_many(jobs)
        await apache.ended()
        assert await apache.commit_breaches() == []

    assert apache.breaches() == []
    assert {len(apache.calls(job_id)) for job_id, _, _ in jobs} == {1}
    committed = await apache.committed()
    last = {job.partition: job.offset for job in apache.jobs}
    assert {partition: point.offset for partition, point in committed.items()} == {
        partition: offset + 1 for partition, offset in last.items()
    }


async def test_deltas_can_be_read_while_the_stream_runs(stage: Stage) -> None:
    """A delta does not wait for a commit at the end of its job, for read_committed readers too."""
    await stage.open()
    async with stage.worker():
        await stage.submit("slow", "practice?deltas=40&pace_ms=25")
        await stage.until(lambda: stage.deltas("slow") >= 5)
        assert stage.terminals() == {}
        assert stage.practice.open_streams == 1
        await stage.ended("slow")
    assert stage.breaches() == []


async def test_tombstone_is_skipped_and_its_offset_committed(stage: Stage) -> None:
    """A record without a value is skipped; the jobs after it run, and its offset is committed."""
    await stage.open()
    async with stage.worker():
        await stage.submit_bytes(None, key=b"gone")
        await stage.submit("after")
        await stage.ended("after")
        await stage.submit_bytes(None, key=b"gone")
        async with asyncio.timeout(10):
            while (await stage.committed())[0].offset < 3:  # noqa: ASYNC110 - a commit has no event to wait for
                await asyncio.sleep(0.05)
    assert stage.breaches() == []
    assert {record.event["job_id"] for record in stage.records} == {"after"}


async def test_events_are_in_the_partition_of_the_default_partitioner(stage: Stage) -> None:
    """The partition is Java's murmur2 of the job id, so any reader can compute it."""
    await stage.open(events_partitions=3)
    # Computed with Java's Utils.toPositive(Utils.murmur2(key)) % 3.
    expected = {"job-1": 2, "job-2": 0, "job-3": 0, "conversation:42": 0, "a": 1, "tenant.7-x": 1}
    async with stage.worker():
        await stage.submit_many([(job_id, "practice?deltas=3", 0) for job_id in expected])
        await stage.ended()
    assert {record.event["job_id"]: record.partition for record in stage.records} == expected
    assert stage.breaches() == []


async def test_traceparent_is_carried_into_first_and_last_event_and_the_upstream_call(stage: Stage) -> None:
    """The trace of the submitter continues in the upstream call and in the events."""
    await stage.open()
    async with stage.worker():
        headers = [("traceparent", TRACE.encode()), ("tracestate", b"a=1"), ("other", b"x")]
        await stage.submit("traced", "practice?deltas=2", headers=headers)
        await stage.ended("traced")
    carried = [
        (
            record.event["type"],
            dict(record.headers).get("traceparent"),
            dict(record.headers).get("tracestate"),
        )
        for record in stage.records
    ]
    with_trace = (TRACE.encode(), b"a=1")
    deltas = [("delta", None, None)] * (len(carried) - 2)
    assert carried == [("started", *with_trace), *deltas, ("usage", *with_trace)]
    [call] = stage.calls("traced")
    assert (call.headers["traceparent"], call.headers["tracestate"]) == (TRACE, "a=1")
    assert "other" not in call.headers


async def test_events_go_to_the_topic_that_the_job_names(stage: Stage) -> None:
    """`reply_to` selects the topic of all events of a job, if the configuration allows that topic."""
    reply = f"{stage.events_topic}.reply"
    await stage.open(reply_topics=[reply])
    async with stage.worker():
        await stage.submit("there", "practice?deltas=2", reply_to=reply)
        await stage.submit("here", "practice?deltas=2")
        await stage.ended()
    topics = {(record.event["job_id"], record.topic) for record in stage.records}
    assert topics == {("there", reply), ("here", stage.events_topic)}
    assert stage.breaches() == []


async def test_cloudevents_have_the_headers_of_the_kafka_binding(stage: Stage) -> None:
    """CloudEvents 1.0, Kafka binding, binary mode: headers are added and the value is unchanged."""
    await stage.open()
    async with stage.worker(events__format="cloudevents", events__source="/here"):
        await stage.submit("cloud", "practice?deltas=1")
        await stage.ended("cloud")
    for record in stage.records:
        headers = {name: value.decode() for name, value in record.headers}
        event = record.event
        assert headers.pop("ce_time").endswith("Z")
        assert headers == {
            "content-type": "application/json",
            "streamworker-type": event["type"],
            "ce_specversion": "1.0",
            "ce_type": f"dev.streamworker.{event['type']}.v1",
            "ce_source": "/here",
            "ce_id": f"cloud/{event['attempt']}/{event['seq']}",
            "ce_subject": "cloud",
            **({"streamworker-status": "completed"} if event["type"] == "usage" else {}),
        }
    assert stage.breaches() == []


# Bad input

LONG = "x" * 201


def _job(**members: Any) -> bytes:
    request = {"model": "practice", "messages": [{"role": "user", "content": "hi"}]}
    named = {"job_id": f"bad:{'.'.join(members)}", "request": request}
    return json.dumps(named | members).encode()


BAD_RECORDS: dict[str, tuple[bytes, str, str, str]] = {
    # name: value, job id (empty: from the coordinates), code, in the message
    "not_json": (b"{nonsense", "", "invalid_job", "not JSON"),
    "not_utf8": (b'{"job_id":"\xff"}', "", "invalid_job", "not UTF-8"),
    "not_an_object": (b"[1]", "", "invalid_job", "not an object"),
    "empty": (b"", "", "invalid_job", "not JSON"),
    "no_request": (b'{"job_id":"bad"}', "bad", "invalid_job", "request: is required"),
    "wrong_type": (_job(deadline=5), "bad:deadline", "invalid_job", "deadline"),
    "messages_empty": (
        _job(request={"model": "practice", "messages": []}),
        "bad:request",
        "invalid_job",
        "request.messages",
    ),
    "unknown_member": (_job(upstreem="x"), "bad:upstreem", "invalid_job", "upstreem"),
    "oversize_id": (_job(job_id=LONG), "", "invalid_job", "job_id"),
    "strange_id": (_job(job_id="a b"), "", "invalid_job", "job_id"),
    "huge": (_job(metadata={"fill": "x" * 9000}), "", "invalid_job", "the limit is 8192"),
    "unknown_upstream": (_job(upstream="elsewhere"), "bad:upstream", "unknown_upstream", "upstream"),
    "reply_to_not_allowed": (_job(reply_to="secrets"), "bad:reply_to", "invalid_job", "reply_to"),
}


async def test_bad_records_become_dead_letters_byte_for_byte_and_rejected_jobs(stage: Stage) -> None:
    """Each bad record becomes a dead letter and a terminal event; the jobs around it complete."""
    await stage.open()
    headers = [("twice", b"1"), ("twice", b"2"), ("binary", b"\x00\xff")]
    async with stage.worker(worker__max_job_bytes=8192):
        written = {}
        for number, (name, (value, *_)) in enumerate(BAD_RECORDS.items()):
            await stage.submit(f"good-{number}", "practice?deltas=1")
            key = None if name == "not_json" else f"key of {name}".encode()
            written[name] = (await stage.submit_bytes(value, key=key, headers=headers), key)
        await stage.submit("good-last", "practice?deltas=1")
        await stage.ended()
        letters = {record.value: record for record in await stage.dead_letters(len(BAD_RECORDS))}
        await stage.until(
            lambda: sum(r.event["type"] == "usage" for r in stage.records) == 2 * len(BAD_RECORDS) + 1
        )
    ends = [record.event for record in stage.records if record.event["type"] == "usage"]
    rejected = [end for end in ends if end["status"] == "rejected"]

    assert stage.breaches() == []
    assert {end["status"] for end in ends if end["job_id"].startswith("good")} == {"completed"}
    assert len(rejected) == len(BAD_RECORDS)
    for name, (value, job_id, code, message) in BAD_RECORDS.items():
        at, key = written[name]
        letter = letters[value]
        added = dict(letter.headers[len(headers) :])
        errors = {
            header.removeprefix("__streamworker.errors."): text.decode() for header, text in added.items()
        }
        wanted_id = job_id or f"{at.topic}-{at.partition}-{at.offset}"
        ends_of = [
            end
            for end in rejected
            if end["job_id"] == wanted_id and end["error"]["message"] == errors["message"]
        ]

        assert (letter.key, list(letter.headers[: len(headers)])) == (key, headers), name
        assert message in errors.pop("message"), name
        assert errors == {
            "code": code,
            "topic": at.topic,
            "partition": str(at.partition),
            "offset": str(at.offset),
            "timestamp": str(at.timestamp),
            "group": stage.group,
        }, name
        assert [(end["seq"], end["error"]["code"], end["usage"], end["tries"]) for end in ends_of][:1] == [
            (0, code, None, 0)
        ], name


# Upstream faults

COUNT = 10
FAULTS: dict[str, tuple[str, str, str, int]] = {
    # name: options, status, code, deltas published (the role's included)
    "html200": ("html200", "failed", "upstream_protocol", 0),
    "status_400": ("status=400", "failed", "upstream_rejected", 0),
    "error_frame_first": ("error_frame_after=0", "failed", "upstream_error", 0),
    "error_frame": ("error_frame_after=5", "interrupted", "upstream_error", 6),
    "error_then_done": ("error_then_done_after=5", "interrupted", "upstream_error", 6),
    "close": ("close_after=5", "interrupted", "truncated", 6),
    "close_unframed": ("close_after=5&framing=close", "interrupted", "truncated", 6),
    "reset": ("break_after=5&pace_ms=20", "interrupted", "truncated", 6),
    "cut_utf8": ("cut_utf8_after=5", "interrupted", "truncated", 6),
    "endless_line": ("endless_line", "interrupted", "upstream_protocol", 1),
    "silence": ("stall_after=5", "interrupted", "timeout_idle", 6),
    "pings_only": ("ping_stall_after=5", "interrupted", "timeout_idle", 6),
    "silent_first": ("stall_after=0", "failed", "timeout_first_delta", 0),
    "big_delta": ("big_delta=40000", "interrupted", "too_large", 1),
}


async def test_upstream_faults_end_jobs_with_their_code_and_keep_what_was_received(stage: Stage) -> None:
    """Each fault has its status and code; deltas before it are published and counted."""
    await stage.open()
    over = {
        "kafka__max_record_bytes": 20_000,
        "worker__max_event_bytes": 100_000,
        "upstreams__default__idle_timeout_s": 0.5,
        "upstreams__default__first_delta_timeout_s": 1,
        "upstreams__default__max_tries": 1,
    }
    async with stage.worker(**over):
        jobs = [(name, f"practice?deltas={COUNT}&{options}", 0) for name, (options, *_) in FAULTS.items()]
        await stage.submit_many([*jobs, ("healthy", f"practice?deltas={COUNT}", 0)])
        ends = {end["job_id"]: end for end in await stage.ended()}
        await eventually(
            lambda: stage.practice.open_streams == 0
        )  # no stream stays open, which would cost tokens

    assert stage.breaches() == []
    assert ends["healthy"]["status"] == "completed"
    ended = {name: (ends[name]["status"], ends[name]["error"]["code"], stage.deltas(name)) for name in FAULTS}
    assert ended == {name: (status, code, deltas) for name, (_, status, code, deltas) in FAULTS.items()}
    sources = {name: ends[name]["usage_source"] for name in FAULTS}
    assert {name for name, source in sources.items() if source == "none"} == {
        name
        for name, (*_, deltas) in FAULTS.items()
        if deltas <= 1  # a role delta alone generated nothing
    }
    assert "practice upstream failed" in ends["error_frame"]["error"]["message"]
    assert ends["error_frame"]["error"]["upstream"]


async def test_rotated_upstream_key_is_used_by_the_next_call(
    embedded_broker: EmbeddedBroker, practice: PracticeUpstream, topics: Callable[[str], str], tmp_path: Path
) -> None:
    """A job whose key is refused waits; once the key's file is replaced, the same worker calls again at once."""
    file = tmp_path / "key"
    file.write_text("the-old-key\n")
    async with (
        PracticeUpstream(api_key="the-new-key") as strict,
        Stage(embedded_broker, practice, topics, tmp_path) as stage,
    ):
        await stage.open()
        async with stage.worker(
            upstreams__default__base_url=strict.base_url, upstreams__default__api_key_file=file
        ):
            await stage.submit("waits")
            await eventually(lambda: strict.calls)
            (tmp_path / "renewed").write_text("the-new-key\n")
            (tmp_path / "renewed").replace(file)  # atomically, as Kubernetes does
            [waited] = await stage.ended("waits")
            await stage.submit("after")
            [after] = await stage.ended("after")

    assert (waited["status"], waited["error"], waited["tries"]) == ("completed", None, 2)
    assert (after["status"], after["error"], after["tries"]) == ("completed", None, 1)
    assert [call.headers["authorization"] for call in strict.calls] == ["wrong", "matched", "matched"]


async def test_unreachable_upstream_ends_the_job_as_unavailable(stage: Stage) -> None:
    """A refused connection fails the job with a reason and does not block the partition."""
    await stage.open()
    over = {
        "upstreams__default__base_url": f"http://127.0.0.1:{free_port()}/v1",
        "upstreams__default__max_tries": 1,
        "upstreams__default__max_wait_s": 1,
    }
    async with stage.worker(**over):
        await stage.submit("nowhere")
        [end] = await stage.ended("nowhere")
    assert (end["status"], end["error"]["code"]) == ("failed", "upstream_unavailable")
    assert end["error"]["retriable"] is True


# Crashes and signals


@DELIVERIES
async def test_worker_killed_in_the_middle_loses_no_job(apache: Stage, delivery: str) -> None:
    """After SIGKILL and a restart every job ends; with exactly_once no rule for readers is broken either."""
    await apache.open(partitions=2)
    jobs = [
        (f"job-{number}", f"practice?deltas={10 + number % 10}&pace_ms=15", number % 2)
        for number in range(60)
    ]
    over = {"worker__delivery": delivery, "worker__max_in_flight": 20, "worker__commit_interval_s": 0.2}
    over["worker__group_instance_id"] = (
        "one"  # the second process gets the partitions without waiting for the first one's session timeout
    )
    first = await apache.process(**over)
    await apache.submit_many(jobs)
    await apache.until(lambda: len(apache.terminals()) >= 15)
    await first.kill()
    await apache.process(**over)
    await apache.ended()
    # With at_least_once a job that has ended may be running again.
    await apache.until(lambda: "terminal of another attempt" not in {b.kind for b in apache.breaches()})

    kinds = {breach.kind for breach in apache.breaches()}
    assert kinds <= (set() if delivery == "exactly_once" else {"second terminal", "finished job run again"})
    assert await apache.commit_breaches() == []
    paid_twice = sum(len(apache.calls(job_id)) > 1 for job_id, _, _ in jobs)
    assert paid_twice <= 20 if delivery == "exactly_once" else paid_twice <= 40


async def test_sigterm_completes_open_streams_and_exits_with_zero(apache: Stage) -> None:
    """A drain completes the open streams, starts no job, and commits."""
    await apache.open()
    process = await apache.process()
    await apache.submit_many([(f"open-{number}", "practice?deltas=40&pace_ms=25", 0) for number in range(5)])
    await apache.until(lambda: all(apache.deltas(f"open-{number}") for number in range(5)))
    process.signal(signal.SIGTERM)
    await process.logged("worker.draining")
    await apache.submit("late", "practice?deltas=1")
    assert await process.exit_code() == 0
    ends = await apache.ended(*(f"open-{number}" for number in range(5)))

    assert {end["status"] for end in ends} == {"completed"}
    assert "late" not in apache.terminals()
    assert (await apache.committed())[0].offset == 5
    assert len(apache.practice.calls) == 5


async def test_record_that_is_written_during_a_drain_is_left_to_the_next_worker(apache: Stage) -> None:
    """A draining worker accepts no job, not even one from its last fetch."""
    await apache.open()
    async with apache.worker() as worker:
        await apache.submit("open", "practice?deltas=40&pace_ms=25")
        await apache.until(lambda: apache.deltas("open"))
        worker.app.drain()
        await apache.submit("late", "practice?deltas=1")
        await apache.ended("open")
    assert apache.calls("late") == []
    async with apache.worker():
        await apache.ended("late")
    assert apache.breaches() == []


@DELIVERIES
async def test_drained_worker_leaves_nothing_to_repeat(apache: Stage, delivery: str) -> None:
    """The last commit happens before the worker leaves the group, so the next worker runs no job again."""
    await apache.open()
    over = {"worker__delivery": delivery, "worker__commit_interval_s": 60}
    async with apache.worker(**over):
        await apache.submit_many([(f"job-{number}", "practice?deltas=2", 0) for number in range(5)])
        await apache.ended()
    assert (await apache.committed())[0].offset >= 5
    async with apache.worker(**over):
        await apache.submit("next", "practice?deltas=1")
        await apache.ended("next")
    assert apache.breaches() == []
    assert len(apache.practice.calls) == 6


async def test_second_sigterm_ends_the_worker_at_once(apache: Stage) -> None:
    """A second signal does not wait for the streams; the next worker runs their jobs."""
    await apache.open()
    process = await apache.process()
    await apache.submit("long", "practice?deltas=400&pace_ms=50")
    await apache.until(lambda: apache.deltas("long"))
    process.signal(signal.SIGTERM)
    await process.logged("worker.draining")
    process.signal(signal.SIGTERM)
    assert await process.exit_code(5) == 1
    await eventually(lambda: apache.practice.open_streams == 0)
    assert apache.terminals() == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_signal_before_the_broker_is_reachable_ends_the_worker_cleanly(
    number: signal.Signals, practice: PracticeUpstream, topics: Callable[[str], str], tmp_path: Path
) -> None:
    """A worker that is still connecting ends at once on a signal, with exit code 0 and no traceback."""

    class Nowhere:
        bootstrap = f"127.0.0.1:{free_port()}"

    async with Stage(Nowhere(), practice, topics, tmp_path) as nowhere:
        process = await nowhere.process()
        [line] = await process.logged("kafka.unavailable")
        process.signal(number)
        assert await process.exit_code(3) == 0
    assert Nowhere.bootstrap in line["reason"]
    assert line["next_try_s"] > 0
    assert "Traceback" not in process.tail()


# Outages of the broker


async def test_worker_waits_for_a_broker_that_starts_later(
    apache: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that starts before its broker logs the failed connection, repeats it, and then runs its jobs."""
    monkeypatch.setattr("streamworker.app._CONNECT_BACKOFF_S", (0.5,))
    await apache.open()
    await apache.submit("early", "practice?deltas=3")
    port = free_port()
    with structlog.testing.capture_logs() as lines:
        async with apache.worker(kafka__bootstrap_servers=f"127.0.0.1:{port}"):
            await eventually(lambda: [line for line in lines if line["event"] == "kafka.unavailable"])
            async with forwarded(port, apache.broker.bootstrap):
                [end] = await apache.ended("early")
    assert end["status"] == "completed"
    assert apache.breaches() == []


async def test_broker_that_hangs_during_streams_costs_no_job(
    apache_kafka: ApacheKafka, apache: Stage
) -> None:
    """While the broker hangs for some seconds, no job is lost, and no stream is called twice."""
    await apache.open(partitions=2)
    jobs = [(f"job-{number}", "practice?deltas=120&pace_ms=20", number % 2) for number in range(20)]
    async with apache.worker(worker__session_timeout_s=20, kafka__max_unacknowledged_bytes=1 << 20):
        await apache.submit_many(jobs)
        await apache.until(lambda: all(apache.deltas(job_id) > 10 for job_id, _, _ in jobs))
        await asyncio.to_thread(apache_kafka.pause)
        await asyncio.sleep(3)
        await asyncio.to_thread(apache_kafka.resume)
        await apache.ended()
        assert await apache.commit_breaches() == []
    assert apache.breaches() == []
    assert {end["status"] for end in apache.terminals().values()} == {"completed"}
    assert {len(apache.calls(job_id)) for job_id, _, _ in jobs} == {1}


async def test_hanging_broker_stops_the_reading_of_upstreams(
    apache_kafka: ApacheKafka, apache: Stage
) -> None:
    """Backpressure reaches the upstreams: at most `max_unacknowledged_bytes` are read while the broker hangs."""
    limit = 1 << 20
    await apache.open()
    async with apache.worker(worker__session_timeout_s=20, kafka__max_unacknowledged_bytes=limit) as worker:
        await apache.submit_many(
            [
                (f"job-{number}", "practice?deltas=60&big_delta=150000&usage=running", 0)
                for number in range(30)
            ]
        )
        await apache.until(lambda: apache.deltas("job-0"))
        await asyncio.to_thread(apache_kafka.pause)
        gauge = worker.app.metrics.registry.get_sample_value
        await asyncio.sleep(1)
        waiting = gauge("streamworker_sink_unacknowledged_bytes") or 0
        await asyncio.to_thread(apache_kafka.resume)
        await apache.ended()
    assert waiting <= limit + 160_000 * 2
    assert apache.breaches() == []


# A signal before the group is joined


async def test_worker_that_is_drained_before_it_has_joined_stops_when_it_has(apache: Stage) -> None:
    """A program that runs the worker in its own process may stop it at any time."""
    await apache.open()

    async with apache.worker() as worker:
        assert not worker.app.is_working

    assert worker.task is not None
    assert worker.task.done()


async def test_first_signal_before_the_group_is_joined_stops_at_once(
    apache_kafka: ApacheKafka, apache: Stage
) -> None:
    """A worker that has not joined its group has no streams to drain, so one signal ends it."""
    await apache.open()
    process = await apache.process()
    await process.logged("probes.listening")
    await asyncio.to_thread(apache_kafka.pause)
    await asyncio.sleep(0.5)
    process.signal(signal.SIGTERM)
    code = await process.exit_code(8)
    await asyncio.to_thread(apache_kafka.resume)
    assert code == 0
