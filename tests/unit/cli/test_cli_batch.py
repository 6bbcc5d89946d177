"""`streamworker batch`: usage, dry runs, names of files. What needs a broker is in tests/integration/test_batch.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from streamworker.cli.batch import _paths
from streamworker.cli.commands import cli

LINE = {"custom_id": "a", "body": {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}}


def run(*arguments: str | Path, **variables: str) -> Result:
    environment = {f"STREAMWORKER_{name}": value for name, value in variables.items()}
    return CliRunner(env=environment).invoke(cli, ["batch", *map(str, arguments)], standalone_mode=False)


def failure(*arguments: str | Path, **variables: str) -> str:
    """Return the text of the usage error."""
    result = run(*arguments, **variables)
    assert result.exception is not None, result.output
    return str(
        result.exception.format_message() if hasattr(result.exception, "format_message") else result.exception
    )


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps(LINE) + "\n")
    return path


@pytest.mark.parametrize(
    ("given", "output", "errors"),
    [
        (("in.jsonl", None, None), "in.out.jsonl", "in.out.errors.jsonl"),
        (("d/in", None, None), "d/in.out", "d/in.out.errors"),
        (("in.a.jsonl", "o.jsonl", None), "o.jsonl", "o.errors.jsonl"),
        (("in.jsonl", "o", "e"), "o", "e"),
        (("in.jsonl", "o", "o"), "o", "o"),
        (("in.jsonl", "-", None), None, None),
        (("in.jsonl", "-", "e"), None, "e"),
        (("in.jsonl", "o", "-"), "o", None),
        (("-", None, None), None, None),
        (("-", "o.jsonl", None), "o.jsonl", "o.errors.jsonl"),
    ],
)
def test_names_of_the_output_files(given: tuple[Any, ...], output: str | None, errors: str | None) -> None:
    """Defaults are made of the input's name; - is standard output."""
    paths = _paths(*given)

    assert (paths.output, paths.errors) == (output and Path(output), errors and Path(errors))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--window", "0"], "window"),
        (["--topic", "other"], "--topic other is not one of topics.jobs"),
        (["-d", "x"], "KEY=VALUE"),
        (["-d", "custom_id=x"], "custom_id"),
        (["-d", "a=1", "-d", "a=2"], "once"),
        ([part for number in range(15) for part in ("-d", f"k{number}=v")], "at most 14"),
        (["--expires-in", "5"], "90s, 30m, 24h or 7d"),
        (["--expires-in", "0s"], "90s, 30m, 24h or 7d"),
        (["--price", "1"], "IN,OUT"),
        (["--batch-id", "a/b"], "'a/b' is not 1 to 64 of"),
        (["--batch-id", ""], "1 to 64"),
        (["--max-errors", "0"], "max-errors"),
        (["--limit", "0"], "limit"),
        (["--retry-failed=some"], "some"),
        (["--changed", "x"], "x"),
        (["--progress", "x"], "x"),
    ],
)
def test_usage_that_is_not_valid_is_refused(requests: Path, arguments: list[str], words: str) -> None:
    """The message names the option and what it takes."""
    assert words in failure(requests, *arguments)


@pytest.mark.parametrize("option", ["-o", "-e"])
@pytest.mark.parametrize("way", ["the same name", "another way", "a link"])
def test_output_that_is_the_input_is_refused(requests: Path, option: str, way: str) -> None:
    """A user's file is not overwritten, whatever path leads to it."""
    link = requests.with_name("link.jsonl")
    link.symlink_to(requests)
    around = requests.parent / ".." / requests.parent.name / requests.name
    given = {"the same name": requests, "another way": around, "a link": link}[way]

    assert "is INPUT" in failure(requests, option, given, "--overwrite")
    assert requests.read_text() == json.dumps(LINE) + "\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--retry-failed", "INPUT"],
        ["INPUT", "--retry-failed"],
        ["--retry-failed=all", "INPUT"],
        ["--retry-failed", "all", "INPUT"],
        ["--retry-failed", "--", "INPUT"],
    ],
)
def test_retry_failed_takes_no_input_for_its_value(requests: Path, arguments: list[str]) -> None:
    """Its value is optional, so the argument behind it may be INPUT."""
    given = [str(requests) if argument == "INPUT" else argument for argument in arguments]
    result = run("--dry-run", *given)

    assert (result.exception, result.return_value) == (None, 0), result.output


def test_name_that_looks_like_an_option_is_an_input_behind_two_hyphens(requests: Path) -> None:
    """What follows them is not an option."""
    assert "--retry-failed cannot be read" in run("--dry-run", "--", "--retry-failed").output


def test_dry_run_counts_and_leaves_nothing(requests: Path, tmp_path: Path) -> None:
    """Models, what is done, and what would run."""
    result = run(requests, "--dry-run")

    assert (result.exception, result.return_value) == (None, 0)
    assert "1 line: 1 m\n0 completed, 0 failed, 1 to run or to collect; nothing was sent\n" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["requests.jsonl"]


def test_dry_run_reports_faults(requests: Path) -> None:
    """With code 2, as a run would."""
    requests.write_text("{\n" + json.dumps(LINE))
    result = run(requests, "--dry-run")
    assert result.return_value == 2
    assert "line 1: invalid_json_line" in result.output

    result = run(requests, "--dry-run", "--skip-invalid")
    assert (result.return_value, ", 1 not valid; nothing was sent" in result.output) == (0, True)


def test_input_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    """With code 2, and no files are made."""
    result = run(tmp_path / "missing.jsonl")

    assert result.return_value == 2
    assert "missing.jsonl cannot be read" in result.output
    assert list(tmp_path.iterdir()) == []


def test_standard_input_is_read(tmp_path: Path) -> None:
    """It is copied to a temporary file first."""
    text = json.dumps(LINE) + "\n"
    result = CliRunner().invoke(cli, ["batch", "-", "--dry-run"], input=text, standalone_mode=False)

    assert (result.return_value, "1 line: 1 m" in result.output) == (0, True)


def test_broker_that_does_not_answer_is_reported(requests: Path, tmp_path: Path) -> None:
    """With code 3: the same command may succeed later. No file is left."""
    result = run(requests, "--timeout", "3", KAFKA__BOOTSTRAP_SERVERS="127.0.0.1:1")

    assert result.return_value == 3
    assert "run the same command again" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["requests.jsonl"]


def test_progress_as_json_reports_errors_as_notes(requests: Path) -> None:
    """Every line of standard error is an object."""
    result = run(requests, "--timeout", "3", "--progress", "json", KAFKA__BOOTSTRAP_SERVERS="127.0.0.1:1")
    notes = [json.loads(line) for line in result.stderr.splitlines()]

    assert [note["type"] for note in notes] == ["note"]


def test_topics_batch_must_be_a_job_topic(requests: Path) -> None:
    """Workers would not read it."""
    assert "batch: lines is not a job topic" in failure(requests, TOPICS__BATCH="lines")
