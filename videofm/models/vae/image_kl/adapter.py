"""Between our image VAE and `AutoencoderKL` of diffusers, whose tensors it holds as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from videofm.errors import ConfigError
from videofm.models.spec import KeyMap
from videofm.models.vae.image_kl.config import ImageKLConfig
from videofm.models.vae.inflation import IMAGE_CLASS, QUANT_PAIRS, coder_pairs, modern_names

_NOT_READ = ("_diffusers_version", "_name_or_path", "force_upcast")
"""Keys that change no tensor and no number of ours."""


class ImageKLAdapter(KeyMap):
    """Tensor names and config of the VAE, both ways."""

    public_class = IMAGE_CLASS

    def from_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A public state dict under our names; the attention names of diffusers' early days are accepted too.

        Raises:
            CheckpointError: a key that `AutoencoderKL` does not have.
        """
        return super().from_public(modern_names(state_dict))

    def public_config(self, config: ImageKLConfig) -> dict[str, Any]:
        """The `config.json` of diffusers."""
        return {"_class_name": IMAGE_CLASS, **config.arguments}

    def config_from_public(self, config: Mapping[str, Any]) -> ImageKLConfig:
        """Our config for a diffusers `config.json`; keys that it lacks have the defaults of diffusers.

        Raises:
            ConfigError: a value that this model does not have.
        """
        default = self.public_config(ImageKLConfig(widths=(64,), num_res_blocks=1, sample_size=32))
        full = default | dict(config)
        ours = ImageKLConfig(
            in_channels=full["in_channels"],
            latent_channels=full["latent_channels"],
            widths=tuple(full["block_out_channels"]),
            num_res_blocks=full["layers_per_block"],
            num_groups=full["norm_num_groups"],
            quant_convs=(full["use_quant_conv"], full["use_post_quant_conv"]),
            middle_attention=full["mid_block_add_attention"],
            scaling_factor=full["scaling_factor"],
            shift_factor=full["shift_factor"] or 0.0,
            sample_size=full["sample_size"],
        )
        can_hold = self.public_config(ours)
        wrong = {key: value for key, value in full.items() if key not in _NOT_READ and can_hold.get(key, "unknown") != value}
        if full["shift_factor"] == 0.0:
            wrong.pop("shift_factor", None)
        if wrong:
            raise ConfigError(f"not a config of {IMAGE_CLASS} that vae/image_kl can hold: {wrong}.")
        return ours


_WRAPPER = "image_vae."
ADAPTER = ImageKLAdapter(
    [(_WRAPPER + pair[1], pair[1], *pair[2:]) for pair in (*coder_pairs(), *QUANT_PAIRS)],  # type: ignore[misc]
    without_statistics=_WRAPPER + "decoder.conv_in.weight",
)
