"""What all parts of datasets.yaml are made of: frozen models whose errors say what is allowed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

_Items = TypeVar("_Items", bound=tuple[object, ...])


def _checked_regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    return pattern


def checked_relative(path: str) -> str:
    if not path or path.startswith("/") or "\\" in path or {"", ".", ".."} & set(path_parts(path)):
        raise ValueError(f"{path!r} must be relative, with forward slashes, without '.', '..' and empty parts")
    return path


def path_parts(path: str) -> list[str]:
    return path.removesuffix("/").split("/")


def not_empty(items: _Items) -> _Items:
    if not items:
        raise ValueError("needs at least one item")
    return items


Text = Annotated[str, Field(min_length=1)]
Regex = Annotated[str, AfterValidator(_checked_regex)]


class Declared(BaseModel):
    """Part of an entry: frozen, and an unknown field is an error that lists the known ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _only_known_fields(cls, fields: Any) -> Any:
        known = list(cls.model_fields)
        unknown = [str(name) for name in fields if name not in known] if isinstance(fields, Mapping) else []
        if unknown:
            close = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"unknown field {unknown[0]!r}; {hint}allowed: {', '.join(known)}")
        return fields
