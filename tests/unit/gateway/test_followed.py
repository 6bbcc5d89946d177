"""The readers of the followed partitions: what they note of the records that they pass on."""

from __future__ import annotations

from typing import Any

from aiokafka.structs import ConsumerRecord

from streamworker.gateway.log_options import LogOptions
from tests.integration.events import started
from tests.properties.test_event_log import World
from tests.properties.test_handover import Log


def record(offset: int, timestamp_type: int) -> Any:
    return ConsumerRecord("t", 0, offset, 0, timestamp_type, b"j", started("j"), None, 0, 0, ())


async def test_followed_partitions_know_by_the_latest_record_who_sets_the_timestamps() -> None:
    """The topic's setting may change. A batch without records, and a partition that is not read, say nothing of it."""
    log = await World(Log(), LogOptions(reads_all=True), 2).replica()
    followed: Any = log._followed
    tail = followed.tail
    seen = [followed.has_append_time]
    for records, end in (([record(0, 0), record(1, 1)], 2), ([], 3), ([record(3, 1), record(4, 0)], 5)):
        tail.on_records(0, records, end)
        seen.append(followed.has_append_time)
    followed._pause(0)
    tail.on_records(0, [record(5, 1)], 6)
    assert [*seen, followed.has_append_time] == [False, True, True, False, False]
    await log.stop()
