"""A rollout by chunks equals one masked pass over the whole sequence, to rounding, outputs and gradients."""

import pytest
import torch

from videofm.attention.backends.math import BACKEND as MATH
from videofm.attention.backends.sdpa import BACKEND as SDPA
from videofm.attention.kv_cache import KVCache
from videofm.attention.masks import MaskSpec
from videofm.errors import ConfigError

CASES = {
    "everything": ([4, 4, 4, 3], None, 0),
    "window": ([4, 4, 4, 3], 6, 0),
    "window and sinks": ([4, 4, 4, 3], 6, 3),
    "sinks longer than the first chunk": ([2, 4, 4, 4], 5, 5),
    "window of one chunk": ([4, 4, 4], 4, 1),
    "sinks that cover all": ([4, 4, 4], 4, 20),
    "tokens": ([1] * 9, 3, 2),
    "uneven": ([1, 5, 2, 6], 7, 2),
}


def sequence(length, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, length, heads, 8) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad) for shape in shapes]


def rollout(q, k, v, chunks, window, num_sink, backend=MATH):
    cache, outs = KVCache.empty(k, window, num_sink), []
    for q_chunk, k_chunk, v_chunk in zip(*(x.split(chunks, dim=1) for x in (q, k, v)), strict=True):
        cache = cache.extend(k_chunk, v_chunk)
        outs.append(backend(q_chunk, cache.k, cache.v))
    return torch.cat(outs, dim=1), cache


@pytest.mark.parametrize("backend", [MATH, SDPA], ids=lambda backend: backend.name)
@pytest.mark.parametrize("case", CASES)
def test_a_rollout_is_the_masked_pass(case, backend):
    chunks, window, num_sink = CASES[case]
    q, k, v = sequence(sum(chunks), requires_grad=True)
    mask = MaskSpec.block_causal(chunks, window=window, num_sink=num_sink)
    positions = torch.arange(sum(chunks))
    expected = MATH(q, k, v, mask.dense(positions, positions))
    rolled, _ = rollout(q, k, v, chunks, window, num_sink, backend)
    torch.testing.assert_close(rolled, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(backend(q, k, v, mask), expected, rtol=0, atol=1e-12)
    dout = torch.randn_like(expected)
    for got, wanted in zip(*(torch.autograd.grad(out, (q, k, v), dout) for out in (rolled, expected)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_a_cache_holds_what_the_mask_shows(case):
    """Keys that say their position: those held are those that the last chunk sees, in order."""
    chunks, window, num_sink = CASES[case]
    length = sum(chunks)
    keys = torch.arange(length, dtype=torch.float64).view(1, -1, 1, 1)
    _, cache = rollout(keys, keys, keys, chunks, window, num_sink)
    shown = MaskSpec.block_causal(chunks, window=window, num_sink=num_sink).dense(
        torch.tensor([length - 1]), torch.arange(length)
    )
    assert torch.equal(cache.positions, shown[0].nonzero().flatten())
    assert torch.equal(cache.k.flatten(), cache.positions.double())
    assert torch.equal(cache.v, cache.k)
    assert cache.num_seen == length


def test_a_cache_is_a_value():
    """Many denoising steps extend the same cache; none of them changes it."""
    q, k, v = sequence(8)
    cache = KVCache.empty(k, window=6).extend(k[:, :4], v[:, :4])
    before = cache.k.clone()
    first = cache.extend(k[:, 4:], v[:, 4:])
    cache.extend(torch.zeros_like(k[:, 4:]), v[:, 4:])
    again = cache.extend(k[:, 4:], v[:, 4:])
    assert torch.equal(cache.k, before)
    assert torch.equal(first.k, again.k)
    assert torch.equal(first.rows(torch.tensor([1, 1])).k, first.k[1:].expand(2, -1, -1, -1))


def test_mistakes_are_taught():
    _, k, v = sequence(8)
    with pytest.raises(ConfigError, match="a chunk of 5 tokens does not fit a window of 4"):
        KVCache.empty(k, window=4).extend(k[:, :5], v[:, :5])
    with pytest.raises(ConfigError, match="a window of 0 tokens: it holds at least the chunk"):
        KVCache.empty(k, window=0)
    with pytest.raises(ConfigError, match="num_sink=2 with window=None"):
        KVCache.empty(k, num_sink=2)
    with pytest.raises(
        ConfigError, match=r"keys \(1, 8, 2, 8\) and values \(2, 8, 2, 8\) do not continue a cache of \(2, 0, 2, 8\)"
    ):
        KVCache.empty(k).extend(k[:1], v)
