"""Models by name: what there is, how to build one, how to load one. The public surface of `videofm.models`."""

from videofm.models.catalog import adapter, build, config, inflate, model_spec, names, sizes
from videofm.models.initial import Initial, initial
from videofm.models.injection import InjectionSpec, freeze_base, inject_features, injection_spec, refuse_injection
from videofm.models.io import (
    CRITIC,
    describe,
    load,
    load_weights,
    newest_checkpoint,
    save,
    save_adapter,
    save_base,
    save_public,
    trained_roles,
    weights,
)
from videofm.models.lora import freeze_all_but_lora, inject_lora, lora_spec, merge_lora
from videofm.models.spec import ParallelOptions

__all__ = [
    "CRITIC",
    "Initial",
    "InjectionSpec",
    "ParallelOptions",
    "adapter",
    "build",
    "config",
    "describe",
    "freeze_all_but_lora",
    "freeze_base",
    "inflate",
    "initial",
    "inject_features",
    "inject_lora",
    "injection_spec",
    "load",
    "load_weights",
    "lora_spec",
    "merge_lora",
    "model_spec",
    "names",
    "newest_checkpoint",
    "refuse_injection",
    "save",
    "save_adapter",
    "save_base",
    "save_public",
    "sizes",
    "trained_roles",
    "weights",
]
