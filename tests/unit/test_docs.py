"""Docs that can drift are held to the code."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from streamworker import __version__
from streamworker.cli.commands import cli
from tests.reference import DOCS, PAGES

ROOT = Path(__file__).parent.parent.parent
MARKDOWN = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("name", PAGES)
def test_reference_page_says_what_the_code_says(name: str) -> None:
    """`make docs` has been run since the code changed."""
    assert PAGES[name]() == (DOCS / name).read_text()


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_in_docs_lead_somewhere(page: Path) -> None:
    """Every relative link names a file that is there."""
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())

    assert [link for link in links if not (page.parent / link).exists()] == []


def test_commands_in_docs_exist_with_their_options() -> None:
    """Every `streamworker …` line of the docs parses as a command, with options that it has."""
    lines = re.findall(
        r"^(?:\$ )?streamworker ([^\n`#]+)", "\n".join(page.read_text() for page in MARKDOWN), re.MULTILINE
    )

    assert lines
    for line in lines:
        command: click.Command = cli
        words = line.split()
        while isinstance(command, click.Group):
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        known = {name for option in command.params for name in option.opts}
        assert [word for word in words if word.startswith("-") and word not in known] == [], line


def test_make_targets_in_docs_exist() -> None:
    """Every `make TARGET` of README and CONTRIBUTING is a target."""
    makefile = (ROOT / "Makefile").read_text()
    named = re.findall(
        r"(?:\$ |`)make ([a-z]+)", (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    )

    assert named
    assert [target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_changelog_speaks_of_this_version() -> None:
    """The version in code has its section."""
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("page", sorted((DOCS / "adr").glob("*.md")), ids=lambda page: page.stem)
def test_decision_record_has_its_four_parts(page: Path) -> None:
    """Context, decision, consequences, and what would change our mind."""
    parts = re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE)

    assert parts == ["Context", "Decision", "Consequences", "What would change our mind"]


def test_run_help_names_every_setting() -> None:
    """`streamworker run --help` is the reference at hand."""
    from click.testing import CliRunner

    from streamworker.config import describe

    text = CliRunner().invoke(cli, ["run", "--help"]).output

    assert [path for path, _, _ in describe() if path not in text] == []
