"""Get native tools that no Python package contains. Each is fetched or built once and kept in the user's cache."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from tests.brokers.requirement import need

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamworker-tests"
COMPOSE = Path(__file__).with_name("compose")

BUILD_S = 600


@cache
def promtool() -> str:
    """Return the path of promtool: from the PATH, or extracted from Debian's package. Skips the test if there is none."""
    if found := shutil.which("promtool"):
        return found
    kept = CACHE / "promtool"
    if not kept.is_file():
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            need("promtool is not on the PATH, and can be fetched from Debian's packages only")
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as fresh:
            if _run(["apt-get", "download", "prometheus"], fresh) and _run(
                ["apt-get", "update", "-qq"], fresh
            ):
                need("promtool is not on the PATH, and apt-get update failed")
            packages = list(Path(fresh).glob("*.deb"))
            if not packages and (fault := _run(["apt-get", "download", "prometheus"], fresh)):
                need(f"promtool is not on the PATH, and apt-get download failed: {fault}")
            (package,) = Path(fresh).glob("*.deb")
            if fault := _run(["dpkg-deb", "-x", str(package), fresh], fresh):
                need(f"promtool is not on the PATH, and its package cannot be opened: {fault}")
            (Path(fresh) / "usr/bin/promtool").rename(kept)
    return str(kept)


@cache
def compose_loader() -> str:
    """Return the path of compose's own loader, built from Go modules. Skips the test if it cannot be built."""
    sources = b"".join((COMPOSE / name).read_bytes() for name in ("main.go", "go.mod", "go.sum"))
    kept = CACHE / f"compose-{hashlib.sha256(sources).hexdigest()[:8]}"
    if not kept.is_file():
        if shutil.which("go") is None:
            need("the loader of the compose file needs Go on the PATH, once")
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as fresh:
            program = Path(fresh) / "compose"
            if fault := _run(
                ["go", "build", "-trimpath", "-buildvcs=false", "-o", str(program), "."], str(COMPOSE)
            ):
                need(f"the loader of the compose file cannot be built: {fault}")
            program.rename(kept)
    return str(kept)


def _run(command: list[str], directory: str) -> str:
    """Return the output of a command if it failed, else an empty string."""
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=BUILD_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{command[0]} did not end within {BUILD_S} s"
    return (done.stdout + done.stderr)[-2000:] or f"exit code {done.returncode}" if done.returncode else ""
