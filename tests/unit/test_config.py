"""The settings: defaults, sources, error messages, secrets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from streamworker.config import Settings, UpstreamSettings, WorkerSettings, describe, load, variables_read
from streamworker.config.secrets import read_line
from streamworker.config.settings import EXPECTED
from streamworker.config.suggestions import nearest_path
from streamworker.errors import ConfigurationError
from streamworker.kafka.topics import TopicFacts, faults_of

UPSTREAM = {"STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL": "http://up/v1"}
SECRET = "hunter2-hunter2"


@pytest.fixture
def toml(tmp_path: Path) -> Any:
    """Write a TOML file; return its path."""

    def write(text: str) -> Path:
        path = tmp_path / "streamworker.toml"
        path.write_text(text, "utf-8")
        return path

    return write


def faults(path: Path | None = None, environ: dict[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        load(path, environ or {})
    return caught.value.faults


# Defaults


def test_config_without_a_source_has_the_documented_defaults() -> None:
    """Every default, value by value."""
    assert load(None, {}).model_dump() == {
        "kafka": {
            "bootstrap_servers": "localhost:9092",
            "client_id": "streamworker",
            "security_protocol": "PLAINTEXT",
            "sasl_mechanism": "PLAIN",
            "sasl_username": None,
            "sasl_password": None,
            "sasl_password_file": None,
            "sasl_oauth_token_file": None,
            "ssl_cafile": None,
            "ssl_certfile": None,
            "ssl_keyfile": None,
            "compression": "lz4",
            "max_record_bytes": 1_000_000,
            "max_result_bytes": 1_000_000,
            "max_unacknowledged_bytes": 33_554_432,
            "request_timeout_s": 30,
        },
        "topics": {
            "jobs": ("streamworker.jobs",),
            "events": "streamworker.events",
            "control": "streamworker.control",
            "dlq": "streamworker.dlq",
            "allowed_reply_to": (),
            "weights": {},
            "results": "",
            "batch": "",
            "batches": "",
        },
        "worker": {
            "group_id": "streamworker",
            "group_instance_id": None,
            "delivery": "exactly_once",
            "max_in_flight": 256,
            "max_waiting": 1024,
            "max_held_bytes": 268_435_456,
            "ordering": "none",
            "fair_by": "",
            "max_in_flight_per": 0,
            "drain_timeout_s": 120,
            "session_timeout_s": 45,
            "move_timeout_s": 900,
            "max_deliveries": 5,
            "dedup_records": 1000,
            "max_job_bytes": 1_000_000,
            "on_no_offset": "refuse",
            "max_event_bytes": 1_048_576,
            "commit_interval_s": 1,
        },
        "upstreams": {
            "default": {
                "base_url": "http://localhost:8000/v1",
                "api_key_env": None,
                "api_key_file": None,
                "headers": {},
                "proxy": "",
                "ca_file": None,
                "cert_file": None,
                "key_file": None,
                "models": ("*",),
                "connect_timeout_s": 5,
                "first_delta_timeout_s": 60,
                "idle_timeout_s": 30,
                "max_tries": 4,
                "max_restarts": 2,
                "fallback": (),
                "max_streams": None,
                "requests_per_minute": None,
                "tokens_per_minute": None,
                "tokens_counted": "usage",
                "circuit_failure_threshold": 10,
                "circuit_open_s": 5,
                "max_wait_s": 3600,
                "include_usage": True,
                "continuous_usage": False,
                "cancel_grace_s": 0,
            }
        },
        "events": {"format": "json", "source": "/streamworker", "linger_ms": 5, "coalesce_ms": 0},
        "batch": {
            "files": "file:///var/lib/streamworker/files",
            "group_id": "streamworker-batches",
            "kept_s": 2_592_000,
            "max_file_bytes": 200_000_000,
            "max_files": 10_000,
            "max_batches": 10_000,
            "max_lines": 50_000,
            "max_running": 8,
            "merged_deltas": False,
            "window": 1000,
        },
        "telemetry": {
            "http_host": "0.0.0.0",
            "http_port": 9464,
            "log_format": "",
            "log_level": "info",
            "label_metadata": "",
            "traces": "off",
        },
        "gateway": {
            "host": "127.0.0.1",
            "port": 8088,
            "topic": "",
            "auth": "keys",
            "keys_file": Path("gateway-keys.toml"),
            "token_secrets_file": None,
            "token_audience": "streamworker-gateway",
            "token_max_age_s": 3600,
            "cors_origins": (),
            "read": "subscribed",
            "home_partitions": 0,
            "lookback_s": 3600,
            "search_max_records": 2_000_000,
            "search_max_s": 10,
            "keep_alive_s": 15,
            "max_stream_age_s": 900,
            "stall_s": 30,
            "drain_s": 60,
            "models": (),
            "chat_timeout_s": 600,
            "chat_max_wait_s": 30,
            "former_partitions": (),
            "chat_status_hold_s": 10,
            "chat_usage": "chunk",
            "chat_on_disconnect": "cancel",
        },
    }


def test_config_describe_covers_every_setting_once_with_its_default_and_help() -> None:
    """`run --help` and docs/configuration.md are derived from it."""
    rows = list(describe())
    dumped = load(None, {}).model_dump()
    dumped["upstreams"] = {"<name>": dumped["upstreams"]["default"]}
    expected = [
        f"{section}.{name}" if section != "upstreams" else f"upstreams.<name>.{inner}"
        for section, values in dumped.items()
        for name, value in values.items()
        for inner in (value if section == "upstreams" else [""])
    ]
    reported = {path: default for path, default, _ in rows}

    assert [path for path, _, _ in rows] == expected
    assert all(len(text) > 5 for _, _, text in rows)
    assert reported["upstreams.<name>.base_url"] == "(required)"
    assert reported["upstreams.<name>.include_usage"] == "true"
    assert reported["kafka.sasl_password"] == "-"
    assert reported["topics.jobs"] == "streamworker.jobs"
    assert reported["topics.allowed_reply_to"] == "-"
    assert reported["worker.max_in_flight"] == "256"


def test_config_assignment_to_a_setting_raises() -> None:
    """Settings are immutable."""
    with pytest.raises(ValidationError):
        load(None, {}).worker.max_in_flight = 1  # type: ignore[misc]


# Sources


def test_config_file_leaves_other_settings_at_their_defaults(toml: Any) -> None:
    """Only the settings that the file names change."""
    path = toml(
        """
        [worker]
        max_in_flight = 7
        [upstreams.one]
        base_url = "http://one/v1"
        models = ["gpt-*", "o?"]
        """
    )
    settings = load(path, {})

    assert settings.worker == WorkerSettings(max_in_flight=7)
    assert settings.upstreams == {"one": UpstreamSettings(base_url="http://one/v1", models=("gpt-*", "o?"))}
    assert settings.topics == Settings().topics


def test_config_environment_overrides_single_settings_of_the_file(toml: Any) -> None:
    """Settings that the environment does not name keep the value of the file, also inside an upstream."""
    path = toml(
        """
        [worker]
        max_in_flight = 7
        group_id = "g"
        [upstreams.one]
        base_url = "http://one/v1"
        idle_timeout_s = 3
        """
    )
    settings = load(
        path,
        {
            "STREAMWORKER_WORKER__MAX_IN_FLIGHT": "8",
            "STREAMWORKER_UPSTREAMS__ONE__BASE_URL": "https://other/v1",
            "STREAMWORKER_UPSTREAMS__TWO__BASE_URL": "http://two/v1",
        },
    )

    assert (settings.worker.max_in_flight, settings.worker.group_id) == (8, "g")
    assert settings.upstreams["one"].base_url == "https://other/v1"
    assert settings.upstreams["one"].idle_timeout_s == 3
    assert list(settings.upstreams) == ["one", "two"]


def test_config_environment_without_a_file_is_sufficient() -> None:
    """Numbers, booleans and lists are parsed from text."""
    settings = load(
        None,
        {
            "STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS": "a:1,b:2",
            "STREAMWORKER_TOPICS__JOBS": "one, two,",
            "STREAMWORKER_TOPICS__ALLOWED_REPLY_TO": "r1,r2",
            "STREAMWORKER_WORKER__DRAIN_TIMEOUT_S": "0.5",
            "STREAMWORKER_UPSTREAMS__MY-LLM__BASE_URL": "http://x/v1",
            "STREAMWORKER_UPSTREAMS__MY-LLM__MODELS": "a, b*",
            "STREAMWORKER_UPSTREAMS__MY-LLM__INCLUDE_USAGE": "false",
            "STREAMWORKER_TELEMETRY__HTTP_PORT": "0",
        },
    )

    assert settings.kafka.bootstrap_servers == "a:1,b:2"
    assert settings.topics.jobs == ("one", "two")
    assert settings.topics.allowed_reply_to == ("r1", "r2")
    assert settings.worker.drain_timeout_s == 0.5
    assert settings.upstreams["my-llm"].models == ("a", "b*")
    assert settings.upstreams["my-llm"].include_usage is False
    assert settings.telemetry.http_port == 0


def test_config_upstream_name_with_an_underscore_is_read_from_a_variable(toml: Any) -> None:
    """One underscore is part of a name, two separate the levels."""
    settings = load(None, {"STREAMWORKER_UPSTREAMS__MY_LLM__BASE_URL": "http://x/v1"})

    assert list(settings.upstreams) == ["my_llm"]


def test_config_variables_of_a_kubernetes_service_are_ignored() -> None:
    """Kubernetes sets them in every pod for a Service named streamworker."""
    environ = {
        "STREAMWORKER_SERVICE_HOST": "10.0.0.1",
        "STREAMWORKER_SERVICE_PORT": "9464",
        "STREAMWORKER_PORT": "tcp://10.0.0.1:9464",
        "STREAMWORKER_PORT_9464_TCP_ADDR": "10.0.0.1",
        "STREAMWORKER_TEST_KAFKA": "x",
        "OTHER_WORKER__GROUP_ID": "x",
    }

    assert load(None, environ) == load(None, {})


# Faults


def test_config_with_several_faults_reports_all_with_path_and_variable(toml: Any) -> None:
    """One error names every fault of the file and the environment."""
    path = toml(
        """
        nonsense = 1
        [worker]
        max_in_flight = 0
        ordering = "keys"
        max_inflight = 3
        [topics]
        events = "not a topic"
        [upstreams.one]
        models = []
        """
    )
    reported = faults(
        path,
        {
            "STREAMWORKER_WORKER__MAX_DELIVERIES": "many",
            "STREAMWORKER_KAFKA__SECURITY_PROTOCOL": "TLS",
            "STREAMWORKER_WROKER__GROUP_ID": "x",
        },
    )
    text = "\n".join(reported)

    assert len(reported) == 10
    for start in (
        "nonsense: is not a setting",
        "wroker (STREAMWORKER_WROKER__GROUP_ID): is not a setting; did you mean STREAMWORKER_WORKER__GROUP_ID?",
        "worker.max_in_flight: ",
        "worker.ordering: ",
        "worker.max_inflight: is not a setting; did you mean worker.max_in_flight?",
        "worker.max_deliveries (STREAMWORKER_WORKER__MAX_DELIVERIES): ",
        "topics.events: must be a topic name: ",
        "kafka.security_protocol (STREAMWORKER_KAFKA__SECURITY_PROTOCOL): ",
        "upstreams.one.base_url: is required",
        "upstreams.one.models: ",
    ):
        assert start in text
    assert str(ConfigurationError(reported)).count("\n") == 10


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        (
            "KAFKA__BOOTSTRAP_SERVERS",
            "http://kafka:9092",
            "must be host:port, several separated by commas, not 'http://kafka:9092'",
        ),
        (
            "KAFKA__BOOTSTRAP_SERVERS",
            "a:1,PLAINTEXT://b:2",
            "must be host:port, several separated by commas, not 'PLAINTEXT://b:2'",
        ),
        ("WORKER__MAX_IN_FLIGHT", "many", "must be a valid integer"),
        ("WORKER__DRAIN_TIMEOUT_S", "2m", "must be a valid number"),
        ("UPSTREAMS__A__INCLUDE_USAGE", "perhaps", "must be a valid boolean"),
        ("UPSTREAMS__A__MODELS", ",", "must have at least 1 item(s)"),
    ],
)
def test_config_fault_says_what_the_value_must_be(variable: str, value: str, reason: str) -> None:
    """In the words of a setting, not in those of the library that validates."""
    name = f"STREAMWORKER_{variable}"
    reported = faults(None, {name: value, "STREAMWORKER_UPSTREAMS__A__BASE_URL": "http://a/v1"})

    assert reported == (f"{variable.lower().replace('__', '.')} ({name}): {reason}",)


def test_config_brokers_may_have_ipv6_addresses() -> None:
    """In brackets, before the port."""
    settings = load(None, {"STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS": "[::1]:9092"})

    assert settings.kafka.bootstrap_servers == "[::1]:9092"


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("[worker", "is not valid TOML"),
        ("a = '\ud83d'", "is not valid TOML"),
        ("worker = 5", "worker: "),
        ("upstreams = 5", "upstreams: "),
        ("[upstreams]\none = 5", "upstreams.one: "),
        (
            "[upstreams.'not a name']\nbase_url = 'http://x/v1'",
            "upstreams.not a name: must be the name of an upstream: ",
        ),
        (
            "[upstreams.one]\nbase_url = 'ftp://x/v1'",
            "upstreams.one.base_url: must be an http(s) URL such as",
        ),
        (
            "[upstreams.one]\nbase_url = 'http://x/v1?key=1'",
            "upstreams.one.base_url: must be an http(s) URL such as",
        ),
        ("[upstreams.one]\nbase_url = 'http://x/v1'\nidle_timeout_s = 0", "upstreams.one.idle_timeout_s: "),
        ("[upstreams.one]\nbase_url = 'http://x/v1'\nidle_timeout_s = nan", "upstreams.one.idle_timeout_s: "),
        ("[upstreams.one]\nbase_url = 'http://x/v1'\nidle_timeout_s = inf", "upstreams.one.idle_timeout_s: "),
        (
            "[upstreams.one]\nbase_url = 'http://x/v1'\napi_key_env = 'A'\napi_key_file = 'b'",
            "upstreams.one: set api_key_env or api_key_file, not both",
        ),
        ("[topics]\njobs = []", "topics.jobs: "),
        (
            "[topics]\njobs = ['a']\nevents = 'a'",
            "topics: a is the events topic: it cannot have a second role",
        ),
        ("[topics]\njobs = ['streamworker.dlq']", "topics: streamworker.dlq is the dlq topic"),
        (
            "[topics]\nallowed_reply_to = ['streamworker.control']",
            "topics: streamworker.control is the control topic",
        ),
        (
            "[topics]\nallowed_reply_to = ['streamworker.jobs']",
            "topics: a job topic cannot be in allowed_reply_to: streamworker.jobs",
        ),
        (
            "[topics]\nresults = 'streamworker.events'",
            "topics: results: streamworker.events is the events topic: results need their own",
        ),
        ("[topics]\nresults = 'a b'", "topics.results: must be empty or a topic name"),
        (
            "[topics]\nevents = 'x'\ncontrol = 'x'",
            "topics: events, control and dlq must be three different topics",
        ),
        (
            "[kafka]\nsecurity_protocol = 'SASL_SSL'",
            "kafka: security_protocol = SASL_SSL with PLAIN needs a user: set sasl_username",
        ),
        (
            "[kafka]\nsecurity_protocol = 'SASL_SSL'\nsasl_username = 'u'",
            "kafka: security_protocol = SASL_SSL with PLAIN needs a password: set sasl_password_file",
        ),
        (
            "[kafka]\nsecurity_protocol = 'SASL_SSL'\nsasl_mechanism = 'OAUTHBEARER'",
            "kafka: security_protocol = SASL_SSL with OAUTHBEARER needs a token: set sasl_oauth_token_file",
        ),
        (
            (
                "[kafka]\nsecurity_protocol = 'SASL_SSL'\nsasl_mechanism = 'OAUTHBEARER'\nsasl_username = 'u'\n"
                "sasl_oauth_token_file = 'x'"
            ),
            "kafka: security_protocol = SASL_SSL with OAUTHBEARER needs a token: remove sasl_username",
        ),
        (
            (
                "[kafka]\nsecurity_protocol = 'SASL_SSL'\nsasl_username = 'u'\nsasl_password_file = 'x'\n"
                "sasl_oauth_token_file = 'x'"
            ),
            (
                "kafka: security_protocol = SASL_SSL with PLAIN needs a user and a password: "
                "remove sasl_oauth_token_file"
            ),
        ),
        (
            "[kafka]\nsasl_username = 'u'",
            "kafka: sasl_username is set, but security_protocol = PLAINTEXT: set SASL_SSL",
        ),
        (
            "[kafka]\nssl_cafile = 'x'",
            "kafka: ssl_cafile is set, but security_protocol = PLAINTEXT: set SSL or SASL_SSL",
        ),
        (
            "[kafka]\nsecurity_protocol = 'SSL'\nssl_certfile = 'x'",
            "kafka: ssl_certfile and ssl_keyfile must be set together",
        ),
        (
            "[kafka]\nsecurity_protocol = 'SSL'\nssl_cafile = '/nowhere/ca.pem'",
            "kafka.ssl_cafile: cannot be read: /nowhere/ca.pem",
        ),
        ("[kafka]\nmax_record_bytes = 100", "kafka.max_record_bytes: "),
        ("[worker]\nsession_timeout_s = 1", "worker.session_timeout_s: "),
        ("[telemetry]\nhttp_port = 65536", "telemetry.http_port: "),
        (
            "[worker]\nfair_by = 'tenant'",
            "worker.fair_by: must be key, or metadata: and a name, such as metadata:tenant",
        ),
        (
            "[worker]\nmax_in_flight_per = 2",
            "worker: max_in_flight_per limits the values of fair_by: set fair_by, too",
        ),
        ("[topics.weights]\nother = 2", "topics: weights: not a job topic: other"),
        ("[topics.weights]\n'streamworker.jobs' = 0", "topics.weights.streamworker.jobs: "),
    ],
)
def test_config_with_one_fault_reports_its_path_and_what_is_valid(
    toml: Any, tmp_path: Path, text: str, reported: str
) -> None:
    """Each message begins with the path of the setting."""
    path = tmp_path / "streamworker.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))

    (fault,) = faults(path)
    assert reported in fault
    assert fault.startswith((reported, str(path)))


def test_config_file_that_does_not_exist_is_a_fault(tmp_path: Path) -> None:
    """A named file is required."""
    (fault,) = faults(tmp_path / "gone.toml")

    assert fault == f"{tmp_path / 'gone.toml'}: No such file or directory"


@pytest.mark.parametrize(
    "environ",
    [
        {"STREAMWORKER_WORKER__GROUP_ID__MORE": "x"},
        {"STREAMWORKER_WORKER__GROUP_ID": "x", "STREAMWORKER_WORKER__GROUP_ID__MORE": "x"},
        {"STREAMWORKER_WORKER__": "x"},
        {"STREAMWORKER___": "x"},
        {"STREAMWORKER_UPSTREAMS__": "x"},
        {"STREAMWORKER_UPSTREAMS__ONE": "x"},
    ],
)
def test_config_variable_in_the_wrong_place_is_a_fault(environ: dict[str, str]) -> None:
    """A misspelt variable is reported, whatever its shape."""
    assert faults(None, environ)


def test_config_every_pattern_has_an_error_text() -> None:
    """No user is shown a regular expression."""

    def patterns(schema: Any) -> set[str]:
        if isinstance(schema, dict):
            values = {schema["pattern"]} if isinstance(schema.get("pattern"), str) else set()
            names = set(schema.get("patternProperties", {}))
            return (values | names).union(*map(patterns, schema.values()))
        return set().union(*map(patterns, schema)) if isinstance(schema, list) else set()

    assert patterns(Settings.model_json_schema()) == set(EXPECTED)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("worker.max_inflight", "worker.max_in_flight"),
        ("wroker", "worker"),
        ("max_in_flight", "worker.max_in_flight"),
        ("kafka.max_in_flight", "worker.max_in_flight"),
        ("upstreams.one.idle_timeout", "upstreams.one.idle_timeout_s"),
        ("telemetry.port", "telemetry.http_port"),
        ("nonsense", None),
    ],
)
def test_config_unknown_key_is_reported_with_the_nearest_setting(path: str, meant: str | None) -> None:
    """The same section is searched first, then settings of the same name in other sections."""
    assert nearest_path(path) == meant


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("STREAMWORKER_KAFKA_BOOTSTRAP_SERVERS", "STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS"),
        ("STREAMWORKER_KAFKA_BOOTSTRAP_SERVER", "STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS"),
        ("STREAMWORKER_KAFKA__BOOTSTRAP__SERVERS", "STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS"),
        ("STREAMWORKER_UPSTREAMS_DEFAULT_BASE_URL", "STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL"),
        ("STREAMWORKER_UPSTREAMS__MY_LLM_BASE_URL", "STREAMWORKER_UPSTREAMS__MY_LLM__BASE_URL"),
        ("STREAMWORKER_UPSTREAMS_DEFAULT__BASE_URL", "STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL"),
        ("STREAMWORKER_UPSTREAMS__DEFAULT__BASEURL", "STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL"),
    ],
)
def test_config_variable_that_is_misspelt_is_reported_with_the_right_one(variable: str, meant: str) -> None:
    """Wrong letters and a wrong number of underscores are recognized."""
    (fault,) = (fault for fault in faults(None, {variable: "http://x/v1"}) if variable in fault)

    assert f"did you mean {meant}?" in fault


def test_config_variables_read_are_those_of_settings() -> None:
    """The start line of a worker names them."""
    environ = {"STREAMWORKER_WORKER__GROUP_ID": "g", "STREAMWORKER_SERVICE_HOST": "x", "HOME": "/"}

    assert variables_read(environ) == ["STREAMWORKER_WORKER__GROUP_ID"]


def test_config_default_sizes_fit_topics_with_kafkas_defaults() -> None:
    """Apache Kafka accepts 1,048,588 bytes per batch, Azure Event Hubs 1,048,576."""
    settings = Settings()
    topics: dict[str, TopicFacts | None] = {
        name: TopicFacts(1, 1, 1_048_576)
        for name in ("streamworker.events", "streamworker.dlq", "streamworker.jobs")
    }

    assert faults_of(settings, topics) == []
    assert settings.worker.max_job_bytes == 1_000_000


# Secrets


def test_config_secret_in_the_file_is_refused_without_its_value(toml: Any) -> None:
    """Configuration files are copied and committed."""
    reported = faults(
        toml(
            f"""
            [kafka]
            sasl_password = "{SECRET}"
            [upstreams.one]
            base_url = "http://x/v1"
            api_key = "{SECRET}"
            """
        )
    )

    assert reported == (
        (
            "kafka.sasl_password: a secret does not belong in this file; set STREAMWORKER_KAFKA__SASL_PASSWORD or "
            "sasl_password_file"
        ),
        "upstreams.one.api_key: a secret does not belong in this file; name a variable in api_key_env",
    )


@pytest.mark.parametrize(
    "environ",
    [
        {"STREAMWORKER_UPSTREAMS__ONE__BASE_URL": f"http://user:{SECRET}@x/v1"},
        {"STREAMWORKER_UPSTREAMS__ONE__BASE_URL": f"http://x/v1?key={SECRET}"},
        {"STREAMWORKER_UPSTREAMS__ONE__API_KEY": SECRET},
        {"STREAMWORKER_KAFKA__SASL_PASSWORD__X": SECRET},
        {"STREAMWORKER_KAFKA__SECURITY_PROTOCOL": SECRET},
        {"STREAMWORKER_WORKER__MAX_IN_FLIGHT": SECRET},
        {"STREAMWORKER_KAFKA__SASL_PASSWORD": SECRET, "STREAMWORKER_KAFKA__SECURITY_PROTOCOL": "SASL_SSL"},
    ],
)
def test_config_fault_never_repeats_a_value(environ: dict[str, str]) -> None:
    """A value in the wrong place may be a secret: no message contains it."""
    assert SECRET not in "\n".join(faults(None, environ))


def test_config_password_from_the_environment_is_never_shown() -> None:
    """The password is in neither the repr, the str nor a dump of the settings."""
    settings = load(
        None,
        {
            "STREAMWORKER_KAFKA__SASL_PASSWORD": SECRET,
            "STREAMWORKER_KAFKA__SASL_USERNAME": "u",
            "STREAMWORKER_KAFKA__SECURITY_PROTOCOL": "SASL_SSL",
        },
    )

    assert settings.kafka.password() == SECRET
    assert isinstance(settings.kafka.sasl_password, SecretStr)
    assert SECRET not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"


def test_config_password_file_is_read_each_time(tmp_path: Path) -> None:
    """The password can be rotated; a password in the environment has precedence."""
    file = tmp_path / "password"
    file.write_text("one\n")
    environ = {
        "STREAMWORKER_KAFKA__SASL_PASSWORD_FILE": str(file),
        "STREAMWORKER_KAFKA__SASL_USERNAME": "u",
        "STREAMWORKER_KAFKA__SECURITY_PROTOCOL": "SASL_SSL",
    }
    kafka = load(None, environ).kafka
    assert kafka.password() == "one"
    file.write_text("two\n")
    assert kafka.password() == "two"

    assert load(None, environ | {"STREAMWORKER_KAFKA__SASL_PASSWORD": "three"}).kafka.password() == "three"
    assert load(None, {}).kafka.password() is None


def test_config_token_file_is_read_each_time(tmp_path: Path) -> None:
    """The token can be renewed while the worker runs."""
    file = tmp_path / "token"
    file.write_text("one\n")
    kafka = load(None, TOKEN_FILE | {"STREAMWORKER_KAFKA__SASL_OAUTH_TOKEN_FILE": str(file)}).kafka
    assert kafka.token() == "one"
    file.write_text("two\n")

    assert kafka.token() == "two"
    assert load(None, {}).kafka.token() is None


TOKEN_FILE = {
    "STREAMWORKER_KAFKA__SECURITY_PROTOCOL": "SASL_SSL",
    "STREAMWORKER_KAFKA__SASL_MECHANISM": "OAUTHBEARER",
}
PASSWORD_FILE = {
    "STREAMWORKER_KAFKA__SECURITY_PROTOCOL": "SASL_SSL",
    "STREAMWORKER_KAFKA__SASL_USERNAME": "u",
}


@pytest.mark.parametrize(
    ("environ", "name"),
    [(PASSWORD_FILE, "sasl_password_file"), (TOKEN_FILE, "sasl_oauth_token_file")],
    ids=["password", "token"],
)
@pytest.mark.parametrize(
    ("content", "reported"),
    [
        (None, "No such file or directory: {}"),
        (b" \n", "the file {} must hold one line of text"),
        (f"{SECRET}\n{SECRET}".encode(), "the file {} must hold one line of text"),
        (b"\xff" + SECRET.encode(), "the file {} must hold one line of text"),
    ],
    ids=["absent", "empty", "two-lines", "bytes"],
)
def test_config_file_without_a_valid_secret_is_a_fault(
    tmp_path: Path, environ: dict[str, str], name: str, content: bytes | None, reported: str
) -> None:
    """The fault is reported at the start, not at the first connection, without the file's content."""
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)

    (fault,) = faults(None, environ | {f"STREAMWORKER_KAFKA__{name.upper()}": str(file)})

    assert fault == f"kafka.{name}: " + reported.format(file)


def test_config_key_that_is_missing_is_a_fault_at_the_start(tmp_path: Path) -> None:
    """Each upstream whose key is missing is named."""
    reported = faults(
        None,
        {
            "STREAMWORKER_UPSTREAMS__ONE__BASE_URL": "http://x/v1",
            "STREAMWORKER_UPSTREAMS__ONE__API_KEY_ENV": "OUR_KEY",
            "STREAMWORKER_UPSTREAMS__TWO__BASE_URL": "http://x/v1",
            "STREAMWORKER_UPSTREAMS__TWO__API_KEY_FILE": str(tmp_path / "gone"),
        },
    )

    assert reported == (
        "upstreams.one.api_key_env: the environment variable OUR_KEY is not set",
        f"upstreams.two.api_key_file: No such file or directory: {tmp_path / 'gone'}",
    )


def test_config_key_is_read_from_its_variable_or_file(tmp_path: Path) -> None:
    """Without either, the upstream needs no key."""
    file = tmp_path / "key"
    file.write_text(" from-file\n")

    assert UpstreamSettings(base_url="http://x", api_key_env="K").api_key({"K": " from-env "}) == "from-env"
    assert UpstreamSettings(base_url="http://x", api_key_file=file).api_key({}) == "from-file"
    assert UpstreamSettings(base_url="http://x").api_key({}) is None


@pytest.mark.parametrize("key", ["two\nlines", "sk-\N{CYRILLIC SMALL LETTER KA}", "nul\0"])
def test_config_key_that_cannot_stand_in_a_header_is_a_fault(key: str, tmp_path: Path) -> None:
    """The message does not contain the value: it may still hold the key."""
    file = tmp_path / "key"
    file.write_text(key)
    for upstream in (
        UpstreamSettings(base_url="http://x", api_key_env="K"),
        UpstreamSettings(base_url="http://x", api_key_file=file),
    ):
        with pytest.raises(ConfigurationError, match="does not hold a valid key") as caught:
            upstream.api_key({"K": key})
        assert key not in str(caught.value)


def test_config_empty_key_is_a_fault(tmp_path: Path) -> None:
    """An empty variable counts as unset; an empty file may be a rotation that is not complete."""
    file = tmp_path / "key"
    file.write_text("\n")

    with pytest.raises(ConfigurationError, match="K is not set"):
        UpstreamSettings(base_url="http://x", api_key_env="K").api_key({"K": "  "})
    with pytest.raises(ConfigurationError, match="does not hold a valid key"):
        UpstreamSettings(base_url="http://x", api_key_file=file).api_key({})


def test_config_variable_with_one_underscore_too_few_is_a_fault() -> None:
    """It would be ignored otherwise; the variables of a Kubernetes Service are still ignored."""
    environ = {"STREAMWORKER_KAFKA_BOOTSTRAP_SERVERS": "x:1", "STREAMWORKER_KAFKA_SERVICE_HOST": "10.0.0.1"}
    with pytest.raises(ConfigurationError) as error:
        load(None, environ)

    assert error.value.faults == (
        "STREAMWORKER_KAFKA_BOOTSTRAP_SERVERS: is not a setting; did you mean STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS?",
    )


@pytest.mark.parametrize("fallback", ["default", "elsewhere", "other,other"])
def test_config_fallback_that_is_invalid_is_a_fault(fallback: str) -> None:
    """A loop, a misspelt name and a repetition are reported with the path."""
    urls = {f"STREAMWORKER_UPSTREAMS__{name}__BASE_URL": "http://h/v1" for name in ("DEFAULT", "OTHER")}
    with pytest.raises(
        ConfigurationError,
        match=r"upstreams\.default\.fallback: .* must be another configured upstream, named once",
    ):
        load(None, urls | {"STREAMWORKER_UPSTREAMS__DEFAULT__FALLBACK": fallback})


def test_config_fallback_from_the_environment_keeps_its_order() -> None:
    """Several names are separated by commas."""
    urls = {f"STREAMWORKER_UPSTREAMS__{name}__BASE_URL": "http://h/v1" for name in ("DEFAULT", "A", "B")}
    settings = load(None, urls | {"STREAMWORKER_UPSTREAMS__DEFAULT__FALLBACK": "b,a"})

    assert settings.upstreams["default"].fallback == ("b", "a")


@pytest.mark.parametrize("url", ["http://h/v1/chat/completions", "http://h/v1/chat/completions/"])
def test_config_base_url_with_the_endpoint_is_refused(url: str) -> None:
    """The client appends /chat/completions: every call would fail."""
    with pytest.raises(ConfigurationError, match="base_url must end before /chat/completions"):
        load(None, {"STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL": url})


# Headers, proxies and certificates of an upstream

UPSTREAM_SECTION = '[upstreams.default]\nbase_url = "http://a/v1"\n'


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('headers = { "Host" = "x" }', "headers must not set host"),
        ('headers = { "content-length" = "5" }', "headers must not set content-length"),
        ('headers = { "a b" = "x" }', "must be the name of an HTTP header"),
        ('headers = { "x-a" = "one\\ntwo" }', "headers.x-a: the value must be one line of ASCII"),
        ('headers = { "x-a" = "env:NOT_SET" }', "headers.x-a: the environment variable NOT_SET is not set"),
        (
            'api_key_env = "KEY"\nheaders = { "authorization" = "x" }',
            "headers must not set authorization beside",
        ),
        ('proxy = "socks5://p:1"', "must be the URL of an HTTP proxy"),
        ('proxy = "http://user:hunter22@p:1"', "a password does not belong in this file"),
        ('ca_file = "/nowhere/ca.pem"', "upstreams.default.ca_file: cannot be read: /nowhere/ca.pem"),
        ('key_file = "/nowhere/key.pem"', "key_file needs cert_file"),
    ],
)
def test_config_upstream_setting_that_cannot_be_used_is_a_fault(toml: Any, line: str, fault: str) -> None:
    """With its path, and without a secret."""
    with pytest.raises(ConfigurationError) as caught:
        load(toml(UPSTREAM_SECTION + line), {"KEY": "sk-1"})

    assert fault in str(caught.value)
    assert "hunter22" not in str(caught.value)


def test_config_path_that_is_empty_is_none(toml: Any) -> None:
    """In a file and in the environment, as for the settings that are texts: it undoes what stands elsewhere."""
    files = dict.fromkeys(("api_key_file", "ca_file", "cert_file", "key_file"), "")
    lines = "\n".join(f'{name} = ""' for name in files)
    settings = load(
        toml(UPSTREAM_SECTION + lines + '\n[gateway]\ntoken_secrets_file = "secrets"\n'),
        {"KEY": "sk-1", "STREAMWORKER_GATEWAY__TOKEN_SECRETS_FILE": "", "STREAMWORKER_KAFKA__SSL_CAFILE": ""},
    )

    upstream = settings.upstreams["default"]
    assert {getattr(upstream, name) for name in files} == {None}
    assert (settings.gateway.token_secrets_file, settings.kafka.ssl_cafile) == (None, None)


def test_config_upstream_secrets_are_named_and_in_no_repr(toml: Any) -> None:
    """Header values, the key, and the password of the proxy, from wherever they come."""
    environ = {
        "AZURE_KEY": "from-a-variable",
        "KEY": "sk-key",
        "STREAMWORKER_UPSTREAMS__DEFAULT__PROXY": "http://user:hunter22@proxy:3128",
    }
    file = toml(
        UPSTREAM_SECTION
        + 'api_key_env = "KEY"\nheaders = { "api-key" = "env:AZURE_KEY", "x-literal" = "in-the-file" }'
    )
    settings = load(file, environ)
    upstream = settings.upstreams["default"]

    assert upstream.header_values(environ) == {"api-key": "from-a-variable", "x-literal": "in-the-file"}
    assert set(upstream.secrets(environ)) == {"hunter22", "sk-key", "from-a-variable", "in-the-file"}
    for secret in upstream.secrets(environ):
        assert secret not in repr(settings)


def test_config_upstream_secret_of_a_proxy_in_the_environment_is_named(toml: Any) -> None:
    """`proxy = "env"` names no URL itself."""
    upstream = load(toml(UPSTREAM_SECTION + 'proxy = "env"'), {}).upstreams["default"]

    assert upstream.secrets({"https_proxy": "http://user:hunter22@proxy:3128"}) == ["hunter22"]
    assert upstream.secrets({}) == []


# The gateway


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (
            'auth = "off"\nhost = "0.0.0.0"',
            (
                'gateway: auth = "off" lets everybody in: it needs a loopback address as host, such as 127.0.0.1, '
                'not 0.0.0.0; or set auth = "keys"'
            ),
        ),
        (
            'auth = "off"\nhost = "localhost.example.com"',
            (
                'gateway: auth = "off" lets everybody in: it needs a loopback address as host, such as 127.0.0.1, '
                'not localhost.example.com; or set auth = "keys"'
            ),
        ),
        (
            'cors_origins = ["https://app.example.com/"]',
            (
                "gateway.cors_origins.0: must be an origin as browsers send it, such as https://app.example.com or "
                "http://localhost:3000: lower case, without a path"
            ),
        ),
        (
            'cors_origins = ["*"]',
            (
                "gateway.cors_origins.0: must be an origin as browsers send it, such as https://app.example.com or "
                "http://localhost:3000: lower case, without a path"
            ),
        ),
        (
            'topic = "other.jobs"',
            "gateway.topic: other.jobs must be one of topics.jobs: streamworker.jobs",
        ),
        ("keep_alive_s = 0", "gateway.keep_alive_s: must be greater than 0"),
        ("former_partitions = [0]", "gateway.former_partitions.0: must be greater than or equal to 1"),
        ('read = "some"', "gateway.read: must be 'subscribed' or 'all'"),
        ('chat_usage = "both"', "gateway.chat_usage: must be 'chunk' or 'finish'"),
        ("port = 70000", "gateway.port: must be less than or equal to 65535"),
        ("keepalive_s = 1", "gateway.keepalive_s: is not a setting; did you mean gateway.keep_alive_s?"),
    ],
)
def test_config_gateway_setting_that_cannot_be_used_is_a_fault(toml: Any, line: str, fault: str) -> None:
    """Each message says what is valid."""
    assert faults(toml(f"[gateway]\n{line}\n")) == (fault,)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_config_gateway_without_authentication_is_accepted_on_a_loopback_address(
    toml: Any, host: str
) -> None:
    """No other machine can connect there."""
    assert load(toml(f'[gateway]\nauth = "off"\nhost = "{host}"\n'), {}).gateway.auth == "off"


def test_config_gateway_lists_from_the_environment_are_comma_separated() -> None:
    """Origins, names of models and partition counts."""
    environ = {
        "STREAMWORKER_GATEWAY__CORS_ORIGINS": "https://a.example.com, http://localhost:3000,null",
        "STREAMWORKER_GATEWAY__MODELS": "one,two",
        "STREAMWORKER_GATEWAY__FORMER_PARTITIONS": "6,12",
    }
    gateway = load(None, environ).gateway

    assert gateway.cors_origins == ("https://a.example.com", "http://localhost:3000", "null")
    assert (gateway.models, gateway.former_partitions) == (("one", "two"), (6, 12))


def test_variable_that_holds_a_whole_table_is_not_suggested_for_itself() -> None:
    """Each entry of a table has a variable of its own."""
    variable = "STREAMWORKER_UPSTREAMS__DEFAULT__HEADERS"
    with pytest.raises(ConfigurationError) as caught:
        load(None, {"STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL": "http://127.0.0.1/v1", variable: "{}"})

    assert caught.value.faults == (f"upstreams.default.headers ({variable}): must be a table",)


def test_config_file_with_a_byte_order_mark_and_crlf_is_read(tmp_path: Path) -> None:
    """Some editors write both; keys and passwords in files may have them, too."""
    path, key, password = tmp_path / "worker.toml", tmp_path / "key", tmp_path / "password"
    path.write_bytes(b"\xef\xbb\xbf[worker]\r\nmax_in_flight = 7\r\n")
    key.write_bytes(b"\xef\xbb\xbfsk-1\r\n")
    password.write_bytes(b"\xef\xbb\xbfsecret\r\n")

    assert load(path, {}, needs_keys=False).worker.max_in_flight == 7
    assert UpstreamSettings(base_url="http://x", api_key_file=key).api_key({}) == "sk-1"
    assert read_line("kafka.sasl_password_file", password) == "secret"
