"""Schemas of the custom resources that the chart renders, reduced from those that their projects publish.

`python -m tests.deploy.schemas` writes them again, from the Go modules that contain the definitions.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import yaml

__all__ = ["SOURCES", "Source", "schema"]

HERE = Path(__file__).parent


class Source(NamedTuple):
    """The definition of a kind: a Go module, and a file in it."""

    module: str
    file: str


_OPERATOR = "github.com/prometheus-operator/prometheus-operator@v0.85.0"
_CRDS = "example/prometheus-operator-crd/monitoring.coreos.com"

SOURCES = {
    "HTTPRoute": Source(
        "sigs.k8s.io/gateway-api@v1.3.0", "config/crd/standard/gateway.networking.k8s.io_httproutes.yaml"
    ),
    "PodMonitor": Source(_OPERATOR, f"{_CRDS}_podmonitors.yaml"),
    "PrometheusRule": Source(_OPERATOR, f"{_CRDS}_prometheusrules.yaml"),
    "ScaledObject": Source(
        "github.com/kedacore/keda/v2@v2.21.0", "config/crd/bases/keda.sh_scaledobjects.yaml"
    ),
}


def schema(kind: str) -> dict[str, Any]:
    """Return the schema of a kind. It refuses unknown members, which an API server would drop silently."""
    found: dict[str, Any] = _strict(json.loads((HERE / f"{kind}.json").read_text()))
    return found


def _strict(part: Any) -> Any:
    if isinstance(part, list):
        return [_strict(one) for one in part]
    if not isinstance(part, dict):
        return part
    strict = {name: _strict(value) for name, value in part.items()}
    # A member may have the name `properties`, so the type must be checked too.
    if isinstance(part.get("properties"), dict) and part.get("type") == "object":
        strict.setdefault("additionalProperties", False)
    return strict


def _reduced(part: Any) -> Any:
    if isinstance(part, list):
        return [_reduced(one) for one in part]
    if not isinstance(part, dict):
        return part
    prose = {"description", "default"} if "type" in part or "$ref" in part else set()
    kept = {
        name: _reduced(value)
        for name, value in part.items()
        if name not in prose and not name.startswith("x-")
    }
    if isinstance(pattern := part.get("pattern"), str):
        kept["pattern"] = pattern.replace(
            "^(?i)", "(?i)^"
        )  # Go accepts a flag anywhere, Python only in front
    if part.get("x-kubernetes-int-or-string"):
        kept["type"] = ["integer", "string"]
        kept.pop("anyOf", None)
    return kept


def _make(kind: str) -> None:
    module, file = SOURCES[kind]
    asked = subprocess.run(
        ["go", "mod", "download", "-json", module], capture_output=True, text=True, check=True
    )
    directory = Path(json.loads(asked.stdout)["Dir"])
    definition = yaml.safe_load((directory / file).read_text())
    (version,) = [version for version in definition["spec"]["versions"] if version["storage"]]
    whole = _reduced(version["schema"]["openAPIV3Schema"])
    whole["properties"].pop("status", None)
    whole["properties"]["metadata"] = {"type": "object", "additionalProperties": True}
    whole["properties"]["apiVersion"] = {"const": f"{definition['spec']['group']}/{version['name']}"}
    whole["properties"]["kind"] = {"const": kind}
    whole["required"] = ["apiVersion", "kind", "metadata", "spec"]
    head = {"$comment": f"{file} of {module}, Apache-2.0; without descriptions, defaults and status."}
    (HERE / f"{kind}.json").write_text(json.dumps({**head, **whole}, separators=(",", ":")) + "\n")


def make() -> None:
    """Write every schema."""
    for kind in SOURCES:
        _make(kind)
