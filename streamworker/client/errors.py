"""The exceptions of the client besides those of `streamworker.errors`.

::

    StreamworkerError
    ├── InvalidJob              the job would be rejected by every worker; nothing was written (also a ValueError)
    ├── JobFailed               raised by `Result.raise_for_status`
    ├── Lagged                  an iterator did not take its events; `client.job(id).events()` reads them from the log
    └── KafkaError
        └── KafkaUnavailable
            └── SubmitUnknown   the broker did not acknowledge the job in time; it may have it, or get it yet
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamworker.errors import KafkaUnavailable, StreamworkerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamworker.client.result import Result

__all__ = ["InvalidJob", "JobFailed", "Lagged", "SubmitUnknown"]


class InvalidJob(StreamworkerError, ValueError):
    """Every worker would reject the job. `faults` holds one line each; nothing was written."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("the job is not valid: " + "; ".join(faults))


class JobFailed(StreamworkerError):
    """The job ended with a status other than `completed`. `result` is its result."""

    def __init__(self, result: Result) -> None:
        self.result = result
        error = result.error or {}
        reason = f": {error['code']}: {error['message']}" if "code" in error and "message" in error else ""
        super().__init__(f"job {result.job_id} ended with status {result.status}{reason}")


class Lagged(StreamworkerError):
    """An iterator over events took them more slowly than they came, and the bytes that were queued passed the limit.

    Nothing is lost: a new iterator (`client.job(job_id).events()`) reads the events from the log.
    """

    def __init__(self, job_id: str, limit_bytes: int) -> None:
        self.job_id = job_id
        super().__init__(
            f"the iterator over the events of job {job_id} was more than {limit_bytes} bytes behind"
        )


class SubmitUnknown(KafkaUnavailable):
    """The broker did not acknowledge the job in time. It may have the job, or may still get it.

    Submit it again under the same `job_id`: workers skip an id that they had.
    """

    def __init__(self, job_id: str, timeout_s: float) -> None:
        self.job_id = job_id
        super().__init__(f"the broker did not acknowledge job {job_id} within {timeout_s:g} s")
