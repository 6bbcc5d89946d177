"""The commands (contract §5). Data goes to standard output, messages to standard error."""

from streamworker.cli.main import main

__all__ = ["main"]
