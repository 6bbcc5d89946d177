"""Run JavaScript of the tests with packages that `package-lock.json` pins, installed once into the user's cache."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tests.brokers.requirement import need

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

__all__ = ["HERE", "modules", "node", "run_node", "running_node"]

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamworker-tests"
INSTALL_S = 300


@cache
def node() -> str:
    """Return the path of Node 20 or newer. Skips the test if there is none."""
    found = shutil.which("node")
    if found is None:
        need("Node 20 or newer is not on the PATH")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.removeprefix("v").partition(".")[0]) < 20:
        need(f"Node 20 or newer is needed; {found} is {version.strip()}")
    return found


@cache
def modules() -> Path:
    """Return the directory with the pinned packages. Skips the test if npm cannot install them."""
    node()
    lock = (HERE / "package-lock.json").read_bytes()
    kept = CACHE / f"node-{hashlib.sha256(lock).hexdigest()[:12]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "node.lock").open("w") as guard:  # test processes run side by side
        fcntl.flock(guard, fcntl.LOCK_EX)
        if not kept.is_dir():
            _install(kept)
    return kept / "node_modules"


def _install(kept: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        need("npm is not on the PATH, and the packages of tests/node are not installed")
    with tempfile.TemporaryDirectory(dir=CACHE) as fresh:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, fresh)
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(
            command, cwd=fresh, capture_output=True, text=True, timeout=INSTALL_S, check=False
        )
        if done.returncode != 0:
            need(f"npm ci failed in tests/node: {done.stderr[-500:]}")
        Path(fresh).rename(kept)
        Path(fresh).mkdir()  # for the context manager to remove


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "NODE_PATH": str(modules()), **variables}


@contextlib.asynccontextmanager
async def running_node(
    script: str | Path, *arguments: str, **variables: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a CommonJS file of this directory, or any file; yield the process. It is killed at the end."""
    command = (node(), str(HERE / script), *arguments)
    process = await asyncio.create_subprocess_exec(
        *command,
        env=_environment(variables),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 24,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def run_node(script: str | Path, *arguments: str, limit_s: float = 30, **variables: str) -> str:
    """Run a file to its end; return what it printed. Fails with its errors if it exits with another code than 0."""
    async with running_node(script, *arguments, **variables) as process, asyncio.timeout(limit_s):
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        return out.decode()
