"""No public release has this model: its public layout is our own."""

from __future__ import annotations

from videofm.models.ar.config import ARConfig
from videofm.models.own_layout import OwnLayout

ADAPTER = OwnLayout(
    "VideofmARTransformer",
    ARConfig,
    (
        "token_embed",
        "row_embed",
        "column_embed",
        "caption_norm",
        "caption_projection",
        "blocks",
        "out_norm",
        "head",
    ),
)
