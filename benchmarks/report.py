"""Reports of the figures: a table, JSON, and an SVG chart."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import orjson

from benchmarks.processes import CPU_RESOLUTION_S
from benchmarks.stage import CONTENDERS, Figures

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["machine", "medians", "table", "write"]

_COLOURS = {
    "limit": "#8c8c8c",
    "streamworker": "#1f6feb",
    "with tokenizer": "#79b8ff",
    "with results": "#56d4c4",
    "naive": "#d1495b",
    "faststream": "#edae49",
}
_OTHER = "#c4b5fd"  # of another version
_LIBRARIES = ("aiokafka", "aiohttp", "httpx", "msgspec", "orjson", "uvloop", "openai", "faststream")


def machine() -> dict[str, Any]:
    """Return a description of the machine."""
    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "processor": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }


def medians(runs: Sequence[Figures]) -> list[Figures]:
    """Merge runs of the same contender and scenario: the median of each figure, and the fault of any run."""
    groups: dict[tuple[str, str], list[Figures]] = {}
    for run in runs:
        groups.setdefault((run.scenario, run.contender), []).append(run)
    return [_median(group) for group in groups.values()]


def _median(group: list[Figures]) -> Figures:
    taken: dict[str, Any] = {}
    for name in Figures._fields:
        values = [value for value in (getattr(run, name) for run in group) if value is not None]
        if not values or isinstance(values[0], str):
            taken[name] = values[0] if values else None
        else:
            taken[name] = median(values)
    return Figures(**taken)


def table(figures: Sequence[Figures]) -> str:
    """Return a table in Markdown, one row per contender and scenario."""
    head = (
        "| scenario | contender | CPU µs per delta | × limit | deltas/s per core | added latency p50 / p99 ms "
        "| KiB per open stream | note |"
    )
    rows = [head, "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |"]
    limits = {run.scenario: run.cpu_us for run in figures if run.contender == "limit"}
    for run in figures:
        limit = limits.get(run.scenario)
        cells = [
            run.scenario,
            run.contender,
            f"{run.cpu_us:.1f}",
            f"{run.cpu_us / limit:.2f}" if limit else "–",
            f"{run.per_core:,.0f}",
            f"{run.p50_ms:.1f} / {run.p99_ms:.1f}",
            "–" if run.stream_kib is None else f"{run.stream_kib:.0f}",
            _note(run),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _note(run: Figures) -> str:
    notes = [run.fault] if run.fault else []
    if run.cpu_us * run.deltas <= CPU_RESOLUTION_S * 1e6:
        notes.append("less CPU time than the kernel's resolution: an upper bound")
    if not run.offered:
        notes.append(f"{run.sustained:,.0f} deltas/s")
    if run.lag_ms is not None:
        notes.append(f"all open after {run.ramp_s:.1f} s; loop lag ≤ {run.lag_ms:.0f} ms")
    return "; ".join(notes)


def write(directory: Path, figures: Sequence[Figures], runs: Sequence[Figures]) -> None:
    """Write `figures.json` (every run, and the machine) and `cpu.svg`."""
    told = {"machine": machine(), "runs": [run._asdict() for run in runs]}
    (directory / "figures.json").write_bytes(orjson.dumps(told, option=orjson.OPT_INDENT_2) + b"\n")
    (directory / "cpu.svg").write_text(_picture(figures), "utf-8")


def _picture(figures: Sequence[Figures]) -> str:
    """Return an SVG chart with one bar per run. It needs no library, and its text can be compared by diff."""
    left, right, step, gap = 250, 640, 14, 10
    longest = max(run.cpu_us for run in figures)
    parts, y, scenario = [], 40, None
    for run in figures:
        if run.scenario != scenario:
            y += gap
            scenario = run.scenario
            parts.append(f'<text x="{left - 8}" y="{y + 10}" text-anchor="end">{escape(scenario)}</text>')
        width = max(1.0, run.cpu_us / longest * (right - left))
        colour = _COLOURS.get(run.contender, _OTHER)
        parts.append(f'<rect x="{left}" y="{y}" width="{width:.0f}" height="{step - 2}" fill="{colour}"/>')
        parts.append(f'<text x="{left + width + 6:.0f}" y="{y + 10}">{run.cpu_us:.0f}</text>')
        y += step
    legend = "".join(
        f'<rect x="{left + 100 * place}" y="22" width="10" height="10" fill="{_COLOURS[who.name]}"/>'
        f'<text x="{left + 14 + 100 * place}" y="31">{who.name}</text>'
        for place, who in enumerate(CONTENDERS)
    )
    title = f'<text x="{left}" y="14">CPU µs per delta, of the worker process only</text>'
    body = "\n".join([title, legend, *parts])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="700" height="{y + 20}" '
        f'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
