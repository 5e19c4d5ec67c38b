"""Cases of `ops.qk_norm_rope` and a reference that shares nothing with it: complex numbers in float64.

As a program (`TRITON_INTERPRET=1 python -m tests.unit.ops.qk_norm_rope_cases`) it runs the kernels in Triton's interpreter and
prints what it found as JSON; the variable must be set before triton is imported, hence a process of its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from videofm.ops import qk_norm_rope as op
from videofm.ops.norm import RMSNorm
from videofm.ops.rope import RotaryTable, cell_rotary_table, head_split, rotary_table

EPS = 1e-3
"""Large enough that leaving it out is seen."""


@dataclass(frozen=True)
class Case:
    """`shape` is (B, L, D) for adjacent pairs, (B, L, N, K) for halves; `layout` is how q lies in memory:

    `sliced`, beside others as one projection gives it; `transposed`, the two dims after B in the other order, as in the
    gradients too; `shared table`, one sample's angles for all. k is always contiguous, so that their strides differ.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    @property
    def pairs(self) -> op.Pairs:
        """Which channels are turned together."""
        return "adjacent" if len(self.shape) == 3 else "halves"


@dataclass(frozen=True)
class Inputs:
    """What one call gets, and the gradients of its outputs."""

    q: Tensor
    k: Tensor
    q_norm: RMSNorm
    k_norm: RMSNorm
    table: RotaryTable
    grads: tuple[Tensor, Tensor]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What a gradient is taken of."""
        return self.q, self.k, self.q_norm.weight, self.k_norm.weight


FP32, BF16 = torch.float32, torch.bfloat16
CASES = (
    Case("across heads", (2, 7, 96)),
    Case("across heads, bfloat16", (2, 7, 96), BF16),
    Case("across heads, more tiles than programs", (1, 7, 2048)),
    Case("across heads, first channels at angle 0, an odd number of pairs", (2, 5, 50)),
    Case("across heads, two channels", (1, 3, 2)),
    Case("across heads, one sample's table for all", (3, 5, 48), layout="shared table"),
    Case("across heads, slices of one projection", (2, 5, 96), layout="sliced"),
    Case("across heads, channels far apart", (2, 5, 48), layout="transposed"),
    Case("across heads, no tokens", (2, 0, 48)),
    Case("per head", (2, 5, 3, 64)),
    Case("per head, bfloat16", (2, 5, 3, 64), BF16),
    Case("per head, width no power of two", (2, 7, 5, 48)),
    Case("per head, width no power of two, bfloat16", (2, 7, 5, 96), BF16),
    Case("per head, more tiles than programs, the last not full", (2, 13, 3, 128)),
    Case("per head, the smallest width", (1, 3, 1, 8)),
    Case("per head, one sample's table for all", (3, 4, 2, 48), layout="shared table"),
    Case("per head, slices of one projection", (2, 5, 3, 64), layout="sliced"),
    Case("per head, slices of one projection, bfloat16", (2, 5, 3, 64), BF16, "sliced"),
    Case("per head, heads outside tokens", (2, 5, 3, 64), layout="transposed"),
    Case("per head, no tokens", (1, 0, 2, 64)),
)


def inputs(case: Case, device: str = "cpu", dtype: torch.dtype | None = None) -> Inputs:
    """Seeded inputs in the dtype of the case, or the same numbers in another."""
    torch.manual_seed(0)
    drawn = torch.randn(2, *case.shape).to(device, case.dtype).to(dtype or case.dtype)
    grads = torch.randn(2, *case.shape).to(device, case.dtype).to(dtype or case.dtype)
    if case.layout == "sliced":
        drawn = drawn.movedim(0, 2).contiguous().movedim(2, 0)
    elif case.layout == "transposed":
        drawn, grads = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (drawn, grads))
    norms = [RMSNorm(case.shape[-1], eps=EPS).to(device) for _ in range(2)]
    for norm in norms:
        nn.init.normal_(norm.weight)
    num_samples = 1 if case.layout == "shared table" else case.shape[0]
    coordinates = torch.rand(num_samples, 3, case.shape[1]).mul(20).to(device)
    table = (rotary_table if case.pairs == "adjacent" else cell_rotary_table)(coordinates, case.shape[-1])
    q, k = (x.detach().requires_grad_() for x in (drawn[0], drawn[1].contiguous()))
    return Inputs(q, k, norms[0], norms[1], table, (grads[0], grads[1]))


def gradients(made: Inputs, found: op.QueriesAndKeys) -> list[Tensor]:
    """Outputs, then the gradients of both inputs and of both weights."""
    return [found.q, found.k, *torch.autograd.grad((found.q, found.k), made.leaves, made.grads)]


def expected(case: Case, device: str = "cpu") -> list[Tensor]:
    """What `gradients` must give, in float64: a pair of channels is a complex number, and a rotation multiplies by another."""
    made = inputs(case, device, torch.float64)

    def pairs(x: Tensor) -> Tensor:
        if case.pairs == "adjacent":
            return torch.view_as_complex(rearrange(x.double(), "... (d two) -> ... d two", two=2).contiguous())
        axes = x.double().split(list(head_split(x.shape[-1])), dim=-1)
        return torch.cat([torch.complex(*axis.chunk(2, dim=-1)) for axis in axes], dim=-1)

    def channels(z: Tensor) -> Tensor:
        if case.pairs == "adjacent":
            return rearrange(torch.view_as_real(z), "... d two -> ... (d two)")
        axes = z.split([width // 2 for width in head_split(case.shape[-1])], dim=-1)
        return torch.cat([part for axis in axes for part in (axis.real, axis.imag)], dim=-1)

    turn = torch.complex(pairs(made.table.cos).real, pairs(made.table.sin).real)

    def one(x: Tensor, norm: RMSNorm) -> Tensor:
        scaled = x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * norm.weight.double()
        return channels(pairs(scaled) * turn)

    return gradients(made, op.QueriesAndKeys(one(made.q, made.q_norm), one(made.k, made.k_norm)))


NAMES = ("q", "k", "dq", "dk", "dw of q", "dw of k")


def errors(found: list[Tensor], wanted: list[Tensor]) -> dict[str, float]:
    """The largest difference in each tensor over its largest element (NaN stays NaN), by name."""
    result = {}
    for name, ours, theirs in zip(NAMES, found, wanted, strict=True):
        assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
        scale = theirs.abs().amax().clamp(min=1e-30).item() if theirs.count_nonzero() else 1.0
        result[name] = (ours.double() - theirs.double()).abs().amax().item() / scale if theirs.numel() else 0.0
    return result


def interpreted() -> dict[str, dict[str, float]]:
    """Each case by the kernels in the interpreter: the errors, and the elements that are kept for the gradient."""
    from videofm.ops.kernels import qk_norm_rope as kernels

    kernels.MAX_PARTIAL_SUMS = 3  # more tiles than programs without large inputs, which the interpreter is slow at
    found = {}
    for case in CASES:
        made = inputs(case)
        known = {x.data_ptr() for x in (*made.leaves, made.table.cos, made.table.sin)}
        kept: dict[int, int] = {}

        def keep(x: Tensor, known: set[int] = known, kept: dict[int, int] = kept) -> Tensor:
            if x.data_ptr() not in known:
                kept[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            outputs = op.fused(made.q, made.k, made.q_norm, made.k_norm, made.table, case.pairs)
        dtypes = [x.dtype for x in (outputs.q, outputs.k)]
        assert dtypes == [case.dtype] * 2, dtypes
        found[case.name] = {**errors(gradients(made, outputs), expected(case)), "kept": float(sum(kept.values()))}
    return found


if __name__ == "__main__":
    print(json.dumps(interpreted()))
