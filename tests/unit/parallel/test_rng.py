"""Draws are functions of (seed, step, sample, name) alone."""

import torch

from videofm.parallel.rng import KeyedRng, derive_seed
from videofm.types import lasting_id


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


def test_fixed_draws_follow_the_sample_and_a_number_alone():
    """Not the step, the epoch of the draw or what it stands in for; and they are no draws of a step."""
    wanted = KeyedRng(1, 5, ["a", "b"]).fixed(2).normal("noise", (4,))
    for step, ids in ((9, ["a@0", "b@0"]), (0, ["a@12", "b@3~a@3"]), (2, ["a", "b"])):
        assert torch.equal(KeyedRng(1, step, ids).fixed(2).normal("noise", (4,)), wanted)
    assert torch.equal(KeyedRng(1, 5, ["b", "a"]).rows(0, 1).fixed(2).normal("noise", (4,)), wanted[1:])
    others = [KeyedRng(1, 5, ["a", "b"]).fixed(1), KeyedRng(2, 5, ["a", "b"]).fixed(2), KeyedRng(1, 2, ["a", "b"])]
    assert not any(torch.equal(other.normal("noise", (4,)), wanted) for other in others)


def test_the_lasting_part_of_a_sample_id():
    for sample_id in ("clip", "clip@3", "clip@3~other@3", "clip@3~a@b@3"):
        assert lasting_id(sample_id) == "clip"
    assert lasting_id("films/clip@old@3") == "films/clip@old" and lasting_id("a@b") == "a@b" and lasting_id("a@1@2") == "a@1"
