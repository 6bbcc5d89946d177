"""What is shown of a batch's progress, without a terminal."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING

from streamworker.batch.progress import Progress
from streamworker.cli import batch_progress
from streamworker.cli.batch_progress import shown

if TYPE_CHECKING:
    import pytest

    from streamworker.batch.progress import Snapshot


class Engine:
    """The part of an engine that is shown."""

    phase = "reading requests.jsonl"
    lines = 12_345
    is_working = False

    def snapshot(self) -> Snapshot:
        return Progress(0.0).snapshot(1.0, total=10, completed=4, failed=1, in_flight=2, oldest=None)


async def show(
    mode: str, monkeypatch: pytest.MonkeyPatch, *, is_working: bool = True, seconds: float = 0.2
) -> None:
    """Show an engine's progress for a while, twenty times as fast."""
    monkeypatch.setattr(batch_progress, "HINT_S", 0.02)
    monkeypatch.setattr(batch_progress._Nothing, "interval_s", 0.05)
    async with shown(mode) as progress:
        engine = Engine()
        engine.is_working = is_working
        progress.engine = engine  # type: ignore[assignment]  # the part that is shown
        await asyncio.sleep(seconds)
        progress.note("a note")


async def test_plain_progress_is_a_line_per_interval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On standard error; standard output is for results."""
    await show("plain", monkeypatch)
    captured = capsys.readouterr()

    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == "batch: 5/10 done, 1 failed, 2 in flight, 0.0 lines/s, eta -"
    assert len(lines) >= 3
    assert lines[-1] == "a note"


async def test_progress_names_the_phase_before_lines_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A long input, or a long topic, is not silent."""
    await show("auto", monkeypatch, is_working=False)

    assert capsys.readouterr().err.startswith("batch: reading requests.jsonl (12,345 lines)\n")


async def test_json_progress_is_an_object_per_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Notes, too."""
    await show("json", monkeypatch)
    objects = [json.loads(line) for line in capsys.readouterr().err.splitlines()]

    assert objects[0] == {
        "type": "progress", "state": "working", "total": 10, "completed": 4, "failed": 1, "in_flight": 2,
        "lines_per_s": 0.0, "tokens_per_s": 0.0, "eta_s": None, "oldest": None,
    }  # fmt: skip
    assert objects[-1] == {"type": "note", "text": "a note"}


async def test_no_progress_shows_notes_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Errors and final numbers are always printed."""
    await show("none", monkeypatch)

    assert capsys.readouterr().err == "a note\n"


async def test_bar_without_rich_is_lines_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The extra is optional."""
    for name in ("rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    await show("bar", monkeypatch)
    lines = capsys.readouterr().err.splitlines()

    assert lines[0] == "--progress bar needs the extra `batch`: pip install 'streamworker[batch]'"
    assert lines[1].startswith("batch: 5/10 done")


async def test_bar_is_drawn_with_its_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where standard error is not a terminal, if it is asked for."""
    monkeypatch.setenv("COLUMNS", "200")
    await show("bar", monkeypatch)
    text = capsys.readouterr().err

    assert "5/10  50 % · 1 failed · 2 in flight · 0.0 lines/s · 0 tok/s · eta -" in text
    assert "a note" in text
