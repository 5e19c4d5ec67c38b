"""The autoregressive transformer over video tokens (ARLON)."""

from videofm.models.ar.adapter import ADAPTER
from videofm.models.ar.config import SIZES, ARConfig
from videofm.models.ar.inputs import ARInputs, Places, flatten, inputs_of, unflatten
from videofm.models.ar.model import ARCache, ARTransformer, CachedLogits
from videofm.models.ar.parallelize import check_context, parallelize
from videofm.types import ModelSpec

SPEC = ModelSpec(ARTransformer.spec_name, ARConfig, SIZES, ARTransformer, parallelize, ADAPTER, check_context=check_context)

__all__ = [
    "ADAPTER",
    "SIZES",
    "SPEC",
    "ARCache",
    "ARConfig",
    "ARInputs",
    "ARTransformer",
    "CachedLogits",
    "Places",
    "flatten",
    "inputs_of",
    "parallelize",
    "unflatten",
]
