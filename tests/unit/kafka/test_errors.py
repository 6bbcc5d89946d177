"""The texts of Kafka's errors, as users read them."""

from __future__ import annotations

import pytest
from aiokafka import errors

from streamworker.kafka.errors import describe_error


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
