"""The pages of docs/ that follow from code. `make docs` writes them, a test holds them to it."""

from __future__ import annotations

from pathlib import Path

from streamworker.config import describe
from streamworker.telemetry.metrics import PREFIX, TABLE

DOCS = Path(__file__).parent.parent / "docs"


def configuration() -> str:
    """Return docs/configuration.md."""
    head = (
        "# Configuration\n\n"
        "A TOML file (`--config FILE`, or `STREAMWORKER_CONFIG`), overridden by environment variables\n"
        "`STREAMWORKER_<SECTION>__<NAME>`; for a map, `STREAMWORKER_UPSTREAMS__<NAME>__BASE_URL`. Lists may be\n"
        "comma-separated there. All faults are told at once, each with its path. Secrets come from the environment or\n"
        "from a file, never from the TOML.\n\n"
        "| setting | default | meaning |\n| --- | --- | --- |\n"
    )
    return head + "".join(f"| `{path}` | `{default}` | {text} |\n" for path, default, text in describe())


def metrics() -> str:
    """Return docs/metrics.md."""
    head = (
        "# Metrics\n\n"
        "Served at `/metrics`, with the `process_*` metrics of the Prometheus client (CPU, memory, open files; on Linux).\n"
        "Alerts and dashboard: [operations.md](operations.md#monitoring).\n\n"
        "| metric | kind | labels | meaning |\n| --- | --- | --- | --- |\n"
    )
    rows = (
        f"| `{PREFIX}{one.name}` | {one.kind} | {', '.join(f'`{label}`' for label in one.labels)} | {one.help} |\n"
        for one in TABLE
    )
    return head + "".join(rows)


PAGES = {"configuration.md": configuration, "metrics.md": metrics}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
