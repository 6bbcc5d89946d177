"""The process's file-descriptor limit: raised if possible, logged if not."""

from __future__ import annotations

import resource

import pytest
from structlog.testing import capture_logs

from streamworker import descriptors
from streamworker.descriptors import RESERVE, raise_nofile_limit

UNLIMITED = resource.RLIM_INFINITY


class Limits:
    """A fake of the `resource` module, with limits of its own."""

    RLIM_INFINITY = resource.RLIM_INFINITY
    RLIMIT_NOFILE = resource.RLIMIT_NOFILE

    def __init__(self, soft: int, hard: int) -> None:
        self.now = (soft, hard)

    def getrlimit(self, _: int) -> tuple[int, int]:
        return self.now

    def setrlimit(self, _: int, limits: tuple[int, int]) -> None:
        assert limits[1] == self.now[1], "the hard limit must not change"
        self.now = limits


def allow(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> Limits:
    limits = Limits(soft, hard)
    monkeypatch.setattr(descriptors, "resource", limits)
    return limits


@pytest.mark.parametrize(
    ("soft", "hard", "after"),
    [
        (1024, 4096, 1000 + RESERVE),
        (1024, UNLIMITED, 1000 + RESERVE),
        (1000 + RESERVE, 4096, 1000 + RESERVE),
        (1000 + RESERVE - 1, 1000 + RESERVE, 1000 + RESERVE),
        (UNLIMITED, UNLIMITED, UNLIMITED),
    ],
)
def test_descriptors_soft_limit_is_raised_as_far_as_needed(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, after: int
) -> None:
    """The limit is never lowered, and nothing is logged."""
    limits = allow(monkeypatch, soft, hard)
    with capture_logs() as logs:
        assert raise_nofile_limit(1000)
    assert limits.now == (after, hard)
    assert logs == []


def test_descriptors_hard_limit_too_low_is_logged_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The soft limit is still raised to the hard limit."""
    limits = allow(monkeypatch, 256, 1024)
    with capture_logs() as logs:
        assert not raise_nofile_limit(1000)
    assert limits.now == (1024, 1024)
    (line,) = logs
    assert (line["event"], line["allowed"], line["needed"]) == ("descriptors.too_few", 1024, 1256)
    assert line["advice"] == "raise the hard limit (ulimit -Hn) to 1256, or lower worker.max_in_flight to 768"


def test_descriptors_limit_of_this_process_is_sufficient_for_one_stream() -> None:
    """The real `resource` module works; the hard limit stays as it was."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert raise_nofile_limit(1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] == before[1]
