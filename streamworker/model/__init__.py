"""Values that every package of streamworker uses. They hold data and have no behaviour of their own."""

from streamworker.model.delta import ChunkDelta, Done, StreamError, StreamItem
from streamworker.model.ending import Advice, ErrorCode, JobError, Status, UsageSource
from streamworker.model.event import (
    Cause,
    DeltaEvent,
    Event,
    Observed,
    Result,
    Source,
    Started,
    Timing,
    UsageEvent,
    Voided,
)
from streamworker.model.job import Deltas, Job, OnBreak, Rejection
from streamworker.model.record import (
    CommitPoint,
    ConsumerRecord,
    Coordinates,
    Headers,
    ProducerRecord,
    TopicPartition,
)

__all__ = [
    "Advice",
    "Cause",
    "ChunkDelta",
    "CommitPoint",
    "ConsumerRecord",
    "Coordinates",
    "DeltaEvent",
    "Deltas",
    "Done",
    "ErrorCode",
    "Event",
    "Headers",
    "Job",
    "JobError",
    "Observed",
    "OnBreak",
    "ProducerRecord",
    "Rejection",
    "Result",
    "Source",
    "Started",
    "Status",
    "StreamError",
    "StreamItem",
    "Timing",
    "TopicPartition",
    "UsageEvent",
    "UsageSource",
    "Voided",
]
