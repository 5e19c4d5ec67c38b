"""PyTorch's `scaled_dot_product_attention`: on every device, with masks, and fused where PyTorch has a kernel.

Blocks go to the kernels below it: its flash kernel on the CPU, its flash (no mask, half precision) or memory-efficient kernel
on CUDA. Tensors are `(B, N, L, K)` there, so each function transposes on its way in and out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from videofm.attention.api import AttentionSpec
from videofm.attention.backends import shared
from videofm.attention.masks import MaskSpec
from videofm.attention.merge import BlockOutput
from videofm.attention.whole import attend_whole

MAX_FLASH_WIDTH = 256
BIAS_ALIGNMENT = 16
LSE_ALIGNMENT = 32
_aten = torch.ops.aten

Gradients = tuple[Tensor, Tensor, Tensor]


class SdpaBackend:
    """The default."""

    name = "sdpa"
    supports_lse = True
    supports_mask = True

    def supports(self, spec: AttentionSpec) -> str | None:
        """Whole sequences everywhere; partial results where PyTorch has a kernel that gives them."""
        if not spec.needs_lse or spec.device_type == "cpu":
            return None
        if spec.device_type != "cuda":
            return f"its kernels give no partial results on {spec.device_type} (use math)."
        if spec.dtype == torch.float64:
            return "its kernels on cuda have no float64 (use math)."
        if spec.head_width % 8:
            return f"its kernels on cuda need a head width that is a multiple of 8, not {spec.head_width} (use math)."
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | MaskSpec | None = None) -> Tensor:
        """q `(B, Lq, N, K)`, k and v `(B, Lk, G, K)` -> like q; see `AttentionBackend`."""
        if isinstance(mask, MaskSpec):
            return attend_whole(self.__call__, q, k, v, mask, causal=_causal)
        shares_heads = q.size(2) != k.size(2)
        if mask is not None:
            if mask.is_floating_point():
                mask = mask.to(q.dtype)
            if shares_heads:  # fused kernels that take a mask do not take fewer heads
                k, v, shares_heads = shared.expand_heads(k, q.shape[2]), shared.expand_heads(v, q.shape[2]), False
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shares_heads).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> BlockOutput:
        """See `AttentionBackend`."""
        if not q.numel() or not k.numel():
            return shared.nothing_seen(q)
        kernel = _forward_cpu if q.device.type == "cpu" else _forward_flash if _is_for_flash(q, mask) else _forward_efficient
        return shared.mark_dead(kernel(q, k, v, mask, scale), shared.dead_rows(mask))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
    ) -> Gradients:
        """See `AttentionBackend`."""
        if not q.numel() or not k.numel():
            return shared.no_gradients(q, k, v)
        kernel = _backward_cpu if q.device.type == "cpu" else _backward_flash if _is_for_flash(q, mask) else _backward_efficient
        dout, out = dout.to(q.dtype), out.to(q.dtype)
        dq, dk, dv = kernel(dout, q, k, v, out, shared.finite_lse(lse), mask, scale)
        return dq, shared.sum_heads(dk, k.shape[2]), shared.sum_heads(dv, v.shape[2])


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shares_heads = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shares_heads).transpose(1, 2)


def _is_for_flash(q: Tensor, mask: Tensor | None) -> bool:
    return mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= MAX_FLASH_WIDTH


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _tokens_first(gradients: tuple[Tensor, ...]) -> Gradients:
    dq, dk, dv = (x.transpose(1, 2) for x in gradients[:3])
    return dq, dk, dv


def _cpu_bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The CPU kernel takes no bool, and 2 or 4 dims."""
    return None if mask is None else shared.additive(mask, q.dtype)


def _forward_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> BlockOutput:
    q, k, v = _heads_first(q, k, v)
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=_cpu_bias(mask, q), scale=scale)
    return BlockOutput(out.transpose(1, 2), lse)


def _backward_cpu(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
) -> Gradients:
    k, v = (shared.expand_heads(x, q.shape[2]) for x in (k, v))  # the kernel would sum their gradients in bf16
    dout, q, k, v, out = _heads_first(dout, q, k, v, out)
    bias = _cpu_bias(mask, q)
    backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    return _tokens_first(backward(dout, q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=scale))


def _forward_flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> BlockOutput:
    q, k, v = _heads_first(q, shared.expand_heads(k, q.shape[2]), shared.expand_heads(v, q.shape[2]))
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
    return BlockOutput(out.transpose(1, 2), lse)


def _backward_flash(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
) -> Gradients:
    num_heads, (num_queries, num_keys) = q.shape[2], (q.shape[1], k.shape[1])
    dout, q, k, v, out = _heads_first(dout, q, shared.expand_heads(k, num_heads), shared.expand_heads(v, num_heads), out)
    unused = torch.empty(0, dtype=torch.int64, device=q.device)  # the state of dropout
    backward = _aten._scaled_dot_product_flash_attention_backward
    return _tokens_first(
        backward(dout, q, k, v, out, lse, None, None, num_queries, num_keys, 0.0, False, unused, unused, scale=scale)
    )


def _forward_efficient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> BlockOutput:
    num_queries = q.shape[1]
    bias = None if mask is None else shared.aligned_bias(mask, q, k.shape[1], BIAS_ALIGNMENT)
    q, k, v = _heads_first(q, shared.expand_heads(k, q.shape[2]), shared.expand_heads(v, q.shape[2]))
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, False, scale=scale)
    return BlockOutput(out.transpose(1, 2), lse[..., :num_queries])  # its rows are padded


def _backward_efficient(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
) -> Gradients:
    num_heads = q.shape[2]
    bias = None if mask is None else shared.aligned_bias(mask, q, k.shape[1], BIAS_ALIGNMENT)
    dout, q, k, v, out = _heads_first(dout, q, shared.expand_heads(k, num_heads), shared.expand_heads(v, num_heads), out)
    lse = pad(lse, (0, -lse.shape[-1] % LSE_ALIGNMENT), value=torch.inf)
    unused = torch.empty((), dtype=torch.int64)  # the state of dropout
    backward = _aten._scaled_dot_product_efficient_attention_backward
    wanted = [True, True, True, False]
    return _tokens_first(backward(dout, q, k, v, bias, out, lse, unused, unused, 0.0, wanted, False, scale=scale))


BACKEND = SdpaBackend()
