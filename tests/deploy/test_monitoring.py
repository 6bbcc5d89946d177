"""Alerts and dashboard: that they are well formed, that each alert fires when it should, and that somebody knows what to do then."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring import dashboard
from streamworker.telemetry.metrics import PREFIX, TABLE
from tests.deploy.tools import promtool
from tests.queries import ALERTS, DASHBOARD, questions, rules

SCENARIOS = Path(__file__).with_name("alerts_test.yaml")


def told(*arguments: str | Path) -> str:
    done = subprocess.run([promtool(), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_alert_fires_when_it_should_and_no_other_does() -> None:
    """Prometheus' own reading of made-up hours, failures and what looks like them."""
    assert "SUCCESS" in told("test", "rules", SCENARIOS)


def test_rules_and_scrapes_are_what_prometheus_reads(root: Path, tmp_path: Path) -> None:
    """With the paths as compose mounts them."""
    config = yaml.safe_load((root / "monitoring/prometheus.yaml").read_text())
    assert config.pop("rule_files") == ["/etc/prometheus/alerts.yaml"]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump({**config, "rule_files": [str(ALERTS)]}))

    assert f"{len(rules())} rules found" in told("check", "config", tmp_path / "prometheus.yaml")


def test_each_alert_has_a_scenario_in_which_it_fires() -> None:
    """A rule that nobody has seen fire is a hope."""
    cases = yaml.safe_load(SCENARIOS.read_text())["tests"]
    fired = {
        name
        for case in cases
        for check in case["promql_expr_test"]
        for sample in check["exp_samples"]
        for name in re.findall(r'alertname="(\w+)"', sample["labels"])
    }

    assert fired == {rule["alert"] for rule in rules()}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_alert_says_how_urgent_it_is_and_where_to_read_on(root: Path, rule: dict[str, Any]) -> None:
    """The runbook has a section of the alert's name, which says what it means and what to do."""
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    sections = dict(
        re.findall(r"^### (\w+)\n\n(.+?)(?=^#|\Z)", (root / page).read_text(), re.MULTILINE | re.DOTALL)
    )

    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert {"summary", "description"} <= rule["annotations"].keys()
    assert anchor == rule["alert"].lower()
    assert re.search(r"^\*\*Means\.\*\* .+?\*\*Do\.\*\* ", sections[rule["alert"]], re.DOTALL)


def test_runbook_knows_of_no_alert_that_is_not_there(root: Path) -> None:
    sections = re.findall(r"^### (Streamworker\w+)$", (root / "docs/operations.md").read_text(), re.MULTILINE)

    assert sections == [rule["alert"] for rule in rules()]


def test_every_metric_that_is_asked_for_is_in_the_table() -> None:
    """What a running worker shows is held against the queries elsewhere; this names the slip without one."""
    known = {PREFIX + definition.name for definition in TABLE}
    histograms = {PREFIX + definition.name for definition in TABLE if definition.kind == "histogram"}
    asked = {selector.metric for question in questions() for selector in question.selectors}
    ours = {metric for metric in asked if metric.startswith(PREFIX)}

    assert ours - known - {f"{name}_bucket" for name in histograms} == set()
    assert ours & histograms == set(), "a histogram has no series of its own name"


def test_dashboard_is_the_one_that_its_source_makes() -> None:
    """`make docs` writes it."""
    assert dashboard.text() == DASHBOARD.read_text()


def test_panels_lie_side_by_side_and_say_what_they_ask() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["type"] == "row" or (panel["description"].endswith(".") and panel["targets"])

    assert len({panel["id"] for panel in panels}) == len(panels) == len({panel["title"] for panel in panels})
