"""Certificates, users and tokens of a secured Kafka, and the configuration of its listeners."""

import base64
import json
import time
from dataclasses import dataclass
from pathlib import Path

import trustme
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

__all__ = [
    "USER",
    "Credentials",
    "format_arguments",
    "listener_properties",
    "make_credentials",
    "unsigned_token",
]

USER = "worker"

# The other tests use the plain listener as User:ANONYMOUS, without a certificate or a password; ACLs apply to all other
# principals.
PROPERTIES = """\
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER
ssl.keystore.type=PEM
ssl.keystore.location={directory}/broker.pem
ssl.truststore.type=PEM
ssl.truststore.location={directory}/ca.pem
listener.name.mtls.ssl.client.auth=required
ssl.principal.mapping.rules=RULE:^CN=([^,]+).*$/$1/
listener.name.sasl.plain.sasl.jaas.config=\
org.apache.kafka.common.security.plain.PlainLoginModule required user_{user}="{password}";
listener.name.sasl.scram-sha-256.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.sasl.scram-sha-512.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.sasl.oauthbearer.sasl.jaas.config=\
org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required \
unsecuredLoginStringClaim_sub="broker";
"""


@dataclass(frozen=True)
class Credentials:
    """Files for the settings of a client, and the secret that it must not reveal."""

    directory: Path
    password: str

    @property
    def authorities(self) -> Path:
        """The certificate authority that signed the broker's certificate."""
        return self.directory / "ca.pem"

    @property
    def certificate(self) -> Path:
        """The client's certificate."""
        return self.directory / "client.crt"

    @property
    def key(self) -> Path:
        """The key of the client's certificate."""
        return self.directory / "client.key"


def make_credentials(directory: Path, password: str) -> Credentials:
    """Write certificates and keys."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    broker = authority.issue_cert("127.0.0.1", "localhost")
    # Kafka reads keys in PKCS #8 only.
    key = load_pem_private_key(broker.private_key_pem.bytes(), None)
    chain = b"".join(blob.bytes() for blob in broker.cert_chain_pems)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (directory / "broker.pem").write_bytes(pem + chain)
    credentials = Credentials(directory, password)
    # Without a name the list of names would be empty, which Java refuses.
    client = authority.issue_cert("client.test", common_name=USER)
    client.private_key_pem.write_to_path(str(credentials.key))
    client.cert_chain_pems[0].write_to_path(str(credentials.certificate))
    return credentials


def listener_properties(credentials: Credentials) -> str:
    """Return the broker's security properties."""
    return PROPERTIES.format(directory=credentials.directory, user=USER, password=credentials.password)


def format_arguments(credentials: Credentials) -> list[str]:
    """Return the arguments that format the storage with SCRAM users, so that no broker is needed to create them."""
    return [
        word
        for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
        for word in ("--add-scram", f"{mechanism}=[name={USER},password={credentials.password}]")
    ]


def unsigned_token(subject: str = USER, lifetime_s: float = 3600) -> str:
    """Return a JSON web token without a signature, which a broker with the default validator accepts."""
    now = time.time()
    parts = ({"alg": "none"}, {"sub": subject, "iat": now, "exp": now + lifetime_s})
    encoded = (base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in parts)
    return b".".join(encoded).decode() + "."
