"""Masks against their definition, pair by pair in plain Python."""

import pytest
import torch

from videofm.attention.masks import MaskSpec
from videofm.attention.whole import MAX_CHUNKS
from videofm.errors import ParallelError

LENGTH = 23
MASKS = {
    "full": MaskSpec.full(),
    "causal": MaskSpec.causal(),
    "causal, window": MaskSpec.causal(window=4, num_sink=2),
    "block causal": MaskSpec.block_causal(5, LENGTH),
    "block causal, listed": MaskSpec.block_causal([3, 10, 10]),
    "block causal, window": MaskSpec.block_causal([3, 10, 10], window=12, num_sink=2),
    "block causal, window of a chunk, long sinks": MaskSpec.block_causal(5, LENGTH, window=5, num_sink=7),
    "documents": MaskSpec.documents([0, 5, 8, 10]),
    "causal documents": MaskSpec.documents([20, 3], causal=True),
    "documents, then padding": MaskSpec.documents([4, 9]),
    "chunks, then padding": MaskSpec.block_causal([5, 5], window=5, num_sink=2),
}


def sees(mask, i, j):
    """The definition: chunk or document of i by walking over the lengths."""
    if mask.kind == "full":
        return True
    end, start = i + 1, 0
    if mask.kind != "causal":
        end, found = 0, False
        for length in mask.lengths:
            start, end = end, end + length
            if start <= i < end:
                found = True
                break
        if not found:
            return False
        if mask.kind == "documents":
            return start <= j < end and (j <= i or not mask.is_causal)
    return j < end and (mask.window is None or j >= end - mask.window or j < mask.num_sink)


def blocks():
    """Positions of queries and keys: everything, consecutive pieces, shuffled subsets, nothing."""
    generator = torch.Generator().manual_seed(0)
    everything, nothing = torch.arange(LENGTH), torch.arange(0)
    yield from [(everything, everything), (nothing, everything), (everything, nothing), (torch.tensor([3]), torch.arange(2, 4))]
    for _ in range(15):
        a, b, c, d = torch.randint(0, LENGTH + 1, (4,), generator=generator).tolist()
        yield torch.arange(min(a, b), max(a, b)), torch.arange(min(c, d), max(c, d))
        yield torch.randperm(LENGTH, generator=generator)[:a], torch.randperm(LENGTH, generator=generator)[:b]


@pytest.mark.parametrize("name", MASKS)
def test_dense_block_and_counts_against_the_definition(name):
    mask, kinds = MASKS[name], set()
    for queries, keys in blocks():
        pairs = [[sees(mask, i, j) for j in keys.tolist()] for i in queries.tolist()]
        expected = torch.tensor(pairs, dtype=torch.bool).reshape(len(queries), len(keys))
        assert torch.equal(mask.dense(queries, keys), expected)
        assert mask.num_pairs_between(queries, keys, batch_size=3) == 3 * expected.sum()
        block = mask.block(queries, keys)
        if isinstance(block, str):
            assert not expected.any() if block == "empty" else expected.all()
        else:
            assert torch.equal(block, expected)
            assert expected.any()
            assert not expected.all()
        kinds.add(block if isinstance(block, str) else "cut")
    assert kinds == ({"full", "empty"} if name == "full" else {"full", "empty", "cut"})


def test_key_padding_against_the_definition():
    mask, queries = MaskSpec.key_padding([6, 0, 9]), torch.arange(4)
    for keys in (torch.arange(9), torch.arange(3, 8), torch.tensor([5, 0, 7])):
        expected = torch.tensor([[j < length for j in keys.tolist()] for length in (6, 0, 9)])
        assert torch.equal(mask.dense(queries, keys), expected[:, None, None])
        assert torch.equal(mask.block(queries, keys), expected[:, None, None])
        assert mask.num_pairs_between(queries, keys, 3) == 4 * expected.sum()
    assert mask.block(queries, torch.arange(9, 12)) == "empty"
    assert MaskSpec.key_padding([6, 7]).block(queries, torch.arange(6)) == "full"
    assert mask.num_pairs(9, batch_size=3) == 9 * (6 + 0 + 9)


def test_num_pairs_by_closed_form():
    assert MaskSpec.full().num_pairs(10, 2) == 200
    assert MaskSpec.causal().num_pairs(10, 2) == 110
    assert MaskSpec.block_causal(5, 10).num_pairs(10) == 75
    assert MaskSpec.documents([3, 7]).num_pairs(10) == 9 + 49
    assert MaskSpec.causal(window=4).num_pairs(10) == 1 + 2 + 3 + 4 * 7
    assert MaskSpec.causal(window=4, num_sink=1).num_pairs(10) == 1 + 2 + 3 + 4 + 5 * 6


@pytest.mark.parametrize("mask", [*MASKS.values(), MaskSpec.key_padding([6, 0, 9])])
def test_text_is_inverse_and_specs_are_keys(mask):
    again = MaskSpec.from_text(mask.to_text())
    assert again == mask
    assert hash(again) == hash(mask)
    assert MaskSpec.from_text(mask.to_text()) is again


def test_a_block_is_decided_without_its_matrix():
    """A block of 2e5 x 2e5 pairs would need 40 GB."""
    early, late = torch.arange(200_000), torch.arange(200_000, 400_000)
    mask = MaskSpec.block_causal(1000, 400_000)
    assert mask.block(late, early) == "full"
    assert mask.block(early, late) == "empty"
    assert MaskSpec.documents([100_000, 300_000]).block(early[:100_000], late) == "empty"
    assert len(mask.lengths) > MAX_CHUNKS  # the control: such a mask would be dense where it is not cut in blocks


def test_mistakes_are_taught():
    with pytest.raises(ParallelError, match="block_causal with chunks of 5 tokens: give the `length`"):
        MaskSpec.block_causal(5)
    with pytest.raises(ParallelError, match=r"chunks of \[5, 4\] tokens add up to 9: .* the 10 tokens"):
        MaskSpec.block_causal([5, 4], 10)
    with pytest.raises(ParallelError, match="a window of 4 tokens is smaller than a chunk of 5"):
        MaskSpec.block_causal(5, 10, window=4)
    with pytest.raises(ParallelError, match="a window of 0 tokens is smaller than a chunk of 1"):
        MaskSpec.causal(window=0)
    with pytest.raises(ParallelError, match="num_sink=2 with window=None: sinks are 0 or more first tokens"):
        MaskSpec.causal(num_sink=2)
    with pytest.raises(ParallelError, match=r"documents of \[3, -1\] tokens: lengths are 0 or more"):
        MaskSpec.documents([3, -1])
    with pytest.raises(ParallelError, match="lengths of documents add up to 13, but the sequence has 23 tokens"):
        MaskSpec.documents([4, 9]).check(23)
    with pytest.raises(ParallelError, match="lengths of 2 samples, but the batch has 3"):
        MaskSpec.key_padding([4, 9]).check(9, 3)
    with pytest.raises(ParallelError, match="a sample of 9 tokens, but sequences have 8"):
        MaskSpec.key_padding([4, 9]).check(8)
    with pytest.raises(ParallelError, match="lengths of block_causal add up to 10, but the sequence has 12"):
        MaskSpec.block_causal(5, 10).num_pairs(12)
