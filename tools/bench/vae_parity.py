"""The LTX VAE at full width against diffusers with the same weights: largest differences of encode and decode, 1 above 1e-5.

Random weights, scaled so that a release's activations stay near one: convolutions keep the variance of what enters them, the
second one of a residual block adds a tenth. The limit is on the largest difference in parts of the largest value of the output.
With `--float64` our model also runs in float64, which tells how far rounding in float32 takes each of the two (8 bytes
of memory a parameter beside the 4 of the copy that both share).

    python tools/bench/vae_parity.py 0.9.0 0.9.1
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo
from torch import Tensor, nn

from videofm import models

LIMIT = 1e-5
RELEASES = ("0.9.0", "0.9.1", "0.9.5")
RESIDUAL_GAIN = 0.1**0.5


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights as in the docstring above; one-dimensional parameters and tables small but not zero, so that each counts."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and name.endswith(".weight"):
            gain = RESIDUAL_GAIN if ".conv2." in name else 1.0
            parameter.normal_(std=gain * parameter[0].numel() ** -0.5)
        elif name.endswith(("bias", "scale_shift_table", "noise_scale1", "noise_scale2")):
            parameter.normal_(std=0.1)


def build_pair(size: str) -> tuple[nn.Module, nn.Module]:
    """Our model and that of diffusers, which share one copy of the weights; both load strictly."""
    torch.manual_seed(0)
    ours, adapter = models.build("vae/ltx", size).eval(), models.adapter("vae/ltx")
    randomise(ours)
    with torch.device("meta"):
        theirs = AutoencoderKLLTXVideo.from_config(adapter.public_config(ours.config)).eval()  # type: ignore[attr-defined]
    theirs.load_state_dict(adapter.to_public(ours.state_dict()), strict=True, assign=True)
    ours.load_state_dict(adapter.from_public(theirs.state_dict()), strict=True)
    return ours, theirs


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What `call` returns, and its seconds."""
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def difference(name: str, ours: Tensor, theirs: Tensor, exact: Tensor | None, seconds: tuple[float, float]) -> float:
    """Print a line or two; the largest absolute difference in parts of the largest absolute value of `theirs`."""
    error, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
    print(
        f"  {name:7} {'x'.join(map(str, theirs.shape)):14} largest value {scale:5.2f}, std {float(theirs.std()):.2f}  max abs "
        f"error {error:.2e}  relative {error / scale:.2e}  ours {seconds[0]:.1f} s, diffusers {seconds[1]:.1f} s"
    )
    if exact is not None:
        mine, other = (float((result - exact).abs().max()) for result in (ours, theirs))
        print(f"  {'':7} from float64: ours {mine:.2e}, diffusers {other:.2e}")
    return error / scale


@torch.no_grad()
def compare(size: str, shape: tuple[int, int, int], float64: bool) -> float:
    """The largest relative difference of `size` on a clip of `shape` (T, H, W)."""
    ours, theirs = build_pair(size)
    print(f"vae/ltx {size}: {sum(p.numel() for p in ours.parameters()):,} parameters, clip {'x'.join(map(str, shape))}")
    video = torch.rand(1, 3, *shape) * 2 - 1
    posterior, encode_time = timed(lambda: ours.encode(video))
    expected, their_encode_time = timed(lambda: theirs.encode(video).latent_dist)
    sigma = torch.tensor([0.05]) if ours.config.timestep_conditioning else None
    latents = expected.mean
    decoded, decode_time = timed(lambda: ours.decode(latents, sigma, torch.Generator().manual_seed(3)))
    torch.manual_seed(3)  # diffusers draws injected noise from the global generator
    their_decoded, their_decode_time = timed(lambda: theirs.decode(latents, sigma).sample)
    mean = logvar = frames = None
    if float64:
        del theirs
        ours.double()
        exact = ours.encode(video.double())
        mean, logvar = exact.mean, exact.logvar
        level = None if sigma is None else sigma.double()
        frames = ours.decode(latents.double(), level, torch.Generator().manual_seed(3))
    encode_times, decode_times = (encode_time, their_encode_time), (decode_time, their_decode_time)
    return max(
        difference("mean", posterior.mean, latents, mean, encode_times),
        difference("logvar", posterior.logvar, expected.logvar, logvar, encode_times),
        difference("video", decoded, their_decoded, frames, decode_times),
    )


def main() -> int:
    """Compare the releases that are asked for; 1 when one differs by more than `LIMIT` of its scale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["0.9.0"], help=f"of {', '.join(RELEASES)}; 0.9.0 by default")
    parser.add_argument("--shape", type=int, nargs=3, default=(9, 64, 64), metavar=("T", "H", "W"), help="of the clip")
    parser.add_argument("--float64", action="store_true", help="how far each is from our model in float64")
    arguments = parser.parse_args()
    worst = {size: compare(size, tuple(arguments.shape), arguments.float64) for size in arguments.sizes}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of the process {peak:.1f} GiB")
    over = [size for size, error in worst.items() if error > LIMIT]
    print(f"limit {LIMIT:g} of the largest value: {'FAILED for ' + ', '.join(over) if over else 'all within'}")
    return 1 if over else 0


if __name__ == "__main__":
    raise SystemExit(main())
