"""Tiny transformers with weights that hide nothing, and a training step of them, for tests of what blocks are wrapped in."""

import torch

from videofm import models
from videofm.types import Compression, Conditioning

NAMES = ("dit/ltx", "dit/step_video")
GRID = (3, 4, 4)
TOKENS = 48
_SHAPE = {"num_heads": 2, "head_width": 16, "caption_channels": 12}
_EXTRA = {"dit/ltx": {}, "dit/step_video": {"clip_channels": 8}}


def build(name, num_layers=4):
    torch.manual_seed(0)
    model = models.build(name, "tiny", num_layers=num_layers, **_SHAPE, **_EXTRA[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def inputs(model, batch=2, grid=GRID, num_text=6):
    generator = torch.Generator().manual_seed(1)
    num_tokens = grid[0] * grid[1] * grid[2]
    clip_channels = _EXTRA[model.spec_name].get("clip_channels")
    clip = None if clip_channels is None else torch.randn(batch, 3, clip_channels, generator=generator)
    mask = torch.arange(num_text)[None] < torch.arange(2, 2 + batch)[:, None]
    text = Conditioning(torch.randn(batch, num_text, _SHAPE["caption_channels"], generator=generator), mask, clip)
    tokens = torch.randn(batch, num_tokens, model.config.in_channels, generator=generator)
    coordinates = model.coordinates(grid, torch.full((batch,), 8.0), Compression(4, 8, 8))
    return tokens, torch.linspace(0.2, 0.9, batch), text, coordinates


def treat(model, **options):
    return models.model_spec(model.spec_name).parallelize(model, None, models.ParallelOptions(**options))


def gradients(model, made, dtype=None):
    """Name -> gradient of the mean square of the velocity, and the velocity itself under the name `velocity`."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        velocity = model(*made)
    velocity.float().square().mean().backward()
    return {"velocity": velocity.detach()} | {name: p.grad for name, p in model.named_parameters()}
