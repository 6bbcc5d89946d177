"""The demo's board: texts, endings and figures of its jobs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from streamworker.demo.board import MAX_TEXT_CHARS, Board, JobView, printable
from streamworker.demo.jobs import DemoJob, practice_jobs, real_jobs
from streamworker.kafka.partitioner import partition_of

JOB = DemoJob("tea", "streams", "r-tea", {})


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def board_of(*jobs: DemoJob) -> tuple[Board, Clock]:
    clock = Clock()
    board = Board(clock)
    board.submit(jobs or [JOB], lambda _: "worker B")
    return board, clock


def started(job_id: str = "r-tea") -> dict[str, Any]:
    return {"type": "started", "job_id": job_id}


def delta(text: str, job_id: str = "r-tea", **members: Any) -> dict[str, Any]:
    return {"type": "delta", "job_id": job_id, "delta": {"content": text} | members}


def usage(status: str = "completed", job_id: str = "r-tea", **members: Any) -> dict[str, Any]:
    known = {"status": status, "usage": {"completion_tokens": 5}, "usage_source": "upstream", "error": None}
    return {"type": "usage", "job_id": job_id} | known | members


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\r\tc", "a b  c"),
        ("a\u2028b\x85c", "a b c"),
        ("\x1b[31mred\x07", "[31mred"),
        ("👩\u200d🚀", "👩🚀"),
        ("❤\ufe0f", "❤"),
        ("👍🏽", "👍"),
        ("a\u202eb", "ab"),
        ("猫 Ωμέγα", "猫 Ωμέγα"),
    ],
)
def test_text_that_moves_the_cursor_or_joins_is_removed(text: str, shown: str) -> None:
    """An upstream's text cannot clear the screen, and every character has one width in all terminals."""
    assert printable(text) == shown


def test_view_shows_reasoning_text_and_tool_calls_apart() -> None:
    """As the deltas bring them."""
    board, _ = board_of()
    board.take(started())
    calls = [{"function": {"name": "find", "arguments": ""}}, {"function": {"arguments": '{"a":'}}, {}]
    board.take(delta("", reasoning_content="hm "))
    board.take(delta("yes"))
    board.take(delta("", tool_calls=calls))
    view = board.views["r-tea"]

    assert (view.thoughts, view.text, view.tools) == ("hm ", "yes", ' find {"a":')


def test_second_attempt_voids_the_text_of_the_first_one() -> None:
    """And says so."""
    board, _ = board_of()
    for event in (started(), delta("old"), started(), delta("new")):
        board.take(event)
    view = board.views["r-tea"]

    assert (view.text, view.attempts, view.note) == ("new", 2, "began again: attempt 2")


def test_text_is_bounded() -> None:
    """A real upstream may send a book."""
    view = JobView(JOB, "")
    for _ in range(3):
        view.add({"content": "x" * MAX_TEXT_CHARS})

    assert len(view.text) == MAX_TEXT_CHARS


@pytest.mark.parametrize(
    ("events", "status"),
    [
        ([], "waiting"),
        ([started()], "waiting"),
        ([started(), delta("a")], "streaming"),
        ([started(), delta("", reasoning_content="a")], "streaming"),
        ([started(), delta("a"), usage("interrupted")], "interrupted"),
        ([usage("rejected")], "rejected"),
    ],
)
def test_status_has_a_word_for_every_state(events: list[dict[str, Any]], status: str) -> None:
    """Not only a colour."""
    board, _ = board_of()
    for event in events:
        board.take(event)

    assert board.views["r-tea"].status == status


def test_lost_jobs_are_those_of_the_worker_that_have_not_ended() -> None:
    """They keep their text until the next attempt begins, and are not counted as streams."""
    jobs = [DemoJob(name, "", f"r-{name}", {}) for name in ("open", "done")]
    board, _ = board_of(*jobs)
    for name in ("open", "done"):
        board.take(started(f"r-{name}"))
        board.take(delta("text", f"r-{name}"))
    board.take(usage(job_id="r-done"))
    lost = board.lose("worker B", "it was killed")
    view = board.views["r-open"]

    assert [one.job.name for one in lost] == ["open"]
    assert (view.status, view.text, view.note, board.open_streams) == ("waiting", "text", "it was killed", 0)
    assert board.lose("worker A", "") == []
    board.take(started("r-open"))
    board.take(delta("again", "r-open"))
    assert (view.status, view.attempts, board.open_streams) == ("streaming", 2, 1)


def test_reason_names_code_and_message_in_one_line() -> None:
    """An ending without an error has none."""
    board, _ = board_of()
    board.take(usage("failed", error={"code": "auth", "message": "no\nkey\x1b"}))

    assert board.views["r-tea"].reason == "auth: no key"
    assert JobView(JOB, "").reason == ""


def test_figures_are_those_of_the_last_two_seconds() -> None:
    """The rate falls to zero by itself; tokens are summed by their source."""
    board, clock = board_of()
    assert board.figures() == "0 streams   0 deltas/s   first delta -   tokens: -"
    board.take(started())
    clock.now += 0.25
    for _ in range(10):
        board.take(delta("a"))
    assert board.figures() == "1 streams   5 deltas/s   first delta 250 ms   tokens: -"
    clock.now += 2.5
    board.take(usage(usage_source="upstream_partial"))
    assert board.figures() == "0 streams   0 deltas/s   first delta 250 ms   tokens: 5 partial"
    assert board.totals() == "10 deltas   first delta 250 ms   tokens: 5 partial"
    assert board.is_finished


def test_events_of_other_jobs_are_ignored() -> None:
    """A configured broker may have a topic of that name."""
    board, _ = board_of()
    before = board.version

    assert board.take(started("other")) is None
    assert (board.version, board.deltas) == (before, 0)


def is_of_second(own: set[int], key: bytes) -> bool:
    return partition_of(key, 4) not in own


def test_practice_jobs_have_keys_for_their_worker() -> None:
    """Whatever partitions the two workers own."""
    jobs = practice_jobs("r")
    for own in ({0, 1}, {0, 2}, {3, 1}):
        for job in jobs:
            key = job.key(partial(is_of_second, own))
            assert (partition_of(key, 4) not in own) == job.goes_to_second
    assert sum(job.goes_to_second for job in jobs) == 3
    assert len({job.job_id for job in jobs}) == len(jobs) == 8


def test_real_jobs_name_the_model_and_no_worker() -> None:
    """They are not killed: each call is paid."""
    jobs = real_jobs("r", "some-model")

    assert {job.value["request"]["model"] for job in jobs} == {"some-model"}
    assert not any(job.goes_to_second for job in jobs)
