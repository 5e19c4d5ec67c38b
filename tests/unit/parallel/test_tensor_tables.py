"""The tables of what tensor ranks split, and the arithmetic of shares; what several ranks compute is in tests/distributed."""

from fnmatch import fnmatch

import pytest
import torch
from torch import nn

from videofm import models
from videofm.errors import ParallelError
from videofm.parallel.shards import TensorShard, gather_tensor, take_tensor
from videofm.parallel.tensor import Split, apply, matches, weight_shards
from videofm.registry import resolve

NAMES = ("dit/ltx", "dit/step_video")
REPLICATED = {
    "dit/ltx": (
        "proj_in.*", "proj_out.*", "time_embed.*", "time_modulation.*", "scale_shift_table", "blocks.*.scale_shift_table",
        "blocks.*_attention.out.bias", "blocks.*.feed_forward.linear2.bias", "caption_projection.linear2.bias",
    ),
    "dit/step_video": (
        "proj_in.*", "proj_out.*", "time_embed.*", "time_modulation.*", "scale_shift_table", "blocks.*.scale_shift_table",
        "blocks.*.attention_norm.*", "blocks.*.feed_forward_norm.*", "clip_projection.*", "caption_projection.linear2.bias",
        "blocks.*_attention.[qk]_norm.weight",
    ),
}  # fmt: skip
"""Parameters that every tensor rank holds whole, on purpose."""


class Mesh:
    """A place in a tensor group that cannot be asked for its group: refusals come before any rank is."""

    tensor_rank = 0

    def __init__(self, degree: int) -> None:
        self.tensor_degree = degree


def table(name: str) -> tuple[Split, ...]:
    return resolve(f"videofm.models.{name.replace('/', '.')}.parallelize:TENSOR_TABLE")


def split_names(name: str, model: nn.Module) -> set[str]:
    found = matches(model, table(name))
    there = dict(model.named_parameters())
    every = {f"{module}.{key}" for module, split in found.items() for key in weight_shards(split, 2)}
    return every & set(there)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_split_or_replicated_on_purpose(name):
    model = models.build(name, "tiny", device="meta")
    split = split_names(name, model)
    for key, parameter in model.named_parameters():
        replicated = any(fnmatch(key, pattern) for pattern in REPLICATED[name])
        assert (key in split) != replicated, f"{key} {tuple(parameter.shape)} split: {key in split}, replicated: {replicated}"
    for pattern in REPLICATED[name]:
        assert any(fnmatch(key, pattern) for key, _ in model.named_parameters()), f"{pattern} matches nothing"


@pytest.mark.parametrize(("name", "size", "least"), [("dit/ltx", "13b", 0.9), ("dit/step_video", "30b", 0.97)])
def test_nearly_all_of_a_large_model_is_split(name, size, least):
    """Of 13B the noise level's `6 D x D` and the ways in and out are replicated: each rank of 8 holds little over an eighth."""
    model = models.build(name, size, device="meta")
    split, total = split_names(name, model), sum(parameter.numel() for parameter in model.parameters())
    assert sum(parameter.numel() for key, parameter in model.named_parameters() if key in split) > least * total


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_shares_of_every_parameter_join_to_the_whole(name, degree):
    model = models.build(name, "tiny", num_layers=1)
    for module, split in matches(model, table(name)).items():
        for key, shard in weight_shards(split, degree).items():
            whole = getattr(model.get_submodule(module), key)
            if whole is None:
                continue
            shares = [shard.take(whole, rank) for rank in range(degree)]
            assert shard.fits(whole) and {share.numel() for share in shares} == {whole.numel() // degree}
            assert torch.equal(shard.join(shares), whole), f"{module}.{key}"


def test_each_rank_takes_its_heads_of_every_part():
    """Rows 0..3 are queries, 4..7 keys, 8..11 values, of two heads of two channels; by hand."""
    whole = torch.arange(12.0)[:, None].expand(12, 3)
    shard = TensorShard(dim=0, degree=2, parts=3)
    assert shard.take(whole, 0)[:, 0].tolist() == [0, 1, 4, 5, 8, 9]
    assert shard.take(whole, 1)[:, 0].tolist() == [2, 3, 6, 7, 10, 11]
    assert shard.take(whole, 1).is_contiguous()
    assert not shard.fits(torch.zeros(14, 3)), "14 rows divide by 2, but not into three parts of two shares"


def test_a_share_keeps_nothing_of_the_whole_alive():
    whole = torch.zeros(8, 4)
    assert all(TensorShard(dim, 2).take(whole, 0).untyped_storage().nbytes() == whole.nbytes // 2 for dim in (0, 1))


def test_a_parameter_that_is_not_split_is_its_own_whole():
    parameter = nn.Parameter(torch.ones(3))
    moment = torch.zeros(3)
    assert gather_tensor(parameter, moment) is moment and take_tensor(parameter, moment) is moment


@pytest.mark.parametrize("name", NAMES)
def test_heads_that_do_not_divide_are_refused_and_nothing_is_changed(name):
    model = models.build(name, "tiny", num_layers=1)
    before = {key: (id(value), value.shape) for key, value in model.named_parameters()}
    with pytest.raises(ParallelError, match=r"tensor_degree 3 does not divide the 4 heads of \w+.* It can be 1, 2, 4\."):
        apply(model, table(name), Mesh(3))
    assert before == {key: (id(value), value.shape) for key, value in model.named_parameters()}


class Odd(nn.Module):
    """A model whose hidden features are 6, of 4 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"num_heads": 4})
        self.linear = nn.Linear(8, 6)


def test_features_that_do_not_divide_are_refused():
    with pytest.raises(ParallelError, match="tensor_degree 4 does not divide the 6 features of linear"):
        apply(Odd(), (Split("linear", "column"),), Mesh(4))
    with pytest.raises(ParallelError, match="tensor_degree 2 does not divide the 6 features in 2 parts of linear"):
        apply(Odd(), (Split("linear", "column", parts=2),), Mesh(2))


def test_a_pattern_without_a_module_is_refused():
    with pytest.raises(ParallelError, match=r"'blocks\.\*\.qkv' in the tensor table of Odd matches no module.*such as.*linear"):
        apply(Odd(), (Split("blocks.*.qkv", "column"),), Mesh(2))


def test_adapters_are_refused():
    model = models.build("dit/ltx", "tiny", num_layers=1)
    models.inject_lora(model, rank=2)
    with pytest.raises(ParallelError, match=r"tensor_degree is 2, and the model has adapters\. Set parallel\.tensor_degree=1"):
        apply(model, table("dit/ltx"), Mesh(2))
