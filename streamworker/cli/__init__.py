"""The commands. Data goes to standard output, messages go to standard error."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 failed, 2 bad usage or configuration, 130 interrupted."""
    try:
        # Imported here, so that Ctrl-C during the import gives no traceback.
        from streamworker.cli.commands import run_command  # noqa: PLC0415

        run_command(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
