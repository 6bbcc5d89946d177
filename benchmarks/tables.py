"""Write the figures of one run into both READMEs: `make bench ARGS="--out benchmarks"`, then `python -m benchmarks.tables`.

It reads figures.json. A block of a README is what stands between its two marks; all other text stays as it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from benchmarks.report import medians, table
from benchmarks.stage import Figures

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["SHOWN", "compared", "every_scenario", "read_figures", "replaced"]

FOLDER = Path(__file__).parent
SHOWN = ("300 streams × 5/s", "1,000 streams × 20/s")
"""The scenarios of the README's table."""

PEERS = {
    "limit": "limit",
    "streamworker": "**streamworker**",
    "naive": "aiokafka and the openai SDK",
    "faststream": "FastStream and the openai SDK",
}
BEGIN, END = "<!-- written by benchmarks.tables -->", "<!-- end -->"

_ABOUT = """\
Measured beside the first row's programs, in one run on two cores with Apache Kafka, the upstream and the reader on the same
machine (`make bench`; method, hardware and all scenarios are in [benchmarks/README.md](benchmarks/README.md)). *Limit* is a program without
timeouts, retries, checks and transactions.
"""
_HEAD = "| scenario | | CPU µs per delta | deltas/s per core | KiB per open stream |\n| --- | --- | ---: | ---: | ---: |"


def read_figures(file: Path) -> tuple[list[Figures], Mapping[str, Any]]:
    """Return the medians of all runs, and the description of the machine."""
    told = orjson.loads(file.read_bytes())
    return medians([Figures(**run) for run in told["runs"]]), told["machine"]


def compared(figures: Sequence[Figures]) -> str:
    """Return the block of README.md. Raises ValueError if a scenario or a contender of its table was not measured."""
    rows = [_HEAD]
    for scenario in SHOWN:
        found = {run.contender: run for run in figures if run.scenario == scenario}
        if missing := {"limit", "streamworker", "naive"} - set(found):
            raise ValueError(f"{scenario} was not measured for {', '.join(sorted(missing))}")
        for number, contender in enumerate(name for name in PEERS if name in found):
            rows.append(_row(scenario if number == 0 else "", found[contender]))
    return f"{_ABOUT}\n" + "\n".join(rows) + "\n"


def _row(scenario: str, run: Figures) -> str:
    share = re.search(r"\d+% of the deltas", run.fault or "")
    peer = PEERS[run.contender] + (f": {share[0]}, it falls behind" if share else "")
    memory = "–" if run.stream_kib is None else f"{run.stream_kib:.0f}"
    return f"| {scenario} | {peer} | {run.cpu_us:.1f} | {run.per_core:,.0f} | {memory} |".replace(
        "|  |", "| |"
    )


def every_scenario(figures: Sequence[Figures], machine: Mapping[str, Any]) -> str:
    """Return the block of benchmarks/README.md."""
    return (
        "### Every scenario, in one run\n\n"
        f"Measured on {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB, {machine['system']}, "
        f'Python {machine["python"]}; broker, upstream,\ncontender and reader share these cores (`make bench ARGS="--out benchmarks"`). '
        "`figures.json` has every run.\n\n"
        f"{table(figures)}\n\n![CPU µs per delta](cpu.svg)\n"
    )


def replaced(text: str, block: str) -> str:
    """Return the text with the block between its marks. Raises ValueError if it has not exactly one pair of marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in after:
        raise ValueError(f"the text must have one pair of {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{block}{END}{after}"


def main() -> None:
    """Write both files."""
    figures, machine = read_figures(FOLDER / "figures.json")
    for file, block in (
        (FOLDER.parent / "README.md", compared(figures)),
        (FOLDER / "README.md", every_scenario(figures, machine)),
    ):
        file.write_text(replaced(file.read_text("utf-8"), block), "utf-8")
        print(f"{file.relative_to(FOLDER.parent)}: written")


if __name__ == "__main__":
    main()
