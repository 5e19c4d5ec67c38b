"""Draws are functions of (seed, step, sample, name) alone."""

import torch

from videofm.parallel.rng import KeyedRng, derive_seed


def test_a_row_depends_on_its_sample_alone():
    ids = ["a@0", "b@0", "c@1", "d@0"]
    whole = KeyedRng(1, 5, ids).normal("noise", (2, 3))
    parts = [KeyedRng(1, 5, part).normal("noise", (2, 3)) for part in (ids[:1], ids[1:])]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(KeyedRng(1, 5, ids[::-1]).normal("noise", (2, 3)), whole.flip(0))


def test_every_part_of_the_key_matters():
    draw = KeyedRng(1, 5, ["a"]).normal("noise", (8,))
    for other in (KeyedRng(2, 5, ["a"]), KeyedRng(1, 6, ["a"]), KeyedRng(1, 5, ["b"])):
        assert not torch.equal(draw, other.normal("noise", (8,)))
    assert not torch.equal(draw, KeyedRng(1, 5, ["a"]).normal("posterior", (8,)))


def test_keys_do_not_run_together():
    assert len({derive_seed("ab", "c"), derive_seed("a", "bc"), derive_seed("abc"), derive_seed(1), derive_seed("1")}) == 5


def test_draws_follow_their_law():
    """10,000 draws: mean within 4 standard errors of 0 (normal) and of 1/2 (uniform, standard deviation 1/sqrt(12))."""
    rng = KeyedRng(0, 0, [str(i) for i in range(100)])
    normal, uniform = rng.normal("n", (100,)), rng.uniform("u", (100,))
    assert abs(normal.mean()) < 0.04 and abs(normal.std() - 1) < 0.04
    assert abs(uniform.mean() - 0.5) < 4 / (12**0.5 * 100) and uniform.min() >= 0 and uniform.max() < 1
    assert rng.uniform("scalar").shape == (100,)
