"""The exceptions of a batch.

::

    StreamworkerError
    └── BatchError              `exit_code` says what the caller can do: 2 nothing was sent, 3 run it again
        ├── InvalidInput        lines are not valid, or were edited; nothing was sent
        ├── RunRefused          the files, or the run's name, do not fit this command; nothing was sent
        ├── OutputBusy          another run writes the same output
        ├── OutputError         a file cannot be read or written
        └── RunStopped          the run ended before its lines
"""

from __future__ import annotations

from streamworker.errors import StreamworkerError

__all__ = ["BatchError", "InvalidInput", "OutputBusy", "OutputError", "RunRefused", "RunStopped"]


class BatchError(StreamworkerError):
    """A batch cannot go on. The message says why, where, and what to do."""

    exit_code = 2


class InvalidInput(BatchError):
    """Lines of the input are not valid. Nothing was sent."""


class RunRefused(BatchError):
    """The output files or the run do not fit this command. Nothing was sent."""


class OutputBusy(BatchError):
    """Another run writes the same output, or has the same name."""


class OutputError(BatchError):
    """A file cannot be read or written. What was written before is kept."""

    exit_code = 3


class RunStopped(BatchError):
    """The run ended before all of its lines. Run it again."""

    exit_code = 3
