"""The check for banned phrases that `make lint` runs."""

from __future__ import annotations

import pytest

from tools.banned_phrases import BANNED, checked_files, find


@pytest.mark.parametrize(
    ("line", "phrase"),
    [
        ('raise ValueError(f"{name} is no topic")', "is no topic"),
        ("# Whoever asks gets it.", "Whoever"),
        ('"""The job was let go."""', "let go"),
        ("def test_record_is_taken_up_twice() -> None:", "taken up"),
        ('"""A job record (contract §2)."""', "contract §"),
    ],
)
def test_phrase_that_is_banned_is_found_with_its_line(line: str, phrase: str) -> None:
    """Comments, texts and names are searched; words of a name are separated by underscores."""
    assert [(number, found) for number, found, _ in find(f"x = 1\n{line}\n")] == [(2, phrase)]


@pytest.mark.parametrize(
    "line",
    [
        "there is no job in the input",
        "a job is no longer open",
        "waits take up to 10 s",
        "x = own.code is no_slot.code",
    ],
)
def test_phrase_that_is_allowed_is_not_found(line: str) -> None:
    """Exceptions of the patterns are respected."""
    assert list(find(line)) == []


def test_checked_files_are_those_of_the_repository_without_the_list_itself() -> None:
    """The file with the list contains every phrase, so it is not checked."""
    names = [str(path) for path in checked_files(["tools/", "streamworker/telemetry/"])]

    assert "streamworker/telemetry/metrics.py" in names
    assert "tools/banned_phrases.py" not in names
    assert all(BANNED.values())
