"""The arithmetic of the Step-Video transformer as the authors lay out its weights, written as functions of them.

It is independent of `videofm`: their tensor names, queries, keys and values interleaved head by head, time t from noise to
data, and a velocity that points at the data (spec step-video A3).
"""

import math

import torch
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention, silu


def authors_rope(x, shape):
    """`x` `(B, heads, L, head_width)`: a half, a quarter and a quarter of each head for frame, row, column."""
    positions = torch.cartesian_prod(*(torch.arange(n, dtype=x.dtype) for n in shape))
    width, done = x.shape[-1], []
    for axis, piece in enumerate(x.split([width // 2, width // 4, width // 4], dim=-1)):
        n = piece.shape[-1]
        angle = positions[:, axis, None] / 1e4 ** (torch.arange(0, n, 2, dtype=x.dtype) / n)
        angle = torch.cat([angle, angle], dim=-1)
        swapped = torch.cat([-piece[..., n // 2 :], piece[..., : n // 2]], dim=-1)
        done.append(piece * angle.cos() + swapped * angle.sin())
    return torch.cat(done, dim=-1)


def authors_attention(weights, queries, keys_values, shape=None, mask=None):
    """Self-attention where `shape` is given, else attention to the text; every head's q, k, v rows are neighbours."""
    head_width = len(weights["q_norm.weight"])

    def heads(x, parts):
        batch, length, _ = x.shape
        return x.view(batch, length, -1, parts * head_width).transpose(1, 2).split(head_width, dim=-1)

    def norm(x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weights[f"{name}_norm.weight"]

    if shape is not None:
        q, k, v = heads(linear(queries, weights["wqkv.weight"]), 3)
        q, k = authors_rope(norm(q, "q"), shape), authors_rope(norm(k, "k"), shape)
    else:
        (q,) = heads(linear(queries, weights["wq.weight"]), 1)
        k, v = heads(linear(keys_values, weights["wkv.weight"]), 2)
        q, k = norm(q, "q"), norm(k, "k")
    return linear(scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2), weights["wo.weight"])


def under(weights, prefix):
    return {key.removeprefix(prefix): x for key, x in weights.items() if key.startswith(prefix)}


def dense(weights, name, x):
    return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def authors_time(weights, t):
    frequencies = torch.exp(-math.log(1e4) * torch.arange(128, dtype=torch.float32) / 128)
    angles = (t * 1000)[:, None] * frequencies
    name = "adaln_single.emb.timestep_embedder.linear_"
    waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(weights["proj_out.weight"].dtype)
    return dense(weights, f"{name}2", silu(dense(weights, f"{name}1", waves)))


def authors_forward(weights, latents, t, states, clip, mask, eps=1e-6):
    """Their velocity, data minus noise, of `latents` `(B, F, C, H, W)` at times `t` `(B,)` that run from noise to data."""
    batch, frames, channels, height, width = latents.shape
    tokens = latents.permute(0, 1, 3, 4, 2).reshape(batch, -1, channels)
    x = linear(tokens, weights["pos_embed.proj.weight"][:, :, 0, 0], weights["pos_embed.proj.bias"])
    time = authors_time(weights, t)
    modulation = dense(weights, "adaln_single.linear", silu(time)).view(batch, 6, -1)
    text = gelu(
        dense(weights, "caption_projection.linear_1", layer_norm(states, states.shape[-1:], eps=eps)), approximate="tanh"
    )
    text = dense(weights, "caption_projection.linear_2", text)
    lengths = mask.sum(1)
    if clip is not None:
        text, lengths = torch.cat([dense(weights, "clip_projection", clip), text], dim=1), lengths + clip.shape[1]
    text = text[:, : lengths.max()]
    seen = (torch.arange(lengths.max()) < lengths[:, None])[:, None, None]
    for i in range(len({key.split(".")[1] for key in weights if key.startswith("transformer_blocks.")})):
        block = under(weights, f"transformer_blocks.{i}.")
        shift, scale, gate, shift2, scale2, gate2 = (block["scale_shift_table"] + modulation).chunk(6, dim=1)
        h = layer_norm(x, x.shape[-1:], block["norm1.weight"], block["norm1.bias"], 1e-5) * (1 + scale) + shift
        x = x + gate * authors_attention(under(block, "attn1."), h, h, (frames, height, width))
        x = x + authors_attention(under(block, "attn2."), x, text, mask=seen)
        h = layer_norm(x, x.shape[-1:], block["norm2.weight"], block["norm2.bias"], 1e-5) * (1 + scale2) + shift2
        h = linear(gelu(linear(h, block["ff.net.0.proj.weight"]), approximate="tanh"), block["ff.net.2.weight"])
        x = x + gate2 * h
    shift, scale = (weights["scale_shift_table"] + time[:, None]).chunk(2, dim=1)
    x = dense(weights, "proj_out", layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift)
    return x.view(batch, frames, height, width, -1).permute(0, 1, 4, 2, 3)
