"""Frozen values that every other room speaks in. Nothing here does anything."""

from streamworker.model.delta import ChunkDelta, Done, Fault, News
from streamworker.model.ending import Advice, ErrorCode, JobError, Status, UsageSource
from streamworker.model.event import Cause, DeltaEvent, Event, Observed, Source, Started, Timing, UsageEvent
from streamworker.model.job import Job, OnBreak, Rejection
from streamworker.model.record import CommitPoint, Coordinates, Headers, Outgoing, Partition, Record

__all__ = [
    "Advice",
    "Cause",
    "ChunkDelta",
    "CommitPoint",
    "Coordinates",
    "DeltaEvent",
    "Done",
    "ErrorCode",
    "Event",
    "Fault",
    "Headers",
    "Job",
    "JobError",
    "News",
    "Observed",
    "OnBreak",
    "Outgoing",
    "Partition",
    "Record",
    "Rejection",
    "Source",
    "Started",
    "Status",
    "Timing",
    "UsageEvent",
    "UsageSource",
]
