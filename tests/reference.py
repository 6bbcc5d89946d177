"""The pages of docs/ that follow from code. `make docs` writes them, a test holds them to it."""

from __future__ import annotations

from pathlib import Path

from streamworker.config import Settings, describe
from streamworker.kafka.acls import COMMANDS, acl_command
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


def rights() -> str:
    """Return docs/rights.md."""
    head = (
        "# Rights on Kafka\n\n"
        "What each command needs on a Kafka with ACLs, and no more; for the default names. READ and WRITE imply DESCRIBE.\n"
        "`streamworker check` and the start of `streamworker run` name each right of a worker that is missing, with the\n"
        "line below that gives it, for the names and the user of the configuration.\n\n"
        '* `WRITE` on the transactional ids is for `delivery = "exactly_once"` only.\n'
        "* Every topic of `topics.allowed_reply_to` is an events topic.\n"
        "* Before Apache Kafka 3.0 whoever writes needs `--operation IDEMPOTENT_WRITE --cluster` besides.\n"
        "* `DESCRIBE_CONFIGS` on the topics is not needed; with it, `check` can also see that a topic takes too small records.\n"
        "* `streamworker topics create` needs `CREATE` on the topics (or the cluster): an operator's right.\n"
    )
    settings = Settings()
    return head + "".join(
        f"\n## {command}\n\n| right | to |\n| --- | --- |\n"
        + "".join(f"| {right} | {right.purpose} |\n" for right in needed(settings))
        + "\n```console\n"
        + "".join(
            f"$ {acl_command(right, 'User:streamworker')} --bootstrap-server …\n"
            for right in needed(settings)
        )
        + "```\n"
        for command, needed in COMMANDS.items()
    )


PAGES = {"configuration.md": configuration, "metrics.md": metrics, "rights.md": rights}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
