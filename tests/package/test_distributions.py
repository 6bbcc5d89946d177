"""The wheel and the source distribution: what they contain, and that they work where they are installed."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import streamworker
from streamworker.cli.commands import COMMANDS as EVERY_COMMAND
from tests.package.environment import Environment, closure

ROOT = Path(__file__).parents[2]
SCHEMAS = sorted(path.name for path in (ROOT / "schemas").iterdir())

EXTRAS = {
    "batch": {"markdown-it-py", "mdurl", "pygments", "rich"},
    "demo": {"markdown-it-py", "mdurl", "noida-db", "pygments", "rich"},
    "gateway": {"cffi", "cryptography", "pycparser", "pyjwt"},
    "objects": {"obstore"},
    "tokenizer": {"bpe-openai"},
}
"""What each extra installs besides the required packages; `otel` has a test of its own."""

USES = {
    "batch": "from streamworker.cli.batch_progress import _Bar; _Bar(); print('works')",
    "demo": "from streamworker.demo import play, broker; assert broker.find_binary().is_file(); print('works')",
    "gateway": "from streamworker.gateway.tokens import _library; _library(); from cryptography import x509; print('works')",
    "objects": "from streamworker.gateway.batches.store import open_store; open_store('s3://bucket/files'); print('works')",
    "otel": "from streamworker.telemetry import otlp; print('works')",
    "tokenizer": "from streamworker.upstream.tokenizer import find_tokenizer; assert find_tokenizer().count('a b') == 2; print('works')",
}
"""What each extra is for, as a program that prints `works`."""

COMMANDS = {"demo": ("demo",)}
"""The commands that need an extra, as arguments that reach its import."""


def tracked() -> set[str]:
    """Return the files of the package and of schemas/ that belong to the project, by their paths in the wheel."""
    files = [path for path in (ROOT / "streamworker").rglob("*") if path.is_file()]
    package = {
        str(path.relative_to(ROOT))
        for path in files
        if "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    return package | {f"streamworker/schemas/{name}" for name in SCHEMAS}


def contents(wheel: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a wheel, besides those that describe it."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: hashlib.sha256(archive.read(name)).hexdigest()
            for name in archive.namelist()
            if ".dist-info/" not in name
        }


def test_wheel_contains_the_package_and_the_schemas_only(built: Path) -> None:
    """The marker of typed packages is among them; tests and tools are not."""
    found = set(contents(next(built.glob("*.whl"))))

    assert found == tracked()
    assert "streamworker/py.typed" in found


def test_version_is_stated_once(built: Path, project: dict[str, Any]) -> None:
    """`streamworker.__version__` is the version of both files; pyproject.toml has none of its own."""
    version = streamworker.__version__

    assert project["dynamic"] == ["version"]
    assert "version" not in project
    assert sorted(path.name for path in built.iterdir()) == [
        f"streamworker-{version}-py3-none-any.whl",
        f"streamworker-{version}.tar.gz",
    ]
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_source_distribution_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    """It needs no file besides its own."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "again")]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=60)

    again = contents(next((tmp_path / "again").glob("*.whl")))
    assert again == contents(next(built.glob("*.whl")))
    assert {path.name for path in source.iterdir()} == {
        ".gitignore", "CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "SECURITY.md",
        "docs", "pyproject.toml", "schemas", "streamworker",
    }  # fmt: skip


def test_image_builds_the_same_wheel_from_what_it_copies(built: Path, tmp_path: Path) -> None:
    """The build stage of the Dockerfile copies every file that the wheel is made from."""
    text = (ROOT / "Dockerfile").read_text()
    stage = text.partition(" AS wheel")[2].partition("\nFROM ")[0]
    for line in re.findall(r"^COPY (.*)$", stage, re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            if target in {"./", source}:
                (tmp_path / source).symlink_to(ROOT / source)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
    assert contents(next((tmp_path / "dist").glob("*.whl"))) == contents(next(built.glob("*.whl")))


def test_wheel_works_with_its_required_packages_alone(plain: Environment) -> None:
    """The installed program starts, lists its commands, and prints the schemas of the wheel."""
    assert (
        plain.run("streamworker", "--version").stdout == f"streamworker, version {streamworker.__version__}\n"
    )
    assert plain.run("python", "-m", "streamworker", "--version").returncode == 0
    helped = plain.run("streamworker", "--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert set(EVERY_COMMAND) <= set(re.findall(r"^  ([a-z-]+)  ", helped.stdout, re.MULTILINE))
    for name in set(SCHEMAS) - {"gateway.openapi.json"}:
        printed = plain.run("streamworker", "schema", name.partition(".")[0])
        assert printed.stdout == (ROOT / "schemas" / name).read_text()


def test_source_distribution_installs(built: Path, project: dict[str, Any], tmp_path: Path) -> None:
    """A packager may have the source only."""
    build = {"hatchling", "editables", *closure(["hatchling"])}
    environment = Environment.create(tmp_path / "venv", closure(project["dependencies"]) | build)
    environment.install(next(built.glob("*.tar.gz")))

    assert environment.run("streamworker", "schema").returncode == 0


def test_every_module_imports_with_the_required_packages_or_an_extra(plain: Environment) -> None:
    """A module that needs a package which pyproject.toml does not name fails here."""
    code = (
        "import importlib, pkgutil, warnings, streamworker\n"
        "for module in pkgutil.walk_packages(streamworker.__path__, 'streamworker.'):\n"
        "    try:\n"
        "        importlib.import_module(module.name)\n"
        "    except ModuleNotFoundError as error:\n"
        "        print(error.name.partition('.')[0])\n"
    )
    done = plain.run("python", "-c", code)
    extras = {"bpe_openai", "cryptography", "jwt", "noida_db", "obstore", "opentelemetry", "rich"}

    assert done.returncode == 0, done.stderr
    assert {"rich"} <= set(done.stdout.split()) <= extras


@pytest.mark.parametrize("extra", COMMANDS)
def test_command_without_its_extra_says_what_to_install(plain: Environment, extra: str) -> None:
    """One line, without a traceback, and exit code 1."""
    done = plain.run("streamworker", *COMMANDS[extra])

    assert done.returncode == 1
    assert f"pip install 'streamworker[{extra}]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_traces_without_their_extra_say_what_to_install(plain: Environment) -> None:
    """`telemetry.traces` is a setting, so its fault is one of the configuration."""
    code = (
        "from streamworker.app import open_tracing\n"
        "from streamworker.config import load\n"
        "from streamworker.errors import ConfigurationError\n"
        "try:\n"
        "    open_tracing(load(None, {'STREAMWORKER_TELEMETRY__TRACES': 'otlp'}, needs_keys=False))\n"
        "except ConfigurationError as error:\n"
        "    print(error)\n"
    )
    done = plain.run("python", "-c", code)

    assert "pip install 'streamworker[otel]'" in done.stdout, done.stderr


def test_tokenizer_without_its_extra_is_left_out(plain: Environment) -> None:
    """Estimates are then in bytes, as the documentation says."""
    code = "from streamworker.upstream.tokenizer import find_tokenizer; print(find_tokenizer())"

    assert plain.run("python", "-c", code).stdout == "None\n"


def environment_of(extra: str, project: dict[str, Any], built: Path, folder: Path) -> Environment:
    """Install the wheel with its required packages and those of one extra, and no other package."""
    lines = [*project["dependencies"], *project["optional-dependencies"][extra]]
    environment = Environment.create(folder, closure(lines))
    environment.install(next(built.glob("*.whl")))
    return environment


@pytest.mark.parametrize("extra", USES)
def test_extra_is_enough_for_what_it_is_for(
    extra: str, project: dict[str, Any], built: Path, plain: Environment, tmp_path: Path
) -> None:
    """The wheel and the extra in a fresh environment can do it; the wheel alone cannot."""
    done = environment_of(extra, project, built, tmp_path / "venv").run("python", "-c", USES[extra])

    assert (done.returncode, done.stdout) == (0, "works\n"), done.stderr
    assert plain.run("python", "-c", USES[extra]).stdout == ""


def test_wheel_offers_the_extras_of_the_project(built: Path, project: dict[str, Any]) -> None:
    """Each extra has its packages and those of no other extra in the metadata that installers read."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    declared = project["optional-dependencies"]

    assert set(metadata.get_all("Provides-Extra", [])) == set(USES) == set(declared)
    for extra, lines in declared.items():
        offered = {
            one.name
            for one in required
            if one.marker and "extra" in str(one.marker) and one.marker.evaluate({"extra": extra})
        }
        assert offered == {Requirement(line).name for line in lines}


@pytest.mark.parametrize("extra", EXTRAS)
def test_extra_installs_no_more_than_its_packages(project: dict[str, Any], extra: str) -> None:
    """A new requirement of a requirement is seen here before users download it."""
    required = closure(project["dependencies"])
    added = closure(project["optional-dependencies"][extra]) - required

    assert added <= EXTRAS[extra]
    assert set(EXTRAS) | {"otel"} == set(project["optional-dependencies"])


def test_traces_install_the_exporter_over_http_only(project: dict[str, Any]) -> None:
    """The exporter over gRPC would add 10 MB."""
    added = closure(project["optional-dependencies"]["otel"]) - closure(project["dependencies"])

    assert "opentelemetry-exporter-otlp-proto-http" in added
    assert not any("grpc" in name for name in added)
    assert len(added) <= 15
