"""The private names of aiokafka: one module, known releases."""

from __future__ import annotations

import ast
from pathlib import Path

import aiokafka
import pytest

import streamworker.kafka
from streamworker.kafka.compat import KNOWN_VERSIONS

PACKAGE = Path(streamworker.kafka.__file__).parent
OTHERS = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "compat.py")


def test_installed_aiokafka_is_one_that_compat_was_compared_with() -> None:
    """After an upgrade: compare kafka/compat.py with aiokafka's source, run the integration tests, add the version."""
    assert aiokafka.__version__ in KNOWN_VERSIONS


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.name)
def test_module_other_than_compat_uses_no_private_name_of_another_object(path: Path) -> None:
    """An underscore attribute of anything but self or cls belongs into compat.py; so does an exemption from the rule."""
    text = path.read_text("utf-8")
    private = [
        f"{node.lineno}: {node.attr}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"})
    ]

    assert private == []
    assert "SLF001" not in text
