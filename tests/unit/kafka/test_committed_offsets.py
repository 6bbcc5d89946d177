"""The committed offsets of a group whose coordinator is not known yet."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import pytest
from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.errors import GroupCoordinatorNotAvailableError, NotCoordinatorForGroupError
from aiokafka.structs import OffsetAndMetadata

from streamworker.errors import KafkaRefused, KafkaUnavailable
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
        self.answers: Iterator[dict[Any, Any]] = iter(())
        """The first answers; then the offset is committed."""
        self.requests = 0

    async def list_consumer_group_offsets(self, *_: object, **__: object) -> Any:
        self.requests += 1
        if (error := next(self.errors, None)) is not None:
            raise error
        if (answer := next(self.answers, None)) is not None:
            return answer
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


@pytest.fixture
def _written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every topic holds seven records."""

    async def bounds(*_: object) -> tuple[int, int]:
        return 0, 7

    monkeypatch.setattr(CommittedOffsets, "_bounds", bounds)


@pytest.mark.usefixtures("_written")
async def test_group_that_another_worker_has_begun_meanwhile_is_not_refused(admin: Admin) -> None:
    """Two workers of a new group start at once, and one of them reads the offsets before the other one commits them."""
    offsets = CommittedOffsets(settings(topics__jobs="jobs"), cast("Any", None))
    offsets._admin = cast("Any", admin)
    admin.answers = iter([{}])
    await offsets.check_start()

    assert admin.requests == 2


@pytest.mark.usefixtures("_written")
async def test_group_without_an_offset_that_stays_so_is_refused(admin: Admin) -> None:
    """With the number of records that would run again, and what to do."""
    offsets = CommittedOffsets(settings(topics__jobs="jobs"), cast("Any", None))
    offsets._admin = cast("Any", admin)
    admin.answers = iter([{}, {}])

    with pytest.raises(KafkaRefused, match="no committed offset on topic jobs, which holds 7 records"):
        await offsets.check_start()


async def test_group_without_an_offset_begins_where_nothing_was_ever_written(
    admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new installation whose jobs were submitted before its first worker started."""

    async def bounds(_: CommittedOffsets, topic: str) -> tuple[int, int]:
        return (0, 7) if topic == "jobs" else (0, 0)

    monkeypatch.setattr(CommittedOffsets, "_bounds", bounds)
    offsets = CommittedOffsets(settings(topics__jobs="jobs"), cast("Any", None))
    offsets._admin = cast("Any", admin)
    admin.answers = iter([{}])
    await offsets.check_start()

    assert admin.requests == 1


class Log:
    """A partition with the records 3 to 8, of which `restart` says where to read it anew."""

    restart: int | None = None

    def take_restart_offset(self, _: TopicPartition) -> int | None:
        return self.restart

    async def beginning(self, _: TopicPartition) -> int:
        return 3

    async def end(self, _: TopicPartition) -> int:
        return 9


@pytest.mark.parametrize(
    ("committed", "restart", "skips", "start"),
    [
        (CommitPoint(5, "map"), None, False, CommitPoint(5, "map")),
        (CommitPoint(5, "map"), None, True, CommitPoint(5, "map")),
        (
            CommitPoint(5, "map"),
            3,
            False,
            CommitPoint(3),
        ),  # the log was reset: the map is about other records
        (None, None, False, CommitPoint(3)),  # a partition that was added
        (None, None, True, CommitPoint(9)),
    ],
    ids=["committed", "committed with latest", "reset", "added", "latest"],
)
async def test_partition_begins_at_its_committed_offset_else_at_its_first_record(
    committed: CommitPoint | None, restart: int | None, skips: bool, start: CommitPoint
) -> None:
    """With worker.on_no_offset = latest, a topic without offsets begins at its end."""
    log = Log()
    log.restart = restart
    offsets = CommittedOffsets(settings(topics__jobs="jobs"), cast("Any", log))
    offsets._from_end = frozenset({"jobs"} if skips else ())

    assert await offsets.start_point(AT, committed) == start


@pytest.mark.parametrize("policy", ["earliest", "latest"])
async def test_group_without_an_offset_follows_the_policy(admin: Admin, policy: str) -> None:
    """Nothing is counted then."""
    offsets = CommittedOffsets(settings(worker__on_no_offset=policy, topics__jobs="jobs"), cast("Any", None))
    offsets._admin = cast("Any", admin)
    admin.answers = iter([{}])
    await offsets.check_start()

    assert admin.requests == 1
