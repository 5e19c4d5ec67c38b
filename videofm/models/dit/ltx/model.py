"""The diffusion transformer of LTX-Video (arXiv 2501.00103, section 2.2; spec C), for one device.

Tokens are latent cells. A block is self-attention with rotary positions, attention to the text, and a feed-forward; the
noise level scales, shifts and gates the first and the last. The order of tokens carries nothing: permute tokens and
coordinates together and the output is permuted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, silu

from videofm.attention import AttentionSpec, Documents, MaskSpec, choose
from videofm.attention.documents import attend_to_texts, check_documents
from videofm.errors import DataError
from videofm.models.dit.ltx.config import LTXDiTConfig
from videofm.models.injection import guide_of
from videofm.ops.embedding import ScalarEmbedding
from videofm.ops.norm import RMSNorm, rms_norm
from videofm.ops.qk_norm_rope import qk_norm_rope
from videofm.ops.rope import RotaryTable, rotary_table, video_coordinates
from videofm.types import Compression, Conditioning

if TYPE_CHECKING:
    from videofm.types import AttentionFn

SIGMA_SCALE = 1000.0
QK_NORM_EPS = 1e-5
OUT_NORM_EPS = 1e-6
FEED_FORWARD_RATIO = 4


@dataclass(frozen=True)
class Modulation:
    """What the noise level does to a sub-layer: `gate * f(norm(x) * (1 + scale) + shift)`. Each is `(B, 1 or L, D)`."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Attention(nn.Module):
    """Multi-head attention; queries and keys are normalised over all heads together, and rotated before the split."""

    def __init__(self, config: LTXDiTConfig, attend: AttentionFn) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.q_norm, self.k_norm = (RMSNorm(width, eps=QK_NORM_EPS) for _ in range(2))
        self.attend = attend

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        table: RotaryTable | None = None,
        mask: Tensor | MaskSpec | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """`x` `(B, L, D)` attends to `context` `(B, S, D)` -> `(B, L, D)`; a tensor as `mask` broadcasts to `(B, N, L, S)`.

        With `documents`, whose texts `context` holds, each attends to its own: see `attend_to_texts`.
        """
        q, k, v = self.q(x), self.k(context), self.v(context)
        if table is None:
            q, k = self.q_norm(q), self.k_norm(k)
        else:
            turned = qk_norm_rope(q, k, self.q_norm, self.k_norm, table, "adjacent")
            q, k = turned.q, turned.k
        q, k, v = (rearrange(y, "b l (n k) -> b l n k", n=self.num_heads) for y in (q, k, v))
        if documents is None:
            attended = self.attend(q, k, v, mask)
        else:
            assert isinstance(mask, Tensor)
            attended = attend_to_texts(self.attend, q, k, v, mask, documents)
        return self.out(rearrange(attended, "b l n k -> b l (n k)"))


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), Linear; also what projects captions."""

    def __init__(self, in_width: int, hidden_width: int, out_width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(in_width, hidden_width)
        self.linear2 = nn.Linear(hidden_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_width)` -> `(..., out_width)`."""
        return self.linear2(gelu(self.linear1(x), approximate="tanh"))


class Block(nn.Module):
    """Self-attention, attention to the text, feed-forward."""

    def __init__(self, config: LTXDiTConfig, attend: AttentionFn, attend_text: AttentionFn) -> None:
        super().__init__()
        self.norm_eps = config.norm_eps
        self.scale_shift_table = nn.Parameter(torch.randn(6, config.width) / config.width**0.5)
        self.self_attention = Attention(config, attend)
        self.cross_attention = Attention(config, attend_text)
        self.feed_forward = FeedForward(config.width, FEED_FORWARD_RATIO * config.width, config.width)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text: Tensor,
        text_mask: Tensor,
        table: RotaryTable,
        documents: Documents | None = None,
    ) -> Tensor:
        """`x` `(B, L, D)`, `time` `(B, 1 or L, 6 * D)`, `text` `(B, S, D)`, `text_mask` `(B, 1, 1, S)` -> `(B, L, D)`.

        With `documents` B of the texts counts them.
        """
        mask = None if documents is None else documents.mask
        attention, mlp = self._modulations(time)
        h = rms_norm(x, self.norm_eps, 1 + attention.scale, attention.shift)
        x = torch.addcmul(x, attention.gate, self.self_attention(h, h, table, mask))
        x = x + self.cross_attention(x, text, mask=text_mask, documents=documents)
        h = rms_norm(x, self.norm_eps, 1 + mlp.scale, mlp.shift)
        return torch.addcmul(x, mlp.gate, self.feed_forward(h))

    def _modulations(self, time: Tensor) -> tuple[Modulation, Modulation]:
        rows = self.scale_shift_table + rearrange(time, "b l (six d) -> b l six d", six=6)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = rows.unbind(dim=2)
        return Modulation(shift, scale, gate), Modulation(mlp_shift, mlp_scale, mlp_gate)


class LTXVideoDiT(nn.Module):
    """Noisy latent tokens, their noise level and a text -> the velocity of each token."""

    spec_name = "dit/ltx"

    def __init__(self, config: LTXDiTConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.width, (config.num_heads, config.head_width)
        attend, attend_text = choose("sdpa", AttentionSpec(*heads)), choose("sdpa", AttentionSpec(*heads, has_mask=True))
        self.proj_in = nn.Linear(config.in_channels, width)
        self.time_embed = ScalarEmbedding(width)
        self.time_modulation = nn.Linear(width, 6 * width)
        self.caption_projection = FeedForward(config.caption_channels, width, width)
        self.blocks = nn.ModuleList(Block(config, attend, attend_text) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, config.in_channels)
        self.injection: nn.Module | None = None  # what guides it by features, from outside: `models.inject_features`
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Where training from scratch starts: the velocity is 0, and so is what each block takes from the text.

        The scheme of PixArt-alpha (arXiv 2310.00426), whose blocks these are: Xavier for projections, a normal distribution of
        std 0.02 for what the noise level passes through, zero for the last projection and for the way out of the text.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in (*self.time_embed.modules(), self.time_modulation):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.cross_attention.out.weight)
        nn.init.zeros_(self.proj_out.weight)

    def forward(
        self,
        latent_tokens: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        coordinates: Tensor,
        documents: Documents | None = None,
        features: Tensor | None = None,
        features_kept: Tensor | None = None,
    ) -> Tensor:
        """The velocity `noise - clean` of each token.

        Args:
            latent_tokens: `(B, L, C)` noisy latents, normalised.
            sigma: noise level in [0, 1], `(B,)` or one a token `(B, L)`.
            conditioning: text embeddings `(B, S, caption_channels)` and their mask `(B, S)`. A text without any real token
                counts as one whose tokens are all real, which is what the mask of diffusers comes to as well.
            coordinates: `(B, 3, L)` seconds, pixels down, pixels right (`ops.rope.video_coordinates`).
            documents: clips that are packed into the one sequence (B is 1); the texts are then one a document, and a token sees
                its own document and text.
            features: what guides each token, `(B, L, feature_channels)` in the order of `latent_tokens`, for a model with an
                injection; None is the learned null feature everywhere.
            features_kept: `(B, L)` bool, False where the null feature stands in; None keeps all.

        Returns:
            `(B, L, C)`.

        Raises:
            DataError: shapes that do not belong together, or features without an injection.
        """
        check_documents(documents, latent_tokens, conditioning)
        self._check(latent_tokens, sigma, conditioning, coordinates, documents)
        table = rotary_table(coordinates, self.config.width, self.config.theta)
        time = self.time_embed(sigma.reshape(sigma.shape[0], -1) * SIGMA_SCALE)  # (B, 1 or L, D)
        block_time = self.time_modulation(silu(time))
        text = self.caption_projection(conditioning.embeddings)
        text_mask = conditioning.mask.bool()
        text_mask = rearrange(text_mask | ~text_mask.any(dim=1, keepdim=True), "b s -> b 1 1 s")

        x = self.proj_in(latent_tokens).to(self.scale_shift_table.dtype)  # under autocast too, as the gates would make it
        args = (block_time, text, text_mask, table, documents)
        guide = guide_of(self.injection, x, args, features, features_kept)
        for number, block in enumerate(self.blocks):
            x = block(guide(number, x), *args)
        shift, scale = (self.scale_shift_table + time[:, :, None]).unbind(dim=2)
        x = torch.addcmul(shift, layer_norm(x, x.shape[-1:], eps=OUT_NORM_EPS), 1 + scale)
        return self.proj_out(x)

    def coordinates(
        self, shape: tuple[int, int, int], fps: Tensor, compression: Compression, causal_fix: bool = False
    ) -> Tensor:
        """Where the latent cells of `shape` (T, H, W) lie, `(B, 3, L)`: seconds, pixels down, pixels right.

        `fps` is `(B,)`; for `causal_fix` see `ops.rope.video_coordinates`.
        """
        return video_coordinates(shape, fps, compression, causal_fix)

    def _check(
        self, tokens: Tensor, sigma: Tensor, conditioning: Conditioning, coordinates: Tensor, documents: Documents | None
    ) -> None:
        batch, length, channels = tokens.shape
        num_texts = batch if documents is None else len(documents.lengths)
        text_shape = (num_texts, conditioning.mask.shape[-1], self.config.caption_channels)
        wrong = {
            "latent_tokens": (tuple(tokens.shape), channels == self.config.in_channels, f"(B, L, {self.config.in_channels})"),
            "sigma": (
                tuple(sigma.shape),
                tuple(sigma.shape) in ((batch,), (batch, length)),
                f"({batch},) or ({batch}, {length})",
            ),
            "coordinates": (
                tuple(coordinates.shape),
                tuple(coordinates.shape) == (batch, 3, length),
                f"({batch}, 3, {length})",
            ),
            "embeddings": (tuple(conditioning.embeddings.shape), conditioning.embeddings.shape == text_shape, f"{text_shape}"),
        }
        for name, (shape, fits, expected) in wrong.items():
            if not fits:
                raise DataError(f"{name} has shape {shape}; dit/ltx expects {expected}.")
