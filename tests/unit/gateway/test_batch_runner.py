"""Batches of the gateway from validation to their files, by one owner and by several, over Kafka in memory."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from streamworker.batch import engine as engine_module
from streamworker.batch import open_lines, watch
from streamworker.config import Settings
from streamworker.errors import KafkaUnavailable
from streamworker.gateway.batches import runner as module
from streamworker.gateway.batches.records import (
    BatchRecord,
    CancellationRecord,
    FileRecord,
    cancellation_key,
    run_key,
)
from streamworker.gateway.batches.runner import Runner, window_s
from streamworker.gateway.batches.store import FolderStore, StoreError
from streamworker.gateway.batches.table import Table
from streamworker.telemetry import gateway_metrics as table
from streamworker.telemetry.metrics import PREFIX, Metrics
from tests.integration.batches import request
from tests.integration.stage import eventually
from tests.unit.batch.memory import Kafka, Topics
from tests.unit.gateway.batches import BATCH, StateInMemory, StateLog, a_batch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from pathlib import Path


class Share:
    """Takes the place of `PartitionShare`: the test says what is owned."""

    def __init__(self, _: Any, topic: str, group_id: str, changed: Callable[[], None]) -> None:
        assert (topic, group_id) == ("batches", "streamworker-batches")
        self.owned: frozenset[int] = frozenset()
        self._changed = changed

    async def start(self) -> None: ...

    async def stop(self) -> None:
        self.own()

    def own(self, *partitions: int) -> None:
        self.owned = frozenset(partitions)
        self._changed()


class Owner:
    """One gateway."""

    def __init__(self, case: Case, **settings: Any) -> None:
        self.state = StateInMemory(case.log)
        for key, value in case.log.records:
            self.state.table.apply(key, value)
        loaded = Settings(topics={"results": "results", "batches": "batches"}, batch=settings)
        self.metrics = Metrics(table=table.GATEWAY_TABLE)
        self.runner = Runner(loaded, self.state, case.store, self.metrics)  # type: ignore[arg-type]  # in memory
        self.state.changed = self.runner.changed
        self.share: Any = self.runner._share

    def metric(self, name: str, **labels: str) -> float:
        """Return the value of a metric of batches; 0 if its series does not exist."""
        return self.metrics.registry.get_sample_value(f"{PREFIX}gateway_batch{name}", labels) or 0.0


class Case:
    """What gateways share: state, store, Kafka; and what clients do."""

    def __init__(self, directory: Path) -> None:
        self.log = StateLog()
        self.store = FolderStore(directory)
        self.kafka = Kafka()
        self.owners: list[Owner] = []

    async def owner(self, *partitions: int, **settings: Any) -> Owner:
        """Start a gateway that owns some partitions."""
        owner = Owner(self, **settings)
        self.owners.append(owner)
        await owner.runner.start()
        owner.share.own(*partitions)
        return owner

    async def file(self, text: str | Iterable[Any], file_id: str = "file-1") -> None:
        """Upload a file."""
        lines = text if isinstance(text, str) else "".join(json.dumps(line) + "\n" for line in text)

        async def chunks() -> AsyncIterator[bytes]:
            yield lines.encode()

        size = await self.store.write(file_id, chunks())
        record = FileRecord(
            id=file_id, tenant="acme", bytes=size, created_at=1, expires_at=2**33, filename="in", purpose="batch"
        )  # fmt: skip
        self.log.append(file_id, record)

    def create(self, batch_id: str = BATCH, **members: Any) -> None:
        """Create a batch of the file `file-1`."""
        self.log.append(batch_id, a_batch(batch_id, **members))

    def cancel(self, batch_id: str = BATCH) -> None:
        """Cancel a batch."""
        self.log.append(cancellation_key(batch_id), CancellationRecord(batch_id=batch_id, requested_at=5))

    def batch(self, batch_id: str = BATCH) -> BatchRecord:
        """Return a batch as a new gateway would see it."""
        table = Table()
        for key, value in self.log.records:
            table.apply(key, value)
        found = table.batch(batch_id)
        assert found is not None
        return found

    async def ended(self, batch_id: str = BATCH) -> BatchRecord:
        """Wait for the end of a batch."""
        await eventually(lambda: self.batch(batch_id).has_ended, 10, lambda: self.batch(batch_id))
        return self.batch(batch_id)

    async def lines(self, file_id: str | None) -> list[Any]:
        """Return the lines of an output file."""
        assert file_id is not None
        text = b"".join([chunk async for chunk in self.store.read(file_id)])
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
async def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Case]:
    """Return a store and an empty state topic; stop the gateways at the end."""
    made = Case(tmp_path / "files")

    async def publish(_: Any, topic: str, entries: Iterable[tuple[bytes, bytes]]) -> None:
        assert topic == "streamworker.control"
        for key, _ in list(entries):
            made.kafka.cancelled.append(key.decode())
            made.kafka.end(key.decode(), "cancelled", "cancelled")

    monkeypatch.setattr(module, "PartitionShare", Share)
    monkeypatch.setattr(module, "RETRY_S", (0.01,))
    monkeypatch.setattr(module, "PROGRESS_S", 0.02)
    monkeypatch.setattr(engine_module, "RunTopics", lambda *arguments: Topics(made.kafka, *arguments))
    monkeypatch.setattr(open_lines, "publish", publish)
    yield made
    await asyncio.gather(*(owner.runner.stop() for owner in made.owners))


def requests(*names: str) -> list[dict[str, Any]]:
    """Return the lines of a file."""
    return [request(name, model="m") for name in names]


async def test_batch_is_run_from_validation_to_its_files(case: Case) -> None:
    """Statuses in OpenAI's order, counts, usage, and one file for each kind of line."""
    case.kafka.answer = lambda name: "failed" if name == "b" else "completed"
    await case.file(requests("a", "b", "c"))
    owner = await case.owner(0, 1)
    case.create(created_at=int(time.time()) - 100)
    batch = await case.ended()
    await eventually(lambda: owner.metric("es_ended_total", status="completed") == 1)

    assert owner.metric("_lines_total", outcome="completed") == 2
    assert owner.metric("_lines_total", outcome="failed") == 1
    assert 100 <= owner.metric("_duration_seconds_sum", status="completed") < 110
    assert case.log.statuses() == ["validating", "in_progress", "finalizing", "completed"]
    assert (batch.total, batch.completed, batch.failed, batch.model) == (3, 2, 1, "m")
    assert (batch.output_file_id, batch.error_file_id) == ("file-1o", "file-1e")
    assert [line["custom_id"] for line in await case.lines(batch.output_file_id)] == ["a", "c"]
    assert [line["custom_id"] for line in await case.lines(batch.error_file_id)] == ["b"]
    assert batch.usage is not None
    assert batch.usage["total_tokens"] == 0


async def test_files_of_a_batch_are_listed_for_its_tenant(case: Case) -> None:
    """They expire like uploaded ones; a batch without failures has no file of errors."""
    await case.file(requests("a"))
    owner = await case.owner(0, 1, kept_s=1000)
    case.create()
    batch = await case.ended()
    [file] = owner.state.table.files("acme", purpose="batch_output")

    assert batch.error_file_id is None
    assert (file.id, file.filename, file.bytes) == ("file-1o", "batch_output_batch_1.jsonl", len(
        b"".join([chunk async for chunk in case.store.read("file-1o")])
    ))  # fmt: skip
    assert 990 < file.expires_at - time.time() <= 1000


@pytest.mark.parametrize(("tenant", "prefix"), [("acme", "acme.b.batch_1."), ("", "b.batch_1.")])
async def test_jobs_of_a_batch_belong_to_its_tenant(case: Case, tenant: str, prefix: str) -> None:
    """By the first part of their ids; nothing else decides who may read them."""
    await case.file(requests("a"))
    await case.owner(0, 1)
    case.create(tenant=tenant)
    await case.ended()

    assert [job_id.startswith(prefix) for job_id in case.kafka.jobs] == [True]


async def test_model_of_a_batch_is_that_of_all_its_lines(case: Case) -> None:
    """A file with several models has none."""
    await case.file([request("a", model="m"), request("b", model="n")])
    await case.owner(0, 1)
    case.create()

    assert (await case.ended()).model is None


async def test_batch_whose_lines_are_not_valid_fails_with_their_faults(case: Case) -> None:
    """Nothing is submitted; `errors` has the line numbers."""
    await case.file(json.dumps(request("a")) + "\n{\n" + json.dumps(request("a")) + "\n")
    await case.owner(0, 1)
    case.create()
    batch = await case.ended()

    assert (batch.status, batch.total, case.kafka.jobs) == ("failed", 3, [])
    assert batch.errors is not None
    assert [(error["code"], error["line"]) for error in batch.errors] == [
        ("invalid_json_line", 2),
        ("duplicate_custom_id", 3),
    ]


@pytest.mark.parametrize(
    ("text", "settings", "code", "message"),
    [
        ("\n\n", {}, "empty_file", "in has no line"),
        (9, {"max_lines": 2}, "too_many_lines", "the file has more than 2 lines"),
    ],
)
async def test_batch_of_a_file_without_the_right_number_of_lines_fails(
    case: Case, text: Any, settings: dict[str, Any], code: str, message: str
) -> None:
    """The limit is the first number that is allowed."""
    await case.file(text if isinstance(text, str) else requests(*"abcdefghi"[:text]))
    await case.owner(0, 1, **settings)
    case.create()
    batch = await case.ended()

    assert (batch.status, case.kafka.jobs) == ("failed", [])
    assert batch.errors == [{"code": code, "message": message, "param": None, "line": None}]
    assert batch.total <= 3  # the rest of the file is not even read


async def test_batch_of_exactly_the_allowed_number_of_lines_runs(case: Case) -> None:
    """`batch.max_lines` itself is allowed."""
    await case.file(requests("a", "b"))
    await case.owner(0, 1, max_lines=2)
    case.create()

    assert (await case.ended()).status == "completed"


async def test_batch_whose_input_was_deleted_fails(case: Case) -> None:
    """By its owner between creation and validation."""
    await case.owner(0, 1)
    case.create()
    batch = await case.ended()

    assert batch.errors is not None
    assert (batch.status, batch.errors[0]["code"]) == ("failed", "input_file_deleted")


async def test_batch_whose_input_the_store_lost_fails(case: Case) -> None:
    """The record is there, the contents are not."""
    await case.file(requests("a"))
    await case.store.delete("file-1")
    await case.owner(0, 1)
    case.create()
    batch = await case.ended()

    assert batch.errors is not None
    assert (batch.status, batch.errors[0]["code"]) == ("failed", "input_file_lost")


# Cancellation and expiry


async def test_cancelled_batch_keeps_what_has_ended(case: Case) -> None:
    """Jobs in flight are cancelled; the rest is never submitted; both are lines of the file of errors."""
    case.kafka.answer = lambda name: "completed" if name == "a" else None
    await case.file(requests(*"abcdef"))
    await case.owner(0, 1, window=3)
    case.create()
    await eventually(lambda: len(case.kafka.jobs) == 4)
    case.cancel()
    batch = await case.ended()

    assert (batch.status, batch.completed, batch.failed) == ("cancelled", 1, 5)
    assert len(case.kafka.cancelled) == 3
    assert len(case.kafka.jobs) == 4
    assert {line["error"]["code"] for line in await case.lines(batch.error_file_id)} == {"batch_cancelled"}


async def test_batch_that_was_cancelled_before_it_was_validated_submits_nothing(case: Case) -> None:
    """Whichever gateway takes it."""
    await case.file(requests("a", "b"))
    case.create()
    case.cancel()
    await case.owner(0, 1)
    batch = await case.ended()

    assert (batch.status, batch.failed, case.kafka.jobs) == ("cancelled", 2, [])


async def test_batch_that_ended_before_its_cancellation_is_completed(case: Case) -> None:
    """No line was cancelled, so the status does not say so."""
    await case.file(requests("a"))
    owner = await case.owner(0, 1)
    case.create()
    await eventually(lambda: "finalizing" in case.log.statuses())
    case.cancel()
    batch = await case.ended()

    assert batch.status == "completed"
    assert owner.state.table.is_cancelled(BATCH)


async def test_batch_that_expired_says_so(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has not ended is `batch_expired`; what has is in the output."""
    monkeypatch.setattr(watch, "EXPIRY_GRACE_S", 0.0)
    monkeypatch.setattr(watch, "_WATCH_S", 0.02)
    case.kafka.answer = lambda name: "completed" if name == "a" else None
    await case.file(requests("a", "b"))
    await case.owner(0, 1)
    case.create(expires_at=int(time.time()))
    batch = await case.ended()

    assert (batch.status, batch.completed, batch.failed) == ("expired", 1, 1)


# Owners


async def test_batch_is_run_by_the_owner_of_its_partition_only(case: Case) -> None:
    """`batch_1` is in partition 1."""
    await case.file(requests("a"))
    stranger = await case.owner(0)
    case.create()
    await asyncio.sleep(0)
    assert stranger.runner.running == 0
    await case.owner(1)

    assert (await case.ended()).status == "completed"
    assert len(case.kafka.jobs) == 1


async def test_owner_that_loses_a_partition_stops_without_an_ending(case: Case) -> None:
    """The next one collects the endings of its jobs, and submits none of them again."""
    case.kafka.answer = lambda _: None
    await case.file(requests("a", "b"))
    first = await case.owner(1)
    case.create()
    await eventually(lambda: len(case.kafka.jobs) == 2)
    first.share.own()
    await eventually(lambda: first.runner.running == 0)
    assert case.log.statuses() == ["validating", "in_progress"]
    second = await case.owner(1)
    await eventually(lambda: second.runner.running == 1)
    for job_id in list(case.kafka.jobs):
        case.kafka.end(job_id, "completed")
    batch = await case.ended()

    assert (batch.status, batch.completed, len(case.kafka.jobs)) == ("completed", 2, 2)
    assert case.kafka.cancelled == []
    await eventually(lambda: second.metric("es_ended_total", status="completed") == 1)
    assert first.metric("_run_failures_total", cause="unavailable") == 0  # a batch that moves has not failed
    assert first.metric("es_ended_total", status="completed") == 0


async def test_lines_that_the_former_owner_has_counted_are_not_counted_again(case: Case) -> None:
    """All gateways together have counted each line once."""
    case.kafka.answer = {"a": "completed", "b": "failed"}.get
    await case.file(requests(*"abcd"))
    first = await case.owner(1)
    case.create()
    await eventually(lambda: (case.batch().completed, case.batch().failed) == (1, 1))
    await eventually(lambda: first.metric("_lines_total", outcome="failed") == 1)
    first.share.own()
    await eventually(lambda: first.runner.running == 0)
    second = await case.owner(1)
    await eventually(lambda: second.runner.running == 1)
    for job_id in case.kafka.jobs[2:]:
        case.kafka.end(job_id, "completed")
    await case.ended()
    await eventually(lambda: second.metric("es_ended_total", status="completed") == 1)

    counted = [
        [owner.metric("_lines_total", outcome=outcome) for outcome in ("completed", "failed")]
        for owner in (first, second)
    ]
    assert counted == [[1, 1], [2, 0]]


async def test_batch_whose_partition_is_lost_and_owned_again_goes_on(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rebalance revokes all partitions and assigns most of them again, also while a run waits to start again."""
    monkeypatch.setattr(module, "RETRY_S", (60,))
    read, faults = FolderStore.read, [StoreError("away")]

    async def failing(store: FolderStore, name: str) -> AsyncIterator[bytes]:
        if faults:
            raise faults.pop()
        async for chunk in read(store, name):
            yield chunk

    monkeypatch.setattr(FolderStore, "read", failing)
    await case.file(requests("a"))
    owner = await case.owner(1)
    case.create()
    await eventually(lambda: not faults)
    owner.share.own()
    owner.share.own(1)

    assert (await case.ended()).status == "completed"


async def test_gateway_that_stops_leaves_its_batches_to_others(case: Case) -> None:
    """No ending is written, and no job is cancelled."""
    case.kafka.answer = lambda _: None
    await case.file(requests("a"))
    owner = await case.owner(1)
    case.create()
    await eventually(lambda: case.kafka.jobs)
    await owner.runner.stop()

    assert (owner.runner.running, case.kafka.cancelled) == (0, [])
    assert not case.batch().has_ended


async def test_gateway_runs_a_limited_number_of_batches(case: Case) -> None:
    """The oldest first; the next one when one has ended."""
    case.kafka.answer = lambda _: None
    await case.file(requests("a"))
    for number in range(4):
        case.create(f"batch_{number}")
    owner = await case.owner(0, 1, max_running=2)
    await eventually(lambda: len(case.kafka.jobs) == 2)
    assert sorted(job_id.split(".")[2] for job_id in case.kafka.jobs) == ["batch_0", "batch_1"]
    assert owner.runner.running == 2
    case.kafka.end(next(job_id for job_id in case.kafka.jobs if "batch_0" in job_id), "completed")
    await case.ended("batch_0")
    await eventually(lambda: len(case.kafka.jobs) == 3)

    assert case.kafka.jobs[2].split(".")[2] == "batch_2"
    assert owner.runner.running == 2


async def test_gateway_that_has_not_read_the_state_begins_nothing(case: Case) -> None:
    """Its table may lack the end of a batch that it would run again."""
    await case.file(requests("a"))
    case.create()
    owner = Owner(case)
    case.owners.append(owner)
    owner.state.is_ready = False
    owner.share.own(0, 1)

    assert owner.runner.running == 0


async def test_run_that_fails_starts_again(case: Case) -> None:
    """A broker that does not answer, and a fault of the program: neither ends the batch."""
    faults = [KafkaUnavailable("no broker"), RuntimeError("a fault")]

    def opening() -> None:
        if faults:
            raise faults.pop(0)

    case.kafka.opening = opening
    await case.file(requests("a"))
    owner = await case.owner(0, 1)
    case.create()

    assert (await case.ended()).status == "completed"
    assert len(case.kafka.jobs) == 1
    assert owner.metric("_run_failures_total", cause="unavailable") == 1
    assert owner.metric("_run_failures_total", cause="crashed") == 1
    await eventually(lambda: owner.metric("_lines_total", outcome="completed") == 1)


async def test_store_that_fails_does_not_end_the_batch(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are built again, from the endings in Kafka."""
    write, faults = FolderStore.write, [StoreError("no space")]

    async def failing(store: FolderStore, name: str, chunks: AsyncIterator[bytes]) -> int:
        if name == "file-1o" and faults:
            raise faults.pop()
        return await write(store, name, chunks)

    monkeypatch.setattr(FolderStore, "write", failing)
    await case.file(requests("a", "b"))
    await case.owner(0, 1)
    case.create()
    batch = await case.ended()

    assert (batch.status, len(case.kafka.jobs), faults) == ("completed", 2, [])
    assert len(await case.lines(batch.output_file_id)) == 2


async def test_progress_is_written_while_the_batch_runs(case: Case) -> None:
    """And a broker that refuses it does not stop the run."""
    case.kafka.answer = {"a": "completed", "b": "failed"}.get
    await case.file(requests("a", "b", "c"))
    await case.owner(0, 1)
    case.create()
    await eventually(lambda: (case.batch().completed, case.batch().failed) == (1, 1))
    case.log.faults.append(KafkaUnavailable("no broker"))
    case.kafka.end(case.kafka.jobs[2], "completed")

    assert (await case.ended()).completed == 2
    assert len(case.kafka.jobs) == 3


# The state topic when owners overlap


async def test_owner_that_was_replaced_does_not_start_the_batch_a_second_time(case: Case) -> None:
    """Its record of the run comes after that of the first owner, whose jobs it would not see."""
    case.kafka.answer = lambda _: None
    await case.file(requests("a", "b"))
    case.create()
    slow, quick = await case.owner(), await case.owner(1)
    slow.state.is_slow = True
    await eventually(lambda: len(case.kafka.jobs) == 2)
    slow.share.own(1)
    first = quick.state.table.run(BATCH)
    await eventually(lambda: [key for key, _ in case.log.records].count(run_key(BATCH)) == 2)

    assert first is not None
    assert case.log.compacted().run(BATCH) == slow.state.table.run(BATCH) == first
    assert len(case.kafka.jobs) == 2
    assert len(case.kafka.jobs) == 2


async def test_late_record_of_a_replaced_owner_does_not_outlive_the_end_of_a_batch(case: Case) -> None:
    """Compaction keeps the last record of a key, so the owner that wrote too late writes the end again."""
    case.kafka.answer = lambda name: "completed" if name == "a" else None
    await case.file(requests("a", "b"))
    owner = await case.owner(1)
    case.create()
    await eventually(lambda: case.batch().completed == 1)
    ended = a_batch(status="completed", ended_at=9, total=2, completed=2, output_file_id="file-1o")
    case.log.append(BATCH, ended)  # by the next owner, before this one has noticed
    case.kafka.end(case.kafka.jobs[1], "failed")
    await eventually(lambda: owner.runner.running == 0)

    assert case.batch() == case.log.compacted().batch(BATCH) == ended


# Expired files and batches


async def test_sweep_deletes_what_has_expired_in_the_own_partitions(case: Case) -> None:
    """Contents, records, and the records beside a batch; nothing of other owners."""
    old = {"status": "completed", "ended_at": 1}
    owner = await case.owner(1, kept_s=60)
    for number in (1, 2):
        await case.file("x", f"file-{number}")
        expired = FileRecord(
            id=f"file-{number}", tenant="", bytes=1, created_at=1, expires_at=2, filename="f", purpose="batch"
        )
        case.log.append(f"file-{number}", expired)
    for number in (3, 4, 5):
        case.create(f"batch_{number}", **old if number != 5 else {**old, "ended_at": int(time.time())})
        case.cancel(f"batch_{number}")
    await owner.runner._sweep()
    table = owner.state.table

    assert [number for number in (1, 2) if table.file(f"file-{number}")] == [2]
    assert [number for number in (3, 4, 5) if table.batch(f"batch_{number}")] == [4, 5]
    assert [number for number in (3, 4, 5) if table.is_cancelled(f"batch_{number}")] == [4, 5]
    with pytest.raises(FileNotFoundError):
        await case.lines("file-1")
    tombstones = [key for key, value in case.log.records if value is None]
    assert tombstones == ["file-1", run_key("batch_3"), cancellation_key("batch_3"), "batch_3"]


async def test_sweep_that_fails_is_tried_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record stays until the contents are deleted."""
    monkeypatch.setattr(module, "SWEEP_S", 0.01)
    owner = Owner(case)
    case.owners.append(owner)
    delete, faults = FolderStore.delete, [StoreError("away"), StoreError("away")]

    async def failing(store: FolderStore, name: str) -> None:
        assert owner.state.table.file(name) is not None
        if faults:
            raise faults.pop()
        await delete(store, name)

    monkeypatch.setattr(FolderStore, "delete", failing)
    record = FileRecord(
        id="file-1", tenant="", bytes=1, created_at=1, expires_at=2, filename="f", purpose="batch"
    )
    case.log.append("file-1", record)
    await owner.runner.start()
    owner.share.own(1)

    await eventually(lambda: owner.state.table.file("file-1") is None)
    assert faults == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("24h", 86_400), ("1s", 1), ("90m", 5400), ("14d", 1_209_600), ("999999s", 999_999), ("0h", None),
        ("", None), ("h", None), ("24", None), ("24H", None), ("1.5h", None), ("-1h", None), ("+1h", None),
        (" 1h", None), ("1 h", None), ("1000000s", None), ("٣h", None), ("²h", None), ("24hh", None),
    ],
)  # fmt: skip
def test_completion_window_is_a_number_and_a_unit(text: str, seconds: int | None) -> None:
    """OpenAI knows `24h` only; here any number of seconds, minutes, hours or days, in ASCII digits."""
    assert window_s(text) == seconds
