"""The first new record of a log that lost its end, compared with the records that were read before."""

from __future__ import annotations

from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from aiokafka import TopicPartition as KafkaTopicPartition

from streamworker.kafka.read_records import ReadRecords, first_new_offset
from streamworker.model import TopicPartition
from tests.unit.kafka.fakes import settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

AT = TopicPartition("jobs", 0)


def records(timestamps: Mapping[int, int]) -> list[Any]:
    return [SimpleNamespace(offset=offset, timestamp=timestamp) for offset, timestamp in timestamps.items()]


class Log:
    """A consumer without a group over one partition: offset -> timestamp."""

    def __init__(self, timestamps: Mapping[int, int]) -> None:
        self._records = records(timestamps)
        self._position = 0

    def assign(self, _: list[Any]) -> None: ...

    def seek(self, _: Any, offset: int) -> None:
        self._position = offset

    async def position(self, _: Any) -> int:
        return self._position

    async def getmany(self, at: Any, **_: Any) -> dict[Any, list[Any]]:
        found = [one for one in self._records if one.offset >= self._position][:2]
        self._position = found[-1].offset + 1
        return {at: found}

    async def offsets_for_times(self, times: dict[Any, int]) -> dict[Any, Any]:
        [(at, time)] = times.items()
        assert at == KafkaTopicPartition(*AT)
        return {at: next((one for one in self._records if one.timestamp >= time), None)}


@pytest.mark.parametrize(
    ("read", "log", "first"),
    [
        ({}, {0: 50}, 0),  # nothing was read: everything is new
        (
            {3: 13, 4: 14, 5: 15, 6: 16},
            {3: 13, 4: 14, 5: 95},
            5,
        ),  # new records follow the ones that were kept
        ({3: 13, 4: 14, 5: 15}, {3: 93, 4: 94, 5: 95, 6: 96}, 3),  # another log: the topic was created again
        ({3: 13, 4: 14, 5: 15, 6: 16}, {3: 13, 4: 14}, 5),  # only the end was lost
        ({8: 18, 9: 19}, {0: 10, 1: 11, 2: 92}, 2),  # the log ends before all that is remembered
        ({8: 18, 9: 19}, {0: 10, 1: 11}, 2),
    ],
)
async def test_first_new_record_is_found_by_offset_and_timestamp(
    monkeypatch: pytest.MonkeyPatch, read: dict[int, int], log: dict[int, int], first: int
) -> None:
    """Records that were read run only once, and no new record is skipped."""

    @asynccontextmanager
    async def open_log(*_: object) -> AsyncIterator[Any]:
        yield SimpleNamespace(consumer=Log(log))

    monkeypatch.setattr("streamworker.kafka.read_records.open_log", open_log)
    remembered = ReadRecords()
    remembered.add(cast("Any", records(read)))
    bounds = min(log), max(log) + 1

    assert await first_new_offset(settings().kafka, AT, remembered, bounds) == first


async def test_log_of_which_nothing_was_read_is_new_from_its_first_record() -> None:
    """Also without a reader's memory of the partition; the log is not opened."""
    assert await first_new_offset(settings().kafka, AT, None, (7, 9)) == 7


def test_remembered_records_are_bounded() -> None:
    """A thousand records are compared at most."""
    remembered = ReadRecords()
    remembered.add(cast("Any", records({offset: offset for offset in range(3000)})))

    assert remembered.first == 2000
    assert not remembered.has(records({1999: 1999})[0])
    assert remembered.has(records({2999: 2999})[0])
    assert not remembered.has(records({2999: 1})[0])
