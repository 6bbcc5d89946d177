"""The command tree: every command is found by its name, and only its own modules are imported."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner

import streamworker.cli
from streamworker.cli.commands import COMMANDS, cli

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.mark.parametrize("name", COMMANDS)
def test_command_is_found_by_its_name(name: str) -> None:
    """The name in the table is the name in the command's own help text."""
    command = cli.get_command(click.Context(cli), name)

    assert command is not None
    assert command.name == name
    assert command.get_short_help_str()


def test_module_with_a_command_of_its_name_is_in_the_table() -> None:
    """A new command module that is not in the table would never be found."""
    folder = Path(streamworker.cli.__file__).parent
    found = {
        path.stem
        for path in folder.glob("[a-z]*.py")
        if isinstance(getattr(import_module(f"streamworker.cli.{path.stem}"), path.stem, None), click.Command)
    }

    assert found
    assert found <= set(COMMANDS.values())


def test_help_lists_every_command_with_its_first_line() -> None:
    """`streamworker --help` is the index of what the program does."""
    output = CliRunner().invoke(cli, ["--help"]).output

    for name in COMMANDS:
        assert f"\n  {name} " in output


def groups(command: click.Command, *path: str) -> Iterator[tuple[str, ...]]:
    """Yield the paths of all groups of commands, from `command` down."""
    if isinstance(command, click.Group):
        yield path
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from groups(inner, *path, name)


@pytest.mark.parametrize("path", [*groups(cli)], ids=lambda path: " ".join(("streamworker", *path)))
def test_help_at_80_columns_cuts_no_description_of_a_command(path: tuple[str, ...]) -> None:
    """click ends a description that does not fit with three dots."""
    result = CliRunner().invoke(cli, [*path, "--help"], terminal_width=80)
    listed = result.output.partition("\nCommands:\n")[2].splitlines()

    assert listed
    assert [line for line in listed if line.endswith("...") or len(line) > 80] == []


def test_groups_of_commands_are_all_found() -> None:
    """The test of their help would pass without them."""
    assert {"", "gateway", "dlq", "topics"} <= {" ".join(path) for path in groups(cli)}


def test_unknown_command_is_bad_usage() -> None:
    """A misspelt command exits with 2 and is named."""
    result = CliRunner().invoke(cli, ["tial"])

    assert result.exit_code == 2
    assert "No such command 'tial'. Did you mean 'tail'?" in result.output
    assert "Did you mean" not in CliRunner().invoke(cli, ["xyzzy"]).output


@pytest.mark.parametrize(
    ("command", "needless"),
    [
        ("tail", {"aiohttp", "httpx", "prometheus_client", "streamworker.worker", "streamworker.upstream"}),
        ("submit", {"aiohttp", "httpx", "prometheus_client", "streamworker.worker", "streamworker.upstream"}),
        ("schema", {"aiohttp", "aiokafka", "httpx", "prometheus_client", "streamworker.worker"}),
    ],
)
def test_command_imports_nothing_that_it_does_not_use(command: str, needless: set[str]) -> None:
    """Imports are most of a short command's time; `tail` of an old job answers within a second."""
    program = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from streamworker.cli.commands import cli\n"
        f"assert CliRunner().invoke(cli, [{command!r}, '--help']).exit_code == 0\n"
        f"print(*({needless!r} & set(sys.modules)))"
    )

    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert ran.stdout.strip() == ""
