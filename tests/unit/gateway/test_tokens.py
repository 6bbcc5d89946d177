"""Read tokens: every rule of the header and of the claims."""

from __future__ import annotations

import base64
import sys
from typing import TYPE_CHECKING, Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from streamworker.errors import ConfigurationError
from streamworker.gateway.tokens import (
    CLOCK_SKEW_S,
    MAX_TOKEN_BYTES,
    InvalidToken,
    Tokens,
    job_fault,
    looks_like_token,
    read_secrets,
)

if TYPE_CHECKING:
    from pathlib import Path

NOW = 1_800_000_000.0
SECRET = b"0123456789abcdef0123456789abcdef"
PRIVATE = Ed25519PrivateKey.generate()
CLAIMS = {
    "iss": "backend",
    "aud": "streamworker-gateway",
    "iat": int(NOW),
    "exp": int(NOW) + 600,
    "jobs": ["acme.1", "acme.chat-*"],
    "scope": "read",
}
HEADER = {"typ": "streamworker+jwt", "kid": "one"}


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """One secret, and one public key."""
    public = PRIVATE.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    path = tmp_path / "secrets"
    path.write_text(f"\n# secrets\none:{base64url(SECRET)}\ntwo:ed25519:{base64url(public)}\n")
    return path


@pytest.fixture
def tokens(file: Path) -> Tokens:
    """The tokens of these secrets at the time `NOW`."""
    secrets = read_secrets(file)
    return Tokens(lambda: secrets, audience="streamworker-gateway", max_age_s=3600, now=lambda: NOW)


def signed(
    claims: dict[str, Any] | None = None,
    header: dict[str, Any] | None = None,
    *,
    key: Any = SECRET,
    alg: str = "HS256",
) -> str:
    """Sign the claims; those that are `...` are left out."""
    merged = {name: value for name, value in (CLAIMS | (claims or {})).items() if value is not ...}
    heads = {name: value for name, value in (HEADER | (header or {})).items() if value is not ...}
    return jwt.encode(merged, key, algorithm=alg, headers=heads)


def test_token_that_was_signed_is_verified(tokens: Tokens) -> None:
    """With its jobs, its scope and its time."""
    token, expires_at = tokens.sign(["acme.1", "acme.x*"], "read cancel", 60, subject="user 7")
    found = tokens.verify(token)

    assert tokens.can_sign
    assert looks_like_token(token)
    assert expires_at == NOW + 60 == found.expires_at
    assert found.jobs == ("acme.1", "acme.x*")
    assert (set(found.scopes), found.kid) == ({"read", "cancel"}, "one")
    assert jwt.decode(token, options={"verify_signature": False})["sub"] == "user 7"


@pytest.mark.parametrize(
    ("job_id", "allowed"),
    [("acme.1", True), ("acme.12", False), ("acme.chat-", True), ("acme.chat-77", True), ("acme.cha", False)],
)
def test_token_allows_ids_and_prefixes(tokens: Tokens, job_id: str, allowed: bool) -> None:
    """A prefix ends in `*`."""
    assert tokens.verify(signed()).allows(job_id) is allowed


def test_repr_of_the_secrets_has_no_secret(tmp_path: Path) -> None:
    """The name of the signer is none."""
    path = tmp_path / "secrets"
    path.write_text(f"one:{base64.urlsafe_b64encode(SECRET).decode()}\n")

    assert repr(read_secrets(path)) == "Secrets(signer='one')"


def test_token_with_as_many_and_as_long_prefixes_as_may_be_is_verified(tokens: Tokens) -> None:
    """What is signed is accepted."""
    prefixes = [f"{number:02}" + "x" * 198 + "*" for number in range(64)]
    assert job_fault(prefixes) is None
    token, _ = tokens.sign(prefixes, "read cancel", 3600, subject="s" * 200)

    assert tokens.verify(token).jobs == tuple(prefixes)


def test_token_of_another_signer_is_verified_with_its_public_key(tokens: Tokens) -> None:
    """EdDSA, by the kid."""
    found = tokens.verify(signed({"nbf": int(NOW), "jti": "x"}, {"kid": "two"}, key=PRIVATE, alg="EdDSA"))

    assert found.kid == "two"


BAD_CLAIMS = [
    ({"iss": ...}, "iss"),
    ({"iss": ""}, "iss"),
    ({"aud": ...}, "aud"),
    ({"aud": "another"}, "aud"),
    ({"aud": ["another"]}, "aud"),
    ({"exp": ...}, "exp is required"),
    ({"exp": True}, "exp is required"),
    ({"exp": str(NOW)}, "exp is required"),
    ({"exp": int(NOW)}, "expired"),
    ({"exp": int(NOW) + 3601}, "at most 3600 s"),
    ({"exp": 1e300}, "at most 3600 s"),
    ({"exp": float("inf")}, "exp is required"),
    ({"exp": 10**400}, "exp is required"),
    ({"iat": -(10**400)}, "iat is required"),
    ({"nbf": 10**400}, "nbf is required"),
    ({"iat": ...}, "iat is required"),
    ({"iat": float("nan")}, "iat is required"),
    ({"nbf": float("nan")}, "nbf is required"),
    ({"iat": int(NOW) + CLOCK_SKEW_S + 1}, "iat is in the future"),
    ({"nbf": int(NOW) + CLOCK_SKEW_S + 1}, "not valid yet"),
    ({"nbf": "soon"}, "nbf"),
    ({"jobs": ...}, "jobs"),
    ({"jobs": []}, "jobs"),
    ({"jobs": "acme.1"}, "jobs"),
    ({"jobs": ["acme.1"] * 65}, "jobs"),
    ({"jobs": ["*"]}, "jobs"),
    ({"jobs": ["a*b"]}, "jobs"),
    ({"jobs": ["acme 1"]}, "jobs"),
    ({"jobs": [1]}, "jobs"),
    ({"scope": ...}, "scope"),
    ({"scope": "submit"}, "scope"),
    ({"scope": "cancel read"}, "scope"),
    ({"scope": ["read"]}, "scope"),
]


@pytest.mark.parametrize(("claims", "reason"), BAD_CLAIMS)
def test_token_with_an_invalid_claim_is_refused(tokens: Tokens, claims: dict[str, Any], reason: str) -> None:
    """The reason names the claim."""
    with pytest.raises(InvalidToken, match=reason):
        tokens.verify(signed(claims))


@pytest.mark.parametrize(
    "claims",
    [
        {"aud": ["x", "streamworker-gateway"]},
        {"nbf": NOW + CLOCK_SKEW_S},
        {"iat": NOW + CLOCK_SKEW_S},
        {"exp": NOW + 0.5},
        {"exp": NOW + 3600},
        {"jobs": ["x" * 200, "x" * 200 + "*"] * 32},
    ],
)
def test_token_within_the_rules_is_accepted(tokens: Tokens, claims: dict[str, Any]) -> None:
    """`aud` may be a list; the other clock may be 30 s ahead; each limit itself is allowed."""
    tokens.verify(signed(claims))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"typ": ...}, "typ"),
        ({"typ": "JWT"}, "typ"),
        ({"kid": ...}, "kid"),
        ({"kid": "three"}, "kid"),
        ({"kid": "two"}, "alg must be EdDSA"),
    ],
)
def test_token_with_an_invalid_header_is_refused(tokens: Tokens, header: dict[str, Any], reason: str) -> None:
    """The kid alone decides on the algorithm."""
    with pytest.raises(InvalidToken, match=reason):
        tokens.verify(signed(header=header))


def test_token_without_algorithm_is_refused(tokens: Tokens) -> None:
    """The library would accept `none` if it were asked for it."""
    with pytest.raises(InvalidToken, match="alg must be HS256"):
        tokens.verify(signed(key=None, alg="none"))


def test_token_signed_with_the_public_key_as_a_secret_is_refused(tokens: Tokens) -> None:
    """The classic confusion of algorithms."""
    public = PRIVATE.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    with pytest.raises(InvalidToken, match="alg must be EdDSA"):
        tokens.verify(signed(header={"kid": "two"}, key=public))


@pytest.mark.parametrize("key", [b"another secret of thirty-two bytes", SECRET[::-1]])
def test_token_signed_with_another_secret_is_refused(tokens: Tokens, key: bytes) -> None:
    """The signature decides."""
    with pytest.raises(InvalidToken, match="signature"):
        tokens.verify(signed(key=key))


@pytest.mark.parametrize(
    "token",
    [
        "",
        "x",
        "a.b.c",
        "ey.ey.ey",
        "eyJhbGciOiJIUzI1NiJ9..",
        "....",
        "ey" + "A" * MAX_TOKEN_BYTES,
        "é.é.é",
        ".".join([base64url(b'{"typ":"streamworker+jwt","kid":"one","alg":"HS256"}'), base64url(b"[]"), ""]),
    ],
)
def test_text_that_is_not_a_token_is_refused(tokens: Tokens, token: str) -> None:
    """Without an exception of the library."""
    with pytest.raises(InvalidToken):
        tokens.verify(token)


@pytest.mark.parametrize(
    ("excess", "reason"), [(0, "is not a JWT"), (1, "the token is longer than 20480 bytes")]
)
def test_token_longer_than_the_limit_is_not_parsed(tokens: Tokens, excess: int, reason: str) -> None:
    """A text at the limit is read."""
    with pytest.raises(InvalidToken, match=reason):
        tokens.verify("ey" + "A" * (20_480 - 2 + excess))


def test_token_whose_signed_claims_are_not_an_object_is_refused(tokens: Tokens) -> None:
    """A valid signature does not make a list of claims."""
    token = jwt.api_jws.encode(b"[]", SECRET, algorithm="HS256", headers=HEADER)
    with pytest.raises(InvalidToken, match="not a JWT with a JSON object of claims"):
        tokens.verify(token)


@pytest.mark.parametrize(
    ("text", "is_token"),
    [
        ("eyJh.eyJq.x", True),
        ("ey..", True),
        ("swk_a.b.c", False),
        ("eyJh.eyJq", False),
        ("eyJh.eyJq.x.y", False),
        ("", False),
    ],
)
def test_looks_like_token_distinguishes_tokens_from_keys(text: str, is_token: bool) -> None:
    """Other credentials are looked up as keys, and their error says so."""
    assert looks_like_token(text) is is_token


def test_every_change_of_one_character_is_refused(tokens: Tokens) -> None:
    """The header and the claims are signed."""
    token, _ = tokens.sign(["acme.1"], "read", 60)
    for at in range(0, len(token) - 1, 7):
        if token[at] != ".":
            changed = token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :]
            with pytest.raises(InvalidToken):
                tokens.verify(changed)


def test_tokens_without_secrets_are_refused() -> None:
    """Nothing signs, and nothing is accepted."""
    tokens = Tokens(lambda: read_secrets(None), audience="a", max_age_s=60, now=lambda: NOW)

    assert not tokens.can_sign
    with pytest.raises(InvalidToken, match="not configured"):
        tokens.verify(signed())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "has no line"),
        ("# nothing\n", "has no line"),
        ("secret", "line 1: must be kid:base64url-secret"),
        (":" + base64url(SECRET), "line 1: must be"),
        ("a b:" + base64url(SECRET), "line 1: must be"),
        ("one:!!!", "line 1: must be"),
        ("one:" + base64url(b"short"), "line 1: the secret must have at least 32 bytes"),
        ("one:ed25519:" + base64url(b"short"), "line 1: an Ed25519 public key has 32 bytes"),
        (f"one:{base64url(SECRET)}\none:{base64url(SECRET)}", "line 2: the kid is used twice"),
    ],
)
def test_secrets_file_with_a_fault_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    """The fault names the line and repeats no secret."""
    path = tmp_path / "secrets"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        read_secrets(path)

    [fault_of_file] = caught.value.faults
    assert fault in fault_of_file
    assert base64url(SECRET) not in str(caught.value)


def test_secrets_file_reports_every_fault_with_its_line(tmp_path: Path) -> None:
    """The operator can repair all of them at once; blank lines and comments count as lines."""
    path = tmp_path / "secrets"
    path.write_text(f"bad\n\n  # indented\n  one:{base64url(SECRET)}  \ntwo:short\n")
    with pytest.raises(ConfigurationError) as caught:
        read_secrets(path)

    lines = [fault.split(": ")[2] for fault in caught.value.faults]
    assert lines == ["line 1", "line 5"]


@pytest.mark.parametrize(
    ("secret", "padding"), [(b"\xfb\xef\xff" * 11, ""), (b"x" * 32, "="), (b"y" * 34, "==")]
)
def test_secret_in_any_base64url_is_read(tmp_path: Path, secret: bytes, padding: str) -> None:
    """With `-` and `_`, with and without padding; 32 bytes suffice."""
    path = tmp_path / "secrets"
    text = base64url(secret)
    path.write_text(f"one:{text}\ntwo:{text}{padding}\n")

    assert read_secrets(path).keys == {"one": ("HS256", secret), "two": ("HS256", secret)}


def test_secrets_file_without_the_extra_says_what_to_install(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the gateway starts, not when the first token arrives."""
    monkeypatch.setitem(sys.modules, "jwt", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'streamworker\[gateway\]'"):
        read_secrets(file)


def test_secrets_file_that_cannot_be_read_is_a_fault(tmp_path: Path) -> None:
    """A missing one, and one that is not text."""
    with pytest.raises(
        ConfigurationError, match=r"No such file or directory; docs/gateway\.md has the command"
    ):
        read_secrets(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="must be text"):
        read_secrets(tmp_path / "binary")


def test_secrets_of_public_keys_alone_sign_nothing(file: Path) -> None:
    """Tokens of other signers are accepted all the same."""
    file.write_text(file.read_text().splitlines()[-1])

    assert read_secrets(file).signer is None


@pytest.mark.parametrize(
    ("jobs", "is_valid"), [(["a"], True), (["a*"], True), (None, False), ([""], False), (["*"], False)]
)
def test_jobs_of_a_token_are_checked(jobs: object, is_valid: bool) -> None:
    """Ids, or prefixes with at least one character."""
    assert (job_fault(jobs) is None) is is_valid
