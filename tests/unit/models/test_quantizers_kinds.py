"""What single kinds of quantizers promise: starts, revival, levels, exact indices; and indices against a public library."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import vector_quantize_pytorch as library
from torch import Tensor

from videofm.errors import ConfigError
from videofm.models.quantizers import Quantizer, build_quantizer, quantizer_config
from videofm.models.quantizers.ema import EPSILON, EMAQuantizer
from videofm.models.quantizers.kmeans import kmeans
from videofm.models.quantizers.state import draw, generator, priorities
from videofm.models.quantizers.usage import UsageWindow
from videofm.types import ALONE


def build(kind: str, **values: Any) -> Any:
    torch.manual_seed(0)
    return build_quantizer(quantizer_config({"kind": kind, **values}))


def as_latents(rows: Tensor) -> Tensor:
    """`(N, D)` -> `(1, D, 1, 1, N)`."""
    return rows.T.reshape(1, rows.shape[1], 1, 1, len(rows))


def steps(quantizer: Quantizer, data: Tensor, num_steps: int, num_tokens: int, seed: int = 0) -> None:
    """Updates from random rows of `data`."""
    draws = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        rows = torch.randint(len(data), (num_tokens,), generator=draws)
        quantizer(as_latents(data[rows]))
        quantizer.update(ALONE)


def planted(num_centres: int, dim: int, num_each: int, spread: float = 0.05) -> tuple[Tensor, Tensor]:
    """Centres in a cube, and points around them."""
    draws = torch.Generator().manual_seed(1)
    centres = 4.0 * torch.rand(num_centres, dim, generator=draws) + 10.0
    points = centres.repeat_interleave(num_each, 0)
    return centres, points + spread * torch.randn(points.shape, generator=draws)


def recovered(centres: Tensor, book: Tensor, near: float = 0.1) -> float:
    """The share of centres that a code is near to."""
    return float((torch.cdist(centres, book).min(1).values < near).float().mean())


def test_k_means_start_finds_planted_centres() -> None:
    """Above 95 % of 100 centres with 128 codes, on data away from where the random book lies."""
    centres, data = planted(100, 8, 60)
    quantizer = build("vq_ema", codebook_size=128, dim=8, start_updates=4, decay=0.9)
    assert recovered(centres, quantizer.books[0]) == 0.0
    steps(quantizer, data, 20, 1024)
    assert recovered(centres, quantizer.books[0]) > 0.95
    found = kmeans(data, 128, 10, generator(0, 0, "test"))
    assert recovered(centres, found.centres) > 0.95 and float(found.counts.sum()) == len(data)


def test_an_empty_cluster_keeps_its_centre_and_fewer_points_than_centres_do() -> None:
    """Three different points for eight centres: five clusters are empty, no number is NaN."""
    points = torch.tensor([[1.0, 1.0], [2.0, 1.0], [1.0, 6.0]]).repeat(8, 1)
    found = kmeans(points, 8, 5, generator(0, 0, "test"))
    assert bool(found.centres.isfinite().all()) and int((found.counts > 0).sum()) == 3
    assert sorted(found.centres.unique(dim=0).tolist()) == sorted(points[:3].tolist())


def test_before_the_start_latents_pass_through() -> None:
    quantizer = build("vq_ema", codebook_size=16, dim=4, start_vectors=8, start_updates=3)
    book = quantizer.books.clone()
    z = torch.randn(2, 4, 2, 5, 5)
    for update in range(3):
        assert quantizer.metrics(ALONE) == {"start": pytest.approx(43 * update / 128)}
        out = quantizer(z + update)
        assert torch.equal(out.z_q, z + update) and not out.loss.any() and int(out.indices.max()) < 16
        assert torch.equal(quantizer.books, book)
        quantizer.update(ALONE)
    assert quantizer.metrics(ALONE) == {"start": 1.0}
    assert not torch.equal(quantizer.books, book)
    out = quantizer(z)
    assert out.loss.all() and not torch.equal(out.z_q, z)
    counts, sums = quantizer.counts[0], quantizer.sums[0]
    assert float(counts.sum()) == 128, "the sums of a start are mean times count"
    torch.testing.assert_close(sums, quantizer.books[0] * counts.unsqueeze(1))
    assert not quantizer.reservoir.any()


def test_ema_is_the_running_mean_by_hand() -> None:
    """n <- g n + (1 - g) c, m <- g m + (1 - g) sum x, e = m / smooth(n), with one-hot products in float64."""
    quantizer = build("vq_ema", codebook_size=6, dim=3, start_vectors=0, revive_every=0, decay=0.7)
    n, m, book = torch.ones(6).double(), quantizer.sums[0].double(), quantizer.books[0].double()
    for step in range(3):
        x = torch.randn(50, 3, generator=torch.Generator().manual_seed(step))
        one_hot = torch.nn.functional.one_hot(torch.cdist(x.double(), book).argmin(1), 6).double()
        n, m = 0.7 * n + 0.3 * one_hot.sum(0), 0.7 * m + 0.3 * one_hot.T @ x.double()
        book = m / ((n + EPSILON) / (n.sum() + 6 * EPSILON) * n.sum()).unsqueeze(1)
        for half in x.split(20):
            quantizer(as_latents(half))
        quantizer.update(ALONE)
        torch.testing.assert_close(quantizer.books[0].double(), book, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(quantizer.counts[0].double(), n, rtol=1e-5, atol=1e-5)


def test_revival_brings_all_codes_into_use() -> None:
    """From a random book far from the data, below 30 % of the codes are used; with revival above 95 %, and errors fall."""
    _, data = planted(256, 8, 16, spread=0.5)
    usage, error = {}, {}
    for every in (0, 10):
        quantizer = build("vq_ema", codebook_size=256, dim=8, start_vectors=0, revive_every=every, decay=0.9, probe_size=32)
        steps(quantizer, data, 60, 1024)
        metrics = quantizer.metrics(ALONE)
        usage[every] = metrics["usage"]
        error[every] = float((quantizer.eval()(as_latents(data)).z_q - as_latents(data)).square().mean())
        assert (metrics["revived"] > 0) == (every > 0)
    assert usage[0] < 0.3 and usage[10] > 0.95, usage
    assert error[10] < 0.7 * error[0], error


def test_revival_sets_the_code_its_sum_and_its_count_together() -> None:
    """Else the next update would move a revived code back to where it was."""
    _, data = planted(64, 8, 16)
    quantizer = build("vq_ema", codebook_size=64, dim=8, start_vectors=0, revive_every=1, dead_share=0.95)
    steps(quantizer, data, 1, 512)
    far = (quantizer.books[0].mean(1) > 5).nonzero().squeeze(1)  # the data lie around 12, the random book around 0
    assert int(far.numel()) > 32
    ratio = quantizer.sums[0] / quantizer.counts[0].unsqueeze(1)
    torch.testing.assert_close(ratio[far], quantizer.books[0][far], rtol=1e-3, atol=1e-3)
    revived = quantizer.books[0][far].clone()
    quantizer.config = quantizer_config({**vars(quantizer.config), "revive_every": 0, "dead_share": 0.03})
    steps(quantizer, data, 1, 512, seed=1)
    assert float((quantizer.books[0][far] - revived).abs().max()) < 0.2


def test_draws_depend_on_the_set_of_vectors_alone() -> None:
    """Not on their order, nor on how they are cut up; another step draws others; no vector is preferred."""
    x = torch.randn(400, 5)
    order = torch.randperm(400)
    whole = draw(x, 30, seed=3, step=7)
    assert torch.equal(whole, draw(x[order], 30, 3, 7))
    parts = torch.cat([draw(part, 30, 3, 7) for part in x.split(90)])
    assert torch.equal(whole, draw(parts, 30, 3, 7))
    assert not torch.equal(whole, draw(x, 30, 3, 8)) and not torch.equal(whole, draw(x, 30, 4, 7))
    assert len(draw(x.repeat(3, 1), 1200, 3, 7, distinct=True)) == 400 and len(draw(x.repeat(3, 1), 1200, 3, 7)) == 1200
    assert torch.equal(priorities(x, 3, 7), priorities(x * (1 + 1e-7), 3, 7)), "last bits do not matter"
    drawn = torch.zeros(400)
    for step in range(400):
        drawn += (draw(x, 40, 0, step).unsqueeze(1) == x).all(-1).sum(0)
    # Each was drawn 40 times on average; a binomial has a deviation of 6, so 400 of them lie within 5 deviations.
    assert float(drawn.min()) > 10 and float(drawn.max()) < 70


def test_vq_gradients_are_of_the_two_terms() -> None:
    """codebook: 2 (e - x) / D for each token of the code; commit: weight times 2 (x - e) / D for the token."""
    quantizer = build("vq", codebook_size=5, dim=4, commit_weight=0.5, codebook_weight=2.0)
    z = torch.randn(1, 4, 1, 2, 3, requires_grad=True)
    out = quantizer(z)
    out.loss.sum().backward()
    e, x, chosen = quantizer.codebook.detach(), z.detach().reshape(4, 6).T, out.indices.flatten()
    wanted = torch.zeros(5, 4).index_add_(0, chosen, 2.0 * 2.0 * (e[chosen] - x) / 4 / 6)
    torch.testing.assert_close(quantizer.codebook.grad, wanted)
    torch.testing.assert_close(z.grad.reshape(4, 6).T, 0.5 * 2.0 * (x - e[chosen]) / 4 / 6)


def test_normalised_codes_lie_on_the_sphere() -> None:
    """Scale of latents changes no index; the nearest code has the largest cosine."""
    quantizer = build("vq", codebook_size=30, dim=4, normalise=True)
    z = torch.randn(2, 4, 2, 3, 3)
    out = quantizer(z)
    torch.testing.assert_close(out.z_q.norm(dim=1), torch.ones(2, 2, 3, 3))
    cosine = torch.nn.functional.cosine_similarity(z.movedim(1, -1).unsqueeze(-2), quantizer.codebook, dim=-1)
    assert torch.equal(out.indices, cosine.argmax(-1)) and torch.equal(out.indices, quantizer(7.0 * z).indices)


def test_every_code_of_simvq_moves_in_one_step_and_its_basis_in_none() -> None:
    quantizer = build("simvq", codebook_size=300, dim=8)
    before, basis = quantizer.book(), quantizer.basis.clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    out = quantizer(torch.randn(1, 8, 1, 2, 2))
    out.loss.sum().backward()
    assert "basis" not in dict(quantizer.named_parameters()) and not quantizer.basis.requires_grad
    optimizer.step()
    assert out.indices.numel() < 5 and bool((quantizer.book() != before).any(1).all())
    assert torch.equal(quantizer.basis, basis)
    other = build("simvq", codebook_size=300, dim=8, seed=1)
    assert not torch.equal(other.basis, basis)


@pytest.mark.parametrize("levels", [(3,), (4, 5, 3), (8, 6), (7, 4, 3)])
def test_all_codes_of_fsq_are_reached_and_decode_to_themselves(levels: tuple[int, ...]) -> None:
    quantizer = build("fsq", levels=levels).eval()
    axes = [torch.atanh(torch.linspace(-0.999, 0.999, 401)) for _ in levels]
    for channel, (axis, size) in enumerate(zip(axes, levels, strict=True)):
        z = torch.zeros(401, len(levels))
        z[:, channel] = 3 * axis
        digits = quantizer(as_latents(z)).indices.flatten() // int(torch.tensor(levels[:channel]).prod()) % size
        assert digits.unique().tolist() == list(range(size)) and bool((digits.diff() >= 0).all())
    (size,) = quantizer.vocab_sizes
    codes = quantizer.codes(torch.arange(size).view(1, 1, 1, size))
    rows = codes.reshape(len(levels), size).T
    assert len(rows.unique(dim=0)) == size and float(rows.abs().max()) == 1.0
    wanted = itertools.product(*[range(number) for number in reversed(levels)])
    halves = [number // 2 for number in levels]
    exact = [[(digit - half) / half for digit, half in zip(reversed(row), halves, strict=True)] for row in wanted]
    torch.testing.assert_close(rows, torch.tensor(exact))
    assert torch.equal(quantizer.search(rows).flatten(), torch.arange(size))


def test_wrong_levels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"levels are \(2, 5\); it needs at least one, each at least 3"):
        build("fsq", levels=(2, 5))
    with pytest.raises(ConfigError, match="make 1000000000 codes; at most 16777216"):
        build("fsq", levels=[1000, 1000, 1000])
    with pytest.raises(ConfigError, match="decay is 1.0; it must be at least 0 and below 1"):
        build("vq_ema", decay=1.0)
    with pytest.raises(ConfigError, match="level_dropout is 2; it must be at least 0 and at most 1"):
        build("rvq", level_dropout=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "vq", "codebook_size": "big"}, "vq: codebook_size is 'big'; it must be a whole number, such as 1024"),
        ({"kind": "vq", "codebook_size": 25.5}, "codebook_size is 25.5; it must be a whole number"),
        ({"kind": "vq", "codebook_size": True}, "codebook_size is True; it must be a whole number"),
        ({"kind": "vq", "probe_size": None}, "probe_size is None; it must be a whole number"),
        ({"kind": "vq", "normalise": "no"}, "normalise is 'no'; it must be true or false"),
        ({"kind": "fsq", "levels": 8}, r"levels is 8; it must be a list of whole numbers, such as \(8, 5, 5, 5\)"),
        ({"kind": "fsq", "levels": [8, 5.5]}, r"levels is \(8, 5.5\); it must be a list of whole numbers"),
        ({"kind": "vq_ema", "decay": float("nan")}, "decay is nan; it must be a finite number"),
        ({"kind": "vq_ema", "commit_weight": float("inf")}, "commit_weight is inf; it must be a finite number"),
        ({"kind": "vq_ema", "decay": "0.9"}, "decay is '0.9'; it must be a finite number"),
        ({"kind": ["vq"]}, r"the kind of a quantizer is \['vq'\]; it must be one of: fsq, rvq"),
        ({"kind": None}, "the kind of a quantizer is None"),
        ({"kind": "vq", 3: 4}, "vq has no option 3. There are: kind"),
        ("vq", "a quantizer is a mapping with a 'kind' .*, not 'vq'"),
        (None, "a quantizer is a mapping with a 'kind' .*, not None"),
        (
            {"kind": "vq_ema", "start_vectors": 0, "start_updates": 3},
            "start_updates is 3, but with start_vectors 0 nothing reads",
        ),
        ({"kind": "rvq", "start_vectors": 0, "start_iterations": 3}, "start_iterations is 3, but with start_vectors 0"),
        (
            {"kind": "rvq", "num_levels": 1, "level_dropout": 0.5},
            "level_dropout is 0.5, but with num_levels 1 nothing reads it",
        ),
        ({"kind": "vq_ema", "revive_every": 0, "dead_share": 0.1}, "dead_share is 0.1, but .* set revive_every above 0"),
    ],
)
def test_values_of_the_wrong_type_or_without_effect_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantizer_config(values)


def test_defaults_of_fields_without_effect_are_taken() -> None:
    """As in a config that was written out whole, where a whole number also stands for a share."""
    config = quantizer_config({"kind": "rvq", "start_vectors": 0, "revive_every": 0, "num_levels": 1, "commit_weight": 1})
    assert quantizer_config(vars(config)) == config


def test_a_start_tells_how_far_it_is() -> None:
    quantizer = build("vq_ema", codebook_size=16, dim=4, start_vectors=8, start_updates=3)
    for told in ("0 of 128", "43 of 128", "86 of 128"):
        assert not quantizer.is_ready and quantizer.start_told() == f"{told} start vectors"
        quantizer(torch.randn(2, 4, 2, 5, 5))
        quantizer.update(ALONE)
    assert quantizer.is_ready and quantizer.start_told() == "128 of 128 start vectors"
    assert build("vq_ema", start_vectors=0).is_ready and build("fsq").is_ready
    assert build("fsq").start_told() == "0 of 0 start vectors"


def rvq(num_levels: int, **values: Any) -> Any:
    quantizer = build("rvq", codebook_size=32, dim=6, num_levels=num_levels, start_vectors=16, start_updates=2, **values)
    steps(quantizer, torch.randn(4000, 6, generator=torch.Generator().manual_seed(4)), 8, 512)
    return quantizer


@pytest.mark.parametrize("num_levels", [1, 2, 4, 8])
def test_rvq_has_gain_one_and_errors_that_fall_with_levels(num_levels: int) -> None:
    """The commitment of each level reaches the input: its gradient is the mean of 2 (x - codes of the first levels) / D."""
    quantizer = rvq(num_levels)
    z = torch.randn(2, 6, 2, 3, 4, requires_grad=True)
    weights = torch.randn_like(z)
    (quantizer(z).z_q * weights).sum().backward()
    assert torch.equal(z.grad, weights)
    z.grad = None
    out = quantizer(z)
    out.losses["commit"].sum().backward()
    table = out.indices.view(*out.indices.shape[:4], num_levels)
    prefix = [quantizer.lookup(table[..., : number + 1]).movedim(-1, 1) for number in range(num_levels)]
    wanted = sum(2 * (z.detach() - codes) / 6 / 24 for codes in prefix) / num_levels
    torch.testing.assert_close(z.grad, wanted)
    errors = [float((z.detach() - codes).square().mean()) for codes in prefix]
    assert errors == sorted(errors, reverse=True) and torch.equal(prefix[-1], quantizer.eval()(z).z_q)


def test_a_prefix_of_levels_decodes() -> None:
    quantizer = rvq(4).eval()
    z = torch.randn(1, 6, 2, 3, 4)
    out = quantizer(z)
    cut = out.indices.clone()
    cut[..., 2:] = -1
    assert torch.equal(quantizer.codes(cut), quantizer.codes(out.indices[..., :2]))
    assert not torch.equal(quantizer.codes(cut), out.z_q)


def test_level_dropout_draws_once_a_step_and_spares_what_it_leaves_out() -> None:
    quantizer, twin = rvq(4, level_dropout=0.7), rvq(4, level_dropout=0.7)
    z, seen = torch.randn(1, 6, 2, 3, 4), set()
    for _ in range(24):
        first, second = quantizer(z), quantizer(z.flip(0))
        other = twin(z)
        used = (first.indices >= 0).flatten(0, 3)
        assert bool((used.all(0) | ~used.any(0)).all()), "a level is used by all tokens or by none"
        assert torch.equal(first.indices, second.indices) and torch.equal(first.indices, other.indices)
        number = int(used[0].sum())
        seen.add(number)
        assert torch.equal(first.z_q.detach(), quantizer.codes(first.indices))
        untouched = quantizer.counts[number:].clone()
        quantizer.update(ALONE)
        twin(z)
        twin.update(ALONE)
        if quantizer.read_counters().num_updates % quantizer.config.revive_every:
            assert torch.equal(quantizer.counts[number:], untouched)
    assert seen == {1, 2, 3, 4}
    assert int((quantizer.eval()(z).indices >= 0).all())


def test_the_usage_window_slides() -> None:
    """Codes that are used no more are dead once the window has passed them, and not before."""
    window = UsageWindow(1, 4, 80)
    for _ in range(10):
        window.add(torch.tensor([[5.0, 5.0, 0.0, 0.0]]))
    assert window.summary() == [(0.5, pytest.approx(2.0), 2)]
    for step in range(10):
        window.add(torch.tensor([[0.0, 0.0, 0.0, 10.0]]))
        share, _, dead = window.summary()[0]
        assert (share, dead) == ((0.75, 1) if step < 7 else (0.25, 3))
        assert 80 <= int(window.counts.sum()) <= 100


def test_churn_counts_indices_that_moved() -> None:
    quantizer = build("vq", codebook_size=8, dim=2, probe_size=10)
    quantizer(torch.randn(1, 2, 1, 4, 10))
    quantizer.update(ALONE)
    assert "churn" not in quantizer.metrics(ALONE)
    before = quantizer.search(quantizer.probe)
    with torch.no_grad():
        quantizer.codebook.copy_(quantizer.codebook.roll(1, 0) * 1.5)
    expected = float((quantizer.search(quantizer.probe) != before).float().mean())
    assert expected > 0 and quantizer.metrics(ALONE)["churn"] == pytest.approx(expected)


def test_vq_indices_are_those_of_vector_quantize_pytorch() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 500, 8)
    theirs = library.VectorQuantize(8, codebook_size=600, rotation_trick=False).eval()
    ours = build("vq_ema", codebook_size=600, dim=8, start_vectors=0).eval()
    ours.books[0] = theirs.codebook
    z = x.movedim(1, 2).reshape(2, 8, 5, 10, 10)
    _, indices, _ = theirs(x)
    assert torch.equal(ours(z).indices.flatten(1), indices)
    assert torch.equal(ours.codes(ours(z).indices).reshape(2, 8, 500).mT, theirs.get_codes_from_indices(indices))


def test_one_ema_update_is_that_of_vector_quantize_pytorch() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 400, 4)
    theirs = library.VectorQuantize(4, codebook_size=40, decay=0.8, rotation_trick=False, threshold_ema_dead_code=0)
    ours = build("vq_ema", codebook_size=40, dim=4, start_vectors=0, revive_every=0, decay=0.8)
    for mine in (ours.books, ours.sums):
        mine[0] = theirs.codebook
    for part in range(3):
        theirs(x + part)
        ours(as_latents(x[0] + part))
        ours.update(ALONE)
    used = ours.counts[0] > 0.05  # theirs smooths where ours keeps the code
    torch.testing.assert_close(ours.books[0][used], theirs.codebook[used], rtol=1e-4, atol=1e-4)
    assert int(used.sum()) > 20


def test_rvq_indices_are_those_of_vector_quantize_pytorch() -> None:
    torch.manual_seed(0)
    theirs = library.ResidualVQ(dim=6, num_quantizers=3, codebook_size=64, rotation_trick=False).eval()
    ours = build("rvq", codebook_size=64, dim=6, num_levels=3, start_vectors=0).eval()
    for level, book in enumerate(theirs.codebooks):
        ours.books[level] = book
    x = torch.randn(1, 300, 6)
    quantized, indices, _ = theirs(x)
    out = ours(as_latents(x[0]))
    assert torch.equal(out.indices.view(1, 300, 3), indices)
    torch.testing.assert_close(out.z_q.view(6, 300).T, quantized[0])


@pytest.mark.parametrize("levels", [(8, 5, 5), (7, 4, 6, 3)])
def test_fsq_is_that_of_vector_quantize_pytorch(levels: tuple[int, ...]) -> None:
    """Codes, indices and the gradient, which goes through the bound."""
    theirs, ours = library.FSQ(levels), build("fsq", levels=levels)
    x = (2 * torch.randn(1, 600, len(levels))).requires_grad_()
    z = as_latents(x.detach()[0]).requires_grad_()
    quantized, indices = theirs(x)
    out = ours(z)
    assert torch.equal(out.indices.view(1, 600), indices.long())
    torch.testing.assert_close(out.z_q.view(len(levels), 600).T, quantized[0])
    weights = torch.randn(600, len(levels))
    (quantized[0] * weights).sum().backward()
    (out.z_q.view(len(levels), 600).T * weights).sum().backward()
    torch.testing.assert_close(z.grad.view(len(levels), 600).T, x.grad[0])


def test_static_latents_start_and_revive_without_nan() -> None:
    """All tokens the same: there is one code to find, and nothing to revive the others with but that."""
    quantizer: EMAQuantizer = build("vq_ema", codebook_size=16, dim=4, start_vectors=4, start_updates=1, revive_every=2)
    for _ in range(6):
        quantizer(torch.full((1, 4, 2, 8, 8), 3.0))
        quantizer.update(ALONE)
    out = quantizer.eval()(torch.full((1, 4, 2, 8, 8), 3.0))
    assert bool(quantizer.books.isfinite().all()) and len(out.indices.unique()) == 1
    assert float((out.z_q - 3.0).abs().max()) < 1e-3
