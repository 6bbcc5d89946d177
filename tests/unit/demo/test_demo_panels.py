"""The demo's frames: every line has the width of the terminal, whatever the text."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

pytest.importorskip("rich", reason="needs the demo extra")

from rich.console import Console
from wcwidth import wcswidth

from streamworker.demo.board import Board
from streamworker.demo.display import FRAMES_PER_S, Lines, Panels, display_for
from streamworker.demo.jobs import DemoJob, practice_jobs
from streamworker.demo.panels import account, screen
from streamworker.demo.texts import GERMAN, GREEK, ITALIAN, JAPANESE, PORTUGUESE

TEXTS = [
    GERMAN.answer,
    JAPANESE.answer,
    GREEK.answer,
    ITALIAN.answer,
    PORTUGUESE.answer,
    "🐟👩\u200d🚀❤\ufe0f" * 60,
    "日" + "x" * 400,
    "e\u0301" * 90,
]
SIZES = [(80, 24), (140, 40), (60, 16), (39, 10), (200, 60), (81, 25)]


def console_of(width: int, height: int, **options: Any) -> Console:
    return Console(
        file=io.StringIO(), width=width, height=height, force_terminal=True, legacy_windows=False, **options
    )


def written(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def filled_board() -> Board:
    board = Board(lambda: 1.0)
    jobs = [DemoJob(f"job{number}", "streams", f"r-{number}", {}) for number in range(len(TEXTS))]
    board.submit(jobs, lambda _: "worker A")
    for number, text in enumerate(TEXTS):
        board.take({"type": "started", "job_id": f"r-{number}"})
        board.take({"type": "delta", "job_id": f"r-{number}", "delta": {"content": text}})
    return board


def frame(board: Board, width: int, height: int) -> list[str]:
    console = console_of(width, height, no_color=True, color_system=None)
    console.print(screen(console, board, "title " * 40, "act " * 60))
    return written(console).splitlines()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_frame_fits_the_terminal_and_its_borders_align(size: tuple[int, int]) -> None:
    """Measured with the rules of wcwidth, as terminals measure."""
    lines = frame(filled_board(), *size)
    width, height = size
    columns = max(1, width // 38)

    assert len(lines) <= height
    assert all(wcswidth(line) <= width for line in lines)
    rows = [line.rstrip() for line in lines if line[:1] in "╭│╰" and line[:1]]
    assert rows
    for row in rows:
        count = (row.count("│") if row[0] == "│" else row.count(row[0]) * 2) // 2
        assert wcswidth(row) == count * (width // columns), row


@pytest.mark.parametrize(("size", "shown"), [((80, 24), 8), ((140, 40), 8), ((60, 16), 2), ((39, 10), 1)])
def test_small_terminal_shows_fewer_panels_and_says_so(size: tuple[int, int], shown: int) -> None:
    """None of them is cut."""
    lines = frame(filled_board(), *size)
    text = "\n".join(lines)

    assert text.count("╭") == text.count("╰") == shown
    assert ("more jobs" in text) == (shown < 8)


def test_large_terminal_shows_more_of_each_text() -> None:
    """It uses the space."""

    def characters(*size: int) -> int:
        return sum(len(re.sub(r"[\s│╭╮╰╯─]", "", line)) for line in frame(filled_board(), *size)[3:])

    assert characters(140, 40) > 2 * characters(80, 24)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (
            {"status": "failed", "error": {"code": "upstream_rejected", "message": "Status 400."}},
            "Status 400.",
        ),
        (
            {"status": "rejected", "error": {"code": "invalid_job", "message": "request: is required"}},
            "is required",
        ),
    ],
)
def test_panel_without_text_says_why(end: dict[str, Any], reason: str) -> None:
    """An empty panel is a question."""
    board = Board(lambda: 1.0)
    board.submit([DemoJob("a", "fails", "r-a", {})], lambda _: "")
    assert "waiting for its first delta" in "\n".join(frame(board, 80, 24))
    board.take({"type": "usage", "job_id": "r-a", "usage": None, **end})

    assert reason in "\n".join(frame(board, 80, 24))
    assert end["status"] in "\n".join(frame(board, 80, 24))


def test_panel_of_a_new_attempt_names_it() -> None:
    """Beside the status, where it is not cut on 80 columns."""
    board = filled_board()
    board.take({"type": "started", "job_id": "r-0"})
    board.take({"type": "delta", "job_id": "r-0", "delta": {"content": "again"}})
    text = "\n".join(frame(board, 80, 24))

    assert "job0 streaming, attempt 2" in text
    assert "began again: attempt 2" in text


def test_account_has_a_row_per_job_with_its_calls() -> None:
    """The upstream's own count, else the tries of the terminal event."""
    board = filled_board()
    end = {
        "status": "completed",
        "usage": {"prompt_tokens": 3, "completion_tokens": 9},
        "tries": 1,
        "error": None,
    }
    board.take(
        {"type": "usage", "job_id": "r-0", "usage_source": "upstream", "observed": {"deltas": 9}, **end}
    )
    console = console_of(80, 24, no_color=True, color_system=None)
    console.print(account(board, {"r-0": 2}))
    rows = written(console).splitlines()

    assert len(rows) == 1 + len(TEXTS)
    assert rows[1].split() == ["job0", "completed", "9", "3/9", "upstream", "2"]
    assert all(wcswidth(row) <= 80 for row in rows)


async def test_screen_is_not_painted_again_without_a_change() -> None:
    """A board at rest costs nothing but the comparison."""
    import asyncio

    console = console_of(80, 24)
    board = filled_board()
    display = Panels(console, board, "title")
    async with display.running():
        await asyncio.sleep(3 / FRAMES_PER_S)
        size = console.file.tell()
        await asyncio.sleep(5 / FRAMES_PER_S)
        assert console.file.tell() == size > 0
        board.take({"type": "delta", "job_id": "r-0", "delta": {"content": "more"}})
        await asyncio.sleep(3 / FRAMES_PER_S)
        assert console.file.tell() > size


def test_output_that_is_not_a_terminal_gets_lines() -> None:
    """Also a terminal that cannot move its cursor."""
    board = Board(lambda: 1.0)
    plain = Console(file=io.StringIO(), force_terminal=False)
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})

    assert isinstance(display_for(plain, board, ""), Lines)
    assert isinstance(display_for(dumb, board, ""), Lines)
    assert isinstance(display_for(console_of(80, 24, _environ={"TERM": "xterm"}), board, ""), Panels)


def test_lines_say_what_matters_without_escape_sequences() -> None:
    """One line per start, first delta, loss, new attempt and end; `[` in a text is not read as markup."""
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    board = Board(lambda: 1.0)
    (job, *_) = practice_jobs("r")
    board.submit([job], lambda _: "worker B")
    display = Lines(console, board, "title")
    display.begin("Act [1]")
    view = board.take({"type": "started", "job_id": job.job_id})
    assert view is not None
    display.event(view, "started")
    board.take({"type": "delta", "job_id": job.job_id, "delta": {"content": "a"}})
    display.event(view, "first")
    (lost,) = board.lose("worker B", "worker B was killed")
    display.event(lost, "lost")
    board.take({"type": "started", "job_id": job.job_id})
    display.event(view, "started")
    error = {"code": "truncated", "message": "the connection broke"}
    board.take(
        {
            "type": "usage",
            "job_id": job.job_id,
            "status": "interrupted",
            "error": error,
            "observed": {"deltas": 1},
        }
    )
    display.event(view, "usage")

    assert written(console).splitlines() == [
        "Act [1]",
        "german    started on worker B",
        "german    first delta after 0 ms",
        "german    worker B was killed",
        "german    began again: attempt 2 on worker B",
        "german    interrupted after 1 deltas: truncated: the connection broke",
    ]
