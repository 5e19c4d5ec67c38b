"""The LTX transformer against diffusers, and its laws (spec C, F-DiT)."""

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel

from videofm import models
from videofm.errors import ConfigError, DataError
from videofm.models import ParallelOptions
from videofm.models.dit.ltx import ADAPTER, parallelize
from videofm.ops.rope import video_coordinates
from videofm.types import Compression, Conditioning

SHAPE = (3, 2, 4)
LENGTH = 24


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    built = models.build("dit/ltx", "tiny", num_layers=2, num_heads=2, head_width=16, caption_channels=12).eval()
    with torch.no_grad():
        for parameter in built.parameters():  # zeros and small numbers of the start would hide mistakes
            if parameter.abs().max() < 0.1:
                parameter.normal_(std=0.1)
    return built


@pytest.fixture(scope="module")
def theirs(model):
    twin = LTXVideoTransformer3DModel.from_config(ADAPTER.public_config(model.config)).eval()
    twin.load_state_dict(ADAPTER.to_public(model.state_dict()), strict=True)
    return twin


@pytest.fixture
def inputs(model):
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(6)[None] < torch.tensor([[2], [6]])
    return {
        "latent_tokens": torch.randn(2, LENGTH, model.config.in_channels, generator=generator),
        "sigma": torch.tensor([0.2, 0.9]),
        "conditioning": Conditioning(torch.randn(2, 6, 12, generator=generator), mask),
        "coordinates": video_coordinates(SHAPE, torch.tensor([8.0, 25.0]), Compression(4, 8, 8)),
    }


def reference(theirs, inputs, **kwargs):
    text = inputs["conditioning"]
    return theirs(inputs["latent_tokens"], text.embeddings, inputs["sigma"] * 1000, text.mask, **kwargs).sample


@torch.no_grad()
def test_equal_to_diffusers_with_mask_and_coordinates(model, theirs, inputs):
    expected = reference(theirs, inputs, video_coords=inputs["coordinates"])
    torch.testing.assert_close(model(**inputs), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_equal_to_diffusers_with_a_noise_level_for_each_token(model, theirs, inputs):
    inputs["sigma"] = torch.rand(2, LENGTH)
    expected = reference(theirs, inputs, video_coords=inputs["coordinates"])
    torch.testing.assert_close(model(**inputs), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_our_coordinates_are_what_the_pipeline_of_diffusers_uses(model, theirs, inputs):
    """`rope_interpolation_scale` = (4 / fps, 8, 8), one frame rate for the batch."""
    inputs["coordinates"] = video_coordinates(SHAPE, torch.tensor([8.0, 8.0]), Compression(4, 8, 8))
    frames, height, width = SHAPE
    scale = {"num_frames": frames, "height": height, "width": width, "rope_interpolation_scale": (4 / 8, 8, 8)}
    torch.testing.assert_close(model(**inputs), reference(theirs, inputs, **scale), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("causal_fix", "seconds"), [(False, [0.0, 0.5, 1.0]), (True, [0.0, 0.125, 0.625])])
def test_the_model_says_where_latent_cells_lie(model, causal_fix, seconds):
    """Latent frame f starts at pixel frame 4 f, or with the fix at max(0, 4 f - 3); eight frames a second."""
    found = model.coordinates(SHAPE, torch.tensor([8.0]), Compression(4, 8, 16), causal_fix).reshape(1, 3, *SHAPE)
    assert found[0, 0, :, 0, 0].tolist() == seconds
    assert found[0, 1, 0, :, 0].tolist() == [0, 8] and found[0, 2, 0, 0].tolist() == [0, 16, 32, 48]


@torch.no_grad()
def test_frame_rate_and_mask_matter(model, inputs):
    """The negative control of the three tests above."""
    base = model(**inputs)
    faster = video_coordinates(SHAPE, torch.tensor([16.0, 50.0]), Compression(4, 8, 8))
    unmasked = Conditioning(inputs["conditioning"].embeddings, torch.ones(2, 6, dtype=torch.bool))
    assert (model(**inputs | {"coordinates": faster}) - base).abs().max() > 1e-3
    assert (model(**inputs | {"conditioning": unmasked}) - base).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("size", "num_parameters", "num_tensors"),
    [("2b", 1_923_385_472, 715), ("13b", 13_042_569_344, 1_215), ("tiny", 1_238_160, 115)],
)
def test_sizes(size, num_parameters, num_tensors):
    """Spec C.1, measured on the released weights; tiny is ours."""
    model = models.build("dit/ltx", size, device="meta")
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    assert len(model.state_dict()) == num_tensors
    with torch.device("meta"):
        theirs = LTXVideoTransformer3DModel.from_config(ADAPTER.public_config(model.config))
    assert set(ADAPTER.to_public(model.state_dict())) == set(theirs.state_dict())
    assert set(ADAPTER.from_public(theirs.state_dict())) == set(model.state_dict())
    assert ADAPTER.config_from_public(dict(theirs.config)) == model.config


@torch.no_grad()
def test_masked_text_has_no_influence(model, inputs):
    text = inputs["conditioning"]
    changed = text.embeddings.masked_fill(~text.mask[..., None], 50.0)
    assert not torch.equal(changed, text.embeddings)
    assert torch.equal(model(**inputs), model(**inputs | {"conditioning": Conditioning(changed, text.mask)}))


@torch.no_grad()
def test_permuted_tokens_give_a_permuted_velocity(model, inputs):
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(2))
    moved = inputs | {"latent_tokens": inputs["latent_tokens"][:, order], "coordinates": inputs["coordinates"][:, :, order]}
    torch.testing.assert_close(model(**moved), model(**inputs)[:, order], rtol=0, atol=1e-5)
    unmoved = moved | {"coordinates": inputs["coordinates"]}
    assert (model(**unmoved) - model(**inputs)[:, order]).abs().max() > 1e-3  # without its coordinate a token is another token


@torch.no_grad()
def test_a_text_without_a_real_token_counts_as_all_real(model, theirs, inputs):
    """As in diffusers, whose mask adds -10,000 to every logit of it; that leaves float32 three decimals of a logit."""
    text = inputs["conditioning"]
    none = Conditioning(text.embeddings, torch.tensor([[False] * 6, [True] * 6]))
    every = Conditioning(text.embeddings, torch.ones(2, 6, dtype=torch.bool))
    found = model(**inputs | {"conditioning": none})
    assert torch.equal(found, model(**inputs | {"conditioning": every})) and found.isfinite().all()
    expected = reference(theirs, inputs | {"conditioning": none}, video_coords=inputs["coordinates"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@torch.no_grad()
def test_some_of_the_tokens_are_a_sequence_of_their_own(model, theirs, inputs):
    """Token dropping: any subset, in any order, with its coordinates and noise levels, is what diffusers makes of it."""
    kept = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(3))[: LENGTH * 4 // 5]
    some = inputs | {
        "latent_tokens": inputs["latent_tokens"][:, kept],
        "coordinates": inputs["coordinates"][:, :, kept],
        "sigma": torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(4))[:, kept],
    }
    expected = reference(theirs, some, video_coords=some["coordinates"])
    torch.testing.assert_close(model(**some), expected, rtol=0, atol=1e-5)
    in_order = kept.argsort()
    sorted_ = some | {name: some[name][..., in_order] for name in ("coordinates", "sigma")}
    sorted_["latent_tokens"] = some["latent_tokens"][:, in_order]
    torch.testing.assert_close(model(**sorted_), model(**some)[:, in_order], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_later_clip_is_the_same_clip(model, inputs):
    """Positions are relative: a second added to every token's time; stretching time instead is seen."""
    base, moved = model(**inputs), inputs["coordinates"].clone()
    moved[:, 0] += 1.0
    assert (model(**inputs | {"coordinates": moved}) - base).abs().max() < 1e-4
    stretched = inputs["coordinates"] * torch.tensor([1.5, 1.0, 1.0])[:, None]
    assert (model(**inputs | {"coordinates": stretched}) - base).abs().max() > 1e-3


@torch.no_grad()
def test_one_noise_level_equals_the_same_for_every_token(model, inputs):
    each = inputs["sigma"][:, None].expand(2, LENGTH)
    torch.testing.assert_close(model(**inputs | {"sigma": each}), model(**inputs), rtol=0, atol=1e-5)


def test_every_parameter_gets_a_gradient_under_autocast(model, inputs):
    """Without the key biases, which shift all logits of a query alike only where queries are not rotated."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).float().square().mean()
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    model.zero_grad(set_to_none=True)
    assert without == []


def test_parallelize_binds_every_block(model, inputs):
    base = model(**inputs)
    parallelize(model, None, ParallelOptions(attention="math", cross_attention="math"))
    assert {block.self_attention.attend.name for block in model.blocks} == {"math"}
    torch.testing.assert_close(model(**inputs), base, rtol=0, atol=1e-5)
    parallelize(model)
    assert {block.cross_attention.attend.name for block in model.blocks} == {"sdpa"}


def test_a_backend_that_cannot_serve_the_model_fails_when_it_is_built(model):
    with pytest.raises(ConfigError, match=r"no attention backend for 2 heads of width 16.*flash_attn: "):
        parallelize(model, None, ParallelOptions(attention="flash_attn"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": torch.rand(3)}, r"sigma has shape \(3,\); dit/ltx expects \(2,\) or \(2, 24\)"),
        ({"coordinates": torch.rand(2, 3, 5)}, r"coordinates has shape \(2, 3, 5\); dit/ltx expects \(2, 3, 24\)"),
        ({"latent_tokens": torch.rand(2, 24, 5)}, r"latent_tokens has shape \(2, 24, 5\); dit/ltx expects \(B, L, 16\)"),
    ],
)
def test_shapes_that_do_not_belong_together(model, inputs, change, message):
    with pytest.raises(DataError, match=message):
        model(**inputs | change)


def test_configs_that_cannot_be_held():
    with pytest.raises(ConfigError, match="dit/ltx can hold: patch_size 2"):
        ADAPTER.config_from_public({"patch_size": 2})
    with pytest.raises(ConfigError, match=r"theta 1\.0 cannot be exported"):
        ADAPTER.public_config(models.config("dit/ltx", "tiny", theta=1.0))
    with pytest.raises(ConfigError, match="rotary positions need an even number"):
        models.config("dit/ltx", "tiny", num_heads=1, head_width=3)
