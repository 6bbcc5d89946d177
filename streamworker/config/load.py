"""Read the settings from a TOML file and the environment, and report every fault at once, each with its path."""

from __future__ import annotations

import os
import re
import tomllib
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from streamworker.config.secrets import pop_misplaced
from streamworker.config.settings import EXPECTED, PREFIX, Settings
from streamworker.config.suggestions import is_of_kubernetes, nearest_path, nearest_variable
from streamworker.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["load", "variables_read"]

_NOT_SETTINGS = (f"{PREFIX}CONFIG", f"{PREFIX}TEST_")


def load(path: Path | None, environ: Mapping[str, str] = os.environ, *, needs_keys: bool = True) -> Settings:
    """Read the settings. `needs_keys` is false for commands that call no upstream: they do not need the API keys.

    Raises:
        ConfigurationError: with every fault of the file and the environment, each with its path.
    """
    from_file, faults = _read_file(path)
    faults += pop_misplaced(from_file, PREFIX)
    faults += _misspelt_variables(environ)
    from_environment, variables = _read_environment(environ)
    try:
        settings = Settings.model_validate(_merge(from_file, from_environment))
    except ValidationError as error:
        faults += [_fault(fault, variables) for fault in error.errors(include_url=False, include_input=False)]
    else:
        faults += _unreadable_files(settings)
        faults += _missing_keys(settings, environ) if needs_keys else []
    if faults:
        raise ConfigurationError(faults)
    return settings


def variables_read(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the names of the environment variables that `load` reads as settings, sorted."""
    return sorted(_read_environment(environ)[1].values())


def _read_file(path: Path | None) -> tuple[dict[str, Any], list[str]]:
    if path is None:
        return {}, []
    try:
        return tomllib.loads(
            path.read_text("utf-8-sig")
        ), []  # some editors begin a file with a byte order mark
    except OSError as error:
        return {}, [f"{path}: {error.strerror}"]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return {}, [f"{path}: is not valid TOML: {error}"]


def _read_environment(environ: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Collect the variables into the shape of the file; return it, and the variable of each path.

    Only names with a double underscore are settings: Kubernetes sets STREAMWORKER_SERVICE_HOST and similar variables
    for a Service called streamworker.
    """
    values: dict[str, Any] = {}
    variables: dict[str, str] = {}
    for variable, value in sorted(environ.items()):
        if variable.startswith(PREFIX) and "__" in variable:
            path = variable.removeprefix(PREFIX).lower().split("__")
            section = values
            for name in path[:-1]:
                inner = section.setdefault(name, {})
                section = inner if isinstance(inner, dict) else section.setdefault(name + " ", {})
            section[path[-1]] = value
            variables[".".join(path)] = variable
    return values, variables


def _misspelt_variables(environ: Mapping[str, str]) -> list[str]:
    """Return a fault for each variable without a double underscore that resembles a setting: it would be ignored."""
    return [
        f"{variable}: is not a setting; did you mean {meant}?"
        for variable in sorted(environ)
        if variable.startswith(PREFIX)
        and "__" not in variable
        and not variable.startswith(_NOT_SETTINGS)
        and not is_of_kubernetes(variable)
        and (meant := nearest_variable(variable))
    ]


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        below = merged.get(name)
        merged[name] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _fault(fault: Any, variables: Mapping[str, str]) -> str:
    path = ".".join(str(part) for part in fault["loc"] if part != "[key]")
    if not path:  # the message names the settings that it is about
        return _reason(fault, None)
    variable = next((name for at, name in variables.items() if at == path or at.startswith(path + ".")), None)
    meant = nearest_path(path) if variable is None else nearest_variable(variable)
    meant = None if meant in {path, variable} else meant
    where = f"{path} ({variable})" if variable else path
    return f"{where}: {_reason(fault, meant)}"


def _reason(fault: Any, meant: str | None) -> str:
    match fault["type"]:
        case "extra_forbidden":
            advice = f"did you mean {meant}?" if meant else "see `streamworker run --help` for all of them"
            return f"is not a setting; {advice}"
        case "missing":
            return "is required"
        case "string_pattern_mismatch":
            return EXPECTED[fault["ctx"]["pattern"]]
        case "model_type" | "dict_type":
            return f"must be a table; did you mean {meant}?" if meant else "must be a table"
        case "too_short":
            return f"must have at least {fault['ctx']['min_length']} item(s)"
    message = fault["msg"].removeprefix("Value error, ")
    message = re.sub("^Input should be", "must be", message)
    message = re.sub("^must be a valid (.*), unable to .*", r"must be a valid \1", message)
    return str(message[:1].lower() + message[1:])


def _missing_keys(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    faults = []
    for name, upstream in settings.upstreams.items():
        for read in (upstream.api_key, upstream.header_values):
            try:
                read(environ)
            except ConfigurationError as error:
                faults += [f"upstreams.{name}.{fault}" for fault in error.faults]
    return faults


def _unreadable_files(settings: Settings) -> list[str]:
    kafka = settings.kafka
    files = [
        (f"kafka.{field}", getattr(kafka, field)) for field in ("ssl_cafile", "ssl_certfile", "ssl_keyfile")
    ]
    for name, upstream in settings.upstreams.items():
        fields = ("ca_file", "cert_file", "key_file")
        files += [(f"upstreams.{name}.{field}", getattr(upstream, field)) for field in fields]
    faults = [
        f"{path}: cannot be read: {file}"
        for path, file in files
        if file is not None and not (file.is_file() and os.access(file, os.R_OK))
    ]
    for read in (kafka.password, kafka.token):
        try:
            read()
        except ConfigurationError as error:
            faults += error.faults
    return faults
