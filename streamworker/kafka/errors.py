"""Translate aiokafka's exceptions into ours. Only this package imports aiokafka, so none of them leaves it."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from aiokafka import errors

from streamworker.errors import (
    Fenced,
    KafkaError,
    KafkaRefused,
    KafkaUnavailable,
    MetadataTooLarge,
    RecordTooLarge,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streamworker.kafka.acls import RequiredAcls

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
    errors.InvalidSessionTimeoutError,
    errors.InconsistentGroupProtocolError,
)

_REPR = re.compile(r"<[\w.]+|\w+\(\w+=")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")

_MISSING_ACL = "`streamworker check` names the missing ACL"
_ADVICE: dict[type[BaseException], str] = {
    errors.TopicAuthorizationFailedError: _MISSING_ACL,
    errors.GroupAuthorizationFailedError: _MISSING_ACL,
    errors.TransactionalIdAuthorizationFailed: _MISSING_ACL,
    errors.ClusterAuthorizationFailedError: "before Kafka 3.0 an idempotent producer needs IDEMPOTENT_WRITE on the "
    "cluster",
    errors.SaslAuthenticationFailed: "are kafka.sasl_mechanism, the user, and the password or token right?",
    errors.UnsupportedSaslMechanismError: "choose another kafka.sasl_mechanism",
    errors.InvalidSessionTimeoutError: "set worker.session_timeout_s between the broker's group.min.session.timeout.ms "
    "and group.max.session.timeout.ms",
    errors.InconsistentGroupProtocolError: "another program is a member of this group, with another assignor: choose "
    "another worker.group_id, or stop it",
    errors.OffsetMetadataTooLargeError: "the broker's offset.metadata.max.bytes is below Kafka's default of 4096",
    errors.InvalidTimestampError: "is this machine's clock right? the broker's message.timestamp.after.max.ms is exceeded",
    ssl.SSLCertVerificationError: "did the authority in kafka.ssl_cafile sign the broker's certificate, and does the "
    "certificate contain the host name in kafka.bootstrap_servers?",
    ssl.SSLError: "does the broker speak TLS at this port? see kafka.security_protocol",
    ConnectionRefusedError: "is a broker running there, and is kafka.bootstrap_servers right?",
    ConnectionResetError: "does the broker speak kafka.security_protocol at this port?",
    socket.gaierror: "is kafka.bootstrap_servers right?",
    errors.KafkaConnectionError: "does the broker speak kafka.security_protocol at this port, and does it require a "
    "client certificate?",
}
"""What a person can do, where the exception's own text does not say it. The first class that matches counts."""


@contextmanager
def translate_errors(action: str, acls: RequiredAcls | None = None) -> Iterator[None]:
    """Raise aiokafka's errors, TLS errors and socket errors as ours.

    The message begins with `action`, for example "reading jobs". With `acls`, a refused request names the ACLs that
    are missing and the commands that add them.
    """
    try:
        yield
    except KafkaError:
        raise
    except errors.KafkaError as error:
        error = _original(error)
        raise _translated_class(error)(f"{action}: {describe_error(error, acls)}") from error
    except ssl.SSLError as error:
        raise KafkaRefused(f"{action}: {describe_error(error)}") from error
    except (TimeoutError, asyncio.IncompleteReadError, OSError) as error:
        raise KafkaUnavailable(f"{action}: {describe_error(error)}") from error


def describe_error(error: BaseException, acls: RequiredAcls | None = None) -> str:
    """Return the exception's text, followed by advice where there is any."""
    if acls is not None and (missing := acls.describe(error)) is not None:
        return missing
    error = _original(error)
    text = _text(error)
    if isinstance(error, ssl.SSLError):
        text = f"no TLS connection: {getattr(error, 'verify_message', '') or error.reason or text}"
    advice = next((advice for kind, advice in _ADVICE.items() if isinstance(error, kind)), None)
    return f"{text} ({advice})" if advice else text


def _text(error: BaseException) -> str:
    """Return the exception's text, of aiokafka's errors without class names and without the `repr` of a response."""
    if not isinstance(error, errors.KafkaError):
        return str(error) or type(error).__name__
    details = [text for text in map(str, error.args) if text and not _REPR.search(text)]
    if isinstance(error, errors.BrokerResponseError) and error.message:
        name = f"{error.message} ({' '.join(error.description.split()).rstrip('.')})"
        return ": ".join([name, *details])
    return ": ".join(details) or _CAMEL.sub(" ", type(error).__name__.removesuffix("Error")).lower()


def _original(error: BaseException) -> Any:
    """Return the broker's error behind aiokafka's "Unexpected error during batch delivery" and the like."""
    while isinstance(error.__cause__, errors.KafkaError) and _is_wrapper(error):
        error = error.__cause__
    return error


def _is_wrapper(error: BaseException) -> bool:
    return bool(error.args) and str(error.args[0]).startswith("Unexpected error")


def _translated_class(error: errors.KafkaError) -> type[KafkaError]:
    if isinstance(error, _FENCED):
        return Fenced
    if isinstance(error, _TOO_LARGE):
        return RecordTooLarge
    if isinstance(error, errors.OffsetMetadataTooLargeError):
        return MetadataTooLarge
    if isinstance(error, _REFUSED):
        return KafkaRefused
    return KafkaUnavailable
