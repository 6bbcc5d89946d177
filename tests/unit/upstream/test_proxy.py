"""Proxy URLs and the environment."""

from __future__ import annotations

import pytest

from streamworker.upstream.proxy import Proxy, bypasses_proxy, parse_proxy, proxy_finder

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without proxies."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("http://p.example.com:3128", Proxy(host="p.example.com", port=3128)),
        ("http://p.example.com", Proxy(host="p.example.com", port=80)),
        ("https://p.example.com/", Proxy(host="p.example.com", port=443, is_tls=True)),
        ("p.example.com:3128", Proxy(host="p.example.com", port=3128)),
        ("http://[::1]:3128", Proxy(host="::1", port=3128)),
        ("http://a%40b:c%3Ad@p:1", Proxy(host="p", port=1, authorization=b"Basic YUBiOmM6ZA==")),
        ("http://token@p:1", Proxy(host="p", port=1, authorization=b"Basic dG9rZW46")),
    ],
)
def test_proxy_url_is_read(url: str, proxy: Proxy) -> None:
    """With or without a scheme, a port and credentials."""
    assert parse_proxy(url) == proxy


@pytest.mark.parametrize(
    "url",
    [
        "socks5://u:secret@p:1",
        "http://u:se/secret@p:1",
        "http://u:secret@p:port",
        "http://u:secret@",
        "http://u:secret@[::1",
    ],
)
def test_proxy_url_that_is_not_valid_is_refused_without_its_password(url: str) -> None:
    """Not even in the chain of causes."""
    with pytest.raises(ValueError, match="proxy") as caught:
        parse_proxy(url)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_proxy_repr_has_no_credentials() -> None:
    """They are in neither form."""
    text = repr(parse_proxy("http://user:secret@p:1"))

    assert "secret" not in text
    assert "Basic" not in text


def test_proxy_setting_applies_to_every_origin() -> None:
    """Also to those that NO_PROXY names: the setting is explicit."""
    assert proxy_finder("http://p:1")("https", "localhost", 443) == Proxy(host="p", port=1)
    assert proxy_finder("")("https", "localhost", 443) is None


def test_proxy_environment_is_used_by_scheme(environment: pytest.MonkeyPatch) -> None:
    """ALL_PROXY is for what has no variable of its own; NO_PROXY for exceptions."""
    environment.setenv("HTTPS_PROXY", "http://s:1")
    environment.setenv("all_proxy", "http://a:1")
    environment.setenv("NO_PROXY", "internal.example.com")
    find = proxy_finder("env")

    assert find("https", "api.example.com", 443) == Proxy(host="s", port=1)
    assert find("http", "api.example.com", 80) == Proxy(host="a", port=1)
    assert find("https", "x.internal.example.com", 443) is None


def test_proxy_environment_without_variables_names_none(environment: pytest.MonkeyPatch) -> None:
    """Connections are direct."""
    assert proxy_finder("env")("https", "api.example.com", 443) is None


@pytest.mark.parametrize(
    ("exceptions", "host", "covered"),
    [
        ("*", "a.com", True),
        ("a.com", "a.com", True),
        ("a.com", "A.COM.", True),
        ("a.com", "x.a.com", True),
        (".a.com", "x.a.com", True),
        ("*.a.com", "x.a.com", True),
        ("a.com", "ba.com", False),
        ("b.com, a.com", "a.com", True),
        ("b.com a.com", "a.com", True),
        ("a.com:443", "a.com", True),
        ("a.com:80", "a.com", False),
        ("", "a.com", False),
        (",", "a.com", False),
        (".", "a.com", False),
        ("127.0.0.1", "127.0.0.1", True),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.1/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.0.0.0/8", "a.com", False),
        ("127.0.0.1:443", "127.0.0.1", True),
        ("::1", "::1", True),
        ("[::1]", "::1", True),
        ("[::1]:443", "::1", True),
        ("fd00::/8", "fd12::1", True),
        ("a.com", "10.1.2.3", False),
        ("0.0.1", "127.0.0.1", False),
    ],
)
def test_no_proxy_covers_domains_addresses_and_networks(exceptions: str, host: str, *, covered: bool) -> None:
    """Domains cover their subdomains, but not names that only end alike."""
    assert bypasses_proxy(exceptions, host, 443) is covered
