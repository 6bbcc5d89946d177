"""The engine before it needs Kafka: validation, earlier output, refusals; and the ledger."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from streamworker.batch.engine import Engine
from streamworker.batch.errors import BatchError, InvalidInput, RunRefused
from streamworker.batch.files import LocalInput, LocalOutput, LocalRunStore
from streamworker.batch.identity import JobIds, JobRef, digest_of, output_id
from streamworker.batch.index import LineIndex, State
from streamworker.batch.jobs import JobWriter
from streamworker.batch.ledger import Ledger
from streamworker.batch.lines import Request
from streamworker.batch.options import BatchOptions
from streamworker.batch.output import EndedJob
from streamworker.batch.plan import NotABatchLine, Verdict, judge, read_prior
from streamworker.batch.record import InputFacts, RunRecord
from streamworker.config import Settings
from streamworker.model import ConsumerRecord, Coordinates, Job
from streamworker.wire.job import read_job

if TYPE_CHECKING:
    from pathlib import Path


def request(custom_id: str, text: str = "Hi", **members: Any) -> dict[str, Any]:
    return {
        "custom_id": custom_id,
        "body": {"model": "m", "messages": [{"role": "user", "content": text}], **members},
    }


def done(line: dict[str, Any], *, code: str | None = None, retriable: bool = False) -> dict[str, Any]:
    """Return the output line, or with a code the error line, of a line."""
    line_id = output_id(digest_of(line["custom_id"], line["body"]))
    if code is not None:
        error = {"code": code, "message": "m", "retriable": retriable}
        return {
            "id": line_id,
            "custom_id": line["custom_id"],
            "response": None,
            "error": error,
            "usage_source": "none",
        }
    body = {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}
    return {
        "id": line_id,
        "custom_id": line["custom_id"],
        "response": {"status_code": 200, "body": body},
        "error": None,
    }


class Case:
    """Files in a directory, and engines over them. No broker answers at the configured address."""

    def __init__(self, directory: Path) -> None:
        self.input, self.output, self.errors = (
            directory / name for name in ("i.jsonl", "o.jsonl", "e.jsonl")
        )
        self.store = LocalRunStore(directory / "o.jsonl.run.json")
        self.notes: list[str] = []

    def write(self, path: Path, lines: list[Any]) -> None:
        path.write_text(
            "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        )

    async def run(self, method: str = "prepare", **options: Any) -> Engine:
        output = LocalOutput(self.output, self.errors)
        output.lock()
        source = LocalInput.open(self.input)
        settings = Settings(worker={"max_job_bytes": 2000}, kafka={"bootstrap_servers": "127.0.0.1:1"})
        engine = Engine(
            settings,
            BatchOptions(topic="jobs", **options),
            source,
            output,
            self.store,
            note=self.notes.append,
        )
        try:
            await getattr(engine, method)()
        finally:
            source.close()
            await output.close()
        return engine


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


async def test_input_with_faults_is_refused_with_all_of_them(case: Case) -> None:
    """The first twenty are named, with their lines and codes."""
    case.write(case.input, [request("a"), "{", request("a"), request("big", "x" * 3000), *["["] * 30])
    with pytest.raises(InvalidInput) as caught:
        await case.run()
    text = str(caught.value)

    assert caught.value.exit_code == 2
    assert "33 lines are not valid; nothing was sent" in text
    assert "line 2: invalid_json_line" in text
    assert "line 3: duplicate_custom_id: custom_id is that of line 1" in text
    assert "line 4: too_large: its job would have 3" in text
    assert "and 13 more" in text
    assert "--skip-invalid" in text


async def test_input_without_lines_is_refused(case: Case) -> None:
    """An empty file is a mistake of the program that wrote it."""
    case.write(case.input, ["", "  "])
    with pytest.raises(InvalidInput, match="has no line"):
        await case.run()


async def test_input_of_faulty_lines_only_needs_no_broker(case: Case) -> None:
    """With `--skip-invalid` they are written at once, each with its reason; again they are not written twice."""
    case.write(case.input, ["{", "{", request("a") | {"method": "PUT"}, request("b", "x" * 3000)])
    await case.run("run", skips_invalid=True)
    errors = [json.loads(line) for line in case.errors.read_text().splitlines()]

    assert [error["error"]["code"] for error in errors] == [
        "invalid_json_line",
        "invalid_json_line",
        "invalid_method",
        "too_large",
    ]
    assert [error.get("line") for error in errors] == [1, 2, None, None]
    assert len({error["id"] for error in errors}) == 4
    await case.run("run", skips_invalid=True)
    assert len(case.errors.read_text().splitlines()) == 4


async def test_limit_takes_the_first_lines(case: Case) -> None:
    """Later faults do not matter."""
    case.write(case.input, [request("a"), "", request("b"), "{"])
    engine = await case.run(limit=2)

    assert (engine.lines, engine.counts()[State.PENDING], dict(engine.models)) == (2, 2, {"m": 2})


async def test_earlier_output_ends_its_lines(case: Case) -> None:
    """Whatever the order, and with their tokens."""
    lines = [request(name) for name in "abc"]
    case.write(case.input, lines)
    case.write(case.output, [done(lines[2]), done(lines[0])])
    case.write(case.errors, [done(lines[1], code="timeout_idle", retriable=True)])
    engine = await case.run("run")

    assert (engine.counts()[State.COMPLETED], engine.counts()[State.FAILED]) == (2, 1)
    assert (engine.accounts.tokens.total, engine.accounts.codes) == (14, {"timeout_idle": 1})


async def test_finished_output_is_not_touched(case: Case) -> None:
    """Its time of change stays."""
    case.write(case.input, [request("a")])
    case.write(case.output, [done(request("a"))])
    before = case.output.stat()
    await case.run("run")

    assert case.output.stat().st_mtime_ns == before.st_mtime_ns
    assert case.output.stat().st_ino == before.st_ino


async def test_whole_parts_are_renamed_without_a_broker(case: Case) -> None:
    """After a crash between the last line and the names."""
    case.write(case.input, [request("a"), request("b")])
    case.write(case.output.with_name("o.jsonl.part"), [done(request("a"))])
    case.write(case.errors, [done(request("b"), code="x")])
    await case.run("run")

    assert case.output.exists()
    assert sorted(path.name for path in case.input.parent.iterdir()) == ["e.jsonl", "i.jsonl", "o.jsonl"]


async def test_line_in_both_files_stays_in_the_output(case: Case) -> None:
    """And is removed from the errors."""
    case.write(case.input, [request("a"), request("b")])
    case.write(case.output, [done(request("a")), done(request("b")), done(request("b"))])
    case.write(case.errors, [done(request("a"), code="x")])
    await case.run("run")

    assert [json.loads(line)["custom_id"] for line in case.output.read_text().splitlines()] == ["a", "b"]
    assert not case.errors.exists()


@pytest.mark.parametrize(("changed", "pending"), [("fail", None), ("keep", 0), ("rerun", 1)])
async def test_edited_line_is_refused_kept_or_run(case: Case, changed: Any, pending: int | None) -> None:
    """The digest of the body decides, not the position."""
    case.write(case.input, [request("b"), request("a", "edited")])
    case.write(case.output, [done(request("a")), done(request("b"))])
    if pending is None:
        with pytest.raises(
            InvalidInput, match=r"(?s)1 line is done, and edited since \(line 2\).*--changed rerun"
        ):
            await case.run(changed=changed)
        return
    engine = await case.run(changed=changed)

    assert engine.counts()[State.PENDING] == pending


async def test_edited_line_that_had_failed_runs(case: Case) -> None:
    """It is not done, so there is nothing to decide."""
    case.write(case.input, [request("a", "corrected")])
    case.write(case.errors, [done(request("a"), code="upstream_rejected")])

    assert (await case.run()).counts()[State.PENDING] == 1


async def test_lines_of_another_program_count_by_custom_id(case: Case) -> None:
    """An expired OpenAI batch is completed here: its expired lines are run again on request."""
    case.write(case.input, [request(name) for name in "abc"])
    body = {"usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    case.write(
        case.output,
        [
            {
                "id": "batch_req_1",
                "custom_id": "a",
                "response": {"status_code": 200, "request_id": "r", "body": body},
                "error": None,
            }
        ],
    )
    case.write(
        case.errors,
        [
            {
                "id": "batch_req_2",
                "custom_id": "b",
                "response": None,
                "error": {"code": "batch_expired", "message": "m"},
            }
        ],
    )
    engine = await case.run()
    assert [engine.counts()[state] for state in (State.PENDING, State.COMPLETED, State.FAILED)] == [1, 1, 1]

    engine = await case.run(retry_failed="retriable")
    assert engine.counts()[State.PENDING] == 2


async def test_lines_that_the_input_does_not_have_are_kept_and_named(case: Case) -> None:
    """A file may be cut, or merged with another one."""
    case.write(case.input, [request("a")])
    case.write(case.output, [done(request("a")), done(request("z"))])
    await case.run("run")

    assert len(case.output.read_text().splitlines()) == 2
    assert case.notes == [f"1 line is in the output and not in {case.input}; nothing is removed"]


@pytest.mark.parametrize(("retry", "pending"), [(None, 0), ("retriable", 1), ("all", 2)])
async def test_failed_lines_are_selected_to_run_again(case: Case, retry: Any, pending: int) -> None:
    """The retriable ones, or all."""
    case.write(case.input, [request("a"), request("b"), request("c")])
    case.write(case.output, [done(request("c"))])
    case.write(case.errors, [done(request("a"), code="x"), done(request("b"), code="y", retriable=True)])
    engine = await case.run(retry_failed=retry)

    assert engine.counts()[State.PENDING] == pending
    assert engine.accounts.failed == 2 - pending


async def test_output_of_another_run_is_refused(case: Case) -> None:
    """`--batch-id` must be that of the unfinished run."""
    case.write(case.input, [request("a")])
    facts = InputFacts(path="i", bytes=1, sha256="x")
    await case.store.save(RunRecord(run="night", created=1, input=facts, topics={}, start={}))
    with pytest.raises(RunRefused, match="belongs to the run night, not to day"):
        await case.run(run="day")
    assert (await case.run()).run_name == "night"
    assert (await case.run(run="day", overwrites=True)).run_name == "day"


async def test_unfinished_round_without_its_record_is_refused(case: Case) -> None:
    """Its lines would be submitted again under ids that may be in use."""
    case.write(case.input, [request("a")])
    case.write(case.errors.with_name("e.jsonl.retried"), [done(request("a"), code="x")])
    with pytest.raises(RunRefused, match="round of --retry-failed is unfinished"):
        await case.run()


async def test_overwrite_ignores_earlier_output(case: Case) -> None:
    """Nothing is deleted before the brokers answer."""
    case.write(case.input, [request("a")])
    case.write(case.output, ["other lines"])
    assert (await case.run(overwrites=True)).counts()[State.PENDING] == 1
    with pytest.raises(Exception, match=r"127\.0\.0\.1:1"):
        await case.run("run", overwrites=True, timeout_s=3)
    assert case.output.exists()


def test_errors_of_a_batch_say_what_the_caller_can_do() -> None:
    """2: nothing was sent; 3: run it again."""
    codes = {kind.__name__: kind.exit_code for kind in BatchError.__subclasses__()}

    assert codes == {"InvalidInput": 2, "RunRefused": 2, "OutputBusy": 2, "OutputError": 3, "RunStopped": 3}


# Earlier lines


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"1",
        b"{}",
        b'{"id":1}',
        b'{"custom_id":1,"id":2}',
        b"\xff",
        b'{"id":"x","custom_id":"a","response":5}',
    ],
)
def test_text_that_is_not_an_output_line_is_refused(text: bytes) -> None:
    """By an exception of its own."""
    with pytest.raises(NotABatchLine):
        read_prior(text)


@pytest.mark.parametrize(
    ("line", "is_error", "retriable"),
    [
        ({"response": {"status_code": 200}, "error": None}, False, False),
        ({"response": {"status_code": 200}}, False, False),
        ({"response": {"status_code": 429, "body": {"error": {}}}, "error": None}, True, True),
        ({"response": {"status_code": 400}, "error": None}, True, False),
        ({"response": {"status_code": 503}, "error": {"code": "x"}}, True, True),
        ({"response": None, "error": {"code": "batch_expired"}}, True, True),
        ({"response": None, "error": {"code": "x", "retriable": True}}, True, True),
        ({"response": None, "error": "text"}, True, False),
        ({"response": None, "error": None}, True, False),
        ({"response": {}, "error": {"code": 5}}, True, False),
    ],
)
def test_earlier_line_is_output_or_error(line: dict[str, Any], is_error: bool, retriable: bool) -> None:
    """Also those of other programs, which do not say what is retriable."""
    prior = read_prior(json.dumps({"id": "x", "custom_id": "c"} | line).encode())

    assert (prior.is_error, prior.retriable, prior.custom_id, prior.digest) == (
        is_error,
        retriable,
        "c",
        None,
    )


def test_earlier_line_belongs_to_its_content_first() -> None:
    """A digest that the input has is done, whatever its custom id; else the custom id decides."""
    index = LineIndex()
    one, two = (digest_of(name, {}) for name in "ab")
    index.add(one, "a", (1, 0, 1))

    def verdict(line_id: str, custom_id: str | None) -> tuple[Verdict, int]:
        return judge(read_prior(json.dumps({"id": line_id, "custom_id": custom_id}).encode()), index)

    assert verdict(output_id(one), None) == (Verdict.DONE, 0)
    assert verdict(output_id(two), "a") == (Verdict.CHANGED, 0)
    assert verdict("other", "a") == (Verdict.DONE, 0)
    assert verdict(output_id(two), "z") == (Verdict.ABSENT, -1)
    assert verdict("other", None) == (Verdict.ABSENT, -1)


# Jobs


def test_job_of_a_line_is_a_valid_job() -> None:
    """Key is the job id; the body is passed on byte for byte; metadata has the names of run and line."""
    ids = JobIds("b.r.")
    writer = JobWriter(
        ids,
        "r",
        metadata={"team": "blue"},
        on_break="restart",
        upstream="u",
        expires_ms=1_900_000_000_123,
        merges_deltas=True,
    )
    body = b'{"messages":[1],"model":"m" , "seed":12345678901234567890123}'
    key, value = writer.write(Request('c"\u2028', "m", body, bytes(16)), 2)
    job = read_job(ConsumerRecord(Coordinates("t", 0, 0), 0, key, value))

    assert isinstance(job, Job)
    assert key.decode() == job.job_id == f"b.r.{'0' * 32}.2"
    assert job.metadata == {"team": "blue", "batch_id": "r", "custom_id": 'c"\u2028'}
    assert (job.on_break, job.upstream, job.deltas, job.deadline) == (
        "restart",
        "u",
        "merged",
        1_900_000_000.123,
    )
    assert bytes(job.request["seed"]) == b"12345678901234567890123"


# The ledger


class Written:
    """The part of an output that a ledger uses."""

    def __init__(self) -> None:
        self.lines: list[tuple[dict[str, Any], bool]] = []

    def write(self, line: bytes, *, is_error: bool) -> None:
        self.lines.append((json.loads(line), is_error))


def ledger_of(count: int) -> tuple[Ledger, Written]:
    index = LineIndex()
    for number in range(count):
        index.add(bytes([number]) * 16, f"c{number}", (number + 1, 0, 1))
    written = Written()
    return Ledger(index, written, lambda: 1.0), written  # type: ignore[arg-type]  # only `write` is used


def ended(status: str = "completed", code: str = "auth") -> EndedJob:
    error = None if status == "completed" else {"code": code, "message": "no key", "retriable": False}
    completion = msgspec.Raw(b'{"choices":[]}' if status == "completed" else b"null")
    return EndedJob(
        job_id="j", attempt="a", status=status, usage_source="none", error=error, completion=completion
    )


def test_ledger_ends_each_line_once() -> None:
    """The same ending again, or that of another round, has no line."""
    ledger, written = ledger_of(2)
    ref = JobRef(bytes(16), 0)
    ledger.begin([0])
    assert (ledger.line_of(ref), ledger.submitted, ledger.oldest()) == (0, 1, (0, 1.0))
    assert ledger.line_of(JobRef(bytes(16), 1)) is None
    assert ledger.line_of(JobRef(b"x" * 16, 0)) is None
    ledger.end(0, "c0", ended())

    assert ledger.line_of(ref) is None
    assert (ledger.submitted, ledger.oldest(), ledger.is_complete) == (0, None, False)
    ledger.fail(1, "c1", "batch_expired", "late")
    assert ledger.is_complete
    assert [(line["custom_id"], is_error) for line, is_error in written.lines] == [
        ("c0", False),
        ("c1", True),
    ]


def test_ledger_reverts_a_line_that_was_not_submitted() -> None:
    """It is pending again."""
    ledger, _ = ledger_of(1)
    ledger.begin([0])
    ledger.revert(0)

    assert (ledger.submitted, ledger.oldest(), ledger.index.counts[State.PENDING]) == (0, None, 1)


def test_ledger_names_the_oldest_line_in_flight() -> None:
    """By its custom id once it is known, by its number before."""
    index, now = LineIndex(), [0.0]
    for number in range(5):
        index.add(bytes([number]) * 16, f"c{number}", (number + 10, 0, 1))
    ledger = Ledger(index, Written(), lambda: now[0])  # type: ignore[arg-type]  # only `write` is used
    ledger.begin([0, 1])
    now[0] = 50.0
    ledger.begin([2, 3])
    ledger.end(0, "c0", ended())
    assert ledger.oldest() == (1, 0.0)
    now[0] = 120.0
    assert ledger.snapshot().oldest == ("line 11", 120.0)
    ledger.name_oldest(1, "c1")
    assert ledger.snapshot().oldest == ("c1", 120.0)
    ledger.end(1, "c1", ended())
    assert ledger.oldest() == (2, 50.0)
    assert ledger.snapshot().oldest is None


def test_ledger_counts_refusals_in_a_row() -> None:
    """A success, or another failure, begins anew."""
    ledger, _ = ledger_of(6)
    ledger.end(0, "c", ended("failed"))
    ledger.end(1, "c", ended("failed", "quota"))
    assert (ledger.refusals, ledger.failed_here, ledger.last_refusal) == (2, 2, "quota: no key")
    ledger.end(2, "c", ended())
    assert ledger.refusals == 0
    ledger.end(3, "c", ended("failed"))
    ledger.end(4, "c", ended("failed", "timeout_idle"))
    assert (ledger.refusals, ledger.failed_here) == (0, 4)


@pytest.mark.parametrize(
    ("is_expired", "status", "code"),
    [
        (False, "cancelled", "batch_cancelled"),
        (True, "cancelled", "batch_expired"),
        (True, "expired", "batch_expired"),
        (False, "expired", "batch_expired"),
        (True, "failed", "quota"),
    ],
)
def test_ledger_names_the_end_of_a_batch(status: str, code: str, *, is_expired: bool) -> None:
    """A job that an expired run has cancelled has expired."""
    ledger, written = ledger_of(1)
    assert not ledger.is_dirty
    ledger.is_expired = is_expired
    ledger.end(0, "c", ended(status, "quota"))

    assert written.lines[0][0]["error"]["code"] == code
    assert (ledger.accounts.codes, ledger.accounts.failed, ledger.is_dirty) == ({code: 1}, 1, True)


def test_ledger_counts_tokens_of_lines_that_ran() -> None:
    """Rates are of tokens that were generated: a refused line adds none."""
    now = [0.0]
    index = LineIndex()
    for number in range(3):
        index.add(bytes([number]) * 16, f"c{number}", (number, 0, 1))
    ledger = Ledger(index, Written(), lambda: now[0])  # type: ignore[arg-type]  # only `write` is used
    now[0] = 10.0
    ledger.refuse(0, b"{}", "invalid_url")
    ledger.fail(1, "c1", "batch_expired", "late")
    assert (ledger.snapshot().tokens_per_s, ledger.since_ending()) == (0.0, 0.0)
    job = ended()
    job.usage = {"prompt_tokens": 20, "completion_tokens": 30}
    ledger.end(2, "c2", job)

    assert ledger.snapshot().tokens_per_s == pytest.approx(5.0)
    assert ledger.snapshot().lines_per_s == pytest.approx(0.3)
