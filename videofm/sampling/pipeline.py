"""Prompts to videos, with models that are kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from videofm.errors import CheckpointError, ConfigError
from videofm.ops.patchify import latents_from_tokens
from videofm.progress import LOG
from videofm.registry import resolve
from videofm.run_dir import read_json
from videofm.sampling.conditioning import (
    AnyCondition,
    Condition,
    PixelCondition,
    Start,
    content,
    coordinates_at,
    located,
    noise_on_given,
    place,
)
from videofm.sampling.features import Guide, begun, check_guide, check_heads, head_of, injects, lifted, on_tokens
from videofm.sampling.frames import FrameRule
from videofm.sampling.guidance import Guidance, guided_velocity
from videofm.sampling.noise import derived_seed, initial_noise, named_noise, video_seed
from videofm.sampling.request import Hooks, MadeWindow, Reached, Request
from videofm.sampling.schedule import Schedule, SigmaSchedule
from videofm.sampling.settings import SamplingSettings
from videofm.sampling.solvers import SOLVERS, capped
from videofm.sampling.source import models_folder, trained_with_causal_fix
from videofm.sampling.storyboard import Prompt, check_storyboards, prompt_at, texts_of
from videofm.sampling.windows import faded, in_window, new_frames, spans
from videofm.types import Conditioning

__all__ = ["MadeWindow", "Pipeline", "evaluating", "models_folder"]

_COMPONENTS = {"dit": "transformer", "vae": "vae", "text_encoder": "text_encoder"}
"""Roles of a training run, and what diffusers calls them in an exported folder."""
_DEFAULT_SCALE = 3.0


@dataclass
class Pipeline:
    """What it takes to make videos: `dit`, `vae` and `text_encoder` on one device, the schedule of noise levels, whether the
    `dit` was trained with `objective.causal_fix`, and, for one with an injection, who makes its features (None: its null
    feature stands everywhere).
    """

    dit: nn.Module
    vae: nn.Module
    text_encoder: nn.Module
    schedule: SigmaSchedule = field(default_factory=Schedule)
    causal_fix: bool = False
    guide: Guide | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        ema: bool = True,
        device: str | torch.device | None = None,
        schedule: SigmaSchedule | None = None,
        dtype: torch.dtype = torch.float32,
        guide: Guide | None = None,
    ) -> Pipeline:
        """The pipeline of a DiT's training run, of a checkpoint of it, or of an exported folder.

        Args:
            path: the run (also that of an `export` stage), checkpoint or folder.
            ema: take the moving average of the weights where the run keeps one.
            device: where the models go; None takes CUDA where there is one.
            schedule: noise levels; None takes those of the folder's scheduler, and LTX-Video's where it has none.
            dtype: of the weights; the state between steps is float32 with any.
            guide: as it is.

        Raises:
            CheckpointError: `path` is missing, or holds no DiT, VAE and text encoder.
        """
        causal_fix, path = trained_with_causal_fix(path), models_folder(path)
        if not path.exists():
            raise CheckpointError(f"{path} does not exist: give a training run of a DiT, a checkpoint, or an exported folder.")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        load = resolve("videofm.models:load")
        # A path without a DiT is refused by `load`, which lists the roles that are there.
        models = {
            role: load(path, role=role, component=component, ema=ema, device=device).to(dtype)
            for role, component in _COMPONENTS.items()
        }
        scheduler = path / "scheduler" / "scheduler_config.json"
        if schedule is None and scheduler.exists():
            schedule = Schedule.from_public(read_json(scheduler))
        return cls(**models, schedule=schedule or Schedule(), causal_fix=causal_fix, guide=guide)

    def generate(self, prompts: Sequence[Prompt], **settings: Any) -> Tensor:
        """One video for each prompt, `(B, 3, T, H, W)` float32 in [-1, 1] on the CPU; takes what `stream` takes."""
        return torch.cat(list(self.stream(prompts, **settings)))

    def stream(
        self,
        prompts: Sequence[Prompt],
        *,
        conditions: Sequence[AnyCondition] = (),
        guidance_scale: float | None = None,
        batch_size: int = 16,
        first_index: int = 0,
        on_step: Callable[[], None] | None = None,
        on_token: Callable[[], None] | None = None,
        settings: SamplingSettings | None = None,
        **fields: Any,
    ) -> Iterator[Tensor]:
        """Batches of videos in the order of `prompts`, each `(<= batch_size, 3, T, H, W)` float32 in [-1, 1] on the CPU.

        Args:
            prompts: one video each, a text or a storyboard; video i starts from noise drawn with (seed, first_index + i),
                whatever the batch size.
            conditions: parts of the videos that are given.
            guidance_scale: short for `guidance=Guidance(scale)`.
            batch_size: videos made together.
            first_index: index of the first prompt, to go on where an earlier call stopped.
            on_step: called after every step of every batch and window; may raise to stop.
            on_token: called before every token that a guide draws; may raise to stop.
            settings: how; None makes them of `guidance_scale` and `fields`.
            fields: those of `SamplingSettings`; `num_frames`, `height`, `width` and `fps` are needed.

        Raises:
            ConfigError: no prompts, a size that the VAE cannot make, or something given that does not fit.
        """
        if batch_size < 1:
            raise ConfigError(f"batches of {batch_size}: give a batch_size of at least 1.")
        request = self._request(prompts, conditions, settings or _settings(guidance_scale, fields))
        for start in range(0, len(prompts), batch_size):
            part = request.rows(slice(start, start + batch_size))
            windows = self._made(part, _seeds(part, first_index + start), Hooks(on_step, on_token))
            yield torch.cat([window.video for window in windows], dim=2)

    def stream_windows(
        self,
        prompts: Sequence[Prompt],
        *,
        conditions: Sequence[AnyCondition] = (),
        guidance_scale: float | None = None,
        first_index: int = 0,
        seeds: Sequence[int] | None = None,
        on_step: Callable[[], None] | None = None,
        on_token: Callable[[], None] | None = None,
        settings: SamplingSettings | None = None,
        **fields: Any,
    ) -> Iterator[MadeWindow]:
        """One batch of videos, all `prompts` together, window after window: what is new in each, as soon as it is made.

        From window to window the last frames are kept, `window.overlap_frames` of them, and nothing of what was yielded: memory
        does not grow with the length of the videos. Arguments and errors as in `stream`, whose videos these are; `seeds`, one
        a prompt, are generator seeds in place of those that follow from (seed, first_index).
        """
        request = self._request(prompts, conditions, settings or _settings(guidance_scale, fields))
        if seeds is not None and len(seeds) != len(prompts):
            raise ConfigError(f"{len(seeds)} seeds are given for {len(prompts)} prompts: give one for each.")
        drawn_with = _seeds(request, first_index) if seeds is None else seeds
        yield from self._made(request, drawn_with, Hooks(on_step, on_token))

    def num_cut_prompts(self, prompts: Sequence[Prompt], suffix: str = "") -> int:
        """How many texts of `prompts`, with `suffix` behind them, have more tokens than a text encoder takes."""
        cuts = self.text_encoder.cuts([text + suffix for prompt in prompts for text in texts_of(prompt)])
        return sum(any(prompt) for prompt in zip(*cuts.values(), strict=True))

    def _warn_of_cuts(self, prompts: Sequence[Prompt], suffix: str) -> None:
        texts = [text + suffix for prompt in prompts for text in texts_of(prompt)]
        cuts = {"": self.text_encoder.cuts(texts)} | ({} if self.guide is None else {" of the guide": self.guide.cuts(texts)})
        for owner, found_by in cuts.items():
            for name, found in found_by.items():
                if any(found):
                    encoder = ("text encoder" if name == "text" else f"{name} text encoder") + owner
                    message = "%d of %d prompts are longer than the %s takes; their ends are cut"
                    LOG.warning(message, sum(found), len(texts), encoder)

    def _made(self, request: Request, seeds: Sequence[int], hooks: Hooks) -> Iterator[MadeWindow]:
        """The windows of one batch of videos."""
        reached = Reached()
        for number in range(len(request.windows)):
            own = [derived_seed(seed, f"window:{number}") for seed in seeds] if number else list(seeds)
            with evaluating(self.dit, self.vae, self.text_encoder):
                made = [self._next(request, number, reached, own, hooks)]
            yield made.pop()  # while the caller has it, nobody else does

    @torch.no_grad()
    def _next(self, request: Request, number: int, reached: Reached, seeds: list[int], hooks: Hooks) -> MadeWindow:
        """Window `number`, which goes on from what was `reached`; that is moved on."""
        settings, (frames, given) = request.settings, request.windows[number]
        overlap = 0 if reached.tail is None else reached.tail.shape[2]
        new = range(frames.start + overlap, frames.stop)
        prompts = tuple(prompt_at(prompt, new.start) for prompt in request.prompts)
        self._read(reached, [prompt + settings.prompt_suffix for prompt in prompts], settings)
        if reached.tail is not None:
            given = [PixelCondition(reached.tail), *given]
        made = self._window(reached, seeds, given, replace(settings, num_frames=len(frames)), hooks)
        video = made.video
        if reached.tail is not None and settings.window is not None:
            video = faded(video, reached.tail, settings.window.fade_frames)
        if settings.window is not None:
            seen = video if reached.tail is None else torch.cat([reached.tail, video], dim=2)
            reached.tail = seen[:, :, -settings.window.overlap_frames :].clone()  # a view would keep all of it
        return replace(made, frames=new, video=video, prompts=prompts)

    def _read(self, reached: Reached, texts: list[str], settings: SamplingSettings) -> None:
        """Encode `texts` if they have changed."""
        if reached.texts != texts:
            reached.texts, reached.positive = texts, self._encode_text(texts, settings.masked_text)
        if reached.negative is None:
            reached.negative = reached.positive
            if settings.guidance.scale != 1:
                reached.negative = self._encode_text([settings.negative_prompt] * len(texts), settings.masked_text)

    def _window(
        self,
        reached: Reached,
        seeds: list[int],
        conditions: list[AnyCondition],
        settings: SamplingSettings,
        hooks: Hooks,
    ) -> MadeWindow:
        """All frames of a window, of the length that the model makes at once."""
        cells = self._rule.latent_shape(settings.num_frames, settings.height, settings.width)
        num_tokens = cells[0] * cells[1] * cells[2]
        given = [lifted(self._encoded(condition), settings.start_sigma) for condition in conditions]
        start = self._start(cells, seeds, given, settings)
        found, features = None, None
        if self.guide is not None:
            found = self.guide.features(reached.texts, seeds, cells, head_of(given, len(seeds)), hooks.on_token)
            start = begun(start, found.features, settings.start_sigma)
            features = on_tokens(found.features, start, settings.features_in_negative) if injects(self.dit) else None
        sigmas = (settings.schedule or self.schedule).sigmas(settings.num_steps, num_tokens) * settings.start_sigma
        levels = sigmas if start.ceilings is None else capped(sigmas, start.ceilings)

        def drawn(name: str, number: int) -> Tensor:
            return named_noise(seeds, f"{name}:{number}", start.tokens.shape[1:]).to(start.tokens)

        assert reached.positive is not None and reached.negative is not None
        velocity = guided_velocity(self.dit, reached.positive, reached.negative, start.coordinates, settings.guidance, features)
        prepare = noise_on_given(start, sigmas, settings.condition_noise_scale, partial(drawn, "condition_noise"))
        solve, before = SOLVERS[settings.solver](partial(drawn, "step")), time.perf_counter()
        tokens = solve(velocity, start.tokens, levels, hooks.on_step, prepare)[:, :num_tokens]
        if tokens.is_cuda:
            torch.cuda.synchronize(tokens.device)
        seconds = time.perf_counter() - before
        video = self.decode(latents_from_tokens(tokens, cells), seeds, settings.decode_sigma, settings.noise_scale)
        made = MadeWindow(range(settings.num_frames), video, tuple(reached.texts), seconds)
        return made if found is None else replace(made, ar_seconds=found.seconds, indices=found.indices)

    def _start(
        self,
        cells: tuple[int, int, int],
        seeds: list[int],
        conditions: list[Condition],
        settings: SamplingSettings,
    ) -> Start:
        """Noise of `cells` (T, H, W) for the videos of `seeds`, and in it what is given."""
        device, grid = next(self.dit.parameters()).device, self._rule.grid
        fps = torch.full((len(seeds),), settings.fps, device=device)
        causal_fix = self.causal_fix if settings.causal_fix is None else settings.causal_fix

        def coordinates_of(num_latent_frames: int, frame: int) -> Tensor:
            shape = (num_latent_frames, *cells[1:])
            return coordinates_at(self.dit, shape, fps, self.vae.compression, causal_fix, grid.position(frame))

        noise = initial_noise(seeds, (self.vae.latent_channels, *cells)).to(device)
        return place(noise, conditions, coordinates_of, grid, seeds)

    @torch.no_grad()
    def decode(self, latents: Tensor, seeds: Sequence[int], sigma: float = 0.0, noise_scale: float = 0.0) -> Tensor:
        """Videos `(B, 3, T, H, W)` float32 in [-1, 1] on the CPU, of normalised latents.

        Args:
            latents: `(B, C, T, H, W)`.
            seeds: B generator seeds of the videos.
            sigma: noise level that a decoder is told which takes one; 0 is what `LTXPipeline` does by default.
            noise_scale: share of unit noise mixed into the raw latents before.

        Raises:
            ConfigError: `sigma` or `noise_scale` for a decoder that takes no noise level.
        """
        self._check_decoder(sigma, noise_scale)
        raw = self.vae.denormalize(latents)
        if noise_scale:
            noise = initial_noise(seeds, (raw.shape[1], raw.shape[2], raw.shape[3], raw.shape[4]), draw=1)
            raw = (1 - noise_scale) * raw + noise_scale * noise.to(raw)
        raw = raw.to(next(self.vae.parameters()).dtype)
        level = raw.new_full((len(raw),), sigma) if self.vae.timestep_conditioning else None
        if any(getattr(self.vae.config, "inject_noise", ())):
            # A video at a time: what is injected belongs to the video, not to its place in the batch.
            videos = [
                self.vae.decode(one[None], level[:1] if level is not None else None, _generator(seed, raw.device))
                for one, seed in zip(raw, seeds, strict=True)
            ]
            return torch.cat(videos).float().clamp(-1, 1).cpu()
        return self.vae.decode(raw, level).float().clamp(-1, 1).cpu()

    def _encode_text(self, texts: list[str], masked: bool | None) -> Conditioning:
        """The texts, in the dtype that the DiT computes in."""
        how = {} if masked is None else {"masked": masked}
        found, dtype = self.text_encoder.encode(texts, **how), next(self.dit.parameters()).dtype
        clip = None if found.clip_embeddings is None else found.clip_embeddings.to(dtype)
        return Conditioning(found.embeddings.to(dtype), found.mask, clip)

    @torch.no_grad()
    def _encoded(self, condition: AnyCondition) -> Condition:
        """`condition` with normalised latents: the most likely ones of what is given."""
        if isinstance(condition, Condition):
            return condition
        weight = next(self.vae.parameters())
        latents = self.vae.encode(condition.video.to(weight.device, weight.dtype)).mode()
        return Condition(self.vae.normalize(latents).float(), condition.frame, condition.strength)

    def _num_given(self, condition: AnyCondition) -> int:
        length = content(condition).shape[2]
        return self.vae.pixel_frames(length) if isinstance(condition, Condition) else length

    def _request(self, prompts: Sequence[Prompt], conditions: Sequence[AnyCondition], settings: SamplingSettings) -> Request:
        """What is asked for, in windows; what cannot be made is refused before anything is made."""
        if not prompts:
            raise ConfigError("nothing to sample: 0 prompts; give at least one.")
        num_frames, window = settings.num_frames, settings.window
        placed = [located(condition, self._num_given(condition), num_frames, len(prompts)) for condition in conditions]
        if settings.masked_text is not None and not hasattr(self.text_encoder.config, "masked"):
            raise ConfigError(
                f"masked_text is {settings.masked_text}, but {self.text_encoder.spec_name} hides its padding in the one way "
                "that its transformer was trained with: leave it out."
            )
        self._check_decoder(settings.decode_sigma, settings.noise_scale)
        self._rule.check_windows(num_frames, settings.height, settings.width, window)
        frames = spans(num_frames, window)
        given = [(condition, self._num_given(condition)) for condition in placed]
        windows = [
            (part, in_window(given, part, new.start - part.start)) for part, new in zip(frames, new_frames(frames), strict=True)
        ]
        check_storyboards(prompts, num_frames, new_frames(frames))
        self._check_guide(settings, windows)
        self._warn_of_cuts(prompts, settings.prompt_suffix)
        return Request(prompts, windows, settings)

    def _check_guide(self, settings: SamplingSettings, windows: Sequence[tuple[range, list[AnyCondition]]]) -> None:
        check_guide(self.guide, self.dit, settings.start_sigma, settings.features_in_negative)
        if self.guide is not None:
            self.guide.check_latents(self.vae.latent_channels)
            shared = settings.window.overlap_frames if settings.window else 0
            heads = [max((self._num_given(condition) for condition in windows[0][1] if condition.frame == 0), default=0)]
            heads += [shared] * (len(windows) - 1)
            check_heads(self.guide, self._rule, [(part, head) for (part, _), head in zip(windows, heads, strict=True)])

    def _check_decoder(self, sigma: float, noise_scale: float) -> None:
        if not self.vae.timestep_conditioning and (sigma or noise_scale):
            raise ConfigError(
                f"decode_sigma is {sigma:g} and decode_noise_scale {noise_scale:g}, but the decoder of this VAE takes no noise "
                "level: leave both at 0."
            )

    @property
    def _rule(self) -> FrameRule:
        return FrameRule(self.vae)


def _settings(guidance_scale: float | None, fields: dict[str, Any]) -> SamplingSettings:
    if guidance_scale is not None and "guidance" in fields:
        raise ConfigError("guidance_scale and guidance are both given: put the scale into Guidance(scale=...).")
    if "guidance" not in fields:
        fields = fields | {"guidance": Guidance(_DEFAULT_SCALE if guidance_scale is None else guidance_scale)}
    return SamplingSettings(**fields)


def _seeds(request: Request, first_index: int) -> list[int]:
    """Of the videos of a request, the first of which has the index `first_index`."""
    return [video_seed(request.settings.seed, first_index + row) for row in range(len(request.prompts))]


def _generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(derived_seed(seed, "decoder"))


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Switch `modules` to eval mode, and afterwards every submodule back to the mode it was in."""
    modes = {module: module.training for root in modules for module in root.modules()}
    for root in modules:
        root.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
