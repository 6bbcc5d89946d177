"""The settings (contract §6): a TOML file, overridden by environment variables `STREAMWORKER_<SECTION>__<NAME>`.

Each setting is declared once, here, with its default and its help; `streamworker run --help` and the README's table
come from these declarations. A configuration is a value: it is read once, whole, and every fault is told at once.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from streamworker.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "KafkaSettings",
    "Settings",
    "TopicSettings",
    "UpstreamSettings",
    "WorkerSettings",
    "describe",
    "load",
]

PREFIX = "STREAMWORKER_"
_TOPIC = r"^[A-Za-z0-9._-]{1,249}$"


def _comma_separated(value: Any) -> Any:
    """Let an environment variable hold a list as `a,b`."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


Topic = Annotated[str, Field(pattern=_TOPIC)]
TopicList = Annotated[tuple[Topic, ...], BeforeValidator(_comma_separated)]
NameList = Annotated[tuple[str, ...], BeforeValidator(_comma_separated), Field(min_length=1)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


def _has_ports(servers: str) -> str:
    for server in servers.split(","):
        _, colon, port = server.strip().rpartition(":")
        if not colon or not port.isdigit() or not 0 < int(port[:6]) < 65536:
            raise ValueError(f"expected host:port, several by comma, not {server.strip()!r}")
    return servers


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class KafkaSettings(_Section):
    """How to reach Kafka."""

    bootstrap_servers: Annotated[str, AfterValidator(_has_ports)] = Field(
        "localhost:9092", min_length=1, description="host:port, several by comma"
    )
    client_id: str = Field("streamworker", min_length=1, description="name in the broker's logs and quotas")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = Field(
        "PLAIN", description="PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 or OAUTHBEARER"
    )
    sasl_username: str | None = Field(None, description="user name for PLAIN and SCRAM")
    sasl_password: SecretStr | None = Field(
        None, description="password for PLAIN and SCRAM; from the environment only"
    )
    sasl_password_file: Path | None = Field(
        None, description="file that holds the password; read for each connection, so that it can be rotated"
    )
    sasl_oauth_token_file: Path | None = Field(
        None,
        description="file that holds the token for OAUTHBEARER; read for each connection, like the password",
    )
    ssl_cafile: Path | None = Field(None, description="certificate authorities, PEM; default: the system's")
    ssl_certfile: Path | None = Field(
        None, description="client certificate for mutual TLS, PEM; read for each connection"
    )
    ssl_keyfile: Path | None = Field(None, description="key of the client certificate, PEM, not encrypted")
    compression: Literal["none", "lz4", "snappy", "zstd", "gzip"] = Field(
        "lz4", description="compression of what we write"
    )
    max_record_bytes: int = Field(
        1_000_000,
        ge=16_384,
        le=1 << 30,
        description="largest event record; the topics' max.message.bytes is above it",
    )
    max_unacknowledged_bytes: int = Field(
        32 << 20, ge=1 << 20, description="events on the way to the broker; above it sockets are not read"
    )
    request_timeout_s: Seconds = Field(30, description="how long a broker may take to answer one request")

    @model_validator(mode="after")
    def _security_is_whole(self) -> KafkaSettings:
        """Refuse what is missing and what would be passed over: who names a certificate means TLS."""
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
        asks = f"security_protocol asks for SASL with {self.sasl_mechanism}"
        if self.sasl_mechanism == "OAUTHBEARER":
            if not _set(token):
                yield f"{asks}: set sasl_oauth_token_file"
            for name in _set(named):
                yield f"{asks}, which takes a token: {name} does not go with it"
            return
        for name in _set(token):
            yield f"{asks}, which takes a user and a password: {name} does not go with it"
        if not self.sasl_username:
            yield f"{asks}: set sasl_username"
        if not _set(password):
            yield f"{asks}: set sasl_password_file, or the environment variable {PREFIX}KAFKA__SASL_PASSWORD"

    def _tls_faults(self) -> Iterator[str]:
        files = {name: getattr(self, name) for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile")}
        if not self.security_protocol.endswith("SSL"):
            for name in _set(files):
                yield f"{name} is set, but security_protocol = {self.security_protocol}: set SSL or SASL_SSL"
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            yield "ssl_certfile and ssl_keyfile go together: set both or none"

    def password(self) -> str | None:
        """Return the SASL password, read from its file each time, so that it can be rotated; None where none is set.

        Raises:
            ConfigurationError: the file cannot be read, or holds nothing.
        """
        if self.sasl_password is not None:
            return self.sasl_password.get_secret_value()
        return _line_of("kafka.sasl_password_file", self.sasl_password_file)

    def token(self) -> str | None:
        """Return the token for OAUTHBEARER, read from its file each time; None where none is set.

        Raises:
            ConfigurationError: the file cannot be read, or holds nothing.
        """
        return _line_of("kafka.sasl_oauth_token_file", self.sasl_oauth_token_file)


def _set(named: Mapping[str, object]) -> list[str]:
    return [name for name, value in named.items() if value]


def _line_of(setting: str, path: Path | None) -> str | None:
    """Read a secret's file: one line. The message does not repeat it."""
    if path is None:
        return None
    try:
        text = path.read_text("utf-8").strip()
    except OSError as error:
        raise ConfigurationError([f"{setting}: {error.strerror}: {path}"]) from None
    except UnicodeDecodeError:
        text = ""
    if not text or not text.isprintable():
        raise ConfigurationError([f"{setting}: the file {path} has to hold one line of text"])
    return text


class TopicSettings(_Section):
    """Names of the topics."""

    jobs: Annotated[TopicList, Field(min_length=1)] = Field(("streamworker.jobs",), description="job topics")
    events: Topic = Field("streamworker.events", description="events topic")
    control: Topic = Field("streamworker.control", description="control topic")
    dlq: Topic = Field("streamworker.dlq", description="dead-letter topic")
    allowed_reply_to: TopicList = Field((), description="topics that a job may name in reply_to")

    @model_validator(mode="after")
    def _no_loops(self) -> TopicSettings:
        ours = {self.events: "events", self.dlq: "dlq", self.control: "control"}
        for topic in (*self.jobs, *self.allowed_reply_to):
            if ours.get(topic) in {"dlq", "control"} or (topic in self.jobs and topic in ours):
                raise ValueError(
                    f"{topic} cannot be what the worker reads and the {ours[topic]} topic at once"
                )
        if overlap := set(self.jobs) & set(self.allowed_reply_to):
            raise ValueError(f"a job topic cannot be answered to: {', '.join(sorted(overlap))}")
        if len(ours) < 3:
            raise ValueError("events, control and dlq must be three topics")
        return self


class WorkerSettings(_Section):
    """How much at once, how long, how surely."""

    group_id: str = Field("streamworker", min_length=1, description="consumer group")
    group_instance_id: str | None = Field(
        None,
        min_length=1,
        description="static membership: a name that is this process's alone and survives it",
    )
    delivery: Literal["exactly_once", "at_least_once"] = Field(
        "exactly_once", description="see docs/delivery.md"
    )
    max_in_flight: int = Field(256, ge=1, le=100_000, description="streams open at once in this process")
    max_waiting: int = Field(
        1024,
        ge=1,
        le=1_000_000,
        description="jobs held beside those: they wait for an upstream, for one of their key, or for their next try",
    )
    ordering: Literal["none", "key"] = Field("none", description="key: jobs of one key run one after another")
    drain_timeout_s: float = Field(
        120, ge=0, le=86_400, description="how long open streams may go on at SIGTERM"
    )
    session_timeout_s: float = Field(45, ge=6, le=1800, description="how soon a dead worker's jobs move on")
    max_deliveries: int = Field(
        5, ge=1, le=1000, description="deliveries of a job before it is a dead letter"
    )
    max_job_bytes: int = Field(1 << 20, ge=1024, le=1 << 30, description="largest job record")
    max_event_bytes: int = Field(
        1 << 20, ge=1024, le=1 << 30, description="largest server-sent event of an upstream"
    )
    commit_interval_s: Seconds = Field(1, description="at_least_once: how often offsets are committed")


class UpstreamSettings(_Section):
    """One upstream."""

    base_url: str = Field(
        pattern=r"^https?://[^\s/?#]+[^\s?#]*$",
        description="URL up to and with /v1; with no upstream configured at all: http://localhost:8000/v1",
    )
    api_key_env: str | None = Field(
        None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="environment variable that holds the API key"
    )
    api_key_file: Path | None = Field(None, description="file that holds the API key")
    models: NameList = Field(("*",), description="models it serves: names, or patterns with * and ?")
    connect_timeout_s: Seconds = Field(5, description="for TCP and TLS")
    first_delta_timeout_s: Seconds = Field(60, description="from the call to the first delta")
    idle_timeout_s: Seconds = Field(30, description="between deltas; comments and pings do not count")
    max_tries: int = Field(4, ge=1, le=100, description="calls per attempt, all before the first delta")
    max_restarts: int = Field(
        2, ge=0, le=100, description="new attempts after a break, for jobs with on_break = restart"
    )
    fallback: Annotated[tuple[str, ...], BeforeValidator(_comma_separated)] = Field(
        (),
        description="upstreams that are called, in this order, for jobs that this one failed; not for jobs that name it",
    )
    max_streams: int | None = Field(
        None, ge=1, le=100_000, description="streams open at once, in this process"
    )
    requests_per_minute: int | None = Field(None, ge=1, description="calls in any minute, of this process")
    tokens_per_minute: int | None = Field(
        None,
        ge=1,
        description="tokens in any minute, of this process: estimated before a call, settled after it",
    )
    circuit_failure_threshold: int = Field(
        10, ge=1, description="calls that fail in a row before the upstream is thought dead"
    )
    circuit_open_s: Seconds = Field(
        5, description="how long a dead upstream is left alone before one call probes it; doubles up to 60"
    )
    max_wait_s: Seconds = Field(
        60, description="how long a job waits for a dead upstream before it fails as upstream_unavailable"
    )
    include_usage: bool = Field(True, description="ask for a usage report (stream_options.include_usage)")
    continuous_usage: bool = Field(
        False, description="ask for running totals too (stream_options.continuous_usage_stats: vLLM, SGLang)"
    )
    cancel_grace_s: float = Field(
        0,
        ge=0,
        le=600,
        description="how long a cancelled stream is read on for its usage report; 0 cuts at once",
    )

    @model_validator(mode="after")
    def _one_key(self) -> UpstreamSettings:
        if self.api_key_env and self.api_key_file:
            raise ValueError("set api_key_env or api_key_file, not both")
        if self.base_url.rstrip("/").endswith("/chat/completions"):
            raise ValueError("base_url ends before /chat/completions, which is added: with /v1")
        if "@" in self.base_url.partition("//")[2].partition("/")[0]:
            raise ValueError("base_url must not hold a user or password: use api_key_env or api_key_file")
        return self

    def api_key(self, environ: Mapping[str, str] = os.environ) -> str | None:
        """Return the key, read where it lies each time, so that it can be rotated; None if the upstream needs none.

        Raises:
            ConfigurationError: the variable is not set, the file cannot be read, or what they hold is no key.
        """
        if self.api_key_env:
            if key := environ.get(self.api_key_env, "").strip():
                return _sendable(key, f"api_key_env: the environment variable {self.api_key_env}")
            raise ConfigurationError([f"api_key_env: the environment variable {self.api_key_env} is not set"])
        if self.api_key_file:
            try:
                key = self.api_key_file.read_bytes().decode("ascii", "replace").strip()
            except OSError as error:
                raise ConfigurationError([f"api_key_file: {error.strerror}: {self.api_key_file}"]) from None
            return _sendable(key, f"api_key_file: the file {self.api_key_file}")
        return None


def _sendable(key: str, where: str) -> str:
    """Refuse what cannot stand in a header, without repeating it."""
    if key and key.isascii() and key.isprintable():
        return key
    raise ConfigurationError([f"{where} does not hold a key: it has to be one line of ASCII"])


class EventSettings(_Section):
    """The form of event records."""

    format: Literal["json", "cloudevents"] = Field(
        "json", description="cloudevents adds CloudEvents 1.0 headers"
    )
    source: str = Field("/streamworker", min_length=1, description="the ce_source of CloudEvents")
    linger_ms: float = Field(
        5,
        ge=0,
        le=1000,
        description="how long deltas may wait for others to share a request; a job's first never does",
    )
    coalesce_ms: float = Field(
        0,
        ge=0,
        le=1000,
        description="how long text may wait to become one event with the text after it; 0: every delta is an event",
    )


class TelemetrySettings(_Section):
    """Probes, metrics and logs."""

    http_host: str = Field("0.0.0.0", min_length=1, description="address of /livez /readyz /metrics")  # noqa: S104
    http_port: int = Field(
        9464, ge=0, le=65535, description="port of /livez /readyz /metrics; 0 takes a free one"
    )
    log_format: Literal["json", "console"] = Field("json", description="json or console")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="debug, info, warning or error"
    )
    traces: Literal["off", "otlp"] = Field(
        "off", description="off, or otlp: send spans to a collector that OTEL_* environment variables name"
    )


class Settings(_Section):
    """The whole configuration."""

    kafka: KafkaSettings = KafkaSettings()
    topics: TopicSettings = TopicSettings()
    worker: WorkerSettings = WorkerSettings()
    upstreams: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")], UpstreamSettings] = {
        "default": UpstreamSettings(base_url="http://localhost:8000/v1", api_key_env=None)
    }
    events: EventSettings = EventSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @model_validator(mode="after")
    def _fallbacks_are_others(self) -> Settings:
        for name, upstream in self.upstreams.items():
            for other in upstream.fallback:
                if other == name or other not in self.upstreams or upstream.fallback.count(other) > 1:
                    raise ValueError(
                        f"upstreams.{name}.fallback: {other} is not another upstream that is configured, named once"
                    )
        return self


_SECRETS = {("kafka", "sasl_password"): "sasl_password_file"}


def load(path: Path | None, environ: Mapping[str, str] = os.environ, *, needs_keys: bool = True) -> Settings:
    """Read the settings. Who calls no upstream does not need its key.

    Raises:
        ConfigurationError: with every fault of file and environment, each naming where it stands.
    """
    from_file, faults = _read_file(path)
    faults += _misplaced_secrets(from_file)
    faults += _misspelt_variables(environ)
    from_environment, variables = _read_environment(environ)
    try:
        settings = Settings.model_validate(_merge(from_file, from_environment))
    except ValidationError as error:
        faults += [_fault(fault, variables) for fault in error.errors(include_url=False, include_input=False)]
    else:
        faults += _unreadable_files(settings)
        faults += _missing_keys(settings, environ) if needs_keys else []
    if faults:
        raise ConfigurationError(faults)
    return settings


def describe() -> Iterator[tuple[str, str, str]]:
    """Go through every setting: its path, its default as text, and its help."""
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
    if isinstance(default, tuple):
        return ",".join(default) or "-"
    return str(default).lower() if isinstance(default, bool) else str(default)


def _read_file(path: Path | None) -> tuple[dict[str, Any], list[str]]:
    if path is None:
        return {}, []
    try:
        return tomllib.loads(path.read_text("utf-8")), []
    except OSError as error:
        return {}, [f"{path}: {error.strerror}"]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return {}, [f"{path}: is not TOML: {error}"]


def _misplaced_secrets(from_file: dict[str, Any]) -> list[str]:
    faults = []
    for (section, name), instead in _SECRETS.items():
        if isinstance(values := from_file.get(section), dict) and values.pop(name, None) is not None:
            variable = f"{PREFIX}{section}__{name}".upper()
            faults.append(
                f"{section}.{name}: a secret does not belong in this file; set {variable} or {instead}"
            )
    upstreams = from_file.get("upstreams")
    for upstream, values in upstreams.items() if isinstance(upstreams, dict) else ():
        if isinstance(values, dict) and values.pop("api_key", None) is not None:
            path = f"upstreams.{upstream}.api_key"
            faults.append(f"{path}: a secret does not belong in this file; name a variable in api_key_env")
    return faults


def _read_environment(environ: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Collect the variables into the file's shape, and note which variable gave which path.

    Only names with a double underscore are settings: Kubernetes sets STREAMWORKER_SERVICE_HOST and the like for any
    Service of that name.
    """
    values: dict[str, Any] = {}
    variables: dict[str, str] = {}
    for variable, value in sorted(environ.items()):
        if variable.startswith(PREFIX) and "__" in variable:
            path = variable.removeprefix(PREFIX).lower().split("__")
            section = values
            for name in path[:-1]:
                inner = section.setdefault(name, {})
                section = inner if isinstance(inner, dict) else section.setdefault(name + " ", {})
            section[path[-1]] = value
            variables[".".join(path)] = variable
    return values, variables


def _misspelt_variables(environ: Mapping[str, str]) -> list[str]:
    """Find variables with one underscore where two are meant: they would be passed over in silence."""
    right = {path.upper().replace(".", "__"): path for path, _, _ in describe() if "<" not in path}
    meant = {PREFIX + name.replace("__", "_", 1): PREFIX + name for name in right}
    return [
        f"{variable}: is not a setting; did you mean {meant[variable]}?"
        for variable in environ
        if variable in meant
    ]


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        below = merged.get(name)
        merged[name] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _fault(fault: Any, variables: Mapping[str, str]) -> str:
    path = ".".join(str(part) for part in fault["loc"] if part != "[key]")
    if not path:  # it is about several, and names them
        return _reason(fault)
    variable = next((name for at, name in variables.items() if at == path or at.startswith(path + ".")), None)
    return f"{path} ({variable}): {_reason(fault)}" if variable else f"{path}: {_reason(fault)}"


def _is_about_a_key(fault: Any) -> bool:
    return bool(fault["loc"]) and fault["loc"][-1] == "api_key_env"


def _reason(fault: Any) -> str:
    match fault["type"]:
        case "extra_forbidden":
            return "is not a setting; see `streamworker run --help` for all of them"
        case "missing":
            return "is required"
        case "string_pattern_mismatch":
            if _is_about_a_key(fault):
                return "has to be the name of an environment variable, not the key itself"
            return f"does not look like one ({fault['ctx']['pattern']})"
    message = re.sub(r"^Value error, ", "", fault["msg"])
    return message[:1].lower() + message[1:]


def _missing_keys(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    faults = []
    for name, upstream in settings.upstreams.items():
        try:
            upstream.api_key(environ)
        except ConfigurationError as error:
            faults += [f"upstreams.{name}.{fault}" for fault in error.faults]
    return faults


def _unreadable_files(settings: Settings) -> list[str]:
    kafka = settings.kafka
    faults = []
    for field in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
        file = getattr(kafka, field)
        if file is not None and not (file.is_file() and os.access(file, os.R_OK)):
            faults.append(f"kafka.{field}: is no file that can be read: {file}")
    for read in (kafka.password, kafka.token):
        try:
            read()
        except ConfigurationError as error:
            faults += error.faults
    return faults
