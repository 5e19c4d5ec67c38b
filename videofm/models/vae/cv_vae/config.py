"""The shape of a CV-VAE (spec A)."""

from __future__ import annotations

from dataclasses import dataclass

from videofm.errors import ConfigError
from videofm.types import Compression

_CHOICES = {
    "norm_scope": ("frame", "clip"),
    "temporal_attention": ("own_residual", "released", "none"),
    "padding": ("sd", "replicate"),
}


@dataclass(frozen=True)
class CVVAEConfig:
    """Levels are listed from fine to coarse. Each but the last halves height and width; every other one, from the first, time.

    The authors' CVVAEModel differs from the defaults: `norm_scope="clip"` leaks the future, `temporal_attention="released"`
    loses the image VAE, and `norm_eps` is 1e-5. A folder of theirs is read that way. The size `sd3` keeps the defaults too; the
    authors' own model for Stable Diffusion 3 is another, `CVVAESD3Config`.

    Attributes:
        latent_channels: C of the latents.
        widths: channels of each level.
        num_res_blocks: ResBlocks of each encoder level; a decoder level has one more.
        num_groups: groups of the GroupNorms.
        half_3d: the second convolution of each ResBlock looks at one frame only.
        causal_encoder, causal_decoder: whether convolutions look at past frames only.
        norm_scope: statistics of the GroupNorms over each `frame`, or over the `clip`, by which every frame sees every other.
        norm_eps: epsilon of the GroupNorms; that of the image VAE.
        temporal_attention: in the middle of the decoder, after attention inside each frame. `own_residual` adds it, and starts
            at zero; `released` puts it inside the residual of the other, whose output it replaces; or `none`.
        padding: `sd` is that of Stable Diffusion's VAE, zeros (downsamplers: at bottom and right only), which an exact start
            from an image VAE needs. `replicate` repeats borders on all sides, in time too.
        scaling_factor, shift_factor: of the target image VAE. Latents are normalised as `(z - shift) * scaling`, until
            statistics are measured.
    """

    in_channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    num_res_blocks: int = 2
    num_groups: int = 32
    half_3d: bool = True
    causal_encoder: bool = True
    causal_decoder: bool = False
    norm_scope: str = "frame"
    norm_eps: float = 1e-6
    temporal_attention: str = "own_residual"
    padding: str = "sd"
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; there are: {', '.join(choices)}.")
        odd = [width for width in self.widths if width % self.num_groups]
        if len(self.widths) < 2 or odd:
            raise ConfigError(
                f"widths {self.widths} must be two or more multiples of num_groups ({self.num_groups}); not so: {odd}."
            )

    @property
    def compression(self) -> Compression:
        """Pixels for one latent cell."""
        num_halved = len(self.widths) - 1
        return Compression(2 ** sum(map(self.halves_time, range(num_halved))), 2**num_halved, 2**num_halved)

    def halves_time(self, level: int) -> bool:
        """Whether time is halved between `level` and the next coarser one."""
        return level % 2 == 0


SIZES = {
    "tiny": CVVAEConfig(widths=(16, 32, 32, 32), num_res_blocks=1, num_groups=8),
    "sd21": CVVAEConfig(),
    "sd21_full3d": CVVAEConfig(half_3d=False),
    "sd3": CVVAEConfig(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
}


@dataclass(frozen=True)
class CVVAESD3Config(CVVAEConfig):
    """What the authors released for Stable Diffusion 3 (CVVAESD3Model).

    Borders are replicated, also by the downsamplers, whose grid so lies one pixel off that of the image VAE; hence it does not
    start as one. There is no temporal attention.
    """

    latent_channels: int = 16
    norm_scope: str = "clip"
    temporal_attention: str = "none"
    padding: str = "replicate"
    scaling_factor: float = 1.5305
    shift_factor: float = 0.0609

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temporal_attention != "none":
            raise ConfigError(
                f"vae/cv_vae_sd3 has no temporal attention, not {self.temporal_attention!r}: set 'none', or take vae/cv_vae, "
                "size sd3."
            )


SD3_SIZES = {
    "tiny": CVVAESD3Config(latent_channels=4, widths=(16, 32, 32, 32), num_res_blocks=1, num_groups=8),
    "released": CVVAESD3Config(),
}
