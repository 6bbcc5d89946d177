"""The consumer's membership in its group: heartbeats that a join overtakes, as the broker answers them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.protocol.group import LeaveGroupRequest

from streamworker.kafka.compat import FENCED_INSTANCE_ID, GROUP_MAX_SIZE_REACHED, Membership
from tests.turnable import quiet

if TYPE_CHECKING:
    from collections.abc import Callable

OK, ILLEGAL_GENERATION, UNKNOWN_MEMBER_ID, REBALANCE_IN_PROGRESS = 0, 22, 25, 27
KEPT, REJOINING, LOST = ("a", 7, False), ("a", 7, True), ("", -1, True)


class Stage:
    """A coordinator whose broker answers each heartbeat with `code`, and calls `meanwhile` before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.code = OK
        self.meanwhile: Callable[[], None] = lambda: None
        self.sent = self.heartbeats = 0
        self.requests: list[str] = []
        self.joining = asyncio.Event()
        monkeypatch.setattr(GroupCoordinator, "_send_req", self._send)
        monkeypatch.setattr(GroupCoordinator, "_do_rejoin_group", self._join)
        self.coordinator: Any = object.__new__(GroupCoordinator)
        self.coordinator.__dict__ |= {
            "group_id": "g",
            "member_id": "a",
            "generation": 7,
            "coordinator_id": 1,
            "_group_instance_id": None,
            "_rejoin_needed_fut": asyncio.get_running_loop().create_future(),
            "_closing": asyncio.get_running_loop().create_future(),
        }
        consumer = cast("Any", SimpleNamespace(_coordinator=self.coordinator))
        self.membership = Membership(consumer, on_heartbeat=self._answered)

    async def _send(self, *requests: Any) -> Any:
        self.sent += 1
        self.requests += [
            f"{type(request).__name__} {request._member_id}"
            for request in requests
            if isinstance(request, LeaveGroupRequest)
        ]
        self.meanwhile()
        await asyncio.sleep(0)
        return SimpleNamespace(error_code=self.code)

    async def _join(self, *_: Any) -> bool:
        await self.joining.wait()
        self.coordinator.generation += 1
        return True

    def _answered(self) -> None:
        self.heartbeats += 1

    @property
    def state(self) -> tuple[str, int, bool]:
        return (*self.membership.identity, bool(self.coordinator._rejoin_needed_fut.done()))

    def join(self) -> asyncio.Task[bool]:
        return asyncio.ensure_future(self.coordinator._do_rejoin_group(None))

    def rebalanced(self) -> None:
        self.coordinator.generation = 8


@pytest.fixture
async def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


@pytest.mark.parametrize(
    ("code", "is_answered", "state"),
    [
        (OK, True, KEPT),
        (REBALANCE_IN_PROGRESS, True, REJOINING),
        (ILLEGAL_GENERATION, False, LOST),
        (UNKNOWN_MEMBER_ID, False, LOST),
    ],
)
async def test_heartbeat_of_the_present_generation_is_handled_by_aiokafka(
    stage: Stage, code: int, is_answered: bool, state: tuple[str, int, bool]
) -> None:
    """The member joins anew, without its id if the group does not know it."""
    stage.code = code

    assert await stage.membership.heartbeat() is is_answered
    assert stage.state == state
    assert stage.heartbeats == is_answered


@pytest.mark.parametrize("code", [REBALANCE_IN_PROGRESS, ILLEGAL_GENERATION, UNKNOWN_MEMBER_ID])
async def test_heartbeat_that_a_new_generation_has_overtaken_changes_nothing(stage: Stage, code: int) -> None:
    """Its answer is about the generation before. The member id of the new one would be given up for it."""
    stage.code, stage.meanwhile = code, stage.rebalanced
    await stage.membership.heartbeat()

    assert stage.state == ("a", 8, False)


@pytest.mark.parametrize("code", [REBALANCE_IN_PROGRESS, ILLEGAL_GENERATION, UNKNOWN_MEMBER_ID])
async def test_heartbeat_whose_answer_arrives_during_a_join_changes_nothing(stage: Stage, code: int) -> None:
    """The join shows what the group knows of the member; another one after it would be in vain."""
    joins: list[asyncio.Task[bool]] = []
    stage.code = code
    stage.meanwhile = lambda: joins.append(stage.join())
    heartbeat = asyncio.ensure_future(stage.membership.heartbeat())
    await quiet()
    assert stage.membership.is_joining
    stage.joining.set()
    await asyncio.gather(heartbeat, *joins)

    assert stage.state == ("a", 8, False)
    assert not stage.membership.is_joining


async def test_static_member_that_the_group_does_not_know_asks_once_more_under_its_id(stage: Stage) -> None:
    """Without the id it would replace a process that holds its instance id now, and be replaced by it in turn."""
    stage.coordinator._group_instance_id = "pod-0"
    stage.code = UNKNOWN_MEMBER_ID
    await stage.membership.heartbeat()
    assert stage.state == ("a", -1, True)
    await stage.membership.heartbeat()

    assert stage.state == LOST


@pytest.mark.parametrize("code", [FENCED_INSTANCE_ID, GROUP_MAX_SIZE_REACHED])
async def test_refusal_of_a_code_that_aiokafka_does_not_know_is_noted(stage: Stage, code: int) -> None:
    """aiokafka raises "UnknownError" for it."""
    assert stage.membership.refusal == 0
    stage.code = code
    await stage.coordinator._send_req(None)

    assert stage.membership.refusal == code


async def test_heartbeat_is_not_sent_while_the_consumer_joins(stage: Stage) -> None:
    """The broker handles the requests of a connection in turn, and a join waits for the other members."""
    join = stage.join()
    await asyncio.sleep(0)

    assert not await stage.membership.heartbeat()
    assert (stage.sent, stage.membership.is_rejoining) == (0, True)
    stage.joining.set()
    await join
    assert await stage.membership.heartbeat()
    assert (stage.sent, stage.membership.is_rejoining) == (1, False)


async def test_join_that_fails_is_over(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that is away must not keep the member from asking for its membership for ever."""

    async def fails(*_: Any) -> bool:
        raise ConnectionError

    monkeypatch.setattr(GroupCoordinator, "_do_rejoin_group", fails)
    with pytest.raises(ConnectionError):
        await stage.coordinator._do_rejoin_group(None)

    assert not stage.membership.is_joining
    assert await stage.membership.heartbeat()


@pytest.mark.parametrize("gives_up", [False, True])
async def test_static_member_leaves_the_group_only_if_it_gives_its_instance_up(
    stage: Stage, *, gives_up: bool
) -> None:
    """aiokafka sends no LeaveGroup request for an instance: its successor is to find the group as it was."""
    stage.coordinator._group_instance_id = "pod-0"
    stage.coordinator._closing.set_result(None)
    if gives_up:
        stage.membership.give_up_instance()
    await stage.coordinator._maybe_leave_group()

    assert stage.requests == (["LeaveGroupRequest a"] if gives_up else [])
    assert stage.membership.identity == ("", -1)


async def test_member_asks_for_a_rebalance_while_it_handles_no_heartbeat(stage: Stage) -> None:
    """A promised partition that became idle."""
    stage.membership.request_rejoin()

    assert stage.state == REJOINING
