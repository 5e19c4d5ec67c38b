"""One training step of the LTX transformer against diffusers' with the same weights: forward, squared error, all gradients.

python -m tools.bench.dit [--tokens 1024 2048] [--precision fp32 bf16] [--repeats 5]

Both models in one process, in turns, each first in every other turn; the ratio is taken turn by turn (theirs / ours). Aim on
CPU: float32 never slower; bf16 (autocast, without compilation) is shown without an aim. 128 text tokens.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded

import torch
from diffusers import LTXVideoTransformer3DModel
from torch import Tensor, nn

from tools.bench.vae import turns
from videofm import models
from videofm.types import Compression, Conditioning

SHAPE = {"in_channels": 128, "num_layers": 6, "num_heads": 8, "head_width": 64, "caption_channels": 512}
TEXT_TOKENS, GRID, FPS = 128, 16, 25.0
COMPRESSION = Compression(8, 32, 32)


def build() -> tuple[nn.Module, nn.Module]:
    """Ours, and diffusers' with its weights; random ones, so that no layer is zero."""
    torch.manual_seed(0)
    ours = models.build("dit/ltx", "2b", **SHAPE)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.02)
    adapter = models.adapter("dit/ltx")
    theirs = LTXVideoTransformer3DModel.from_config(adapter.public_config(ours.config))
    theirs.load_state_dict(adapter.to_public(ours.state_dict()), strict=True)
    return ours, theirs


def steps(ours: nn.Module, theirs: nn.Module, num_tokens: int, dtype: torch.dtype | None) -> tuple[Callable[[], Any], ...]:
    """A training step of each on the same inputs; they must predict the same."""
    shape = (num_tokens // GRID**2, GRID, GRID)
    tokens, target = torch.randn(2, 1, num_tokens, SHAPE["in_channels"])
    text = Conditioning(torch.randn(1, TEXT_TOKENS, SHAPE["caption_channels"]), torch.ones(1, TEXT_TOKENS, dtype=torch.bool))
    sigma = torch.tensor([0.7])
    coordinates = ours.coordinates(shape, torch.tensor([FPS]), COMPRESSION)

    def predict_ours() -> Tensor:
        return ours(tokens, sigma, text, coordinates)

    def predict_theirs() -> Tensor:
        sizes = dict(zip(("num_frames", "height", "width"), shape, strict=True))
        scale = (COMPRESSION.time / FPS, COMPRESSION.height, COMPRESSION.width)
        arguments = (tokens, text.embeddings, sigma * 1000, text.mask)
        return theirs(*arguments, **sizes, rope_interpolation_scale=scale, return_dict=False)[0]

    with torch.no_grad():
        torch.testing.assert_close(predict_ours(), predict_theirs(), rtol=0, atol=1e-4)

    def step(model: nn.Module, predict: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = (predict().float() - target).square().mean()
            loss.backward()

        return run

    return step(ours, predict_ours), step(theirs, predict_theirs)


def main() -> int:
    """Print the table; 1 when a float32 median is below 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 2048], help=f"sequence lengths, multiples of {GRID**2}")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"], help="which to compare")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours, theirs = build()
    count = sum(parameter.numel() for parameter in ours.parameters())
    print(f"LTX transformer, {count / 1e6:.1f} M parameters, {args.threads} threads, batch 1")
    met = True
    for precision in args.precision:
        for num_tokens in args.tokens:
            runs = steps(ours, theirs, num_tokens, torch.bfloat16 if precision == "bf16" else None)
            found = turns(*runs, args.repeats, lambda: None)
            low, middle, high = statistics.quantiles([other / own for own, other in found], n=4)
            own, other = (statistics.median(side) * 1000 for side in zip(*found, strict=True))
            line = f"{precision} {num_tokens:5} tokens: ours {own:8.1f} ms, diffusers {other:8.1f} ms, ratio {middle:.2f}"
            print(f"{line} (quartiles {low:.2f} to {high:.2f})", flush=True)
            met = met and (precision != "fp32" or middle >= 1)
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
