"""A reward model: latents of a clip and the text it was asked for -> how good it is, one score an axis; for one device.

A transformer over the latents of a frozen video VAE, in the manner of `dit/ltx` without a noise level: RMSNorm before each
sub-layer, queries and keys normalised head by head, rotary positions over (frame, row, column), attention to the text in every
block. In front of the clip's tokens stands one learned token an axis (as the class token of a ViT, and as VideoAlign,
arXiv 2501.13918, reads each of its scores from a token of its own); the score is linear in what that token has become.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.functional import gelu

from videofm.attention import AttentionSpec, choose
from videofm.errors import DataError
from videofm.models.reward.config import VideoRewardConfig
from videofm.ops.norm import RMSNorm
from videofm.ops.qk_norm_rope import qk_norm_rope
from videofm.ops.rope import RotaryTable, cell_coordinates, cell_rotary_table
from videofm.types import Conditioning

if TYPE_CHECKING:
    from videofm.types import AttentionFn

INIT_STD = 0.02
_FEED_FORWARD_RATIO = 4
_LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601), which sum to 1."""


class Attention(nn.Module):
    """Tokens attend to a context: to themselves with a rotary table, or to the text with a mask."""

    def __init__(self, config: VideoRewardConfig, attend: AttentionFn) -> None:
        super().__init__()
        width, self.head_width = config.width, config.head_width
        self.q, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(self.head_width, eps=config.norm_eps) for _ in range(2))
        self.attend = attend

    def forward(self, x: Tensor, context: Tensor, table: RotaryTable | None = None, mask: Tensor | None = None) -> Tensor:
        """`x` `(B, L, D)` attends to `context` `(B, S, D)` -> `(B, L, D)`; `mask` is `(B, 1, 1, S)`."""
        q = rearrange(self.q(x), "b l (n k) -> b l n k", k=self.head_width)
        k, v = rearrange(self.kv(context), "b s (two n k) -> two b s n k", two=2, k=self.head_width)
        if table is None:
            q, k = self.q_norm(q), self.k_norm(k)
        else:
            turned = qk_norm_rope(q, k, self.q_norm, self.k_norm, table, "halves")
            q, k = turned.q, turned.k
        return self.out(rearrange(self.attend(q, k, v, mask), "b l n k -> b l (n k)"))


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, _FEED_FORWARD_RATIO * width, bias=False)
        self.down = nn.Linear(_FEED_FORWARD_RATIO * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` -> `(..., D)`."""
        return self.down(gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """Self-attention, attention to the text, feed-forward."""

    def __init__(self, config: VideoRewardConfig, attend: AttentionFn, attend_text: AttentionFn) -> None:
        super().__init__()
        self.attention_norm, self.text_norm, self.feed_forward_norm = (
            RMSNorm(config.width, eps=config.norm_eps) for _ in range(3)
        )
        self.self_attention = Attention(config, attend)
        self.cross_attention = Attention(config, attend_text)
        self.feed_forward = FeedForward(config.width)

    def forward(self, x: Tensor, table: RotaryTable, text: Tensor, text_mask: Tensor) -> Tensor:
        """`x` `(B, L, D)`, `text` `(B, S, D)`, `text_mask` `(B, 1, 1, S)` -> `(B, L, D)`."""
        h = self.attention_norm(x)
        x = x + self.self_attention(h, h, table)
        x = x + self.cross_attention(self.text_norm(x), text, mask=text_mask)
        return x + self.feed_forward(self.feed_forward_norm(x))


class VideoReward(nn.Module):
    """Normalised latents and a text -> one score an axis, larger is better."""

    spec_name = "reward/video"

    def __init__(self, config: VideoRewardConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.width, (config.num_heads, config.head_width)
        attend, attend_text = choose("sdpa", AttentionSpec(*heads)), choose("sdpa", AttentionSpec(*heads, has_mask=True))
        self.proj_in = nn.Linear(config.latent_channels * config.patch_size**2, width)
        self.caption_norm = RMSNorm(config.caption_channels, eps=config.norm_eps)
        self.caption_projection = nn.Linear(config.caption_channels, width, bias=False)
        self.axis_tokens = nn.Parameter(torch.empty(len(config.axes), width))
        self.blocks = nn.ModuleList(Block(config, attend, attend_text) for _ in range(config.num_layers))
        self.out_norm = RMSNorm(width, eps=config.norm_eps)
        self.head = nn.Parameter(torch.empty(len(config.axes), width))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Where training starts: matrices keep the variance of what they multiply (a normal distribution of variance 1 over the
        inputs), but the last of each sub-layer, whose variance is divided by the number of sub-layers. Scores of a fresh model
        lie near 0.

        The usual std of 0.02 is that of a width of 2500; narrow models, whose queries and keys it leaves indifferent, then take
        several times as long to see the order of frames."""
        num_sublayers = 3 * self.config.num_layers
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                ends_sublayer = name.endswith(("attention.out", "feed_forward.down"))
                nn.init.normal_(module.weight, std=(module.in_features * (num_sublayers if ends_sublayer else 1)) ** -0.5)
        nn.init.zeros_(self.proj_in.bias)
        nn.init.normal_(self.axis_tokens, std=INIT_STD)
        nn.init.normal_(self.head, std=INIT_STD)

    def forward(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """How good clips are, in float32 also under autocast.

        Args:
            latents: `(B, C, T, H, W)`, normalised; H and W multiples of `patch_size`.
            conditioning: text embeddings `(B, S, caption_channels)` and their mask `(B, S)`; padding changes nothing. A text
                without any real token counts as one whose tokens are all real.

        Returns:
            `(B, A)`, a score for each of `config.axes`.

        Raises:
            DataError: shapes that do not belong together.
        """
        self._check(latents, conditioning)
        patch, num_axes = self.config.patch_size, len(self.config.axes)
        num_frames, height, width = latents.shape[2:]
        tokens = rearrange(latents, "b c t (h p) (w q) -> b (t h w) (c p q)", p=patch, q=patch)
        x = torch.cat([repeat(self.axis_tokens, "a d -> b a d", b=len(latents)), self.proj_in(tokens)], dim=1)
        table = self._table((num_frames, height // patch, width // patch), latents.device)
        text = self.caption_projection(self.caption_norm(conditioning.embeddings))
        real = conditioning.mask.bool()
        text_mask = rearrange(real | ~real.any(dim=1, keepdim=True), "b s -> b 1 1 s")
        for block in self.blocks:
            x = block(x, table, text, text_mask)
        return (self.out_norm(x[:, :num_axes]).float() * self.head.float()).sum(dim=2)

    def seen(self, video: Tensor) -> Tensor:
        """What the VAE is to encode of pixels `(B, 3, T, H, W)` for this model: themselves, or grey ones of the same shape."""
        if not self.config.greyscale:
            return video
        weights = video.new_tensor(_LUMA).view(1, 3, 1, 1, 1)
        return (video * weights).sum(dim=1, keepdim=True).expand_as(video).contiguous()

    def num_tokens(self, latents: Tensor) -> int:
        """Tokens of a clip of `latents` `(B, C, T, H, W)`, without those of the axes."""
        return latents[0, 0].numel() // self.config.patch_size**2

    def _table(self, shape: tuple[int, int, int], device: torch.device) -> RotaryTable:
        """Positions of the axes' tokens, which are not turned, and of the cells of `shape` (T, H, W)."""
        cells = cell_coordinates(shape, 1, device)  # (1, 3, L)
        at_rest = cells.new_zeros(1, 3, len(self.config.axes))
        return cell_rotary_table(torch.cat([at_rest, cells], dim=2), self.config.head_width, self.config.theta)

    def _check(self, latents: Tensor, conditioning: Conditioning) -> None:
        config, patch = self.config, self.config.patch_size
        if latents.ndim != 5 or latents.shape[1] != config.latent_channels or not latents[0].numel():
            raise DataError(
                f"latents have shape {tuple(latents.shape)}; this reward model takes (B, {config.latent_channels}, T, H, W). "
                "Another number of channels is another VAE's."
            )
        if latents.shape[3] % patch or latents.shape[4] % patch:
            raise DataError(
                f"latents of {latents.shape[3]}x{latents.shape[4]} cells, and patch_size {patch} of this reward model divides "
                "not both: take clips of another size, or a model with patch_size 1."
            )
        text = (len(latents), conditioning.mask.shape[-1], config.caption_channels)
        if tuple(conditioning.embeddings.shape) != text:
            raise DataError(f"embeddings has shape {tuple(conditioning.embeddings.shape)}; {text} is expected.")
        if conditioning.clip_embeddings is not None:
            raise DataError(
                "conditioning with clip_embeddings: reward/video takes the text of one encoder. Give it one that has no second "
                "one, such as text/t5."
            )
