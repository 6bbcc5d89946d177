"""Test alert rules and dashboard: they are well formed, each alert fires in its scenario, and the runbook covers each one."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring import dashboard
from streamworker.telemetry.gateway_metrics import GATEWAY_TABLE
from streamworker.telemetry.metrics import PREFIX, TABLE
from tests.deploy.tools import promtool
from tests.queries import ALERTS, DASHBOARD, Question, questions, rules

SCENARIOS = Path(__file__).with_name("alerts_test.yaml")


def run_promtool(*arguments: str | Path) -> str:
    """Return the output of a successful run."""
    done = subprocess.run([promtool(), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_alert_fires_when_it_should_and_no_other_does() -> None:
    """promtool evaluates the rules over the scenarios: healthy hours, failures, and series that resemble failures."""
    assert "SUCCESS" in run_promtool("test", "rules", SCENARIOS)


def test_rules_and_scrape_config_are_accepted_by_prometheus(root: Path, tmp_path: Path) -> None:
    """promtool accepts the rules and the scrape configuration, with the paths that compose mounts."""
    config = yaml.safe_load((root / "monitoring/prometheus.yaml").read_text())
    assert config.pop("rule_files") == ["/etc/prometheus/alerts.yaml"]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump({**config, "rule_files": [str(ALERTS)]}))

    assert f"{len(rules())} rules found" in run_promtool("check", "config", tmp_path / "prometheus.yaml")


def test_each_alert_has_a_scenario_in_which_it_fires() -> None:
    """The scenarios make each rule fire at least once."""
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
def test_alert_has_severity_and_runbook_section(root: Path, rule: dict[str, Any]) -> None:
    """The alert has a severity and texts, and its runbook section states meaning and action."""
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    sections = dict(
        re.findall(r"^### (\w+)\n\n(.+?)(?=^#|\Z)", (root / page).read_text(), re.MULTILINE | re.DOTALL)
    )

    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert {"summary", "description"} <= rule["annotations"].keys()
    assert anchor == rule["alert"].lower()
    assert re.search(r"^\*\*Meaning\.\*\* .+?\*\*Action\.\*\* ", sections[rule["alert"]], re.DOTALL)


def test_runbook_has_the_sections_of_the_rules_in_their_order(root: Path) -> None:
    """The runbook describes no alert that does not exist."""
    sections = re.findall(r"^### (Streamworker\w+)$", (root / "docs/operations.md").read_text(), re.MULTILINE)

    assert sections == [rule["alert"] for rule in rules()]


def test_runbook_names_panels_that_exist(root: Path) -> None:
    """Every name in italics in the runbook is the title of a panel."""
    runbook = (root / "docs/operations.md").read_text().partition("## Runbook")[2]
    named = set(re.findall(r"(?<!\*)\*([A-Z][^*]+)\*(?!\*)", runbook))
    titles = {panel["title"] for panel in json.loads(DASHBOARD.read_text())["panels"]}

    assert named
    assert named - titles == set()


def test_query_metrics_are_in_the_metrics_table() -> None:
    """Every streamworker metric in a query exists; an integration test compares the queries with a running worker."""
    tables = (*TABLE, *GATEWAY_TABLE)
    known = {PREFIX + definition.name for definition in tables}
    histograms = {PREFIX + definition.name for definition in tables if definition.kind == "histogram"}
    asked = {selector.metric for question in questions() for selector in question.selectors}
    ours = {metric for metric in asked if metric.startswith(PREFIX)}

    assert ours - known - {f"{name}_{part}" for name in histograms for part in ("bucket", "sum")} == set()
    assert ours & histograms == set(), "a histogram has no series of its own name"


def test_every_metric_of_the_gateway_is_in_a_query() -> None:
    """A metric that neither an alert nor a panel uses is not looked at."""
    asked = {
        re.sub(r"_bucket$", "", selector.metric)
        for question in questions()
        for selector in question.selectors
    }

    assert {PREFIX + one.name for one in GATEWAY_TABLE if one.name.startswith("gateway_")} - asked == set()


@pytest.mark.parametrize("question", questions(), ids=lambda question: question.where)
def test_query_of_the_gateway_uses_labels_that_its_metrics_have(question: Question) -> None:
    """Labels of matchers, groups and legends are those of the table, or those that Prometheus adds."""
    labels = {PREFIX + one.name: set(one.labels) for one in GATEWAY_TABLE}
    found = [re.sub(r"_bucket$", "", one.metric) for one in question.selectors]
    if not any(name.startswith(f"{PREFIX}gateway_") for name in found):
        return
    known = {"job", "instance", "namespace", "pod", "le"}.union(*(labels[name] for name in found))

    assert question.labels <= known
    assert all(one.labels.keys() <= known for one in question.selectors)


def test_dashboard_file_equals_its_source() -> None:
    """`make docs` has been run since the source changed."""
    assert dashboard.text() == DASHBOARD.read_text()


def test_panels_do_not_overlap_and_have_descriptions() -> None:
    """Panels share no grid cell, fit the width, and have unique ids and titles, a description and queries."""
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
