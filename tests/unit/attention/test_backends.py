"""The contract of backends, on all that run here, against dense attention in float64; the others say why not.

A backend is correct when its results over blocks of keys merge to those over all keys, and its gradients over blocks sum to
those of autograd through the whole softmax.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from videofm.attention import AttentionSpec, MaskSpec, SequenceLayout, choose, merge
from videofm.attention.backends import shared
from videofm.attention.backends.flex import BACKEND as FLEX
from videofm.attention.backends.flex import block_mask
from videofm.attention.backends.math import BACKEND as MATH
from videofm.attention.backends.sdpa import BACKEND as SDPA
from videofm.attention.whole import MAX_CHUNKS, dense_mask
from videofm.errors import ConfigError, ParallelError
from videofm.registry import ATTENTION_BACKENDS, lookup

SPEC = AttentionSpec(num_heads=3, head_width=8)
MASKED = AttentionSpec(num_heads=3, head_width=8, has_mask=True)
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}
HEADS = [(4, 4), (8, 2), (8, 1), (6, 3), (6, 2)]
LENGTH, WIDTH, SCALE = 29, 8, 0.3
RULES = {
    "full": MaskSpec.full(),
    "causal": MaskSpec.causal(),
    "causal, window": MaskSpec.causal(window=7, num_sink=2),
    "block causal": MaskSpec.block_causal(8, LENGTH),
    "block causal, window": MaskSpec.block_causal(8, LENGTH, window=11, num_sink=3),
    "documents": MaskSpec.documents([5, 0, 9, 15]),
    "causal documents": MaskSpec.documents([5, 0, 9, 15], True),
    "padding": MaskSpec.key_padding([LENGTH, 4]),
    "a sample of nothing": MaskSpec.key_padding([0, LENGTH]),
}
LAYOUTS = {
    "contiguous": SequenceLayout.contiguous(LENGTH, 3),
    "zigzag": SequenceLayout.zigzag(LENGTH, 3),
    "striped": SequenceLayout.striped(LENGTH, 3),
    "chunks": SequenceLayout.chunk_zigzag(LENGTH, 3, 8),
    "documents": SequenceLayout.balanced([5, 0, 9, 15], 3),
    "whole documents, one part empty": SequenceLayout.balanced([5, 0, 9, 15], 4, whole=True),
}


def working(spec=SPEC):
    """Names of the backends that serve `spec` here."""
    return [name for name in ATTENTION_BACKENDS if lookup(ATTENTION_BACKENDS, name, "attention backend").supports(spec) is None]


LSE_BACKENDS = working(AttentionSpec(4, WIDTH, needs_lse=True))


def tensors(num_queries=LENGTH, num_keys=LENGTH, heads=(4, 2), dtype=torch.float64, batch_size=2):
    """q, k, v and dout, rounded to `dtype`, of which the float64 reference gets the same values."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(num_queries, heads[0]), (num_keys, heads[1]), (num_keys, heads[1]), (num_queries, heads[0])]
    return [torch.randn(batch_size, length, n, WIDTH, generator=generator).to(dtype) for length, n in sizes]


def reference(q, k, v, dout, mask, scale=SCALE):
    """out, lse, dq, dk, dv in float64, by autograd through a softmax whose dead rows are cut out."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    k_all, v_all = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    logits = torch.einsum("bqnk,bsnk->bnqs", q, k_all) * scale
    keep = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask.expand_as(logits)
    dead = ~keep.any(dim=-1, keepdim=True)
    weights = logits.masked_fill(~keep & ~dead, -torch.inf).softmax(dim=-1).masked_fill(dead, 0.0)
    out = torch.einsum("bnqs,bsnk->bqnk", weights, v_all)
    lse = logits.detach().masked_fill(~keep, -torch.inf).logsumexp(dim=-1)
    return out.detach(), lse, *torch.autograd.grad(out, (q, k, v), dout.double())


def tensor_masks(num_queries, num_keys, num_heads):
    keep = torch.rand(2, num_heads, num_queries, num_keys, generator=torch.Generator().manual_seed(1)) < 0.6
    keep[0, :, 2] = False  # dead rows, in one sample and for all heads
    keep[1, 1, 4:] = False  # and for one head
    return {"none": None, "one for all": keep[1, 0], "of keys": keep[:, :1, :1], "of each head": keep}


# --- forward and backward over one block --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", LSE_BACKENDS)
def test_a_block_against_dense_autograd(name, heads, dtype):
    backend = choose(name, AttentionSpec(heads[0], WIDTH, dtype, num_kv_heads=heads[1], needs_lse=True))
    q, k, v, dout = tensors(5, 7, heads, dtype)
    for kind, mask in tensor_masks(5, 7, heads[0]).items():
        got = backend.forward(q, k, v, mask, SCALE)
        gradients = backend.backward(dout, q, k, v, got.out, got.lse, mask, SCALE)
        assert got.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert [x.dtype for x in (got.out, *gradients)] == [dtype] * 4
        names = ("out", "lse", "dq", "dk", "dv")
        for part, x, expected in zip(names, (got.out, got.lse, *gradients), reference(q, k, v, dout, mask), strict=True):
            scale = expected[expected.isfinite()].abs().max().clamp(min=1.0)
            error = (x.double() - expected).masked_fill(x.double() == expected, 0.0).abs().max() / scale  # -inf equals -inf
            assert error <= TOLERANCES[dtype], f"{part} with mask {kind}: {error:.1e}"


@pytest.mark.parametrize("name", LSE_BACKENDS)
def test_dead_rows(name):
    """out 0, lse -inf, no gradient; and a live row whose lse is 0.0 is not taken for dead."""
    backend = choose(name, SPEC)
    q, k, v, dout = tensors(3, 4, (1, 1))
    q[:, 1] = 0.0  # all logits 0; one visible key: lse = log 1 = 0
    mask = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 1]]).bool()
    got = backend.forward(q, k, v, mask, SCALE)
    assert (got.lse[..., 0] == -torch.inf).all()
    assert (got.lse[..., 1] == 0.0).all()
    assert not got.out[:, 0].any()
    torch.testing.assert_close(got.out[:, 1], v[:, 1])
    dq, dk, dv = backend.backward(dout, q, k, v, got.out, got.lse, mask, SCALE)
    assert not dq[:, 0].any()
    assert not dk[:, 2].any()
    assert not dv[:, 2].any()
    alive = backend.backward(dout[:, 1:], q[:, 1:], k, v, got.out[:, 1:], got.lse[..., 1:], mask[1:], SCALE)
    torch.testing.assert_close((dk, dv), alive[1:])


@pytest.mark.parametrize("name", LSE_BACKENDS)
def test_empty_blocks(name):
    """No queries, no keys, no samples: zeros of the right shape, where the CPU kernel of PyTorch would end the process."""
    backend = choose(name, SPEC)
    for num_queries, num_keys, batch_size in [(0, 7, 2), (5, 0, 2), (0, 0, 2), (5, 7, 0)]:
        q, k, v, dout = tensors(num_queries, num_keys, batch_size=batch_size)
        got = backend.forward(q, k, v, None, SCALE)
        assert got.lse.shape == (batch_size, 4, num_queries)
        assert (got.lse == -torch.inf).all()
        assert not got.out.any()
        gradients = backend.backward(dout, q, k, v, got.out, got.lse, None, SCALE)
        assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]
        assert not any(x.any() for x in gradients)


# --- blocks merge to the whole ------------------------------------------------------------------------------------------


def blockwise(backend, q, k, v, dout, rule, layout):
    """Forward and backward as a ring would: each part's queries over each part's keys."""
    parts = range(len(layout.lengths))
    split = [[layout.split(x, 1, part) for part in parts] for x in (q, k, v, dout)]
    outs, lses, gradients = [], [], [[torch.zeros_like(x) for x in column] for column in split[:3]]
    for i in parts:
        blocks = [(j, rule.block(layout.positions(i), layout.positions(j))) for j in parts]
        blocks = [
            (j, None if isinstance(block, str) else block)
            for j, block in blocks
            if not isinstance(block, str) or block == "full"
        ]
        total = shared.nothing_seen(split[0][i])
        for j, block in blocks:
            piece = backend.forward(split[0][i], split[1][j], split[2][j], block, SCALE)
            total = merge(total.out, total.lse, piece.out, piece.lse)
        for j, block in blocks:
            operands = (split[3][i], split[0][i], split[1][j], split[2][j], total.out, total.lse)
            for column, index, gradient in zip(gradients, (i, j, j), backend.backward(*operands, block, SCALE), strict=True):
                column[index] += gradient
        outs.append(total.out)
        lses.append(total.lse.transpose(1, 2))
    return [layout.join(column, 1) for column in (outs, lses, *gradients)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LSE_BACKENDS)
def test_blocks_merge_to_the_whole_for_every_layout(name, rule):
    backend, mask = choose(name, SPEC), RULES[rule]
    q, k, v, dout = tensors()
    positions = torch.arange(LENGTH)
    expected = reference(q, k, v, dout, mask.dense(positions, positions))
    for layout_name, layout in LAYOUTS.items():
        out, lse, *gradients = blockwise(backend, q, k, v, dout, mask, layout)
        for x, wanted in zip((out, lse.transpose(1, 2), *gradients), expected, strict=True):
            torch.testing.assert_close(x, wanted, rtol=0, atol=1e-12, msg=lambda text, at=layout_name: f"{at}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_in_any_order(dtype):
    """Five blocks, one of which a row sees nothing of: permutations agree to 1e-6, and are the softmax over all keys."""
    q, k, v, dout = tensors(6, 25, dtype=dtype)
    pieces = [MATH.forward(q, keys, values, None, SCALE) for keys, values in zip(k.split(5, 1), v.split(5, 1), strict=True)]
    hidden = torch.ones(6, 5, dtype=torch.bool)
    hidden[2] = False
    pieces[3] = MATH.forward(q, k[:, 15:20], v[:, 15:20], hidden, SCALE)
    results = []
    for seed in range(6):
        total = shared.nothing_seen(q)
        for index in torch.randperm(5, generator=torch.Generator().manual_seed(seed)).tolist():
            total = merge(total.out, total.lse, pieces[index].out, pieces[index].lse)
        results.append(total)
    for other in results[1:]:
        torch.testing.assert_close((other.out, other.lse), (results[0].out, results[0].lse), rtol=0, atol=1e-6)
    whole = torch.ones(6, 25, dtype=torch.bool)
    whole[2, 15:20] = False
    out, lse, *_ = reference(q, k, v, dout, whole)
    assert results[0].out.dtype == torch.float32
    torch.testing.assert_close(results[0].out.double(), out, rtol=0, atol=TOLERANCES[dtype])
    torch.testing.assert_close(results[0].lse.double(), lse, rtol=0, atol=1e-5)


def test_merging_with_nothing_is_the_identity():
    q, k, v, _ = tensors(6, 9)
    piece, nothing = MATH.forward(q, k, v, None, SCALE), shared.nothing_seen(q)
    for a, b in [(piece, nothing), (nothing, piece)]:
        merged = merge(a.out, a.lse, b.out, b.lse)
        assert torch.equal(merged.out, piece.out)
        torch.testing.assert_close(merged.lse, piece.lse, rtol=0, atol=1e-15)
    both = merge(nothing.out, nothing.lse, nothing.out, nothing.lse)
    assert not both.out.any()
    assert (both.lse == -torch.inf).all()
    far = merge(piece.out, piece.lse + 1e4, piece.out, piece.lse - 1e4)  # exp would overflow
    torch.testing.assert_close(far.out, piece.out)


# --- whole sequences ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize("name", working(AttentionSpec(4, WIDTH, needs_grad=False)))
def test_calls_with_a_rule_against_dense_autograd(name, heads, rule):
    q, k, v, dout = tensors(heads=heads)
    backend, mask, positions = lookup(ATTENTION_BACKENDS, name, "attention backend"), RULES[rule], torch.arange(LENGTH)
    out, _, *expected = reference(q, k, v, dout, mask.dense(positions, positions), WIDTH**-0.5)
    if backend.supports(AttentionSpec(4, WIDTH)) is not None:  # flex on the CPU: no gradients
        torch.testing.assert_close(backend(q, k, v, mask), out, rtol=0, atol=1e-12)
        return
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    got = backend(q, k, v, mask)
    torch.testing.assert_close(got, out, rtol=0, atol=1e-12)
    for gradient, wanted in zip(torch.autograd.grad(got, (q, k, v), dout), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("name", working(MASKED))
def test_calls_with_a_tensor_against_the_definition(name, kind):
    q, k, v, dout = tensors(5, 7, (6, 3))
    keep = tensor_masks(5, 7, 6)["of each head"]
    mask = {"none": None, "bool": keep, "float": shared.additive(keep, torch.float32)}[kind]
    out, _, *expected = reference(q, k, v, dout, None if mask is None else keep, WIDTH**-0.5)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    got = choose(name, MASKED)(q, k, v, mask)
    torch.testing.assert_close(got, out, rtol=0, atol=1e-12)
    for gradient, wanted in zip(torch.autograd.grad(got, (q, k, v), dout), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)


def test_the_definition_against_a_loop():
    """softmax(q k / sqrt(8)) v for one query of one head, from plain Python."""
    q, k, v, _ = tensors(5, 7, (3, 3))
    logits = torch.stack([(q[1, 2, 1] * k[1, s, 1]).sum() / 8**0.5 for s in range(7)])
    expected = (logits.exp() / logits.exp().sum()) @ v[1, :, 1]
    torch.testing.assert_close(MATH(q, k, v)[1, 2, 1], expected)


def test_documents_do_not_touch_each_other():
    """Not even through NaN, which a mask over all pairs would spread (0 * NaN)."""
    q, k, v, _ = tensors()
    k[:, 20:], v[:, 20:] = torch.nan, torch.nan
    out = SDPA(q, k, v, MaskSpec.documents([20, 9]))
    assert out[:, :20].isfinite().all()
    assert out[:, 20:].isnan().all()


def test_many_small_chunks_become_one_mask():
    length = 2 * MAX_CHUNKS + 2
    q, k, v, _ = tensors(length, length)
    mask, positions = MaskSpec.block_causal(2, length), torch.arange(length)
    torch.testing.assert_close(SDPA(q, k, v, mask), MATH(q, k, v, mask.dense(positions, positions)), rtol=0, atol=1e-12)


def test_a_mask_kept_from_validation_serves_training():
    """A tensor made in inference mode cannot be saved for a backward pass, so none is kept."""
    mask, device = MaskSpec.causal(window=5, num_sink=1), torch.device("cpu")
    with torch.inference_mode():
        kept, blocks = dense_mask(mask, 30, device), block_mask(mask, 30, 30, device)
    assert not kept.is_inference()
    assert not blocks.kv_indices.is_inference()
    assert dense_mask(mask, 30, device) is kept
    assert block_mask(mask, 30, 30, device) is blocks


def test_a_call_without_a_mask_is_pytorchs_own():
    """Bitwise, and with nothing between: one graph node for the kernel and one for each transpose."""
    q, k, v, _ = (x.requires_grad_() for x in tensors(heads=(4, 4), dtype=torch.float32))
    out = SDPA(q, k, v, None)
    assert torch.equal(out, scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2))
    kernel = out.grad_fn.next_functions[0][0]
    assert "ScaledDotProductFlashAttentionForCpu" in kernel.name()
    assert [node.name() for node, _ in kernel.next_functions if node] == ["TransposeBackward0"] * 3


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "full"])
def test_block_masks_of_flex(rule):
    """Blocks listed as full are full, those left out are empty, in a sequence of three blocks and a bit."""
    length = 400
    lengths = {
        "documents": [128, 40, 232],
        "causal documents": [128, 40, 232],
        "padding": [length, 130],
        "a sample of nothing": [0, 256],
    }
    rules = {
        "causal": MaskSpec.causal(),
        "causal, window": MaskSpec.causal(window=150, num_sink=9),
        "block causal": MaskSpec.block_causal(128, length),
        "block causal, window": MaskSpec.block_causal(64, length, window=100, num_sink=130),
    }
    mask = rules.get(rule) or MaskSpec(RULES[rule].kind, tuple(lengths[rule]), RULES[rule].is_causal)
    positions = torch.arange(length)
    dense = mask.dense(positions, positions).expand(-1 if mask.is_per_sample else 1, 1, length, length)
    blocks = block_mask(mask, length, length, torch.device("cpu"))
    assert torch.equal(
        blocks.to_dense().bool(),
        torch.nn.functional.pad(dense, (0, 112, 0, 112)).unfold(2, 128, 128).unfold(3, 128, 128).flatten(4).any(-1),
    )
    assert blocks.shape[-2:] == (length, length)
    for b in range(dense.shape[0]):
        for row in range(4):
            full = blocks.full_kv_indices[b, 0, row, : blocks.full_kv_num_blocks[b, 0, row]]
            for column in full.tolist():
                assert dense[b, 0, row * 128 : row * 128 + 128, column * 128 : column * 128 + 128].all()


# --- choice -------------------------------------------------------------------------------------------------------------


def test_auto_takes_the_best_that_works_here():
    assert choose("auto", SPEC).name == "sdpa"


def test_flex_names_its_limits():
    half = {"dtype": torch.bfloat16, "device_type": "cuda"}
    assert "no gradients on cpu" in FLEX.supports(AttentionSpec(2, 64))
    assert FLEX.supports(AttentionSpec(2, 64, needs_grad=False)) is None
    assert "not as tensors" in FLEX.supports(AttentionSpec(2, 64, has_mask=True))
    assert "no gradients of partial results" in FLEX.supports(AttentionSpec(2, 64, **half, needs_lse=True))
    assert "not on mps" in FLEX.supports(AttentionSpec(2, 64, device_type="mps"))
    assert "no float64 on cuda" in FLEX.supports(AttentionSpec(2, 64, torch.float64, "cuda"))
    assert "16 or more, not 8" in FLEX.supports(AttentionSpec(2, 8, **half))
    assert FLEX.supports(AttentionSpec(2, 64, **half)) is None
    q, k, v, dout = tensors()
    with pytest.raises(ConfigError, match="flex takes masks by name"):
        FLEX(q, k, v, torch.ones(LENGTH, LENGTH, dtype=torch.bool))
    with pytest.raises(ConfigError, match="flex: it gives no gradients of partial results"):
        FLEX.forward(q, k, v, None, SCALE)
    with pytest.raises(ConfigError, match="flex: it gives no gradients of partial results"):
        FLEX.backward(dout, q, k, v, q, q, None, SCALE)


def test_sdpa_names_the_limits_of_its_partial_results():
    spec = {"num_heads": 2, "needs_lse": True}
    assert SDPA.supports(AttentionSpec(head_width=7, **spec)) is None
    assert SDPA.supports(AttentionSpec(2, 7, torch.float64, "cuda")) is None
    assert "on mps" in SDPA.supports(AttentionSpec(head_width=8, device_type="mps", **spec))
    assert "no float64" in SDPA.supports(AttentionSpec(head_width=8, device_type="cuda", dtype=torch.float64, **spec))
    assert "multiple of 8, not 7" in SDPA.supports(AttentionSpec(head_width=7, device_type="cuda", **spec))


def test_mistakes_are_taught():
    with pytest.raises(ConfigError, match="no attention backend is called 'sdap', did you mean 'sdpa'"):
        choose("sdap", SPEC)
    with pytest.raises(ConfigError, match="6 heads cannot share 4 heads of keys and values: give a divisor of 6"):
        AttentionSpec(6, 8, num_kv_heads=4)
    with pytest.raises(ConfigError, match=r"on cpu, with no mask, merging partial results\. flex: it gives no gradients"):
        choose("flex", AttentionSpec(2, 8, needs_lse=True, needs_grad=False))
    q, k, v, _ = tensors(5, 7)
    with pytest.raises(ParallelError, match="causal between 5 queries and 7 keys: without positions it is for self-attention"):
        SDPA(q, k, v, MaskSpec.causal())
    with pytest.raises(ParallelError, match="lengths of documents add up to 6, but the sequence has 7 tokens"):
        SDPA(q, k, v, MaskSpec.documents([2, 4]))
    with pytest.raises(ParallelError, match="lengths of 3 samples, but the batch has 2"):
        SDPA(q, k, v, MaskSpec.key_padding([2, 4, 5]))
