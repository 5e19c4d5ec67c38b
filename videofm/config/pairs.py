"""The section about pairs of clips of which one is preferred."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from videofm.config.base import Section


class PairsConfig(Section):
    """Preferences over the clips of `data.manifest`. `data.micro_batch_size` then counts pairs, of two clips each."""

    path: str = Field(
        description="Folder of preferences (with preferences.json) that `videofm dpo rank`, `videofm dpo annotate --export` or "
        "`videofm dpo import` wrote."
    )
    on_bad: Literal["fail", "skip"] = Field(
        "fail",
        description="What to do about a record that cannot be used: identical clips, a clip that is missing, is another file, "
        "has another shape than its partner or does not decode, contradictory votes, another policy. `fail` stops and names "
        "it; `skip` leaves it out, or reads another pair in its place, and counts it in the log.",
    )
    ties: bool = Field(False, description="Read ties too. Their weight is 0: only objectives that learn from ties want them.")
    policies: list[Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] | None = Field(
        None,
        min_length=1,
        description="SHA-256 of the weights that may have made the clips; a pair of another policy, or of one that is not "
        "known, is a bad record. null takes pairs of any policy, however old.",
    )
