"""Makes the result records of terminal events, within the limit of a record's size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from streamworker.model import Result, Source
from streamworker.stream.completion import CompletionAssembler

if TYPE_CHECKING:
    from streamworker.model import Coordinates, Headers, ProducerRecord, UsageEvent
    from streamworker.observe import Observer
    from streamworker.ports import Sink
    from streamworker.wire.result import ResultWriter

__all__ = ["Results"]


class Results:
    """Makes result records for a results topic. `limit_bytes` bounds a record and what is kept of an open job."""

    def __init__(
        self, sink: Sink, writer: ResultWriter, observer: Observer, *, topic: str, limit_bytes: int
    ) -> None:
        self._sink = sink
        self._writer = writer
        self._observer = observer
        self._topic = topic
        self.limit_bytes = limit_bytes

    def assembler(self) -> CompletionAssembler:
        """Return an assembler for one attempt."""
        return CompletionAssembler(limit_bytes=self.limit_bytes)

    def write(
        self,
        event: UsageEvent,
        source: Coordinates,
        *,
        model: str | None,
        upstream: str | None,
        started: Coordinates | None = None,
        completion: CompletionAssembler | None = None,
        trace: Headers = (),
    ) -> tuple[ProducerRecord, ProducerRecord]:
        """Return the result record of a terminal event, and the record to write where the broker refuses its size.

        Parts of the completion are left out until the record is within the limit. Without the completion it may still
        exceed the limit. Raises KafkaRefused if the results topic does not exist.
        """
        to = self._sink.partition_for(self._topic, event.job_id.encode())
        result = Result(
            **{name: getattr(event, name) for name in event.__struct_fields__},
            model=model,
            upstream=upstream,
            source=Source(*source),
            events=None if started is None else Source(*started),
            completion=None,
            omitted=[],
        )
        if completion is None:
            record = self._writer.write(result, to, trace)
            return record, record
        completion.end(
            finish_reasons=event.finish_reasons, usage=event.usage, usage_source=event.usage_source.value
        )
        while True:
            result.completion, result.omitted = completion.completion(msgspec.Raw), completion.omitted
            record = self._writer.write(result, to, trace)
            if record.size <= self.limit_bytes or not completion.omit_next():
                break
        for part in result.omitted:
            self._observer.result_part_omitted(part)
        if result.completion is None:
            return record, record
        while completion.omit_next():
            pass
        result.completion, result.omitted = None, completion.omitted
        return record, self._writer.write(result, to, trace)
