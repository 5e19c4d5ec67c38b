"""Attention as an operator on one rank, the plan of heads, and the rectangles that a mask leaves to compute."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from videofm.attention.backends.math import BACKEND as MATH
from videofm.attention.comm import plan_heads
from videofm.attention.layout import SequenceLayout
from videofm.attention.masks import MaskSpec
from videofm.attention.strategies import SequencePlace, allgather_kv, none, ring, tiles, ulysses, unified
from videofm.attention.strategies.call import AttentionCall
from videofm.errors import ConfigError, ParallelError
from videofm.registry import ATTENTION_BACKENDS, ATTENTION_STRATEGIES, lookup

CPU = torch.device("cpu")
MASKS = [
    None,
    MaskSpec.causal(),
    MaskSpec.causal(window=3, num_sink=1),
    MaskSpec.block_causal([3, 1, 3]),
    MaskSpec.documents([2, 0, 5], causal=True),
    MaskSpec.key_padding([3, 0]),
]


def qkv(length: int = 7, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Four heads that share two heads of keys."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, n, 8, generator=generator, dtype=dtype).requires_grad_() for n in (4, 2, 2)]


def dense_of(mask: MaskSpec | None, length: int) -> torch.Tensor | None:
    """The matrix of a mask."""
    return None if mask is None else mask.dense(torch.arange(length), torch.arange(length))


def gradients(out: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of a fixed weighted sum."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return list(torch.autograd.grad(out, leaves, weights))


@pytest.mark.parametrize("backend", ["math", "sdpa"])
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.kind if mask else "none")
def test_the_operator_computes_what_autograd_does(mask, backend):
    leaves = qkv()
    attend = none.wrap(lookup(ATTENTION_BACKENDS, backend, "backend"), opaque=True)
    got, expected = attend(*leaves, mask), MATH(*leaves, dense_of(mask, 7))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(got, leaves), gradients(expected, leaves), rtol=0, atol=1e-12)


@pytest.mark.parametrize("strategy", [ulysses, allgather_kv, ring, unified])
@pytest.mark.parametrize("mask", [None, MaskSpec.causal()])
def test_strategies_at_degree_one_send_nothing_and_compute_the_same(strategy, mask):
    q, k, v = (x.detach() for x in qkv())
    call = AttentionCall(MATH, mask or MaskSpec.full(), 0.3, SequenceLayout.contiguous(7, 1))
    expected = none.STRATEGY.forward(q, k, v, call)
    got = strategy.STRATEGY.forward(q, k, v, call)
    torch.testing.assert_close(got.out, expected.out)
    saved = (q, k, v, got.out) if got.traded is None else (got.traded, got.traded_out)
    grads = strategy.STRATEGY.backward(torch.ones_like(q), saved, got.lse, 2, call)
    same = none.STRATEGY.backward(torch.ones_like(q), (q, k, v, expected.out), expected.lse, 2, call)
    torch.testing.assert_close((grads.dq, grads.dk, grads.dv), (same.dq, same.dk, same.dv))


def test_torch_accepts_the_operator():
    """Schema, fake results, autograd and tracing, by torch's own checks."""
    text = MaskSpec.block_causal([3, 4]).to_text()
    torch.library.opcheck(torch.ops.videofm.attention, (*qkv(), "none", "math", "", text, "", "", 0.3))


def test_compiled_it_computes_the_same():
    mask, leaves = MaskSpec.causal(), qkv()
    mask.to_text()
    attend = none.wrap(MATH, opaque=True)
    compiled = torch.compile(lambda q, k, v: attend(q * 2, k, v, mask), backend="aot_eager", fullgraph=True)
    got, expected = compiled(*leaves), attend(leaves[0] * 2, *leaves[1:], mask)
    assert torch.equal(got, expected)
    torch.testing.assert_close(gradients(got, leaves), gradients(expected, leaves))


@pytest.mark.parametrize(("mask", "pairs"), [(None, 2 * 49), (MaskSpec.causal(), 2 * 28), (MaskSpec.key_padding([3, 0]), 21)])
def test_flops_are_those_of_the_allowed_pairs(mask, pairs):
    """4 FLOPs for each pair, head and channel forward, 8 backward."""
    leaves = qkv()
    with FlopCounterMode(display=False) as forward:
        out = none.wrap(MATH, opaque=True)(*leaves, mask)
    with FlopCounterMode(display=False) as backward:
        gradients(out, leaves)
    assert forward.get_total_flops() == 4 * pairs * 4 * 8
    assert backward.get_total_flops() == 8 * pairs * 4 * 8


def test_under_autocast_it_has_the_dtype_of_products():
    leaves = qkv(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = none.wrap(MATH, opaque=True)(*leaves)
    assert out.dtype == torch.bfloat16
    assert gradients(out, leaves)[0].dtype == torch.float32


def test_a_mask_first_seen_in_inference_serves_training():
    """The masks of a call are kept; one made in inference mode could not be used where autograd looks on."""
    attend, mask, leaves = none.wrap(MATH, opaque=True), MaskSpec.causal(window=5), qkv(11)
    with torch.inference_mode():
        attend(*leaves, mask)
    assert all(x.isfinite().all() for x in gradients(attend(*leaves, mask), leaves))


@pytest.mark.parametrize("name", ATTENTION_STRATEGIES)
def test_a_rank_alone_gets_the_backend_itself(name):
    strategy = lookup(ATTENTION_STRATEGIES, name, "strategy")
    assert strategy.name == name
    assert strategy.wrap(MATH, SequencePlace()) is MATH
    assert strategy.wrap(MATH, SequencePlace(), opaque=True).name == "none(math)"


def test_an_opaque_call_refuses_mask_tensors_and_backends_without_backward():
    with pytest.raises(ParallelError, match=r"none\(math\) takes no mask tensor.*describe the mask by a MaskSpec"):
        none.wrap(MATH, opaque=True)(*qkv(), torch.ones(7, 7, dtype=torch.bool))

    class Blind:
        name, supports_lse = "blind", False

    with pytest.raises(
        ConfigError, match="needs the log-sum-exp of the softmax, which backend blind does not give: choose sdpa"
    ):
        none.wrap(Blind(), opaque=True)


def test_ulysses_degrees_that_form_no_grid_are_refused():
    class Spec:
        has_mask = False

    refuse = unified.STRATEGY.refuse
    assert refuse(Spec(), 8, 2) is None
    assert "ulysses over 3 ranks does not divide the 8 ranks" in refuse(Spec(), 8, 3)
    assert none.STRATEGY.refuse(Spec(), 8, 3) is None


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "expected"),
    [
        (8, 8, 4, [(2, 2)] * 4),  # as many heads of keys: each its own
        (8, 4, 4, [(2, 1)] * 4),  # ranks divide the heads of keys
        (8, 2, 4, [(2, 1)] * 4),  # two ranks need the same head
        (8, 1, 4, [(2, 1)] * 4),
        (6, 2, 4, [(2, 1), (2, 2), (1, 1), (1, 1)]),  # heads 2 and 3 belong to different groups
        (3, 3, 4, [(1, 1)] * 3 + [(0, 0)]),
    ],
)
def test_each_rank_gets_its_heads_and_the_keys_they_need(heads, kv_heads, ranks, expected):
    plan = plan_heads(heads, kv_heads, ranks)
    assert [plan.counts(rank) for rank in range(ranks)] == expected
    assert [head for start, stop in plan.queries for head in range(start, stop)] == list(range(heads))
    for rank, (start, stop) in enumerate(plan.queries):
        first, last = plan.keys[rank]
        index = plan.key_of_query(rank)
        if index is None and stop > start:
            index = [i // ((stop - start) // (last - first)) for i in range(stop - start)]  # what a backend makes of it
        assert [first + i for i in index or ()] == [head * kv_heads // heads for head in range(start, stop)]


def test_heads_that_do_not_divide_cost_what_the_formula_says():
    assert ulysses.efficiency(12, 8) == 0.75
    assert ulysses.efficiency(16, 8) == 1
    assert ulysses.efficiency(3, 4) == 0.75


def painted(pieces: tuple[tiles.Tile, ...], num_queries: int, num_keys: int, samples: int) -> torch.Tensor:
    """How often each pair is computed `(B, Lq, Lk)`."""
    total = torch.zeros(samples, num_queries, num_keys, dtype=torch.int64)
    for piece in pieces:
        view = total[:, piece.queries, piece.keys]
        view += 1 if piece.mask is None else piece.mask.expand(samples, 1, *view.shape[1:])[:, 0]
    return total


LAYOUTS = [
    SequenceLayout.contiguous(24, 3),
    SequenceLayout.zigzag(24, 3),
    SequenceLayout.striped(24, 3),
    SequenceLayout.chunk_zigzag(24, 3, 4),
    SequenceLayout.zigzag(24, 3, 2),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "mask",
    [
        MaskSpec.full(),
        MaskSpec.causal(),
        MaskSpec.causal(window=5, num_sink=2),
        MaskSpec.block_causal(4, 24),
        MaskSpec.documents([7, 0, 17]),
        MaskSpec.documents([7, 17], causal=True),
        MaskSpec.key_padding([24, 9, 0]),
    ],
)
def test_rectangles_cover_what_the_mask_allows_exactly_once(layout, mask):
    for q_block in range(3):
        queries = tiles.positions(layout, layout.num_inner, q_block)
        for k_block in (None, 0, 1, 2):
            keys = tiles.positions(layout, layout.num_inner, k_block)
            expected = mask.dense(queries, keys)
            expected = expected.expand(3, 1, len(queries), len(keys))[:, 0].long()
            pieces = tiles.block_tiles(mask, layout, layout.num_inner, q_block, k_block, CPU)
            assert torch.equal(painted(pieces, len(queries), len(keys), 3), expected)


def test_a_causal_zigzag_ring_computes_half_of_each_block_and_masks_the_diagonal_only():
    layout = SequenceLayout.zigzag(48, 4)  # parts of 12 tokens, in two chunks of 6
    for q_block in range(4):
        for k_block in range(4):
            pieces = tiles.block_tiles(MaskSpec.causal(), layout, 1, q_block, k_block, CPU)
            area = sum((p.queries.stop - p.queries.start) * (p.keys.stop - p.keys.start) for p in pieces)
            if q_block == k_block:
                # two chunks of the diagonal, and the later sees the earlier; the last part's chunks are neighbours, so one
                assert area == (3 * 6 * 6 if q_block < 3 else 12 * 12)
                assert sum(p.mask is not None for p in pieces) == (2 if q_block < 3 else 1)
            else:
                assert area == 12 * 6
                assert [p.mask for p in pieces] == [None]


def test_chunks_and_documents_need_no_mask():
    layout = SequenceLayout.contiguous(24, 2)
    for mask, most in ((MaskSpec.block_causal(4, 24), 3), (MaskSpec.documents([7, 17]), 2)):
        for block in range(2):
            pieces = tiles.block_tiles(mask, layout, 1, block, None, CPU)
            assert len(pieces) <= most and all(piece.mask is None for piece in pieces)


def test_too_many_rectangles_become_one_mask():
    (piece,) = tiles.whole_tiles(MaskSpec.documents([2] * 100), 200, 200, CPU)
    assert piece.mask is not None and piece.mask.shape == (200, 200)
