"""Rules of the state topic of batches, for any order, repetition and loss of records that a Kafka log allows."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Batch, FileObject

from streamworker.batch.record import InputFacts, RunRecord
from streamworker.gateway.batches.records import (
    ENDED,
    STATUSES,
    BatchRecord,
    CancellationRecord,
    FileRecord,
    RunRecordOfBatch,
    cancellation_key,
    file_value,
    read_state,
    run_key,
    write_state,
)
from streamworker.gateway.batches.table import Table

TENANTS = st.sampled_from(["", "acme", "other"])
SECONDS = st.sampled_from([0, 1, 1_700_000_000, 1_700_000_060, 2**40])
SOME_SECONDS = st.none() | SECONDS
few = settings(max_examples=60)

BATCHES = st.sampled_from(["batch_1", "batch_2", "batch_3"])

files = st.builds(
    FileRecord,
    id=st.sampled_from(["file-1", "file-2", "file-3"]),
    tenant=TENANTS,
    bytes=SECONDS,
    created_at=SECONDS,
    expires_at=SECONDS,
    filename=st.just("in.jsonl"),
    purpose=st.sampled_from(["batch", "batch_output"]),
)
open_batches = st.builds(
    BatchRecord,
    id=BATCHES,
    tenant=TENANTS,
    input_file_id=st.just("file-1"),
    completion_window=st.just("24h"),
    created_at=SECONDS,
    expires_at=SECONDS,
    metadata=st.sampled_from([None, {}, {"a": "b"}]),
    status=st.sampled_from(["validating", "in_progress", "finalizing"]),
    in_progress_at=SOME_SECONDS,
    completed=st.integers(0, 9),
)
ended_batches = st.builds(
    lambda batch, status, at: msgspec.structs.replace(batch, status=status, ended_at=at),
    open_batches,
    st.sampled_from(sorted(ENDED)),
    SECONDS,
)
cancellations = st.builds(CancellationRecord, batch_id=BATCHES, requested_at=SECONDS)
runs = st.builds(
    lambda batch_id, created, offset: RunRecordOfBatch(
        batch_id=batch_id,
        record=RunRecord(
            run=batch_id,
            created=created,
            input=InputFacts(path="in", bytes=1, sha256="x"),
            topics={},
            start={"jobs": {"0": offset}},
        ),
    ),
    BATCHES,
    st.integers(1, 3),
    st.integers(0, 9),
)
records = files | open_batches | ended_batches | cancellations | runs


def key_of(record: Any) -> str:
    """Return the key of a record."""
    if isinstance(record, CancellationRecord):
        return cancellation_key(record.batch_id)
    return run_key(record.batch_id) if isinstance(record, RunRecordOfBatch) else str(record.id)


def written(log: list[tuple[Any, bool]]) -> list[tuple[str, bytes | None]]:
    """Return keys and values; the flag makes a tombstone of a record."""
    return [(key_of(record), None if is_dead else write_state(record)) for record, is_dead in log]


LOGS = st.lists(st.tuples(records, st.integers(0, 9).map(lambda number: number == 0)), max_size=20).map(
    written
)


def table_of(log: list[tuple[str, bytes | None]]) -> Table:
    """Return a table that has read a log."""
    table = Table()
    for key, value in log:
        table.apply(key, value)
    return table


def state(table: Table) -> Any:
    """Return everything that a table has."""
    return table._files, table._batches, table._cancellations, table._runs


FILE = FileRecord(id="file-1", tenant="", bytes=1, created_at=1, expires_at=2, filename="f", purpose="batch")


@given(records)
def test_record_is_read_back_as_it_was_written(record: Any) -> None:
    """Each kind by its tag, with every member."""
    assert read_state(write_state(record)) == record


@given(st.binary(max_size=40) | records.map(lambda record: write_state(record)[:-1]))
def test_value_that_is_not_a_record_is_refused_and_changes_nothing(value: bytes) -> None:
    """By the one exception that the reader of the topic logs."""
    table = table_of([("file-1", write_state(FILE))])
    before = [dict(part) for part in state(table)]
    try:
        table.apply("file-1", value)
    except ValueError:
        assert [dict(part) for part in state(table)] == before


@few
@given(LOGS)
def test_last_record_may_be_read_twice(log: list[tuple[str, bytes | None]]) -> None:
    """A record says what is, not what changes: applying it again changes nothing."""
    assert state(table_of(log + log[-1:])) == state(table_of(log))


@few
@given(LOGS)
def test_batches_do_not_influence_each_other(log: list[tuple[str, bytes | None]]) -> None:
    """Records of different files and batches may be in different partitions, and be read in any order between them."""
    ids = sorted({key.partition(".")[0] for key, _ in log})
    by_id = [entry for id_ in ids for entry in log if entry[0].partition(".")[0] == id_]

    assert state(table_of(by_id)) == state(table_of(log))


@few
@given(LOGS)
def test_records_of_a_batch_are_kept_apart_by_key(log: list[tuple[str, bytes | None]]) -> None:
    """The batch, its run and its cancellation have three writers: none of them changes what another one wrote."""
    keys = sorted({key for key, _ in log})
    by_key = [entry for key in keys for entry in log if entry[0] == key]

    assert state(table_of(by_key)) == state(table_of(log))


@few
@given(LOGS, st.data())
def test_compaction_of_any_prefix_loses_nothing_but_late_records(
    log: list[tuple[str, bytes | None]], data: st.DataObject
) -> None:
    """Where every writer was alone, the last record of each key is enough."""
    alone = [
        (key, value)
        for at, (key, value) in enumerate(log)
        if not any(other == key and _is_final(earlier) for other, earlier in log[:at])
    ]
    cut = data.draw(st.integers(0, len(alone)))
    last = {key: at for at, (key, _) in enumerate(alone[:cut])}
    compacted = [entry for at, entry in enumerate(alone[:cut]) if last[entry[0]] == at]

    assert state(table_of(compacted + alone[cut:])) == state(table_of(alone))


def _is_final(value: bytes | None) -> bool:
    """Whether a second writer could come after this record: an end, a cancellation, the start of a run, a tombstone."""
    if value is None:
        return True
    record = read_state(value)
    return (
        record.has_ended
        if isinstance(record, BatchRecord)
        else isinstance(record, CancellationRecord | RunRecordOfBatch)
    )


@few
@given(LOGS, st.integers(0, 20))
def test_ended_batch_never_runs_again(log: list[tuple[str, bytes | None]], cut: int) -> None:
    """Unless its record was deleted; what its owner wrote as the end stays."""
    table = table_of(log[:cut])
    ended = {id_: batch for id_, batch in table._batches.items() if batch.has_ended}
    for key, value in log[cut:]:
        table.apply(key, value)
        if value is None:
            ended.pop(key, None)
        assert {id_: table.batch(id_) for id_ in ended} == ended
        assert not ended.keys() & {batch.id for batch in table.unfinished()}


@few
@given(LOGS)
def test_every_batch_and_file_is_an_openai_object(log: list[tuple[str, bytes | None]]) -> None:
    """By OpenAI's own models, strictly, in every state that a log can bring about."""
    table = table_of(log)
    for id_, batch in table._batches.items():
        seen = Batch.model_validate_json(msgspec.json.encode(table.value(batch)), strict=True)
        assert seen.id == id_
        assert seen.status in STATUSES
        assert seen.status == batch.status or (seen.status == "cancelling" and not batch.has_ended)
        assert (seen.cancelling_at is not None) == table.is_cancelled(id_)
        ends = [getattr(seen, f"{name}_at") for name in sorted(ENDED)]
        assert [at for at in ends if at is not None] == ([batch.ended_at] if batch.has_ended else [])
    for file in table._files.values():
        FileObject.model_validate_json(msgspec.json.encode(file_value(file)), strict=True)


@few
@given(LOGS, TENANTS)
def test_lists_of_a_tenant_have_its_own_records_only(
    log: list[tuple[str, bytes | None]], tenant: str
) -> None:
    """Newest first; a key without a tenant sees everything."""
    table = table_of(log)

    def mine(kept: dict[str, Any]) -> list[str]:
        return sorted((id_ for id_, one in kept.items() if not tenant or one.tenant == tenant), reverse=True)

    assert [file.id for file in table.files(tenant)] == mine(table._files)
    assert [batch.id for batch in table.batches(tenant)] == mine(table._batches)


@few
@given(LOGS, SECONDS, st.integers(0, 2**30))
def test_what_expires_is_old_files_and_batches_that_ended_long_ago(
    log: list[tuple[str, bytes | None]], now: int, kept_s: int
) -> None:
    """A batch that has not ended is never deleted, and the second in which something expires counts."""
    table = table_of(log)
    expired = set(table.expired(now, kept_s))

    assert expired == {id_ for id_, file in table._files.items() if file.expires_at <= now} | {
        id_
        for id_, batch in table._batches.items()
        if batch.has_ended and batch.ended_at is not None and batch.ended_at <= now - kept_s
    }
