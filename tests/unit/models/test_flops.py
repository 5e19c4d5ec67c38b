"""FLOPs of the transformers against the paper's table and PyTorch's counter (spec step-video A3, F-A 2)."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from videofm import models
from videofm.errors import ConfigError
from videofm.models import ParallelOptions
from videofm.models.flops import flops_per_sample
from videofm.types import Conditioning

NUM_TOKENS, NUM_TEXT, NUM_CLIP = 24, 9, 3
BLOCK = 3 * (28 * 24 * 48**2 + 4 * 9 * 48**2 + 4 * 24**2 * 48 + 4 * 24 * 9 * 48)
"""One block of width 48: products on tokens and on text, self-attention, attention to the text (spec step-video A3)."""


@pytest.mark.parametrize(
    ("num_frames", "rows", "columns", "tflops"),
    [
        (204, 16, 16, 1717.20),
        (204, 12, 20, 1592.61),
        (136, 16, 16, 1079.85),
        (136, 12, 20, 1004.89),
        (68, 16, 16, 509.31),
        (68, 12, 20, 475.87),
        (1, 16, 16, 44.99),
    ],
)
def test_table_3_of_step_video(num_frames, rows, columns, tflops):
    """Cells of 16x16 pixels; 3 latent frames for every 17, one for an image; 256 tokens of text."""
    num_tokens = max(num_frames // 17 * 3, 1) * rows * columns
    config = models.config("dit/step_video", "30b")
    assert flops_per_sample(config, num_tokens, 256) / 1e12 == pytest.approx(tflops, abs=0.02)


def counted(name, num_layers, backward):
    """What PyTorch counts for a model of width 48 on one sample of `NUM_TOKENS` tokens with `NUM_TEXT` of text."""
    model = models.build(name, "tiny", num_layers=num_layers, num_heads=2, head_width=24)
    models.model_spec(name).parallelize(model, None, ParallelOptions(attention="math", cross_attention="math"))
    config = model.config
    num_clip = NUM_CLIP if name == "dit/step_video" else 0
    states = torch.rand(1, NUM_TEXT - num_clip, config.caption_channels)
    clip = torch.rand(1, num_clip, config.clip_channels) if num_clip else None
    conditioning = Conditioning(states, torch.ones(states.shape[:2], dtype=torch.bool), clip)
    with FlopCounterMode(display=False) as counter:
        velocity = model(torch.rand(1, NUM_TOKENS, 16), torch.rand(1), conditioning, torch.rand(1, 3, NUM_TOKENS))
        if backward:
            velocity.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["dit/ltx", "dit/step_video"])
def test_a_layer_costs_what_pytorch_counts(name):
    """Forward and backward of 3 layers less that of 2 is the formula of one, exactly: attention and products."""
    config = models.config(name, "tiny", num_layers=1, num_heads=2, head_width=24)
    found = counted(name, 3, backward=True) - counted(name, 2, backward=True)
    assert found == flops_per_sample(config, NUM_TOKENS, NUM_TEXT) == BLOCK


@pytest.mark.parametrize("name", ["dit/ltx", "dit/step_video"])
def test_what_is_left_out(name):
    """Forward of a whole model of 2 layers less a third of the formula, with 16 channels, texts of width 64 and 32, d = 48:

    first and last layer 2 * 24 * 16 * d each, noise level 2 (256 d + 7 d^2), and a caption token 2 (64 d + d^2); Step-Video has
    3 of its 9 tokens from the second encoder, at 2 * 32 * d.
    """
    d, num_clip = 48, 3 if name == "dit/step_video" else 0
    ends = 2 * (2 * 24 * 16 * d) + 2 * (256 * d + 7 * d**2) + (9 - num_clip) * 2 * (64 * d + d**2) + num_clip * 2 * 32 * d
    assert counted(name, 2, backward=False) == 2 * BLOCK // 3 + ends


@pytest.mark.parametrize("name", ["dit/ltx", "dit/step_video"])
def test_a_model_is_as_good_as_its_config(name):
    model = models.build(name, "tiny", device="meta")
    assert flops_per_sample(model, 100, 10) == flops_per_sample(model.config, 100, 10) == model.config.flops(100, 10)


def test_requests_that_cannot_be_answered():
    with pytest.raises(ConfigError, match="LTXVideoVAE has no formula for its FLOPs"):
        flops_per_sample(models.build("vae/ltx", "tiny", device="meta"), 1, 1)
    with pytest.raises(ConfigError, match="num_tokens 0 and num_text_tokens 9 must be at least 1"):
        flops_per_sample(models.config("dit/ltx", "tiny"), 0, 9)
