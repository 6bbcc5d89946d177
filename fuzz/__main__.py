"""Fuzz each target: `python -m fuzz [--seconds N] [TARGET ...]`. Exits with 1 if a target failed."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from fuzz.seeds import seeds_of
from fuzz.targets import TARGETS

CACHE = Path(__file__).parents[1] / ".cache" / "fuzz"
MAX_BYTES = 4096


def main() -> int:
    """Run each target in a separate process: libFuzzer ends its process."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--seconds", type=int, default=60, help="seconds for each target; default: 60")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.targets) - set(TARGETS):
        parser.error(f"unknown targets: {', '.join(sorted(unknown))}")
    if given.inside:
        _fuzz(given.targets[0], given.seconds)
    failed = [name for name in given.targets or TARGETS if not _run(name, given.seconds)]
    print(f"failed: {', '.join(failed)}" if failed else "no failure")
    return 1 if failed else 0


def _run(name: str, seconds: int) -> bool:
    print(f"--- {name}: {TARGETS[name].__doc__}", flush=True)
    command = [sys.executable, "-m", "fuzz", "--inside", name, "--seconds", str(seconds)]
    return subprocess.run(command, check=False).returncode == 0


def _fuzz(name: str, seconds: int) -> None:
    import atheris

    corpus, finds = CACHE / name, CACHE / "finds"
    corpus.mkdir(parents=True, exist_ok=True)
    finds.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds_of(name)):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.instrument_all()
    options = (f"-max_total_time={seconds}", f"-max_len={MAX_BYTES}", "-print_final_stats=1", "-verbosity=0")
    atheris.Setup([name, *options, f"-artifact_prefix={finds}/{name}-", str(corpus)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
