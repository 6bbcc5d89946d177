"""The events that an iterator over a job yields."""

from __future__ import annotations

from typing import Any

import msgspec

from streamworker.handover import Delivery, Kind
from streamworker.stream.usage import generated_text

__all__ = ["Delta", "Ended", "Event", "Restarted", "Started", "event_of"]


class Event:
    """An event of the job's valid attempt. It is decoded when a member is read first."""

    __slots__ = ("_raw", "_value", "offset")
    __match_args__: tuple[str, ...] = ()

    def __init__(self, value: bytes, offset: int) -> None:
        self._value = value
        self._raw: dict[str, Any] | None = None
        self.offset = offset
        """The offset of the record in the job's partition of the events topic."""

    def json(self) -> str:
        """Return the record's JSON text."""
        return self._value.decode()

    @property
    def raw(self) -> dict[str, Any]:
        """The event as it is in the topic, with members that this version does not know. Do not change it."""
        if self._raw is None:
            self._raw = msgspec.json.decode(self._value)
        return self._raw

    @property
    def job_id(self) -> str:
        """The job's id."""
        return str(self.raw["job_id"])

    @property
    def attempt(self) -> str:
        """The attempt's id."""
        return str(self.raw["attempt"])

    @property
    def seq(self) -> int:
        """The event's number within its attempt."""
        return int(self.raw["seq"])

    @property
    def ts(self) -> int:
        """When a worker published it, in ms since the epoch."""
        return int(self.raw["ts"])

    def __repr__(self) -> str:  # without texts: a repr ends up in logs
        return f"{type(self).__name__}(job_id={self.job_id!r}, attempt={self.attempt!r}, seq={self.seq})"


class Started(Event):
    """An attempt began: an upstream will be called."""

    __slots__ = ()

    @property
    def model(self) -> str:
        """The model, as the job asks for it."""
        return str(self.raw["model"])

    @property
    def upstream(self) -> str:
        """The name of the upstream."""
        return str(self.raw["upstream"])

    @property
    def cause(self) -> str:
        """`new`, `redelivered` or `restart`."""
        return str(self.raw["cause"])

    @property
    def metadata(self) -> dict[str, str]:
        """The job's metadata."""
        return dict(self.raw["metadata"])


class Restarted(Started):
    """A new attempt began. Every event before it is void: forget what they said."""

    __slots__ = ()


class Delta(Event):
    """A part of the answer."""

    __slots__ = ()
    __match_args__ = ("text",)

    @property
    def choice(self) -> int | None:
        """The index of the choice; None for an event that belongs to none."""
        choice: int | None = self.raw["choice"]
        return choice

    @property
    def delta(self) -> dict[str, Any]:
        """The delta as the upstream sent it."""
        delta: dict[str, Any] = self.raw["delta"]
        return delta

    @property
    def text(self) -> str:
        """The delta's content, without reasoning, refusals and tool calls; empty if it has none."""
        return generated_text(self.delta)[0]

    @property
    def finish_reason(self) -> str | None:
        """Why the upstream ended the choice; None while it goes on."""
        reason: str | None = self.raw["finish_reason"]
        return reason


class Ended(Event):
    """The terminal event, the last one of an iterator."""

    __slots__ = ("is_whole",)
    __match_args__ = ("status",)

    def __init__(self, value: bytes, offset: int, *, is_whole: bool = True) -> None:
        super().__init__(value, offset)
        self.is_whole = is_whole
        """Whether the iterator yielded the attempt from its beginning. False if `since` is after it."""

    @property
    def status(self) -> str:
        """`completed`, `interrupted`, `failed`, `cancelled`, `expired` or `rejected`."""
        return str(self.raw["status"])

    @property
    def usage(self) -> dict[str, Any] | None:
        """The token counts; None if nothing was generated."""
        usage: dict[str, Any] | None = self.raw["usage"]
        return usage

    @property
    def usage_source(self) -> str:
        """`upstream`, `upstream_partial`, `estimated` or `none`."""
        return str(self.raw["usage_source"])

    @property
    def error(self) -> dict[str, Any] | None:
        """Why the job did not complete; None if it did."""
        error: dict[str, Any] | None = self.raw["error"]
        return error


_CLASSES = {Kind.STARTED: Started, Kind.RESTARTED: Restarted, Kind.DELTA: Delta}


def event_of(delivery: Delivery) -> Event:
    """Return the event of a delivery."""
    kind, offset, value, is_whole = delivery[:4]
    if kind is Kind.ENDED:
        return Ended(value, offset, is_whole=is_whole)
    return _CLASSES[kind](value, offset)
