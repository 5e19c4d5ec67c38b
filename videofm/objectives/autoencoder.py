"""Train a video VAE: reconstruction, KL, perceptual, wavelet and adversarial terms, latent regularisation, denoising decoder.

Two phases with an optimizer each: `generator` trains `vae`, `discriminator` (only with a GAN) trains `discriminator`. A term is
a mean over a clip's elements in float32, and is computed only where its weight is not zero at that step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from videofm.config.autoencoder import AutoencoderConfig, GanTerm
from videofm.errors import ConfigError
from videofm.objectives import adversarial
from videofm.objectives.latent_regularisation import check_image_vae, decoder_error, encoder_error, map_frames
from videofm.objectives.latent_statistics import first_clips, measure_latent_statistics
from videofm.objectives.terms import weight_at
from videofm.ops.dwt import wavelet_l1
from videofm.ops.flow import add_noise
from videofm.types import Batch, Loss, Posterior, SampleRng

_MIN_MSE = 1e-10
"""Floor of the mean squared error in PSNR: identical clips show 106 dB, not infinity."""
LOGVAR_BOUNDS = (-30.0, 20.0)


@dataclass(frozen=True)
class Reconstruction:
    """A clip through the VAE: its posterior, the latents sampled from it, and the video that was decoded, in float32."""

    posterior: Posterior
    latents: Tensor
    video: Tensor


@dataclass(frozen=True)
class GeneratorTerms:
    """The loss of each sample, `(B,)`, in the parts that are weighed against each other, and all terms by name.

    `reference` is what the adversarial term is weighed against: the weighted pixel, wavelet and perceptual terms. `rest` is
    the weighted KL and regularisation. `adversarial` is not weighted, and None where the GAN is off.
    """

    reference: Tensor
    rest: Tensor
    adversarial: Tensor | None
    named: dict[str, Tensor]


@dataclass(frozen=True)
class Prepared:
    """What a step of the generator knows beforehand: the factor of the adversarial weight, and, when this rank has one
    micro-batch, the terms that it was computed from (their graph is still alive)."""

    factor: Tensor
    terms: GeneratorTerms | None


class AutoencoderObjective:
    """The objective of `config`. Roles: `vae`, and where their terms are on `discriminator`, `image_vae`, `perceptual`."""

    def __init__(self, config: AutoencoderConfig) -> None:
        self.config = config
        self.gan: GanTerm | None = config.gan if config.gan is not None and config.gan.weight > 0 else None
        extra = {"discriminator": self.gan, "image_vae": config.latent_regularisation, "perceptual": config.lpips.weight}
        self.roles: tuple[str, ...] = ("vae", *(role for role, wanted in extra.items() if wanted))
        self.phases: Mapping[str, tuple[str, ...]] = {"generator": ("vae",)}
        if self.gan:
            self.phases = {**self.phases, "discriminator": ("discriminator",)}
        self.own_models: Mapping[str, dict[str, Any]] = {}
        if config.lpips.weight:
            lpips = {"name": "perceptual/lpips", "size": config.lpips.size, "overrides": {"weights": config.lpips.weights}}
            self.own_models = {"perceptual": lpips}

    def active_phases(self, step: int) -> tuple[str, ...]:
        """Both phases once the GAN has started; with `alternate` one at a time, the discriminator first."""
        if self.gan is None or step < self.gan.start_step:
            return ("generator",)
        if self.gan.alternate:
            return ("generator",) if (step - self.gan.start_step) % 2 else ("discriminator",)
        return ("generator", "discriminator")

    def check(self, models: Mapping[str, nn.Module]) -> None:
        """Refuse models that the section does not fit.

        Raises:
            ConfigError: a denoising decoder that is not told sigma, a discriminator of the other kind, an image VAE with other
                latents.
        """
        vae = models["vae"]
        if self.config.denoising_decoder and not vae.timestep_conditioning:
            raise ConfigError(
                "objective.denoising_decoder is on, but the decoder of role vae is not told the noise level: build one with "
                "timestep_conditioning (vae/ltx 0.9.1, 0.9.5, or overrides: {timestep_conditioning: true}), or set it to null."
            )
        if self.gan:
            wanted = 6 if self.gan.loss == "reconstruction" else 3
            given = models["discriminator"].config.in_channels
            if given != wanted:
                raise ConfigError(
                    f"objective.gan.loss is {self.gan.loss!r}, whose discriminator has {wanted} input channels; role "
                    f"discriminator has {given}: set models.discriminator.overrides.in_channels to {wanted}."
                )
        if tiling := self.config.random_tiling:
            vae.tiled(tiling.height, tiling.width, tiling.overlap)
        if self.config.latent_regularisation:
            check_image_vae(self.config.latent_regularisation, vae, models["image_vae"])

    def prepare(
        self,
        models: Mapping[str, nn.Module],
        batches: Sequence[Batch],
        rngs: Sequence[SampleRng],
        phase: str,
        all_sum: Callable[[Tensor], Tensor],
    ) -> Prepared | None:
        """The factor of the adversarial weight for the whole step: gradient norms at the decoder's last layer, of the sum over
        all samples of the step, hence the same on every rank and for every layout (Esser et al. 2021, equation 7).

        A rank with several micro-batches runs their forward passes once more for it, and so does one whose last layer is frozen
        at this step: the graph that asks for its gradient is thrown away.
        """
        if phase != "generator" or self.gan is None or not self.gan.adaptive or not weight_at(self.gan, batches[0].step):
            return None
        layer = models["vae"].last_layer
        frozen = not layer.requires_grad
        layer.requires_grad_(True)
        sums, terms = torch.zeros(2, *layer.shape, device=layer.device), None
        for batch, rng in zip(batches, rngs, strict=True):
            terms = self._generator_terms(models, batch, rng)
            assert terms.adversarial is not None
            for row, loss in zip(sums, (terms.reference, terms.adversarial), strict=True):
                row += torch.autograd.grad(loss.sum(), layer, retain_graph=True)[0].float()
        layer.requires_grad_(not frozen)
        norms = all_sum(sums).flatten(1).norm(dim=1)
        factor = adversarial.adaptive_weight(norms[0], norms[1])
        return Prepared(factor, terms if len(batches) == 1 and not frozen else None)

    def loss(
        self,
        models: Mapping[str, nn.Module],
        batch: Batch,
        rng: SampleRng,
        phase: str,
        prepared: Prepared | None = None,
    ) -> Loss:
        """Sums over the local samples of the loss of `phase` and of its terms, unweighted.

        Of the generator: every term that is on, `mse`, `psnr` (dB, pixels in [-1, 1]), `kl` (nats an element), the share of
        log-variances at their bounds. Of the discriminator: its logits on originals and copies.
        """
        if phase == "discriminator":
            return self._discriminator_loss(models, batch, rng)
        terms = prepared.terms if prepared is not None else None
        terms = terms or self._generator_terms(models, batch, rng)
        total, named = terms.reference + terms.rest, terms.named
        if terms.adversarial is not None and self.gan is not None:
            weight = torch.full_like(total, weight_at(self.gan, batch.step))
            if prepared is not None:
                weight = weight * prepared.factor
            total = total + weight * terms.adversarial
            named = {**named, "adversarial": terms.adversarial, "adversarial_weight": weight}
        named = {"loss": total, **named}
        return Loss(total.sum(), {name: value.detach().sum() for name, value in named.items()})

    def after_training(self, models: Mapping[str, nn.Module], batches: Iterable[Batch]) -> dict[str, float]:
        """Measure the latents of `num_statistics_clips` clips and store mean and std in the buffers of the VAE.

        The trainer calls this once, after the last step, with training batches (they may be endless: no more is read than
        needed). From then on normalised training latents have mean 0 and std 1 in each channel.

        Returns:
            Numbers for the log: clips read, smallest and largest std.
        """
        vae = models["vae"]
        statistics = measure_latent_statistics(vae, first_clips(batches, self.config.num_statistics_clips))
        vae.set_latent_statistics(statistics.mean, statistics.std)
        return {
            "num_clips": float(statistics.num_clips),
            "latent_std_min": float(statistics.std.min()),
            "latent_std_max": float(statistics.std.max()),
        }

    # -- the parts

    def _reconstruct(self, vae: nn.Module, video: Tensor, rng: SampleRng) -> Reconstruction:
        """`video` through a sample of its posterior, perhaps in tiles; the same draws in both phases of a step."""
        tiling, coder = self.config.random_tiling, vae
        if tiling and float(rng.uniform("tiling")[0]) < tiling.probability:
            coder = vae.tiled(tiling.height, tiling.width, tiling.overlap)
        posterior: Posterior = coder.encode(video)
        posterior = Posterior(posterior.mean.float(), posterior.logvar.float())
        shape = tuple(posterior.mean.shape[1:])
        latents = noisy = posterior.sample(rng.normal("posterior", shape))
        sigma = None
        if vae.timestep_conditioning:
            sigma = latents.new_zeros(len(latents))
            if self.config.denoising_decoder:
                # In raw latent space, where diffusers adds the noise before its last step (spec B.6).
                sigma = self.config.denoising_decoder.max_sigma * rng.uniform("decoder_sigma")
                noisy = add_noise(latents, rng.normal("decoder_noise", shape), sigma)
        return Reconstruction(posterior, latents, coder.decode(noisy, sigma, rng.generator("decoder_maps")).float())

    def _generator_terms(self, models: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> GeneratorTerms:
        config, step, video = self.config, batch.step, batch.video.float()
        copy = self._reconstruct(models["vae"], video, rng)
        error = copy.video - video
        mse, kl = _sample_means(error.square()), _sample_means(copy.posterior.kl())
        named = {"l1": _sample_means(error.abs()), "mse": mse, "kl": kl}
        if weight_at(config.wavelet, step):
            named["wavelet"] = wavelet_l1(copy.video, video)
        if weight_at(config.lpips, step):
            named["lpips"] = models["perceptual"](copy.video, video).mean(dim=1)  # (B, T) -> (B,)
        reference = torch.zeros_like(mse)
        for name in ("l1", "mse", "wavelet", "lpips"):
            weight = weight_at(getattr(config, name), step)
            reference = reference + weight * named[name] if weight else reference
        regularisation = self._regularisation(models, batch, copy, rng)
        rest = weight_at(config.kl, step) * kl
        for name, (weight, value) in regularisation.items():
            named[name] = value
            rest = rest + weight * value
        named["psnr"] = 10 * torch.log10(4.0 / mse.clamp_min(_MIN_MSE))  # the range of pixels is 2
        named["logvar_at_bounds"] = _at_bounds(copy.posterior.logvar)
        adversarial_term = None
        if self.gan and weight_at(self.gan, step):
            adversarial_term = self._adversarial(models["discriminator"], copy.video, video)
        return GeneratorTerms(reference, rest, adversarial_term, named)

    def _adversarial(self, discriminator: nn.Module, copy: Tensor, video: Tensor) -> Tensor:
        if self.gan is not None and self.gan.loss == "reconstruction":
            first, second = torch.cat([video, copy], dim=1), torch.cat([copy, video], dim=1)
            return adversarial.reconstruction_gan_generator(discriminator(first), discriminator(second))
        return adversarial.hinge_generator(discriminator(copy))

    def _regularisation(
        self, models: Mapping[str, nn.Module], batch: Batch, copy: Reconstruction, rng: SampleRng
    ) -> dict[str, tuple[float, Tensor]]:
        """Weight and value `(B,)` of the terms of the latent regularisation that are on at this step."""
        config = self.config.latent_regularisation
        if config is None:
            return {}
        weights = weight_at(config.decoder, batch.step), weight_at(config.encoder, batch.step)
        terms = {}
        if any(weights):
            group = models["vae"].compression.time
            uniform = rng.uniform("frame_mapping", (batch.video.shape[2],))
            mapped = map_frames(batch.video.float(), group, config.mapping, uniform)
            if weights[0]:
                terms["image_decoder"] = (weights[0], decoder_error(models["image_vae"], copy.latents, mapped))
            if weights[1]:
                error = encoder_error(models["vae"], models["image_vae"], batch, mapped, rng)
                terms["image_encoder"] = (weights[1], error)
        return terms

    def _discriminator_loss(self, models: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> Loss:
        assert self.gan is not None
        video, discriminator = batch.video.float(), models["discriminator"]
        with torch.no_grad():
            copy = self._reconstruct(models["vae"], video, rng).video
        if self.gan.loss == "reconstruction":
            first = discriminator(torch.cat([video, copy], dim=1))
            second = discriminator(torch.cat([copy, video], dim=1))
            loss = adversarial.reconstruction_gan_discriminator(first, second)
        else:
            first, second = discriminator(video), discriminator(copy)
            loss = adversarial.hinge_discriminator(first, second)
        logits = {"logit_original": _sample_means(first), "logit_copy": _sample_means(second)}
        named = {"loss": loss, **logits}
        return Loss(loss.sum(), {name: value.detach().float().sum() for name, value in named.items()})


def _sample_means(values: Tensor) -> Tensor:
    return values.float().flatten(1).mean(dim=1)  # (B, ...) -> (B,)


def _at_bounds(logvar: Tensor) -> Tensor:
    low, high = LOGVAR_BOUNDS
    return _sample_means(((logvar <= low) | (logvar >= high)).float())
