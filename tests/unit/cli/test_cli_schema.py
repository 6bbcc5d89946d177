"""`streamworker schema`, from the source tree and from a wheel."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

from click.testing import CliRunner

from streamworker.cli.commands import cli

ROOT = Path(__file__).parent.parent.parent.parent
SCHEMAS = {
    path.name.partition(".")[0]: path
    for path in (ROOT / "schemas").iterdir()
    if path.name != "gateway.openapi.json"  # the same document, as the gateway serves it
}


def test_schema_without_a_name_lists_every_schema() -> None:
    """The names are those of the files in schemas/."""
    result = CliRunner().invoke(cli, ["schema"])

    assert sorted(result.output.split()) == sorted(SCHEMAS)


def test_schema_with_a_name_prints_the_file() -> None:
    """JSON Schemas are valid JSON; the output is the file byte for byte."""
    for name, path in SCHEMAS.items():
        result = CliRunner().invoke(cli, ["schema", name])

        assert (result.exit_code, result.output) == (0, path.read_text())
        assert name in {"asyncapi", "gateway"} or json.loads(result.output)["$schema"]


def test_schema_with_an_unknown_name_lists_the_known_ones() -> None:
    """A wrong name is bad usage."""
    result = CliRunner().invoke(cli, ["schema", "jobs"])

    assert result.exit_code == 2
    assert "'jobs' is not a schema; there are control, event, job" in result.output


def test_wheel_contains_the_schemas(tmp_path: Path) -> None:
    """An installation from a wheel has no schemas/ folder beside the package."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (wheel,) = tmp_path.glob("*.whl")

    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    assert {path.name: path.read_bytes() for path in (ROOT / "schemas").iterdir()} == {
        name.removeprefix("streamworker/schemas/"): data
        for name, data in packed.items()
        if name.startswith("streamworker/schemas/")
    }
