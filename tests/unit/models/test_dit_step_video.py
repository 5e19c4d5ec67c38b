"""The Step-Video transformer against the authors' arithmetic, and its laws (spec step-video A3, F-A 1, 6, 7)."""

import pytest
import torch

from tests.unit.models.step_video_dit import authors_forward
from videofm import models
from videofm.errors import CheckpointError, ConfigError, DataError
from videofm.models import ParallelOptions
from videofm.models.dit.step_video import ADAPTER, parallelize
from videofm.ops.rope import cell_coordinates
from videofm.types import Compression, Conditioning

SHAPE = (3, 2, 4)
LENGTH, NUM_TEXT, NUM_CLIP = 24, 6, 3
HEADS, HEAD_WIDTH = 2, 16


def released_layout(config, generator):
    """Random weights under the authors' names, at the shapes of `config`, large enough for every path to matter.

    The first layer of the time embedding has the 0.02 of a fresh model: float32 phases near 1000 radian are off by up to 6e-5,
    in either direction of time, and it passes that on.
    """
    like = ADAPTER.to_public(models.build("dit/step_video", "tiny", **config).state_dict())
    weights = {}
    for key, x in sorted(like.items()):
        std = 0.1 if x.ndim == 1 else 0.02 if "timestep_embedder.linear_1" in key else 0.7 * x.shape[1] ** -0.5
        around = float(key.endswith(("norm1.weight", "norm2.weight", "q_norm.weight", "k_norm.weight")))
        weights[key] = around + std * torch.randn(x.shape, generator=generator)
    return weights


@pytest.fixture(scope="module")
def config():
    return {"num_layers": 2, "num_heads": HEADS, "head_width": HEAD_WIDTH, "caption_channels": 12, "clip_channels": 8}


@pytest.fixture(scope="module")
def public(config):
    return released_layout(config, torch.Generator().manual_seed(0))


@pytest.fixture
def model(config, public):
    built = models.build("dit/step_video", "tiny", **config).eval()
    built.load_state_dict(ADAPTER.from_public(public), strict=True)
    return built


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(NUM_TEXT) < torch.tensor([[2], [NUM_TEXT]])
    states, clip = torch.randn(2, NUM_TEXT, 12, generator=generator), torch.randn(2, NUM_CLIP, 8, generator=generator)
    return {
        "latent_tokens": torch.randn(2, LENGTH, 16, generator=generator),
        "sigma": torch.tensor([0.2137, 0.9]),
        "conditioning": Conditioning(states, mask, clip),
        "coordinates": cell_coordinates(SHAPE, 2),
    }


def reference(public, inputs, sigma=None):
    """The authors' velocity as tokens, at their time of our `sigma`."""
    text, tokens = inputs["conditioning"], inputs["latent_tokens"]
    latents = tokens.unflatten(1, SHAPE).permute(0, 1, 4, 2, 3)  # (B, L, C) -> (B, T, C, H, W)
    t = 1 - (inputs["sigma"] if sigma is None else sigma)
    velocity = authors_forward(public, latents, t, text.embeddings, text.clip_embeddings, text.mask)
    return velocity.permute(0, 1, 3, 4, 2).flatten(1, 3)  # (B, T, C, H, W) -> (B, L, C)


@torch.no_grad()
@pytest.mark.parametrize("sigma", [(0.0, 1.0), (0.2137, 0.9), (0.001, 0.5), (0.7773, 0.31)])
def test_equal_to_the_authors_with_reversed_time_and_velocity(model, public, inputs, sigma):
    """v(t) = -velocity(1 - t), with a masked text and one time a sample; velocities are of the order of 1."""
    inputs["sigma"] = torch.tensor(sigma)
    expected = reference(public, inputs)
    assert expected.std() > 0.3
    torch.testing.assert_close(-model(**inputs), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_reference_looks_at_time_sign_and_layout(model, public, inputs):
    """The negative control: any of the three left out is far off."""
    expected, ours = reference(public, inputs), model(**inputs)
    assert (ours - expected).abs().max() > 0.1
    assert (-ours - reference(public, inputs, sigma=1 - inputs["sigma"])).abs().max() > 1e-2
    state = model.state_dict()
    key = "blocks.0.self_attention.qkv.weight"
    model.load_state_dict(state | {key: public["transformer_blocks.0.attn1.wqkv.weight"]})
    assert (-model(**inputs) - expected).abs().max() > 1e-2


@torch.no_grad()
def test_without_a_second_encoder(config, inputs):
    config, text = config | {"clip_channels": 0}, inputs["conditioning"]
    public = released_layout(config, torch.Generator().manual_seed(2))
    model = models.build("dit/step_video", "tiny", **config)
    model.load_state_dict(ADAPTER.from_public(public), strict=True)
    inputs["conditioning"] = Conditioning(text.embeddings, text.mask)
    torch.testing.assert_close(-model(**inputs), reference(public, inputs), rtol=0, atol=1e-5)


@torch.no_grad()
def test_both_give_the_same_loss(model, public, inputs):
    """Mean squared error to (noise - clean) for us, to (clean - noise) for them, at the same noisy latents."""
    clean = torch.randn(2, LENGTH, 16, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(2, LENGTH, 16, generator=torch.Generator().manual_seed(4))
    sigma = inputs["sigma"][:, None, None]
    inputs["latent_tokens"] = (1 - sigma) * clean + sigma * noise
    ours = (model(**inputs) - (noise - clean)).square().mean()
    theirs = (reference(public, inputs) - (clean - noise)).square().mean()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_to_and_fro(public, model):
    """The reflection is rounded to float32 each way; everything else comes back as it was."""
    back = ADAPTER.to_public(ADAPTER.from_public(public))
    first = "adaln_single.emb.timestep_embedder.linear_1.weight"
    assert set(back) == set(public)
    assert [key for key in public if key != first and not torch.equal(back[key], public[key])] == []
    torch.testing.assert_close(back[first], public[first], rtol=0, atol=1e-6)
    ours = ADAPTER.from_public(ADAPTER.to_public(model.state_dict()))
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=1e-6 if key == "time_embed.linear1.weight" else 0)


def test_reversed_time_is_a_reflection(public):
    """It moves the weight as a whole (it is no identity) and, being orthogonal, keeps its length."""
    first = public["adaln_single.emb.timestep_embedder.linear_1.weight"]
    turned = ADAPTER.from_public(public)["time_embed.linear1.weight"]
    assert (turned - first).abs().max() > 0.01
    torch.testing.assert_close(turned.norm(dim=1), first.norm(dim=1))


@pytest.mark.parametrize(
    ("ours", "theirs", "parts"),
    [
        ("self_attention.qkv", "attn1.wqkv", "qkv"),
        ("cross_attention.kv", "attn2.wkv", "kv"),
    ],
)
def test_rows_of_fused_projections_are_laid_out_by_head(ours, theirs, parts):
    """Each row is marked by what it is: 100 * (place in qkv) + 10 * head + channel, of 2 heads of 3 channels."""
    marks = {name: 100 * place + torch.tensor([[0, 1, 2], [10, 11, 12]]) for place, name in enumerate(parts)}
    by_head = torch.cat([marks[name][head] for head in range(2) for name in parts])
    by_part = torch.cat([marks[name].flatten() for name in parts])
    norm = torch.ones(3)
    public = {f"transformer_blocks.7.{theirs}.weight": by_head[:, None], "transformer_blocks.7.attn1.q_norm.weight": norm}
    expected = {f"blocks.7.{ours}.weight": by_part[:, None], "blocks.7.self_attention.q_norm.weight": norm}
    for there, here in ((ADAPTER.from_public(public), expected), (ADAPTER.to_public(expected), public)):
        assert set(there) == set(here)
        assert all(torch.equal(there[key], here[key]) for key in here)


def num_parameters(c):
    """L (16 d^2 + 10 d + 4 K): 4 + 4 + 8 square matrices, 6 + 2 * 2 vectors, 4 norms of a head; and the embeddings.

    Those are the first and last layer, the last table, the time embedding with its modulation, and the text projections.
    """
    d = c.num_heads * c.head_width
    ends = (c.in_channels * d + d) + (d * c.in_channels + c.in_channels) + 2 * d
    time = (256 * d + d) + (d * d + d) + (6 * d * d + 6 * d)
    text = (c.caption_channels * d + d) + (d * d + d) + (c.clip_channels * d + d if c.clip_channels else 0)
    return c.num_layers * (16 * d * d + 10 * d + 4 * c.head_width) + ends + time + text


@pytest.mark.parametrize(
    ("size", "overrides", "expected"),
    [
        ("30b", {}, 29_342_478_400),
        ("tiny", {}, 1_236_240),
        ("tiny", {"clip_channels": 0}, 1_236_240 - 33 * 128),
        ("tiny", {"num_layers": 3, "num_heads": 5, "head_width": 24, "in_channels": 7, "caption_channels": 9}, None),
    ],
)
def test_sizes(size, overrides, expected):
    """The released count is of spec A3; tensors are 16 a block, and 17 around them, 15 without the second encoder."""
    model = models.build("dit/step_video", size, device="meta", **overrides)
    count = sum(p.numel() for p in model.parameters())
    assert count == num_parameters(model.config)
    assert expected in (None, count)
    assert len(model.state_dict()) == 16 * model.config.num_layers + (17 if model.config.clip_channels else 15)
    public = ADAPTER.to_public(model.state_dict())
    assert {key: x.shape for key, x in ADAPTER.from_public(public).items()} == {
        key: x.shape for key, x in model.state_dict().items()
    }
    assert ADAPTER.config_from_public(ADAPTER.public_config(model.config)) == model.config


def test_the_config_of_the_release():
    """What their `config.json` holds (a pair of caption widths, and a choice of attention that is about devices)."""
    released = {
        "_class_name": "StepVideoModel",
        "_diffusers_version": "0.31.0",
        "attention_head_dim": 128,
        "attention_type": "torch",
        "caption_channels": [6144, 1024],
        "dropout": 0.0,
        "in_channels": 64,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-06,
        "norm_type": "ada_norm_single",
        "num_attention_heads": 48,
        "num_layers": 48,
        "out_channels": None,
        "patch_size": 1,
        "use_additional_conditions": False,
    }
    assert ADAPTER.config_from_public(released) == models.config("dit/step_video", "30b")
    assert ADAPTER.config_from_public({"caption_channels": 6144}).clip_channels == 0


def test_a_folder_of_the_authors_is_read(model, inputs, tmp_path):
    models.save_public(model, tmp_path)
    read = models.load(tmp_path)
    assert read.config == model.config
    torch.testing.assert_close(read(**inputs), model(**inputs), rtol=0, atol=1e-5)


@torch.no_grad()
def test_closed_gates_leave_attention_to_the_text_alone(model, inputs):
    """With every gate 0, what self-attention and feed-forward compute has no influence; what the text says has."""
    width = model.config.width
    for row in (2, 5):  # the gates, of (shift, scale, gate) twice
        model.time_modulation.weight[row * width : (row + 1) * width] = 0
        model.time_modulation.bias[row * width : (row + 1) * width] = 0
        for block in model.blocks:
            block.scale_shift_table[row] = 0
    base, text = model(**inputs), inputs["conditioning"]
    other_text = Conditioning(text.embeddings.flip(-1), text.mask, text.clip_embeddings)
    assert (model(**inputs | {"conditioning": other_text}) - base).abs().max() > 1e-3
    for block in model.blocks:
        block.self_attention.out.weight.normal_()
        block.feed_forward.linear2.weight.normal_()
    assert torch.equal(model(**inputs), base)
    for block in model.blocks:
        block.scale_shift_table[5] = 1.0  # the control: an open gate lets the feed-forward through
    assert (model(**inputs) - base).abs().max() > 1e-2


@torch.no_grad()
def test_masked_text_has_no_influence(model, inputs):
    """Nor has cutting it off. Every slot of the second encoder counts (control)."""
    text = inputs["conditioning"]
    changed = text.embeddings.masked_fill(~text.mask[..., None], 0.0) + 50 * ~text.mask[..., None] * torch.randn(12)
    assert not torch.equal(changed, text.embeddings)
    base = model(**inputs)
    assert torch.equal(model(**inputs | {"conditioning": Conditioning(changed, text.mask, text.clip_embeddings)}), base)
    short = {key: x[:1] for key, x in inputs.items() if key != "conditioning"}
    first = text.rows(torch.tensor([0]))
    cut = model(**short, conditioning=first.trimmed(2))
    torch.testing.assert_close(cut, base[:1], rtol=0, atol=1e-5)
    clip = text.clip_embeddings.clone()
    clip[:, -1] += 1.0
    assert (model(**inputs | {"conditioning": Conditioning(text.embeddings, text.mask, clip)}) - base).abs().max() > 1e-3


@torch.no_grad()
def test_permuted_tokens_give_a_permuted_velocity(model, inputs):
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(2))
    moved = inputs | {"latent_tokens": inputs["latent_tokens"][:, order], "coordinates": inputs["coordinates"][:, :, order]}
    torch.testing.assert_close(model(**moved), model(**inputs)[:, order], rtol=0, atol=1e-5)
    unmoved = moved | {"coordinates": inputs["coordinates"]}
    assert (model(**unmoved) - model(**inputs)[:, order]).abs().max() > 1e-3  # without its coordinate a token is another token


@torch.no_grad()
def test_a_noise_level_for_each_token(model, inputs):
    """The same everywhere equals one for the sample; another on one token changes that token most."""
    base, each = model(**inputs), inputs["sigma"][:, None].repeat(1, LENGTH)
    torch.testing.assert_close(model(**inputs | {"sigma": each}), base, rtol=0, atol=1e-5)
    each[0, 5] = 0.0
    change = (model(**inputs | {"sigma": each}) - base).abs().amax(dim=-1)
    assert change[0].argmax() == 5
    assert change[1].max() < 1e-5 < 1e-3 < change[0, 5]


def test_coordinates_count_cells(model):
    """Frame slowest, column fastest, as tokens are ordered; seconds and pixels play no part."""
    found = model.coordinates((2, 2, 3), torch.tensor([8.0, 25.0]), Compression(8, 16, 16))
    expected = [[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1] * 2, [0, 1, 2] * 4]
    assert found.tolist() == [expected, expected]
    with pytest.raises(ConfigError, match="has no causal_fix of their times"):
        model.coordinates((2, 2, 3), torch.tensor([8.0]), Compression(8, 16, 16), causal_fix=True)


def test_training_starts_at_velocity_zero_and_reaches_every_parameter(inputs, config):
    """Once the layers that start at zero have moved, every parameter gets a gradient, also under autocast."""
    torch.manual_seed(0)
    model = models.build("dit/step_video", "tiny", **config)
    assert model(**inputs).abs().max() == 0
    with torch.no_grad():
        model.proj_out.weight.normal_(std=0.1)
        for block in model.blocks:
            block.cross_attention.out.weight.normal_(std=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs).float().square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_fused_projections_start_as_large_as_single_ones():
    """Xavier of d x d: uniform up to sqrt(6 / 2d), std sqrt(1 / d), whatever the number of them in one tensor."""
    block = models.build("dit/step_video", "tiny", num_layers=1).blocks[0]
    for layer in (block.self_attention.qkv, block.cross_attention.kv, block.self_attention.out):
        assert layer.weight.std().item() == pytest.approx(128**-0.5, rel=0.03)


def test_parallelize_binds_every_block(model, inputs):
    base = model(**inputs)
    parallelize(model, None, ParallelOptions(attention="math", cross_attention="math"))
    assert {block.self_attention.attend.name for block in model.blocks} == {"math"}
    torch.testing.assert_close(model(**inputs), base, rtol=0, atol=1e-5)
    parallelize(model)
    assert {block.cross_attention.attend.name for block in model.blocks} == {"sdpa"}
    with pytest.raises(ConfigError, match=r"no attention backend for 2 heads of width 16.*flash_attn: "):
        parallelize(model, None, ParallelOptions(attention="flash_attn"))


TEXT = Conditioning(torch.rand(2, 6, 12), torch.ones(2, 6, dtype=torch.bool), torch.rand(2, 3, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": torch.rand(3)}, r"sigma has shape \(3,\); dit/step_video expects \(2,\) or \(2, 24\)"),
        ({"coordinates": torch.rand(2, 3, 5)}, r"coordinates has shape \(2, 3, 5\); dit/step_video expects \(2, 3, 24\)"),
        ({"latent_tokens": torch.rand(2, 24, 5)}, r"latent_tokens has shape \(2, 24, 5\); .* expects \(2, 24, 16\)"),
        (
            {"conditioning": Conditioning(torch.rand(2, 6, 13), TEXT.mask, TEXT.clip_embeddings)},
            r"embeddings has shape \(2, 6, 13\); .* expects \(2, 6, 12\)",
        ),
        (
            {"conditioning": Conditioning(TEXT.embeddings, TEXT.mask, torch.rand(2, 3, 9))},
            r"clip_embeddings has shape \(2, 3, 9\); .* expects \(2, 3, 8\)",
        ),
        (
            {"conditioning": Conditioning(TEXT.embeddings, TEXT.mask[:1], TEXT.clip_embeddings)},
            r"mask has shape \(1, 6\); .* expects \(2, 6\)",
        ),
        (
            {"conditioning": Conditioning(TEXT.embeddings, TEXT.mask)},
            r"with no clip_embeddings: .* clip_channels 8; bring them, or build it with clip_channels 0",
        ),
    ],
)
def test_inputs_that_do_not_belong_together(model, inputs, change, message):
    with pytest.raises(DataError, match=message):
        model(**inputs | change)


def test_a_second_encoder_that_is_not_wanted(config, inputs):
    model = models.build("dit/step_video", "tiny", **config | {"clip_channels": 0})
    with pytest.raises(DataError, match=r"with unwanted clip_embeddings: .* clip_channels 0; leave them out"):
        model(**inputs)


def test_configs_that_cannot_be_held():
    with pytest.raises(ConfigError, match="dit/step_video can hold: use_additional_conditions True"):
        ADAPTER.config_from_public({"use_additional_conditions": True})
    with pytest.raises(ConfigError, match="dit/step_video can hold: out_channels 32"):
        ADAPTER.config_from_public({"out_channels": 32})
    with pytest.raises(ConfigError, match=r"head_width 12: .* take a multiple of 8"):
        models.config("dit/step_video", "tiny", head_width=12)
    with pytest.raises(ConfigError, match=r"clip_channels -1 must be at least 1, or 0"):
        models.config("dit/step_video", "tiny", clip_channels=-1)


def test_checkpoints_that_cannot_be_read(public, model):
    with pytest.raises(CheckpointError, match=r"adaln_single\.emb\.fps_embedder\.linear_1\.bias is not in the public layout"):
        ADAPTER.from_public(public | {"adaln_single.emb.fps_embedder.linear_1.bias": torch.zeros(3)})
    headless = {key: x for key, x in public.items() if "q_norm" not in key}
    with pytest.raises(CheckpointError, match=r"laid out by head, but those named q_norm\.weight have \[\] entries"):
        ADAPTER.from_public(headless)
    wrong = ADAPTER.from_public(
        public
        | {
            "transformer_blocks.1.attn1.wqkv.weight": torch.zeros(7, 32),
            "adaln_single.emb.timestep_embedder.linear_1.weight": torch.zeros(32, 8),
        }
    )
    with pytest.raises(
        CheckpointError, match=r"2 of another shape: time_embed\.linear1\.weight \(32, 8\) for \(32, 256\), .*qkv"
    ):
        models.load_weights(model, wrong, "a file")
