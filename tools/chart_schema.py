"""The chart's schema of `config`, generated from the settings: a misspelt name is refused at install.

`python tools/chart_schema.py` writes it into helm/streamworker/values.schema.json, and keeps the rest of that file.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from streamworker.config import Settings  # noqa: E402 - found from the source tree

FILE = ROOT / "helm" / "streamworker" / "values.schema.json"

SECRET = re.compile(r"(api_key|access_key|token|secret|password)$")
"""Names of settings whose values are secrets: they come from the environment or from a file, never from `config`."""

NARROWED: dict[str, dict[str, dict[str, Any]]] = {
    "kafka": {"bootstrap_servers": {"pattern": r"^[^\s,:]+:[0-9]+(,[^\s,:]+:[0-9]+)*$"}},
    "upstream": {
        "base_url": {
            "pattern": r"^https?://[^/@?#\s]+(/[^?#\s]*)?$",
            "description": "Without credentials, which come from secretEnv.",
        },
        "api_key_env": {"$ref": "#/definitions/variable"},
    },
    "worker": {"drain_timeout_s": {"type": "integer"}},
    "gateway": {
        "drain_s": {"type": "integer"},
        "port": {"minimum": 1024, "description": "A user without privileges cannot bind a port below 1024."},
    },
    "telemetry": {
        "http_port": {
            "minimum": 1024,
            "description": "A user without privileges cannot bind a port below 1024.",
        }
    },
}
"""What the chart asks for besides: whole seconds, from which it derives others, and ports of a user without privileges."""

CHART_OWN = {"gateway": {"host", "keys_file", "token_secrets_file", "auth"}}
"""Settings that the chart sets itself."""


def config_schema() -> dict[str, Any]:
    """Return the JSON Schema of the value `config`. Every setting may be null, which stands for its default."""
    whole = Settings.model_json_schema()
    sections = {
        name: _section(whole, _named(member), name)
        for name, member in whole["properties"].items()
        if name != "upstreams"
    }
    upstream = _section(whole, "UpstreamSettings", "upstream")
    (pattern,) = whole["properties"]["upstreams"]["patternProperties"]
    upstreams = {
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"pattern": pattern},
        "additionalProperties": upstream,
    }
    sections["upstreams"] = upstreams
    return {
        "type": "object",
        "additionalProperties": False,
        "description": "Generated from the settings by `make docs`.",
        "properties": {name: sections[name] for name in whole["properties"]},
    }


def _named(member: dict[str, Any]) -> str:
    reference: str = member["$ref"] if "$ref" in member else member["allOf"][0]["$ref"]
    return reference.rpartition("/")[2]


def _section(whole: dict[str, Any], definition: str, name: str) -> dict[str, Any]:
    given = whole["$defs"][definition]["properties"]
    needed = whole["$defs"][definition].get("required", [])
    own = CHART_OWN.get(name, set())
    section: dict[str, Any] = {
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {
            setting: _setting(member, NARROWED.get(name, {}).get(setting, {}))
            for setting, member in given.items()
            if setting not in own and not SECRET.search(setting)
        },
    }
    return section | ({"required": needed} if needed else {})


def _setting(member: dict[str, Any], narrowed: dict[str, Any]) -> dict[str, Any]:
    """Return a setting's schema without its default, narrowed, and with null besides."""
    kept = {key: value for key, value in member.items() if key not in {"default", "title", "format"}}
    choices = kept.pop("anyOf", None)
    if choices is not None:
        (first,) = [choice for choice in choices if choice.get("type") != "null"]
        kept |= {key: value for key, value in first.items() if key != "format"}
    if kept.get("type") == "array" and "minLength" in kept:
        kept["minItems"] = kept.pop("minLength")
    if "$ref" in narrowed:
        return {"anyOf": [narrowed, {"type": "null"}], "description": kept.get("description", "")}
    kept |= narrowed
    if "enum" in kept:
        kept.pop("type", None)
        kept["enum"] = [*kept["enum"], None]
    elif "const" in kept:
        kept["enum"] = [kept.pop("const"), None]
    else:
        kept["type"] = [kept["type"], "null"]
    return kept


def rendered() -> str:
    """Return the whole file with the generated part."""
    schema = json.loads(FILE.read_text())
    schema["properties"]["config"] = config_schema()
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(rendered())
