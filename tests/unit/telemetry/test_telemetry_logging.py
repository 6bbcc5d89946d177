"""Log lines: format, levels, secrets, and streams that cannot be written to."""

import io
import json
import logging
import os
import re
import subprocess
import sys
import time
from typing import Any, Literal

import msgspec
import pytest
import structlog

from streamworker.log_throttle import QUIET_S
from streamworker.model import Coordinates, Job, Status
from streamworker.redaction import Redactor
from streamworker.telemetry.logging import configure_logging
from streamworker.telemetry.rendering import MAX_INT_BITS, MAX_ITEMS, MAX_TEXT, render_json

CANARY = "canary-4f1c9a"
REDACT = Redactor([CANARY])


def job() -> Job:
    request = {"messages": msgspec.Raw(f'["{CANARY}"]'.encode())}
    return Job(job_id="j", source=Coordinates("t", 0, 1), timestamp=0, model="m", request=request)


def raised(text: str) -> Exception:
    prompt = f"local {text}"  # noqa: F841 - a local variable that must not be logged
    try:
        raise ValueError(text)  # noqa: TRY301 - the exception needs a frame
    except ValueError as error:
        return error


class Grumpy:
    def __str__(self) -> str:
        raise RuntimeError(CANARY)

    __repr__ = __str__


class GrumpyError(Exception):
    def __str__(self) -> str:
        raise RuntimeError(CANARY)


def test_line_in_json_format_begins_with_time_level_and_event(stream: Any) -> None:
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


def test_level_applies_to_own_loggers_and_libraries(stream: Any) -> None:
    configure_logging("json", "warning", stream)
    structlog.get_logger().info("a.b")
    logging.getLogger("a.library").info("quiet")
    structlog.get_logger().warning("c.d")
    logging.getLogger("a.library").warning("loud")
    assert [line["level"] for line in stream.lines()] == ["warning", "warning"]


def test_level_that_is_not_valid_raises() -> None:
    with pytest.raises(ValueError, match="'loud' is not a valid log level; use debug, info"):
        configure_logging("json", "loud")


def test_exception_in_json_format_has_frames_without_local_variables(stream: Any) -> None:
    configure_logging("json", stream=stream, redact=REDACT)
    structlog.get_logger().error("thing.failed", exc_info=raised(f"no {CANARY}"))
    line = stream.only()
    (exception,) = line["exception"]
    assert (exception["exc_type"], exception["exc_value"]) == ("ValueError", "no ***")
    assert [frame.keys() for frame in exception["frames"]] == [{"filename", "lineno", "name"}]
    assert exception["frames"][0]["name"] == "raised"
    assert "local" not in stream.getvalue().decode()


def test_exception_being_handled_is_added_to_its_line(stream: Any) -> None:
    configure_logging("json", stream=stream)
    empty: dict[str, int] = {}
    try:
        empty["k"]
    except KeyError:
        structlog.get_logger().exception("thing.failed")
    assert stream.only()["level"] == "error"
    assert stream.only()["exception"][0]["exc_type"] == "KeyError"


@pytest.mark.parametrize("format_", ["json", "console"])
def test_secret_in_any_position_is_removed(
    stream: Any, format_: Literal["json", "console"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        logging.getLogger(), "handlers", []
    )  # pytest's handlers raise the library's formatting errors
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


def test_secret_at_the_length_limit_is_removed_before_the_cut(stream: Any) -> None:
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
def test_value_of_any_type_is_rendered_or_replaced_by_its_type(
    stream: Any, value: object, shown: object
) -> None:
    configure_logging("json", stream=stream)
    structlog.get_logger().info("a.b", value=value)
    assert json.loads(stream.getvalue())["value"] == shown


def test_value_that_contains_itself_is_cut(stream: Any) -> None:
    configure_logging("json", stream=stream)
    ring: list[Any] = []
    ring.append(ring)
    structlog.get_logger().info("a.b", ring=ring)
    assert "<list>" in stream.getvalue().decode()


def test_event_that_cannot_be_rendered_gives_a_line_of_its_own(stream: Any) -> None:
    configure_logging("json", stream=stream)
    structlog.get_logger().info("a.b", failure=GrumpyError())
    assert stream.only() == {
        "level": "error",
        "event": "log.failed",
        "failed_event": "a.b",
        "reason": "RuntimeError",
    }


def test_renderer_with_values_that_orjson_refuses_uses_the_standard_library() -> None:
    value = {"big": 1 << 70, "half": "\ud800", "odd": Grumpy()}
    assert json.loads(render_json(None, "", value)) == {"big": 1 << 70, "half": "\ud800", "odd": "<Grumpy>"}


def test_record_of_a_library_is_rendered_as_library_logged(stream: Any) -> None:
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


def test_library_that_repeats_a_message_is_logged_once_per_interval(
    stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next line after the interval has the number of lines that were suppressed."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    configure_logging("json", stream=stream)
    library = logging.getLogger("aiokafka.conn")
    for _ in range(5):
        library.warning("connection to %s failed", "broker-1")
    library.warning("connection to %s failed", "broker-2")
    now += QUIET_S
    library.warning("connection to %s failed", "broker-1")

    assert [(line["message"][14:22], line.get("suppressed")) for line in stream.lines()] == [
        ("broker-1", None),
        ("broker-2", None),
        ("broker-1", 4),
    ]


@pytest.mark.parametrize(("level", "name"), [(25, "info"), (55, "critical"), (12, "debug")])
def test_level_of_a_library_without_a_name_is_rounded_down(stream: Any, level: int, name: str) -> None:
    configure_logging("json", "debug", stream)
    logging.getLogger("a.library").log(level, "x")
    assert stream.only()["level"] == name


def test_aiokafka_below_warning_is_dropped(stream: Any) -> None:
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


def test_httpx_log_of_each_request_is_dropped(stream: Any) -> None:
    configure_logging("json", "debug", stream)
    logging.getLogger("httpx").info("HTTP Request: POST ...")
    assert stream.lines() == []


def test_configure_logging_called_again_replaces_the_first_call(stream: Any) -> None:
    first = io.BytesIO()
    configure_logging("console", "info", first)
    log = structlog.get_logger().bind()
    log.info("a.b")
    written = first.getvalue()
    configure_logging("json", "info", stream, redact=REDACT)

    log.info("a.c", text=CANARY)
    logging.getLogger("a.library").info("x")

    assert first.getvalue() == written
    assert [line["event"] for line in stream.lines()] == ["a.c", "library.logged"]
    assert stream.lines()[0]["text"] == "***"


def test_console_format_is_readable_text_without_colors(stream: Any) -> None:
    configure_logging("console", stream=stream)
    structlog.get_logger().warning("job.failed", job_id="j-é", exc_info=raised("no"))
    written = stream.getvalue().decode()
    assert re.search(r"Z \[warning  \] job\.failed +job_id=j-é", written)
    assert "ValueError: no" in written
    assert "local" not in written
    assert "\x1b" not in written


@pytest.mark.parametrize(("is_terminal", "begin"), [(True, b"\x1b"), (False, b"{")])
def test_format_that_is_not_set_is_console_on_a_terminal_and_json_elsewhere(
    stream: Any, monkeypatch: pytest.MonkeyPatch, is_terminal: bool, begin: bytes
) -> None:
    """`telemetry.log_format` is empty by default."""
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    configure_logging("", stream=stream)
    structlog.get_logger().info("a.b")

    assert stream.getvalue().startswith(begin)


def test_stream_that_fails_raises_nothing() -> None:
    class Full(io.BytesIO):
        def write(self, _data: Any) -> int:
            raise OSError(28, "No space left on device")

    configure_logging("json", stream=Full())
    structlog.get_logger().info("a.b")
    closed = io.BytesIO()
    configure_logging("json", stream=closed)
    closed.close()
    structlog.get_logger().info("a.b")
    logging.getLogger("a.library").warning("x")


def test_process_without_stdout_logs_without_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    configure_logging("json")
    structlog.get_logger().info("a.b")


def test_reader_that_closes_the_pipe_changes_neither_the_run_nor_the_exit_code() -> None:
    """A warning on stderr reports that log lines are dropped."""
    program = (
        "import structlog; from streamworker.telemetry.logging import configure_logging; configure_logging('json')\n"
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
        "streamworker: log output was closed (Broken pipe); log lines are dropped"
    ]
