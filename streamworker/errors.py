"""The exceptions that streamworker raises. Each class answers one question.

::

    StreamworkerError
    ├── ConfigurationError      the settings are invalid; lists every fault with its path (exit code 2)
    ├── KafkaError              the broker, a topic or the network failed
    │   ├── KafkaUnavailable    the broker cannot be reached now; retrying may help
    │   ├── KafkaRefused        the broker rejected the request; a person has to change something
    │   │   └── InstanceFenced  another process joined the group under this worker's instance id
    │   ├── RecordTooLarge      one record exceeds the limit; the next ones may not
    │   ├── MetadataTooLarge    the metadata of a commit exceeds the broker's limit
    │   └── Fenced              another worker owns this partition now
    ├── UpstreamError           a try failed outside of the event stream; carries a `JobError`
    └── Stopped                 the worker is stopping; the request that was waiting is abandoned

The package that imports a library (aiokafka, httpx) maps the library's exceptions to these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamworker.model import Advice, JobError

__all__ = [
    "ConfigurationError",
    "Fenced",
    "InstanceFenced",
    "KafkaError",
    "KafkaRefused",
    "KafkaUnavailable",
    "MetadataTooLarge",
    "RecordTooLarge",
    "Stopped",
    "StreamworkerError",
    "UpstreamError",
]


class StreamworkerError(Exception):
    """Base class of every exception of this package."""


class ConfigurationError(StreamworkerError):
    """The settings are invalid. `faults` holds one line each: `path: what is wrong; what to do`."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__(
            "the configuration cannot be used:\n" + "\n".join(f"  {fault}" for fault in self.faults)
        )


class KafkaError(StreamworkerError):
    """A request to Kafka failed."""


class KafkaUnavailable(KafkaError):
    """The broker cannot be reached now. Retrying may help."""


class KafkaRefused(KafkaError):
    """The broker answered and rejected the request. Retrying does not help."""


class InstanceFenced(KafkaRefused):
    """Another process joined the group later under the same `worker.group_instance_id` (KIP-345).

    The worker must end its streams and stop. If it joined again, it would fence the other process in turn.
    """


class RecordTooLarge(KafkaError):
    """A record exceeds the producer's or the topic's size limit."""


class MetadataTooLarge(KafkaError):
    """The metadata of a commit exceeds the broker's `offset.metadata.max.bytes`."""


class Fenced(KafkaError):
    """Another worker owns this partition now; the broker rejects writes of this worker's producer epoch
    (KIP-98)."""


class UpstreamError(StreamworkerError):
    """A try failed, before or inside its event stream. `error` is the terminal event's error.

    `advice` is what the response's headers say about another try, if there was a response.
    """

    def __init__(self, error: JobError, advice: Advice | None = None) -> None:
        self.error = error
        self.advice = advice
        super().__init__(f"{error.code}: {error.message}")


class Stopped(StreamworkerError):
    """The worker is stopping."""
