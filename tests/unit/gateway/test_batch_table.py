"""The table of files and batches: records in the log's order to what clients see."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
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


def file(id_: str = "file-1", **over: Any) -> FileRecord:
    """Return a file of acme."""
    members = {
        "id": id_,
        "tenant": "acme",
        "bytes": 3,
        "created_at": 1000,
        "expires_at": 2000,
        "filename": "in.jsonl",
        "purpose": "batch",
    }
    return FileRecord(**{**members, **over})


def batch(id_: str = "batch_1", **over: Any) -> BatchRecord:
    """Return a batch of acme that is validating."""
    members = {
        "id": id_,
        "tenant": "acme",
        "input_file_id": "file-1",
        "completion_window": "24h",
        "created_at": 1000,
        "expires_at": 87_400,
    }
    return BatchRecord(**{**members, **over})


def run(created: int, offset: int = 7) -> RunRecord:
    """Return the record of a run."""
    return RunRecord(
        run="batch_1",
        created=created,
        input=InputFacts(path="in.jsonl", bytes=3, sha256="00"),
        topics={"jobs": "jobs", "results": "results"},
        start={"jobs": {"0": offset}, "results": {"0": offset}},
    )


def table_of(*records: Any) -> Table:
    """Return a table that has read these records."""
    table = Table()
    for record in records:
        match record:
            case CancellationRecord():
                key = cancellation_key(record.batch_id)
            case RunRecordOfBatch():
                key = run_key(record.batch_id)
            case _:
                key = record.id
        table.apply(key, write_state(record))
    return table


@pytest.mark.parametrize(
    "record",
    [
        file(),
        batch(metadata={"a": "b"}, errors=[{"code": "c", "message": "m", "param": None, "line": 3}]),
        CancellationRecord(batch_id="batch_1", requested_at=5),
        RunRecordOfBatch(batch_id="batch_1", record=run(5)),
    ],
    ids=["file", "batch", "cancellation", "run"],
)
def test_record_is_read_as_it_was_written(record: Any) -> None:
    """A gateway reads what another one wrote."""
    assert read_state(write_state(record)) == record


@pytest.mark.parametrize(
    "value",
    [b"", b"no json", b"[]", b"{}", b'{"type":"other"}', b'{"type":"file","id":1}', b"\xff", b"[" * 100_000],
)
def test_value_that_is_not_a_state_is_refused(value: bytes) -> None:
    """A record of another program does not stop the reader."""
    with pytest.raises(ValueError, match="it is not the state of a file or a batch"):
        Table().apply("file-1", value)


@pytest.mark.parametrize("status", STATUSES)
def test_batch_object_is_valid_for_openai_in_every_status(status: str) -> None:
    """OpenAI's own model accepts it strictly, and the time of the ending has the status's name."""
    table = table_of(batch(status=status, ended_at=1500 if status in ENDED else None, total=3, completed=2))
    value = table.value(table.batch("batch_1"))  # type: ignore[arg-type]  # it is there

    seen = Batch.model_validate_json(msgspec.json.encode(value), strict=True)

    assert seen.status == status
    assert seen.request_counts is not None
    assert (seen.request_counts.total, seen.request_counts.completed) == (3, 2)
    for name in ENDED:
        assert value[f"{name}_at"] == (1500 if name == status else None)


def test_file_object_is_valid_for_openai() -> None:
    """OpenAI's own model accepts it strictly."""
    seen = FileObject.model_validate_json(msgspec.json.encode(file_value(file())), strict=True)

    assert (seen.id, seen.bytes, seen.filename, seen.purpose) == ("file-1", 3, "in.jsonl", "batch")


def test_errors_of_a_batch_are_a_list_of_openai() -> None:
    """`failed` says which lines are not valid."""
    errors = [{"code": "invalid_url", "message": "m", "param": None, "line": 3}]
    table = table_of(batch(status="failed", ended_at=5, errors=errors))

    seen = Batch.model_validate(table.value(table.batch("batch_1")))  # type: ignore[arg-type]  # it is there

    assert seen.errors is not None
    assert seen.errors.data is not None
    assert (seen.errors.data[0].line, seen.errors.data[0].code) == (3, "invalid_url")


@pytest.mark.parametrize("status", ["validating", "in_progress", "finalizing"])
def test_cancelled_batch_is_cancelling_until_its_owner_ends_it(status: str) -> None:
    """The owner's later progress does not take the cancellation back."""
    table = table_of(batch(), CancellationRecord(batch_id="batch_1", requested_at=1200), batch(status=status))

    value = table.value(table.batch("batch_1"))  # type: ignore[arg-type]  # it is there

    assert table.is_cancelled("batch_1")
    assert (value["status"], value["cancelling_at"]) == ("cancelling", 1200)


def test_second_cancellation_changes_nothing() -> None:
    """Two clients cancel at two gateways at the same time."""
    table = table_of(
        batch(),
        CancellationRecord(batch_id="batch_1", requested_at=1200),
        CancellationRecord(batch_id="batch_1", requested_at=1300),
        batch(status="cancelled", ended_at=1400),
    )

    value = table.value(table.batch("batch_1"))  # type: ignore[arg-type]  # it is there

    assert (value["status"], value["cancelling_at"], value["cancelled_at"]) == ("cancelled", 1200, 1400)


@pytest.mark.parametrize("status", sorted(ENDED))
def test_ended_batch_stays_as_it_is(status: str) -> None:
    """An owner that was replaced and did not notice yet writes its progress too late."""
    table = table_of(batch(status=status, ended_at=1500), batch(status="in_progress", completed=1))

    found = table.batch("batch_1")

    assert found is not None
    assert (found.status, found.completed) == (status, 0)
    assert table.unfinished() == []


def test_first_record_of_a_run_counts() -> None:
    """A later one would begin behind jobs that were submitted, and pay for them twice."""
    table = table_of(
        batch(),
        RunRecordOfBatch(batch_id="batch_1", record=run(5, offset=7)),
        RunRecordOfBatch(batch_id="batch_1", record=run(6, offset=99)),
    )

    known = table.run("batch_1")

    assert known is not None
    assert known.offsets("jobs") == {0: 7}


def test_record_of_the_same_run_is_replaced() -> None:
    """Its owner writes it again with other offsets."""
    table = table_of(
        RunRecordOfBatch(batch_id="batch_1", record=run(5, offset=7)),
        RunRecordOfBatch(batch_id="batch_1", record=run(5, offset=8)),
    )

    known = table.run("batch_1")

    assert known is not None
    assert known.offsets("jobs") == {0: 8}


@pytest.mark.parametrize("key", ["file-1", "batch_1", "batch_1.run", "batch_1.cancellation", "never.seen"])
def test_tombstone_removes_one_record(key: str) -> None:
    """Compaction may leave tombstones of records that this table never had."""
    table = table_of(
        file(),
        batch(),
        CancellationRecord(batch_id="batch_1", requested_at=1),
        RunRecordOfBatch(batch_id="batch_1", record=run(5)),
    )

    table.apply(key, None)

    assert (table.file("file-1") is None) == (key == "file-1")
    assert (table.batch("batch_1") is None) == (key == "batch_1")
    assert (table.run("batch_1") is None) == (key == "batch_1.run")
    assert table.is_cancelled("batch_1") == (key != "batch_1.cancellation")


def test_unfinished_batches_are_oldest_first() -> None:
    """A gateway that runs few at a time begins with those that have waited longest."""
    table = table_of(batch("batch_3"), batch("batch_1"), batch("batch_2", status="completed", ended_at=5))

    assert [one.id for one in table.unfinished()] == ["batch_1", "batch_3"]


def test_files_and_batches_expire() -> None:
    """A file by its own time, a batch some time after its end; a batch that runs never does."""
    table = table_of(
        file("file-1", expires_at=100),
        file("file-2", expires_at=101),
        batch("batch_1"),
        batch("batch_2", status="completed", ended_at=50),
        batch("batch_3", status="completed", ended_at=51),
    )

    assert table.expired(100, 50) == ["file-1", "batch_2"]


def test_statuses_are_counted() -> None:
    """A batch that a client has cancelled is `cancelling` until its owner ends it."""
    table = table_of(
        batch("batch_1"),
        batch("batch_2", status="in_progress"),
        CancellationRecord(batch_id="batch_2", requested_at=1),
        batch("batch_3", status="cancelled", ended_at=5),
        CancellationRecord(batch_id="batch_3", requested_at=1),
        batch("batch_4", status="completed", ended_at=5),
    )

    assert table.statuses() == {"validating": 1, "cancelling": 1, "cancelled": 1, "completed": 1}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["file", "batch", "ended", "remove"]),
            st.integers(0, 4),
            st.sampled_from(["", "acme", "other"]),
        ),
        max_size=40,
    )
)
def test_files_and_batches_of_a_tenant_are_counted(steps: list[tuple[str, int, str]]) -> None:
    """Whatever is written again, removed, or removed twice."""
    table = Table()
    owners: dict[str, str] = {}
    for kind, number, tenant in steps:
        id_ = f"{'file-' if kind == 'file' else 'batch_'}{number}"
        owner = owners.setdefault(id_, tenant)  # an id is never another tenant's
        match kind:
            case "file":
                table.apply(id_, write_state(file(id_, tenant=owner)))
            case "batch":
                table.apply(id_, write_state(batch(id_, tenant=owner)))
            case "ended":
                table.apply(id_, write_state(batch(id_, tenant=owner, status="completed", ended_at=5)))
            case _:
                table.apply(id_, None)
                table.apply(f"file-{number}", None)

    for tenant in ("", "acme", "other"):
        files = [one for one in table.files("") if one.tenant == tenant]
        batches = [one for one in table.batches("", limit=99) if one.tenant == tenant]
        assert (table.files_of(tenant), table.batches_of(tenant)) == (len(files), len(batches))


@given(
    count=st.integers(0, 40),
    limit=st.integers(1, 7),
    ascending=st.booleans(),
    tenant=st.sampled_from(["", "acme", "other"]),
)
def test_pages_of_files_are_all_files_once_in_order(
    count: int, limit: int, tenant: str, *, ascending: bool
) -> None:
    """Whatever the page size: nothing is missing, nothing is repeated, `has_more` is right."""
    tenants = ("acme", "other")
    table = table_of(
        *(file(f"file-{number:03}", tenant=tenants[number % 2]) for number in range(count)),
    )
    walked: list[str] = []
    after = None
    while True:
        page = table.files(tenant, after=after, limit=limit, ascending=ascending)
        walked += [one.id for one in page]
        assert len(page) <= limit
        if not page.has_more:
            break
        after = page[-1].id

    mine = [f"file-{n:03}" for n in range(count) if not tenant or tenants[n % 2] == tenant]
    assert walked == (mine if ascending else mine[::-1])


def test_files_are_listed_by_purpose() -> None:
    """`purpose=batch_output` lists what batches have written."""
    table = table_of(file("file-1"), file("file-2", purpose="batch_output"))

    assert [one.id for one in table.files("acme", purpose="batch_output")] == ["file-2"]
    assert list(table.files("acme", purpose="vision")) == []
    assert list(table.files("other")) == []


def test_batches_are_listed_newest_first() -> None:
    """An `after` that is not there any more still marks its place."""
    table = table_of(*(batch(f"batch_{number}") for number in range(5)))
    table.apply("batch_3", None)

    assert [one.id for one in table.batches("acme", limit=2)] == ["batch_4", "batch_2"]
    assert [one.id for one in table.batches("acme", after="batch_3")] == ["batch_2", "batch_1", "batch_0"]
    assert list(table.batches("other")) == []
