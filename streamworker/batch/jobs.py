"""The job of a line: the record that is submitted."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from streamworker.wire.json import encode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamworker.batch.identity import JobIds
    from streamworker.batch.lines import Request

__all__ = ["MAX_METADATA", "JobWriter"]

MAX_METADATA = 14
"""Metadata of a run besides `batch_id` and `custom_id`. A job can have 16 members."""


class JobWriter:
    """Writes the records of a run's jobs. The request is the body of the line, byte for byte."""

    def __init__(
        self,
        ids: JobIds,
        run: str,
        *,
        metadata: Mapping[str, str],
        on_break: str,
        upstream: str | None = None,
        expires_ms: int | None = None,
        merges_deltas: bool = False,
    ) -> None:
        self._ids = ids
        self._metadata = {**metadata, "batch_id": run}
        members: dict[str, Any] = {"on_break": on_break}
        if upstream is not None:
            members["upstream"] = upstream
        if expires_ms is not None:
            expires = datetime.fromtimestamp(expires_ms / 1000, UTC)
            members["deadline"] = expires.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if merges_deltas:
            members["deltas"] = "merged"
        self._members = encode(members)[1:]

    def write(self, request: Request, round_: int) -> tuple[bytes, bytes]:
        """Return key and value of the job of a line."""
        job_id = self._ids.job_id(request.digest, round_).encode()
        metadata = encode({**self._metadata, "custom_id": request.custom_id})
        value = b'{"job_id":"%b","request":%b,"metadata":%b,%b' % (
            job_id,
            request.body,
            metadata,
            self._members,
        )
        return job_id, value
