"""A field of the configuration that nothing reads is a promise nobody keeps: each is mentioned outside of the schema."""

from __future__ import annotations

import ast
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from tests.unit.sources import files
from videofm.config.base import Section
from videofm.config.describe import schemas


def sections(annotation: Any) -> Iterator[type[Section]]:
    """Every section that `annotation` can hold, itself included."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
        for field in annotation.model_fields.values():
            yield from sections(field.annotation)
    for part in typing.get_args(annotation):
        yield from sections(part)


def reachable() -> Iterator[type[Section]]:
    """Every section that a YAML file can hold."""
    for schema in schemas().values():
        yield from sections(schema)


def mentions() -> set[str]:
    """Names that code outside videofm/config reads: attributes `x.NAME`, strings 'NAME', keywords of class patterns."""
    found: set[str] = set()
    for file in files():
        if file.path.startswith("videofm/config/"):
            continue
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.MatchClass):
                found.update(node.kwd_attrs)
    return found


def test_every_field_is_read_somewhere() -> None:
    read = mentions()
    known = {section.__name__: section for section in reachable()}
    unread = [
        f"{name}.{field}" for name, section in sorted(known.items()) for field in section.model_fields if field not in read
    ]
    assert not unread, f"no code reads {', '.join(unread)}"


def test_every_section_is_reached() -> None:
    """The walk above misses none: every subclass of Section can stand in a file."""

    def below(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
        for child in section.__subclasses__():
            yield child
            yield from below(child)

    # What a reachable section shares with others stands in a base of it.
    reached = {base for section in reachable() for base in section.__mro__ if issubclass(base, Section) and base is not Section}
    ours = {section for section in below(Section) if section.__module__.startswith("videofm.")}
    assert ours == reached
