"""Secrets stay out of what an upstream makes us say."""

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


def crashed(prompt: str) -> Exception:
    """Fall over a prompt, twice, and over a third one that nobody is told of."""
    try:
        try:
            int(prompt)
        except ValueError as error:
            error.add_note(prompt)
            dict[str, str]()[prompt]
    except KeyError as error:
        try:
            try:
                raise LookupError(prompt)  # noqa: TRY301 - what comes of it is what is tested
            except LookupError:
                raise UnicodeError(prompt) from error
        except UnicodeError as last:
            return last
    raise AssertionError


def test_wordless_error_keeps_names_and_places_and_no_words() -> None:
    """The whole chain as Python prints it, without what was quoted, and nothing of the original is touched."""
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


def test_wordless_error_of_our_own_keeps_its_whole_name() -> None:
    """As the log of any other error has it."""
    told = traceback.format_exception_only(without_message(OwnError("canary")))

    assert told == [f"{__name__}.OwnError\n"]


def test_wordless_errors_in_a_ring_come_to_an_end() -> None:
    """Two that are each other's cause."""
    first, second = ValueError("canary"), KeyError("canary")
    first.__cause__, second.__cause__ = second, first

    assert "canary" not in "".join(traceback.format_exception(without_message(first)))


class OwnError(Exception):
    pass
