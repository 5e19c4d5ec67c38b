"""What a sampler is told besides the prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

from videofm.config.sample import SamplerConfig
from videofm.errors import ConfigError
from videofm.sampling.guidance import Guidance
from videofm.sampling.schedule import SigmaSchedule, build_schedule
from videofm.sampling.solvers import SOLVERS
from videofm.sampling.windows import Window


@dataclass(frozen=True)
class SamplingSettings:
    """How videos are made.

    Attributes:
        num_frames, height, width: of the videos; must fit the compression of the VAE.
        fps: frames a second that the model is told.
        seed: video i starts from noise drawn with (seed, i).
        num_steps: from noise to data.
        schedule: noise levels of the steps; None takes the pipeline's own.
        solver: a name in `solvers.SOLVERS`.
        guidance: how velocities are guided.
        negative_prompt: what guidance moves away from.
        prompt_suffix: text put behind every prompt.
        window: windows of a long video; None makes it at once.
        decode_sigma: noise level that the decoder is told, where it takes one.
        decode_noise_scale: share of noise mixed into the raw latents before decoding, as `LTXPipeline` does; None takes
            `decode_sigma`.
        causal_fix: coordinates of latent frames as in `LTXConditionPipeline`, see `ops.rope.video_coordinates`; None takes what
            the pipeline's models were trained with.
        condition_noise_scale: noise on what is given at strength 1, see `conditioning.noise_on_given`; 0 is off.
        masked_text: hide padding from the text encoder, as `LTXConditionPipeline` does; None does as in training.
        start_sigma: with a guide, the noise level at which a window starts from its features (`features.begun`); 1 is noise.
        features_in_negative: with a guide, see `guidance.TokenFeatures`.
    """

    num_frames: int
    height: int
    width: int
    fps: float
    seed: int = 0
    num_steps: int = 30
    schedule: SigmaSchedule | None = None
    solver: str = "euler"
    guidance: Guidance = field(default_factory=Guidance)
    negative_prompt: str = ""
    prompt_suffix: str = ""
    window: Window | None = None
    decode_sigma: float = 0.0
    decode_noise_scale: float | None = None
    causal_fix: bool | None = None
    condition_noise_scale: float = 0.0
    masked_text: bool | None = None
    start_sigma: float = 1.0
    features_in_negative: bool = False

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ConfigError(f"no solver is called {self.solver!r}. There are: {', '.join(SOLVERS)}.")

    @property
    def noise_scale(self) -> float:
        """Share of noise in the latents that are decoded."""
        return self.decode_sigma if self.decode_noise_scale is None else self.decode_noise_scale

    @classmethod
    def from_config(cls, config: SamplerConfig) -> SamplingSettings:
        """The settings of a stage."""
        window = config.window
        return cls(
            num_frames=config.num_frames,
            height=config.height,
            width=config.width,
            fps=config.fps,
            seed=config.seed,
            num_steps=config.num_steps,
            schedule=None if config.schedule is None else build_schedule(config.schedule),
            solver=config.solver,
            guidance=Guidance.from_config(config.guidance_scale, config.guidance),
            negative_prompt=config.negative_prompt,
            prompt_suffix=config.prompt_suffix,
            window=None if window is None else Window(window.num_frames, window.overlap_frames, window.fade_frames),
            decode_sigma=config.decode_sigma,
            decode_noise_scale=config.decode_noise_scale,
            causal_fix=config.causal_fix,
            condition_noise_scale=config.condition_noise_scale,
            masked_text=config.masked_text,
            start_sigma=1.0 if config.guide is None else config.guide.start_sigma,
            features_in_negative=config.guide is not None and config.guide.features_in_negative,
        )
