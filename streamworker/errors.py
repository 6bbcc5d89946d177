"""The exceptions that streamworker raises, each answering one question.

::

    StreamworkerError
    ├── ConfigurationError      the settings are wrong: every fault, with its path (exit code 2)
    ├── KafkaError              the broker, a topic or the network in between
    │   ├── KafkaUnavailable    cannot be reached now; may pass by itself
    │   ├── KafkaRefused        the broker answered no; a person has to change something
    │   ├── RecordTooLarge      one record is over the limit; the next ones are not
    │   └── Fenced              another worker owns this partition now
    ├── UpstreamError           a try failed outside of the event stream; carries a `JobError`
    └── Stopped                 the worker is stopping; what asked for this is to be left alone

Foreign exceptions (aiokafka, httpx, aiohttp) are mapped once, in the room that imports the library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamworker.model import Advice, JobError

__all__ = [
    "ConfigurationError",
    "Fenced",
    "KafkaError",
    "KafkaRefused",
    "KafkaUnavailable",
    "RecordTooLarge",
    "Stopped",
    "StreamworkerError",
    "UpstreamError",
]


class StreamworkerError(Exception):
    """Every exception of this package."""


class ConfigurationError(StreamworkerError):
    """The settings cannot be used. `faults` holds one line each: `path: what is wrong; what to do`."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__(
            "the configuration cannot be used:\n" + "\n".join(f"  {fault}" for fault in self.faults)
        )


class KafkaError(StreamworkerError):
    """Something between us and the broker."""


class KafkaUnavailable(KafkaError):
    """The broker cannot be reached now. Waiting may help."""


class KafkaRefused(KafkaError):
    """The broker answered, and the answer was no. Waiting does not help."""


class RecordTooLarge(KafkaError):
    """A record is larger than the producer or the topic allows."""


class Fenced(KafkaError):
    """Another worker took this partition over; what we write under its name is refused (KIP-98)."""


class UpstreamError(StreamworkerError):
    """A try failed, before or inside its event stream. `error` is what the terminal event will say.

    `advice` is what the answer's headers say about another try, where there was an answer. `usage` is what a whole
    completion that came instead of an event stream reports: it is paid for.
    """

    def __init__(
        self, error: JobError, advice: Advice | None = None, usage: dict[str, Any] | None = None
    ) -> None:
        self.error = error
        self.advice = advice
        self.usage = usage
        super().__init__(f"{error.code}: {error.message}")


class Stopped(StreamworkerError):
    """The worker is stopping."""
