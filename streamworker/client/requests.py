"""Make a job record of the arguments of `submit`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from streamworker.client.errors import InvalidJob
from streamworker.client.ids import new_job_id
from streamworker.model import ConsumerRecord, Coordinates, Rejection
from streamworker.wire.job import read_job
from streamworker.wire.json import encode

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["check_job", "new_job"]

_NO_LIMIT = 1 << 30  # the worker's limit is not known here


def new_job(
    *,
    request: Mapping[str, Any] | None,
    members: Mapping[str, Any],
    job_id: str | None,
    deadline: datetime | timedelta | str | None,
    **options: Any,
) -> dict[str, Any]:
    """Return a job with an id. Options that are None are left out. Raises InvalidJob."""
    if request is not None and members:
        raise InvalidJob(
            [f"request and {', '.join(sorted(members))} are given: use one way to pass the request"]
        )
    job: dict[str, Any] = {"job_id": job_id or new_job_id(), "request": dict(request or members)}
    job |= {name: value for name, value in options.items() if value is not None}
    if deadline is not None:
        job["deadline"] = _deadline(deadline)
    check_job(job)
    return job


def check_job(job: Mapping[str, Any]) -> None:
    """Raise InvalidJob for what every worker would reject."""
    try:
        value = encode(job)
    except (TypeError, ValueError) as error:
        raise InvalidJob([f"the job cannot be encoded as JSON: {error}"]) from None
    read = read_job(ConsumerRecord(Coordinates("submit", 0, 0), 0, None, value), max_bytes=_NO_LIMIT)
    if isinstance(read, Rejection):
        raise InvalidJob(read.faults)


def _deadline(deadline: datetime | timedelta | str) -> str:
    if isinstance(deadline, str):
        return deadline
    if isinstance(deadline, timedelta):
        deadline = datetime.now(UTC) + deadline
    if deadline.tzinfo is None:
        raise InvalidJob(["deadline: the time has no zone; use datetime.now(UTC) + timedelta(...)"])
    return deadline.astimezone(UTC).isoformat().replace("+00:00", "Z")
