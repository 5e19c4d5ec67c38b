"""From a prompt to a video: `generate(run_or_folder, prompts, ...)`, or a `Pipeline` that is kept."""

from videofm.sampling.pipeline import Pipeline, generate
from videofm.sampling.schedule import Schedule

__all__ = ["Pipeline", "Schedule", "generate"]
