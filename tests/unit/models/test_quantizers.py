"""The laws of quantizers, for every kind in the registry: a new one is tested by being named there."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from videofm.errors import ConfigError, DataError, ParallelError
from videofm.models.quantizers import Quantizer, build_quantizer, quantizer_config
from videofm.models.quantizers.search import nearest
from videofm.registry import QUANTIZERS
from videofm.types import ALONE

KINDS = sorted(QUANTIZERS)
SMALL = {
    "codebook_size": 48, "dim": 6, "levels": (4, 5, 3), "start_vectors": 4, "start_updates": 2, "revive_every": 3,
    "num_levels": 3, "probe_size": 32,
}  # fmt: skip
"""Fields of a small quantizer; each kind takes those that it has."""


def small(kind: str, **changes: Any) -> Quantizer:
    torch.manual_seed(0)
    default = quantizer_config({"kind": kind})
    names = [field.name for field in dataclasses.fields(default)]
    values = {name: value for name, value in {**SMALL, **changes}.items() if name in names and name != "levels"}
    if kind == "fsq":
        values["levels"] = SMALL["levels"]
    return build_quantizer(dataclasses.replace(default, **values))


def latents(quantizer: Quantizer, seed: int = 0, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, quantizer.dim, 3, 4, 5, generator=generator)


def trained(kind: str, num_steps: int = 4, **changes: Any) -> Quantizer:
    """After some steps: past the start of a book, and past a revival."""
    quantizer = small(kind, **changes)
    for step in range(num_steps):
        train_step(quantizer, step)
    return quantizer


def train_step(quantizer: Quantizer, step: int, lr: float = 0.01) -> None:
    """Two micro-batches, an optimizer step of plain SGD, an update."""
    for part in range(2):
        out = quantizer(latents(quantizer, 10 * step + part))
        if out.loss.requires_grad:
            out.loss.sum().backward()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad
                parameter.grad = None
    quantizer.update(ALONE)


def state(quantizer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("num_steps", [0, 4])
def test_codes_of_the_indices_are_z_q_bit_for_bit_in_eval(kind: str, num_steps: int) -> None:
    quantizer = trained(kind, num_steps).eval()
    z = latents(quantizer, 99)
    out = quantizer(z)
    assert torch.equal(quantizer.codes(out.indices), out.z_q)
    assert out.indices.dtype == torch.int64 and out.indices.shape[:4] == (2, 3, 4, 5)
    one = quantizer.codes(out.indices[1:, 2:, :1, 1:2])
    assert torch.equal(one, out.z_q[1:, :, 2:, :1, 1:2])
    low = quantizer(z.bfloat16())
    assert low.z_q.dtype == torch.bfloat16 and torch.equal(quantizer.codes(low.indices).bfloat16(), low.z_q)


def test_the_gradient_of_z_q_is_the_identity(kind: str) -> None:
    """With respect to `bounded(z)`, which is `z` itself for every kind that does not bound: the gain is exactly 1."""
    for quantizer in (trained(kind), trained(kind).eval(), small(kind)):
        z = latents(quantizer, 5).requires_grad_()
        weights = torch.randn_like(z)
        (quantizer(z).z_q * weights).sum().backward()
        found, z.grad = z.grad, None
        assert not any(parameter.grad is not None and parameter.grad.any() for parameter in quantizer.parameters())
        bounded = quantizer.bounded(z)
        (bounded * weights).sum().backward()
        assert found is not None and torch.equal(found, z.grad)
        if kind != "fsq":
            assert torch.equal(found, weights)


def test_the_code_is_the_nearest(kind: str) -> None:
    """Against all distances in float64, in what is searched: `bounded` for one book, for several what the ones before left."""
    quantizer = trained(kind).eval()
    z = latents(quantizer, 7)
    tokens = quantizer.bounded(z).movedim(1, -1).reshape(-1, quantizer.dim).double()
    indices = quantizer(z).indices.view(len(tokens), -1)
    left = tokens
    for book, size in enumerate(quantizer.vocab_sizes):
        table = torch.zeros(size, book + 1, dtype=torch.int64)
        table[:, book] = torch.arange(size)
        table[:, :book] = -1
        full = nn.functional.pad(table, (0, quantizer.num_books - book - 1), value=-1)
        codes = quantizer.lookup(full).double()
        distances = torch.cdist(left, codes)
        chosen = distances.gather(1, indices[:, book : book + 1]).squeeze(1)
        assert torch.all(chosen <= distances.min(1).values + 1e-5)
        left = left - codes[indices[:, book]]


def test_masked_tokens_change_nothing(kind: str) -> None:
    z = latents(small(kind), 3)
    mask = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    other = torch.where(mask.unsqueeze(1), z, 50.0 * torch.randn_like(z))
    for num_steps in (0, 4):
        one, two = trained(kind, num_steps), trained(kind, num_steps)
        first, second = one(z, mask), two(other, mask)
        assert torch.equal(first.loss, second.loss)
        assert torch.equal(first.indices[mask], second.indices[mask])
        one.update(ALONE)
        two.update(ALONE)
        assert same_state(state(one), state(two))


def test_the_loss_is_the_mean_over_kept_tokens(kind: str) -> None:
    """A mask of everything changes nothing; a mask of one token gives that token's loss; of none, zero."""
    quantizer = trained(kind).eval()
    z = latents(quantizer, 3)
    whole = quantizer(z)
    full = quantizer(z, torch.ones(2, 3, 4, 5, dtype=torch.bool))
    assert torch.equal(whole.loss, full.loss)
    mask = torch.zeros(2, 3, 4, 5, dtype=torch.bool)
    assert torch.equal(quantizer(z, mask).loss, torch.zeros(2))
    each = []
    for cell in [(t, h, w) for t in range(3) for h in range(4) for w in range(5)]:
        mask.zero_()
        mask[(slice(None), *cell)] = True
        each.append(quantizer(z, mask).loss)
    torch.testing.assert_close(torch.stack(each).mean(0), whole.loss, rtol=1e-5, atol=1e-6)
    assert (whole.loss > 0).all() == bool(whole.losses)


def test_indices_under_autocast_are_those_of_float32(kind: str) -> None:
    quantizer = trained(kind).eval()
    z = latents(quantizer, 11, batch=8) + 5.0 * (kind in ("vq", "simvq"))
    with torch.autocast("cpu", torch.bfloat16):
        under = quantizer(z)
    plain = quantizer(z)
    assert torch.equal(under.indices, plain.indices) and torch.equal(under.z_q, plain.z_q)
    assert torch.equal(quantizer(z.bfloat16()).indices, quantizer(z.bfloat16().float()).indices)


def test_eval_never_writes(kind: str) -> None:
    quantizer = trained(kind).eval()
    before = state(quantizer)
    for step in range(3):
        quantizer(latents(quantizer, step))
        quantizer.update(ALONE)
        quantizer.metrics(ALONE)
    assert same_state(before, state(quantizer))
    quantizer.train()
    quantizer(latents(quantizer, 0))
    quantizer.discard()
    quantizer.update(ALONE)
    assert same_state(before, state(quantizer))
    quantizer(latents(quantizer, 0))
    quantizer.update(ALONE)
    assert not same_state(before, state(quantizer))


def test_a_forward_pass_writes_no_state(kind: str) -> None:
    """All of it waits for `update`: a pass that is repeated, or a step that is skipped, leaves the books as they were."""
    quantizer = trained(kind, 1)
    before = state(quantizer)
    quantizer(latents(quantizer, 1))
    assert same_state(before, state(quantizer))


@pytest.mark.parametrize("num_steps", [1, 4])
def test_a_resumed_quantizer_goes_on_bit_for_bit(kind: str, num_steps: int) -> None:
    """From a state dict that was taken between two steps; during the start of a book, and after it.

    What a loading module had collected itself is dropped: a checkpoint lies between steps, and what was collected after it is
    collected again.
    """
    whole = trained(kind, num_steps, level_dropout=0.5)
    saved = state(whole)
    resumed = small(kind, level_dropout=0.5)
    resumed(latents(resumed, 77))
    resumed.load_state_dict(saved)
    for step in range(num_steps, num_steps + 5):
        train_step(whole, step)
        train_step(resumed, step)
        assert whole.metrics(ALONE) == resumed.metrics(ALONE)
    assert same_state(state(whole), state(resumed))
    assert not same_state(saved, state(whole))


def test_state_stays_float32_when_the_module_is_cast(kind: str) -> None:
    quantizer = trained(kind)
    before = state(quantizer)
    holder = nn.Sequential(quantizer, nn.Linear(2, 2)).bfloat16()
    assert holder[1].weight.dtype == torch.bfloat16
    buffers = dict(quantizer.named_buffers())
    assert all(torch.equal(buffer, before[name]) and buffer.dtype == before[name].dtype for name, buffer in buffers.items())
    assert all(parameter.dtype == torch.bfloat16 for parameter in quantizer.parameters())
    low = {name: tensor.bfloat16() for name, tensor in before.items() if tensor.is_floating_point()}
    quantizer.load_state_dict(low, strict=False)
    assert all(buffer.dtype == before[name].dtype for name, buffer in quantizer.named_buffers())
    quantizer(latents(quantizer, 1).bfloat16())
    quantizer.update(ALONE)


def test_a_meta_build_has_the_same_tensors(kind: str) -> None:
    real = small(kind)
    with torch.device("meta"):
        empty = build_quantizer(real.config)
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == {k: t.shape for k, t in state(real).items()}
    empty.load_state_dict(state(real), assign=True)
    z = latents(real)
    assert torch.equal(empty.eval()(z).indices, real.eval()(z).indices)


def test_perplexity_shows_that_codes_are_used(kind: str) -> None:
    """`V / 8 < perplexity <= V` after some steps on Gaussian data, in each book; usage, dead and churn agree with it."""
    quantizer = trained(kind, 12, codebook_size=32)
    values = quantizer.metrics(ALONE)
    size = quantizer.vocab_sizes[0]
    assert size / 8 < values["perplexity"] <= size
    assert values["dead"] == round((1 - values["usage"]) * size * quantizer.num_books)
    assert quantizer.metrics(ALONE)["churn"] == 0.0
    if quantizer.num_books > 1:
        assert all(size / 8 < values[f"perplexity_{book}"] <= size for book in range(quantizer.num_books))


def test_config_round_trips_and_names_what_is_wrong(kind: str) -> None:
    config = small(kind).config
    assert quantizer_config(dataclasses.asdict(config)) == config
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(config).items()}
    assert quantizer_config(listed) == config
    with pytest.raises(ConfigError, match="no option 'probe_sizes', did you mean 'probe_size'"):
        quantizer_config({"kind": kind, "probe_sizes": 3})
    with pytest.raises(ConfigError, match=f"quantizer {kind}: usage_tokens is 0; it must be at least 1"):
        quantizer_config({"kind": kind, "usage_tokens": 0})
    assert small(kind).bits_per_token == pytest.approx(sum(math.log2(size) for size in small(kind).vocab_sizes))


def test_wrong_latents_masks_and_indices_are_refused(kind: str) -> None:
    quantizer = small(kind).eval()
    z = latents(quantizer)
    with pytest.raises(DataError, match=f"a quantizer of {quantizer.dim} channels takes floating-point latents"):
        quantizer(z[:, 1:])
    with pytest.raises(DataError, match=r"the mask of latents .* is bool \(2, 3, 4, 5\), got"):
        quantizer(z, torch.ones(2, 3, 4, dtype=torch.bool))
    indices = quantizer(z).indices
    with pytest.raises(DataError, match="indices here are integers"):
        quantizer.codes(indices[0])
    with pytest.raises(DataError, match=f"this quantizer has codes 0 to {quantizer.vocab_sizes[0] - 1}"):
        quantizer.codes(indices + quantizer.vocab_sizes[0])
    with pytest.raises(DataError, match="indices from -2 to"):
        quantizer.codes(indices.clone().index_fill_(1, torch.tensor([0]), -2))


class _TwoRanks:
    """Two ranks, the other of which has another state."""

    data_degree = 2

    def sum(self, value: Tensor) -> Tensor:
        return value

    def gather(self, value: Tensor) -> Tensor:
        return torch.cat([value, value + 1])


def test_ranks_with_different_states_are_found(kind: str) -> None:
    with pytest.raises(ParallelError, match=f"state of quantizer {kind} differs between ranks after 4 updates"):
        trained(kind).metrics(_TwoRanks())


class _Recorder(_TwoRanks):
    """Two ranks that agree; keeps what they compare."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def gather(self, value: Tensor) -> Tensor:
        self.seen.append(int(value))
        return torch.cat([value, value])


def test_all_of_the_state_is_compared_now_and_then_and_the_counters_always(kind: str) -> None:
    """All in the first call after a build or a load and at every hundredth update: then a changed probe is seen.

    Between, only a change of the counters is.
    """

    def compared(quantizer: Quantizer, other: bool, name: str = "probe") -> int:
        ranks, tensor = _Recorder(), getattr(quantizer, name)
        before = tensor.clone()
        tensor.view(-1)[1] += int(other)
        quantizer.metrics(ranks)
        tensor.copy_(before)
        return ranks.seen[0]

    def sees(quantizer: Quantizer, name: str = "probe") -> bool:
        twin = copy.deepcopy(quantizer)
        return compared(quantizer, False, name) != compared(twin, True, name)

    quantizer = trained(kind)
    assert sees(quantizer), "first call"
    assert not sees(quantizer) and sees(quantizer, "counters")
    quantizer.load_state_dict(state(quantizer))
    assert sees(quantizer) and not sees(quantizer), "after a load"
    quantizer.counters[1] = 200
    assert sees(quantizer) and sees(quantizer)
    if hasattr(quantizer, "reservoir"):
        assert not sees(quantizer, "reservoir"), "started"
        assert sees(small(kind), "reservoir")


def test_kinds_are_named() -> None:
    with pytest.raises(ConfigError, match="no quantizer is called 'vq_emma', did you mean 'vq_ema'"):
        quantizer_config({"kind": "vq_emma"})
    with pytest.raises(ConfigError, match="a quantizer needs a 'kind', one of: fsq, rvq, simvq, vq, vq_ema"):
        quantizer_config({"dim": 3})
    config = quantizer_config({"kind": "vq"})
    with pytest.raises(ConfigError, match="VQConfig is for quantizers of kind 'vq', not 'fsq'"):
        dataclasses.replace(config, kind="fsq")


@pytest.mark.parametrize("size", [7, 300, 1500, 2048])
def test_search_in_chunks_is_the_whole_search(size: int) -> None:
    """With an offset of 100 to all, where distances that are not centred would be off by 1e-2."""
    generator = torch.Generator().manual_seed(size)
    book, x = (torch.randn(num, 5, generator=generator) + 100.0 for num in (size, 257))
    exact = torch.cdist(x.double(), book.double(), compute_mode="donot_use_mm_for_euclid_dist")
    found = nearest(x, book)
    assert all(torch.equal(found, nearest(x, book, max_distances=limit)) for limit in (1, 4000, 2**20))
    chosen = exact.gather(1, found.unsqueeze(1)).squeeze(1)
    assert torch.all(chosen <= exact.min(1).values + 1e-4)
    assert nearest(x[:0], book).shape == (0,)


@pytest.mark.parametrize("size", [8, 300, 1500, 2048])
def test_ties_go_to_the_lowest_code(size: int) -> None:
    """Small integers with the mean 0 make every product exact, and codes that are there many times."""
    generator = torch.Generator().manual_seed(size)
    half = torch.randint(-2, 3, (size // 2, 3), generator=generator).float()
    book, x = torch.cat([half, -half]), torch.randint(-3, 4, (129, 3), generator=generator).float()
    exact = (x.unsqueeze(1) - book).square().sum(-1)
    lowest = torch.tensor([int((row == row.min()).nonzero()[0]) for row in exact])
    assert len(book.unique(dim=0)) < size or size == 8
    assert all(torch.equal(nearest(x, book, max_distances=limit), lowest) for limit in (None, 1, 4000))


def test_a_copy_is_independent(kind: str) -> None:
    quantizer = trained(kind)
    twin = copy.deepcopy(quantizer)
    before = state(twin)
    train_step(quantizer, 9)
    assert same_state(before, state(twin))
