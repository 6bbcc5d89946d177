"""What `streamworker tail` says while it waits for the events of a job that has started."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from streamworker.cli import shared
from streamworker.cli.commands import cli
from streamworker.cli.tail import _next
from streamworker.client import Delta, Event, Restarted, Started
from streamworker.wire.json import encode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SOON_S, LATE_S = 0.0, 0.1
NO_DELTA = "the job has started and has no delta yet"
PAUSE = "no event for a while"


@pytest.fixture(autouse=True)
def _short_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "HINT_S", 0.02)
    monkeypatch.setattr(shared._LAST_ERROR, "text", "")


def event(kind: type[Event], attempt: str) -> Event:
    return kind(encode({"job_id": "j", "attempt": attempt, "seq": 0}), 0)


async def delivered(events: list[tuple[float, Event]]) -> AsyncIterator[Event]:
    for seconds, one in events:
        await asyncio.sleep(seconds)
        yield one


@pytest.mark.parametrize(
    ("events", "hints"),
    [
        ([(SOON_S, event(Delta, "a")), (SOON_S, event(Delta, "a"))], []),
        ([(LATE_S, event(Delta, "a"))], [NO_DELTA]),
        ([(SOON_S, event(Delta, "a")), (LATE_S, event(Delta, "a")), (LATE_S, event(Delta, "a"))], [PAUSE]),
        ([(LATE_S, event(Delta, "a")), (LATE_S, event(Delta, "a"))], [NO_DELTA, PAUSE]),
        (
            [
                (SOON_S, event(Delta, "a")),
                (LATE_S, event(Restarted, "b")),
                (LATE_S, event(Delta, "b")),
                (LATE_S, event(Delta, "b")),
            ],
            [PAUSE, NO_DELTA, PAUSE],
        ),
    ],
)
async def test_wait_within_a_job_is_explained_once_per_attempt(
    events: list[tuple[float, Event]], hints: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first delta of an attempt, and once after it: a slow stream does not fill the screen with messages."""
    stream, said = delivered(events), set[tuple[str, bool]]()
    last: Event = event(Started, "a")
    for _ in events:
        last = await _next(stream, last, said)
    lines = capsys.readouterr().err.splitlines()

    assert [next(hint for hint in (NO_DELTA, PAUSE) if hint in line) for line in lines if line] == hints
    assert all("Ctrl-C ends" in line for line in lines if line)


@pytest.mark.parametrize("command", ["tail", "cancel"])
@pytest.mark.parametrize("job_id", ["bad job id!", "x" * 201, "", "a/b", "j\n"])
def test_id_that_no_job_can_have_is_bad_usage(command: str, job_id: str) -> None:
    """Nothing is read: the command would wait for an event that cannot come."""
    result = CliRunner().invoke(cli, [command, job_id])

    assert result.exit_code == 2
    assert "is not a valid job id: 1 to 200 of A-Z a-z 0-9 . _ : -" in result.output
