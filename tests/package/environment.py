"""A fresh virtual environment with chosen packages: links to those of the environment that runs the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from packaging.requirements import Requirement

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Environment", "closure"]


class Environment(NamedTuple):
    """A virtual environment in `folder`."""

    folder: Path

    @classmethod
    def create(cls, folder: Path, packages: Iterable[str]) -> Environment:
        """Create it without pip, with links to the files of the installed `packages`."""
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
        environment = cls(folder)
        for name in packages:
            for file in distribution(name).files or ():
                top = file.parts[0]
                link = environment.site / top
                if top != ".." and not link.exists():
                    link.symlink_to(Path(str(distribution(name).locate_file(top))))
        return environment

    @property
    def site(self) -> Path:
        """The folder of installed packages."""
        paths = {"base": str(self.folder), "platbase": str(self.folder)}
        return Path(sysconfig.get_path("purelib", "venv", paths))

    def install(self, file: Path) -> None:
        """Install a distribution without its dependencies, from the file alone."""
        command = [
            str(Path(sys.executable).with_name("uv")),
            "pip",
            "install",
            "--quiet",
            "--offline",
            "--no-deps",
        ]
        command += ["--no-build-isolation", "--python", str(self.folder / "bin" / "python"), str(file)]
        subprocess.run(command, check=True, timeout=60, capture_output=True)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, outside the source tree; return output, messages and exit code."""
        program = self.folder / "bin" / command[0]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [program, *command[1:]],
            cwd=self.folder,
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


def closure(lines: Iterable[str]) -> set[str]:
    """Return the names of all packages that requirement lines install, those of their requirements included.

    Names are in lower case with `-`. A package that is not installed here is returned without its requirements.
    """
    seen: set[tuple[str, str]] = set()
    todo = [(Requirement(line), "") for line in lines]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = requirement.name.lower().replace("_", "-")
        for wanted in {"", *requirement.extras} - {found for known, found in seen if known == name}:
            seen.add((name, wanted))
            todo += [(Requirement(line), wanted) for line in _requires(name)]
    return {name for name, _ in seen}


def _requires(name: str) -> list[str]:
    try:
        return distribution(name).requires or []
    except PackageNotFoundError:
        return []
