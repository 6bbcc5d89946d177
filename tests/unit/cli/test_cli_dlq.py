"""`dlq list` and `dlq replay`: the lines that are printed, the records that are written, and the letters that stay, with the reason."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, cast

import pytest
from aiokafka.errors import KafkaConnectionError

from streamworker.kafka.partitioner import partition_of
from streamworker.model import ConsumerRecord, Coordinates, ErrorCode, TopicPartition
from streamworker.wire.deadletter import PREFIX, REPLAYS, dead_letter
from streamworker.wire.job import RERUN
from tests.memory_kafka import ABORTED, COMMITTED, MemoryConsumer
from tests.unit.cli.conftest import job

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamworker.model import Headers
    from tests.memory_kafka import MemoryKafka
    from tests.unit.cli.conftest import Outcome

JOBS, DLQ = "streamworker.jobs", "streamworker.dlq"


def bury(
    kafka: MemoryKafka,
    offset: int,
    *,
    code: ErrorCode = ErrorCode.INVALID_JOB,
    message: str = "request: is required",
    key: bytes | None = b"k",
    value: bytes | None = b"{}",
    topic: str = JOBS,
    headers: Headers = (),
    state: str = COMMITTED,
) -> ConsumerRecord:
    """Write the dead letter of the job record at this offset; return the job record."""
    record = ConsumerRecord(Coordinates(topic, 1, offset), 1_700_000_000_000, key, value, headers)
    letter = dead_letter(record, TopicPartition(DLQ, 0), code=code, message=message, group="g")
    at = 1_700_000_060_000
    kafka.write(DLQ, letter.value, key=letter.key, headers=letter.headers, timestamp=at, state=state)
    return record


def replayed(kafka: MemoryKafka) -> list[Any]:
    return kafka.records(JOBS)


# list


def test_list_prints_a_line_per_dead_letter(kafka: MemoryKafka, command: Callable[..., Outcome]) -> None:
    """Its place, for `--at`; its time, code, job and message. A record without a job id has its coordinates for one."""
    bury(kafka, 7, value=job("mine"))
    bury(kafka, 8, code=ErrorCode.AUTH, message="no key", headers=((REPLAYS, b"2"),))
    ended = command("dlq", "list")

    assert (ended.code, ended.err) == (0, "")
    assert ended.lines == [
        "streamworker.dlq-0-0  2023-11-14T22:14:20Z  invalid_job  mine  request: is required",
        "streamworker.dlq-0-1  2023-11-14T22:14:20Z  auth  streamworker.jobs-1-8 (replayed 2 times)  no key",
    ]


def test_list_as_json_has_every_fact_of_a_dead_letter(
    kafka: MemoryKafka, command: Callable[..., Outcome]
) -> None:
    """One object per line, for other programs; `bytes` is null where the value was too large to be kept."""
    bury(kafka, 7, value=job("mine"))
    bury(kafka, 8, value=None)
    first, second = map(json.loads, command("dlq", "list", "--json").lines)

    assert first == {
        "at": "streamworker.dlq-0-0",
        "ts": 1_700_000_060_000,
        "job_id": "mine",
        "code": "invalid_job",
        "message": "request: is required",
        "source": {"topic": JOBS, "partition": 1, "offset": 7},
        "source_ts": 1_700_000_000_000,
        "replays": 0,
        "bytes": len(job("mine")),
    }
    assert (second["bytes"], second["job_id"]) == (None, "streamworker.jobs-1-8")


def test_list_of_codes_leaves_the_others_out(kafka: MemoryKafka, command: Callable[..., Outcome]) -> None:
    """The option may be repeated."""
    for offset, code in enumerate((ErrorCode.AUTH, ErrorCode.QUOTA, ErrorCode.INVALID_JOB)):
        bury(kafka, offset, code=code)
    lines = command("dlq", "list", "--code", "auth", "--code", "quota").lines

    assert [line.split()[2] for line in lines] == ["auth", "quota"]


def test_control_characters_are_not_printed_to_a_terminal(
    kafka: MemoryKafka, command: Callable[..., Outcome]
) -> None:
    """A message repeats names that the job's sender chose: they could clear the screen, or forge a line."""
    bury(kafka, 7, message="member \x1b[2J\r\n\x9b of the job", code=cast("ErrorCode", "c\x1bode"))
    [line] = command("dlq", "list").lines

    assert line.split()[2] == "c\ufffdode"
    assert line.endswith("member \ufffd[2J\ufffd\ufffd\ufffd of the job")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda name, value: None if name == "code" else value,
            "header __streamworker.errors.code is missing",
        ),
        (lambda name, value: b"x" if name == "offset" else value, "errors.offset is not a number"),
        (lambda name, value: b"9" * 20 if name == "partition" else value, "errors.partition is not a number"),
        (lambda name, value: "²".encode() if name == "timestamp" else value, "errors.timestamp is not a"),
    ],
    ids=["missing", "not a number", "too long", "a digit of another script"],
)
def test_record_that_no_worker_wrote_is_skipped_with_the_reason(
    kafka: MemoryKafka, command: Callable[..., Outcome], spoil: Any, reason: str
) -> None:
    """The letters after it are listed."""
    record = bury(kafka, 7)
    letter = dead_letter(record, TopicPartition(DLQ, 0), code=ErrorCode.AUTH, message="m", group="g")
    spoilt = [(name, spoil(name.removeprefix(PREFIX), value)) for name, value in letter.headers]
    kafka.write(DLQ, b"{}", headers=tuple((name, value) for name, value in spoilt if value is not None))
    bury(kafka, 9)
    ended = command("dlq", "list")

    assert (ended.code, len(ended.lines)) == (0, 2)
    assert ended.err.startswith("skipped streamworker.dlq-0-1: it is not a valid dead letter: ")
    assert reason in ended.err


# replay


def test_replay_writes_the_job_record_as_it_was(kafka: MemoryKafka, command: Callable[..., Outcome]) -> None:
    """Key, value and the sender's headers; the error headers are removed, and the replays counted."""
    sent = (("traceparent", b"00-1"), ("empty", None))
    bury(kafka, 7, value=b"\xff not JSON", headers=sent)
    ended = command("dlq", "replay", "--all")
    [record] = replayed(kafka)

    assert ended.code == 0
    assert ended.lines == ["replayed streamworker.dlq-0-0: job streamworker.jobs-1-7 to streamworker.jobs"]
    assert ended.err == "1 of 1 dead letters replayed\n"
    assert (record.key, record.value) == (b"k", b"\xff not JSON")
    assert record.headers == (*sent, (REPLAYS, b"1"), (RERUN, b"1"))
    assert record.partition == partition_of(b"k", 2)
    assert [producer.is_closed for producer in kafka.producers] == [True]


def test_replay_counts_on_from_the_former_replays(
    kafka: MemoryKafka, command: Callable[..., Outcome]
) -> None:
    """The header of the former replay is replaced."""
    bury(kafka, 7, headers=((REPLAYS, b"2"), (RERUN, b"1")))
    command("dlq", "replay", "--all")

    assert replayed(kafka)[0].headers == ((REPLAYS, b"3"), (RERUN, b"1"))


def test_job_without_a_key_is_written_to_the_partition_of_its_place(
    kafka: MemoryKafka, command: Callable[..., Outcome]
) -> None:
    """Its key stays null: a key would put it in the order of others."""
    bury(kafka, 7, key=None)
    command("dlq", "replay", "--all")
    [record] = replayed(kafka)

    assert record.key is None
    assert record.partition == partition_of(b"streamworker.jobs-1-7", 2)


def test_job_with_an_empty_key_is_written_to_the_partition_of_that_key(
    kafka: MemoryKafka, command: Callable[..., Outcome]
) -> None:
    """An empty key is a key: its jobs stay in order."""
    bury(kafka, 6, key=b"")
    command("dlq", "replay", "--all")
    [record] = replayed(kafka)

    assert record.key == b""
    assert record.partition == partition_of(b"", 2) != partition_of(b"streamworker.jobs-1-6", 2)


def test_dead_letter_of_a_transaction_that_was_rolled_back_is_neither_listed_nor_replayed(
    kafka: MemoryKafka, command: Callable[..., Outcome]
) -> None:
    """Its job was not committed either: the next owner of the partition decides again."""
    bury(kafka, 7, state=ABORTED)

    assert command("dlq", "list").lines == []
    command("dlq", "replay", "--all")
    assert replayed(kafka) == []


@pytest.mark.parametrize(
    ("options", "places"),
    [
        (["--all"], [0, 1, 2]),
        (["--code", "auth"], [0, 2]),
        (["--at", f"{DLQ}-0-1"], [1]),
        (["--at", f"{DLQ}-0-1", "--code", "auth"], [0, 1, 2]),
        (["--code", "quota"], []),
    ],
)
def test_replay_selects_by_place_or_code(
    kafka: MemoryKafka, command: Callable[..., Outcome], options: list[str], places: list[int]
) -> None:
    """Different options extend the selection."""
    for offset, code in enumerate((ErrorCode.AUTH, ErrorCode.INVALID_JOB, ErrorCode.AUTH)):
        bury(kafka, offset, code=code, value=str(offset).encode())
    ended = command("dlq", "replay", *options)

    assert ended.code == 0
    assert sorted(int(record.value) for record in replayed(kafka)) == places
    assert ended.err == f"{len(places)} of {len(places)} dead letters replayed\n"


@pytest.mark.parametrize(
    ("over", "options", "reason"),
    [
        (
            {"headers": ((REPLAYS, b"3"),)},
            [],
            "it was replayed 3 times and failed each time; --max-replays allows more",
        ),
        (
            {"value": None},
            [],
            "its value was too large for a dead letter; the job record is at streamworker.jobs-1-7",
        ),
        ({"topic": "old\x1b"}, [], "its job topic old\ufffd is not one of topics.jobs"),
    ],
    ids=["replayed too often", "no value", "another topic"],
)
def test_dead_letter_that_cannot_be_replayed_is_left_with_the_reason(
    kafka: MemoryKafka, command: Callable[..., Outcome], over: Any, options: list[str], reason: str
) -> None:
    """The others are replayed, and the exit code says that one was not."""
    bury(kafka, 7, **over)
    bury(kafka, 8, value=b"other")
    ended = command("dlq", "replay", "--all", *options)

    assert ended.code == 1
    assert f"left    streamworker.dlq-0-0: {reason}" in ended.err
    assert ended.err.endswith("1 of 2 dead letters replayed\n")
    assert [record.value for record in replayed(kafka)] == [b"other"]


def test_max_replays_allows_more(kafka: MemoryKafka, command: Callable[..., Outcome]) -> None:
    """A job that was replayed less often than the limit is written."""
    bury(kafka, 7, headers=((REPLAYS, b"3"),))

    assert command("dlq", "replay", "--all", "--max-replays", "4").code == 0
    assert len(replayed(kafka)) == 1


def test_place_that_is_not_in_the_topic_is_reported(
    kafka: MemoryKafka, command: Callable[..., Outcome]
) -> None:
    """A misspelt place must not look like a success."""
    bury(kafka, 7)
    ended = command("dlq", "replay", "--at", f"{DLQ}-0-0", "--at", f"{DLQ}-0-5", "--at", "nonsense")

    assert ended.code == 1
    assert f"left    {DLQ}-0-5: there is no such dead letter" in ended.err
    assert "left    nonsense: there is no such dead letter" in ended.err
    assert len(replayed(kafka)) == 1


def test_dry_run_writes_nothing(kafka: MemoryKafka, command: Callable[..., Outcome]) -> None:
    """It prints what would be done, and leaves the same letters with the same reasons."""
    bury(kafka, 7)
    bury(kafka, 8, value=None)
    ended = command("dlq", "replay", "--all", "--dry-run")

    assert ended.code == 1
    assert ended.lines == [
        "would replay streamworker.dlq-0-0: job streamworker.jobs-1-7 to streamworker.jobs"
    ]
    assert ended.err.endswith("1 of 2 dead letters would be replayed\n")
    assert replayed(kafka) == []


def test_record_that_the_broker_refuses_is_left(kafka: MemoryKafka, command: Callable[..., Outcome]) -> None:
    """The topic's limit may be lower now; the letters after it are replayed."""
    kafka.max_value_bytes = 100
    bury(kafka, 7, value=b"x" * 101)
    bury(kafka, 8, value=b"x" * 100)
    ended = command("dlq", "replay", "--all")

    assert ended.code == 1
    assert "left    streamworker.dlq-0-0: the broker refused a record of" in ended.err
    assert [len(record.value) for record in replayed(kafka)] == [100]


def test_replay_without_a_selection_is_bad_usage(kafka: MemoryKafka, command: Callable[..., Outcome]) -> None:
    """Nothing is replayed by default."""
    bury(kafka, 7)
    ended = command("dlq", "replay")

    assert ended.code == 2
    assert "--at, --code or --all is required" in ended.err
    assert (kafka.consumers, kafka.producers) == ([], [])


def test_broker_that_does_not_answer_a_read_is_given_up(
    kafka: MemoryKafka, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each record is waited for at most `--timeout`; the message names the action."""
    bury(kafka, 7)

    async def hang(*_: Any, **__: Any) -> None:
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(MemoryConsumer, "getmany", hang)
    ended = command("dlq", "list", "--timeout", "0.1")

    assert (ended.code, ended.out) == (1, "")
    assert "reading streamworker.dlq: no answer within 0.1 s" in ended.err


def test_broker_that_goes_away_at_the_end_does_not_fail_a_command_that_is_done(
    kafka: MemoryKafka, command: Callable[..., Outcome]
) -> None:
    """The consumer's `stop` may fail: the letters are listed, and there is no traceback of aiokafka's error."""
    bury(kafka, 7)
    kafka.errors["stop"].append(KafkaConnectionError("away"))
    ended = command("dlq", "list")

    assert (ended.code, len(ended.lines), ended.err) == (0, 1, "")


@pytest.mark.parametrize("subcommand", [["list"], ["replay", "--all"]], ids=["list", "replay"])
@pytest.mark.parametrize("method", ["start", "getmany", "end_offsets"])
def test_broker_that_fails_ends_the_command(
    kafka: MemoryKafka, command: Callable[..., Outcome], subcommand: list[str], method: str
) -> None:
    """With one line; the consumer is closed."""
    bury(kafka, 7)
    kafka.errors[method].append(KafkaConnectionError("no route"))
    ended = command("dlq", *subcommand)

    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("error: ")
    assert "no route" in ended.err
    assert all(consumer.is_stopped for consumer in kafka.consumers)
