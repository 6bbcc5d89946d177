"""The texts of Kafka's errors, as users read them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from aiokafka import errors

from streamworker.errors import Fenced, KafkaError, KafkaRefused, KafkaUnavailable, RecordTooLarge
from streamworker.kafka.errors import describe_error, translate_errors


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            errors.IllegalSaslStateError("<aiokafka.protocol.admin.SaslHandShakeResponse_v1 object at 0x7f>"),
            "ILLEGAL_SASL_STATE (Request is not valid given the current SASL state)",
        ),
        (
            errors.UnsupportedSaslMechanismError("MetadataResponse_v5(throttle_time_ms=0, brokers=[])"),
            (
                "UNSUPPORTED_SASL_MECHANISM (The broker does not support the requested SASL mechanism) "
                "(choose another kafka.sasl_mechanism)"
            ),
        ),
        (
            errors.UnknownTopicOrPartitionError("jobs"),
            (
                "UNKNOWN_TOPIC_OR_PARTITION (This request is for a topic or partition that does not exist on this broker): "
                "jobs"
            ),
        ),
        (errors.NodeNotReadyError(), "node not ready"),
        (errors.KafkaTimeoutError("waited 3 s"), "waited 3 s"),
        (OSError("no route"), "no route"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_error_of_kafka_is_described_without_class_names_and_reprs(error: Exception, text: str) -> None:
    """The text is the broker's name for the error and its description, followed by details and advice."""
    assert describe_error(error) == text


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (errors.InvalidSessionTimeoutError(), "set worker.session_timeout_s between the broker's group.min"),
        (errors.InconsistentGroupProtocolError(), "choose another worker.group_id, or stop it"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_error_that_no_retry_can_change_is_a_refusal_with_advice(error: Exception, advice: str) -> None:
    """The worker ends with it instead of joining for ever."""
    with pytest.raises(KafkaRefused, match=advice), translate_errors("joining"):
        raise error


def test_error_of_a_timestamp_that_the_broker_refuses_asks_for_the_clock() -> None:
    """A clock can be corrected under a running worker, so the request is repeated."""
    with pytest.raises(KafkaUnavailable, match="is this machine's clock right"), translate_errors("writing"):
        raise errors.InvalidTimestampError


def chain(*links: Exception) -> Exception:
    """Return the first exception; each is caused by the next one."""
    for error, cause in pairwise(links):
        error.__cause__ = cause
    return links[0]


HIDDEN = "Unexpected error during batch delivery"


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (
            chain(errors.KafkaError(HIDDEN), errors.MessageSizeTooLargeError("12 bytes")),
            RecordTooLarge,
            "MESSAGE_SIZE_TOO_LARGE",
        ),
        (
            chain(errors.KafkaError(HIDDEN), errors.KafkaError(HIDDEN), errors.InvalidTimestampError()),
            KafkaUnavailable,
            "is this machine's clock right?",
        ),
        (chain(errors.KafkaError(HIDDEN), errors.ProducerFenced()), Fenced, ""),
        (
            chain(errors.KafkaError("Unexpected error"), errors.TopicAuthorizationFailedError("events")),
            KafkaRefused,
            "names the missing ACL",
        ),
        # A cause that is not Kafka's says less than the error itself.
        (chain(errors.KafkaError(HIDDEN), ValueError("private")), KafkaUnavailable, HIDDEN),
        (
            chain(errors.NodeNotReadyError("node 1"), errors.ProducerFenced()),
            KafkaUnavailable,
            "writing: node 1",
        ),
    ],
    ids=["too large", "two links", "fenced", "refused", "not kafka's", "own text"],
)
def test_error_that_hides_the_brokers_reason_is_translated_by_its_cause(
    error: Exception, kind: type[KafkaError], text: str
) -> None:
    """aiokafka wraps the broker's answer to a batch; its class and its text are those of the answer."""
    with pytest.raises(KafkaError) as caught, translate_errors("writing"):
        raise error

    assert type(caught.value) is kind
    assert text in str(caught.value)
    assert (HIDDEN in str(caught.value)) is (text == HIDDEN)
