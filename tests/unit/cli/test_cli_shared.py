"""Waiting for Kafka: a message after a while, an error after the time limit."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import pytest

from streamworker.cli import shared
from streamworker.cli.shared import hint, quietly, waiting, within
from streamworker.errors import KafkaUnavailable
from tests import turnable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture(autouse=True)
def _short_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "HINT_S", 0.02)
    monkeypatch.setattr(shared._LAST_ERROR, "text", "")


async def test_waiting_beyond_the_limit_prints_the_action_and_raises(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The message and the error name the action and the time limit."""
    with pytest.raises(
        KafkaUnavailable, match=r"reading jobs: no answer within 0\.05 s; is kafka\.bootstrap"
    ):
        async with waiting("reading jobs", 0.05):
            await asyncio.sleep(10)

    assert capsys.readouterr().err == "reading jobs, for at most 0.05 s ...\n"


async def test_waiting_that_ends_soon_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A command that works is quiet."""
    async with waiting("reading jobs", 10):
        pass
    await asyncio.sleep(0.04)

    assert capsys.readouterr().err == ""


async def test_waiting_with_a_timeout_of_its_own_lets_it_through() -> None:
    """Only the time limit of the command is translated."""
    with pytest.raises(TimeoutError, match="inner"):
        async with waiting("reading jobs", 10):
            raise TimeoutError("inner")


async def test_waiting_after_a_warning_of_aiokafka_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    """The library's last warning is the reason for the wait; it is not logged."""
    quietly()
    logging.getLogger("aiokafka.client").warning("Unable connect to %s", "broker-1:9092")
    with pytest.raises(KafkaUnavailable, match="last error: Unable connect to broker-1:9092"):
        async with waiting("reading jobs", 0.05):
            await asyncio.sleep(10)

    assert "last error: Unable connect to broker-1:9092" in capsys.readouterr().err


def test_within_limits_the_wait_for_each_item_and_not_the_whole() -> None:
    """Items that arrive in time are yielded, however long all of them take."""

    async def items() -> AsyncIterator[int]:
        for number in range(4):
            await asyncio.sleep(0.9)
            yield number
        await asyncio.sleep(10)

    async def read() -> list[int]:
        received = []
        with pytest.raises(KafkaUnavailable):
            async for item in within(items(), "reading", 1):
                received.append(item)  # noqa: PERF401 - the items before the error are what is tested
        return received

    assert turnable.run(read()) == [0, 1, 2, 3]


async def test_hint_of_a_short_block_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """The timer is cancelled at the end of the block."""
    with hint("connecting"):
        pass
    with hint("connecting again"):
        await asyncio.sleep(0.05)

    assert capsys.readouterr().err == "connecting again ...\n"
