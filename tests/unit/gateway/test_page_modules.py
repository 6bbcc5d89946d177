"""The page's modules without a browser, under Node's own test runner."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.resources import as_file, files
from typing import TYPE_CHECKING

import pytest

from tests.node import HERE, node

if TYPE_CHECKING:
    from pathlib import Path

TESTS = sorted((HERE / "page").glob("*.test.mjs"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of page and tests in which Node takes `.js` for modules, as browsers do."""
    root = tmp_path_factory.mktemp("page")
    with as_file(files("streamworker.gateway") / "page") as page:
        shutil.copytree(page, root / "page")
    (root / "package.json").write_text('{"type": "module"}')
    (root / "tests").mkdir()
    for file in TESTS:
        shutil.copy(file, root / "tests")
    return root


def test_page_modules_behave_as_their_tests_say(tree: Path) -> None:
    """All tests of `tests/node/page` pass."""
    command = [node(), "--test", "--test-reporter=tap", *(f"tests/{file.name}" for file in TESTS)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, re.sub(
        r"(?m)^\s*ok .*\n|^\s*---\n|^\s*\.\.\.\n|^\s*duration_ms.*\n", "", done.stdout
    )
    passed = re.search(r"^# pass (\d+)$", done.stdout, re.MULTILINE)
    assert passed is not None
    assert int(passed[1]) >= 100
