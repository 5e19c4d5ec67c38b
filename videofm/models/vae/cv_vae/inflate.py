"""How a CV-VAE starts from an image VAE (spec A.3)."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from videofm.errors import ConfigError
from videofm.models.vae.inflation import fill, fold_quant_convs, image_tensors, our_names


def inflate(model: nn.Module, folder: str | Path) -> None:
    """Fill a fresh CV-VAE in place with the weights of diffusers' `AutoencoderKL` in `folder`.

    With norms of frames the encoder then is the image encoder on frames 0, 4, 8, ..., and each decoded image is held for the
    frames of its latent. A CV-VAE has no quant convs; those of an image VAE are folded (`fold_quant_convs` says what it costs).

    Raises:
        ConfigError: the model's options make it another function than the image VAE, whatever its weights.
        CheckpointError: no such folder, or an image VAE of another shape.
    """
    config = model.config
    differing = {"temporal_attention": "released", "padding": "replicate"}
    wrong = {key: value for key, value in differing.items() if getattr(config, key) == value}
    if wrong:
        raise ConfigError(
            f"{model.spec_name} with {wrong} cannot start as an image VAE: the released temporal attention replaces the output "
            "of attention inside frames, and replicated borders shift downsampling by a pixel. Take temporal_attention "
            "'own_residual' or 'none', and padding 'sd'."
        )
    image = image_tensors(folder)
    groups = image.config.get("norm_num_groups", 32)
    if groups != config.num_groups:
        raise ConfigError(f"the image VAE of {folder} has norms of {groups} groups, not {config.num_groups}: set num_groups.")
    fill(model, fold_quant_convs(our_names(image)), folder, without_counterpart=("decoder.middle.temporal.",))
