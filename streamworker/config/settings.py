"""The settings: immutable pydantic models. Each field has its default and the help text that users read."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SecretStr,
    model_validator,
)

from streamworker.config.gateway import GatewaySettings
from streamworker.config.secrets import read_api_key, read_headers, read_line, read_proxy_password
from streamworker.config.types import OptionalPath, Seconds, Section, comma_separated
from streamworker.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "EXPECTED",
    "PREFIX",
    "EventSettings",
    "GatewaySettings",
    "KafkaSettings",
    "Settings",
    "TelemetrySettings",
    "TopicSettings",
    "UpstreamSettings",
    "WorkerSettings",
    "describe",
]

PREFIX = "STREAMWORKER_"
"""What the name of every environment variable that is a setting begins with."""

_TOPIC = r"^[A-Za-z0-9._-]{1,249}$"
_TOPIC_OR_NONE = r"^([A-Za-z0-9._-]{1,249})?$"
_UPSTREAM_NAME = r"^[a-z0-9][a-z0-9_-]{0,62}$"
_URL = r"^https?://[^\s/?#]+[^\s?#]*$"
_FAIR_BY = r"^(key|metadata:.{1,200})?$"
_VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
_PROXY = r"^(env|https?://[^\s/?#]+/?)?$"
_HEADER = r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$"

RESERVED_HEADERS = frozenset(
    {
        "accept",
        "accept-encoding",
        "connection",
        "content-length",
        "content-type",
        "host",
        "keep-alive",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers that `upstreams.<name>.headers` cannot set: they decide how requests and responses are framed and read."""

EXPECTED = {
    _TOPIC: "must be a topic name: 1 to 249 letters, digits, dots, hyphens and underscores",
    _TOPIC_OR_NONE: "must be empty or a topic name: 1 to 249 letters, digits, dots, hyphens and underscores",
    _UPSTREAM_NAME: (
        "must be the name of an upstream: 1 to 63 lower-case letters, digits, hyphens and underscores, "
        "the first one a letter or a digit"
    ),
    _URL: "must be an http(s) URL such as https://api.example.com/v1, without a query",
    _FAIR_BY: "must be key, or metadata: and a name, such as metadata:tenant",
    _VARIABLE: "must be the name of an environment variable, not the key itself",
    _PROXY: 'must be the URL of an HTTP proxy such as http://proxy.example.com:3128, or "env"',
    _HEADER: "must be the name of an HTTP header",
}
"""The error text for each pattern of a setting: users do not read regular expressions."""


def _weights(value: Any) -> Any:
    """Split `chat=3,bulk=1` into a table: environment variables hold text only."""
    if not isinstance(value, str):
        return value
    pairs = (item.partition("=") for item in comma_separated(value))
    return {topic.strip(): weight.strip() for topic, _, weight in pairs}


Topic = Annotated[str, Field(pattern=_TOPIC)]
TopicList = Annotated[tuple[Topic, ...], BeforeValidator(comma_separated)]
NameList = Annotated[tuple[str, ...], BeforeValidator(comma_separated), Field(min_length=1)]


def _has_ports(servers: str) -> str:
    for server in servers.split(","):
        host, colon, port = server.strip().rpartition(":")
        if not colon or "/" in host or not port.isdigit() or not 0 < int(port[:6]) < 65536:
            raise ValueError(f"must be host:port, several separated by commas, not {server.strip()!r}")
    return servers


class KafkaSettings(Section):
    """Connection to Kafka, and the size limits of what is written to it."""

    bootstrap_servers: Annotated[str, AfterValidator(_has_ports)] = Field(
        "localhost:9092", min_length=1, description="host:port, several separated by commas"
    )
    client_id: str = Field(
        "streamworker", min_length=1, description="client id in the brokers' logs and quotas"
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = Field(
        "PLAIN", description="PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 or OAUTHBEARER"
    )
    sasl_username: str | None = Field(None, description="user name for PLAIN and SCRAM")
    sasl_password: SecretStr | None = Field(
        None, description="password for PLAIN and SCRAM; only from the environment"
    )
    sasl_password_file: OptionalPath = Field(
        None, description="file that holds the password; read at every connection, so that it can be rotated"
    )
    sasl_oauth_token_file: OptionalPath = Field(
        None,
        description="file that holds the token for OAUTHBEARER; read at every connection",
    )
    ssl_cafile: OptionalPath = Field(None, description="certificate authorities, PEM; default: the system's")
    ssl_certfile: OptionalPath = Field(
        None, description="client certificate for mutual TLS, PEM; read at every connection"
    )
    ssl_keyfile: OptionalPath = Field(None, description="key of the client certificate, PEM, not encrypted")
    compression: Literal["none", "lz4", "snappy", "zstd", "gzip"] = Field(
        "lz4", description="compression of the records that the worker writes"
    )
    max_record_bytes: int = Field(
        1_000_000,
        ge=16_384,
        le=1 << 30,
        description="largest event record, in bytes; must be below max.message.bytes of the topics",
    )
    max_result_bytes: int = Field(
        1_000_000,
        ge=16_384,
        le=1 << 30,
        description="largest result record, in bytes; what does not fit is left out of it; must be below max.message.bytes of the "
        "results topic; an open job may take this much memory",
    )
    max_unacknowledged_bytes: int = Field(
        32 << 20,
        ge=1 << 20,
        description="bytes of events that no broker has acknowledged yet; above it the worker stops reading from upstreams",
    )
    request_timeout_s: Seconds = Field(30, description="time limit of one request to a broker")

    @model_validator(mode="after")
    def _security_is_whole(self) -> KafkaSettings:
        """Refuse settings that are missing, and settings that the security protocol would ignore."""
        faults = [*self._sasl_faults(), *self._tls_faults()]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _sasl_faults(self) -> Iterator[str]:
        password: dict[str, object] = {
            "sasl_password": self.sasl_password,
            "sasl_password_file": self.sasl_password_file,
        }
        named: dict[str, object] = {"sasl_username": self.sasl_username, **password}
        token: dict[str, object] = {"sasl_oauth_token_file": self.sasl_oauth_token_file}
        if not self.security_protocol.startswith("SASL"):
            for name in _set(named | token):
                yield f"{name} is set, but security_protocol = {self.security_protocol}: set SASL_SSL"
            return
        asks = f"security_protocol = {self.security_protocol} with {self.sasl_mechanism}"
        if self.sasl_mechanism == "OAUTHBEARER":
            if not _set(token):
                yield f"{asks} needs a token: set sasl_oauth_token_file"
            for name in _set(named):
                yield f"{asks} needs a token: remove {name}"
            return
        for name in _set(token):
            yield f"{asks} needs a user and a password: remove {name}"
        if not self.sasl_username:
            yield f"{asks} needs a user: set sasl_username"
        if not _set(password):
            yield (
                f"{asks} needs a password: set sasl_password_file, or the environment variable "
                f"{PREFIX}KAFKA__SASL_PASSWORD"
            )

    def _tls_faults(self) -> Iterator[str]:
        files = {name: getattr(self, name) for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile")}
        if not self.security_protocol.endswith("SSL"):
            for name in _set(files):
                yield f"{name} is set, but security_protocol = {self.security_protocol}: set SSL or SASL_SSL"
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            yield "ssl_certfile and ssl_keyfile must be set together"

    def password(self) -> str | None:
        """Return the SASL password, or None if none is set. Its file is read at each call.

        Raises:
            ConfigurationError: the file cannot be read, or does not hold one line of text.
        """
        if self.sasl_password is not None:
            return self.sasl_password.get_secret_value()
        return read_line("kafka.sasl_password_file", self.sasl_password_file)

    def token(self) -> str | None:
        """Return the token for OAUTHBEARER, or None if no file is set. The file is read at each call.

        Raises:
            ConfigurationError: the file cannot be read, or does not hold one line of text.
        """
        return read_line("kafka.sasl_oauth_token_file", self.sasl_oauth_token_file)


def _set(named: Mapping[str, object]) -> list[str]:
    return [name for name, value in named.items() if value]


class TopicSettings(Section):
    """Names of the topics. No topic may have two roles that conflict."""

    jobs: Annotated[TopicList, Field(min_length=1)] = Field(("streamworker.jobs",), description="job topics")
    events: Topic = Field("streamworker.events", description="events topic")
    control: Topic = Field("streamworker.control", description="control topic")
    dlq: Topic = Field("streamworker.dlq", description="dead-letter topic")
    allowed_reply_to: TopicList = Field((), description="topics that a job may name in reply_to")
    weights: Annotated[dict[Topic, Annotated[int, Field(ge=1, le=1000)]], BeforeValidator(_weights)] = Field(
        {},
        description="shares of the slots while several job topics have work, as in chat = 3; 1 for each topic by default",
    )
    results: Annotated[str, Field(pattern=_TOPIC_OR_NONE)] = Field(
        "", description="results topic: one record per job, with the whole completion; empty: none is written"
    )

    batches: Annotated[str, Field(pattern=_TOPIC_OR_NONE)] = Field(
        "",
        description="compacted topic with the state of files and batches of the gateway; empty: /v1/batches is not served",
    )
    batch: Annotated[str, Field(pattern=_TOPIC_OR_NONE)] = Field(
        "",
        description="job topic to which `streamworker batch` submits, one of jobs; empty: the first of jobs",
    )

    @model_validator(mode="after")
    def _no_loops(self) -> TopicSettings:
        ours = {self.events: "events", self.dlq: "dlq", self.control: "control"}
        for topic in (*self.jobs, *self.allowed_reply_to):
            if ours.get(topic) in {"dlq", "control"} or (topic in self.jobs and topic in ours):
                raise ValueError(f"{topic} is the {ours[topic]} topic: it cannot have a second role")
        if overlap := set(self.jobs) & set(self.allowed_reply_to):
            raise ValueError(f"a job topic cannot be in allowed_reply_to: {', '.join(sorted(overlap))}")
        if len(ours) < 3:
            raise ValueError("events, control and dlq must be three different topics")
        if strangers := sorted(set(self.weights) - set(self.jobs)):
            raise ValueError(f"weights: not a job topic: {', '.join(strangers)}")
        if self.batch and self.batch not in self.jobs:
            raise ValueError(
                f"batch: {self.batch} is not a job topic: add it to jobs, so that workers read it"
            )
        others = {
            **ours,
            **dict.fromkeys(self.jobs, "jobs"),
            **dict.fromkeys(self.allowed_reply_to, "reply_to"),
        }
        if self.results in others:
            raise ValueError(
                f"results: {self.results} is the {others[self.results]} topic: results need their own"
            )
        if self.batches and self.batches in {**others, self.results: "results"}:
            raise ValueError(
                f"batches: {self.batches} has another role: the state of batches needs its own topic"
            )
        return self


class WorkerSettings(Section):
    """Concurrency, time limits and delivery guarantee of one worker process."""

    group_id: str = Field("streamworker", min_length=1, description="consumer group")
    group_instance_id: str | None = Field(
        None,
        min_length=1,
        description="static membership: a name that is unique in the group and that the process keeps after a restart",
    )
    delivery: Literal["exactly_once", "at_least_once"] = Field(
        "exactly_once", description="exactly_once or at_least_once; see docs/delivery.md"
    )
    max_in_flight: int = Field(256, ge=1, le=100_000, description="streams open at once in this process")
    max_waiting: int = Field(
        1024,
        ge=1,
        le=1_000_000,
        description="jobs in memory besides those: they wait for an upstream, for an earlier job of their key, or for their next try; one upstream's jobs take at most half",
    )
    max_held_bytes: int = Field(
        268_435_456, ge=1 << 20, description="job records in memory, waiting ones included, in bytes"
    )
    ordering: Literal["none", "key"] = Field(
        "none", description="none, or key: jobs with the same record key run one after another"
    )
    fair_by: str = Field(
        "",
        pattern=_FAIR_BY,
        description="key, or metadata:NAME: waiting jobs take turns by their record key, or by one member of their metadata, instead of first come, first served",
    )
    max_in_flight_per: int = Field(
        0, ge=0, le=100_000, description="streams open at once for one value of fair_by; 0: no limit"
    )
    drain_timeout_s: float = Field(
        120, ge=0, le=86_400, description="how long open streams may continue after SIGTERM"
    )
    session_timeout_s: float = Field(
        45,
        ge=6,
        le=1800,
        description="how long the group waits for a worker that has stopped before its jobs move to another one",
    )
    move_timeout_s: Seconds = Field(
        900,
        description="how long a partition that is to move to another worker waits for its open streams",
    )
    max_deliveries: int = Field(
        5, ge=1, le=1000, description="deliveries of a job before it becomes a dead letter"
    )
    dedup_records: int = Field(
        1000,
        ge=0,
        le=100_000,
        description="a job record that repeats the id of one of this many records before it in its partition is skipped; 0: it runs",
    )
    max_job_bytes: int = Field(
        1_000_000,
        ge=1024,
        le=1 << 30,
        description="largest job record, in bytes; its dead letter must fit into the dead-letter topic, too",
    )
    on_no_offset: Literal["refuse", "earliest", "latest"] = Field(
        "refuse",
        description="where a group without any committed offset on a job topic begins: refuse begins at the first record "
        "if nothing was ever written to the events topic and ends with an error otherwise; earliest; latest",
    )
    max_event_bytes: int = Field(
        1 << 20, ge=1024, le=1 << 30, description="largest server-sent event of an upstream, in bytes"
    )
    commit_interval_s: Seconds = Field(1, description="at_least_once: how often offsets are committed")

    @model_validator(mode="after")
    def _limit_has_a_value(self) -> WorkerSettings:
        if self.max_in_flight_per and not self.fair_by:
            raise ValueError("max_in_flight_per limits the values of fair_by: set fair_by, too")
        return self


class UpstreamSettings(Section):
    """One upstream: an HTTP service with the chat-completions API."""

    base_url: str = Field(
        pattern=_URL,
        description="URL up to and including /v1; http://localhost:8000/v1 if no upstream is configured",
    )
    api_key_env: str | None = Field(
        None, pattern=_VARIABLE, description="environment variable that holds the API key"
    )
    api_key_file: OptionalPath = Field(None, description="file that holds the API key")
    headers: dict[Annotated[str, Field(pattern=_HEADER)], str] = Field(
        {},
        repr=False,
        description="headers of every call; a value env:NAME is read from that environment variable at each call",
    )
    proxy: str = Field(
        "",
        pattern=_PROXY,
        repr=False,
        description="URL of an HTTP proxy; env takes HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY",
    )
    ca_file: OptionalPath = Field(
        None, description="certificate authorities besides the system's, PEM; read again when it changes"
    )
    cert_file: OptionalPath = Field(
        None, description="client certificate for mutual TLS, PEM; read again when it changes"
    )
    key_file: OptionalPath = Field(None, description="key of the client certificate, PEM, not encrypted")
    models: NameList = Field(("*",), description="models that it serves: names, or patterns with * and ?")
    connect_timeout_s: Seconds = Field(
        5, description="time limit for the TCP connection and the TLS handshake"
    )
    first_delta_timeout_s: Seconds = Field(60, description="time limit from the call to the first delta")
    idle_timeout_s: Seconds = Field(
        30, description="time limit between deltas; comments and pings do not count"
    )
    max_tries: int = Field(
        4,
        ge=1,
        le=100,
        description="calls per attempt that fail; repeated only before the first delta; a 429 does not count",
    )
    max_restarts: int = Field(
        2, ge=0, le=100, description="further attempts after a stream broke, for jobs with on_break = restart"
    )
    fallback: Annotated[tuple[str, ...], BeforeValidator(comma_separated)] = Field(
        (),
        description="upstreams to call, in this order, when this one fails a job; jobs that name their upstream stay with it",
    )
    max_streams: int | None = Field(
        None, ge=1, le=100_000, description="streams open at once in this process"
    )
    requests_per_minute: int | None = Field(None, ge=1, description="calls of this process in any 60 seconds")
    tokens_per_minute: int | None = Field(
        None,
        ge=1,
        description="tokens of this process in any 60 seconds: estimated before a call; tokens_counted says what follows",
    )
    tokens_counted: Literal["usage", "reserved"] = Field(
        "usage",
        description="how the provider counts tokens_per_minute: the estimate is corrected by the call's usage report; or "
        "prompt and max_tokens count in full (Azure OpenAI), whatever the call used",
    )
    circuit_failure_threshold: int = Field(
        10, ge=1, description="consecutive failed calls that open the circuit"
    )
    circuit_open_s: Seconds = Field(
        5, description="how long an open circuit waits before one call probes the upstream; doubles up to 30"
    )
    max_wait_s: Seconds = Field(
        3600,
        description="how long a job waits for an upstream that is unavailable, limits its calls, or refuses the key or the account, before it fails",
    )
    include_usage: bool = Field(True, description="request a usage report (stream_options.include_usage)")
    continuous_usage: bool = Field(
        False, description="request running totals too (stream_options.continuous_usage_stats: vLLM, SGLang)"
    )
    cancel_grace_s: float = Field(
        0,
        ge=0,
        le=600,
        description="how long a cancelled stream is still read for its usage report; 0 closes it at once",
    )

    @model_validator(mode="after")
    def _one_key(self) -> UpstreamSettings:
        if self.api_key_env and self.api_key_file:
            raise ValueError("set api_key_env or api_key_file, not both")
        if self.base_url.rstrip("/").endswith("/chat/completions"):
            raise ValueError("base_url must end before /chat/completions, which the worker appends")
        if "@" in self.base_url.partition("//")[2].partition("/")[0]:
            raise ValueError("base_url must not hold a user or password: use api_key_env or api_key_file")
        return self

    @model_validator(mode="after")
    def _calls_can_be_sent(self) -> UpstreamSettings:
        if self.key_file and not self.cert_file:
            raise ValueError("key_file needs cert_file")
        for name in self.headers:
            if name.lower() in RESERVED_HEADERS:
                raise ValueError(f"headers must not set {name.lower()}, which the worker sets itself")
            if name.lower() == "authorization" and (self.api_key_env or self.api_key_file):
                raise ValueError("headers must not set authorization beside api_key_env or api_key_file")
        return self

    def header_values(self, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
        """Return `headers` with the values of the variables that they name. Variables are read at each call.

        Raises:
            ConfigurationError: a variable is not set, or a value cannot be sent in a header.
        """
        return read_headers(self.headers, environ)

    def secrets(self, environ: Mapping[str, str] = os.environ) -> list[str]:
        """Return what no log, event or error may contain: the key, header values, the password of the proxy.

        What cannot be read is left out.
        """
        found = [read_proxy_password(self.proxy, environ)]
        with suppress(ConfigurationError):
            found.append(self.api_key(environ))
        with suppress(ConfigurationError):
            found += self.header_values(environ).values()
        return [secret for secret in found if secret]

    def api_key(self, environ: Mapping[str, str] = os.environ) -> str | None:
        """Return the API key, or None if the upstream needs none. Its variable or file is read at each call.

        Raises:
            ConfigurationError: the variable is not set, the file cannot be read, or the key cannot be sent in a header.
        """
        return read_api_key(self.api_key_env, self.api_key_file, environ)


class EventSettings(Section):
    """Format and batching of event records."""

    format: Literal["json", "cloudevents"] = Field(
        "json", description="json, or cloudevents: the same values with CloudEvents 1.0 headers"
    )
    source: str = Field("/streamworker", min_length=1, description="ce_source of CloudEvents")
    linger_ms: float = Field(
        5,
        ge=0,
        le=1000,
        description="how long deltas may wait for others to share a produce request; the first delta of a job does not wait",
    )
    coalesce_ms: float = Field(
        0,
        ge=0,
        le=1000,
        description="how long text may wait to be merged with the text after it; 0: one event per delta",
    )


class BatchSettings(Section):
    """Batches: `streamworker batch`, and `/v1/files` and `/v1/batches` of the gateway."""

    files: str = Field(
        "file:///var/lib/streamworker/files",
        min_length=1,
        description="where the gateway keeps files: a folder (file://), of one gateway or on a volume that all share, or s3://, "
        "gs://, az:// with a bucket and a prefix (extra objects)",
    )
    kept_s: float = Field(
        2_592_000, ge=60, description="how long the gateway keeps files and ended batches; 30 days"
    )
    max_file_bytes: int = Field(
        200_000_000, ge=1, description="size of an uploaded file; a larger one is refused"
    )
    max_files: int = Field(
        10_000,
        ge=1,
        description="files that the gateway keeps for one tenant, those of results included; a further upload is refused",
    )
    max_batches: int = Field(
        10_000,
        ge=1,
        description="batches that the gateway keeps for one tenant, ended ones included; a further one is refused",
    )
    max_lines: int = Field(50_000, ge=1, description="lines of a batch; a longer one fails in validation")
    window: int = Field(
        1000,
        ge=1,
        le=100_000,
        description="lines of one batch that are submitted and have not ended, in the gateway",
    )
    max_running: int = Field(8, ge=1, le=1000, description="batches that one gateway runs at a time")
    group_id: str = Field(
        "streamworker-batches",
        min_length=1,
        max_length=255,
        description="consumer group in which gateways divide the batches",
    )

    merged_deltas: bool = Field(
        False,
        description="whether the jobs of a batch ask for merged deltas, which saves events; every worker must know the member `deltas`",
    )


class TelemetrySettings(Section):
    """Probes, metrics, logs and traces."""

    http_host: str = Field("0.0.0.0", min_length=1, description="address of /livez /readyz /metrics")  # noqa: S104
    http_port: int = Field(
        9464, ge=0, le=65535, description="port of /livez /readyz /metrics; 0 chooses a free one"
    )
    log_format: Literal["", "json", "console"] = Field(
        "", description="json or console; default: console on a terminal, else json"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="debug, info, warning or error"
    )
    label_metadata: str = Field(
        "",
        max_length=200,
        description="one name of the jobs' metadata whose values are a metric label and a field of the job's log line; the first 150 values have a label of their own",
    )
    traces: Literal["off", "otlp"] = Field(
        "off",
        description="off, or otlp: send spans to the collector that the OTEL_* environment variables name",
    )


class Settings(Section):
    """The whole configuration. It is read once and does not change."""

    kafka: KafkaSettings = KafkaSettings()
    topics: TopicSettings = TopicSettings()
    worker: WorkerSettings = WorkerSettings()
    upstreams: dict[Annotated[str, Field(pattern=_UPSTREAM_NAME)], UpstreamSettings] = {  # noqa: RUF012 - pydantic copies it
        "default": UpstreamSettings(base_url="http://localhost:8000/v1", api_key_env=None)
    }
    events: EventSettings = EventSettings()
    batch: BatchSettings = BatchSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    gateway: GatewaySettings = GatewaySettings()

    @model_validator(mode="after")
    def _gateway_submits_to_a_job_topic(self) -> Settings:
        topic, jobs = self.gateway.topic, self.topics.jobs
        if topic and topic not in jobs:
            raise ValueError(f"gateway.topic: {topic} must be one of topics.jobs: {', '.join(jobs)}")
        return self

    @model_validator(mode="after")
    def _fallbacks_are_others(self) -> Settings:
        for name, upstream in self.upstreams.items():
            for other in upstream.fallback:
                if other == name or other not in self.upstreams or upstream.fallback.count(other) > 1:
                    raise ValueError(
                        f"upstreams.{name}.fallback: {other} must be another configured upstream, named once"
                    )
        return self


def describe() -> Iterator[tuple[str, str, str]]:
    """Yield every setting: its path, its default as text, and its help text."""
    for section, field in Settings.model_fields.items():
        kind = UpstreamSettings if section == "upstreams" else field.annotation
        assert isinstance(kind, type) and issubclass(kind, BaseModel)  # noqa: PT018
        for name, setting in kind.model_fields.items():
            path = f"upstreams.<name>.{name}" if section == "upstreams" else f"{section}.{name}"
            yield (
                path,
                _default_text(setting.get_default(), required=setting.is_required()),
                setting.description or "",
            )


def _default_text(default: Any, *, required: bool) -> str:
    if required:
        return "(required)"
    if default is None:
        return "-"
    if isinstance(default, dict):
        return ",".join(f"{name}={value}" for name, value in default.items()) or "-"
    if isinstance(default, tuple):
        return ",".join(default) or "-"
    if isinstance(default, dict):
        return "-"
    return str(default).lower() if isinstance(default, bool) else str(default)
