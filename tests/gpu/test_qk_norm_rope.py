"""The kernels of `ops.qk_norm_rope` on a GPU: values, gradients, registration, compilation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.unit.ops.qk_norm_rope_cases import BF16, CASES, EPS, Case, errors, expected, gradients, inputs
from videofm.ops import qk_norm_rope as op
from videofm.ops.norm import RMSNorm
from videofm.ops.rope import RotaryTable

pytest.importorskip("triton")

LARGE = (
    Case("width of LTX 2B", (2, 1000, 2048)),
    Case("width of LTX 2B, bfloat16", (2, 1000, 2048), BF16),
    Case("width of LTX 13B, bfloat16", (1, 777, 4096), BF16),
    Case("width 6144, bfloat16", (1, 777, 6144), BF16),
    Case("width 6144, float16", (1, 777, 6144), torch.float16),
    Case("heads of Step-Video, bfloat16", (1, 1001, 48, 128), BF16),
    Case("heads of Step-Video, slices of one projection, bfloat16", (2, 333, 48, 128), BF16, "sliced"),
)
ROUNDINGS = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""To the nearest: half of the last of 8 and of 11 significant bits."""


def called(case: Case) -> list[Tensor]:
    """Outputs and gradients of one call on the GPU."""
    made = inputs(case, "cuda")
    return gradients(made, op.qk_norm_rope(made.q, made.k, made.q_norm, made.k_norm, made.table, case.pairs))


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=lambda case: case.name)
def test_outputs_and_gradients(case: Case):
    """2e-5 beside the rounding: the gradients of the weights are sums over all tokens."""
    for name, error in errors(called(case), expected(case, "cuda")).items():
        rounding = ROUNDINGS[torch.float32 if name.startswith("dw") else case.dtype]
        assert error <= rounding + 2e-5, (name, error)


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_two_calls_are_bitwise_the_same(case: Case):
    assert all(torch.equal(first, second) for first, second in zip(called(case), called(case), strict=True))


@pytest.mark.parametrize("name", ["across heads", "per head, width no power of two"])
def test_the_operators_are_registered_as_torch_wants_them(name: str):
    from videofm.ops.kernels import qk_norm_rope as kernels

    case = next(case for case in CASES if case.name == name)
    made, halves = inputs(case, "cuda"), case.pairs == "halves"
    q, k, cos, sin = (x if halves else x.unsqueeze(2) for x in (made.q, made.k, made.table.cos, made.table.sin))
    weights = (made.q_norm.weight, made.k_norm.weight)
    torch.library.opcheck(kernels.qk_norm_rope, (q, k, *weights, cos, sin, EPS, halves))
    tensors = (q.detach(), k.detach(), q.detach(), k.detach(), *(weight.detach() for weight in weights), cos, sin)
    rstd = torch.ones(q.shape[:3], device="cuda")
    torch.library.opcheck(kernels.qk_norm_rope_backward, (*tensors, rstd, rstd, halves))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", [LARGE[1], LARGE[5]], ids=lambda case: case.name)
def test_compiled_it_gives_the_same(case: Case, dynamic: bool):
    """At two lengths, the second of which recompiles unless shapes are dynamic."""
    torch._dynamo.reset()
    compiled = torch.compile(op.qk_norm_rope, fullgraph=True, dynamic=dynamic)
    for length in (case.shape[1], 600):
        changed = replace(case, shape=(case.shape[0], length, *case.shape[2:]))
        made = inputs(changed, "cuda")
        found = gradients(made, compiled(made.q, made.k, made.q_norm, made.k_norm, made.table, case.pairs))
        assert all(torch.equal(first, second) for first, second in zip(found, called(changed), strict=True))


def test_more_elements_than_32_bits_count():
    """2^31 + 48 * 128 of them: the last token is as it would be alone."""
    num_heads, width = 48, 128
    length = 2**31 // (num_heads * width) + 2
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GiB of free GPU memory")
    q = torch.randn(1, length, num_heads, width, device="cuda", dtype=BF16)
    norm = RMSNorm(width, eps=EPS).cuda()
    angles = torch.rand(1, length, 1, width, device="cuda")
    with torch.no_grad():
        whole = op.qk_norm_rope(q, q, norm, norm, RotaryTable(angles.cos(), angles.sin()), "halves")
        last, angles = q[:, -1:].clone(), angles[:, -1:]
        alone = op.qk_norm_rope(last, last, norm, norm, RotaryTable(angles.cos(), angles.sin()), "halves")
    assert q.numel() > 2**31
    assert torch.equal(whole.q[:, -1:], alone.q)
    assert torch.equal(whole.k[:, -1:], alone.k)
