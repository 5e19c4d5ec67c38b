"""A layout deals each position to one part, whatever the numbers; split and join are inverse, and balanced layouts are even."""

import pytest
import torch

from videofm.attention.layout import SequenceLayout
from videofm.attention.masks import MaskSpec
from videofm.errors import ParallelError

LENGTHS = (0, 1, 7, 101, 103)
PARTS = (1, 2, 3, 4)


def layouts(length, num_parts, num_inner):
    documents = [3] * (length // 3) + [length % 3]
    return {
        "contiguous": SequenceLayout.contiguous(length, num_parts, num_inner),
        "zigzag": SequenceLayout.zigzag(length, num_parts, num_inner),
        "striped": SequenceLayout.striped(length, num_parts, num_inner),
        "chunk_zigzag": SequenceLayout.chunk_zigzag(length, num_parts, 5, num_inner),
        "cuts": SequenceLayout.balanced(documents, num_parts, num_inner=num_inner),
        "causal cuts": SequenceLayout.balanced(documents, num_parts, causal=True, token_cost=2, num_inner=num_inner),
        "whole documents": SequenceLayout.balanced(documents, num_parts, whole=True, num_inner=num_inner),
    }


@pytest.mark.parametrize("num_inner", [1, 3])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_layout_is_a_partition_and_join_undoes_split(length, num_inner):
    x = torch.randn(2, length, 3)
    for num_parts in PARTS:
        for name, layout in layouts(length, num_parts, num_inner).items():
            case = f"{name}, {length} tokens, {num_parts} x {num_inner}"
            positions = [layout.positions(part) for part in range(num_parts * num_inner)]
            assert sorted(torch.cat(positions).tolist()) == list(range(length)), case
            assert layout.lengths == tuple(map(len, positions)), case
            parts = [layout.split(x, 1, part) for part in range(len(positions))]
            for part, index in zip(parts, positions, strict=True):
                assert torch.equal(part, x[:, index]), case
            assert torch.equal(layout.join(parts, 1), x), case
            assert SequenceLayout.from_text(layout.to_text()) == layout, case


def test_inner_pieces_are_consecutive_pieces_of_the_outer_part():
    """Rank = ring rank * num_inner + ulysses rank: pieces 2 and 3 of a 3 x 2 layout are part 1 of its ring, in order."""
    for name, layout in layouts(103, 3, 2).items():
        outer = layout.outer()
        for part in range(3):
            pieces = torch.cat([layout.positions(2 * part), layout.positions(2 * part + 1)])
            assert torch.equal(pieces, outer.positions(part)), name
        assert all(abs(layout.lengths[2 * part] - layout.lengths[2 * part + 1]) <= 1 for part in range(3)), name


def test_known_layouts():
    """By hand: 10 tokens for 2 parts."""
    parts = {name: [layout.positions(part).tolist() for part in range(2)] for name, layout in layouts(10, 2, 1).items()}
    assert parts["contiguous"] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert parts["zigzag"] == [[0, 1, 7, 8, 9], [2, 3, 4, 5, 6]]
    assert parts["striped"] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    assert parts["chunk_zigzag"] == [[5, 6, 7, 8, 9], [0, 1, 2, 3, 4]]
    assert SequenceLayout.contiguous(3, 4).lengths == (1, 1, 1, 0)


def test_equal_chunks_are_dealt_in_the_zigzag_order():
    assert SequenceLayout.chunk_zigzag(64, 4, 8).outer_parts == SequenceLayout.zigzag(64, 4).outer_parts


def test_gradients_go_through_split_and_join():
    for name, layout in layouts(7, 2, 1).items():
        x = torch.randn(2, 7, 3, requires_grad=True)
        weight = torch.randn(2, 7, 3)
        (layout.join([layout.split(x, 1, part) for part in range(2)], 1) * weight).sum().backward()
        assert torch.equal(x.grad, weight), name


def test_consecutive_tokens_are_split_without_a_copy():
    x = torch.randn(2, 100, 3)
    assert SequenceLayout.contiguous(100, 3).split(x, 1, 1).data_ptr() == x[:, 34:].data_ptr()
    assert SequenceLayout.zigzag(100, 2).split(x, 1, 1)._is_view()  # chunks 1 and 2 are neighbours


def imbalance(layout, mask):
    """The dearest part over the mean, in query-key pairs."""
    everything = torch.arange(layout.length)
    costs = [mask.num_pairs_between(layout.positions(part), everything) for part in range(len(layout.lengths))]
    return max(costs) * len(costs) / sum(costs)


@pytest.mark.parametrize("num_parts", [2, 3, 4])
def test_balanced_layouts_even_out_attention(num_parts):
    """Contiguous parts of a causal sequence are the control: their last one has `2 - 1 / num_parts` times the mean."""
    causal, length = MaskSpec.causal(), 1003
    expected = 2 - 1 / num_parts
    assert imbalance(SequenceLayout.contiguous(length, num_parts), causal) == pytest.approx(expected, rel=0.01)
    assert imbalance(SequenceLayout.zigzag(length, num_parts), causal) < 1.01
    assert imbalance(SequenceLayout.striped(length, num_parts), causal) < 1.01
    chunks = MaskSpec.block_causal(40, length)
    assert imbalance(SequenceLayout.contiguous(length, num_parts), chunks) > 1.3
    assert imbalance(SequenceLayout.chunk_zigzag(length, num_parts, 40), chunks) < 1.07


@pytest.mark.parametrize("is_causal", [False, True])
def test_balanced_documents(is_causal):
    """One long document and many short ones; a part of equal tokens that holds the long one is the control."""
    documents = [400, *[25] * 16, 0, 200]
    mask = MaskSpec.documents(documents, is_causal)
    assert imbalance(SequenceLayout.contiguous(1000, 4), mask) > 1.5
    assert imbalance(SequenceLayout.balanced(documents, 4, causal=is_causal), mask) < 1.02
    packed = [100, 60, 80, 40, 90, 70, 20, 50, 30, 60, 95, 85]
    layout, mask = SequenceLayout.balanced(packed, 3, whole=True, causal=is_causal), MaskSpec.documents(packed, is_causal)
    assert imbalance(layout, mask) < 1.1
    assert all(mask.block(layout.positions(i), layout.positions(j)) == "empty" for i in range(3) for j in range(3) if i != j)


def test_the_rest_of_a_token_counts_in_balance():
    """With a large cost of a token, parts have as many tokens as each other; without it the long document's part has fewer."""
    documents = [300, *[10] * 30]
    by_pairs, by_tokens = (SequenceLayout.balanced(documents, 2, token_cost=cost) for cost in (0, 10**6))
    assert by_tokens.lengths == (300, 300)
    assert by_pairs.lengths == (155, 445)  # 155 * 300 is half of 300 * 300 + 30 * 10 * 10


def test_mistakes_are_taught():
    with pytest.raises(ParallelError, match="cut into 0 parts of 1 pieces: both are 1 or more"):
        SequenceLayout.contiguous(10, 0)
    with pytest.raises(ParallelError, match="cut into 2 parts of 0 pieces"):
        SequenceLayout.zigzag(10, 2, num_inner=0)
    with pytest.raises(ParallelError, match="a sequence layout of -1 tokens: give 0 or more"):
        SequenceLayout(-1, ((),))
    with pytest.raises(ParallelError, match="hold 5: 1 are missing and 1 held twice"):
        SequenceLayout(5, ((range(3),), (range(2, 4),)))
    with pytest.raises(ParallelError, match=r"range\(3, 8\) is not a rising range inside a sequence of 5 tokens"):
        SequenceLayout(5, ((range(3),), (range(3, 8),)))
    with pytest.raises(
        ParallelError, match=r"chunks of \[4, 4\] tokens add up to 8: give lengths of 1 or more that add up to the 10"
    ):
        SequenceLayout.chunk_zigzag(10, 2, [4, 4])
    with pytest.raises(ParallelError, match="chunks of 0 tokens: a chunk has 1 or more"):
        SequenceLayout.chunk_zigzag(10, 2, 0)
    with pytest.raises(ParallelError, match=r"documents of \[3, -1\] tokens: lengths are 0 or more"):
        SequenceLayout.balanced([3, -1], 2)
    layout = SequenceLayout.contiguous(10, 2)
    with pytest.raises(ParallelError, match=r"the sequence has 9 tokens \(dim 1 of \(1, 9\)\), but its layout was made for 10"):
        layout.split(torch.zeros(1, 9), 1, 0)
    with pytest.raises(ParallelError, match=r"parts of \[5, 4\] tokens cannot be joined: the layout has \[5, 5\]"):
        layout.join([torch.zeros(1, 5), torch.zeros(1, 4)], 1)
