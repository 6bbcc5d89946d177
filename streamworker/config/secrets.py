"""Secrets: API keys, passwords and tokens, read from an environment variable or a file at every use.

A secret can therefore be rotated while the worker runs. No error message contains the secret.
"""

from __future__ import annotations

from codecs import BOM_UTF8
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from streamworker.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["pop_misplaced", "read_api_key", "read_headers", "read_line", "read_proxy_password"]

_FROM_VARIABLE = "env:"
"""What a header's value begins with if the rest names an environment variable."""

_PROXY_VARIABLES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")

_INSTEAD = {("kafka", "sasl_password"): "sasl_password_file"}
"""Settings that may not stand in the TOML file, and the setting that replaces each of them there."""


def read_line(setting: str, path: Path | None) -> str | None:
    """Read a file that holds one line of text; return None if no file is set. `setting` is its path for errors.

    Raises:
        ConfigurationError: the file cannot be read, is empty, or holds more than one line.
    """
    if path is None:
        return None
    try:
        text = path.read_text("utf-8-sig").strip()
    except OSError as error:
        raise ConfigurationError([f"{setting}: {error.strerror}: {path}"]) from None
    except UnicodeDecodeError:
        text = ""
    if not text or not text.isprintable():
        raise ConfigurationError([f"{setting}: the file {path} must hold one line of text"])
    return text


def read_api_key(variable: str | None, file: Path | None, environ: Mapping[str, str]) -> str | None:
    """Read an upstream's API key from an environment variable or a file; return None if neither is named.

    Raises:
        ConfigurationError: the variable is not set, the file cannot be read, or the key cannot be sent in a header.
    """
    if variable:
        if key := environ.get(variable, "").strip():
            return _sendable(key, f"api_key_env: the environment variable {variable}")
        raise ConfigurationError([f"api_key_env: the environment variable {variable} is not set"])
    if file:
        try:
            key = file.read_bytes().removeprefix(BOM_UTF8).decode("ascii", "replace").strip()
        except OSError as error:
            raise ConfigurationError([f"api_key_file: {error.strerror}: {file}"]) from None
        return _sendable(key, f"api_key_file: the file {file}")
    return None


def read_headers(headers: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Return headers with the values of the variables that they name as `env:NAME`.

    Raises:
        ConfigurationError: a variable is not set, or a value cannot be sent in a header.
    """
    faults, values = [], {}
    for name, given in headers.items():
        variable = given.removeprefix(_FROM_VARIABLE) if given.startswith(_FROM_VARIABLE) else None
        value = given if variable is None else environ.get(variable, "").strip()
        if variable is not None and not value:
            faults.append(f"headers.{name}: the environment variable {variable} is not set")
        elif not (value.isascii() and value.isprintable()):
            faults.append(f"headers.{name}: the value must be one line of ASCII")
        values[name] = value
    if faults:
        raise ConfigurationError(faults)
    return values


def read_proxy_password(proxy: str, environ: Mapping[str, str]) -> str | None:
    """Return the password in a proxy setting, or, for `env`, in the variables that name proxies; None without one."""
    urls = [proxy]
    if proxy == "env":
        urls = [environ.get(name) or environ.get(name.lower()) or "" for name in _PROXY_VARIABLES]
    for url in urls:
        try:
            password = urlsplit(url if "://" in url else f"http://{url}").password
        except ValueError:
            continue
        if password:
            return password
    return None


def _sendable(key: str, where: str) -> str:
    if key and key.isascii() and key.isprintable():
        return key
    raise ConfigurationError([f"{where} does not hold a valid key: it must be one line of ASCII"])


def pop_misplaced(from_file: dict[str, Any], prefix: str) -> list[str]:
    """Remove the secrets that stand in the TOML file; return one fault for each, with the way to set it."""
    faults = []
    for (section, name), instead in _INSTEAD.items():
        if isinstance(values := from_file.get(section), dict) and values.pop(name, None) is not None:
            variable = f"{prefix}{section}__{name}".upper()
            faults.append(
                f"{section}.{name}: a secret does not belong in this file; set {variable} or {instead}"
            )
    upstreams = from_file.get("upstreams")
    for upstream, values in upstreams.items() if isinstance(upstreams, dict) else ():
        if isinstance(values, dict) and values.pop("api_key", None) is not None:
            path = f"upstreams.{upstream}.api_key"
            faults.append(f"{path}: a secret does not belong in this file; name a variable in api_key_env")
        if isinstance(values, dict) and "@" in str(values.get("proxy", "")):
            del values["proxy"]
            path, instead = f"upstreams.{upstream}.proxy", f"{prefix}UPSTREAMS__{upstream}__PROXY".upper()
            faults.append(f'{path}: a password does not belong in this file; set {instead}, or proxy = "env"')
    return faults
