"""Static members of the group (KIP-345), as the pods of the chart's StatefulSet are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamworker.telemetry.metrics import PREFIX
from tests.integration.stage import InProcess, Stage, eventually

if TYPE_CHECKING:
    from collections.abc import Callable


def shown(worker: InProcess, name: str) -> float:
    return worker.app.metrics.registry.get_sample_value(PREFIX + name) or 0.0


def owns(worker: InProcess, count: int) -> Callable[[], bool]:
    return lambda: shown(worker, "partitions_owned") == count and shown(worker, "ready") == 1


async def test_static_member_that_comes_back_in_time_causes_no_rebalance(apache: Stage) -> None:
    """Its successor with the same instance id is assigned the same partition, and the other member does not rebalance."""
    await apache.open(partitions=2)
    session = {"worker__session_timeout_s": 20}
    async with apache.worker(worker__group_instance_id="ns.w-0", **session) as first:
        await eventually(owns(first, 2))
        async with apache.worker(worker__group_instance_id="ns.w-1", **session) as second:
            await eventually(owns(second, 1))
            await eventually(owns(first, 1))
            before = shown(first, "rebalances_total")
        async with apache.worker(worker__group_instance_id="ns.w-1", **session) as successor:
            await eventually(owns(successor, 1))
            for partition in (0, 1):
                await apache.submit(f"j{partition}", "practice?deltas=3", partition=partition)
            await apache.ended()
            assert shown(first, "rebalances_total") == before
    assert apache.breaches() == []
