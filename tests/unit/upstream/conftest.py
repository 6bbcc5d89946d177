"""Every test here runs on a loop whose time is turned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.turnable import TurnableLoop

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pytest


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, type[TurnableLoop]]:
    """Name the only kind of loop there is."""
    return {"turnable": TurnableLoop}
