"""Prompts to videos, with models that are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from videofm.errors import CheckpointError, ConfigError, DataError
from videofm.ops.patchify import latents_from_tokens
from videofm.progress import LOG
from videofm.registry import resolve
from videofm.run_dir import read_json
from videofm.sampling.conditioning import (
    AnyCondition,
    Condition,
    FrameGrid,
    PixelCondition,
    Start,
    content,
    coordinates_at,
    located,
    noise_on_given,
    place,
    rows,
)
from videofm.sampling.guidance import Guidance, guided_velocity
from videofm.sampling.noise import derived_seed, initial_noise, named_noise, video_seed
from videofm.sampling.schedule import Schedule, SigmaSchedule
from videofm.sampling.settings import SamplingSettings
from videofm.sampling.solvers import SOLVERS, capped
from videofm.sampling.source import models_folder, trained_with_causal_fix
from videofm.sampling.windows import in_window, spans
from videofm.types import Conditioning

__all__ = ["Pipeline", "evaluating", "models_folder"]

_COMPONENTS = {"dit": "transformer", "vae": "vae", "text_encoder": "text_encoder"}
"""Roles of a training run, and what diffusers calls them in an exported folder."""
_DEFAULT_SCALE = 3.0


@dataclass
class Pipeline:
    """What it takes to make videos: `dit`, `vae` and `text_encoder` on one device, the schedule of noise levels, and whether
    the `dit` was trained with `objective.causal_fix`.
    """

    dit: nn.Module
    vae: nn.Module
    text_encoder: nn.Module
    schedule: SigmaSchedule = field(default_factory=Schedule)
    causal_fix: bool = False

    @classmethod
    def load(
        cls,
        path: str | Path,
        ema: bool = True,
        device: str | torch.device | None = None,
        schedule: SigmaSchedule | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Pipeline:
        """The pipeline of a DiT's training run, of a checkpoint of it, or of an exported folder.

        Args:
            path: the run (also that of an `export` stage), checkpoint or folder.
            ema: take the moving average of the weights where the run keeps one.
            device: where the models go; None takes CUDA where there is one.
            schedule: noise levels; None takes those of the folder's scheduler, and LTX-Video's where it has none.
            dtype: of the weights; the state between steps is float32 with any.

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
        return cls(**models, schedule=schedule or Schedule(), causal_fix=causal_fix)

    def generate(self, prompts: Sequence[str], **settings: Any) -> Tensor:
        """One video for each prompt, `(B, 3, T, H, W)` float32 in [-1, 1] on the CPU; takes what `stream` takes."""
        return torch.cat(list(self.stream(prompts, **settings)))

    def stream(
        self,
        prompts: Sequence[str],
        *,
        conditions: Sequence[AnyCondition] = (),
        guidance_scale: float | None = None,
        batch_size: int = 16,
        first_index: int = 0,
        on_step: Callable[[], None] | None = None,
        settings: SamplingSettings | None = None,
        **fields: Any,
    ) -> Iterator[Tensor]:
        """Batches of videos in the order of `prompts`, each `(<= batch_size, 3, T, H, W)` float32 in [-1, 1] on the CPU.

        Args:
            prompts: one video each; video i starts from noise drawn with (seed, first_index + i), whatever the batch size.
            conditions: parts of the videos that are given.
            guidance_scale: short for `guidance=Guidance(scale)`.
            batch_size: videos made together.
            first_index: index of the first prompt, to go on where an earlier call stopped.
            on_step: called after every step of every batch and window; may raise to stop.
            settings: how; None makes them of `guidance_scale` and `fields`.
            fields: those of `SamplingSettings`; `num_frames`, `height`, `width` and `fps` are needed.

        Raises:
            ConfigError: no prompts, a size that the VAE cannot make, or something given that does not fit.
        """
        if not prompts or batch_size < 1:
            raise ConfigError(f"nothing to sample: {len(prompts)} prompts, batches of {batch_size}; give at least one of each.")
        wanted = settings or _settings(guidance_scale, fields)
        placed = [located(condition, self._num_given(condition), wanted.num_frames, len(prompts)) for condition in conditions]
        self._check(wanted, placed)
        self._warn_of_cuts(prompts, wanted.prompt_suffix)
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            texts = [prompt + wanted.prompt_suffix for prompt in prompts[part]]
            seeds = [video_seed(wanted.seed, first_index + start + offset) for offset in range(len(texts))]
            with evaluating(self.dit, self.vae, self.text_encoder):
                videos = self._sample(texts, seeds, [rows(condition, part) for condition in placed], wanted, on_step)
            yield videos

    def num_cut_prompts(self, prompts: Sequence[str], suffix: str = "") -> int:
        """How many of `prompts`, with `suffix` behind them, have more tokens than a text encoder takes."""
        cuts = self.text_encoder.cuts([prompt + suffix for prompt in prompts])
        return sum(any(prompt) for prompt in zip(*cuts.values(), strict=True))

    def _warn_of_cuts(self, prompts: Sequence[str], suffix: str) -> None:
        for name, found in self.text_encoder.cuts([prompt + suffix for prompt in prompts]).items():
            if any(found):
                encoder = "text encoder" if name == "text" else f"{name} text encoder"
                message = "%d of %d prompts are longer than the %s takes; their ends are cut"
                LOG.warning(message, sum(found), len(prompts), encoder)

    @torch.no_grad()
    def _sample(
        self,
        texts: list[str],
        seeds: list[int],
        conditions: list[AnyCondition],
        settings: SamplingSettings,
        on_step: Callable[[], None] | None,
    ) -> Tensor:
        """One batch of videos, window by window."""
        positive = negative = self._encode_text(texts, settings.masked_text)
        if settings.guidance.scale != 1:
            negative = self._encode_text([settings.negative_prompt] * len(texts), settings.masked_text)
        video: Tensor | None = None
        for number, (frames, inside) in enumerate(self._windows(settings, conditions)):
            overlap = 0
            if video is not None:
                overlap = video.shape[2] - frames.start
                inside.insert(0, PixelCondition(video[:, :, -overlap:]))
            own = [derived_seed(seed, f"window:{number}") for seed in seeds] if number else seeds
            sized = replace(settings, num_frames=len(frames))
            made = self._window(positive, negative, own, inside, sized, on_step)
            video = made if video is None else torch.cat([video, made[:, :, overlap:]], dim=2)
        assert video is not None
        return video

    def _window(
        self,
        positive: Conditioning,
        negative: Conditioning,
        seeds: list[int],
        conditions: list[AnyCondition],
        settings: SamplingSettings,
        on_step: Callable[[], None] | None,
    ) -> Tensor:
        """Videos of the length that the model makes at once."""
        cells = self._latent_shape(settings.num_frames, settings.height, settings.width)
        num_tokens = cells[0] * cells[1] * cells[2]
        start = self._start(cells, seeds, conditions, settings)
        sigmas = (settings.schedule or self.schedule).sigmas(settings.num_steps, num_tokens)
        levels = sigmas if start.ceilings is None else capped(sigmas, start.ceilings)

        def drawn(name: str, number: int) -> Tensor:
            return named_noise(seeds, f"{name}:{number}", start.tokens.shape[1:]).to(start.tokens)

        velocity = guided_velocity(self.dit, positive, negative, start.coordinates, settings.guidance)
        prepare = noise_on_given(start, sigmas, settings.condition_noise_scale, partial(drawn, "condition_noise"))
        solve = SOLVERS[settings.solver](partial(drawn, "step"))
        tokens = solve(velocity, start.tokens, levels, on_step, prepare)[:, :num_tokens]
        return self.decode(latents_from_tokens(tokens, cells), seeds, settings.decode_sigma, settings.noise_scale)

    def _start(
        self,
        cells: tuple[int, int, int],
        seeds: list[int],
        conditions: list[AnyCondition],
        settings: SamplingSettings,
    ) -> Start:
        """Noise of `cells` (T, H, W) for the videos of `seeds`, and in it what is given."""
        device, grid = next(self.dit.parameters()).device, self._grid()
        fps = torch.full((len(seeds),), settings.fps, device=device)
        causal_fix = self.causal_fix if settings.causal_fix is None else settings.causal_fix

        def coordinates_of(num_latent_frames: int, frame: int) -> Tensor:
            shape = (num_latent_frames, *cells[1:])
            return coordinates_at(self.dit, shape, fps, self.vae.compression, causal_fix, grid.position(frame))

        noise = initial_noise(seeds, (self.vae.latent_channels, *cells)).to(device)
        return place(noise, [self._encoded(condition) for condition in conditions], coordinates_of, grid, seeds)

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

    def _windows(
        self, settings: SamplingSettings, conditions: Sequence[AnyCondition]
    ) -> list[tuple[range, list[AnyCondition]]]:
        """The frames of each window, and what is given in it."""
        given = [(condition, self._num_given(condition)) for condition in conditions]
        overlap = settings.window.overlap_frames if settings.window else 0
        windows = spans(settings.num_frames, settings.window)
        return [(frames, in_window(given, frames, overlap if frames.start else 0)) for frames in windows]

    def _check(self, settings: SamplingSettings, conditions: Sequence[AnyCondition]) -> None:
        """Refuse what cannot be made, before anything is made."""
        if settings.masked_text is not None and not hasattr(self.text_encoder.config, "masked"):
            raise ConfigError(
                f"masked_text is {settings.masked_text}, but {self.text_encoder.spec_name} hides its padding in the one way "
                "that its transformer was trained with: leave it out."
            )
        self._check_decoder(settings.decode_sigma, settings.noise_scale)
        for frames, _ in self._windows(settings, conditions):
            self._latent_shape(len(frames), settings.height, settings.width)
        if settings.window is not None:
            self._latent_shape(settings.window.overlap_frames, settings.height, settings.width)

    def _check_decoder(self, sigma: float, noise_scale: float) -> None:
        if not self.vae.timestep_conditioning and (sigma or noise_scale):
            raise ConfigError(
                f"decode_sigma is {sigma:g} and decode_noise_scale {noise_scale:g}, but the decoder of this VAE takes no noise "
                "level: leave both at 0."
            )

    def _latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        c = self.vae.compression
        if num_frames < 1 or not self._whole(num_frames) or height < 1 or height % c.height or width < 1 or width % c.width:
            raise ConfigError(
                f"cannot make {num_frames} frames of {height}x{width} pixels: this VAE makes {self._frame_rule()} frames, "
                f"with a height in multiples of {c.height} and a width in multiples of {c.width}."
            )
        return self.vae.latent_frames(num_frames), height // c.height, width // c.width

    def _whole(self, num_frames: int) -> bool:
        try:
            return self.vae.pixel_frames(self.vae.latent_frames(num_frames)) == num_frames
        except DataError:  # of a VAE that takes whole chunks
            return False

    def _frame_rule(self) -> str:
        chunk = self._grid().chunk
        return f"1 + {self.vae.chunk_frames} * n" if chunk is None else f"1 or {chunk} * n"

    def _grid(self) -> FrameGrid:
        chunk = self.vae.chunk_frames
        return FrameGrid(self.vae.compression.time, None if self._whole(1 + chunk) else chunk)


def _settings(guidance_scale: float | None, fields: dict[str, Any]) -> SamplingSettings:
    if guidance_scale is not None and "guidance" in fields:
        raise ConfigError("guidance_scale and guidance are both given: put the scale into Guidance(scale=...).")
    if "guidance" not in fields:
        fields = fields | {"guidance": Guidance(_DEFAULT_SCALE if guidance_scale is None else guidance_scale)}
    return SamplingSettings(**fields)


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
