"""The shape of a reward model over latents (spec step-video-arlon-dpo A9, C2; sizes and wiring are our choice)."""

from __future__ import annotations

from dataclasses import dataclass

from videofm.errors import ConfigError
from videofm.models.flops import cross_attention_transformer_flops
from videofm.ops.rope import head_split

OVERALL = "overall"
"""The first axis of every model: the one that preferences are about."""
_COUNTS = ("latent_channels", "patch_size", "num_layers", "width", "num_heads", "caption_channels")


@dataclass(frozen=True)
class VideoRewardConfig:
    """Sizes of the transformer; the defaults are those of `100m`, for latents of LTX-Video.

    Attributes:
        latent_channels: C of the latents.
        patch_size: latent cells along height and along width that are one token; 1 takes each cell, 2 a quarter of the tokens.
        num_layers: transformer blocks.
        width: D.
        num_heads: N; the width of a head, K = D / N, is a multiple of 8.
        caption_channels: width of the text embeddings.
        axes: names of the scores, `overall` first; the others are learned from votes on that axis alone.
        greyscale: clips lose their colour before the VAE encodes them. A judge of motion that cannot see colour does not come
            to prefer clean still pictures (spec C5).
        norm_eps: epsilon of the RMS norms.
        theta: the ratio of the highest to the lowest rotary frequency.
    """

    latent_channels: int = 128
    patch_size: int = 1
    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    caption_channels: int = 4096
    axes: tuple[str, ...] = (OVERALL,)
    greyscale: bool = False
    norm_eps: float = 1e-6
    theta: float = 10000.0

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} {value!r} of reward/video must be a whole number of at least 1.")
        if self.width % self.num_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} does not divide the width {self.width}: every head has as many channels."
            )
        head_split(self.head_width)  # rotary positions need a multiple of 8
        names = self.axes if isinstance(self.axes, tuple | list) else ()
        if not names or names[0] != OVERALL or len(set(names)) != len(names) or not all(names):
            raise ConfigError(
                f"axes {self.axes!r} of reward/video must be a list of different names, {OVERALL!r} first: by that score "
                "videos are ranked."
            )
        if not isinstance(self.greyscale, bool):
            raise ConfigError(f"greyscale {self.greyscale!r} of reward/video must be true or false.")

    @property
    def head_width(self) -> int:
        """K."""
        return self.width // self.num_heads

    @property
    def num_parameters(self) -> int:
        """Numbers that are learned.

        With d the width, k that of a head, c that of the text, n the numbers of a token and a the axes: a block has q, k, v and
        out twice (8 d^2), a feed-forward of ratio 4 (8 d^2), three norms (3 d), and norms of queries and keys, two of each
        (4 k). Around the blocks are the projection of tokens (n d + d), the text's norm and projection (c + c d), a token and
        a weight for each axis (2 a d), and the last norm (d).
        """
        d, c, num_axes = self.width, self.caption_channels, len(self.axes)
        block = 16 * d * d + 3 * d + 4 * self.head_width
        token = self.latent_channels * self.patch_size**2
        return self.num_layers * block + token * d + d + c + c * d + 2 * num_axes * d + d

    def flops(self, num_tokens: int, num_text_tokens: int) -> int:
        """FLOPs of one clip, forward and backward, `num_tokens` without those of the axes; see `models.flops`."""
        length = num_tokens + len(self.axes)
        return cross_attention_transformer_flops(self.num_layers, self.width, length, num_text_tokens)


SIZES = {
    "tiny": VideoRewardConfig(latent_channels=16, num_layers=2, width=64, num_heads=4, caption_channels=64),
    "100m": VideoRewardConfig(),
}
"""`tiny` is for the latents of demonstrations. `100m` has 117 million parameters; with the VAE of Step-Video it takes
`latent_channels: 64`."""
