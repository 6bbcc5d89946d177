"""The frames of the websocket: what clients send, as values; and what the gateway sends, as bytes. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import orjson

from streamworker.wire.json import InvalidJSON, decode, encode

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "MAX_FRAME_BYTES",
    "Auth",
    "BadFrame",
    "Cancel",
    "Message",
    "Ping",
    "Submit",
    "Subscribe",
    "Unsubscribe",
    "control_frame",
    "event_frame",
    "read",
    "text_frame",
]

MAX_FRAME_BYTES = 65_536
"""Of an inbound message, but for `submit`."""

_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
_JobId = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._:-]{1,200}$")]
_Reason = Annotated[str, msgspec.Meta(max_length=500)]


class BadFrame(Exception):
    """The message is not one that clients may send. The text says why and does not repeat it."""


class _Frame(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=str.lower):
    pass


class Auth(_Frame, frozen=True):
    """A key or a read token; renews the one before."""

    token: str


class Subscribe(_Frame, frozen=True):
    """Send a job's events."""

    id: _Id
    job_id: _JobId
    cursor: str | None = None
    since: str | None = None
    replay: Literal["events", "snapshot", "none"] = "events"


class Unsubscribe(_Frame, frozen=True):
    """Send no more of them."""

    id: _Id


class Submit(_Frame, frozen=True):
    """Submit a job, and send its events if `subscribe` is true. `key` is the record's key."""

    id: _Id
    job: dict[str, msgspec.Raw]
    subscribe: bool = False
    key: str | None = None


class Cancel(_Frame, frozen=True):
    """Cancel a job."""

    id: _Id
    job_id: _JobId
    reason: _Reason | None = None


class Ping(_Frame, frozen=True):
    """Ask for a `pong`: browsers cannot send pings of the protocol."""


Message = Auth | Subscribe | Unsubscribe | Submit | Cancel | Ping

_DECODER: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


def read(data: bytes, max_submit_bytes: int) -> Message:
    """Read a text message.

    Raises:
        BadFrame: it is not a message of the protocol.
        OverflowError: it is larger than messages of its type may be.
    """
    try:
        message = _DECODER.decode(data)
    except msgspec.ValidationError as error:
        raise BadFrame(_without_values(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        message = _repaired(data)
    if len(data) > (max_submit_bytes if isinstance(message, Submit) else MAX_FRAME_BYTES):
        raise OverflowError
    return message


def _repaired(data: bytes) -> Message:
    """Read JSON that msgspec refuses for its lone surrogates."""
    try:
        value: Any = decode(data)
        return _DECODER.decode(encode(value))
    except InvalidJSON as error:
        raise BadFrame(f"the message is not JSON: {error}") from None
    except (msgspec.MsgspecError, TypeError, RecursionError):
        raise BadFrame("the message is not valid") from None


def _without_values(text: str) -> str:
    """Return msgspec's reason. Its texts about tags and words repeat the value."""
    if text.startswith("Invalid value"):
        return "type must be auth, subscribe, unsubscribe, submit, cancel or ping"
    if text.startswith("Invalid enum value"):
        return "replay must be events, snapshot or none"
    if text.startswith("Object contains unknown field"):
        return "the message has a member that is not known"
    return text[:1].lower() + text[1:]


def text_frame(value: Mapping[str, Any]) -> bytes:
    """Return a value as a text frame of the websocket protocol."""
    return _framed(orjson.dumps(value))


def event_frame(head: bytes, cursor: bytes, value: bytes) -> bytes:
    """Return an event as a text frame. `head` is `event_head` of its subscription."""
    return _framed(b'%b"%b","event":%b}' % (head, cursor, value))


def event_head(id_: str) -> bytes:
    """Return the beginning of every event frame of a subscription."""
    return b'{"type":"event","id":%b,"cursor":' % orjson.dumps(id_)


def control_frame(opcode: int, payload: bytes) -> bytes:
    """Return a control frame. `payload` has at most 125 bytes."""
    return b"%c%c%b" % (0x80 | opcode, len(payload), payload)


def _framed(payload: bytes) -> bytes:
    """Return a final text frame, not masked (RFC 6455 section 5.2)."""
    size = len(payload)
    if size < 126:
        return b"\x81%c%b" % (size, payload)
    if size < 1 << 16:
        return b"\x81\x7e%b%b" % (size.to_bytes(2, "big"), payload)
    return b"\x81\x7f%b%b" % (size.to_bytes(8, "big"), payload)
