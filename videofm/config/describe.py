"""The schema as text for people (`--help`) and as JSON schema for editors (`videofm schema`)."""

from __future__ import annotations

import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from videofm.config.load import members
from videofm.config.recipe import RecipeConfig, StageConfig
from videofm.config.view import ViewConfig
from videofm.errors import ConfigError
from videofm.registry import nearest

WIDTH = 110


def schemas() -> dict[str, type[BaseModel]]:
    """What a YAML file can be: `recipe`, the `kind` of a single stage, or a `view` of a dataset."""
    return {"recipe": RecipeConfig, **members(StageConfig), "view": ViewConfig}


def schema_of(name: str) -> type[BaseModel]:
    """The section called `name` (`recipe`, `train`, ...).

    Raises:
        ConfigError: there is none; the nearest is offered.
    """
    known = schemas()
    if name not in known:
        raise ConfigError(f"no schema is called {name!r}{nearest(name, known)}. There are: {', '.join(known)}.")
    return known[name]


def json_schema(name: str = "recipe") -> dict[str, Any]:
    """The JSON schema of a file: point an editor at it to get completion and checks while typing."""
    schema = schema_of(name).model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = f"videofm {name}"
    schema.setdefault("properties", {})["extends"] = {
        "type": "string",
        "description": "One parent file, relative to this one; its values hold where this file says nothing.",
    }
    return schema


def describe(section: type[BaseModel]) -> str:
    """All fields below `section`: `name  type = default  description`, one to a line, sections indented."""
    return "\n".join(_fields(section, 0, frozenset()))


def _fields(section: type[BaseModel], depth: int, above: frozenset[type[BaseModel]]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if name == "kind" and typing.get_origin(field.annotation) is typing.Literal:
            continue  # the choice that led here
        yield from _field(name, field, depth)
        for kind, member in members(field.annotation).items():
            if member in above or kind in members(StageConfig):
                continue  # the stages of a recipe have a help of their own
            if kind:
                yield from _kind(kind, member, depth + 1)
            yield from _fields(member, depth + 1 + bool(kind), above | {member})
        for kind, member in _contained(field.annotation).items():
            if kind:
                yield from _kind(kind, member, depth + 1)
            yield from _fields(member, depth + 1 + bool(kind), above | {member})


def _field(name: str, field: FieldInfo, depth: int) -> Iterator[str]:
    head = f"{'  ' * depth}{name}: {type_name(field.annotation)}{_default(field)}"
    about = (field.description or "") + _limits(field)
    indent = " " * 4 + "  " * depth
    yield head
    yield from textwrap.wrap(about, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _kind(kind: str, member: type[BaseModel], depth: int) -> Iterator[str]:
    """The line over the fields of one choice, and below it what is too long for the line."""
    indent = "  " * depth
    yield from textwrap.wrap(
        f"kind: {kind}  ({_purpose(member)})", WIDTH, initial_indent=indent, subsequent_indent=f"{indent}    "
    )


def _contained(annotation: Any) -> dict[str, type[BaseModel]]:
    """The sections inside `dict[str, X]` and `list[X]`, by kind."""
    if typing.get_origin(annotation) not in (dict, list):
        return {}
    stages = members(StageConfig)
    return {kind: member for kind, member in members(typing.get_args(annotation)[-1]).items() if kind not in stages}


def type_name(annotation: Any) -> str:
    """A type as people say it: `int`, `text or null`, `one of 'l1', 'mse'`, `list of text`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is typing.Literal:
        return "|".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        if any(isinstance(option, type) and issubclass(option, BaseModel) for option in arguments):
            sections = [kind or "section" for kind in members(annotation)]
            return " | ".join(sections + ["null"] * (type(None) in arguments))
        return " or ".join(type_name(option) for option in arguments)
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return f"name -> {type_name(arguments[1])}"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {str: "text", int: "int", float: "number", bool: "true|false"}.get(annotation, "any value")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "  (required)"
    if isinstance(field.default, BaseModel):
        differing = _differing(field.default)
        if list(differing) == ["kind"]:
            return f" = {differing['kind']}"
        return f" = {_shown(differing)}" if differing else ""  # nothing: those of its fields, which follow
    return f" = {_shown(field.default)}"


def _differing(section: BaseModel) -> dict[str, Any]:
    """What a section says that is no default of its own fields: it holds only where the whole section is not given."""
    return {
        name: _differing(value) if isinstance(value := getattr(section, name), BaseModel) else value
        for name, field in type(section).model_fields.items()
        if name == "kind" or field.is_required() or getattr(section, name) != field.default
    }


def _shown(value: Any, inside: bool = False) -> str:
    """A value as YAML writes it; text that is more than a word is quoted inside lists and sections."""
    if isinstance(value, BaseModel):
        value = _differing(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(inner, True)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(_shown(item, True) for item in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if inside and isinstance(value, str) and not value.replace("_", "").isalnum() else str(value)


def _limits(field: FieldInfo) -> str:
    words = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "a multiple of"}
    limits = [f"{text} {getattr(rule, name)}" for rule in field.metadata for name, text in words.items() if hasattr(rule, name)]
    return f" [{', '.join(limits)}]" if limits else ""


def _purpose(section: type[BaseModel]) -> str:
    """The first paragraph of the docstring, on one line."""
    return " ".join((section.__doc__ or "").strip().partition("\n\n")[0].split()).rstrip(".")
