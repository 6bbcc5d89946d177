"""The body and the headers of a chat-completions request, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from streamworker.wire.json import InvalidJSON, decode, decode_strict

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ChatRequest", "InvalidChatRequest", "read_request"]

_ON_DISCONNECT: Final = ("cancel", "continue")


class InvalidChatRequest(ValueError):
    """The request is not valid. `faults` names all that is wrong; `param` is the member of the first fault."""

    def __init__(self, faults: list[str], param: str | None = None) -> None:
        self.faults = faults
        self.param = param
        super().__init__("; ".join(faults))


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A request as the gateway needs to know it. `body` is what the client sent, byte for byte."""

    body: msgspec.Raw
    model: str
    is_stream: bool
    include_usage: bool
    timeout_s: float
    cancels: bool
    """Whether the job is cancelled when the client disconnects."""


def read_request(
    body: bytes, headers: Mapping[str, str], *, timeout_s: float, on_disconnect: str
) -> ChatRequest:
    """Read a request. `timeout_s` is the longest time that the job may take, and `on_disconnect` the default.

    Only the members that the gateway acts on are checked here. Raises InvalidChatRequest.
    """
    members = _object(body)
    faults: list[tuple[str, str]] = []
    model, messages = members.get("model"), members.get("messages")
    if type(model) is not str or not model:
        faults.append(("model", "is required: a non-empty string"))
    if type(messages) is not list or not messages:
        faults.append(("messages", "is required: a non-empty array"))
    is_stream = _boolean(members, "stream", "stream", faults)
    options = members.get("stream_options")
    if options is not None and type(options) is not dict:
        faults.append(("stream_options", "is not an object"))
        options = None
    include_usage = _boolean(options or {}, "include_usage", "stream_options.include_usage", faults)
    timeout_s = _timeout_s(headers.get("Streamworker-Timeout"), timeout_s, faults)
    on_disconnect = headers.get("Streamworker-On-Disconnect", on_disconnect).strip().lower()
    if on_disconnect not in _ON_DISCONNECT:
        faults.append(("Streamworker-On-Disconnect", "is neither cancel nor continue"))
    if faults:
        raise InvalidChatRequest([f"{name}: {fault}" for name, fault in faults], faults[0][0])
    return ChatRequest(
        body=msgspec.Raw(body),
        model=str(model),
        is_stream=is_stream,
        include_usage=include_usage,
        timeout_s=timeout_s,
        cancels=on_disconnect == "cancel",
    )


def _object(body: bytes) -> dict[str, Any]:
    try:
        body.decode()  # what is passed on has to be UTF-8
        try:
            members = decode_strict(body)
        except InvalidJSON:
            members = decode(body)  # lone surrogates, which a worker repairs
    except UnicodeDecodeError as error:
        raise InvalidChatRequest([f"the body is not UTF-8 (byte {error.start})"]) from None
    except InvalidJSON as error:
        raise InvalidChatRequest([f"the body is not JSON: {error}"]) from None
    if type(members) is not dict:
        raise InvalidChatRequest(["the body is not a JSON object"])
    return members


def _boolean(members: Mapping[str, Any], name: str, path: str, faults: list[tuple[str, str]]) -> bool:
    value = members.get(name)
    if value is not None and type(value) is not bool:
        faults.append((path, "is neither true nor false"))
    return value is True


def _timeout_s(header: str | None, limit_s: float, faults: list[tuple[str, str]]) -> float:
    """Read the header that lowers the deadline; a larger number than the limit is lowered to it."""
    if header is None:
        return limit_s
    try:
        seconds = float(header) if header.strip().isascii() and "_" not in header else 0.0
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        faults.append(("Streamworker-Timeout", "is not a positive number of seconds"))
        return limit_s
    return min(seconds, limit_s)
