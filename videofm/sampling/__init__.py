"""From a prompt to a video: `generate(run_or_folder, prompts, ...)`, or a `Pipeline` that is kept."""

from videofm.sampling.api import generate
from videofm.sampling.conditioning import Condition, PixelCondition
from videofm.sampling.guidance import Guidance
from videofm.sampling.perturbation import Perturbation
from videofm.sampling.pipeline import Pipeline
from videofm.sampling.request import MadeWindow
from videofm.sampling.schedule import LinearQuadraticSchedule, Schedule, ShiftedSchedule
from videofm.sampling.storyboard import Segment, Storyboard
from videofm.sampling.windows import Window

__all__ = [
    "Condition",
    "Guidance",
    "LinearQuadraticSchedule",
    "MadeWindow",
    "Perturbation",
    "PixelCondition",
    "Schedule",
    "Segment",
    "ShiftedSchedule",
    "Storyboard",
    "Window",
    "generate",
    "Pipeline",
]
