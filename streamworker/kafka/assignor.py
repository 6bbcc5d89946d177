"""A sticky assignor that sticks.

aiokafka's own keeps each member's assignment on the class, so that all consumers of a process share one, and nobody
tells it the generation, so that a stale member's claims tie with live ones (aiokafka #1175, #1176). Here every
consumer gets a class of its own, and the consumer adapter calls `on_generation_assignment`.
"""

from __future__ import annotations

from typing import Any

from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor

__all__ = ["new_sticky_assignor"]


def new_sticky_assignor() -> Any:
    """Return an assignor class for one consumer."""
    return type("Sticky", (StickyPartitionAssignor,), {"member_assignment": None, "generation": -1})
