"""Result records: what an attempt writes to the results topic with its terminal event."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from streamworker.errors import UpstreamError
from streamworker.model import ConsumerRecord, Coordinates, ErrorCode, JobError, TopicPartition
from streamworker.stream.completion import CompletionAssembler
from streamworker.testing import MemoryClock, MemoryCommitStores, MemoryObserver, MemorySink, MemoryUpstream
from streamworker.wire.event import EventWriter
from streamworker.wire.result import ResultWriter
from streamworker.worker.committer import PartitionCommitter
from streamworker.worker.intake import Intake, IntakeRules, Refused
from streamworker.worker.results import Results
from tests.streams import NOW, chunk, data, make_job
from tests.turnable import quiet
from tests.unit.worker.bench import (
    DONE,
    FINISH,
    JOBS,
    OneAttempt,
    events,
    job,
    make_policies,
    make_policy,
    make_queues,
    make_tools,
    read,
    said,
    word,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from streamworker.model import Deltas, ProducerRecord

TO = TopicPartition("events", 2)


class Bench:
    """Attempts with a results topic; `assembled` is what a reader of the events makes of them."""

    def __init__(self) -> None:
        self.broker = MemoryCommitStores()
        self.sink = MemorySink()
        self.observer = MemoryObserver()
        self.committer = PartitionCommitter(
            JOBS, self.broker.store(JOBS), commit_id="me", lost=lambda _: None
        )
        self.committing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        await self.committer.open()
        self.committer.progress.begin(7)
        self.committing = asyncio.create_task(self.committer.run())

    async def close(self) -> None:
        assert self.committing is not None
        self.committing.cancel()
        await asyncio.gather(self.committing, return_exceptions=True)
        await self.committer.close()

    def attempt(
        self, *scripts: Any, limit_bytes: int = 100_000, deltas: Deltas = "live", **tools: Any
    ) -> OneAttempt:
        results = Results(self.sink, ResultWriter(), self.observer, topic="results", limit_bytes=limit_bytes)
        queues = make_queues(self.observer, {"default": make_policy(MemoryUpstream(*scripts), max_tries=2)})
        made = make_tools(self.sink, MemoryClock(NOW), self.observer, queues, results=results, **tools)
        source = make_job(source=Coordinates("jobs", 0, 7), deltas=deltas)
        return OneAttempt(made, source, self.committer, to=TO, upstream="default")

    async def play(self, script: Any, **options: Any) -> dict[str, Any]:
        """Run a job to its end; return its result."""
        await self.attempt(script, **options).play()
        return self.result()

    def result(self) -> dict[str, Any]:
        """Return the only result; it is in the commit of the terminal event, with equal members."""
        *_, terminal, result = map(read, self.broker.commits[-1].records)
        assert [event["type"] for event in events(self.broker.records())].count("result") == 1
        added = ("type", "model", "upstream", "source", "events", "completion", "omitted")
        assert {name: result[name] for name in terminal if name != "type"} == {
            name: value for name, value in terminal.items() if name != "type"
        }
        assert result.keys() - terminal.keys() == {*added} - {"type"}
        return result

    def assembled(self) -> Any:
        started, *_ = self.broker.records()
        terminal = self.broker.commits[-1].records[-2]
        assembler = CompletionAssembler(limit_bytes=1_000_000)
        for event in events([started, *self.sink.records, terminal]):
            assembler.read(event)
        return assembler.completion()


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    await bench.open()
    yield bench
    await bench.close()


async def test_result_of_a_completed_job_has_what_a_reader_assembles(bench: Bench) -> None:
    """With the coordinates of the job and of `started`, and the headers of a result."""
    words = ["Hello ", "world", *(f', "{number}"' for number in range(20))]
    result = await bench.play(said(*words))

    assert result["completion"] == bench.assembled()
    assert result["completion"]["choices"][0]["message"]["content"] == "".join(words)
    assert (result["status"], result["omitted"], result["model"]) == ("completed", [], "m")
    assert result["upstream"] == "default"
    assert result["source"] == {"topic": "jobs", "partition": 0, "offset": 7}
    assert result["events"] == {"topic": "events", "partition": 2, "offset": 0}
    record = bench.broker.records()[-1]
    assert record.topic_partition == bench.sink.partition_for("results", record.key or b"")
    assert dict(record.headers) == {
        "content-type": b"application/json",
        "streamworker-type": b"result",
        "streamworker-status": b"completed",
    }


async def test_result_after_retries_has_the_deltas_of_the_attempt_only(bench: Bench) -> None:
    """Members of chunks without choices that a failed try published stay in the attempt, and in its result."""
    without_choices = data({"id": "c", "choices": [], "provider": "p"})
    failed = [without_choices + data({"error": {"message": "busy", "code": 503}})]
    await bench.attempt(failed, said("one")).play()

    result = bench.result()
    assert (result["status"], result["tries"]) == ("completed", 2)
    assert result["completion"] == bench.assembled()


async def test_result_of_a_job_without_a_delta_has_no_completion(bench: Bench) -> None:
    """Nothing was omitted either."""
    refusal = UpstreamError(JobError(ErrorCode.UPSTREAM_REJECTED, "no", 400))
    result = await bench.play([refusal])

    assert (result["status"], result["completion"], result["omitted"]) == ("failed", None, [])


async def test_result_of_a_cancelled_job_has_the_published_text(bench: Bench) -> None:
    """The finish reason is null, because the choice is unfinished."""
    attempt = bench.attempt([word("one"), asyncio.Event()])
    playing = asyncio.create_task(attempt.play())
    await quiet()
    attempt.cancel("enough")
    await playing

    result = bench.result()
    [choice] = result["completion"]["choices"]
    assert (result["status"], choice["message"]["content"]) == ("cancelled", "one")
    assert choice["finish_reason"] is None
    assert result["completion"] == bench.assembled()


async def test_result_has_no_delta_that_was_dropped_for_its_size(bench: Bench) -> None:
    """Readers of the events do not get it."""
    script = [word("one ") + word("x" * 20_000), asyncio.Event()]
    result = await bench.play(script, max_record_bytes=16_384)

    assert result["completion"]["choices"][0]["message"]["content"] == "one "
    assert result["completion"] == bench.assembled()


async def test_result_has_text_that_was_held_to_be_merged(bench: Bench) -> None:
    """Each merged event counts once."""
    result = await bench.play(said("one ", "two ", "three"), coalesce_s=5)

    assert len(bench.sink.records) < 4
    assert result["completion"] == bench.assembled()
    assert result["completion"]["choices"][0]["message"]["content"] == "one two three"


async def test_result_of_a_job_with_merged_deltas_is_the_same(bench: Bench) -> None:
    """The events are fewer, and the completion is whole."""
    result = await bench.play(said("one ", "two ", "three"), deltas="merged")

    assert len(bench.sink.records) == 3
    assert result["completion"] == bench.assembled()
    assert result["completion"]["choices"][0]["message"]["content"] == "one two three"


async def test_result_while_the_sink_has_no_room_has_each_delta_once(bench: Bench) -> None:
    """A delta that waits is added when it is published."""
    bench.sink.keeping_up.clear()
    playing = asyncio.create_task(bench.attempt(said("one ", "two ")).play())
    await quiet()
    bench.sink.keeping_up.set()
    await playing

    assert bench.result()["completion"] == bench.assembled()


async def test_result_over_the_limit_leaves_out_logprobs_then_the_completion(bench: Bench) -> None:
    """The parts are named and counted, and the record is within the limit."""
    logprobs = {"content": [{"token": "x" * 20_000, "logprob": -1.0, "bytes": None, "top_logprobs": []}]}
    with_logprobs = data(
        {"id": "c", "choices": [{"index": 0, "delta": {"content": "one"}, "logprobs": logprobs}]}
    )
    result = await bench.play([with_logprobs, FINISH + DONE], limit_bytes=16_384)

    assert result["omitted"] == ["logprobs"]
    assert result["completion"]["choices"][0]["message"]["content"] == "one"
    assert bench.observer.all("result_part_omitted") == [("logprobs",)]


@pytest.mark.parametrize(("tokens", "omitted"), [(600, []), (800, ["logprobs"])])
async def test_result_with_the_twenty_best_alternatives_has_room_for_600_tokens(
    bench: Bench, tokens: int, omitted: list[str]
) -> None:
    """In a million bytes; of a longer answer the log probabilities are left out, and the text is whole."""
    best = [
        {"token": f" word{n}", "logprob": -12.345678, "bytes": [32, 119, 111, 114, 100]} for n in range(20)
    ]
    logprobs = {"content": [{"token": " word", "logprob": -0.123, "bytes": [32], "top_logprobs": best}]}
    choice = {"index": 0, "delta": {"content": " word"}, "logprobs": logprobs}
    one = data({"id": "c", "choices": [choice]})
    result = await bench.play([one] * tokens + [FINISH + DONE], limit_bytes=1_000_000)

    assert result["omitted"] == omitted
    assert result["completion"]["choices"][0]["message"]["content"] == " word" * tokens
    assert bench.broker.records()[-1].size <= 1_000_000


async def test_result_whose_text_is_over_the_limit_has_no_completion(bench: Bench) -> None:
    """The terminal event's members are still there."""
    result = await bench.play(said(*["x" * 10_000] * 3), limit_bytes=16_384)

    assert (result["status"], result["completion"], result["omitted"]) == ("completed", None, ["completion"])
    assert bench.broker.records()[-1].size <= 16_384
    assert bench.observer.all("result_part_omitted") == [("completion",)]


async def test_result_that_the_broker_refuses_is_written_without_its_completion(bench: Bench) -> None:
    """The topic takes less than the settings say; the terminal event is not affected."""
    bench.broker.max_record_bytes = 16_384
    result = await bench.play(said(*["x" * 10_000] * 3))

    assert (result["status"], result["completion"], result["omitted"]) == ("completed", None, ["completion"])


async def test_result_that_is_over_the_limit_without_its_completion_ends_the_job_too_large(
    bench: Bench,
) -> None:
    """The broker would refuse it forever, and the partition's other commits with it."""
    report = data(chunk({}, "stop", usage={"completion_tokens": 1, "note": "x" * 20_000}))
    result = await bench.play([word("one"), report, DONE], limit_bytes=16_384)

    assert (result["status"], result["error"]["code"], result["usage"]) == ("interrupted", "too_large", None)
    assert bench.broker.records()[-1].size <= 16_384


async def test_result_with_a_lone_surrogate_in_an_error_is_written(bench: Bench) -> None:
    """It becomes U+FFFD, as in the terminal event."""
    error = b'data: {"error": {"message": "half \\ud83d"}}\n\n'
    result = await bench.play([word("one") + error, asyncio.Event()])

    assert result["status"] == "interrupted"
    assert result["completion"]["choices"][0]["message"]["content"] == "one"


def refused(value: bytes, deliveries: int = 1) -> Sequence[ProducerRecord]:
    """Return the records of a job record that is refused, by an intake with results."""
    sink, observer = MemorySink(), MemoryObserver()
    rules = IntakeRules(
        events_topic="events",
        dlq_topic="dlq",
        allowed_reply_to=frozenset(),
        group="group",
        max_job_bytes=1 << 20,
        max_record_bytes=1_000_000,
        max_deliveries=5,
    )
    results = Results(sink, ResultWriter(), observer, topic="results", limit_bytes=100_000)
    intake = Intake(
        rules,
        make_policies("default", models=("m",)),
        sink=sink,
        writer=EventWriter(),
        clock=MemoryClock(),
        results=results,
    )
    decision = intake.take(ConsumerRecord(Coordinates("jobs", 0, 7), 1, b"k", value), deliveries)
    assert isinstance(decision, Refused)
    assert [one.topic_partition.topic for one in decision.fallback] == [
        one.topic_partition.topic for one in decision.records
    ]
    return decision.records


@pytest.mark.parametrize(
    ("value", "deliveries", "status", "model", "upstream"),
    [
        (b"nonsense", 1, "rejected", None, None),
        (job("a", upstream="unknown"), 1, "rejected", "m", None),
        (job("a"), 6, "failed", "m", "default"),
    ],
)
def test_result_of_a_dead_letter_is_written_with_its_terminal_event(
    value: bytes, deliveries: int, status: str, model: str | None, upstream: str | None
) -> None:
    """Whatever the reason, and with equal members."""
    terminal, result = map(read, refused(value, deliveries)[-2:])

    assert (terminal["type"], result["type"], result["status"]) == ("usage", "result", status)
    assert all(result[name] == value for name, value in terminal.items() if name != "type")
    assert (result["model"], result["upstream"]) == (model, upstream)
    assert result["source"] == {"topic": "jobs", "partition": 0, "offset": 7}
    assert (result["events"], result["completion"], result["omitted"]) == (None, None, [])
