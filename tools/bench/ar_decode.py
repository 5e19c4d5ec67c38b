"""Autoregressive decoding with a cache of keys and values against computing the whole sequence for every token.

python -m tools.bench.ar_decode [--quick] [--tokens 1024] [--width 128] [--layers 4] [--batch 1] [--guided]

Both draw the same window with the same seeds, on a GPU where there is one. It prints seconds, milliseconds a token and the
ratio, and the largest difference of the logits that tokens were drawn from, over their largest value. Aims, at 1,024 tokens: at
least 5 times faster, the same tokens, and logits within 1e-5 of each other. Exits with 1 where one is missed; the time of a
shorter window is no aim (--quick, or --tokens below 1024).
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded

import torch
from torch import Tensor, nn

from videofm import models
from videofm.sampling.autoregressive import TokenSampling, sample_tokens
from videofm.types import Conditioning

AIM_RATIO, AIM_TOKENS = 5.0, 1024
"""How many times faster decoding with the cache has to be, from which number of tokens on."""
TOLERANCE = 1e-5
ROWS = 8
"""Rows and columns of the grid; a token frame is 64 tokens."""
NUM_TEXT_TOKENS = 32


@dataclass(frozen=True)
class Rollout:
    """The tokens `(B, L)` that were drawn, the logits `(B, L, V)` they were drawn from, and the seconds it took."""

    tokens: Tensor
    logits: Tensor
    seconds: float


def build(width: int, num_layers: int, device: str) -> nn.Module:
    """A model with the vocabulary of the tiny size and random weights; its head is larger than a fresh one's, so that tokens
    differ in how likely they are."""
    torch.manual_seed(0)
    ar = models.build("ar/transformer", "tiny", device, width=width, num_layers=num_layers, num_heads=width // 32)
    with torch.no_grad():
        ar.head.weight.mul_(20)
    return ar.eval()


def rollout(ar: nn.Module, num_tokens: int, batch: int, guided: bool, use_cache: bool) -> Rollout:
    """Draw a window of `num_tokens` in one of the two ways."""
    device = next(ar.parameters()).device
    generator = torch.Generator().manual_seed(1)
    shape = (batch, NUM_TEXT_TOKENS, ar.config.caption_channels)
    text, negative = (
        Conditioning(torch.randn(shape, generator=generator).to(device), torch.ones(shape[:2], dtype=torch.bool, device=device))
        for _ in range(2)
    )
    logits: list[Tensor] = []
    settings = TokenSampling(guidance_scale=2.0 if guided else 1.0)
    grid = (num_tokens // ROWS**2, ROWS, ROWS)
    before = time.perf_counter()
    made = sample_tokens(ar, text, negative, grid, range(batch), settings, use_cache=use_cache, on_step=logits.append)
    tokens = made.flatten(1).cpu()  # waits for the device
    return Rollout(tokens, torch.stack(logits, dim=1).cpu(), time.perf_counter() - before)


def verdict(cached: Rollout, whole: Rollout, num_tokens: int) -> tuple[list[str], bool]:
    """Each aim, what was found and whether it is met, a line each; and whether all are."""
    apart = float((cached.logits - whole.logits).abs().max() / whole.logits.abs().max())
    ratio, same = whole.seconds / cached.seconds, torch.equal(cached.tokens, whole.tokens)
    timed = num_tokens >= AIM_TOKENS
    rows = [
        (f"{ratio:.1f} times faster", f"at least {AIM_RATIO:g}" if timed else "", ratio >= AIM_RATIO or not timed),
        (f"logits apart by {apart:.1e}", f"at most {TOLERANCE:.0e}", apart <= TOLERANCE),
        (f"tokens equal: {same}", "all", same),
    ]
    lines = [f"{told} (aim: {aim}, {'met' if met else 'MISSED'})" if aim else f"{told} (no aim)" for told, aim, met in rows]
    return lines, all(met for _, _, met in rows)


def main() -> int:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help=f"tokens of a window, a multiple of {ROWS**2} (default 1024)")
    parser.add_argument("--width", type=int, default=128, help="of the model, a multiple of 32 (default 128)")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the model (default 4)")
    parser.add_argument("--batch", type=int, default=1, help="videos drawn together (default 1)")
    parser.add_argument("--guided", action="store_true", help="with guidance: twice the rows")
    parser.add_argument("--quick", action="store_true", help="128 tokens, width 64, 2 layers: a check, and no measurement")
    args = parser.parse_args()
    num_tokens, width, layers = (128, 64, 2) if args.quick else (args.tokens, args.width, args.layers)
    if num_tokens < 1 or num_tokens % ROWS**2:
        parser.error(f"--tokens {num_tokens} is no multiple of {ROWS**2}, the tokens of a frame")
    if width < 1 or width % 32:
        parser.error(f"--width {width} is no multiple of 32, the width of a head")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ar = build(width, layers, device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    size = sum(parameter.numel() for parameter in ar.parameters()) / 1e6
    print(f"{name}, torch {torch.__version__}, float32; {size:.1f}M parameters, batch {args.batch}, {num_tokens} tokens")
    rollout(ar, ROWS**2, args.batch, args.guided, True)  # what is set up at the first call
    found = {use_cache: rollout(ar, num_tokens, args.batch, args.guided, use_cache) for use_cache in (True, False)}
    for use_cache, made in found.items():
        what = "with the cache" if use_cache else "without it"
        print(f"{what:16} {made.seconds:8.2f} s  {made.seconds / num_tokens * 1000:8.3f} ms a token")
    lines, met = verdict(found[True], found[False], num_tokens)
    print("\n".join(lines))
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
