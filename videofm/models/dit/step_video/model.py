"""The diffusion transformer of Step-Video-T2V (arXiv 2502.10248, section 4; spec step-video A3), for one device.

Tokens are latent cells. A block is self-attention with rotary positions, attention to the text, and a feed-forward; the noise
level scales, shifts and gates the first and the last, while attention to the text sees the plain residual stream. The text is
that of two encoders, one after the other in the sequence. Time runs as everywhere here, sigma 1 is noise; the adapter turns it
for released weights.
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
from videofm.errors import ConfigError, DataError
from videofm.models.dit.step_video.config import StepVideoDiTConfig
from videofm.models.injection import guide_of
from videofm.ops.embedding import ScalarEmbedding
from videofm.ops.norm import RMSNorm
from videofm.ops.qk_norm_rope import qk_norm_rope
from videofm.ops.rope import RotaryTable, cell_coordinates, cell_rotary_table
from videofm.types import Compression, Conditioning

if TYPE_CHECKING:
    from videofm.types import AttentionFn

SIGMA_SCALE = 1000.0
QK_NORM_EPS = 1e-6
BLOCK_NORM_EPS = 1e-5
FEED_FORWARD_RATIO = 4


@dataclass(frozen=True)
class Modulation:
    """What the noise level does to a sub-layer: `gate * f(norm(x) * (1 + scale) + shift)`. Each is `(B, 1 or L, D)`."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class SelfAttention(nn.Module):
    """Every token attends to every token; queries and keys are normalised and rotated head by head."""

    def __init__(self, config: StepVideoDiTConfig, attend: AttentionFn) -> None:
        super().__init__()
        width, self.head_width = config.width, config.head_width
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(self.head_width, eps=QK_NORM_EPS) for _ in range(2))
        self.attend = attend

    def forward(self, x: Tensor, table: RotaryTable, mask: MaskSpec | None = None) -> Tensor:
        """`(B, L, D)` -> `(B, L, D)`."""
        q, k, v = rearrange(self.qkv(x), "b l (three n k) -> three b l n k", three=3, k=self.head_width)
        turned = qk_norm_rope(q, k, self.q_norm, self.k_norm, table, "halves")
        return self.out(rearrange(self.attend(turned.q, turned.k, v, mask), "b l n k -> b l (n k)"))


class CrossAttention(nn.Module):
    """Every token attends to the text; queries and keys are normalised head by head."""

    def __init__(self, config: StepVideoDiTConfig, attend: AttentionFn) -> None:
        super().__init__()
        width, self.head_width = config.width, config.head_width
        self.q, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(self.head_width, eps=QK_NORM_EPS) for _ in range(2))
        self.attend = attend

    def forward(self, x: Tensor, text: Tensor, mask: Tensor, documents: Documents | None = None) -> Tensor:
        """`x` `(B, L, D)` attends to `text` `(B, S, D)` where `mask` `(B, 1, 1, S)` -> `(B, L, D)`.

        With `documents`, whose texts `text` holds, each attends to its own: see `attend_to_texts`.
        """
        q = rearrange(self.q(x), "b l (n k) -> b l n k", k=self.head_width)
        k, v = rearrange(self.kv(text), "b s (two n k) -> two b s n k", two=2, k=self.head_width)
        q, k = self.q_norm(q), self.k_norm(k)
        if documents is None:
            attended = self.attend(q, k, v, mask)
        else:
            attended = attend_to_texts(self.attend, q, k, v, mask, documents)
        return self.out(rearrange(attended, "b l n k -> b l (n k)"))


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), Linear; also, with biases, what projects the states of the language model."""

    def __init__(self, in_width: int, hidden_width: int, out_width: int, bias: bool) -> None:
        super().__init__()
        self.linear1 = nn.Linear(in_width, hidden_width, bias=bias)
        self.linear2 = nn.Linear(hidden_width, out_width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_width)` -> `(..., out_width)`."""
        return self.linear2(gelu(self.linear1(x), approximate="tanh"))


class Block(nn.Module):
    """Self-attention, attention to the text, feed-forward."""

    def __init__(self, config: StepVideoDiTConfig, attend: AttentionFn, attend_text: AttentionFn) -> None:
        super().__init__()
        width = config.width
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attention_norm, self.feed_forward_norm = (nn.LayerNorm(width, eps=BLOCK_NORM_EPS) for _ in range(2))
        self.self_attention = SelfAttention(config, attend)
        self.cross_attention = CrossAttention(config, attend_text)
        self.feed_forward = FeedForward(width, FEED_FORWARD_RATIO * width, width, bias=False)

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
        h = torch.addcmul(attention.shift, self.attention_norm(x), 1 + attention.scale)
        x = torch.addcmul(x, attention.gate, self.self_attention(h, table, mask))
        x = x + self.cross_attention(x, text, text_mask, documents)
        h = torch.addcmul(mlp.shift, self.feed_forward_norm(x), 1 + mlp.scale)
        return torch.addcmul(x, mlp.gate, self.feed_forward(h))

    def _modulations(self, time: Tensor) -> tuple[Modulation, Modulation]:
        rows = self.scale_shift_table + rearrange(time, "b l (six d) -> b l six d", six=6)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = rows.unbind(dim=2)
        return Modulation(shift, scale, gate), Modulation(mlp_shift, mlp_scale, mlp_gate)


class StepVideoDiT(nn.Module):
    """Noisy latent tokens, their noise level and a text -> the velocity of each token."""

    spec_name = "dit/step_video"

    def __init__(self, config: StepVideoDiTConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.width, (config.num_heads, config.head_width)
        attend, attend_text = choose("sdpa", AttentionSpec(*heads)), choose("sdpa", AttentionSpec(*heads, has_mask=True))
        self.proj_in = nn.Linear(config.in_channels, width)
        self.time_embed = ScalarEmbedding(width)
        self.time_modulation = nn.Linear(width, 6 * width)
        self.caption_projection = FeedForward(config.caption_channels, width, width, bias=True)
        self.clip_projection = nn.Linear(config.clip_channels, width) if config.clip_channels else None
        self.blocks = nn.ModuleList(Block(config, attend, attend_text) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, config.in_channels)
        self.injection: nn.Module | None = None  # what guides it by features, from outside: `models.inject_features`
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Where training from scratch starts: the velocity is 0, and so is what each block takes from the text.

        The scheme of PixArt-alpha (arXiv 2310.00426), whose blocks these are: Xavier for projections (each of those stored in
        one tensor by itself), a normal distribution of std 0.02 for what the noise level passes through, zero for the last
        projection and for the way out of the text.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                for projection in module.weight.chunk({"qkv": 3, "kv": 2}.get(name.rpartition(".")[2], 1)):
                    nn.init.xavier_uniform_(projection)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in (*self.time_embed.modules(), self.time_modulation):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.cross_attention.out.weight)
        nn.init.zeros_(self.proj_out.weight)

    def coordinates(
        self, shape: tuple[int, int, int], fps: Tensor, compression: Compression, causal_fix: bool = False
    ) -> Tensor:
        """Frame, row and column of every latent cell of `(T, H, W)`, `(B, 3, L)`; B is that of `fps` `(B,)`.

        This model counts cells: neither the frame rate nor the compression changes anything.

        Raises:
            ConfigError: `causal_fix`, which is about seconds, is asked for.
        """
        if causal_fix:
            raise ConfigError("dit/step_video counts latent frames, and has no causal_fix of their times: set it to false.")
        return cell_coordinates(shape, fps.shape[0], fps.device)

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
            conditioning: states of the language model `(B, S, caption_channels)`, their mask `(B, S)`, and those of the second
                encoder `(B, M, clip_channels)`, all of which are attended to; None where `clip_channels` is 0. A text has at
                least one token that is not masked.
            coordinates: `(B, 3, L)` frame, row, column (`self.coordinates`).
            documents: clips that are packed into the one sequence (B is 1); the texts are then one a document, and a token sees
                its own document and text.
            features: what guides each token, `(B, L, feature_channels)` in the order of `latent_tokens`, for a model with an
                injection; None is the learned null feature everywhere.
            features_kept: `(B, L)` bool, False where the null feature stands in; None keeps all.

        Returns:
            `(B, L, C)`.

        Raises:
            DataError: shapes that do not belong together, the second encoder's states missing or not asked for, or features
                without an injection.
        """
        check_documents(documents, latent_tokens, conditioning)
        self._check(latent_tokens, sigma, conditioning, coordinates, documents)
        table = cell_rotary_table(coordinates, self.config.head_width)
        time = self.time_embed(sigma.reshape(sigma.shape[0], -1) * SIGMA_SCALE)  # (B, 1 or L, D)
        block_time = self.time_modulation(silu(time))
        text, text_mask = self._text(conditioning)

        x = self.proj_in(latent_tokens).to(self.scale_shift_table.dtype)  # under autocast too, as the gates would make it
        args = (block_time, text, text_mask, table, documents)
        guide = guide_of(self.injection, x, args, features, features_kept)
        for number, block in enumerate(self.blocks):
            x = block(guide(number, x), *args)
        shift, scale = (self.scale_shift_table + time[:, :, None]).unbind(dim=2)
        x = torch.addcmul(shift, layer_norm(x, x.shape[-1:], eps=self.config.norm_eps), 1 + scale)
        return self.proj_out(x)

    def _text(self, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """What blocks attend to, `(B, M + S, D)`, and its mask `(B, 1, 1, M + S)`; the second encoder comes first."""
        states, mask, clip = conditioning.embeddings, conditioning.mask.bool(), conditioning.clip_embeddings
        text = self.caption_projection(layer_norm(states, states.shape[-1:], eps=self.config.norm_eps))
        if self.clip_projection is not None and clip is not None:
            text = torch.cat([self.clip_projection(clip), text], dim=1)
            mask = torch.cat([mask.new_ones(clip.shape[:2]), mask], dim=1)
        return text, rearrange(mask, "b s -> b 1 1 s")

    def _check(
        self, tokens: Tensor, sigma: Tensor, conditioning: Conditioning, coordinates: Tensor, documents: Documents | None
    ) -> None:
        config, clip, (batch, length, _) = self.config, conditioning.clip_embeddings, tokens.shape
        num_texts = batch if documents is None else len(documents.lengths)
        if (clip is None) != (config.clip_channels == 0):
            found, fix = (
                ("no", "bring them, or build it with clip_channels 0") if clip is None else ("unwanted", "leave them out")
            )
            has = f"this dit/step_video has clip_channels {config.clip_channels}"
            raise DataError(f"conditioning with {found} clip_embeddings: {has}; {fix}.")
        num_clip = 0 if clip is None else clip.shape[1]
        shapes = {
            "latent_tokens": (tokens, [(batch, length, config.in_channels)]),
            "sigma": (sigma, [(batch,), (batch, length)]),
            "coordinates": (coordinates, [(batch, 3, length)]),
            "embeddings": (conditioning.embeddings, [(num_texts, conditioning.mask.shape[-1], config.caption_channels)]),
            "mask": (conditioning.mask, [(num_texts, conditioning.embeddings.shape[1])]),
            "clip_embeddings": (clip, [(num_texts, num_clip, config.clip_channels)]),
        }
        for name, (tensor, expected) in shapes.items():
            if tensor is not None and tuple(tensor.shape) not in expected:
                wanted = " or ".join(map(str, expected))
                raise DataError(f"{name} has shape {tuple(tensor.shape)}; dit/step_video expects {wanted}.")
