"""The committed offsets of a group whose coordinator is not known yet."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import pytest
from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.errors import GroupCoordinatorNotAvailableError, NotCoordinatorForGroupError
from aiokafka.structs import OffsetAndMetadata

from streamworker.errors import KafkaUnavailable
from streamworker.kafka.committed_offsets import CommittedOffsets
from streamworker.model import CommitPoint, TopicPartition
from tests.unit.kafka.fakes import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

AT = TopicPartition("jobs", 0)


class Admin:
    """Raises `errors` one after another, then returns one committed offset."""

    def __init__(self) -> None:
        self.errors: Iterator[Exception] = iter(())
        self.requests = 0

    async def list_consumer_group_offsets(self, *_: object, **__: object) -> Any:
        self.requests += 1
        if (error := next(self.errors, None)) is not None:
            raise error
        return {KafkaTopicPartition(*AT): OffsetAndMetadata(7, "map")}


@pytest.fixture
def admin() -> Admin:
    return Admin()


@pytest.fixture
async def offsets(admin: Admin) -> CommittedOffsets:
    found = CommittedOffsets(settings(), cast("Any", None))
    found._admin = cast("Any", admin)
    return found


async def test_offsets_of_a_new_cluster_are_read_when_its_coordinator_is_there(
    admin: Admin, offsets: CommittedOffsets
) -> None:
    """The first request makes the cluster create the topic of the offsets: that is not an outage."""
    admin.errors = iter([GroupCoordinatorNotAvailableError()] * 5)

    assert await offsets.read(AT) == CommitPoint(7, "map")
    assert admin.requests == 6


async def test_offsets_without_a_coordinator_are_unavailable_after_three_seconds(
    admin: Admin, offsets: CommittedOffsets
) -> None:
    """A longer wait is logged by the caller."""
    admin.errors = iter([GroupCoordinatorNotAvailableError()] * 1000)
    began = asyncio.get_running_loop().time()
    with pytest.raises(KafkaUnavailable, match="COORDINATOR_NOT_AVAILABLE"):
        await offsets.read(AT)

    assert asyncio.get_running_loop().time() - began == pytest.approx(3, abs=0.3)


async def test_offsets_that_cannot_be_read_for_another_reason_are_unavailable_at_once(
    admin: Admin, offsets: CommittedOffsets
) -> None:
    """The caller decides when to ask again."""
    admin.errors = iter([NotCoordinatorForGroupError()])
    with pytest.raises(KafkaUnavailable):
        await offsets.read(AT)

    assert admin.requests == 1
