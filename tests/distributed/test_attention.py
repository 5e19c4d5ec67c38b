"""Attention over several ranks against dense attention on one: results, gradients, what is sent, and what happens on failure.

All ranks draw the same whole tensors from a seed, call a strategy with their tokens, and compare their part with a dense
softmax written out here in float64. One spawn serves many cases; a case reports its largest error, and the test its name.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache, partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import run_distributed
from videofm.attention.layout import SequenceLayout
from videofm.attention.masks import MaskSpec
from videofm.attention.strategies.place import SequencePlace
from videofm.errors import ConfigError, ParallelError
from videofm.registry import ATTENTION_BACKENDS, ATTENTION_STRATEGIES, lookup

TIMEOUT = timedelta(seconds=20)
BATCH, WIDTH = 2, 8
DISTRIBUTED = ("ulysses", "allgather_kv", "ring", "unified")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


# --- the cases ----------------------------------------------------------------------------------------------------------------


def mask_of(kind: str, length: int) -> MaskSpec | None:
    """A mask by name; documents and chunks of uneven lengths, one document empty, one sample of padding only."""
    chunks = [min(5 + 3 * (i % 2), length - start) for i, start in enumerate(starts_of(length))]
    documents = [length // 3, 0, length - length // 3 - length // 5, length // 5]
    return {
        "full": None,
        "causal": MaskSpec.causal(),
        "window": MaskSpec.causal(window=4, num_sink=2),
        "block_causal": MaskSpec.block_causal(chunks),
        "documents": MaskSpec.documents(documents),
        "causal_documents": MaskSpec.documents(documents, causal=True),
        "key_padding": MaskSpec.key_padding([length // 2, 0]),
    }[kind]


def starts_of(length: int) -> Iterator[int]:
    """Starts of chunks of 5, 8, 5, 8, ... tokens."""
    start = 0
    for i in itertools.count():
        if start >= length:
            return
        yield start
        start += 5 + 3 * (i % 2)


def layout_of(kind: str, length: int, num_parts: int, num_inner: int) -> SequenceLayout:
    """A layout by name; `lopsided` leaves the second part without tokens."""
    if kind == "chunk_zigzag":
        return SequenceLayout.chunk_zigzag(length, num_parts, 6, num_inner)
    if kind == "balanced":
        return SequenceLayout.balanced([length // 3, length - length // 3], num_parts, whole=True, num_inner=num_inner)
    if kind == "lopsided":
        cut = length // 2
        parts = ((range(cut),), (), (range(cut, length),)) if num_parts > 2 else ((range(length),), ())
        return SequenceLayout(length, (*parts, *((),) * (num_parts - len(parts))), num_inner)
    return getattr(SequenceLayout, kind)(length, num_parts, num_inner)


def allowed(mask: MaskSpec | None, length: int) -> torch.Tensor:
    """The mask by its definition, pair by pair `(B or 1, L, L)`; written here so that it shares nothing with the code."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    if mask is None:
        return torch.ones(1, length, length, dtype=torch.bool)
    segment = torch.tensor([n for n, size in enumerate(mask.lengths) for _ in range(size)])
    if mask.kind == "causal":
        seen = j <= i
        return (seen if mask.window is None else seen & ((j > i - mask.window) | (j < mask.num_sink)))[None]
    if mask.kind == "block_causal":
        return (segment[None, :] <= segment[:, None])[None]
    if mask.kind == "documents":
        return ((segment[None, :] == segment[:, None]) & ((j <= i) | (not mask.is_causal)))[None]
    return torch.stack([(j < size).expand(length, length) for size in mask.lengths])


def tensors(length: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and the gradient of the result, the same on each rank."""
    generator = torch.Generator().manual_seed(length + num_heads)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    return [torch.randn(BATCH, length, n, WIDTH, generator=generator, dtype=torch.float64).to(dtype) for n in heads]


def dense(q, k, v, dout, seen) -> list[torch.Tensor]:
    """out, dq, dk and dv in float64; a row that sees nothing has out 0."""
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    q, k, v = leaves
    repeats = q.shape[2] // k.shape[2]
    wide_k, wide_v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    logits = torch.einsum("bqnk,bsnk->bnqs", q, wide_k) / WIDTH**0.5
    dead = ~seen[:, None].any(dim=-1, keepdim=True)
    weights = logits.masked_fill(~(seen[:, None] | dead), -torch.inf).softmax(dim=-1).masked_fill(dead, 0.0)
    out = torch.einsum("bnqs,bsnk->bqnk", weights, wide_v)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@lru_cache(maxsize=256)
def reference(mask: str, length: int, heads: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """What `dense` makes of the tensors of a case."""
    return dense(*tensors(length, *heads, dtype), allowed(mask_of(mask, length), length))


class Groups:
    """All groups that the cases need, made once and in the same order on each rank."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.world = dist.new_group(timeout=TIMEOUT)
        self.rank, self.world_size, self.grids = rank, world_size, {}
        for degree in (n for n in (1, 2, 4) if world_size % n == 0):
            rows = [list(range(start, start + degree)) for start in range(0, world_size, degree)]
            columns = [list(range(start, world_size, degree)) for start in range(degree)]
            self.grids[degree] = [self._own(ranks) for ranks in (rows, columns)]

    def _own(self, all_ranks: list[list[int]]) -> dist.ProcessGroup:
        groups = [dist.new_group(ranks, timeout=TIMEOUT) for ranks in all_ranks]
        return next(group for group, ranks in zip(groups, all_ranks, strict=True) if self.rank in ranks)

    def place(self, ulysses_degree: int | None) -> SequencePlace:
        """One axis, or a grid."""
        return SequencePlace(self.world, *self.grids[ulysses_degree]) if ulysses_degree else SequencePlace(self.world)


def attention(strategy: str, backend: str, place: SequencePlace):
    """The strategy, wrapped."""
    return lookup(ATTENTION_STRATEGIES, strategy, "strategy").wrap(lookup(ATTENTION_BACKENDS, backend, "backend"), place)


def error_of(
    groups: Groups, strategy: str, mask: str, layout: str, backend: str, length: int, dtype: torch.dtype,
    heads: tuple[int, int] = (4, 4), ulysses_degree: int | None = None,
) -> float:  # fmt: skip
    """The largest error of this rank's out, dq, dk and dv: absolute, and relative where values exceed 1."""
    if strategy == "unified" and ulysses_degree is None:
        ulysses_degree = 2
    num_inner = ulysses_degree or 1
    place = groups.place(ulysses_degree)
    place.layout = layout_of(layout, length, groups.world_size // num_inner, num_inner)
    spec, whole = mask_of(mask, length), tensors(length, *heads, dtype)
    *qkv, dout = (place.layout.split(x, 1, groups.rank) for x in whole)
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = attention(strategy, backend, place)(*leaves, spec)
    got = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    expected = [place.layout.split(x, 1, groups.rank) for x in reference(mask, length, heads, dtype)]
    assert all(x.shape == y.shape and x.dtype == dtype for x, y in zip(got, expected, strict=True))
    differences = [(x.double() - y).abs() / y.abs().clamp(min=1.0) for x, y in zip(got, expected, strict=True) if x.numel()]
    return max((float(d.max()) if bool(d.isfinite().all()) else float("inf") for d in differences), default=0.0)


def errors(rank: int, world_size: int, cases: list[tuple]) -> list[float]:
    """In a fresh process: the error of each case."""
    groups = Groups(rank, world_size)
    return [error_of(groups, *case) for case in cases]


def check(world_size: int, cases: list[tuple]) -> None:
    """Each case on each rank is as exact as its dtype allows."""
    by_rank = run_distributed(errors, world_size, cases)
    wrong = [
        f"{case} rank {rank}: {error:.1e}"
        for case, *by_case in zip(cases, *by_rank, strict=True)
        for rank, error in enumerate(by_case)
        if not error <= TOLERANCE[case[5]]
    ]
    assert not wrong, "\n".join(wrong)


MASKS = ("full", "causal", "window", "block_causal", "documents", "causal_documents", "key_padding")
LAYOUTS = ("contiguous", "zigzag", "striped", "chunk_zigzag", "balanced", "lopsided")


def test_four_ranks_compute_what_one_does():
    """Strategies x masks x layouts x lengths below, at and above the number of ranks, both backends and both exact dtypes."""
    cases = []
    for i, (strategy, mask, layout) in enumerate(itertools.product(DISTRIBUTED, MASKS, LAYOUTS)):
        lengths = (1, 7, 101, 103) if layout in LAYOUTS[:2] else ((1, 103), (7, 101))[i % 2]
        for j, length in enumerate(lengths):
            backend = ("math", "sdpa")[(i // 2 + j + j // 2) % 2]
            dtype = (torch.float32, torch.float64)[(i // 3 + j // 2) % 2]
            cases.append((strategy, mask, layout, backend, length, dtype))
    check(4, cases)


def test_heads_ranks_and_precisions():
    """Heads that share keys, heads that do not divide, ranks without heads; grids of 1 x 4 and 4 x 1; bfloat16."""
    cases = []
    heads = [(8, 2), (8, 1), (6, 3), (6, 2), (12, 3), (3, 3), (3, 1), (5, 5), (1, 1)]
    for strategy, (i, head) in itertools.product(DISTRIBUTED, enumerate(heads)):
        for mask, backend in (("full", "sdpa"), ("causal", "math")):
            cases.append((strategy, mask, "zigzag", backend, 13, (torch.float64, torch.float32)[i % 2], head))
    cases += [("unified", mask, "zigzag", "math", 23, torch.float64, (4, 2), degree) for mask in MASKS for degree in (1, 4)]
    cases += [
        (strategy, mask, "contiguous", backend, 101, torch.bfloat16)
        for strategy, mask, backend in itertools.product(DISTRIBUTED, ("full", "block_causal"), ("math", "sdpa"))
    ]
    check(4, cases)


def test_two_ranks_and_one():
    for world_size in (2, 1):
        check(
            world_size,
            [
                (strategy, mask, layout, backend, 7, torch.float64)
                for strategy, mask, layout, backend in itertools.product(
                    DISTRIBUTED if world_size > 1 else DISTRIBUTED[:3], MASKS, ("contiguous", "zigzag"), ("math", "sdpa")
                )
            ],
        )


# --- bitwise ------------------------------------------------------------------------------------------------------------------


def differs_bitwise(rank: int, world_size: int) -> list[str]:
    """Cases in which Ulysses is not bitwise what the backend computes on one rank.

    Not the backend `math`: BLAS rounds a product by the strides of its batch, where a kernel takes one head like another.
    """
    groups, wrong, backend = Groups(rank, world_size), [], "sdpa"
    for dtype, heads, length in itertools.product(
        (torch.float32, torch.float64, torch.bfloat16), ((4, 4), (6, 6), (8, 2), (3, 3)), (1, 101, 128)
    ):
        place = groups.place(None)
        place.layout = SequenceLayout.contiguous(length, world_size)
        q, k, v, _ = tensors(length, *heads, dtype)
        out = attention("ulysses", backend, place)(*(place.layout.split(x, 1, rank) for x in (q, k, v)), None)
        whole = lookup(ATTENTION_BACKENDS, backend, "backend").forward(q, k, v, None, WIDTH**-0.5).out
        if not torch.equal(out, place.layout.split(whole, 1, rank)):
            wrong.append(f"{dtype} {heads} {length}")
    return wrong


def test_ulysses_is_bitwise_what_one_rank_computes():
    assert run_distributed(differs_bitwise, 4) == [[]] * 4


# --- what is sent -------------------------------------------------------------------------------------------------------------


class Recorder:
    """What this rank hands to torch.distributed: `(operation, ranks, bytes to each rank, bytes from each rank)` a call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...], dict[int, int], dict[int, int]]] = []

    @contextmanager
    def on(self) -> Iterator["Recorder"]:
        """Record what is called in here."""
        patches = [
            mock.patch.object(dist, name, partial(getattr(self, name), getattr(dist, name)))
            for name in ("all_to_all_single", "all_gather_into_tensor", "batch_isend_irecv")
        ]
        for patch in patches:
            patch.start()
        try:
            yield self
        finally:
            for patch in patches:
                patch.stop()

    def all_to_all_single(self, real, output, source, output_sizes, input_sizes, group):
        ranks, width = tuple(dist.get_process_group_ranks(group)), source.element_size()
        sent, received = ({r: n * width for r, n in zip(ranks, sizes, strict=True)} for sizes in (input_sizes, output_sizes))
        self.calls.append(("all_to_all", ranks, sent, received))
        return real(output, source, output_sizes, input_sizes, group=group)

    def all_gather_into_tensor(self, real, output, source, group):
        ranks, size = tuple(dist.get_process_group_ranks(group)), source.numel() * source.element_size()
        self.calls.append(("all_gather", ranks, dict.fromkeys(ranks, size), dict.fromkeys(ranks, size)))
        return real(output, source, group=group)

    def batch_isend_irecv(self, real, operations):
        ranks = tuple(dist.get_process_group_ranks(operations[0].group))
        sent, received = {}, {}
        for operation in operations:
            size = operation.tensor.numel() * operation.tensor.element_size()
            (sent if operation.op is dist.isend else received)[operation.peer] = size
        self.calls.append(("exchange", ranks, sent, received))
        return real(operations)

    def num_sent(self) -> int:
        """Bytes that left this rank."""
        own = dist.get_rank()
        return sum(size for _, _, sent, _ in self.calls for rank, size in sent.items() if rank != own)


def record(groups: Groups, strategy: str, layout: str, length: int, heads: tuple[int, int], mask: MaskSpec | None, dtype):
    """The recorders of a forward and of a backward pass; a grid has two columns."""
    place = groups.place(2 if strategy == "unified" else None)
    num_inner = place.ulysses_degree
    place.layout = layout_of(layout, length, groups.world_size // num_inner, num_inner)
    *qkv, dout = (place.layout.split(x, 1, groups.rank) for x in tensors(length, *heads, dtype))
    leaves = [x.detach().requires_grad_() for x in qkv]
    forward, backward = Recorder(), Recorder()
    with forward.on():
        out = attention(strategy, "math", place)(*leaves, mask)
    with backward.on():
        out.backward(dout)
    return forward, backward


SENT_CASES = [
    (strategy, layout, length, heads, mask)
    for strategy in DISTRIBUTED
    for layout, length, heads in (("contiguous", 64, (4, 4)), ("contiguous", 64, (8, 4)), ("zigzag", 13, (3, 1)))
    for mask in (None, MaskSpec.causal())
] + [(strategy, "lopsided", 3, (4, 2), MaskSpec.documents([1, 2])) for strategy in DISTRIBUTED]


def sent(rank: int, world_size: int) -> list[tuple]:
    """What this rank sent in each case, forward and backward."""
    groups = Groups(rank, world_size)
    both = [record(groups, *case, torch.bfloat16) for case in SENT_CASES]
    return [(forward.calls, forward.num_sent(), backward.calls, backward.num_sent()) for forward, backward in both]


def expected_bytes(strategy: str, length: int, heads: tuple[int, int]) -> tuple[float, float]:
    """Bytes that each of four ranks sends forward and backward, in bfloat16, gradients around a ring in float32.

    A tensor of S tokens and d channels on P ranks has `2 S d / P` bytes a rank. Trading sends `(P - 1) / P` of it: q, k, v
    there and out back, so `8 S d (P - 1) / P^2` with as many heads of keys. A ring sends k and v `P - 1` times forward and
    again backward, their gradients, of twice the bytes, `P` times. All-gather sends k and v to `P - 1` ranks forward and
    again backward, and gradients home once. A grid trades inside rows; its columns are rings for the heads of one rank.
    """
    ranks, batch = 4, BATCH
    q, kv = (2 * batch * length * n * WIDTH for n in heads)  # bytes of the whole
    trade = (2 * q + 2 * kv) * (ranks - 1) / ranks**2
    ring = 2 * kv * (ranks - 1) / ranks
    if strategy == "ulysses":
        return trade, trade
    if strategy == "ring":
        return ring, ring + 2 * 2 * kv
    if strategy == "allgather_kv":
        return ring, 2 * ring
    trade = (2 * q + 2 * kv) / 2 * (2 - 1) / 2**2
    ring = 2 * kv / 2 * (2 - 1) / 2
    return trade + ring, trade + ring + 2 * 2 * kv / 2


def test_ranks_send_what_others_expect_and_what_the_formulas_say():
    by_rank = run_distributed(sent, 4)
    num_messages = {"ulysses": (2, 2), "allgather_kv": (1, 2), "ring": (3, 7), "unified": (2 + 1, 2 + 3)}
    for case, *ranks in zip(SENT_CASES, *by_rank, strict=True):
        strategy, layout, length, heads, _ = case
        for direction in (0, 2):
            calls = [rank[direction] for rank in ranks]
            assert_matched(calls, case)
            if layout == "contiguous":
                assert {len(each) for each in calls} == {num_messages[strategy][direction // 2]}, case
                assert {rank[direction + 1] for rank in ranks} == {expected_bytes(strategy, length, heads)[direction // 2]}, (
                    case
                )
                assert all(same_messages(calls[0], each) for each in calls), case
    masked = {
        case[:4]: sizes_of(ranks) for case, *ranks in zip(SENT_CASES, *by_rank, strict=True) if case[4] == MaskSpec.causal()
    }
    full = {case[:4]: sizes_of(ranks) for case, *ranks in zip(SENT_CASES, *by_rank, strict=True) if case[4] is None}
    assert masked == full  # what nobody sees travels all the same


def sizes_of(ranks) -> list:
    """Without the group: operations and bytes of all ranks, both directions."""
    return [[(call[0], call[2], call[3]) for direction in (0, 2) for call in rank[direction]] for rank in ranks]


def same_messages(a, b) -> bool:
    """Whether two ranks call the same operations on groups of the same size with the same bytes."""

    def shape(calls):
        return [(operation, len(ranks), sorted(out.values()), sorted(into.values())) for operation, ranks, out, into in calls]

    return shape(a) == shape(b)


def assert_matched(calls, case) -> None:
    """What i sends to j is what j expects: call by call in collectives, where each group calls the same list, else in order."""
    groups = {ranks for each in calls for _, ranks, _, _ in each}
    for group in groups:
        lists = [[call for call in calls[rank] if call[1] == group and call[0] != "exchange"] for rank in group]
        assert len({tuple(call[0] for call in each) for each in lists}) == 1, case
        for together in zip(*lists, strict=True):
            for (i, a), (j, b) in itertools.product(zip(group, together, strict=True), repeat=2):
                assert a[2][j] == b[3][i], (case, i, j)
    for i, j in itertools.permutations(range(len(calls)), 2):
        out = [call[2][j] for call in calls[i] if call[0] == "exchange" and j in call[2]]
        into = [call[3][i] for call in calls[j] if call[0] == "exchange" and i in call[3]]
        assert out == into, (case, i, j)


# --- what the rest of torch sees ----------------------------------------------------------------------------------------------


def keep_attention(_, operator, *args, **kwargs) -> CheckpointPolicy:
    """Selective checkpointing that keeps the results of attention only."""
    is_attention = operator == torch.ops.videofm.attention.default
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


COMPILED = ("ring", "unified")
"""With what is traded and without: the two forms of the operator's results."""


def in_torch(rank: int, world_size: int) -> dict[str, dict]:
    """Each strategy in a small block: recomputed, compiled, counted."""
    groups, results = Groups(rank, world_size), {}
    for strategy in DISTRIBUTED:
        place = groups.place(2 if strategy == "unified" else None)
        num_inner, mask = place.ulysses_degree, MaskSpec.causal()
        place.layout = SequenceLayout.zigzag(21, world_size // num_inner, num_inner)
        attend = attention(strategy, "sdpa", place)
        torch.manual_seed(0)
        to_q, to_kv, to_out = (torch.nn.Linear(*size) for size in ((32, 32), (32, 32), (32, 32)))
        x = place.layout.split(torch.randn(BATCH, 21, 32), 1, rank)

        def block(x, attend=attend, to_q=to_q, to_kv=to_kv, to_out=to_out, mask=mask):
            q, k, v = to_q(x).unflatten(2, (4, 8)), *to_kv(x).unflatten(2, (4, 8)).chunk(2, dim=2)
            return to_out(attend(q, k, v, mask).flatten(2)).sin()

        context = partial(create_selective_checkpoint_contexts, keep_attention)
        ways = {
            "plain": block,
            "full checkpoint": partial(checkpoint, block, use_reentrant=False),
            "selective checkpoint": partial(checkpoint, block, use_reentrant=False, context_fn=context),
        }
        if strategy in COMPILED:
            mask.to_text()
            ways["compiled"] = torch.compile(block, backend="aot_eager", fullgraph=True)
        for way, call in ways.items():
            forward, backward, leaf = Recorder(), Recorder(), x.clone().requires_grad_()
            with forward.on():
                out = call(leaf)
            with backward.on():
                out.sum().backward()
            results[f"{strategy}, {way}"] = {
                "values": [out.detach(), leaf.grad, to_q.weight.grad.clone(), to_kv.weight.grad.clone()],
                "messages": (len(forward.calls), len(backward.calls)),
            }
            to_q.zero_grad(), to_kv.zero_grad(), to_out.zero_grad()
        results[f"{strategy}, flops"] = count_flops(attend, x.unflatten(2, (4, 8)).requires_grad_(), mask)
    return results


def count_flops(attend, x: torch.Tensor, mask: MaskSpec) -> tuple[int, int]:
    """FLOPs of this rank, forward and both."""
    with FlopCounterMode(display=False) as forward:
        out = attend(x, x[:, :, :2], x[:, :, :2], mask)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_recomputed_compiled_and_counted():
    """Selective checkpointing repeats no message, full checkpointing repeats the forward's; a compiled block computes the same.

    Ranks' FLOPs add up to those of one rank: `4 * pairs * N * K` with `21 * 22 / 2` pairs a sample, and twice that backward.
    """
    by_rank = run_distributed(in_torch, 4)
    for results in by_rank:
        for strategy in DISTRIBUTED:
            plain = results[f"{strategy}, plain"]
            forward, backward = plain["messages"]
            assert forward > 0
            assert results[f"{strategy}, full checkpoint"]["messages"] == (forward, forward + backward), strategy
            assert results[f"{strategy}, selective checkpoint"]["messages"] == (forward, backward), strategy
            compiled = ("compiled",) * (strategy in COMPILED)
            assert all(results[f"{strategy}, {way}"]["messages"] == (forward, backward) for way in compiled), strategy
            for way in ("full checkpoint", "selective checkpoint", *compiled):
                for got, expected in zip(results[f"{strategy}, {way}"]["values"], plain["values"], strict=True):
                    torch.testing.assert_close(got, expected, msg=f"{strategy}, {way}")
    whole = 4 * (21 * 22 // 2) * BATCH * 4 * 8
    for strategy in DISTRIBUTED:
        counted = [results[f"{strategy}, flops"] for results in by_rank]
        assert tuple(map(sum, zip(*counted, strict=True))) == (whole, 2 * whole), strategy


# --- what cannot work ---------------------------------------------------------------------------------------------------------


def refusals(rank: int, world_size: int) -> dict[str, str]:
    """The messages of wrong requests on this rank, and how long the failed collective of a pair took."""
    groups = Groups(rank, world_size)
    messages: dict[str, str] = {}

    def expect(name: str, error: type[Exception], call) -> None:
        with pytest.raises(error) as caught:
            call()
        messages[name] = str(caught.value)

    place = groups.place(None)
    q = torch.zeros(1, 5, 2, 8)
    attend = attention("ring", "math", place)
    expect("no layout", ParallelError, lambda: attend(q, q, q, None))
    expect("parts", ParallelError, lambda: setattr(place, "layout", SequenceLayout.contiguous(8, 2)))
    place.layout = SequenceLayout.contiguous(8, world_size)
    expect("tokens", ParallelError, lambda: attend(q, q, q, None))
    expect("tensor", ParallelError, lambda: attend(q, q, q, torch.ones(5, 5, dtype=torch.bool)))
    expect("mask", ParallelError, lambda: attend(q[:, :2], q[:, :2], q[:, :2], MaskSpec.documents([3])))
    expect("grid", ParallelError, lambda: attention("unified", "math", place))
    rows, columns = groups.grids[2]
    if rank in (1, 2):  # the others stand at the same place either way
        expect("order", ParallelError, lambda: SequencePlace(groups.world, columns, rows))
    spec = mock.Mock(has_mask=True)
    ring = lookup(ATTENTION_STRATEGIES, "ring", "strategy")
    math = lookup(ATTENTION_BACKENDS, "math", "backend")
    expect("mask tensors", ParallelError, lambda: ring.wrap(math, place, spec))
    blind = mock.Mock(supports_lse=False)
    blind.name = "blind"
    expect("lse", ConfigError, lambda: ring.wrap(blind, place))
    return messages


def test_wrong_requests_are_refused_with_the_fix():
    (messages, *others) = run_distributed(refusals, 4)
    expected = {
        "no layout": "ring(math) does not know which tokens this rank holds: set `place.layout`",
        "parts": "the layout has 2 parts for a context group of 4 ranks",
        "tokens": "context rank 0 calls ring(math) with 5 tokens, but the layout gives it 2 of 8",
        "tensor": "ring(math) takes no mask tensor",
        "mask": "the lengths of documents add up to 3, but the sequence has 8 tokens",
        "grid": "attention strategy unified needs a grid",
        "mask tensors": "attention strategy ring: masks that are tensors are not split over ranks",
        "lse": "attention strategy ring needs the log-sum-exp of the softmax, which backend blind does not give",
    }
    for name, text in expected.items():
        assert text in messages[name], messages[name]
        assert all(name in other for other in others)
    assert "puts this process at 2, but it is rank 1" in others[0]["order"]


def skip_a_collective(rank: int, world_size: int) -> tuple[float, str]:
    """Ranks 1 and 3 do not call what ranks 0 and 2 call: Ulysses in the first pair, a ring in the second."""
    pairs = [dist.new_group(ranks, timeout=timedelta(seconds=5)) for ranks in ([0, 1], [2, 3])]
    place = SequencePlace(pairs[rank // 2])
    place.layout = SequenceLayout.contiguous(8, 2)
    start, message = time.monotonic(), ""
    if rank % 2 == 0:
        q = torch.zeros(1, 4, 2, 8)
        try:
            attention("ulysses" if rank == 0 else "ring", "math", place)(q, q, q, None)
        except RuntimeError as error:
            message = str(error)
    took = time.monotonic() - start
    dist.barrier()  # nobody leaves before the others have seen their timeout
    return took, message


def test_ranks_whose_peer_skips_a_collective_raise_within_the_timeout():
    for took, message in run_distributed(skip_a_collective, 4)[::2]:
        assert "imed out" in message or "imeout" in message, message
        assert took < 20
