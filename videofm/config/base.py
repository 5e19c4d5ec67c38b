"""What every section of a configuration shares: strict types, no unknown key, frozen once read."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A typed section. Unknown keys and wrong types are errors; values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)
