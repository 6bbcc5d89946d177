"""The public names: complete, documented, and loaded when they are first used."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import streamworker
import streamworker.client

PAGE = Path(__file__).parents[3] / "docs" / "python.md"


def test_package_exports_every_name_of_the_client() -> None:
    """And the errors and the reader besides."""
    names = set(streamworker.__all__)

    assert set(streamworker.client.__all__) < names
    assert all(getattr(streamworker, name) is not None for name in names)
    assert names <= set(dir(streamworker))


def test_package_has_no_other_names() -> None:
    """A misspelt name is an AttributeError, as in any module."""
    with pytest.raises(AttributeError, match="Clint"):
        streamworker.Clint  # noqa: B018


def test_page_lists_every_public_name_as_stable() -> None:
    """docs/python.md and `__all__` agree."""
    table = PAGE.read_text().partition("## What is stable")[2]
    listed = {
        name
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }

    assert listed == set(streamworker.__all__) - {"__version__"}


def test_importing_a_module_without_io_loads_neither_kafka_nor_http() -> None:
    """The rules for readers can be used without aiokafka."""
    code = (
        "import sys, streamworker, streamworker.reader, streamworker.handover\n"
        "print(sorted({'aiokafka', 'httpx', 'aiohttp', 'pydantic', 'structlog'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


def test_importing_the_client_loads_no_http_client() -> None:
    """It needs Kafka only."""
    code = "import sys, streamworker.client; print(sorted({'httpx', 'aiohttp', 'click'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"
