"""What the handlers of all endpoints share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import web

from streamworker.gateway.errors import ApiError
from streamworker.observe import UNTRACED_REQUESTS, RequestSpan, RequestTracer

if TYPE_CHECKING:
    from streamworker.config import Settings
    from streamworker.gateway.auth import Authenticator
    from streamworker.gateway.batches.service import Batches
    from streamworker.gateway.drain import Drain
    from streamworker.gateway.feeds import EventLog
    from streamworker.gateway.jobs import Jobs
    from streamworker.gateway.limits import Limits
    from streamworker.ports import Clock
    from streamworker.telemetry.metrics import Metrics

__all__ = ["JOB_ID", "SPAN", "Gateway"]

JOB_ID = web.RequestKey("job_id", str)
"""The job that a request is about, for the access log."""

SPAN: web.RequestKey[RequestSpan] = web.RequestKey("span", RequestSpan)
"""The span of a request that submits a job."""


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """The parts of one process. Each module with handlers offers `routes(gateway)`."""

    settings: Settings
    event_log: EventLog
    jobs: Jobs
    authenticator: Authenticator
    limits: Limits
    metrics: Metrics
    clock: Clock
    drain: Drain
    tracer: RequestTracer = UNTRACED_REQUESTS
    batches: Batches | None = None
    """None if batches are not configured."""

    def require_broker(self) -> None:
        """Raise ApiError 503 while the gateway has not connected to Kafka."""
        if not self.event_log.is_ready:
            raise ApiError(503, "broker_unavailable", "this gateway has not connected to Kafka yet")
