"""The reward model: its laws, its numbers, and its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from videofm import models
from videofm.errors import CheckpointError, ConfigError, DataError
from videofm.models import ParallelOptions
from videofm.models.flops import flops_per_sample
from videofm.models.reward import SIZES, VideoReward, parallelize
from videofm.types import Conditioning

NAME, CHANNELS, WIDTH, NUM_TEXT = "reward/video", 3, 12, 5
SHAPE = (2, 4, 6)


def build(**overrides: Any) -> VideoReward:
    """A small model with weights large enough for every path to matter."""
    sizes = {"latent_channels": CHANNELS, "width": 32, "num_heads": 2, "caption_channels": WIDTH, "axes": ("overall", "motion")}
    model = models.build(NAME, "tiny", **{**sizes, **overrides}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            around = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(around + 0.2 * torch.randn(parameter.shape, generator=generator))
    assert isinstance(model, VideoReward)
    return model


def latents(size: int = 2, shape: tuple[int, int, int] = SHAPE, seed: int = 1) -> Tensor:
    return torch.randn(size, CHANNELS, *shape, generator=torch.Generator().manual_seed(seed))


def text(size: int = 2, num_tokens: int = NUM_TEXT) -> Conditioning:
    mask = torch.arange(num_tokens) < torch.tensor([[2], [num_tokens]])[:size]
    return Conditioning(torch.randn(size, num_tokens, WIDTH, generator=torch.Generator().manual_seed(2)), mask)


# --- numbers -----------------------------------------------------------------------------------------------------------------


def test_parameters_of_every_size() -> None:
    """By hand for 100m, d = 768, k = 64, c = 4096, 128 latent channels, one axis: a block 16 d^2 + 3 d + 4 k = 9,439,744, of
    which 12; tokens 128 d + d = 99,072; text c + c d = 3,149,824; a token, a weight and the last norm 3 d = 2,304."""
    by_hand = 12 * (16 * 768**2 + 3 * 768 + 4 * 64) + 129 * 768 + 4096 * 769 + 3 * 768
    wanted = {"tiny": 137_024, "100m": by_hand}
    assert by_hand == 116_528_128 and models.sizes(NAME) == list(SIZES) == list(wanted)
    for size, count in wanted.items():
        model = models.build(NAME, size, device="meta")
        assert sum(parameter.numel() for parameter in model.parameters()) == model.config.num_parameters == count, size


@pytest.mark.parametrize("options", [{"axes": ["overall", "motion", "text"]}, {"patch_size": 2}, {"latent_channels": 64}])
def test_parameters_of_other_options(options: dict[str, Any]) -> None:
    model = models.build(NAME, "tiny", device="meta", **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == model.config.num_parameters != 137_024


def test_blocks_cost_what_pytorch_counts() -> None:
    """Of two whole models, forward and backward, the difference is one block."""
    counted = []
    for num_layers in (1, 2):
        model = build(num_layers=num_layers)
        parallelize(model, None, ParallelOptions(attention="math", cross_attention="math"))
        with FlopCounterMode(display=False) as counter:
            model(latents(1), text(1)).sum().backward()
        counted.append(counter.get_total_flops())
    num_tokens = SHAPE[0] * SHAPE[1] * SHAPE[2]
    assert counted[1] - counted[0] == flops_per_sample(build(num_layers=1), num_tokens, NUM_TEXT)


def test_a_fresh_model_scores_near_zero_and_trains_everywhere() -> None:
    """Scores of ordinary latents within 1, and a gradient that is not 0 for every parameter."""
    torch.manual_seed(0)
    model = models.build(NAME, "tiny", latent_channels=CHANNELS, caption_channels=WIDTH)
    scores = model(latents(), text())
    assert scores.abs().max() < 1
    (scores[0] - scores[1]).sum().backward()
    still = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert not still


# --- laws --------------------------------------------------------------------------------------------------------------------


def test_scores_have_one_row_a_clip_and_one_column_an_axis() -> None:
    scores = build()(latents(), text())
    assert scores.shape == (2, 2) and scores.dtype == torch.float32


def test_clips_of_a_batch_do_not_see_each_other() -> None:
    model, z, c = build(), latents(), text()
    together = model(z, c)
    alone = torch.cat([model(z[row : row + 1], c.rows(slice(row, row + 1))) for row in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_padding_of_the_text_changes_nothing() -> None:
    model, z, c = build(), latents(), text()
    longer = Conditioning(
        torch.cat([c.embeddings, 50 * torch.ones(2, 3, WIDTH)], dim=1), torch.cat([c.mask, torch.zeros(2, 3).bool()], dim=1)
    )
    torch.testing.assert_close(model(z, longer), model(z, c), rtol=1e-5, atol=1e-6)
    changed = replace(c, embeddings=c.embeddings.index_fill(1, torch.tensor([0]), 3.0))  # the first token of each is real
    assert ((model(z, changed) - model(z, c)).abs() > 1e-3).all()


def test_a_text_without_real_tokens_counts_as_one_with_all() -> None:
    model, z, c = build(), latents(), text()
    none, every = (replace(c, mask=torch.full_like(c.mask, value)) for value in (False, True))
    assert torch.equal(model(z, none), model(z, every))


@pytest.mark.parametrize("dim", [2, 3, 4])
def test_every_cell_counts_and_so_does_its_place(dim: int) -> None:
    """Exchanging two frames, rows or columns moves the scores: a bag of cells, blind to the order of frames, would not."""
    model, z, c = build(), latents(), text()
    before = model(z, c)
    assert ((model(z.flip(dim), c) - before).abs().amax(dim=1) > 1e-3).all()
    for index in range(z.shape[dim]):
        changed = z.index_fill(dim, torch.tensor([index]), 2.0)
        assert ((model(changed, c) - before).abs() > 1e-4).all(), index


def test_patches_are_tokens_of_several_cells() -> None:
    """patch_size 2 makes a quarter of the tokens; the channels of a token are those of its four cells, by a permuted weight."""
    model, z = build(patch_size=2), latents()
    assert model.num_tokens(z) == SHAPE[0] * SHAPE[1] * SHAPE[2] // 4
    cells = torch.stack([z[..., p::2, q::2] for p in range(2) for q in range(2)], dim=2).flatten(1, 2)  # (B, C * 4, T, H, W)
    other = build(latent_channels=4 * CHANNELS)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(z, text()), other(cells, text()), rtol=1e-5, atol=1e-6)


def test_axes_have_scores_of_their_own() -> None:
    """The gradient of one axis' score leaves the weight of the other alone; tokens of axes do not share it."""
    model = build()
    model(latents(), text())[:, 1].sum().backward()
    assert model.head.grad is not None and model.head.grad[1].any() and not model.head.grad[0].any()


def test_grey_pixels_have_the_luma_of_the_coloured_ones() -> None:
    """BT.601: 0.299 red + 0.587 green + 0.114 blue in each channel; grey stays as it is; without the option nothing changes."""
    video = torch.rand(2, 3, 2, 4, 4) * 2 - 1
    grey = build(greyscale=True).seen(video)
    wanted = 0.299 * video[:, 0] + 0.587 * video[:, 1] + 0.114 * video[:, 2]
    for channel in range(3):
        torch.testing.assert_close(grey[:, channel], wanted)
    torch.testing.assert_close(build(greyscale=True).seen(grey), grey)
    assert build().seen(video) is video


def test_scores_are_float32_under_autocast() -> None:
    model, z, c = build(), latents(), text()
    plain = model(z, c)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(z, c)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, plain, rtol=0.1, atol=0.1)
    assert not torch.equal(low, plain)


# --- layout ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_attention_is_bound_to_the_backend_of_the_config(backend: str) -> None:
    """Each gives the same scores, and both kinds of attention are bound."""
    model, z, c = build(), latents(), text()
    before = model(z, c)
    parallelize(model, None, ParallelOptions(attention=backend, cross_attention=backend))
    torch.testing.assert_close(model(z, c), before, rtol=1e-5, atol=1e-6)
    bound = {type(layer.attend).__name__ for block in model.blocks for layer in (block.self_attention, block.cross_attention)}
    other = build()
    parallelize(other, None, ParallelOptions(attention="math", cross_attention="sdpa"))
    first, second = other.blocks[0].self_attention.attend, other.blocks[0].cross_attention.attend
    assert len(bound) == 1 and type(first) is not type(second)


def test_a_backend_that_cannot_serve_is_refused() -> None:
    with pytest.raises(ConfigError, match="no attention backend"):
        parallelize(build(), None, ParallelOptions(attention="flash_attn"))


def test_context_ranks_share_the_gradient() -> None:
    """Each has a quarter of it, so that the sum over four is the whole; scores are the whole ones on each."""
    mesh = type("Mesh", (), {"context_degree": 4})()
    alone, shared = build(), build()
    parallelize(shared, mesh)
    embeddings = [text().embeddings.clone().requires_grad_() for _ in range(2)]
    scores = [m(latents(), replace(text(), embeddings=e)) for m, e in zip((alone, shared), embeddings, strict=True)]
    assert torch.equal(scores[0], scores[1])
    for score in scores:
        score.sum().backward()
    pairs = [*zip(alone.parameters(), shared.parameters(), strict=True), tuple(embeddings)]
    for one, other in pairs:
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(other.grad * 4, one.grad, rtol=1e-4, atol=1e-6)


# --- files and errors --------------------------------------------------------------------------------------------------------


def test_save_and_load_keep_every_bit(tmp_path: Path) -> None:
    model = build(greyscale=True)
    ours, public = models.save(model, tmp_path / "ours"), models.save_public(model, tmp_path / "public")
    for loaded in (models.load(ours), models.load(public)):
        assert loaded.config == model.config and loaded.config.axes == ("overall", "motion")
        assert torch.equal(loaded(latents(), text()), model(latents(), text()))


def test_a_foreign_tensor_is_refused() -> None:
    with pytest.raises(CheckpointError, match="unet.conv is not a tensor of this model, which has proj_in, caption_norm"):
        models.adapter(NAME).to_public({"unet.conv": torch.zeros(1)})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 0}, "num_layers 0 of reward/video must be a whole number of at least 1"),
        ({"latent_channels": "four"}, "latent_channels 'four' of reward/video must be a whole number"),
        ({"patch_size": True}, "patch_size True of reward/video must be a whole number"),
        ({"num_heads": 5}, "num_heads 5 does not divide the width 64"),
        ({"num_heads": 16}, "head_width 4: .* take a multiple of 8"),
        ({"axes": ["motion"]}, r"axes \('motion',\) of reward/video must be a list of different names, 'overall' first"),
        ({"axes": ["overall", "overall"]}, "list of different names"),
        ({"axes": "overall"}, "axes 'overall' of reward/video must be a list"),
        ({"greyscale": 1}, "greyscale 1 of reward/video must be true or false"),
    ],
)
def test_configs_that_cannot_work(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        models.build(NAME, "tiny", device="meta", **fields)


def test_wrong_inputs() -> None:
    model, z, c = build(), latents(), text()
    with pytest.raises(DataError, match=r"latents have shape \(1, 5, 2, 4, 4\); this reward model takes \(B, 3, T, H, W\)"):
        model(torch.zeros(1, 5, 2, 4, 4), text(1))
    with pytest.raises(DataError, match="latents have shape"):
        model(z[:, :, :0], c)
    with pytest.raises(DataError, match="latents of 4x6 cells, and patch_size 4 of this reward model divides not both"):
        build(patch_size=4)(z, c)
    with pytest.raises(DataError, match=r"embeddings has shape \(1, 5, 12\); \(2, 5, 12\) is expected"):
        model(z, text(1))
    with pytest.raises(DataError, match="conditioning with clip_embeddings: reward/video takes the text of one encoder"):
        model(z, replace(c, clip_embeddings=torch.zeros(2, 1, 4)))
