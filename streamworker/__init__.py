"""Event-stream fan-out worker: prompt jobs from Kafka in, live deltas and one terminal event per job out.

The names of the client library are imported when they are first used, so that the modules without I/O can be imported
without Kafka. docs/python.md states which names are stable.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamworker.client import (
        BlockingClient,
        BlockingJob,
        Client,
        Delta,
        Ended,
        Event,
        EventStream,
        InvalidJob,
        Job,
        JobFailed,
        Lagged,
        Restarted,
        Result,
        Started,
        SubmitUnknown,
        connect,
    )
    from streamworker.errors import (
        ConfigurationError,
        KafkaError,
        KafkaRefused,
        KafkaUnavailable,
        RecordTooLarge,
        StreamworkerError,
    )
    from streamworker.reader import EventReader

__version__ = "0.1.0"

__all__ = [
    "BlockingClient",
    "BlockingJob",
    "Client",
    "ConfigurationError",
    "Delta",
    "Ended",
    "Event",
    "EventReader",
    "EventStream",
    "InvalidJob",
    "Job",
    "JobFailed",
    "KafkaError",
    "KafkaRefused",
    "KafkaUnavailable",
    "Lagged",
    "RecordTooLarge",
    "Restarted",
    "Result",
    "Started",
    "StreamworkerError",
    "SubmitUnknown",
    "__version__",
    "connect",
]

_ERRORS = frozenset(
    name for name in __all__ if name.endswith(("Error", "Refused", "Unavailable", "TooLarge"))
)
_MODULES = {"EventReader": "reader"} | dict.fromkeys(_ERRORS, "errors")


def __getattr__(name: str) -> Any:
    """Import a public name (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_MODULES.get(name, 'client')}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
