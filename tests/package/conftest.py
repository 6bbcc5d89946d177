"""The distributions, built once, and environments that they are installed into."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.package.environment import Environment, closure

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def project() -> dict[str, Any]:
    """Return the table `project` of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build wheel and source distribution; return their folder."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    return folder


@pytest.fixture(scope="session")
def plain(project: dict[str, Any], built: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Install the wheel with its required packages and no extra."""
    folder = tmp_path_factory.mktemp("plain") / "venv"
    environment = Environment.create(folder, closure(project["dependencies"]))
    environment.install(next(built.glob("*.whl")))
    return environment
