"""A served gateway per test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.unit.gateway.served import Served, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Served]:
    """A gateway with the default settings, four keys, and one secret for read tokens."""
    async with served(tmp_path) as running:
        yield running
