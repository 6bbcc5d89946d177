"""The commands (contract §5). Data goes to standard output, messages to standard error."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 failed, 2 bad usage or configuration, 130 interrupted."""
    try:
        # Imported here, because importing takes a moment, and Ctrl-C in that moment is no traceback either.
        from streamworker.cli.commands import run_command  # noqa: PLC0415

        run_command(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
