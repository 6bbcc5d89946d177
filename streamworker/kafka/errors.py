"""Where aiokafka's exceptions end: one table, one context manager. No other file outside this room names them."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

from aiokafka import errors

from streamworker.errors import Fenced, KafkaError, KafkaRefused, KafkaUnavailable, RecordTooLarge

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["explained", "foreign_errors_as_ours"]

_FENCED = (errors.ProducerFenced, errors.InvalidProducerEpoch)
_TOO_LARGE = (errors.MessageSizeTooLargeError, errors.RecordListTooLargeError)
_REFUSED = (
    errors.TopicAuthorizationFailedError,
    errors.GroupAuthorizationFailedError,
    errors.ClusterAuthorizationFailedError,
    errors.TransactionalIdAuthorizationFailed,
    errors.AuthenticationFailedError,
    errors.UnsupportedSaslMechanismError,
    errors.IllegalSaslStateError,
    errors.InvalidTopicError,
    errors.UnsupportedVersionError,
    errors.IncompatibleBrokerVersion,
)

# What a person has to change, where the exception's own text does not say it.
_ADVICE: dict[type[BaseException], str] = {
    errors.TopicAuthorizationFailedError: "the user has no right on the topic: grant READ on job and control topics, "
    "WRITE on events and dead letters",
    errors.GroupAuthorizationFailedError: "the user has no right on the consumer group: grant READ on the group",
    errors.TransactionalIdAuthorizationFailed: "the user has no right on the transactional ids: grant WRITE on the "
    "prefix <group_id>.",
    errors.ClusterAuthorizationFailedError: "the user may not write idempotently: grant IDEMPOTENT_WRITE on the cluster",
    errors.AuthenticationFailedError: "the broker did not accept the user or the password",
    errors.UnsupportedSaslMechanismError: "the broker does not offer this kafka.sasl_mechanism",
}


@contextmanager
def foreign_errors_as_ours(what: str) -> Iterator[None]:
    """Raise aiokafka's errors as ours; `what` says what was being done."""
    try:
        yield
    except KafkaError:
        raise
    except errors.KafkaError as error:
        raise _ours(error)(f"{what}: {explained(error)}") from error
    except (TimeoutError, asyncio.IncompleteReadError, OSError) as error:
        raise KafkaUnavailable(f"{what}: {explained(error)}") from error


def explained(error: BaseException) -> str:
    """Return the exception in words, with what to do where we know it."""
    text = str(error) or type(error).__name__
    if isinstance(error, errors.KafkaConnectionError) and "bootstrap" in text:
        return "no broker answers there"
    advice = next((advice for kind, advice in _ADVICE.items() if isinstance(error, kind)), None)
    return f"{text} ({advice})" if advice else text


def _ours(error: errors.KafkaError) -> type[KafkaError]:
    if isinstance(error, _FENCED):
        return Fenced
    if isinstance(error, _TOO_LARGE):
        return RecordTooLarge
    if isinstance(error, _REFUSED):
        return KafkaRefused
    return KafkaUnavailable
