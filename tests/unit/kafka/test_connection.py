"""The arguments of every Kafka client: addresses, TLS and SASL, and secrets that are rotated while it runs."""

from __future__ import annotations

import asyncio
import re
import ssl
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from aiokafka.errors import AuthenticationFailedError, KafkaConnectionError
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from streamworker.config import KafkaSettings
from streamworker.errors import ConfigurationError
from streamworker.kafka.connection import RotatedSecrets, client_arguments, silence_abandoned_futures

if TYPE_CHECKING:
    from pathlib import Path

PASSWORD = b"s3cret"


def test_plain_connection_has_neither_tls_nor_sasl() -> None:
    """Blanks around the commas of the address list are removed."""
    arguments = client_arguments(
        KafkaSettings(bootstrap_servers=" a:1, b:2 ", client_id="c", request_timeout_s=1.5)
    )

    assert arguments == {
        "bootstrap_servers": ["a:1", "b:2"],
        "client_id": "c",
        "security_protocol": "PLAINTEXT",
        "request_timeout_ms": 1500,
        "metadata_max_age_ms": 20_000,
    }


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
@pytest.mark.parametrize("protocol", ["SASL_PLAINTEXT", "SASL_SSL"])
def test_sasl_with_a_password_has_user_and_password(mechanism: Any, protocol: Any) -> None:
    """TLS only where the protocol has it."""
    arguments = client_arguments(
        KafkaSettings(
            security_protocol=protocol, sasl_mechanism=mechanism, sasl_username="u", sasl_password="p"
        )
    )

    assert arguments["sasl_mechanism"] == mechanism
    assert (arguments["sasl_plain_username"], arguments["sasl_plain_password"]) == ("u", "p")
    assert ("ssl_context" in arguments) == (protocol == "SASL_SSL")
    assert "sasl_oauth_token_provider" not in arguments


async def test_token_is_read_for_each_connection(tmp_path: Path) -> None:
    """It expires within an hour; a file that is replaced at the moment fails one connection, not the client."""
    file = tmp_path / "token"
    file.write_text("first\n")
    arguments = client_arguments(
        KafkaSettings(security_protocol="SASL_SSL", sasl_mechanism="OAUTHBEARER", sasl_oauth_token_file=file)
    )
    provider = arguments["sasl_oauth_token_provider"]

    assert await provider.token() == "first"
    file.write_text("second")
    assert await provider.token() == "second"
    file.unlink()
    with pytest.raises(AuthenticationFailedError, match=r"sasl_oauth_token_file: No such file"):
        await provider.token()
    assert "sasl_plain_password" not in arguments


# TLS


@pytest.fixture
def authority() -> trustme.CA:
    """A certificate authority."""
    return trustme.CA()


def secured(**files: Any) -> KafkaSettings:
    return KafkaSettings(security_protocol="SSL", **files)


def write_pair(authority: trustme.CA, folder: Path, name: str = "client") -> dict[str, Path]:
    """Write a certificate and its key."""
    pair = authority.issue_cert(f"{name}.example")
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    pair.cert_chain_pems[0].write_to_path(cert)
    pair.private_key_pem.write_to_path(key)
    return {"ssl_certfile": cert, "ssl_keyfile": key}


def test_tls_verifies_the_broker_with_the_given_authority(authority: trustme.CA, tmp_path: Path) -> None:
    """And with no other one; host names are checked."""
    file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(file)
    context = client_arguments(secured(ssl_cafile=file))["ssl_context"]

    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert len(context.get_ca_certs()) == 1
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_client_certificate_is_loaded(authority: trustme.CA, tmp_path: Path) -> None:
    """Again for each connection, so that it can be renewed."""
    config = secured(**write_pair(authority, tmp_path))
    context = client_arguments(config)["ssl_context"]
    secrets = RotatedSecrets(config)
    secrets.load_certificate(context)

    (tmp_path / "client.pem").write_bytes(b"half written")
    with pytest.raises(ConfigurationError):
        secrets.load_certificate(context)
    write_pair(authority, tmp_path)
    secrets.load_certificate(context)


def not_pem(folder: Path, authority: trustme.CA) -> dict[str, Path]:
    files = write_pair(authority, folder)
    files["ssl_certfile"].write_text("not a certificate")
    return files


def missing(folder: Path, authority: trustme.CA) -> dict[str, Path]:
    files = write_pair(authority, folder)
    files["ssl_keyfile"].unlink()
    return files


def of_another_key(folder: Path, authority: trustme.CA) -> dict[str, Path]:
    files, others = write_pair(authority, folder), write_pair(authority, folder, "other")
    return files | {"ssl_keyfile": others["ssl_keyfile"]}


def encrypted(folder: Path, authority: trustme.CA) -> dict[str, Path]:
    files = write_pair(authority, folder)
    key = load_pem_private_key(files["ssl_keyfile"].read_bytes(), None)
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(PASSWORD))
    files["ssl_keyfile"].write_bytes(locked)
    return files


def wrong_authority(folder: Path, _: trustme.CA) -> dict[str, Path]:
    file = folder / "ca.pem"
    file.write_text("not a certificate")
    return {"ssl_cafile": file}


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (not_pem, r"kafka\.ssl_certfile, ssl_keyfile: [a-z]"),
        (missing, "kafka.ssl_certfile, ssl_keyfile: No such file or directory"),
        (of_another_key, "kafka.ssl_certfile, ssl_keyfile: key values mismatch"),
        (encrypted, "kafka.ssl_certfile, ssl_keyfile: the key is encrypted; use a key without a password"),
        (wrong_authority, r"kafka\.ssl_cafile: [a-z]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_file_that_cannot_be_used_is_a_fault_of_the_settings(
    spoil: Any, fault: str, tmp_path: Path, authority: trustme.CA
) -> None:
    """Named with the setting. An encrypted key must not ask for its password on the terminal, and wait for it."""
    with pytest.raises(ConfigurationError) as refused:
        client_arguments(secured(**spoil(tmp_path, authority)))
    [found] = refused.value.faults

    assert re.match(fault, found)


# Futures that aiokafka leaves


@pytest.mark.parametrize(
    ("context", "is_reported"),
    [
        ({"exception": KafkaConnectionError("away")}, False),
        ({"exception": KafkaConnectionError("away"), "task": object()}, True),
        ({"exception": ZeroDivisionError("a bug")}, True),
        ({"message": "slow callback"}, True),
    ],
    ids=["future of aiokafka", "task", "bug", "message"],
)
@pytest.mark.parametrize("has_handler", [True, False])
async def test_abandoned_future_of_aiokafka_is_silent_and_everything_else_is_reported(
    monkeypatch: pytest.MonkeyPatch, context: dict[str, Any], is_reported: bool, has_handler: bool
) -> None:
    """By the handler that was there before, or by the loop's own one."""
    loop = asyncio.get_running_loop()
    reported: list[dict[str, Any]] = []
    if has_handler:
        loop.set_exception_handler(lambda _, context: reported.append(context))
    else:
        monkeypatch.setattr(loop, "default_exception_handler", reported.append)
    silence_abandoned_futures(loop)
    loop.call_exception_handler(context)

    assert reported == ([context] if is_reported else [])
