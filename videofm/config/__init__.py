"""The typed configuration: what a YAML may say, and `load(path, overrides)` that reads it. Imports no torch."""

from videofm.config.curate import CurateConfig, DemoDataConfig, EngineConfig
from videofm.config.data import DataConfig
from videofm.config.recipe import EvaluateConfig, ExportConfig, RecipeConfig, ReportConfig, StageConfig
from videofm.config.sample import SampleConfig
from videofm.config.train import TrainConfig

__all__ = [
    "CurateConfig",
    "DataConfig",
    "DemoDataConfig",
    "EngineConfig",
    "EvaluateConfig",
    "ExportConfig",
    "RecipeConfig",
    "ReportConfig",
    "SampleConfig",
    "StageConfig",
    "TrainConfig",
]
