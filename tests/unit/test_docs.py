"""Compare the docs with the code: generated pages, links, commands, targets, packages, import layers."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from streamworker import __version__
from streamworker.cli.commands import cli
from streamworker.config import describe, load
from streamworker.limits.circuit import CircuitState
from streamworker.model import Status
from tests.reference import DOCS, PAGES

ROOT = Path(__file__).parent.parent.parent
SOURCE = ROOT / "streamworker"
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text()
MARKDOWN = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("name", PAGES)
def test_reference_page_equals_the_page_generated_from_code(name: str) -> None:
    """`make docs` has been run since the code changed."""
    assert PAGES[name]() == (DOCS / name).read_text()


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_in_docs_name_existing_files_and_headings(page: Path) -> None:
    """The file of every relative link exists, and so does the heading that its anchor names."""
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)

    assert broken == []


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_index_of_the_docs_links_every_page() -> None:
    """The index is complete: every page, the decision records, the examples, and the pages beside `docs`; the README links it."""
    links = set(re.findall(r"\]\(([^)#]+)", (DOCS / "README.md").read_text()))
    pages = {page.name for page in DOCS.glob("*.md")} - {"README.md"}
    beside = {page.name for page in ROOT.glob("*.md")}

    assert (
        pages | {"adr", "../examples", "../benchmarks/README.md"} | {f"../{name}" for name in beside} <= links
    )
    assert "](docs/README.md)" in README


def test_readme_is_short_and_shows_the_demo_and_the_page() -> None:
    """It has fewer than 250 lines; the pictures stand beside what they show."""
    assert len(README.splitlines()) < 250
    assert re.findall(r"!\[.+?\]\(docs/images/(.+?)\)", README) == ["demo.svg", "page-dark.png"]


def test_picture_of_the_demo_shows_a_second_attempt_and_loads_nothing() -> None:
    """It has text of every job, and names no address but that of the SVG format and the page."""
    picture = (DOCS / "images" / "demo.svg").read_text()

    assert {"german", "japanese", "greek", "italian", "tool", "breaks", "refused", "invalid"} <= set(
        re.findall(r">([a-z]+)</text>", picture)
    )
    assert "attempt&#160;2" in picture
    assert set(re.findall(r"https?://[\w.:]+", picture)) == {"http://www.w3.org", "http://127.0.0.1:8088"}
    assert not re.search(r"@import|@font-face|url\((?!#)", picture)


def test_figures_in_the_readme_are_those_of_the_benchmarks() -> None:
    """Each row of the README's table has the figures of one row of benchmarks/README.md, and the sentences below it too."""
    names = {"limit": "limit", "**streamworker**": "streamworker"}
    table, _, rest = README.partition("| scenario | | CPU")[2].partition("\n\n")
    scenario, compared = "", 0
    for line in table.splitlines()[2:]:
        first, peer, *figures = (cell.strip() for cell in line.strip("|").split("|"))
        scenario = first or scenario
        contender = names.get(peer, "faststream" if "FastStream" in peer else "naive")
        cpu, rate, memory = figures
        row = rf"^\| {re.escape(scenario)} \| {contender} \| {cpu} \| [\d.]+ \| {rate} \| [^|]+ \| {memory} \| (.*)\|$"
        found = re.search(row, BENCHMARKS, re.MULTILINE)
        assert found, line
        if "%" in peer:
            assert (
                found[1].strip()
                == f"falls behind: {peer.rpartition(': ')[2].removesuffix(', it falls behind')}"
            )
        compared += 1
    today = rest.partition("## ")[0]

    assert compared >= 6
    for figure in re.findall(r"\d+\.\d+(?= ×| µs)", today):
        assert f"| {figure} |" in BENCHMARKS, figure


def test_commands_in_docs_exist_with_their_options() -> None:
    """Every `streamworker …` line of the docs parses as a command with options that it has."""
    lines = re.findall(
        r"^(?:\$ )?streamworker ([^\n`#]+)", "\n".join(page.read_text() for page in MARKDOWN), re.MULTILINE
    )

    assert lines
    for line in lines:
        command: click.Command = cli
        words = line.split()
        while isinstance(command, click.Group) and not (
            command.invoke_without_command and (not words or words[0].startswith("-"))
        ):
            found = command.get_command(click.Context(command), name := words.pop(0))
            assert found, f"{name} in: {line}"
            command = found
        known = {name for option in command.params for name in option.opts}
        assert [word for word in words if word.startswith("-") and word not in known] == [], line


def test_configurations_in_docs_are_valid(tmp_path: Path) -> None:
    """The worker accepts every TOML example, given the environment variables that it names."""
    text = "\n".join(page.read_text() for page in MARKDOWN)
    examples = re.findall(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    examples += re.findall(r"^\$ cat > worker\.toml\n(.*?)^\$", text, re.MULTILINE | re.DOTALL)
    file, token = tmp_path / "worker.toml", tmp_path / "token"
    token.write_text("token")

    assert len(examples) >= 2
    for example in examples:
        file.write_text(re.sub(r'"/(etc/streamworker/ca.pem|token/msk)"', f'"{token}"', example))
        named = re.findall(r'^api_key_env = "(\w+)"|"env:(\w+)"', example, re.MULTILINE)
        keys = dict.fromkeys(map("".join, named), "key")
        if "sasl_username" in example:
            keys["STREAMWORKER_KAFKA__SASL_PASSWORD"] = "password"
        assert load(file, keys).upstreams


def test_recipes_have_an_example_for_each_broker_and_upstream() -> None:
    """Each one is read as settings by the test above, and says whether it was tried."""
    text = (DOCS / "recipes.md").read_text()
    sections = dict(re.findall(r"^### (.+?)\n\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL))

    assert {
        "Redpanda",
        "Confluent Cloud",
        "Amazon MSK with SCRAM",
        "Amazon MSK with IAM",
        "Azure Event Hubs",
    } <= set(sections)
    assert {"OpenAI", "Azure OpenAI", "OpenRouter", "vLLM", "llama.cpp", "Ollama", "LiteLLM"} <= set(sections)
    for name, section in sections.items():
        assert re.match(r"(Not tried here|Tried here|The format is tried here)", section), name
        assert "```toml" in section or name == "Apache Kafka", name


def test_python_in_recipes_compiles() -> None:
    """It needs packages of others, so it is not run."""
    for example in re.findall(
        r"^```python\n(.*?)^```$", (DOCS / "recipes.md").read_text(), re.MULTILINE | re.DOTALL
    ):
        compile(example, "recipes.md", "exec")


def test_make_targets_in_docs_exist() -> None:
    """Every `make TARGET` in a page is a target of the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    named = {
        target for page in MARKDOWN for target in re.findall(r"(?:\$ |`)make ([a-z-]+)", page.read_text())
    }

    assert named
    assert [target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_changelog_has_a_section_for_this_version() -> None:
    """The version in the code has its section."""
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_changelog_has_its_versions_and_their_parts_in_order() -> None:
    """The newest version comes first; its parts have the names and the order of Keep a Changelog, each once."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(
        r"^## \[(\d+)\.(\d+)\.(\d+)\] - (?:unreleased|\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE
    )
    order = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]

    assert versions == sorted(versions, key=lambda version: tuple(map(int, version)), reverse=True)
    for section in changelog.split("\n## ")[1:]:
        parts = re.findall(r"^### (.+)$", section, re.MULTILINE)
        assert parts == [name for name in order if name in parts]


def test_changelog_renames_lead_to_existing_settings_and_metrics() -> None:
    """The new name of every renamed setting and metric is on its reference page, and the old name is not."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    reference = (DOCS / "configuration.md").read_text() + (DOCS / "metrics.md").read_text()
    renames = re.findall(r"^\| (?:setting|metric) \| `([^`]+)` \| `([^`]+)` \|$", changelog, re.MULTILINE)

    assert renames
    for old, new in renames:
        assert f"| `{new}` |" in reference
        assert f"| `{old}` |" not in reference


@pytest.mark.parametrize("page", sorted((DOCS / "adr").glob("*.md")), ids=lambda page: page.stem)
def test_decision_record_has_its_four_parts(page: Path) -> None:
    """A decision record has context, decision, consequences, and what would change the decision."""
    parts = re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE)

    assert parts == ["Context", "Decision", "Consequences", "What would change our mind"]


def test_run_help_names_every_setting() -> None:
    """`streamworker run --help` lists all settings."""
    text = CliRunner().invoke(cli, ["run", "--help"]).output

    assert [path for path, _, _ in describe() if path not in text] == []


# Log events

_EVENT = r"(?:circuit|commit|consumer|control|descriptors|group|job|jobs|library|log|offsets|partition|partitions|rebalance|sink|traces|try|upstream)"


def _log_events() -> tuple[set[str], set[str]]:
    """Return the log events in the source, and those of them that are logged at info level only."""
    source = "\n".join(path.read_text() for path in SOURCE.glob("**/*.py"))
    literal = rf'"({_EVENT}\.[a-z_]+)"'
    quiet = set(re.findall(rf"log\.(?:info|debug)\(\s*{literal}", source))
    recovered = set(re.findall(rf"OutageLog\({literal}", source))
    return set(re.findall(literal, source)), quiet | recovered


def test_log_events_in_the_operations_page_exist() -> None:
    """The page names no event that the worker does not log."""
    events, _ = _log_events()
    computed = {f"job.{status}" for status in Status} | {
        f"circuit.{state.name.lower()}" for state in CircuitState
    }
    named = set(re.findall(rf"`({_EVENT}\.[a-z_]+)`", (DOCS / "operations.md").read_text()))

    assert named
    assert named - events - computed == set()


def test_operations_page_explains_every_warning_of_the_worker() -> None:
    """The table in "Troubleshooting" has a row for each event at level warning or above."""
    events, quiet = _log_events()
    table = (DOCS / "operations.md").read_text().partition("## Troubleshooting")[2].partition("\n## ")[0]

    assert [event for event in sorted(events - quiet) if f"`{event}`" not in table] == []


# docs/architecture.md


def architecture() -> str:
    return (DOCS / "architecture.md").read_text()


def _rows(after: str) -> dict[str, str]:
    """Return the rows of the first table after a text: first cell → second cell."""
    table = re.search(r"^\|.*?(?=\n\n)", architecture().partition(after)[2], re.MULTILINE | re.DOTALL)
    assert table
    cells = (line.strip("| ").partition(" | ") for line in table[0].splitlines()[2:])
    return {first: second for first, _, second in cells}


def _names(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


def _modules(folder: Path) -> set[str]:
    """Return the names of the modules and packages in a folder."""
    found = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")}
    return found | {path.parent.name for path in folder.glob("*/__init__.py")}


def test_architecture_names_every_package_of_the_source() -> None:
    """The table of packages is complete, and so is the table of modules beside them."""
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}

    assert set().union(*map(_names, _rows("## Packages"))) == packages
    assert set().union(*map(_names, _rows("Modules directly in"))) == _modules(SOURCE) - packages


@pytest.mark.parametrize("row", _rows("## Packages").items(), ids=lambda row: row[0])
def test_architecture_names_the_modules_of_a_package(row: tuple[str, str]) -> None:
    """A package's row names modules that exist; every row but that of `cli` and `config` names all of them."""
    (package,), named = _names(row[0]), _names(row[1])
    modules = _modules(SOURCE / package)

    assert named - modules == set()
    assert named in (set(), modules)


def test_architecture_has_the_layers_of_the_import_contract() -> None:
    """The page shows the layers that `lint-imports` checks, in their order."""
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    contracts = [contract for contract in settings["contracts"] if contract["type"] == "layers"]
    (layers,) = (contract["layers"] for contract in contracts if "containers" not in contract)
    shown = re.search(r"```\n(.*?)\n```", architecture().partition("## Imports")[2], re.DOTALL)

    assert shown
    assert shown[1].splitlines() == [layer.replace("streamworker.", "") for layer in layers]
