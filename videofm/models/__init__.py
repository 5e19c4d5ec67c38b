"""Models by name: what there is, how to build one, how to load one. The public surface of `videofm.models`."""

from videofm.models.catalog import adapter, build, config, model_spec, names, sizes
from videofm.models.io import describe, load, load_weights, newest_checkpoint, save, weights
from videofm.models.spec import ParallelOptions

__all__ = [
    "ParallelOptions",
    "adapter",
    "build",
    "config",
    "describe",
    "load",
    "load_weights",
    "model_spec",
    "names",
    "newest_checkpoint",
    "save",
    "sizes",
    "weights",
]
