import contextlib
import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.deploy.tools import compose_loader, promtool

ROOT = Path(__file__).parents[2]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Get the tools before the first test, because a download or a build may exceed the time limit of a test."""
    wanted = any(item.path.parent == Path(__file__).parent for item in session.items)
    if wanted and not session.config.option.collectonly:
        for tool in (promtool, compose_loader):
            with contextlib.suppress(pytest.skip.Exception, pytest.fail.Exception):  # each test reports it
                tool()


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


def module(name: str) -> ModuleType:
    """Import a module with a native tool. If that fails, skip the test, or fail it with STREAMWORKER_TEST_REQUIRE=all."""
    try:
        return importlib.import_module(name)
    except Exception as broken:  # noqa: BLE001  each module has its own error for a library of another architecture
        reason = f"{name} cannot be loaded: {broken}"
        if os.environ.get("STREAMWORKER_TEST_REQUIRE") == "all":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def helm() -> ModuleType:
    """Helm as a library."""
    return module("helm_python")


@pytest.fixture(scope="session")
def kubernetes() -> ModuleType:
    """The schemas of every Kubernetes version."""
    return module("kubernetes_validate")


@pytest.fixture(scope="session")
def chart_values(root: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((root / "helm/streamworker/values.yaml").read_text())
    return values
