"""Parse every query of the dashboard and of the alert rules into metrics, label matchers and labels."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import promql_parser
import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ALERTS", "DASHBOARD", "Question", "Selector", "questions", "rules"]

FILES = Path(__file__).parent.parent / "helm/streamworker/files"
ALERTS, DASHBOARD = FILES / "alerts.yaml", FILES / "dashboard.json"

_VARIABLES = {"$__rate_interval": "5m", "$namespace": ".*", "$job": ".*"}


class Selector(NamedTuple):
    """One metric selector; `labels` maps label names to the patterns of their values."""

    metric: str
    labels: dict[str, str]


class Question(NamedTuple):
    """One query: its location, its selectors, and the labels that it groups by, matches by or shows."""

    where: str
    selectors: list[Selector]
    labels: set[str]


def rules() -> list[dict[str, Any]]:
    """Return the alert rules of all groups."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def questions() -> list[Question]:
    """Return every query of rules, panels and variables."""
    dashboard = json.loads(DASHBOARD.read_text())
    found = [
        _read(f"alert {rule['alert']}", rule["expr"], _shown(r"\$labels\.(\w+)", rule["annotations"]))
        for rule in rules()
    ]
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            shown = _shown(r"\{\{(\w+)\}\}", target["legendFormat"])
            found.append(_read(f"panel {panel['title']}", target["expr"], shown))
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert asked, variable
            found.append(_read(f"variable {variable['name']}", asked[1], {asked[2]}))
    return found


def _shown(pattern: str, text: object) -> set[str]:
    return set(re.findall(pattern, str(text)))


def _read(where: str, query: str, shown: set[str]) -> Question:
    for name, value in _VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query, f"{where}: {query}"
    nodes = list(_nodes(promql_parser.parse(query)))
    selectors = [_selector(node) for node in nodes if isinstance(node, promql_parser.VectorSelector)]
    return Question(where, selectors, shown.union(*map(_grouping, nodes)))


def _nodes(expression: Any) -> Iterator[Any]:
    found: list[Any] = []
    promql_parser.walk(expression, found.append)
    for node in found:
        yield node
        if isinstance(node, promql_parser.MatrixSelector):
            yield node.vector_selector


def _selector(node: Any) -> Selector:
    assert node.name, node
    exact = (
        promql_parser.MatchOp.Equal,
        promql_parser.MatchOp.NotEqual,
    )  # an excluded value must exist too
    return Selector(
        node.name,
        {
            matcher.name: re.escape(matcher.value) if matcher.op in exact else matcher.value
            for matcher in node.matchers.matchers
        },
    )


def _grouping(node: Any) -> set[str]:
    if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
        return set(node.modifier.labels)
    if isinstance(node, promql_parser.BinaryExpr) and node.modifier is not None:
        return set(node.modifier.matching.labels) if node.modifier.matching is not None else set()
    return set()
