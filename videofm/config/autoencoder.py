"""The section of the autoencoder objective: the terms of its loss, each with weight, start and ramp."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from videofm.config.base import Section


class LossTerm(Section):
    """One term of a loss."""

    weight: float = Field(ge=0, description="Weight once the ramp is over; 0 switches the term off.")
    start_step: int = Field(0, ge=0, description="First optimizer step that counts it (0 is the first of the run).")
    ramp_steps: int = Field(0, ge=0, description="Steps over which the weight rises linearly from 0.")


class LpipsTerm(LossTerm):
    """LPIPS (VGG16) of each frame, mean over frames."""

    weights: str | None = Field(None, description="Local safetensors file with VGG16 and the linear heads of LPIPS v0.1.")
    size: Literal["vgg16", "tiny"] = Field("vgg16", description="Architecture that the file holds; `tiny` is for tests.")

    @model_validator(mode="after")
    def _has_weights(self) -> LpipsTerm:
        if self.weight > 0 and self.weights is None:
            raise ValueError(
                f"weight is {self.weight} but `weights` names no file. Make one of torchvision's vgg16 and the lpips package's "
                "vgg.pth: python tools/convert_perceptual.py lpips --vgg vgg16.pth --heads vgg.pth --output "
                "lpips.safetensors; or set weight to 0"
            )
        return self


class GanTerm(LossTerm):
    """An adversarial loss against the role `discriminator`, which phase `discriminator` trains from `start_step` on."""

    loss: Literal["hinge", "reconstruction"] = Field(
        "hinge",
        description="`hinge`: real or not. `reconstruction` (LTX-Video): which of the two, original and copy, is the original; "
        "its discriminator has 6 input channels.",
    )
    adaptive: bool = Field(
        True,
        description="Multiply the weight by the ratio of gradient norms, reconstruction over adversarial, at the decoder's "
        "last layer (Esser et al. 2021), over all samples of the step.",
    )
    alternate: bool = Field(
        False, description="From `start_step` on, train generator and discriminator in turns, a step each; false: both in each."
    )


class LatentRegularisation(Section):
    """CV-VAE: keep the latents those of a frozen image VAE, the role `image_vae`."""

    decoder: LossTerm = Field(
        LossTerm(weight=1.0), description="L1 of the image decoder's frames from the video latents; trains the video encoder."
    )
    encoder: LossTerm = Field(
        LossTerm(weight=0.0), description="L1 of the video decoder's clip from image latents; trains the video decoder."
    )
    mapping: Literal["first", "slice", "average", "random"] = Field(
        "random", description="Which frames stand for a latent frame: a random one of its group is the paper's choice."
    )


class DenoisingDecoder(Section):
    """LTX-Video: the decoder gets noisy latents and their noise level, and takes the last step of denoising."""

    max_sigma: float = Field(0.2, gt=0, le=1, description="sigma of each sample is uniform in [0, max_sigma].")


class RandomTiling(Section):
    """Reconstruct some micro-batches in tiles, so that tiled inference is what the VAE was trained for."""

    probability: float = Field(0.5, gt=0, le=1, description="Share of micro-batches that are tiled.")
    height: int = Field(ge=8, description="Height of a tile, in pixels.")
    width: int = Field(ge=8, description="Width of a tile, in pixels.")
    overlap: int = Field(ge=0, description="Pixels that a tile shares with its neighbours.")


class AutoencoderConfig(Section):
    """Train a video VAE (role `vae`). Every term is a mean over a clip's elements, in float32."""

    kind: Literal["autoencoder"]
    l1: LossTerm = Field(LossTerm(weight=1.0), description="Mean absolute error of pixels.")
    mse: LossTerm = Field(LossTerm(weight=0.0), description="Mean squared error of pixels.")
    kl: LossTerm = Field(LossTerm(weight=1e-6), description="KL of the posterior to the unit Gaussian, mean over latents.")
    wavelet: LossTerm = Field(LossTerm(weight=0.0), description="L1 of the sub-bands of a one-level 3D Haar transform.")
    lpips: LpipsTerm = Field(LpipsTerm(weight=0.0), description="Perceptual distance.")
    gan: GanTerm | None = Field(None, description="Adversarial loss; null trains no discriminator.")
    latent_regularisation: LatentRegularisation | None = Field(None, description="Compatibility with an image VAE.")
    denoising_decoder: DenoisingDecoder | None = Field(
        None, description="Noise on the latents, for decoders that are told its level; null decodes them clean (sigma 0)."
    )
    random_tiling: RandomTiling | None = Field(None, description="Tiles in training.")
    num_statistics_clips: int = Field(
        512, ge=2, description="Training clips over which mean and std of each latent channel are measured at the end."
    )
    diagnostics_every: int = Field(
        0, ge=0, description="Steps between diagnostics of the latents on `num_statistics_clips` clips; 0 only at the end."
    )
