"""What the declarations of several sections share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = ["OptionalPath", "Seconds", "Section", "comma_separated"]

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


def _given(value: Any) -> Any:
    return None if value == "" else value


OptionalPath = Annotated[Path | None, BeforeValidator(_given)]
"""A path; an empty text means none, as it does for the settings that are texts."""


class Section(BaseModel):
    """A table of the configuration: unknown names are faults, values never change, errors do not repeat input."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def comma_separated(value: Any) -> Any:
    """Split `a,b` into a list: environment variables hold text only."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value
