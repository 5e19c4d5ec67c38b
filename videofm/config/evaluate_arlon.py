"""Sections about measures of guided generation: few sampling steps, and long videos of several prompts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from videofm.config.base import Section, execution
from videofm.config.sample import GuideConfig


class VariantConfig(Section):
    """One model of a comparison."""

    run: str = Field(description="Training run of a DiT, a checkpoint of it, or an exported folder.")
    guide: GuideConfig | None = Field(None, description="Autoregressive guidance; null samples without.")


class FewStepsMetric(Section):
    """Models of one kind at several counts of sampling steps, on the same demo-set captions and noise: one table.

    How well videos follow colour, direction and shape of their caption, how smoothly the shape moves, how much colours drift,
    and the seconds that the guide and the DiT take for a video.
    """

    kind: Literal["few_steps"]
    variants: dict[str, VariantConfig] = Field(min_length=1, description="Name in the table -> the model.")
    num_steps: list[Annotated[int, Field(ge=1)]] = Field([5, 10, 30], min_length=1, description="Counts of steps.")
    prompts_file: str = Field(description="Text file with one demo-set caption a line.")
    repeats: int = Field(1, ge=1, description="Videos of each caption, each from noise of its own.")
    num_frames: int = Field(ge=3, description="Frames of a video; drift compares its first and last third.")
    height: int = Field(ge=8, description="Height, in pixels.")
    width: int = Field(ge=8, description="Width, in pixels.")
    fps: float = Field(gt=0, description="Frames a second; the model is told.")
    guidance_scale: float = Field(3.0, ge=1, description="Classifier-free guidance; 1 is off.")
    batch_size: int = execution(24, ge=1, description="Videos made together; memory grows with it.")


class LongVideoMetric(Section):
    """Long demo-set videos, window by window: colour, shape and direction against the prompt of each window, jumps at the seams
    between windows, and drift."""

    kind: Literal["long_video"]
    samples: str = Field(description="Run directory of a `sample` stage with windows.")


__all__ = ["FewStepsMetric", "LongVideoMetric", "VariantConfig"]
