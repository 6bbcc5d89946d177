"""HTTP proxies: what a proxy URL says, and which proxy the environment names for an origin."""

from __future__ import annotations

import base64
import ipaddress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import getproxies_environment

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Proxy", "bypasses_proxy", "parse_proxy", "proxy_finder"]

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxy:
    """An HTTP proxy. Its credentials are in no repr."""

    host: str
    port: int
    is_tls: bool = False
    authorization: bytes | None = field(default=None, repr=False)
    """The value of Proxy-Authorization."""

    @property
    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """The header fields of a request to the proxy itself."""
        return () if self.authorization is None else ((b"Proxy-Authorization", self.authorization),)


def parse_proxy(url: str) -> Proxy:
    """Read a proxy URL. Raises ValueError, which does not repeat the URL, because it may contain a password."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError("the proxy is not a valid URL such as http://proxy.example.com:3128") from None
    if parts.scheme not in _PORTS:
        raise ValueError("the proxy must be an http:// or https:// URL; others are not supported")
    if not host:
        raise ValueError("the proxy is not a valid URL such as http://proxy.example.com:3128")
    authorization = None
    if parts.username is not None or parts.password is not None:
        user, password = (unquote_to_bytes(part or "") for part in (parts.username, parts.password))
        authorization = b"Basic " + base64.b64encode(user + b":" + password)
    return Proxy(
        host=host,
        port=port if port is not None else _PORTS[parts.scheme],
        is_tls=parts.scheme == "https",
        authorization=authorization,
    )


def proxy_finder(setting: str) -> Callable[[str, str, int], Proxy | None]:
    """Return a function of scheme, host and port of an origin that names its proxy.

    `setting` is a proxy URL, "" for none, or "env": HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY as they are now.
    Raises ValueError, which does not repeat a URL.
    """
    if setting != "env":
        proxy = parse_proxy(setting) if setting else None
        return lambda _scheme, _host, _port: proxy
    urls = getproxies_environment()
    by_scheme = {
        scheme: parse_proxy(url)
        for scheme in ("http", "https")
        if (url := urls.get(scheme) or urls.get("all"))
    }
    exceptions = urls.get("no", "")

    def find(scheme: str, host: str, port: int) -> Proxy | None:
        proxy = by_scheme.get(scheme)
        return None if proxy is None or bypasses_proxy(exceptions, host, port) else proxy

    return find


def bypasses_proxy(exceptions: str, host: str, port: int) -> bool:
    """Tell whether NO_PROXY covers a host: `*`, a domain with its subdomains, an address, a network; with a port or not."""
    host = host.lower().rstrip(".")
    for entry in exceptions.lower().replace(",", " ").split():
        if entry == "*" or _covers(entry, host):
            return True
        name, colon, number = entry.rpartition(":")
        if colon and number == str(port) and _covers(name.removeprefix("[").removesuffix("]"), host):
            return True
    return False


def _covers(entry: str, host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        domain = entry.removeprefix("*").strip(".")
        return bool(domain) and (host == domain or host.endswith(f".{domain}"))
    try:
        return address in ipaddress.ip_network(entry.removeprefix("[").removesuffix("]"), strict=False)
    except ValueError:
        return False
