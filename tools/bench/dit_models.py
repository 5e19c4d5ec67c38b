"""The LTX transformer, ours and that of diffusers, with the same weights, eager and compiled: a training step of each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import LTXVideoTransformer3DModel
from torch import Tensor, nn

from videofm import models
from videofm.models import ParallelOptions
from videofm.types import Compression, Conditioning

SCALED: dict[str, Any] = {"num_layers": 6, "num_heads": 8, "head_width": 64, "caption_channels": 512}
"""28 M parameters; a step at 2,048 tokens takes seconds on two cores."""
TEXT_TOKENS, FPS, IN_CHANNELS = 128, 25.0, 128
GRID = 16
"""Rows and columns of latent cells; tokens are a multiple of the cells of a frame."""
COMPRESSION = Compression(8, 32, 32)


@dataclass(frozen=True)
class Case:
    """What is run: `size` is `scaled` or one of dit/ltx; `checkpointing` is ours, diffusers has its own unless it is `none`."""

    size: str
    device: str
    num_tokens: int
    precision: str
    checkpointing: str = "none"

    @property
    def dtype(self) -> torch.dtype | None:
        """What autocast computes in; None where it is off."""
        return torch.bfloat16 if self.precision == "bf16" else None


@dataclass(frozen=True)
class Variant:
    """`predict` is a forward pass without autocast, `forward` one as in training, `step` that and all gradients."""

    predict: Callable[[], Tensor]
    forward: Callable[[], Tensor]
    step: Callable[[], None]


def build(size: str, device: str, num_layers: int | None = None) -> tuple[nn.Module, nn.Module]:
    """Ours, and diffusers' with its weights; random ones, so that no layer is zero."""
    torch.manual_seed(0)
    shape = dict(SCALED) if size == "scaled" else {}
    shape |= {} if num_layers is None else {"num_layers": num_layers}
    ours = models.build("dit/ltx", "2b" if size == "scaled" else size, **shape).to(device)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.02)
    adapter = models.adapter("dit/ltx")
    theirs = LTXVideoTransformer3DModel.from_config(adapter.public_config(ours.config)).to(device)
    theirs.load_state_dict(adapter.to_public(ours.state_dict()), strict=True)
    return ours, theirs.train()


def variants(ours: nn.Module, theirs: nn.Module, case: Case, is_compiled: bool) -> dict[str, Variant]:
    """A step of `ours` and of `diffusers`, and where asked for of both with compiled blocks, on the same inputs.

    All share the weights and predict the same.
    """
    inputs = _inputs(ours, case)
    found = {}
    for is_graph in (False, True)[: 1 + is_compiled]:
        end = " compiled" if is_graph else ""
        found[f"ours{end}"] = _variant(_our_model(ours, case, is_graph), _call_ours, inputs, case)
        found[f"diffusers{end}"] = _variant(_their_model(theirs, case, is_graph), _call_theirs, inputs, case)
    with torch.no_grad():
        expected = found["diffusers"].predict()
        torch.testing.assert_close(found["ours"].predict(), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    return found


@dataclass(frozen=True)
class _Inputs:
    tokens: Tensor
    sigma: Tensor
    text: Conditioning
    coordinates: Tensor
    grid: tuple[int, int, int]
    target: Tensor


def _inputs(ours: Any, case: Case) -> _Inputs:
    generator = torch.Generator().manual_seed(case.num_tokens)
    tokens, target = torch.randn(2, 1, case.num_tokens, IN_CHANNELS, generator=generator).to(case.device)
    states = torch.randn(1, TEXT_TOKENS, ours.config.caption_channels, generator=generator).to(case.device)
    text = Conditioning(states, torch.ones(1, TEXT_TOKENS, dtype=torch.bool, device=case.device))
    grid = (case.num_tokens // GRID**2, GRID, GRID)
    coordinates = ours.coordinates(grid, torch.tensor([FPS], device=case.device), COMPRESSION)
    return _Inputs(tokens, torch.tensor([0.7], device=case.device), text, coordinates, grid, target)


def _call_ours(model: Any, inputs: _Inputs) -> Tensor:
    return model(inputs.tokens, inputs.sigma, inputs.text, inputs.coordinates)


def _call_theirs(model: Any, inputs: _Inputs) -> Tensor:
    sizes = dict(zip(("num_frames", "height", "width"), inputs.grid, strict=True))
    scale = (COMPRESSION.time / FPS, COMPRESSION.height, COMPRESSION.width)
    arguments = (inputs.tokens, inputs.text.embeddings, inputs.sigma * 1000, inputs.text.mask)
    return model(*arguments, **sizes, rope_interpolation_scale=scale, return_dict=False)[0]


def _twin(model: nn.Module) -> nn.Module:
    """Modules of its own around the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _our_model(model: nn.Module, case: Case, is_compiled: bool) -> nn.Module:
    options = ParallelOptions(dtype=case.dtype, compile=is_compiled, activation_checkpointing=case.checkpointing)  # type: ignore[arg-type]
    return models.model_spec("dit/ltx").parallelize(_twin(model), None, options)


def _their_model(model: nn.Module, case: Case, is_compiled: bool) -> nn.Module:
    twin: Any = _twin(model)
    if case.checkpointing != "none":
        twin.enable_gradient_checkpointing()
    if is_compiled:
        twin.compile_repeated_blocks()
    return twin


def _variant(model: nn.Module, call: Callable[[Any, _Inputs], Tensor], inputs: _Inputs, case: Case) -> Variant:
    def predict() -> Tensor:
        return call(model, inputs)

    def forward() -> Tensor:
        with torch.autocast(case.device, case.dtype, enabled=case.dtype is not None):
            return predict()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        (forward().float() - inputs.target).square().mean().backward()

    return Variant(predict, forward, step)
