"""The observer's log lines and metrics."""

from typing import Any

import pytest
from msgspec import structs
from prometheus_client import generate_latest
from structlog.testing import capture_logs

from streamworker import observe
from streamworker.limits.circuit import HoldReason
from streamworker.model import (
    Coordinates,
    ErrorCode,
    Job,
    JobError,
    Observed,
    ProducerRecord,
    Rejection,
    Status,
    Timing,
    TopicPartition,
    UsageEvent,
    UsageSource,
    Voided,
)
from streamworker.redaction import Redactor
from streamworker.telemetry.logging import configure_logging
from streamworker.telemetry.metrics import (
    CIRCUIT_STATE,
    PREFIX,
    STREAMS_LIMIT,
    STREAMS_OPEN,
    TABLE,
    UPSTREAM_WAITING,
    Metrics,
)
from streamworker.telemetry.observer import Telemetry
from streamworker.testing import MemoryClock

AT = Coordinates("streamworker.jobs", 3, 42)
CANARY = "canary-4f1c9a"
JOB = Job(job_id="j", source=AT, timestamp=1, model="m", request={})
REJECTION = Rejection(job_id="j", source=AT, timestamp=0, faults=("request: is required",))
OUT_OF_NOTHING: dict[str, Any] = {"usage": None, "usage_source": UsageSource.NONE}
FAILED: dict[str, Any] = {
    "status": Status.FAILED,
    "error": JobError(ErrorCode.RATE_LIMITED, "slow down", 429, f"body {CANARY}", retriable=True),
    "timing": Timing(queued=5, first_delta=None, total=100),
    **OUT_OF_NOTHING,
}


def ended(**members: Any) -> UsageEvent:
    usual: dict[str, Any] = {
        "status": Status.COMPLETED,
        "finish_reasons": {"0": "stop"},
        "usage": {"prompt_tokens": 7, "completion_tokens": 11, "total_tokens": 18},
        "usage_source": UsageSource.UPSTREAM,
        "observed": Observed(3, 4, 20, 0, 999),
        "error": None,
        "timing": Timing(queued=2000, first_delta=300, total=1500),
    }
    return UsageEvent(
        job_id="j", attempt="a", seq=4, ts=1, tries=1, metadata={"note": CANARY}, **{**usual, **members}
    )


class Watch:
    def __init__(self) -> None:
        self.metrics = Metrics()
        self.clock = MemoryClock(2001)
        self.telemetry: observe.Observer = Telemetry(
            self.metrics, {"default": ["m", "*"], "second": ["gpt-*"]}, self.clock, label_metadata="tenant"
        )

    def __getitem__(self, name: str) -> float | None:
        """Return a sample, `name` or `name{label=value,...}`, without the prefix."""
        name, _, labels = name.rstrip("}").partition("{")
        pairs = dict(pair.split("=") for pair in labels.split(",")) if labels else {}
        return self.metrics.registry.get_sample_value(PREFIX + name, pairs)


def event(kind: str, size: int) -> ProducerRecord:
    header = ("streamworker-type", kind.encode())
    return ProducerRecord(TopicPartition("events", 0), b"", b"x" * (size - len(header[0] + kind)), (header,))


def letter() -> ProducerRecord:
    return ProducerRecord(
        TopicPartition("dlq", 0), b"", b"not a job", (("__streamworker.errors.code", b"invalid_job"),)
    )


@pytest.fixture
def watch() -> Watch:
    return Watch()


def test_completed_job_is_logged_in_one_line(watch: Watch) -> None:
    with capture_logs() as lines:
        watch.telemetry.job_started(JOB, "default")
        watch.telemetry.first_delta("default", 0.3)
        watch.telemetry.deltas_published("default", 3, 300, None)
        watch.telemetry.job_ended(ended(), JOB, "default")

    assert lines == [
        {
            "log_level": "info",
            "event": "job.completed",
            "job_id": "j",
            "attempt": "a",
            "upstream": "default",
            "model": "m",
            "status": "completed",
            "error_code": None,
            "error_message": None,
            "http_status": None,
            "deltas": 3,
            "content_chars": 20,
            "usage": {"prompt_tokens": 7, "completion_tokens": 11, "total_tokens": 18},
            "usage_source": "upstream",
            "queued_ms": 2000,
            "first_delta_ms": 300,
            "total_ms": 1500,
            "tries": 1,
            "topic": "streamworker.jobs",
            "partition": 3,
            "offset": 42,
        }
    ]


@pytest.mark.parametrize(
    ("traceparent", "trace_id"),
    [
        (b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "4bf92f3577b34da6a3ce929d0e0e4736"),
        (b"00-" + CANARY.encode(), None),
        (None, None),
    ],
)
def test_job_with_a_trace_is_logged_with_its_trace_id(
    watch: Watch, traceparent: bytes | None, trace_id: str | None
) -> None:
    """Every line of a job has the id of its trace; an invalid header is not logged."""
    trace = (("traceparent", traceparent),)
    job, rejection = structs.replace(JOB, trace=trace), structs.replace(REJECTION, trace=trace)
    with capture_logs() as lines:
        watch.telemetry.job_ended(ended(), job, "default")
        watch.telemetry.job_abandoned(job, "revoked")
        watch.telemetry.job_rejected(rejection, ErrorCode.INVALID_JOB)

    assert [line.get("trace_id") for line in lines] == [trace_id] * 3


def test_failed_job_is_logged_as_a_warning_with_its_error(watch: Watch) -> None:
    with capture_logs() as lines:
        watch.telemetry.job_ended(ended(**FAILED), JOB, "default")

    (line,) = lines
    assert line["log_level"] == "warning"
    assert line["event"] == "job.failed"
    logged = {
        name: line[name] for name in ("error_code", "error_message", "http_status", "usage", "first_delta_ms")
    }
    assert logged == {
        "error_code": "rate_limited",
        "error_message": None,  # the upstream's own message may contain the prompt
        "http_status": 429,
        "usage": None,
        "first_delta_ms": None,
    }
    assert watch["job_errors_total{upstream=default,code=rate_limited,model=m}"] == 1
    assert watch["jobs_ended_total{upstream=default,status=failed}"] == 1


@pytest.mark.parametrize("status", Status)
def test_job_of_each_status_is_logged_under_its_name(watch: Watch, status: Status) -> None:
    with capture_logs() as lines:
        watch.telemetry.job_ended(ended(status=status), JOB, "default")
    level = "info" if status is Status.COMPLETED else "warning"
    assert [(line["event"], line["log_level"]) for line in lines] == [(f"job.{status}", level)]


def test_job_that_completes_updates_every_metric_of_jobs(watch: Watch) -> None:
    watch.telemetry.job_started(JOB, "default")
    assert watch["jobs_open"] == 1
    watch.telemetry.first_delta("default", 0.3)
    watch.telemetry.deltas_published("default", 3, 300, None)
    watch.telemetry.deltas_published("default", 2, 200, 0.25)
    watch.telemetry.committed([event("started", 100), letter(), event("usage", 150)], 0.003)
    watch.telemetry.batch_acknowledged(5, 0.002)
    watch.telemetry.job_ended(ended(), JOB, "default")
    assert watch["jobs_open"] == 0
    assert watch["jobs_started_total{upstream=default}"] == 1
    assert watch["jobs_ended_total{upstream=default,status=completed}"] == 1
    assert watch["attempts_total{upstream=default}"] == 1
    for kind, count, size in (("started", 1, 100), ("delta", 5, 500), ("usage", 1, 150)):
        assert watch[f"events_total{{type={kind}}}"] == count
        assert watch[f"event_bytes_total{{type={kind}}}"] == size
    assert watch["delta_gap_seconds_sum{upstream=default}"] == 0.25
    assert watch["delta_gap_seconds_count{upstream=default}"] == 1
    assert watch["commit_duration_seconds_sum"] == 0.003
    assert watch["commit_records_sum"] == 3
    assert watch["sink_batch_duration_seconds_sum"] == 0.002
    assert watch["sink_batch_records_sum"] == 5
    assert watch["time_to_first_delta_seconds_sum{upstream=default}"] == 0.3
    assert watch["job_duration_seconds_sum{upstream=default,status=completed}"] == 1.5
    assert watch["queue_duration_seconds_sum"] == 2.0
    assert watch["tokens_total{upstream=default,kind=prompt,source=upstream}"] == 7
    assert watch["tokens_total{upstream=default,kind=completion,source=upstream}"] == 11


def test_known_series_exist_before_the_first_job(watch: Watch) -> None:
    assert watch["jobs_started_total{upstream=second}"] == 0
    assert watch["jobs_ended_total{upstream=second,status=interrupted}"] == 0
    assert watch["job_errors_total{upstream=second,code=truncated,model=other}"] == 0
    assert watch["job_errors_total{upstream=default,code=truncated,model=m}"] == 0


@pytest.mark.parametrize(
    ("upstream", "model", "label"),
    [
        ("default", "m", "m"),
        ("default", "M", "other"),
        ("default", "*", "other"),
        ("default", "gpt-*", "other"),
        ("second", "gpt-5", "other"),
        ("second", "gpt-*", "other"),
        ("second", "m", "other"),
        ("evil", "m", "other"),
        ("default", CANARY * 1000, "other"),
    ],
)
def test_error_is_counted_by_a_model_that_its_upstream_lists_by_name(
    watch: Watch, upstream: str, model: str, label: str
) -> None:
    """Whatever a job asks for adds no series: a pattern serves any number of models."""
    before = generate_latest(watch.metrics.registry).count(b"job_errors_total{")
    watch.telemetry.job_ended(ended(**FAILED), structs.replace(JOB, model=model), upstream)
    page = generate_latest(watch.metrics.registry)
    name = upstream if upstream != "evil" else "other"

    assert watch[f"job_errors_total{{upstream={name},code=rate_limited,model={label}}}"] == 1
    assert page.count(b"job_errors_total{") == before + (upstream == "evil")
    assert CANARY.encode() not in page


def test_models_with_a_label_of_their_own_are_bounded() -> None:
    """All upstreams together have at most 32; with every code each series of a known model begins at 0."""
    clock, metrics = MemoryClock(1), Metrics()
    upstreams = {f"u{number}": [f"m{number}-{i}" for i in range(10)] * 2 for number in range(26)}
    Telemetry(metrics, upstreams, clock)
    page = generate_latest(metrics.registry).decode()
    labels = {
        line.partition('model="')[2].partition('"')[0]
        for line in page.splitlines()
        if "job_errors_total{" in line
    }

    assert labels == {"other"} | {f"m{number}-{i}" for number in range(3) for i in range(10)} | {
        "m3-0",
        "m3-1",
    }
    for code in ErrorCode:
        for upstream, model in (("u0", "m0-9"), ("u3", "m3-1"), ("u3", "other"), ("u25", "other")):
            sample = {"upstream": upstream, "code": code.value, "model": model}
            assert metrics.registry.get_sample_value(f"{PREFIX}job_errors_total", sample) == 0


def test_upstream_that_is_not_configured_is_counted_as_other(watch: Watch) -> None:
    watch.telemetry.job_started(JOB, "evil")
    watch.telemetry.deltas_published("evil", 1, 100, 0.1)
    watch.telemetry.first_delta("evil", 1)
    watch.telemetry.job_ended(ended(), JOB, "evil")
    page = generate_latest(watch.metrics.registry).decode()
    assert "evil" not in page
    assert watch["jobs_started_total{upstream=other}"] == 1


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": -1, "completion_tokens": "5"},
        {"prompt_tokens": True, "completion_tokens": None},
        {"prompt_tokens": float("nan"), "completion_tokens": float("inf")},
        {"prompt_tokens": 10**400, "completion_tokens": [1]},
        {"prompt_tokens": {"a": CANARY}, CANARY: 1, "text": CANARY},
        {},
    ],
)
def test_usage_without_a_valid_count_is_neither_counted_nor_logged(
    watch: Watch, usage: dict[str, Any]
) -> None:
    with capture_logs() as lines:
        watch.telemetry.job_ended(ended(usage=usage), JOB, "default")
    assert lines[0]["usage"] == {}
    assert "tokens_total{" not in generate_latest(watch.metrics.registry).decode()


def test_open_job_that_restarts_is_counted_once(watch: Watch) -> None:
    """A second attempt starts no second job, and an end without a start is ignored."""
    watch.telemetry.job_started(JOB, "default")
    watch.clock.turn(60)
    watch.telemetry.job_started(JOB, "default")
    assert watch["jobs_open"] == watch["jobs_started_total{upstream=default}"] == 1
    assert watch["attempts_total{upstream=default}"] == 2
    assert (watch["queue_duration_seconds_count"], watch["queue_duration_seconds_sum"]) == (1, 2)
    watch.telemetry.job_ended(ended(), JOB, "default")
    watch.telemetry.job_ended(ended(), JOB, "default")
    watch.telemetry.job_abandoned(JOB, "drain")
    assert watch["jobs_open"] == 0


def test_rejected_record_is_logged_with_its_faults_and_counted(watch: Watch) -> None:
    with capture_logs() as lines:
        watch.telemetry.job_rejected(REJECTION, ErrorCode.INVALID_JOB)

    assert lines == [
        {
            "log_level": "warning",
            "event": "job.rejected",
            "job_id": "j",
            "error_code": "invalid_job",
            "faults": ["request: is required"],
            "fault_count": 1,
            "topic": "streamworker.jobs",
            "partition": 3,
            "offset": 42,
        }
    ]
    assert watch["dead_letters_total{code=invalid_job}"] == 1
    assert watch["job_errors_total{upstream=none,code=invalid_job,model=none}"] == 1
    assert watch["jobs_ended_total{upstream=none,status=rejected}"] == 1

    watch.telemetry.job_rejected(REJECTION, ErrorCode.MAX_DELIVERIES)
    assert watch["jobs_ended_total{upstream=none,status=failed}"] == 1


def test_rejected_record_with_many_long_faults_is_logged_within_bounds(watch: Watch) -> None:
    faults = tuple("x" * 5000 for _ in range(100))
    rejection = Rejection(job_id="j", source=AT, timestamp=0, faults=faults)
    with capture_logs() as lines:
        watch.telemetry.job_rejected(rejection, ErrorCode.INVALID_JOB)
    assert lines[0]["faults"] == ["x" * 300] * 8
    assert lines[0]["fault_count"] == 100


def test_abandoned_job_is_logged_with_its_reason_and_counted(watch: Watch) -> None:
    watch.telemetry.job_started(JOB, "default")
    with capture_logs() as lines:
        watch.telemetry.job_abandoned(JOB, "partition_lost")

    assert lines == [
        {
            "log_level": "warning",
            "event": "job.abandoned",
            "job_id": "j",
            "reason": "partition_lost",
            "topic": "streamworker.jobs",
            "partition": 3,
            "offset": 42,
        }
    ]
    assert watch["jobs_abandoned_total{reason=partition_lost}"] == 1
    assert watch["jobs_open"] == 0


@pytest.mark.parametrize(
    ("reason", "label"),
    [
        ("the partition was revoked", "the partition was revoked"),
        ("lost streamworker.jobs-3 to another worker", "other"),
        ("word " * 100, "other"),
        ("", "other"),
    ],
)
def test_reason_with_more_than_a_few_words_is_counted_as_other(watch: Watch, reason: str, label: str) -> None:
    watch.telemetry.job_abandoned(JOB, reason)
    assert watch[f"jobs_abandoned_total{{reason={label}}}"] == 1


def test_rebalance_tombstone_and_skipped_record_are_counted(watch: Watch) -> None:
    with capture_logs() as lines:
        watch.telemetry.partitions_changed(4, 3, 1)
        watch.telemetry.tombstone_skipped(TopicPartition("t", 0))
        watch.telemetry.record_skipped(TopicPartition("t", 0))

    assert lines == [{"log_level": "info", "event": "partitions.changed", "owned": 4, "gained": 3, "lost": 1}]
    assert watch["rebalances_total"] == 1
    assert watch["rebalance_duration_seconds_count"] == 0
    assert watch["partitions_owned"] == 4
    assert watch["tombstones_total"] == 1
    assert watch["records_skipped_total"] == 1


def test_skipped_duplicate_is_counted_and_logged_with_both_offsets(watch: Watch) -> None:
    """An operator finds the record that the duplicate repeats."""
    with capture_logs() as lines:
        watch.telemetry.duplicate_skipped(JOB, 3)

    [line] = lines
    assert (line["event"], line["job_id"]) == ("job.duplicate_skipped", JOB.job_id)
    assert (line["earlier_offset"], line["offset"]) == (3, JOB.source.offset)
    assert watch["duplicates_skipped_total"] == 1


@pytest.mark.parametrize("effect", ["too_early", "no_open_job"])
def test_cancel_without_effect_is_logged_and_counted_by_its_reason(
    watch: Watch, effect: observe.CancelEffect
) -> None:
    """Nothing else shows a user why the job runs on. A cancel record that ended its job needs no line of its own."""
    with capture_logs() as lines:
        watch.telemetry.cancel_received("j", effect)
        watch.telemetry.cancel_received("j", "cancelled")

    assert [(line["event"], line["job_id"], line["reason"]) for line in lines] == [
        ("cancel.without_effect", "j", effect)
    ]
    assert watch[f"cancels_total{{effect={effect}}}"] == watch["cancels_total{effect=cancelled}"] == 1


def test_tokens_of_voided_calls_are_counted_apart(watch: Watch) -> None:
    """They were paid for too; counts that are not valid are left out."""
    voided = Voided(2, {"prompt_tokens": 14, "completion_tokens": "many"})
    watch.telemetry.job_ended(ended(voided=voided), JOB, "default")
    watch.telemetry.job_ended(ended(), JOB, "default")

    assert watch["tokens_total{upstream=default,kind=prompt,source=voided}"] == 14
    assert watch["tokens_total{upstream=default,kind=completion,source=voided}"] is None
    assert watch["tokens_total{upstream=default,kind=prompt,source=upstream}"] == 14


def test_upstream_that_is_held_is_named_in_the_log_with_its_reason_and_advice(watch: Watch) -> None:
    """And for how long, when its jobs go on."""
    with capture_logs() as lines:
        watch.telemetry.upstream_held("default", "key_refused")
        watch.telemetry.upstream_released("default", "key_refused", 61.23)

    assert lines == [
        {
            "event": "upstream.held",
            "upstream": "default",
            "reason": "key_refused",
            "advice": "replace the key: a new key file is tried at once, a key in a variable needs a restart",
            "log_level": "warning",
        },
        {
            "event": "upstream.released",
            "upstream": "default",
            "reason": "key_refused",
            "held_s": 61.2,
            "log_level": "info",
        },
    ]


@pytest.mark.parametrize("reason", [*HoldReason, "rate_limited"])
def test_every_reason_of_a_hold_has_an_advice_of_its_own(watch: Watch, reason: str) -> None:
    """None of them is left with the general one."""
    with capture_logs() as lines:
        watch.telemetry.upstream_held("default", str(reason))

    assert len(lines[0]["advice"]) > len("wait")


@pytest.mark.parametrize(("timestamp", "count"), [(1, 1), (0, 0), (-1, 0)])
def test_job_without_a_usable_timestamp_has_no_queue_duration(
    watch: Watch, timestamp: int, count: int
) -> None:
    """Kafka's -1 and a 0 would count as half a century."""
    watch.telemetry.job_started(structs.replace(JOB, timestamp=timestamp), "default")

    assert watch["queue_duration_seconds_count"] == count


def test_circuit_that_opens_is_a_warning_and_its_other_states_are_info(watch: Watch) -> None:
    """Circuits and fallbacks are counted too, and no log line has an upstream's message."""
    with capture_logs() as lines:
        for state in ("open", "half_open", "open", "half_open", "closed"):
            watch.telemetry.circuit_changed("default", state, "unavailable")
        watch.telemetry.fell_back(JOB, "default", JobError(ErrorCode.UPSTREAM_UNAVAILABLE, "down: my prompt"))

    assert watch["circuits_opened_total{upstream=default}"] == 2
    assert watch["fallbacks_total{upstream=default}"] == 1
    assert [(line["event"], line["log_level"]) for line in lines] == [
        ("circuit.open", "warning"),
        ("circuit.half_open", "info"),
        ("circuit.open", "warning"),
        ("circuit.half_open", "info"),
        ("circuit.closed", "info"),
        ("job.fell_back", "warning"),
    ]
    assert "my prompt" not in str(lines)


def test_rebalance_duration_is_measured_from_revocation_to_assignment(watch: Watch) -> None:
    """A rebalance that restarts before it has ended counts once."""
    for wait_s in (2, 3):
        watch.telemetry.rebalancing()
        watch.clock.turn(wait_s)
    watch.telemetry.partitions_changed(4, 4, 0)
    watch.clock.turn(100)
    watch.telemetry.rebalancing()
    watch.telemetry.partitions_changed(4, 0, 0)

    assert (watch["rebalance_duration_seconds_count"], watch["rebalance_duration_seconds_sum"]) == (2, 5)


def test_oldest_job_age_is_that_of_the_first_open_job(watch: Watch) -> None:
    """When the oldest job ends, the age of the next one is reported."""
    second = Job(job_id="k", source=AT._replace(offset=43), timestamp=1, model="m", request={})
    assert watch["oldest_job_age_seconds"] == 0
    watch.telemetry.job_started(JOB, "default")
    watch.clock.turn(30)
    watch.telemetry.job_started(second, "default")
    watch.clock.turn(10)
    assert watch["oldest_job_age_seconds"] == 40
    watch.telemetry.job_ended(ended(), JOB, "default")
    assert watch["oldest_job_age_seconds"] == 10


def test_failures_are_counted(watch: Watch) -> None:
    """Alerts need metrics besides the log lines."""
    watch.telemetry.job_crashed(JOB)
    watch.telemetry.partition_fenced(TopicPartition("t", 0))
    watch.telemetry.kafka_failed("sink")
    watch.telemetry.kafka_failed("sink")
    assert watch["telemetry_failures_total"] == 0
    watch.telemetry.telemetry_failed()

    assert watch["telemetry_failures_total"] == 1
    assert watch["job_crashes_total"] == watch["partitions_fenced_total"] == 1
    assert watch["kafka_failures_total{part=sink}"] == 2
    assert watch["kafka_failures_total{part=commit}"] == 0


def test_telemetry_has_the_methods_of_the_port() -> None:
    names = [name for name in vars(observe.Observer) if not name.startswith("_")]
    assert len(names) >= 9
    for name in names:
        port, implementation = getattr(observe.Observer, name), getattr(Telemetry, name)
        assert port.__annotations__ == implementation.__annotations__


def test_log_and_metrics_contain_no_metadata_no_upstream_body_and_no_secret(
    watch: Watch, stream: Any
) -> None:
    """The lines are rendered as in production, and each event is logged."""
    configure_logging("json", "debug", stream, redact=Redactor([CANARY]))
    secret = JobError(ErrorCode.AUTH, f"wrong key {CANARY}", 401)
    echoed = JobError(ErrorCode.UPSTREAM_REJECTED, "you said: my prompt", 400, "you said: my prompt")
    watch.telemetry.job_started(JOB, "default")
    watch.telemetry.deltas_published("default", 1, 100, 0.1)
    watch.telemetry.job_ended(ended(**{**FAILED, "error": secret}), JOB, "default")
    watch.telemetry.job_ended(ended(usage={"note": CANARY}), JOB, CANARY)
    watch.telemetry.job_ended(ended(**{**FAILED, "error": echoed}), JOB, "default")
    watch.telemetry.job_abandoned(JOB, CANARY)
    watch.telemetry.job_rejected(
        Rejection(job_id=CANARY, source=AT, timestamp=0, faults=(CANARY,)), ErrorCode.INVALID_JOB
    )
    assert [line["event"] for line in stream.lines()] == [
        "job.failed",
        "job.completed",
        "job.failed",
        "job.abandoned",
        "job.rejected",
    ]
    assert "my prompt" not in stream.getvalue().decode()
    assert CANARY not in stream.getvalue().decode()
    assert stream.lines()[0]["error_message"] == "wrong key ***"
    assert CANARY not in generate_latest(watch.metrics.registry).decode()


def of_tenant(name: str) -> Job:
    return structs.replace(JOB, metadata={"tenant": name, "note": CANARY})


def test_job_of_a_labelled_tenant_counts_its_jobs_and_tokens(watch: Watch) -> None:
    """One allowed name of the metadata is a label and a log field, and no other."""
    with capture_logs() as logs:
        watch.telemetry.job_ended(ended(), of_tenant("acme"), "default")
        watch.telemetry.job_ended(ended(), JOB, "default")

    assert watch["jobs_by_metadata_total{value=acme,status=completed}"] == 1
    assert watch["jobs_by_metadata_total{value=none,status=completed}"] == 1
    tokens = [watch[f"tokens_by_metadata_total{{value={value},kind=prompt}}"] for value in ("acme", "none")]
    assert tokens[0]
    assert tokens[0] == tokens[1]
    assert [line.get("metadata") for line in logs] == [{"tenant": "acme"}, None]


def test_label_of_metadata_is_bounded(watch: Watch) -> None:
    """Users choose the values, and each series takes memory."""
    for number in range(1000):
        watch.telemetry.job_ended(ended(), of_tenant(f"tenant-{number}"), "default")
    watch.telemetry.job_ended(ended(), of_tenant("x" * 10_000), "default")
    watch.telemetry.job_ended(ended(), of_tenant("tenant-0"), "default")

    assert watch["jobs_by_metadata_total{value=tenant-149,status=completed}"] == 1
    assert watch["jobs_by_metadata_total{value=other,status=completed}"] == 851
    assert watch["jobs_by_metadata_total{value=tenant-0,status=completed}"] == 2


def test_page_after_every_kind_of_event_has_every_metric(watch: Watch) -> None:
    watch.telemetry.job_started(JOB, "default")
    watch.telemetry.first_delta("default", 0.3)
    watch.telemetry.try_failed(JOB, "default", JobError(ErrorCode.RATE_LIMITED, "slow down", 429), 0.5)
    watch.telemetry.job_ended(ended(), JOB, "default")
    watch.telemetry.job_rejected(REJECTION, ErrorCode.INVALID_JOB)
    watch.telemetry.job_abandoned(JOB, "drain")
    for gauge in (CIRCUIT_STATE, STREAMS_OPEN, STREAMS_LIMIT, UPSTREAM_WAITING):
        watch.metrics.track(gauge, lambda: 1, "default")
    page = generate_latest(watch.metrics.registry).decode()
    for definition in TABLE:
        suffix = "_count" if definition.kind == "histogram" else ""
        assert f"\n{PREFIX}{definition.name}{suffix}" in page, definition.name


PLACE = TopicPartition("jobs", 7)


@pytest.mark.parametrize(
    ("report", "line", "samples"),
    [
        (
            lambda to: to.move_deferred(PLACE, 3),
            {"event": "partition.promised", "log_level": "info", "partition": "jobs-7", "streams": 3},
            {"moves_deferred_total": 1},
        ),
        (
            lambda to: to.move_completed(PLACE, 12.34, is_forced=False),
            {
                "event": "partition.moved",
                "log_level": "info",
                "partition": "jobs-7",
                "waited_s": 12.3,
                "is_forced": False,
            },
            {"move_wait_seconds_sum": 12.34, "move_wait_seconds_count": 1, "moves_forced_total": 0},
        ),
        (
            lambda to: to.move_completed(PLACE, 600.0, is_forced=True),
            {
                "event": "partition.moved",
                "log_level": "info",
                "partition": "jobs-7",
                "waited_s": 600.0,
                "is_forced": True,
            },
            {"moves_forced_total": 1},
        ),
        (
            lambda to: to.streams_cut(PLACE, 5),
            {"event": "partition.streams_cut", "log_level": "warning", "partition": "jobs-7", "streams": 5},
            {"streams_cut_total": 5},
        ),
    ],
    ids=["promised", "moved", "forced", "cut"],
)
def test_move_of_a_partition_is_counted_and_logged(
    watch: Watch, report: Any, line: dict[str, Any], samples: dict[str, float]
) -> None:
    """Repeated calls are a warning, because they cost tokens; a move that waited is not."""
    with capture_logs() as lines:
        report(watch.telemetry)

    assert lines == [line]
    assert {name: watch[name] for name in samples} == pytest.approx(samples)


def test_rebalance_is_timed_from_its_first_revocation(watch: Watch) -> None:
    """A rebalance that begins anew before it ends is one; an assignment without a revocation has no duration."""
    watch.telemetry.partitions_changed(4, 4, 0)
    assert (watch["rebalances_total"], watch["rebalance_duration_seconds_count"]) == (1, 0)

    watch.telemetry.rebalancing()
    watch.clock.turn(2)
    watch.telemetry.rebalancing()
    watch.clock.turn(3)
    watch.telemetry.partitions_changed(3, 0, 1)
    watch.clock.turn(100)
    watch.telemetry.partitions_changed(3, 0, 0)

    assert (watch["rebalances_total"], watch["rebalance_duration_seconds_count"]) == (3, 1)
    assert watch["rebalance_duration_seconds_sum"] == 5
    assert watch["partitions_owned"] == 3


@pytest.mark.parametrize("reason", ["retention", "reset"])
def test_lost_records_are_counted_by_reason(watch: Watch, reason: Any) -> None:
    """By number of records, not of events: an alert compares them with the jobs."""
    watch.telemetry.records_lost(reason, 12)

    other = {"retention": "reset", "reset": "retention"}[reason]
    assert watch[f"records_lost_total{{reason={reason}}}"] == 12
    assert not watch[f"records_lost_total{{reason={other}}}"]
