"""Where aiokafka's exceptions end: one table, one context manager. No other file outside this room names them."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import contextmanager
from typing import TYPE_CHECKING

from aiokafka import errors

from streamworker.errors import Fenced, KafkaError, KafkaRefused, KafkaUnavailable, RecordTooLarge

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["describe_error", "translate_errors"]

_FENCED = (errors.ProducerFenced, errors.InvalidProducerEpoch)
_TOO_LARGE = (errors.MessageSizeTooLargeError, errors.RecordListTooLargeError)
_REFUSED = (
    errors.TopicAuthorizationFailedError,
    errors.GroupAuthorizationFailedError,
    errors.ClusterAuthorizationFailedError,
    errors.TransactionalIdAuthorizationFailed,
    errors.AuthenticationFailedError,
    errors.SaslAuthenticationFailed,
    errors.UnsupportedSaslMechanismError,
    errors.IllegalSaslStateError,
    errors.InvalidTopicError,
    errors.UnsupportedVersionError,
    errors.IncompatibleBrokerVersion,
)

# What a person has to change, where the exception's own text does not say it.
_WHICH = "`streamworker check` says which"
_ADVICE: dict[type[BaseException], str] = {
    errors.TopicAuthorizationFailedError: f"a right on a topic is missing: {_WHICH}",
    errors.GroupAuthorizationFailedError: f"a right on the consumer group is missing: {_WHICH}",
    errors.TransactionalIdAuthorizationFailed: f"a right on the transactional ids is missing: {_WHICH}",
    errors.ClusterAuthorizationFailedError: "before Kafka 3.0 a producer like ours needs IDEMPOTENT_WRITE on the cluster",
    errors.SaslAuthenticationFailed: "are kafka.sasl_mechanism, the user, and the password or token right?",
    errors.UnsupportedSaslMechanismError: "choose another kafka.sasl_mechanism",
    ssl.SSLCertVerificationError: "is kafka.ssl_cafile the authority of the broker's certificate, and is the broker "
    "called by a name that stands in it?",
    ssl.SSLError: "does the broker speak TLS at this port? see kafka.security_protocol",
    ConnectionRefusedError: "is a broker running there, and is kafka.bootstrap_servers right?",
    ConnectionResetError: "does the broker speak kafka.security_protocol at this port?",
    socket.gaierror: "is kafka.bootstrap_servers right?",
    errors.KafkaConnectionError: "does the broker speak kafka.security_protocol at this port, and does it want a client "
    "certificate?",
}


@contextmanager
def translate_errors(what: str) -> Iterator[None]:
    """Raise aiokafka's errors as ours; `what` says what was being done."""
    try:
        yield
    except KafkaError:
        raise
    except errors.KafkaError as error:
        raise _ours(error)(f"{what}: {describe_error(error)}") from error
    except ssl.SSLError as error:
        raise KafkaRefused(f"{what}: {describe_error(error)}") from error
    except (TimeoutError, asyncio.IncompleteReadError, OSError) as error:
        raise KafkaUnavailable(f"{what}: {describe_error(error)}") from error


def describe_error(error: BaseException) -> str:
    """Return the exception in words, with what to do where we know it."""
    text = str(error) or type(error).__name__
    if isinstance(error, errors.KafkaConnectionError) and "bootstrap" in text:
        return "no broker answers there"
    if isinstance(error, ssl.SSLError):
        text = f"no TLS connection: {getattr(error, 'verify_message', '') or error.reason or text}"
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
