"""Reading single records of a log."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from streamworker.kafka.log import LogReader
from streamworker.model import TopicPartition

AT = TopicPartition("jobs", 0)


class FakeLog:
    """A consumer of one partition that returns `batch` records per fetch. `gaps` are offsets without a record."""

    def __init__(self, begin: int, end: int, *, gaps: frozenset[int] = frozenset(), batch: int = 10) -> None:
        self._begin, self._end = begin, end
        self._gaps = gaps
        self._batch = batch
        self._position = begin
        self.seeks: list[int] = []

    def assign(self, partitions: Any) -> None: ...

    async def beginning_offsets(self, partitions: Any) -> dict[Any, int]:
        return dict.fromkeys(partitions, self._begin)

    async def end_offsets(self, partitions: Any) -> dict[Any, int]:
        return dict.fromkeys(partitions, self._end)

    def seek(self, _: Any, offset: int) -> None:
        self.seeks.append(offset)
        self._position = offset

    async def position(self, _: Any) -> int:
        return self._position

    async def getmany(self, *_: Any, **__: Any) -> dict[Any, list[Any]]:
        offsets = range(self._position, min(self._position + self._batch, self._end))
        self._position = offsets.stop
        return {
            AT: [
                SimpleNamespace(
                    topic="jobs", partition=0, offset=offset, timestamp=0, key=None, value=b"", headers=()
                )
                for offset in offsets
                if offset not in self._gaps
            ]
        }


@pytest.mark.parametrize(
    ("offsets", "found", "seeks"),
    [
        ([5, 7, 6], [5, 6, 7], [5]),
        ([100, 118, 5000, 5001], [100, 118, 5000, 5001], [100, 5000]),
        ([0, 1, 5], [5], [5]),
        ([9998, 9999, 10_000], [9998, 9999], [9998]),
        ([40, 41, 42], [40, 42], [40]),
        ([50, 51, 65], [65], [50]),
        ([], [], []),
    ],
)
async def test_log_at_offsets_yields_the_existing_records_with_few_seeks(
    offsets: list[int], found: list[int], seeks: list[int]
) -> None:
    """Deleted records, records beyond the end and gaps of compaction are left out."""
    log = FakeLog(5, 10_000, gaps=frozenset({41, *range(50, 62)}))
    reader = LogReader(log, "jobs", [0])  # type: ignore[arg-type]

    assert [record.at.offset async for record in reader.at(AT, offsets)] == found
    assert log.seeks == seeks
