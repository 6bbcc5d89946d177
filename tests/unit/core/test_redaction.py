"""Secrets stay out of what an upstream makes us say."""

from __future__ import annotations

import pytest

from streamworker.core.redaction import Redactor


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
        ("authorization: basic dXNlcg==", "authorization: basic ***"),
        ('{"api_key": "abc123"}', '{"api_key": "***"}'),
        (r'{"message":"sent {\"api_key\":\"abc123\"}"}', r'{"message":"sent {\"api_key\":\"***\"}"}'),
        ("x-api-key: abc, accept: */*", "x-api-key: ***, accept: */*"),
        ("?api-key=abc&n=1", "?api-key=***&n=1"),
        ("password = 'abc'", "password = '***'"),
        ("client_secret=abc;next", "client_secret=***;next"),
        ("https://user:secret@host/v1", "https://user:***@host/v1"),
        ("Incorrect API key provided: sk-proj-ab**yz99. See", "Incorrect API key provided: ***. See"),
        ("hf_abcdefghij gsk_abcdefghij", "*** ***"),
    ],
)
def test_redactor_what_looks_like_a_secret_is_masked(text: str, clean: str) -> None:
    """Headers, members, URLs and key shapes are masked, and what surrounds them stays readable."""
    assert Redactor()(text) == clean


@pytest.mark.parametrize(
    "text",
    ["", "risk-assessment", "the sk-1 line", "https://host:8080/v1", "passwords are hard", "12 tokens used"],
)
def test_redactor_ordinary_text_stays(text: str) -> None:
    """Words that only resemble secrets are left alone."""
    assert Redactor()(text) == text


def test_redactor_known_secrets_are_masked_longest_first() -> None:
    """A secret that holds another leaves no rest behind."""
    assert Redactor(["secret", "secret-and-more"])("secret-and-more, secret!") == "***, ***!"


def test_redactor_very_short_secret_is_not_searched() -> None:
    """Three letters would blot out ordinary words."""
    redact = Redactor(["abc", ""])

    assert redact("abc") == "abc"


def test_redactor_repr_does_not_tell_secrets() -> None:
    """A redactor in a traceback says how many, never which."""
    assert repr(Redactor(["hush-hush", "hush-hush", "other-one"])) == "<Redactor of 2 secrets>"
