"""Prompt to video, with the models of a training run, of a checkpoint or of an exported folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from videofm.errors import CheckpointError, ConfigError
from videofm.ops.patchify import latents_from_tokens, tokens_from_latents
from videofm.ops.rope import video_coordinates
from videofm.registry import resolve
from videofm.run_dir import read_json
from videofm.sampling.guidance import guided_velocity
from videofm.sampling.noise import initial_noise, video_seed
from videofm.sampling.schedule import Schedule
from videofm.sampling.solvers import euler

_COMPONENTS = {"dit": "transformer", "vae": "vae", "text_encoder": "text_encoder"}
"""Roles of a training run, and what diffusers calls them in an exported folder."""


@dataclass
class Pipeline:
    """What it takes to make videos: `dit`, `vae` and `text_encoder` on one device, and the schedule of noise levels."""

    dit: nn.Module
    vae: nn.Module
    text_encoder: nn.Module
    schedule: Schedule = field(default_factory=Schedule)

    @classmethod
    def load(cls, path: str | Path, ema: bool = True, device: str | torch.device | None = None) -> Pipeline:
        """The pipeline of a DiT's training run, of a checkpoint of it, or of an exported folder.

        Args:
            path: the run (also that of an `export` stage), checkpoint or folder.
            ema: take the moving average of the weights where the run keeps one.
            device: where the models go; None takes CUDA where there is one.

        Raises:
            CheckpointError: `path` is missing, or holds no DiT, VAE and text encoder.
        """
        path = models_folder(path)
        if not path.exists():
            raise CheckpointError(f"{path} does not exist: give a training run of a DiT, a checkpoint, or an exported folder.")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        load = resolve("videofm.models:load")
        # A path without a DiT is refused by `load`, which lists the roles that are there. Sampling computes in float32.
        models = {
            role: load(path, role=role, component=component, ema=ema, device=device).float()
            for role, component in _COMPONENTS.items()
        }
        scheduler = path / "scheduler" / "scheduler_config.json"
        return cls(**models, schedule=Schedule.from_public(read_json(scheduler)) if scheduler.exists() else Schedule())

    def generate(self, prompts: Sequence[str], **settings: Any) -> Tensor:
        """One video for each prompt, `(B, 3, T, H, W)` float32 in [-1, 1] on the CPU; takes what `stream` takes."""
        return torch.cat(list(self.stream(prompts, **settings)))

    def stream(
        self,
        prompts: Sequence[str],
        *,
        num_frames: int,
        height: int,
        width: int,
        fps: float,
        seed: int = 0,
        num_steps: int = 30,
        guidance_scale: float = 3.0,
        batch_size: int = 16,
        first_index: int = 0,
        on_step: Callable[[], None] | None = None,
    ) -> Iterator[Tensor]:
        """Batches of videos in the order of `prompts`, each `(<= batch_size, 3, T, H, W)` float32 in [-1, 1] on the CPU.

        Args:
            prompts: one video each; video i starts from noise drawn with (seed, first_index + i), whatever the batch size.
            num_frames, height, width: of the videos; must fit the compression of the VAE.
            fps: frames a second that the model is told.
            seed: of the noise, see `prompts`.
            num_steps: Euler steps.
            guidance_scale: classifier-free guidance against the empty prompt; 1 is off.
            batch_size: videos made together.
            first_index: index of the first prompt, to go on where an earlier call stopped.
            on_step: called after every step of every batch; may raise to stop.

        Raises:
            ConfigError: no prompts, or a size that the VAE cannot make.
        """
        if not prompts or batch_size < 1:
            raise ConfigError(f"nothing to sample: {len(prompts)} prompts, batches of {batch_size}; give at least one of each.")
        cells = self._latent_shape(num_frames, height, width)
        sigmas = self.schedule.sigmas(num_steps, cells[0] * cells[1] * cells[2])
        for start in range(0, len(prompts), batch_size):
            texts = list(prompts[start : start + batch_size])
            seeds = [video_seed(seed, first_index + start + offset) for offset in range(len(texts))]
            noise = initial_noise(seeds, (self.vae.latent_channels, *cells))
            with evaluating(self.dit, self.vae, self.text_encoder):
                videos = self._sample(texts, noise, sigmas, fps, guidance_scale, on_step)
            yield videos

    @torch.no_grad()
    def _sample(
        self, texts: list[str], noise: Tensor, sigmas: Tensor, fps: float, scale: float, on_step: Callable[[], None] | None
    ) -> Tensor:
        device = next(self.dit.parameters()).device
        positive = self.text_encoder.encode(texts)
        negative = positive if scale == 1.0 else self.text_encoder.encode([""] * len(texts))
        cells = (noise.shape[2], noise.shape[3], noise.shape[4])
        coordinates = video_coordinates(cells, torch.full((len(texts),), fps, device=device), self.vae.compression)
        velocity = guided_velocity(self.dit, positive, negative, coordinates, scale)
        tokens = euler(velocity, tokens_from_latents(noise.to(device)), sigmas, on_step)
        return self.decode(latents_from_tokens(tokens, cells)).float().clamp(-1, 1).cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Video of normalised latents; a decoder that takes a noise level is told 0, as `LTXPipeline` does by default."""
        config = self.vae.config
        sigma = latents.new_zeros(len(latents)) if getattr(config, "timestep_conditioning", False) else None
        generator = torch.Generator(latents.device).manual_seed(0) if any(getattr(config, "inject_noise", ())) else None
        return self.vae.decode(self.vae.denormalize(latents), sigma, generator)

    def _latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        c = self.vae.compression
        if num_frames < 1 or (num_frames - 1) % c.time or height < 1 or height % c.height or width < 1 or width % c.width:
            raise ConfigError(
                f"cannot make {num_frames} frames of {height}x{width} pixels: this VAE makes 1 + {c.time} * n frames, "
                f"with a height in multiples of {c.height} and a width in multiples of {c.width}."
            )
        return c.latent_frames(num_frames), height // c.height, width // c.width


def generate(
    run_or_folder: str | Path,
    prompts: str | Sequence[str],
    seed: int = 0,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float = 25.0,
    num_steps: int = 30,
    guidance_scale: float = 3.0,
    ema: bool = True,
    batch_size: int = 16,
    device: str | torch.device | None = None,
) -> Tensor:
    """Videos for `prompts` with the model at `run_or_folder`: `(B, 3, T, H, W)` float32 in [-1, 1].

    Args:
        run_or_folder: training run of a DiT, checkpoint of it, or exported folder.
        prompts: a caption, or several.
        num_frames, height, width: of the videos; None takes the size of the training clips (of a run; an exported folder
            does not know it).
        seed, fps, num_steps, guidance_scale, batch_size: as in `Pipeline.stream`.
        ema: use the moving average of the weights.
        device: where to compute; None takes CUDA where there is one.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: a size that the model cannot make, or none given and none known.
    """
    pipeline = Pipeline.load(run_or_folder, ema=ema, device=device)
    given = {"num_frames": num_frames, "height": height, "width": width}
    size = given if None not in given.values() else _training_size(Path(run_or_folder), given)
    return pipeline.generate(
        [prompts] if isinstance(prompts, str) else prompts,
        fps=fps,
        seed=seed,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        **size,
    )


def models_folder(path: str | Path) -> Path:
    """`path`, or what it wrote where it is the run directory of an `export` stage."""
    path = Path(path)
    if (path / "lineage.json").exists():
        config = read_json(path / "config.yaml")
        if config.get("kind") == "export":
            return Path(config["output"])
    return path


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


def _training_size(path: Path, given: dict[str, int | None]) -> dict[str, Any]:
    # A checkpoint lies in RUN/checkpoints/step_N: its run is two levels up.
    for folder in (path, *path.resolve().parents[:2]):
        if (folder / "lineage.json").exists():
            data = read_json(folder / "config.yaml").get("data", {})
            size = {name: value or data.get(name) for name, value in given.items()}
            if all(size.values()):
                return size
    unknown = ", ".join(name for name, value in given.items() if value is None)
    raise ConfigError(f"{path} does not say how large its clips are: pass {unknown}.")
