"""The authors' release for Stable Diffusion 3: the same VAE with other padding, under names like diffusers' (spec A.1, A.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from videofm.errors import ConfigError
from videofm.models.spec import CONV2D, KeyMap
from videofm.models.vae.cv_vae.adapter import PROVENANCE, TILING
from videofm.models.vae.cv_vae.config import CVVAESD3Config
from videofm.models.vae.cv_vae.model import CVVAE
from videofm.models.vae.inflation import coder_pairs, reverse_stages

PUBLIC_CLASS = "CVVAESD3Model"
_OWN = ("norm_scope", "norm_eps", "padding", "scaling_factor", "shift_factor")
"""Options that the authors' class does not have; in its config.json only where they are not what it does."""


class CVVAESD3(CVVAE):
    """The VAE, as `CVVAE`."""

    spec_name = "vae/cv_vae_sd3"


class CVVAESD3Adapter(KeyMap):
    """Tensor names and config of the VAE, both ways."""

    public_class = PUBLIC_CLASS

    def to_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict under the authors' names.

        Raises:
            CheckpointError: a key that this model does not have.
        """
        return super().to_public(reverse_stages(state_dict))

    def from_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' state dict under our names.

        Raises:
            CheckpointError: a key that the authors' model does not have.
        """
        return reverse_stages(super().from_public(state_dict))

    def public_config(self, config: CVVAESD3Config) -> dict[str, Any]:
        """The authors' `config.json`, with options of ours as in `CVVAEAdapter.public_config`."""
        release, num_levels = CVVAESD3Config(), len(config.widths)
        own = {key: getattr(config, key) for key in _OWN if getattr(config, key) != getattr(release, key)}
        return {
            "_class_name": PUBLIC_CLASS,
            "in_channels": config.in_channels,
            "out_channels": config.latent_channels,
            "down_block_types": ["DownEncoderBlock3D"] * num_levels,
            "up_block_types": ["UpDecoderBlock3D"] * num_levels,
            "block_out_channels": list(config.widths),
            "layers_per_block": config.num_res_blocks,
            "norm_num_groups": config.num_groups,
            "act_fn": "silu",
            "double_z": True,
            "mid_block_add_attention": True,
            "causal_encoder": config.causal_encoder,
            "causal_decoder": config.causal_decoder,
            "half_3d": config.half_3d,
            "time_n_compress": config.compression.time,
            "spatial_n_compress": config.compression.height,
            **TILING,
            **own,
        }

    def config_from_public(self, config: Mapping[str, Any]) -> CVVAESD3Config:
        """Our config for the authors' `config.json`; keys that it lacks have the authors' defaults. Keys about tiling are not
        read.

        Raises:
            ConfigError: a value that this model does not have.
        """
        full = self.public_config(CVVAESD3Config()) | dict(config)
        ours = CVVAESD3Config(
            in_channels=full["in_channels"],
            latent_channels=full["out_channels"],
            widths=tuple(full["block_out_channels"]),
            num_res_blocks=full["layers_per_block"],
            num_groups=full["norm_num_groups"],
            half_3d=full["half_3d"],
            causal_encoder=full["causal_encoder"],
            causal_decoder=full["causal_decoder"],
            **{key: full[key] for key in _OWN if key in full},
        )
        can_hold = self.public_config(ours)
        not_read = (*TILING, *PROVENANCE, *_OWN)
        wrong = {key: value for key, value in full.items() if key not in not_read and can_hold.get(key, "unknown") != value}
        if wrong:
            raise ConfigError(f"not a config of {PUBLIC_CLASS} that vae/cv_vae_sd3 can hold: {wrong}.")
        return ours


SD3_ADAPTER = CVVAESD3Adapter(coder_pairs(CONV2D), without_statistics="decoder.conv_in.weight")
