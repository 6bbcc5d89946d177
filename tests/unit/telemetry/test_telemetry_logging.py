"""Log lines: whole, clean, and never a reason to stop."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from typing import Any, Literal

import msgspec
import pytest
import structlog

from streamworker.model import Coordinates, Job, Status
from streamworker.redaction import Redactor
from streamworker.telemetry import configure_logging
from streamworker.telemetry.rendering import MAX_INT_BITS, MAX_ITEMS, MAX_TEXT, render_json

CANARY = "canary-4f1c9a"
REDACT = Redactor([CANARY])


def job() -> Job:
    request = {"messages": msgspec.Raw(f'["{CANARY}"]'.encode())}
    return Job(job_id="j", source=Coordinates("t", 0, 1), timestamp=0, model="m", request=request)


def raised(text: str) -> Exception:
    prompt = f"local {text}"  # noqa: F841 - a local variable that must not be seen
    try:
        raise ValueError(text)  # noqa: TRY301 - to have a frame
    except ValueError as error:
        return error


class Grumpy:
    def __str__(self) -> str:
        raise RuntimeError(CANARY)

    __repr__ = __str__


class GrumpyError(Exception):
    def __str__(self) -> str:
        raise RuntimeError(CANARY)


def test_line_is_one_json_object_with_time_level_and_event_first(stream: Any) -> None:
    configure_logging("json", stream=stream)
    structlog.contextvars.bind_contextvars(worker="w")

    structlog.get_logger().info("job.completed", job_id="j", deltas=3, usage={"total_tokens": 5}, first=None)

    line = stream.only()
    assert [*line][:3] == ["timestamp", "level", "event"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line.pop("timestamp"))
    assert line == {
        "level": "info",
        "event": "job.completed",
        "job_id": "j",
        "deltas": 3,
        "usage": {"total_tokens": 5},
        "first": None,
        "worker": "w",
    }


def test_level_holds_for_us_and_for_libraries(stream: Any) -> None:
    configure_logging("json", "warning", stream)
    structlog.get_logger().info("a.b")
    logging.getLogger("somebody").info("quiet")
    structlog.get_logger().warning("c.d")
    logging.getLogger("somebody").warning("loud")
    assert [line["level"] for line in stream.lines()] == ["warning", "warning"]


def test_level_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="'loud' is no log level; use debug, info"):
        configure_logging("json", "loud")


def test_exception_is_structured_and_has_no_local_variables(stream: Any) -> None:
    configure_logging("json", stream=stream, redact=REDACT)
    structlog.get_logger().error("thing.failed", exc_info=raised(f"no {CANARY}"))
    line = stream.only()
    (exception,) = line["exception"]
    assert (exception["exc_type"], exception["exc_value"]) == ("ValueError", "no ***")
    assert [frame.keys() for frame in exception["frames"]] == [{"filename", "lineno", "name"}]
    assert exception["frames"][0]["name"] == "raised"
    assert "local" not in stream.getvalue().decode()


def test_caught_exception_is_found(stream: Any) -> None:
    configure_logging("json", stream=stream)
    empty: dict[str, int] = {}
    try:
        empty["k"]
    except KeyError:
        structlog.get_logger().exception("thing.failed")
    assert stream.only()["level"] == "error"
    assert stream.only()["exception"][0]["exc_type"] == "KeyError"


@pytest.mark.parametrize("format_", ["json", "console"])
def test_secret_is_nowhere(
    stream: Any, format_: Literal["json", "console"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own raise what the library did wrong
    configure_logging(format_, "debug", stream, redact=REDACT)
    log = structlog.get_logger()
    log.info(CANARY, text=f"x {CANARY}", nested=[{"a": (CANARY, {CANARY})}], **{CANARY: 1})
    log.info("a.b", error=ValueError(CANARY), raw=CANARY.encode(), job=job(), grumpy=Grumpy())
    log.info(
        "a.c",
        deep={CANARY: {CANARY: CANARY}},
        header="Authorization: Bearer abcdefghijkl",
        failure=GrumpyError(),
    )
    log.error("a.d", exc_info=raised(CANARY))
    log.error("a.e", exc_info=GrumpyError())
    logging.getLogger("library").error("%s and %d", CANARY, CANARY)
    logging.getLogger("library").error("bad %s", CANARY, exc_info=raised(CANARY))
    logging.getLogger("library").error(Grumpy())
    written = stream.getvalue().decode()
    assert len(written.splitlines()) >= 7
    assert CANARY not in written
    assert "abcdefghijkl" not in written


def test_secret_across_the_cut_is_no_half_secret(stream: Any) -> None:
    configure_logging("json", stream=stream, redact=REDACT)
    structlog.get_logger().info("a.b", text="x" * (MAX_TEXT - 5) + CANARY)
    assert "canary"[:3] not in stream.getvalue().decode()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("\ud83d\ude00 \ud800", "😀 �"),
        (1 << 64, 1 << 64),
        (1 << MAX_INT_BITS, f"<{MAX_INT_BITS + 1} bits>"),
        (1 << 20_000, "<20001 bits>"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (True, True),
        (Status.EXPIRED, "expired"),
        (b"prompt", "<bytes>"),
        (Coordinates("t", 0, 1), ["t", 0, 1]),
        (frozenset({1}), [1]),
        ({1: 2, None: 3, (1, 2): 4}, {"1": 2, "None": 3, "<tuple>": 4}),
        (ValueError("no"), "ValueError: no"),
        (job(), "<Job>"),
        (Grumpy(), "<Grumpy>"),
        (object, "<type>"),
        ("é" * MAX_TEXT, "é" * (MAX_TEXT // 2)),
        ([*range(MAX_ITEMS + 1)], [*range(MAX_ITEMS)]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_value_of_any_kind_is_shown_or_named(stream: Any, value: object, shown: object) -> None:
    configure_logging("json", stream=stream)
    structlog.get_logger().info("a.b", value=value)
    assert json.loads(stream.getvalue())["value"] == shown


def test_value_that_holds_itself_is_cut(stream: Any) -> None:
    configure_logging("json", stream=stream)
    ring: list[Any] = []
    ring.append(ring)
    structlog.get_logger().info("a.b", ring=ring)
    assert "<list>" in stream.getvalue().decode()


def test_what_cannot_be_logged_is_a_line_of_its_own(stream: Any) -> None:
    configure_logging("json", stream=stream)
    structlog.get_logger().info("a.b", failure=GrumpyError())
    assert stream.only() == {
        "level": "error",
        "event": "log.failed",
        "failed_event": "a.b",
        "reason": "RuntimeError",
    }


def test_renderer_writes_what_orjson_refuses() -> None:
    value = {"big": 1 << 70, "half": "\ud800", "odd": Grumpy()}
    assert json.loads(render_json(None, "", value)) == {"big": 1 << 70, "half": "\ud800", "odd": "<Grumpy>"}


def test_library_speaks_through_the_same_renderer(stream: Any) -> None:
    configure_logging("json", stream=stream)
    logging.getLogger("aiokafka.consumer").warning("lost %s", "t-0")
    line = stream.only()
    del line["timestamp"]
    assert line == {
        "level": "warning",
        "event": "library.logged",
        "logger": "aiokafka.consumer",
        "message": "lost t-0",
    }


@pytest.mark.parametrize(("level", "name"), [(25, "info"), (55, "critical"), (12, "debug")])
def test_level_of_somebodys_own_is_rounded_down(stream: Any, level: int, name: str) -> None:
    configure_logging("json", "debug", stream)
    logging.getLogger("somebody").log(level, "x")
    assert stream.only()["level"] == name


def test_aiokafka_is_never_heard_below_warning(stream: Any) -> None:
    """Its debug log prints keys and values: prompts."""
    configure_logging("json", "debug", stream)
    logging.getLogger("aiokafka").debug("value %r", CANARY)
    child = logging.getLogger("aiokafka.producer.sender")
    child.setLevel(logging.DEBUG)
    try:
        child.debug("value %r", CANARY)
        child.info("chatter")
        child.warning("sent")
    finally:
        child.setLevel(logging.NOTSET)
    assert stream.only()["message"] == "sent"


def test_http_client_does_not_log_each_request(stream: Any) -> None:
    configure_logging("json", "debug", stream)
    logging.getLogger("httpx").info("HTTP Request: POST ...")
    assert stream.lines() == []


def test_second_call_wins_and_doubles_nothing(stream: Any) -> None:
    first = io.BytesIO()
    configure_logging("console", "info", first)
    log = structlog.get_logger().bind()
    log.info("a.b")
    told = first.getvalue()
    configure_logging("json", "info", stream, redact=REDACT)

    log.info("a.c", text=CANARY)
    logging.getLogger("somebody").info("x")

    assert first.getvalue() == told
    assert [line["event"] for line in stream.lines()] == ["a.c", "library.logged"]
    assert stream.lines()[0]["text"] == "***"


def test_console_is_for_people(stream: Any) -> None:
    configure_logging("console", stream=stream)
    structlog.get_logger().warning("job.failed", job_id="j-é", exc_info=raised("no"))
    written = stream.getvalue().decode()
    assert re.search(r"Z \[warning  \] job\.failed +job_id=j-é", written)
    assert "ValueError: no" in written
    assert "local" not in written
    assert "\x1b" not in written


def test_stream_that_fails_is_no_ones_problem() -> None:
    class Full(io.BytesIO):
        def write(self, _data: Any) -> int:
            raise OSError(28, "No space left on device")

    configure_logging("json", stream=Full())
    structlog.get_logger().info("a.b")
    closed = io.BytesIO()
    configure_logging("json", stream=closed)
    closed.close()
    structlog.get_logger().info("a.b")
    logging.getLogger("somebody").warning("x")


def test_process_without_stdout_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    configure_logging("json")
    structlog.get_logger().info("a.b")


def test_reader_that_goes_away_does_not_stop_the_worker() -> None:
    """Neither while it runs nor by its exit code."""
    program = (
        "import structlog; from streamworker.telemetry import configure_logging; configure_logging('json')\n"
        "for _ in range(50): structlog.get_logger().info('a.b', text='x' * 10000)\n"
        "raise SystemExit(7)"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, stdout=write, stderr=subprocess.PIPE, timeout=60
    )
    os.close(write)
    assert done.returncode == 7
    assert done.stderr.decode().splitlines() == [
        "streamworker: the log's reader went away (Broken pipe); log lines are dropped"
    ]
