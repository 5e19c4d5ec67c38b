"""The Triton kernels of `videofm.ops.qk_norm_rope`, and the two operators that launch them.

With n = x r, r = rsqrt(mean x^2 + eps), m = n w, the output of a pair of channels (a, b) at the angles (alpha, beta) is

    y_a = m_a cos(alpha) - m_b sin(alpha)        y_b = m_b cos(beta) + m_a sin(beta)

(alpha and beta are the same in every table of ours). Backwards, with g_a = dy_a cos(alpha) + dy_b sin(beta) and
g_b = dy_b cos(beta) - dy_a sin(alpha): dw is the sum over rows of g n, and dx = r (g w - n mean(g w n)).

A row is what one norm sees: a token, or one head of a token. A program holds `ROWS` rows as two tiles `(ROWS, BLOCK / 2)`, the
first and the second channels of all pairs, in float32; each number is read once. What is kept for the gradient is x and r.
Queries and keys go through one launch because they share a table, which in float32 is as large as both of them in bfloat16.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates the annotations of a kernel as code of the kernel; in one, only its constants have any.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

ELEMENTS_PER_THREAD = 8
"""Of one tensor: 16 bytes of bfloat16, the widest load that there is."""

MIN_TILE = 2048
"""Elements that a program takes at a time, at least."""

MAX_PARTIAL_SUMS = 256
"""Programs of the backward pass, each with a sum of its own for the gradient of the weights. The same number on every GPU, so
that the order of summation is too; two for each multiprocessor of an H100, which is what its registers hold."""


@triton.jit
def _rows(tile, num_rows, length, num_heads, ROWS: tl.constexpr):
    """Rows of a tile with their sample, token and head, each `(ROWS, 1)`, and whether they exist.

    In int64, because an element's offset can exceed 2^31; the divisions are done before, in int32, where they are cheap.
    """
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    token = row // num_heads
    sample = token // length
    return row.to(tl.int64), sample.to(tl.int64), (token % length).to(tl.int64), (row % num_heads).to(tl.int64), row < num_rows


@triton.jit
def _half_channels(WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """First and second channel of pair 0, 1, ... and whether it exists, each `(1, BLOCK / 2)`.

    In eighths of a head the axes begin at 0 (time, four), 4 (height, two) and 6 (width, two), and the second half of each
    follows its first: eighths 0, 1, 4, 6 are paired with 2, 3, 5, 7.
    """
    EIGHTH: tl.constexpr = WIDTH // 8
    pair = tl.arange(0, BLOCK // 2)[None, :]
    group = pair // EIGHTH
    first = pair + tl.where(group < 2, 0, tl.where(group == 2, 2, 3)) * EIGHTH
    return first, first + tl.where(group < 2, 2, 1) * EIGHTH, pair < WIDTH // 2


@triton.jit
def _load(start, offset, valid, WIDTH: tl.constexpr, HALVES: tl.constexpr, BLOCK: tl.constexpr):
    """First and second channels of all pairs of the rows at `start + offset` `(R, 1)`: two `(R, BLOCK / 2)` in float32."""
    if HALVES:
        first, second, inside = _half_channels(WIDTH, BLOCK)
        a = tl.load(start + offset + first, mask=valid & inside, other=0.0).to(tl.float32)
        b = tl.load(start + offset + second, mask=valid & inside, other=0.0).to(tl.float32)
        return a, b
    else:
        channel = tl.arange(0, BLOCK)[None, :]
        both = tl.load(start + offset + channel, mask=valid & (channel < WIDTH), other=0.0).to(tl.float32)
        return tl.split(tl.reshape(both, (both.shape[0], BLOCK // 2, 2)))


@triton.jit
def _store(start, offset, valid, a, b, WIDTH: tl.constexpr, HALVES: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `_load`, in the dtype of what `start` points to."""
    a, b = a.to(start.dtype.element_ty), b.to(start.dtype.element_ty)
    if HALVES:
        first, second, inside = _half_channels(WIDTH, BLOCK)
        tl.store(start + offset + first, a, mask=valid & inside)
        tl.store(start + offset + second, b, mask=valid & inside)
    else:
        channel = tl.arange(0, BLOCK)[None, :]
        both = tl.reshape(tl.join(a, b), (a.shape[0], BLOCK))
        tl.store(start + offset + channel, both, mask=valid & (channel < WIDTH))


@triton.jit
def _load_weight(weight, WIDTH: tl.constexpr, HALVES: tl.constexpr, BLOCK: tl.constexpr):
    return _load(weight, tl.zeros((1, 1), tl.int32), tl.full((1, 1), 1, tl.int1), WIDTH, HALVES, BLOCK)


@triton.jit
def _norm_and_rotate(
    x, weight, y, rstd, offset, row, valid, cos_a, cos_b, sin_a, sin_b, eps,
    WIDTH: tl.constexpr, HALVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    a, b = _load(x, offset, valid, WIDTH, HALVES, BLOCK)
    weight_a, weight_b = _load_weight(weight, WIDTH, HALVES, BLOCK)
    r = tl.rsqrt(tl.sum(a * a + b * b, axis=1, keep_dims=True) / WIDTH + eps)
    tl.store(rstd + row, r, mask=valid)
    a, b = a * r * weight_a, b * r * weight_b
    _store(y, row * WIDTH, valid, a * cos_a - b * sin_a, b * cos_b + a * sin_b, WIDTH, HALVES, BLOCK)


@triton.jit
def _forward_kernel(
    q, k, q_weight, k_weight, cos, sin, q_out, k_out, q_rstd, k_rstd, num_rows, length, num_heads,
    q_sample, q_token, q_head, k_sample, k_token, k_head, table_sample, table_token, eps,
    WIDTH: tl.constexpr, HALVES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, sample, token, head, valid = _rows(tl.program_id(0), num_rows, length, num_heads, ROWS)
    angle = sample * table_sample + token * table_token
    cos_a, cos_b = _load(cos, angle, valid, WIDTH, HALVES, BLOCK)
    sin_a, sin_b = _load(sin, angle, valid, WIDTH, HALVES, BLOCK)
    offset = sample * q_sample + token * q_token + head * q_head
    _norm_and_rotate(
        q, q_weight, q_out, q_rstd, offset, row, valid, cos_a, cos_b, sin_a, sin_b, eps, WIDTH, HALVES, BLOCK
    )  # fmt: skip
    offset = sample * k_sample + token * k_token + head * k_head
    _norm_and_rotate(
        k, k_weight, k_out, k_rstd, offset, row, valid, cos_a, cos_b, sin_a, sin_b, eps, WIDTH, HALVES, BLOCK
    )  # fmt: skip


@triton.jit
def _gradients(
    x, dy, weight, dx, rstd, offset, dy_offset, row, valid, cos_a, cos_b, sin_a, sin_b,
    WIDTH: tl.constexpr, HALVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores dx; returns each row's part of the gradient of the weights."""
    a, b = _load(x, offset, valid, WIDTH, HALVES, BLOCK)
    dy_a, dy_b = _load(dy, dy_offset, valid, WIDTH, HALVES, BLOCK)
    weight_a, weight_b = _load_weight(weight, WIDTH, HALVES, BLOCK)
    r = tl.load(rstd + row, mask=valid, other=0.0)
    a, b = a * r, b * r
    g_a, g_b = dy_a * cos_a + dy_b * sin_b, dy_b * cos_b - dy_a * sin_a
    dw_a, dw_b = g_a * a, g_b * b
    mean = tl.sum(dw_a * weight_a + dw_b * weight_b, axis=1, keep_dims=True) / WIDTH
    dx_a, dx_b = r * (g_a * weight_a - a * mean), r * (g_b * weight_b - b * mean)
    _store(dx, row * WIDTH, valid, dx_a, dx_b, WIDTH, HALVES, BLOCK)
    return dw_a, dw_b


@triton.jit
def _backward_kernel(
    q, k, dq_out, dk_out, q_weight, k_weight, cos, sin, q_rstd, k_rstd, dq, dk, q_partial, k_partial,
    num_rows, length, num_heads, q_sample, q_token, q_head, k_sample, k_token, k_head,
    dq_sample, dq_token, dq_head, dk_sample, dk_token, dk_head, table_sample, table_token,
    WIDTH: tl.constexpr, HALVES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    dwq_a, dwq_b = tl.zeros((ROWS, BLOCK // 2), tl.float32), tl.zeros((ROWS, BLOCK // 2), tl.float32)
    dwk_a, dwk_b = tl.zeros((ROWS, BLOCK // 2), tl.float32), tl.zeros((ROWS, BLOCK // 2), tl.float32)
    for tile in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        row, sample, token, head, valid = _rows(tile, num_rows, length, num_heads, ROWS)
        angle = sample * table_sample + token * table_token
        cos_a, cos_b = _load(cos, angle, valid, WIDTH, HALVES, BLOCK)
        sin_a, sin_b = _load(sin, angle, valid, WIDTH, HALVES, BLOCK)
        offset = sample * q_sample + token * q_token + head * q_head
        dy_offset = sample * dq_sample + token * dq_token + head * dq_head
        dw_a, dw_b = _gradients(
            q, dq_out, q_weight, dq, q_rstd, offset, dy_offset, row, valid, cos_a, cos_b, sin_a, sin_b, WIDTH, HALVES, BLOCK
        )  # fmt: skip
        dwq_a, dwq_b = dwq_a + dw_a, dwq_b + dw_b
        offset = sample * k_sample + token * k_token + head * k_head
        dy_offset = sample * dk_sample + token * dk_token + head * dk_head
        dw_a, dw_b = _gradients(
            k, dk_out, k_weight, dk, k_rstd, offset, dy_offset, row, valid, cos_a, cos_b, sin_a, sin_b, WIDTH, HALVES, BLOCK
        )  # fmt: skip
        dwk_a, dwk_b = dwk_a + dw_a, dwk_b + dw_b
    place, always = tl.zeros((1, 1), tl.int32) + program * WIDTH, tl.full((1, 1), 1, tl.int1)
    _store(q_partial, place, always, _over_rows(dwq_a), _over_rows(dwq_b), WIDTH, HALVES, BLOCK)
    _store(k_partial, place, always, _over_rows(dwk_a), _over_rows(dwk_b), WIDTH, HALVES, BLOCK)


@triton.jit
def _over_rows(x):
    return tl.sum(x, axis=0, keep_dims=True)


def _blocks(width: int, halves: bool) -> dict[str, Any]:
    """The sizes that a kernel is compiled for."""
    block = triton.next_power_of_2(width)
    rows = max(1, MIN_TILE // block)
    num_warps = min(32, rows * block // (32 * ELEMENTS_PER_THREAD))
    return {"WIDTH": width, "HALVES": halves, "ROWS": rows, "BLOCK": block, "num_warps": num_warps}


def _readable(x: Tensor) -> Tensor:
    """Any strides will do, so that slices of one projection are not copied, but a row must lie together."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _table(cos: Tensor, sin: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Both `(B, L, 1, K)` for `q` `(B, L, N, K)`, broadcast over samples where they hold one for all."""
    shape = (*q.shape[:2], 1, q.shape[3])
    cos, sin = _readable(cos.expand(shape)), _readable(sin.expand(shape))
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())


@triton_op("videofm::qk_norm_rope", mutates_args={})
def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, halves: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and k `(B, L, N, K)` normalised over K and rotated, and the r of each, `(B, L, N)` float32.

    The weights are `(K,)`, cos and sin `(B or 1, L, 1, K)`. `halves` selects the pairs of `rotate_halves`, else of `rotate`.
    """
    q, k, (cos, sin) = _readable(q), _readable(k), _table(cos, sin, q)
    batch, length, num_heads, width = q.shape
    num_rows = batch * length * num_heads
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    q_rstd, k_rstd = (q.new_empty((batch, length, num_heads), dtype=torch.float32) for _ in range(2))
    blocks = _blocks(width, halves)
    wrap_triton(_forward_kernel)[(triton.cdiv(num_rows, blocks["ROWS"]),)](
        q, k, q_weight.contiguous(), k_weight.contiguous(), cos, sin, q_out, k_out, q_rstd, k_rstd,
        num_rows, length, num_heads, *q.stride()[:3], *k.stride()[:3], *cos.stride()[:2], eps, **blocks,
    )  # fmt: skip
    return q_out, k_out, q_rstd, k_rstd


@triton_op("videofm::qk_norm_rope_backward", mutates_args={})
def qk_norm_rope_backward(
    q: Tensor, k: Tensor, dq_out: Tensor, dk_out: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    q_rstd: Tensor, k_rstd: Tensor, halves: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k `(B, L, N, K)` and of their weights `(K,)`, from those of the outputs."""
    q, k, dq_out, dk_out, (cos, sin) = *(_readable(x) for x in (q, k, dq_out, dk_out)), _table(cos, sin, q)
    batch, length, num_heads, width = q.shape
    num_rows = batch * length * num_heads
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    blocks = _blocks(width, halves)
    num_programs = min(MAX_PARTIAL_SUMS, triton.cdiv(num_rows, blocks["ROWS"]))
    q_partial, k_partial = (q.new_empty((num_programs, width), dtype=torch.float32) for _ in range(2))
    wrap_triton(_backward_kernel)[(num_programs,)](
        q, k, dq_out, dk_out, q_weight.contiguous(), k_weight.contiguous(), cos, sin, q_rstd, k_rstd,
        dq, dk, q_partial, k_partial, num_rows, length, num_heads,
        *q.stride()[:3], *k.stride()[:3], *dq_out.stride()[:3], *dk_out.stride()[:3], *cos.stride()[:2], **blocks,
    )  # fmt: skip
    return dq, dk, q_partial.sum(dim=0).to(q_weight.dtype), k_partial.sum(dim=0).to(k_weight.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, q_weight, k_weight, cos, sin, _, ctx.halves = inputs
    _, _, q_rstd, k_rstd = output
    ctx.mark_non_differentiable(q_rstd, k_rstd)
    ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, q_rstd, k_rstd)


def _backward(ctx: Any, dq_out: Tensor, dk_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, q_weight, k_weight, cos, sin, q_rstd, k_rstd = ctx.saved_tensors
    found = qk_norm_rope_backward(q, k, dq_out, dk_out, q_weight, k_weight, cos, sin, q_rstd, k_rstd, ctx.halves)
    return (*found, None, None, None, None)


qk_norm_rope.register_autograd(_backward, setup_context=_keep)
