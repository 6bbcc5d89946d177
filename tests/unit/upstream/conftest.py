"""Tests of this package run on an event loop with simulated time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.turnable import TurnableLoop

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pytest


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, type[TurnableLoop]]:
    """Return the only kind of loop used here."""
    return {"turnable": TurnableLoop}
