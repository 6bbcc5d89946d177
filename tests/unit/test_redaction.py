"""Secrets are removed from text of upstreams."""

from __future__ import annotations

import traceback

import pytest

from streamworker.redaction import Redactor, without_message


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
def test_redactor_text_like_a_secret_is_masked(text: str, clean: str) -> None:
    """Headers, members, URLs and key formats are masked; the text around them stays readable."""
    assert Redactor()(text) == clean


@pytest.mark.parametrize(
    "text",
    ["", "risk-assessment", "the sk-1 line", "https://host:8080/v1", "passwords are hard", "12 tokens used"],
)
def test_redactor_ordinary_text_stays(text: str) -> None:
    """Words that only resemble secrets are kept."""
    assert Redactor()(text) == text


def test_redactor_known_secrets_are_masked_longest_first() -> None:
    """A secret that contains another one leaves no rest."""
    assert Redactor(["secret", "secret-and-more"])("secret-and-more, secret!") == "***, ***!"


def test_redactor_very_short_secret_is_ignored() -> None:
    """Three letters would mask ordinary words."""
    redact = Redactor(["abc", ""])

    assert redact("abc") == "abc"


def test_redactor_repr_shows_no_secrets() -> None:
    """A redactor in a traceback shows the number of secrets only."""
    assert repr(Redactor(["hush-hush", "hush-hush", "other-one"])) == "<Redactor of 2 secrets>"


def crashed(prompt: str) -> Exception:
    """Fail on a prompt twice, and on a third one whose exception is suppressed."""
    try:
        try:
            int(prompt)
        except ValueError as error:
            error.add_note(prompt)
            dict[str, str]()[prompt]
    except KeyError as error:
        try:
            try:
                raise LookupError(prompt)  # noqa: TRY301 - the resulting chain is what is tested
            except LookupError:
                raise UnicodeError(prompt) from error
        except UnicodeError as last:
            return last
    raise AssertionError


def test_without_message_keeps_names_and_positions() -> None:
    """The whole chain as Python prints it, without its messages; the original is unchanged."""
    error = crashed("canary")
    assert "canary" in "".join(traceback.format_exception(error))

    told = "".join(traceback.format_exception(without_message(error)))

    assert "canary" not in told
    assert [line for line in told.splitlines() if not line.startswith((" ", "Trace"))] == [
        *("ValueError", "", "During handling of the above exception, another exception occurred:", ""),
        *("KeyError", "", "The above exception was the direct cause of the following exception:", ""),
        "UnicodeError",
    ]
    assert told.count("in crashed") == 3
    assert error.args == ("canary",)


def test_without_message_of_own_exception_keeps_its_whole_name() -> None:
    """The log shows it like any other exception."""
    told = traceback.format_exception_only(without_message(OwnError("canary")))

    assert told == [f"{__name__}.OwnError\n"]


def test_without_message_of_circular_causes_ends() -> None:
    """Two exceptions that are each other's cause."""
    first, second = ValueError("canary"), KeyError("canary")
    first.__cause__, second.__cause__ = second, first

    assert "canary" not in "".join(traceback.format_exception(without_message(first)))


class OwnError(Exception):
    pass
