"""What every section of a configuration shares: strict types, no unknown key, frozen once read."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A typed section. Unknown keys and wrong types are errors; values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


def execution(default: Any, **constraints: Any) -> Any:
    """A field that says how work is done and cannot change what comes out: workers, caches, layout, logs.

    A change of such a field neither re-runs a finished stage nor makes an unfinished one another run (`run_dir.fingerprint`).
    """
    return Field(default, json_schema_extra={"execution": True}, **constraints)


def result_fields(section: BaseModel) -> dict[str, Any]:
    """The plain values of `section` without its `execution` fields."""
    values = {}
    for name, info in type(section).model_fields.items():
        if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("execution"):
            continue
        values[name] = _plain(getattr(section, name))
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return result_fields(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
