"""Packed documents: whose tokens each part of a layout holds, and attention of each document to its own text."""

import pytest
import torch

from videofm.attention import AttentionSpec, Documents, MaskSpec, SequenceLayout, choose
from videofm.attention.documents import attend_to_texts, check_documents
from videofm.errors import DataError, ParallelError
from videofm.types import Conditioning

LENGTHS = (5, 1, 7, 3)


def numbers(documents: Documents) -> list[int]:
    return [number for number, count in documents.pieces for _ in range(count)]


@pytest.mark.parametrize(
    "layout",
    [
        SequenceLayout.contiguous(16, 3),
        SequenceLayout.contiguous(16, 2, 2),
        SequenceLayout.contiguous(16, 16),
        SequenceLayout.zigzag(16, 2),
        SequenceLayout.striped(16, 3),
    ],
)
def test_each_part_of_a_layout_knows_whose_tokens_it_has(layout: SequenceLayout) -> None:
    """Token t of the sequence is of the document that the list of all tokens says."""
    owner = [number for number, length in enumerate(LENGTHS) for _ in range(length)]
    whole = Documents.of(LENGTHS)
    assert numbers(whole) == owner and whole.num_tokens == 16 and whole.mask == MaskSpec.documents(LENGTHS)
    for part in range(len(layout.lengths)):
        mine = whole.split(layout, part)
        assert numbers(mine) == [owner[position] for position in layout.positions(part).tolist()]
        assert mine.mask == whole.mask and mine.lengths == LENGTHS


def test_a_layout_of_another_sequence_is_refused() -> None:
    with pytest.raises(ParallelError, match="add up to 16, but the sequence has 15 tokens"):
        Documents.of(LENGTHS).split(SequenceLayout.contiguous(15, 2), 0)


@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_each_document_sees_its_own_text(backend: str) -> None:
    """The reference: one dense mask between all tokens and all texts laid end to end; also for a part of the tokens."""
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(1, 16, 2, 8, generator=draw)
    k, v = torch.randn(2, 4, 6, 2, 8, generator=draw)
    mask = torch.arange(6) < torch.tensor([6, 1, 3, 5])[:, None]  # (documents, S)
    attend = choose(backend, AttentionSpec(2, 8, has_mask=True))
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    sees = (owner[:, None, None] == torch.arange(4)[:, None]) & mask  # (L, documents, S)
    wanted = choose("math", AttentionSpec(2, 8, has_mask=True))(
        q, k.flatten(0, 1)[None], v.flatten(0, 1)[None], sees.flatten(1)[None, None]
    )
    found = attend_to_texts(attend, q, k, v, mask[:, None, None], Documents.of(LENGTHS))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    layout = SequenceLayout.contiguous(16, 3)
    parts = [
        attend_to_texts(attend, layout.split(q, 1, part), k, v, mask[:, None, None], Documents.of(LENGTHS).split(layout, part))
        for part in range(3)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, rtol=0, atol=1e-6)


def test_documents_of_another_call_are_refused() -> None:
    documents, text = Documents.of(LENGTHS), Conditioning(torch.zeros(4, 2, 8), torch.ones(4, 2, dtype=torch.bool))
    check_documents(None, torch.zeros(3, 9, 4), text)
    check_documents(documents, torch.zeros(1, 16, 4), text)
    with pytest.raises(DataError, match="2 sequences of 16 tokens, but 4 packed documents have 16 at hand"):
        check_documents(documents, torch.zeros(2, 16, 4), text)
    with pytest.raises(DataError, match="1 sequences of 15 tokens, but 4 packed documents have 16"):
        check_documents(documents, torch.zeros(1, 15, 4), text)
    with pytest.raises(DataError, match="4 packed documents come with 3 texts: bring one a document"):
        check_documents(documents, torch.zeros(1, 16, 4), text.rows(slice(3)))
