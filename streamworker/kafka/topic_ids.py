"""Read topic ids (KIP-516), which tell a topic from another one of the same name. aiokafka has no request for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiokafka.errors import IncompatibleBrokerVersion
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Boolean, CompactArray, CompactString, Int16, Int32, Schema, TaggedFields

if TYPE_CHECKING:
    from collections.abc import Sequence
    from io import BytesIO

__all__ = ["read_topic_ids"]

_ID_BYTES = 16
_NO_ID = bytes(_ID_BYTES)


class _Uuid:
    """A topic id: 16 bytes."""

    @classmethod
    def encode(cls, value: bytes) -> bytes:
        return value

    @classmethod
    def decode(cls, data: BytesIO) -> bytes:
        return data.read(_ID_BYTES)

    @classmethod
    def repr(cls, value: bytes) -> str:
        return value.hex()


class _MetadataResponse_v12(Response):  # type: ignore[misc]  # noqa: N801 - named as aiokafka's are
    API_KEY = 3
    API_VERSION = 12
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            CompactArray(
                ("node_id", Int32),
                ("host", CompactString("utf-8")),
                ("port", Int32),
                ("rack", CompactString("utf-8")),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_id", CompactString("utf-8")),
        ("controller_id", Int32),
        (
            "topics",
            CompactArray(
                ("error_code", Int16),
                ("topic", CompactString("utf-8")),
                ("topic_id", _Uuid),
                ("is_internal", Boolean),
                (
                    "partitions",
                    CompactArray(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", CompactArray(Int32)),
                        ("isr", CompactArray(Int32)),
                        ("offline_replicas", CompactArray(Int32)),
                        ("tags", TaggedFields),
                    ),
                ),
                ("authorized_operations", Int32),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _MetadataRequest_v12(RequestStruct):  # type: ignore[misc]  # noqa: N801
    FLEXIBLE_VERSION = True
    API_KEY = 3
    API_VERSION = 12
    RESPONSE_TYPE = _MetadataResponse_v12
    SCHEMA = Schema(
        (
            "topics",
            CompactArray(("topic_id", _Uuid), ("name", CompactString("utf-8")), ("tags", TaggedFields)),
        ),
        ("allow_auto_topic_creation", Boolean),
        ("include_topic_authorized_operations", Boolean),
        ("tags", TaggedFields),
    )


class _TopicIdsRequest(Request[_MetadataRequest_v12]):  # type: ignore[misc]  # aiokafka is untyped
    """Metadata with topic ids, without automatic topic creation."""

    API_KEY = 3

    def __init__(self, topics: Sequence[str]) -> None:
        self._topics = topics

    def build(self, request_struct_class: Any) -> Any:
        return request_struct_class([(_NO_ID, topic, {}) for topic in self._topics], False, False, {})


async def read_topic_ids(client: Any, topics: Sequence[str]) -> dict[str, bytes]:
    """Return the ids of the topics that exist. Raises aiokafka's KafkaError.

    The result is empty for a broker that is older than Kafka 3.0.
    """
    try:
        answer = await client.send(client.get_random_node(), _TopicIdsRequest(topics))
    except (IncompatibleBrokerVersion, NotImplementedError):
        return {}
    return {
        topic: topic_id
        for error_code, topic, topic_id, *_ in answer.topics
        if not error_code and topic_id != _NO_ID
    }
