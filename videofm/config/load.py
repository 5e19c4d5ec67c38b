"""`load(path, overrides)`: a YAML file to a typed config, with every mistake told at once, in its place and with the rule."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from videofm.config.recipe import RecipeConfig
from videofm.config.source import Path_, Source, interpolate, override, read_file
from videofm.errors import ConfigError
from videofm.registry import nearest

__all__ = ["interpolate", "kinds", "load", "members"]

Model = TypeVar("Model", bound=BaseModel)


def load(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    schema: type[Model] = RecipeConfig,  # type: ignore[assignment]
    defaults: Mapping[str, Any] | None = None,
) -> Model:
    """The config in the file at `path`, with `overrides` (`key.path=value`) on top.

    Args:
        path: YAML file; None starts from nothing, for a config that is given on the command line alone.
        overrides: later ones win.
        schema: what the file must be.
        defaults: values of top-level keys that neither file nor overrides give (the verb implies `kind`).

    Raises:
        ConfigError: all mistakes of the file and of the overrides, one below the other.
    """
    source = Source({}) if path is None else read_file(path)
    override(source, overrides)
    for key, value in (defaults or {}).items():
        source.values.setdefault(key, value)
    return validate(source, schema, "the request" if path is None else str(path))


def validate(source: Source, schema: type[Model], name: str) -> Model:
    """`source` as a `schema`.

    Raises:
        ConfigError: all mistakes, each with where it was written, the key, the value, the rule and the nearest name.
    """
    try:
        return schema.model_validate(source.values)
    except ValidationError as error:
        problems = [_problem(detail, source, schema) for detail in error.errors()]
    count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
    raise ConfigError("\n".join([f"{name} is not a valid {_called(schema)}: {count}", *problems]))


def members(annotation: Any) -> dict[str, type[BaseModel]]:
    """The sections that `annotation` may be, by their `kind` (one section without a choice is called '')."""
    inner = _plain(annotation)
    options = typing.get_args(inner) if typing.get_origin(inner) in (typing.Union, types.UnionType) else (inner,)
    sections = [option for option in map(_plain, options) if isinstance(option, type) and issubclass(option, BaseModel)]
    if len(sections) == 1:
        return {"": sections[0]}
    return {str(typing.get_args(section.model_fields["kind"].annotation)[0]): section for section in sections}


def kinds(annotation: Any) -> list[str]:
    """The values of `kind` that a discriminated union takes."""
    return [kind for kind in members(annotation) if kind]


def _problem(detail: ErrorDetails, source: Source, schema: type[BaseModel]) -> str:
    """One mistake as text: where, `key = value`, and the rule."""
    path, section, annotation = _locate(detail["loc"], schema)
    key = ".".join(map(str, path)) or "(the whole config)"
    kind, value = detail["type"], detail["input"]
    if kind == "missing":
        shown = f"{key} is missing"
    elif isinstance(value, dict | BaseModel):
        shown = key
    else:
        shown = f"{key} = {_short(value)}"
    where = source.origin(path)
    if where.startswith("override "):
        # The text of an override holds the key and the value already.
        written = where.removeprefix("override ").partition("=")[0].strip()
        where, shown = where, "" if written == key else shown
    rule = _rule(detail, section, annotation)
    return f"  {where}{': ' + shown if shown else ''}\n      {rule}"


def _rule(detail: ErrorDetails, section: type[BaseModel] | None, annotation: Any) -> str:
    """What the value should have been."""
    kind, context = detail["type"], detail.get("ctx", {})
    last = str(detail["loc"][-1]) if detail["loc"] else ""
    if kind == "extra_forbidden" and section is not None:
        names = list(section.model_fields)
        return f"unknown key{_nearest(last, names)} {_called(section).capitalize()} has: {', '.join(names)}"
    if kind == "union_tag_invalid":
        options = kinds(annotation)
        return f"no kind is called {context['tag']!r}{_nearest(str(context['tag']), options)} Kinds: {', '.join(options)}"
    if kind == "union_tag_not_found":
        return f"`kind` is missing. Kinds: {', '.join(kinds(annotation))}"
    if kind == "missing":
        about = section.model_fields[last].description if section is not None and last in section.model_fields else None
        return f"required{': ' + about if about else ''}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return f"must be {context['expected']}{_nearest(str(detail['input']), _choices(str(context['expected'])))}".rstrip(".")
    message = (
        detail["msg"].replace("Input should be", "must be").replace("a valid integer", "an integer").replace("a valid ", "a ")
    )
    return message[0].lower() + message[1:] + _hint(detail)


def _hint(detail: ErrorDetails) -> str:
    """What to write instead, where the slip is a common one."""
    value = detail["input"]
    if detail["type"] == "bool_type" and str(value).lower() in ("yes", "no", "on", "off", "0", "1"):
        return f": write `true` or `false` (YAML 1.2), not {value}"
    if detail["type"] in ("int_type", "float_type") and isinstance(value, str):
        return ": a number without quotes"
    if detail["type"] == "int_type" and isinstance(value, float):
        return f": a whole number, not {value}"
    if detail["type"] == "string_type":
        return f": put it in quotes, '{value}'" if isinstance(value, int | float) else ""
    return ""


def _locate(loc: tuple[int | str, ...], schema: type[BaseModel]) -> tuple[Path_, type[BaseModel] | None, Any]:
    """The path of keys of an error (pydantic mixes the kinds of unions in), its section, and what it was to be."""
    path: list[str | int] = []
    section: type[BaseModel] | None = schema
    current: Any = schema
    for index, step in enumerate(loc):
        inner = _plain(current)
        options = members(inner) if inner is not None else {}
        if "" not in options and len(options) > 1 and step in options:
            current = options[str(step)]
            section = current
            continue
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            section = inner
            field = inner.model_fields.get(str(step))
            current = field.annotation if field else None
        elif typing.get_origin(inner) in (dict, list):
            current, section = typing.get_args(inner)[-1], None
        elif index + 1 == len(loc):
            break  # the name of a type among those that a union tried
        path.append(step)
    return tuple(path), section, current


def _plain(annotation: Any) -> Any:
    """`annotation` without `Annotated[...]` and without `| None`."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _plain(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(annotation) if option is not type(None)]
        return _plain(options[0]) if len(options) == 1 else annotation
    return annotation


def _called(schema: type[BaseModel]) -> str:
    """`TrainConfig` -> `train config`, as people say it."""
    words = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in schema.__name__).strip()
    return words.removesuffix(" config") + (" config" if words.endswith(" config") else "")


def _choices(expected: str) -> list[str]:
    return expected.replace(" or ", ", ").replace("'", "").split(", ")


def _nearest(word: str, words: list[str]) -> str:
    return nearest(word, words) or "."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
