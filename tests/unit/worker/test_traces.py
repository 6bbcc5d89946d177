"""The spans of a job, whatever happens to it: the whole worker in memory, with real spans."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from structlog.testing import capture_logs

from streamworker.errors import UpstreamError
from streamworker.model import ErrorCode, JobError, ProducerRecord
from streamworker.telemetry.tracing import OtelTracer
from streamworker.testing import (
    MemoryClock,
    MemoryCommitStores,
    MemoryObserver,
    MemorySink,
    MemorySource,
    MemoryUpstream,
    Script,
)
from streamworker.worker.worker import Worker, WorkerLimits
from tests.streams import chunk, data
from tests.turnable import until
from tests.unit.worker.bench import (
    DONE,
    FINISH,
    JOBS,
    job,
    make_intake,
    make_policy,
    make_queues,
    make_tools,
    read,
    said,
    word,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE_ID}-{PARENT}-01"
UNSAMPLED = f"00-{TRACE_ID}-{PARENT}-00"
BUSY = JobError(ErrorCode.UPSTREAM_UNAVAILABLE, "busy with: the prompt", 503, retriable=True)
BROKEN = UpstreamError(BUSY)
ABSURD = UpstreamError(JobError(ErrorCode.UPSTREAM_ERROR, "busy", 1 << 70, retriable=True))
REPORT = data(
    {
        "choices": [],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 2},
            "completion_tokens_details": {"reasoning_tokens": 4},
        },
    }
)
REFUSED = Script([], before=[BROKEN])
FOREVER = asyncio.Event  # a step that never comes


class Bench:
    """A worker that is traced, and its upstreams: `scripts` by name, each falling back on the next."""

    def __init__(self, *, max_tries: int = 1, drain_timeout_s: float = 100, **scripts: Any) -> None:
        loop = asyncio.get_running_loop()
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.upstreams = {name: MemoryUpstream(*calls) for name, calls in scripts.items()}
        self.source, self.broker, self.sink = MemorySource(), MemoryCommitStores(), MemorySink()
        clock, observer = MemoryClock(), MemoryObserver()
        names = list(scripts)
        tracer = OtelTracer(
            provider,
            group="group",
            servers={names[0]: ("llm.example", 443)},
            now_ns=lambda: round(loop.time() * 1e9),
        )
        policies = {
            name: make_policy(
                upstream,
                name=name,
                fallback=tuple(names[index + 1 :]),
                max_tries=max_tries,
                max_restarts=1,
                max_streams=1,
            )
            for index, (name, upstream) in enumerate(self.upstreams.items())
        }
        self.worker = Worker(
            source=self.source,
            commit_stores=self.broker,
            intake=make_intake(self.sink, clock, policies, tracer=tracer, max_deliveries=2),
            tools=make_tools(self.sink, clock, observer, make_queues(observer, policies)),
            limits=WorkerLimits(max_in_flight=10, drain_timeout_s=drain_timeout_s),
            failure=loop.create_future(),
        )
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.source.start(self.worker)
        self.task = asyncio.create_task(self.worker.run())
        self.source.assign(JOBS)

    async def play(self, value: bytes | None = None, trace: str | None = SAMPLED) -> ReadableSpan:
        """Run one job to its end; return its span."""
        self.put(value or job("j"), trace)
        await self.start()
        await until(lambda: any(event["type"] == "usage" for event in self.events()))
        await until(self.spans)
        return self.spans(SpanKind.CONSUMER)[-1]

    def put(self, value: bytes, trace: str | None = SAMPLED) -> None:
        headers = () if trace is None else (("traceparent", trace.encode()), ("tracestate", b"a=1"))
        self.source.put(JOBS, value, headers=headers)

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

    def spans(self, kind: SpanKind = SpanKind.CONSUMER) -> list[ReadableSpan]:
        """Finished spans, as they ended."""
        return [span for span in self.exporter.get_finished_spans() if span.kind is kind]

    def tries(self, *names: str) -> list[tuple[Any, ...]]:
        """These attributes of the client spans, by the last part of their names."""
        return [tuple(attributes(span).get(name) for name in names) for span in self.spans(SpanKind.CLIENT)]

    def records(self) -> list[ProducerRecord]:
        return [record for record in self.broker.records() if record.topic_partition.topic == "events"]

    def events(self) -> list[dict[str, Any]]:
        return [read(record) for record in self.records()]

    def calls(self, name: str = "a") -> list[dict[str, str]]:
        return [call.headers for call in self.upstreams[name].calls]


@pytest.fixture
async def make(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Any]:
    benches: list[Bench] = []

    def make(**scripts: Any) -> Bench:
        benches.append(Bench(**scripts))
        return benches[-1]

    yield make
    for bench in benches:
        await bench.stop()
    # A span that is ended twice, or gets a value that it cannot hold.
    assert [record for record in caplog.get_records("call") if record.name.startswith("opentelemetry")] == []


def attributes(span: ReadableSpan) -> Mapping[str, Any]:
    assert span.attributes is not None
    return span.attributes


def traceparent(span: ReadableSpan) -> str:
    return f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-{span.context.trace_flags:02x}"


def parent_id(span: ReadableSpan) -> str | None:
    return None if span.parent is None else f"{span.parent.span_id:016x}"


async def test_traced_job_is_a_span_with_one_child_for_its_call(make: Any) -> None:
    """Names, kinds and attributes follow OpenTelemetry; times are the job's."""
    bench: Bench = make(a=[[2.0, word("one"), 3.0, word("two"), FINISH + REPORT + DONE]])
    job_span = await bench.play()
    [call] = bench.spans(SpanKind.CLIENT)
    attempt = bench.events()[-1]["attempt"]

    assert (job_span.name, call.name) == ("process jobs", "chat m")
    assert attributes(job_span) == {
        "messaging.system": "kafka",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "jobs",
        "messaging.destination.partition.id": "0",
        "messaging.kafka.offset": 0,
        "messaging.consumer.group.name": "group",
        "streamworker.job.id": "j",
        "streamworker.job.deliveries": 1,
        "streamworker.job.status": "completed",
        "streamworker.job.tries": 1,
        "streamworker.upstream": "a",
        "streamworker.attempt.id": attempt,
        "streamworker.usage.source": "upstream",
        "streamworker.usage.input_tokens": 3,
        "streamworker.usage.output_tokens": 9,
    }
    assert attributes(call) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "m",
        "gen_ai.request.stream": True,
        "gen_ai.response.id": "c",
        "gen_ai.response.model": "m",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": pytest.approx(2.0, abs=0.01),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 9,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.usage.reasoning.output_tokens": 4,
        "server.address": "llm.example",
        "server.port": 443,
        "streamworker.job.id": "j",
        "streamworker.upstream": "a",
        "streamworker.attempt.id": attempt,
        "streamworker.attempt.number": 1,
        "streamworker.try.number": 1,
        "streamworker.try.outcome": "completed",
    }
    assert [event.name for event in call.events] == ["first_delta"]
    assert call.start_time is not None
    assert call.end_time is not None
    assert (call.end_time - call.start_time) / 1e9 == pytest.approx(5.0, abs=0.01)
    assert {job_span.status.status_code, call.status.status_code} == {StatusCode.UNSET}


async def test_traced_job_propagates_its_context(make: Any) -> None:
    """From the record to the job's span and its events; to the call's span and the upstream."""
    bench: Bench = make(a=[said("a")])
    job_span = await bench.play()
    [call] = bench.spans(SpanKind.CLIENT)

    assert parent_id(job_span) == PARENT
    assert parent_id(call) == f"{job_span.context.span_id:016x}"
    assert {span.context.trace_id for span in (job_span, call)} == {int(TRACE_ID, 16)}
    carried = {"traceparent": traceparent(job_span).encode(), "tracestate": b"a=1"}
    assert [dict(record.headers).items() & carried.items() for record in bench.records()] == [
        carried.items(),
        carried.items(),
    ]
    assert bench.calls() == [{"traceparent": traceparent(call), "tracestate": "a=1"}]


@pytest.mark.parametrize("trace", [None, "00-nonsense", f"00-{'0' * 32}-{PARENT}-01"])
async def test_traced_job_without_a_trace_begins_one(make: Any, trace: str | None) -> None:
    """An invalid header is ignored, as the specification demands."""
    bench: Bench = make(a=[said("a")])
    job_span = await bench.play(trace=trace)

    assert job_span.parent is None
    assert dict(bench.records()[0].headers)["traceparent"] == traceparent(job_span).encode()


async def test_trace_that_its_sender_does_not_sample_is_not_sampled_here(make: Any) -> None:
    """No span is exported, and the upstream gets the same flag."""
    bench: Bench = make(a=[said("a")])
    bench.put(job("j"), UNSAMPLED)
    await bench.start()
    await until(lambda: len(bench.records()) == 2)

    assert bench.exporter.get_finished_spans() == ()
    [headers] = bench.calls()
    assert headers["traceparent"].startswith(f"00-{TRACE_ID}-")
    assert headers["traceparent"].endswith("-00")
    carried = [dict(record.headers)["traceparent"] for record in bench.records()]
    assert [(value or b"").endswith(b"-00") for value in carried] == [True, True]


async def test_trace_shows_each_try(make: Any) -> None:
    """The first one has its error and is marked as retried; the job itself completed."""
    bench: Bench = make(a=[REFUSED, said("a")], max_tries=2)
    job_span = await bench.play()
    names = ("try.number", "attempt.number", "try.outcome")

    assert bench.tries(*(f"streamworker.{name}" for name in names)) == [
        (1, 1, "retried"),
        (2, 1, "completed"),
    ]
    assert bench.tries("error.type", "http.response.status_code") == [
        ("upstream_unavailable", 503),
        (None, None),
    ]
    statuses = [span.status.status_code for span in bench.spans(SpanKind.CLIENT)]
    assert statuses == [StatusCode.ERROR, StatusCode.UNSET]
    assert (attributes(job_span)["streamworker.job.tries"], job_span.status.status_code) == (
        2,
        StatusCode.UNSET,
    )
    assert [headers["traceparent"] for headers in bench.calls()] == [
        traceparent(span) for span in bench.spans(SpanKind.CLIENT)
    ]


async def test_trace_shows_the_fallback(make: Any) -> None:
    """The fallback is another attempt."""
    bench: Bench = make(a=[REFUSED], b=[said("b")])
    await bench.play()
    names = ("upstream", "attempt.number", "try.number", "try.outcome")

    assert bench.tries(*(f"streamworker.{name}" for name in names)) == [
        ("a", 1, 1, "failed"),
        ("b", 2, 2, "completed"),
    ]


async def test_trace_shows_the_restart_of_a_broken_stream(make: Any) -> None:
    """The usage of half an answer is an estimate, which is not put into `gen_ai` attributes."""
    bench: Bench = make(a=[[word("half"), BROKEN], said("all")])
    await bench.play(job("j", on_break="restart"))

    assert bench.tries("streamworker.attempt.number", "streamworker.try.outcome", "error.type") == [
        (1, "interrupted", "upstream_unavailable"),
        (2, "completed", None),
    ]


async def test_trace_distinguishes_an_estimate_from_a_report(make: Any) -> None:
    """`gen_ai.usage` is the upstream's report; an estimate is marked."""
    bench: Bench = make(a=[[word("twelve bytes"), BROKEN]])
    span = await bench.play()

    usage = {name: value for name, value in attributes(span).items() if ".usage." in name}
    assert usage == {"streamworker.usage.source": "estimated", "streamworker.usage.output_tokens": 3}
    assert [name for name in attributes(bench.spans(SpanKind.CLIENT)[0]) if ".usage." in name] == []
    assert (attributes(span)["error.type"], span.status.status_code) == (
        "upstream_unavailable",
        StatusCode.ERROR,
    )


async def test_trace_of_a_cancelled_job_is_not_an_error(make: Any) -> None:
    """The client asked for the cancellation."""
    bench: Bench = make(a=[[word("a"), FOREVER()]])
    bench.put(job("j"))
    await bench.start()
    await until(lambda: bench.sink.records)
    bench.worker.cancel("j", 1 << 62, "enough")
    await until(bench.spans)
    [span], [call] = bench.spans(), bench.spans(SpanKind.CLIENT)

    assert attributes(span)["streamworker.job.status"] == "cancelled"
    assert attributes(call)["streamworker.try.outcome"] == "cancelled"
    assert {attributes(one)["error.type"] for one in (span, call)} == {"cancelled"}
    assert {one.status.status_code for one in (span, call)} == {StatusCode.UNSET}


async def test_trace_of_a_job_that_expires_while_it_waits_has_no_call(make: Any) -> None:
    """The job's span covers the wait."""
    bench: Bench = make(a=[said("never")])
    span = await bench.play(job("j", deadline="2001-01-01T00:00:00Z"))

    assert bench.spans(SpanKind.CLIENT) == []
    assert (attributes(span)["streamworker.job.status"], attributes(span)["error.type"]) == (
        "expired",
        "deadline",
    )


async def test_trace_of_a_lost_partition_has_the_reason(make: Any) -> None:
    """It is not an error: the next owner runs the job."""
    bench: Bench = make(a=[[word("a"), FOREVER()]])
    bench.put(job("open"))
    bench.put(job("waiting"))
    await bench.start()
    await until(lambda: bench.sink.records)
    bench.source.assign()
    await until(lambda: len(bench.spans()) == 2)

    abandoned = {
        attributes(span)["streamworker.job.id"]: attributes(span)["streamworker.job.abandoned"]
        for span in bench.spans()
    }
    assert abandoned == {"open": "revoked", "waiting": "revoked"}
    assert bench.tries("streamworker.try.outcome", "error.type") == [("abandoned", None)]
    assert {span.status.status_code for span in bench.spans()} == {StatusCode.UNSET}


async def test_trace_of_a_job_abandoned_before_it_began_ends(make: Any) -> None:
    """A task that is cancelled at once never runs."""
    bench: Bench = make(a=[said("never")])
    await bench.start()
    await until(lambda: bench.source.positions)
    bench.source.delivering.clear()
    bench.put(job("j"))
    await until(lambda: bench.source.positions.get(JOBS) == 1)
    bench.source.delivering.set()
    partition = bench.worker._partitions.get(JOBS)
    assert partition is not None
    await until(lambda: partition.open_jobs, every_s=0)
    [one] = partition._open.values()
    one.task.cancel()
    partition.leaving = "revoked"
    await until(bench.spans)

    assert attributes(bench.spans()[0])["streamworker.job.abandoned"] == "revoked"


async def test_trace_of_a_drain_has_the_reason_of_each_returned_job(make: Any) -> None:
    """Waiting jobs are returned at once, open streams at the timeout."""
    bench: Bench = make(a=[[word("a"), FOREVER()]], drain_timeout_s=5)
    bench.put(job("open"))
    bench.put(job("waiting"))
    await bench.start()
    await until(lambda: bench.sink.records)
    bench.worker.drain()
    assert bench.task is not None
    await bench.task

    assert [attributes(span)["streamworker.job.abandoned"] for span in bench.spans()] == [
        "drain",
        "drain_timeout",
    ]


async def test_trace_of_a_rejected_record_is_that_of_its_terminal_event(make: Any) -> None:
    """The submitter finds the fault in its own trace."""
    bench: Bench = make(a=[said("never")])
    span = await bench.play(b'{"job_id":"j"}')

    assert (attributes(span)["streamworker.job.status"], attributes(span)["error.type"]) == (
        "rejected",
        "invalid_job",
    )
    assert (span.status.status_code, parent_id(span)) == (StatusCode.ERROR, PARENT)
    assert dict(bench.records()[0].headers)["traceparent"] == traceparent(span).encode()


async def test_trace_shows_crashes_and_the_dead_letter(make: Any) -> None:
    """Each delivery has a span."""
    bench: Bench = make(a=[[ValueError("a bug")]])
    bench.put(job("j"))
    with capture_logs():
        await bench.start()
        await until(lambda: len(bench.spans()) == 3)
    names = ("job.deliveries", "job.abandoned", "job.status")

    assert [
        tuple(attributes(span).get(f"streamworker.{name}") for name in names) for span in bench.spans()
    ] == [(1, "crashed", None), (2, "crashed", None), (3, None, "failed")]
    assert [attributes(span)["error.type"] for span in bench.spans()] == [
        "crashed",
        "crashed",
        "max_deliveries",
    ]
    assert {span.status.status_code for span in bench.spans()} == {StatusCode.ERROR}


async def test_trace_of_a_job_that_crashed_and_is_then_abandoned_has_both_ends(make: Any) -> None:
    """The second delivery runs inside the first one's task."""
    bench: Bench = make(a=[[ValueError("a bug")], [word("a"), FOREVER()]])
    bench.put(job("j"))
    with capture_logs():
        await bench.start()
        await until(lambda: bench.sink.records)
    bench.source.assign()
    await until(lambda: len(bench.spans()) == 2)

    assert [attributes(span)["streamworker.job.abandoned"] for span in bench.spans()] == [
        "crashed",
        "revoked",
    ]


async def test_trace_of_a_rejected_record_whose_partition_is_lost_has_the_reason(make: Any) -> None:
    """It is unknown whether the commit in progress and the entries behind it are written."""
    bench: Bench = make(a=[said("never")])
    await bench.start()
    await until(lambda: bench.source.positions)
    bench.broker.committing.clear()
    bench.put(b"nonsense")
    await until(lambda: bench.broker.under_way)
    bench.put(b"more nonsense")
    await until(lambda: bench.source.positions.get(JOBS) == 2)
    bench.source.assign()
    await until(lambda: len(bench.spans()) == 2)
    bench.broker.committing.set()

    assert [attributes(span)["streamworker.job.abandoned"] for span in bench.spans()] == ["revoked"] * 2


async def test_traces_hold_neither_prompts_nor_answers_nor_upstream_texts(make: Any) -> None:
    """Values from outside are bounded too."""
    long = "x" * 5000
    strange = chunk({"content": "the answer"}, long, id=long + "\ud800", model=7)
    prompt = {"model": long, "messages": [{"role": "user", "content": "the prompt"}]}
    bench: Bench = make(
        a=[
            Script([], before=[ABSURD]),
            [data(json.dumps(strange).encode()), data({"usage": {"prompt_tokens": 1 << 70}}), DONE],
        ],
        max_tries=2,
    )
    await bench.play(job("j", request=prompt, metadata={"tenant": "the prompt"}))

    spans = bench.exporter.get_finished_spans()
    told = " ".join(span.to_json() for span in spans)
    assert [word for word in ("the prompt", "the answer", "busy") if word in told] == []
    assert max(len(str(value)) for span in spans for value in attributes(span).values()) <= 200
    assert max(len(span.name) for span in spans) <= 205
    assert "gen_ai.usage.input_tokens" not in attributes(bench.spans(SpanKind.CLIENT)[1])
    # What cannot be encoded, a lone surrogate or a number beyond 63 bits, costs a whole batch.
    assert len(encode_spans(spans).SerializeToString()) > 1000
