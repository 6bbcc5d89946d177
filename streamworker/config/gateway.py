"""The settings of `streamworker gateway`."""

from __future__ import annotations

import re
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from streamworker.config.types import OptionalPath, Seconds, Section, comma_separated

__all__ = ["GatewaySettings"]

_ORIGIN = re.compile(r"(https?://[a-z0-9.-]+(:[0-9]{1,5})?|[a-z][a-z0-9+.-]*://[a-z0-9.-]+|null)\Z")


def _is_origin(origin: str) -> str:
    if not _ORIGIN.match(origin):
        raise ValueError(
            "must be an origin as browsers send it, such as https://app.example.com or http://localhost:3000: "
            "lower case, without a path"
        )
    return origin


Names = Annotated[tuple[str, ...], BeforeValidator(comma_separated)]
Origins = Annotated[tuple[Annotated[str, AfterValidator(_is_origin)], ...], BeforeValidator(comma_separated)]
Counts = Annotated[tuple[Annotated[int, Field(ge=1, le=1_000_000)], ...], BeforeValidator(comma_separated)]


class GatewaySettings(Section):
    """The HTTP server in front of the topics."""

    host: str = Field("127.0.0.1", min_length=1, description="address that it serves")
    port: int = Field(8088, ge=0, le=65535, description="port that it serves; 0 chooses a free one")
    topic: str = Field(
        "", description="job topic that it submits to, one of topics.jobs; empty: the first of them"
    )
    auth: Literal["keys", "off"] = Field(
        "keys",
        description="keys, or off: every client may do everything, which is refused unless host is a loopback address",
    )
    keys_file: Path = Field(
        Path("gateway-keys.toml"),
        description="TOML file with the API keys, made by `streamworker gateway key`; read again when it changes",
    )
    token_secrets_file: OptionalPath = Field(
        None,
        description="file with one secret of read tokens per line: kid:base64url-secret (HS256; the first of these signs), or kid:ed25519:base64url-public-key; read again when it changes",
    )
    token_audience: str = Field(
        "streamworker-gateway", min_length=1, description="the aud claim that read tokens must have"
    )
    token_max_age_s: int = Field(
        3600, ge=1, le=604_800, description="longest time from iat to exp of a read token"
    )
    cors_origins: Origins = Field(
        (), description="origins of web pages that may call it, exactly; also the allow-list for websockets"
    )
    read: Literal["subscribed", "all"] = Field(
        "subscribed",
        description="subscribed, or all: follow every partition of the events topic, whether a client listens or not",
    )
    home_partitions: int = Field(
        0,
        ge=0,
        le=1000,
        description="partitions of the events topic that the ids of its jobs are chosen for; 0: all of them",
    )
    lookback_s: Seconds = Field(
        3600, description="how far back a job is looked for whose id has no time in it"
    )
    search_max_records: int = Field(
        2_000_000, ge=1, description="records that the search for a job may read before it gives up"
    )
    search_max_s: Seconds = Field(10, description="time limit of the search for a job")
    keep_alive_s: Seconds = Field(15, description="time between the keep-alive lines of a quiet response")
    max_stream_age_s: Seconds = Field(
        900,
        description="age at which an event stream or a websocket is closed for renewal, give or take 10 %",
    )
    stall_s: Seconds = Field(30, description="a client that takes no byte for this long is disconnected")
    drain_s: float = Field(
        60,
        ge=0,
        le=86_400,
        description="after SIGTERM: time over which streams are closed, and for which chat completions may go on",
    )
    models: Names = Field((), description="names that /v1/models lists besides those of the upstreams")
    chat_timeout_s: Seconds = Field(600, description="deadline of the jobs of /v1/chat/completions")
    chat_max_wait_s: float = Field(
        30,
        ge=0,
        le=86_400,
        description="how long the jobs of /v1/chat/completions may wait for an upstream that is held or limited",
    )
    former_partitions: Counts = Field(
        (), description="partition counts of the events topic before partitions were added to it"
    )
    chat_status_hold_s: float = Field(
        10,
        ge=0,
        le=600,
        description="streaming chat completions: how long the HTTP status waits for the first delta, so that a failure before it is a status",
    )
    chat_usage: Literal["chunk", "finish"] = Field(
        "chunk",
        description="where a streaming chat completion has its usage: chunk, a last one without choices, as OpenAI; or finish, the chunk with finish_reason",
    )
    chat_on_disconnect: Literal["cancel", "continue"] = Field(
        "cancel",
        description="cancel or continue: what becomes of the job when the client of a chat completion disconnects",
    )

    @model_validator(mode="after")
    def _open_door_is_local(self) -> GatewaySettings:
        if self.auth == "off" and not _is_loopback(self.host):
            raise ValueError(
                f'auth = "off" lets everybody in: it needs a loopback address as host, such as 127.0.0.1, not {self.host}; '
                'or set auth = "keys"'
            )
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
