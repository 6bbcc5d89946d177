"""Write the pages of docs/ that are generated from code (`make docs`); a test compares them with the code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from streamworker.config import Settings, describe
from streamworker.kafka.acls import COMMANDS, acl_command
from streamworker.telemetry.gateway_metrics import GATEWAY_TABLE
from streamworker.telemetry.metrics import PREFIX, TABLE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streamworker.telemetry.metrics import Definition

DOCS = Path(__file__).parent.parent / "docs"
SCHEMAS = DOCS.parent / "schemas"


def configuration() -> str:
    """Return docs/configuration.md."""
    head = (
        "# Configuration\n\n"
        "A TOML file (`--config FILE`, or `STREAMWORKER_CONFIG`), overridden by environment variables\n"
        "`STREAMWORKER_<SECTION>__<NAME>`; for a map, `STREAMWORKER_UPSTREAMS__<NAME>__BASE_URL`. Lists may be\n"
        "comma-separated there. All faults of a configuration are reported at once, each with its path. Secrets come from\n"
        "the environment or from a file, never from the TOML file.\n\n"
        "| setting | default | meaning |\n| --- | --- | --- |\n"
    )
    return head + "".join(f"| `{path}` | {_code(default)} | {text} |\n" for path, default, text in describe())


def _code(default: str) -> str:
    """Return a default as Markdown. An empty string in backquotes would not be rendered."""
    return f"`{default}`" if default else "empty"


def metrics() -> str:
    """Return docs/metrics.md."""
    head = (
        "# Metrics\n\n"
        "Served at `/metrics`, with the `process_*` metrics of the Prometheus client (CPU, memory, open files; on Linux).\n"
        "Alerts and dashboard: [operations.md](operations.md#monitoring).\n\n"
    )
    return f"{head}## Worker\n\n{_table(TABLE)}\n## Gateway\n\n{_table(GATEWAY_TABLE)}"


def _table(table: Iterable[Definition]) -> str:
    head = "| metric | kind | labels | meaning |\n| --- | --- | --- | --- |\n"
    rows = (
        f"| `{PREFIX}{one.name}` | {one.kind} | {', '.join(f'`{label}`' for label in one.labels)} | {one.help} |\n"
        for one in table
    )
    return head + "".join(rows)


def acls() -> str:
    """Return docs/acls.md."""
    head = (
        "# Kafka ACLs\n\n"
        "The minimal permissions of each command, and of the Python client, on a Kafka with ACLs, for the default names. READ and WRITE imply DESCRIBE.\n"
        "`streamworker check` names each permission that a worker lacks, with the command below that grants it, for the names and\n"
        "the user of the configuration. `streamworker run` reports the same when the broker refuses a request.\n\n"
        '* `WRITE` on the transactional ids is needed with `delivery = "exactly_once"` only.\n'
        "* Every topic of `topics.allowed_reply_to` needs the permissions of the events topic.\n"
        "* A results topic (`topics.results`) needs `WRITE` by the worker, and `READ` by `audit` and by clients.\n"
        "* Before Apache Kafka 3.0 a principal that writes also needs `--operation IDEMPOTENT_WRITE --cluster`.\n"
        "* `DESCRIBE_CONFIGS` on the topics is optional. With it, `check` also finds a topic whose `max.message.bytes` is too small.\n"
        "* `streamworker topics create` needs `CREATE` on the topics (or the cluster), which is an operator's permission.\n"
    )
    settings = Settings()
    return head + "".join(
        f"\n## {command}\n\n| permission | purpose |\n| --- | --- |\n"
        + "".join(f"| {right} | {right.purpose} |\n" for right in needed(settings))
        + "\n```console\n"
        + "".join(
            f"$ {acl_command(right, 'User:streamworker')} --bootstrap-server …\n"
            for right in needed(settings)
        )
        + "```\n"
        for command, needed in COMMANDS.items()
    )


PAGES = {"configuration.md": configuration, "metrics.md": metrics, "acls.md": acls}


def openapi() -> str:
    """Return schemas/gateway.openapi.json: the YAML document as the gateway serves it."""
    document = yaml.safe_load((SCHEMAS / "gateway.openapi.yaml").read_text())
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
    (SCHEMAS / "gateway.openapi.json").write_text(openapi())
