"""`submit` and `cancel`: the records that they write, and the input that they refuse before writing anything."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka.errors import KafkaConnectionError

from streamworker.cli import submit as module
from streamworker.client.ids import submitted_ms
from tests.memory_kafka import MemoryProducer
from tests.unit.cli.conftest import REQUEST, job

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.memory_kafka import MemoryKafka
    from tests.unit.cli.conftest import Outcome

JOBS, CONTROL = "streamworker.jobs", "streamworker.control"


def jobs(kafka: MemoryKafka, topic: str = JOBS) -> list[tuple[bytes, dict[str, Any]]]:
    """Return keys and values of the job records."""
    return [(record.key, json.loads(record.value)) for record in kafka.records(topic)]


def test_prompt_becomes_one_job_under_a_new_id(kafka: MemoryKafka, command: Callable[..., Outcome]) -> None:
    """The words are joined; the id is printed and is the record's key."""
    ended = command("submit", "-m", "gpt", "Why", "is the sky", "blue?")
    [(key, value)] = jobs(kafka)

    assert (ended.code, ended.lines, ended.err) == (0, [key.decode()], "")
    assert submitted_ms(value.pop("job_id")) is not None
    assert value == {
        "request": {"model": "gpt", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
    }


def test_options_become_members_of_the_job(
    kafka: MemoryKafka, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are not given are absent: a worker refuses null. The key orders jobs of a conversation."""
    monkeypatch.setenv("STREAMWORKER_TOPICS__ALLOWED_REPLY_TO", "replies")
    options = {
        "--job-id": "j",
        "--upstream": "u",
        "--deadline": "2099-01-31T12:00:00Z",
        "--on-break": "restart",
        "--reply-to": "replies",
        "-d": "a=b=c",
        "--key": "conversation",
    }
    given = [text for option in options.items() for text in option]
    assert command("submit", "-m", "m", "x", *given, "-d", "d=").code == 0

    assert jobs(kafka) == [
        (
            b"conversation",
            {
                "job_id": "j",
                "request": REQUEST,
                "upstream": "u",
                "deadline": "2099-01-31T12:00:00Z",
                "on_break": "restart",
                "reply_to": "replies",
                "metadata": {"a": "b=c", "d": ""},
            },
        )
    ]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (job("a"), ["a"]),
        (json.dumps(json.loads(job("a")), indent=2).encode(), ["a"]),
        (b"\n".join([job("a"), b"", b"  ", job("b"), b""]), ["a", "b"]),
        (b"\r\n".join([job("a"), job("b")]), ["a", "b"]),
    ],
    ids=["one line", "one object of several lines", "lines and blank lines", "CRLF"],
)
@pytest.mark.parametrize("is_file", [True, False], ids=["file", "stdin"])
def test_input_has_one_object_or_one_per_line(
    kafka: MemoryKafka,
    command: Callable[..., Outcome],
    tmp_path: Path,
    text: bytes,
    ids: list[str],
    is_file: bool,
) -> None:
    """From a file and from standard input; the ids are printed in the order of the input."""
    file = tmp_path / "jobs.jsonl"
    file.write_bytes(text)
    ended = command("submit", "-f", str(file)) if is_file else command("submit", stdin=text)

    assert (ended.code, ended.lines) == (0, ids)
    assert {key.decode() for key, _ in jobs(kafka)} == set(ids)


def test_option_overrides_a_member_and_metadata_is_added(
    kafka: MemoryKafka, command: Callable[..., Outcome]
) -> None:
    """An id of the job itself is kept."""
    text = job("own", upstream="file", metadata={"a": "file", "b": "file"})
    assert command("submit", "--upstream", "option", "-d", "a=option", stdin=text).code == 0

    [(_, value)] = jobs(kafka)
    assert (value["job_id"], value["upstream"]) == ("own", "option")
    assert value["metadata"] == {"a": "option", "b": "file"}


def test_many_jobs_are_written_in_order_and_a_part_at_a_time(
    kafka: MemoryKafka, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs of one key keep their order; the unacknowledged ones are bounded."""
    monkeypatch.setattr(module, "_AT_ONCE", 3)
    text = b"\n".join(job(f"job-{number}") for number in range(10))
    ended = command("submit", "--key", "k", stdin=text)

    names = [f"job-{number}" for number in range(10)]
    assert (ended.code, ended.lines) == (0, names)
    assert [value["job_id"] for _, value in jobs(kafka)] == names


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["x"], b"", "a prompt needs --model"),
        (["-m", "m"], job("a"), "--model needs a prompt"),
        (["-m", "m", "-f", "-", "x"], job("a"), "a prompt and --file cannot be combined"),
        ([], b" \n ", "the input has no job"),
        (["--job-id", "j"], job("a") + b"\n" + job("b"), "--job-id needs an input with a single job"),
        ([], b"{}\n{", "line 2 is not JSON"),
        ([], b"[]", "the input is not a JSON object"),
        ([], job("a") + b"\n7", "line 2 is not a JSON object"),
        ([], job("a") + b"\n" + job("b", on_break="stop"), "job 2 is not valid:\n  on_break: "),
        ([], job("a", metadata=["x"]), "job 1 is not valid:\n  metadata: "),
        (["-m", "m", "-d", "novalue", "x"], b"", "--metadata takes KEY=VALUE, not 'novalue'"),
        (["-m", "m", "--deadline", "tomorrow", "x"], b"", "the job is not valid:\n  deadline: "),
        (["-m", "m", "--job-id", "a b", "x"], b"", "the job is not valid:\n  job_id: "),
        (
            ["-m", "m", "--topic", "t", "x"],
            b"",
            "--topic t is not one of topics.jobs: streamworker.jobs",
        ),
        (["-m", "m", "--reply-to", "r", "x"], b"", "not one of topics.allowed_reply_to: it is empty"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    kafka: MemoryKafka, command: Callable[..., Outcome], arguments: list[str], stdin: bytes, message: str
) -> None:
    """Exit code 2 and the reason; of an input with one bad job, no other job is written."""
    ended = command("submit", *arguments, stdin=stdin)

    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err
    assert kafka.producers == []


@pytest.mark.parametrize(
    ("lines", "shown", "more"),
    [
        (
            [b"{", job("a"), b"7", b"[]"],
            ["line 1 is not JSON", "line 3 is not a JSON object", "line 4 is not"],
            "",
        ),
        (
            [job("a", on_break="x"), job("b"), job("c", metadata=1)],
            ["job 1 is not valid", "job 3 is not valid"],
            "",
        ),
        ([b"x"] * 10, ["line 10 is not JSON"], ""),
        ([b"x"] * 13, ["line 1 is not JSON", "line 10 is not JSON"], "and 3 more"),
    ],
)
def test_input_with_several_faults_reports_them_at_once(
    kafka: MemoryKafka, command: Callable[..., Outcome], lines: list[bytes], shown: list[str], more: str
) -> None:
    """The first ten, so that a file is not corrected line by line; a long file does not fill the screen."""
    ended = command("submit", stdin=b"\n".join(lines))

    assert (ended.code, kafka.producers) == (2, [])
    assert all(text in ended.err for text in shown)
    assert ("more" in ended.err.splitlines()[-1]) == bool(more)
    assert more in ended.err
    assert "line 11" not in ended.err


def test_file_with_a_byte_order_mark_and_crlf_is_read(
    kafka: MemoryKafka, command: Callable[..., Outcome]
) -> None:
    """Some editors write both."""
    ended = command("submit", stdin=b"\xef\xbb\xbf" + job("a") + b"\r\n\r\n" + job("b") + b"\r\n")

    assert (ended.code, ended.out) == (0, "a\nb\n")


def test_prompt_does_not_appear_in_an_error(kafka: MemoryKafka, command: Callable[..., Outcome]) -> None:
    """Error output goes to logs of CI systems."""
    for stdin in (b'{"request": {"messages": "a secret"}}', b'{"request": "a secret'):
        ended = command("submit", stdin=stdin)
        assert ended.code == 2
        assert "secret" not in ended.err


def test_broker_that_is_away_fails_the_command(kafka: MemoryKafka, command: Callable[..., Outcome]) -> None:
    """Exit code 1, one line that names the action, and no id on standard output."""
    kafka.errors["start_producer"].append(KafkaConnectionError("no route"))
    ended = command("submit", "-m", "m", "x")

    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("error: connecting a producer to localhost:9092: no route (")
    assert ended.err.count("\n") == 1


def test_missing_topic_fails_the_command(kafka: MemoryKafka, command: Callable[..., Outcome]) -> None:
    """With the command that creates it; nothing is created by writing to it."""
    del kafka.topics[JOBS]
    ended = command("submit", "-m", "m", "x")

    assert (ended.code, ended.out) == (1, "")
    assert "streamworker topics create" in ended.err
    assert JOBS not in kafka.topics


def test_broker_that_does_not_answer_is_given_up(
    kafka: MemoryKafka, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `--timeout`, with a hint at the setting."""

    async def hang(_: MemoryProducer) -> None:
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(MemoryProducer, "start", hang)
    ended = command("submit", "--timeout", "0.1", "-m", "m", "x")

    assert ended.code == 1
    assert "writing to streamworker.jobs at localhost:9092: no answer within 0.1 s" in ended.err
    assert "is kafka.bootstrap_servers right?" in ended.err


# Cancel


def test_cancel_writes_one_record_under_the_jobs_id(
    kafka: MemoryKafka, command: Callable[..., Outcome]
) -> None:
    """Standard output stays empty; the confirmation is for people."""
    ended = command("cancel", "tenant:job-1", "--reason", "the user left")
    [record] = kafka.records(CONTROL)

    assert (ended.code, ended.out) == (0, "")
    assert ended.err == "cancellation of tenant:job-1 written\n"
    assert record.key == b"tenant:job-1"
    assert json.loads(record.value) == {
        "type": "cancel",
        "v": 1,
        "job_id": "tenant:job-1",
        "reason": "the user left",
    }


@pytest.mark.parametrize("job_id", ["", "a b", "a/b", "x" * 201, "ümlaut", "a\n"])
def test_cancel_of_an_id_that_no_job_can_have_is_refused(
    kafka: MemoryKafka, command: Callable[..., Outcome], job_id: str
) -> None:
    """A worker would never match it, and the user would wait."""
    ended = command("cancel", "--", job_id)

    assert ended.code == 2
    assert "is not a valid job id" in ended.err
    assert kafka.records(CONTROL) == []


@pytest.mark.parametrize("arguments", [("submit", "-m", "m", "x"), ("cancel", "j")], ids=["submit", "cancel"])
def test_command_that_only_writes_connects_no_reader(
    kafka: MemoryKafka, command: Callable[..., Outcome], arguments: tuple[str, ...]
) -> None:
    """Its principal needs no right to read; the producer is closed at the end."""
    assert command(*arguments).code == 0

    assert kafka.consumers == []
    assert [producer.is_closed for producer in kafka.producers] == [True]
