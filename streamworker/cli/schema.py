"""`streamworker schema`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

__all__ = ["schema"]

_SUFFIX = ".schema.json"
_ASYNCAPI = "asyncapi"
_GATEWAY = "gateway"


@click.command(short_help="Print the schema of a record or of the gateway's API.")
@click.argument("name", required=False)
def schema(name: str | None) -> None:
    """Print the JSON Schema of a record, the AsyncAPI document or the gateway's OpenAPI document. Without a NAME, print the names."""
    found = _schemas()
    if name is None:
        for known in found:
            click.echo(known)
    elif name in found:
        click.echo(found[name].read_text("utf-8"), nl=False)
    else:
        raise click.UsageError(f"{name!r} is not a schema; there are {', '.join(found)}")


def _schemas() -> dict[str, Traversable]:
    folder: Traversable = files("streamworker") / "schemas"
    if not folder.is_dir():  # an editable installation: the wheel contains a copy of schemas/
        folder = Path(__file__).parent.parent.parent / "schemas"
    names = {
        file.name.removesuffix(_SUFFIX): file for file in folder.iterdir() if file.name.endswith(_SUFFIX)
    }
    others = {_ASYNCAPI: folder / f"{_ASYNCAPI}.yaml", _GATEWAY: folder / f"{_GATEWAY}.openapi.yaml"}
    return dict(sorted(names.items())) | others
