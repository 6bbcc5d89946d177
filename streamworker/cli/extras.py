"""Commands whose packages are an extra of the distribution."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from streamworker.errors import StreamworkerError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["needs_extra"]


@contextmanager
def needs_extra(command: str, extra: str) -> Iterator[None]:
    """Convert the failed import of an extra's package to a message that says what to install.

    Raises:
        StreamworkerError: a package that is not part of this project is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing.partition(".")[0] == "streamworker":
            raise
        raise StreamworkerError(
            f"{command} needs the {extra} extra ({missing} is not installed): "
            f"pip install 'streamworker[{extra}]', or '.[{extra}]' in a clone"
        ) from error
