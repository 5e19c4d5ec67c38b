"""Peak memory of one VAE, in a process of its own, which `python -m tools.bench.vae` starts and whose line of JSON it reads.

An operation runs twice, and the second run counts: the kernel's high-water mark of the process (VmHWM of /proc, set back before
the run), less what was resident before it, less the result where `minus_output` says so. The input is resident before. The
allocator gives freed tensors back at once (`ENVIRONMENT`), so that what was resident was needed.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.bench.vae_models import Shape, build_ours, operations
from videofm.models.vae.base import VideoVAE
from videofm.models.vae.tiling import Tiles, decode_tiled, encode_tiled

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_WAIT_POLICY": "passive"}
"""For glibc: tensors above 64 KiB are mapped one by one, and unmapped when they are freed. For OpenMP: see vae.py."""

STREAM_PIXELS, STREAM_CHUNK = 128, 9


def run_child(request: dict[str, Any]) -> dict[str, int]:
    """What `main` prints for `request`, in bytes, by operation."""
    command = [sys.executable, "-m", "tools.bench.vae_memory", json.dumps(request)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def peak(operation: Callable[[], Any], minus_output: bool) -> int:
    """Bytes that `operation` needs at its worst moment."""
    operation()
    gc.collect()
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark falls to what is resident
    output = operation()
    highest = status_bytes("VmHWM")
    held = output.numel() * output.element_size() if minus_output and isinstance(output, Tensor) else 0
    return highest - before - held


def status_bytes(field: str) -> int:
    """A size of this process by its name in /proc/self/status, such as `VmRSS`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def stream_operations(vae: VideoVAE, num_frames: int) -> dict[str, Callable[[], Tensor]]:
    """Encode and decode a clip by streaming, into one result each; without gradients."""
    tiles = Tiles(STREAM_PIXELS, STREAM_PIXELS, 0, 0, STREAM_CHUNK)
    video = torch.rand(1, 3, num_frames, STREAM_PIXELS, STREAM_PIXELS) * 2 - 1
    latents = torch.randn(1, vae.latent_channels, vae.latent_frames(num_frames), *(STREAM_PIXELS // 32,) * 2)
    sigma = torch.full((1,), 0.05) if vae.timestep_conditioning else None

    @torch.no_grad()
    def encode() -> Tensor:
        posterior = encode_tiled(vae, video, tiles)
        return torch.stack([posterior.mean, posterior.logvar])

    @torch.no_grad()
    def decode() -> Tensor:
        return decode_tiled(vae, latents, tiles, sigma, torch.Generator().manual_seed(0))

    return {"encode": encode, "decode": decode}


def main() -> None:
    """Measure what the JSON on the command line asks for."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    if request["what"] == "stream":
        vae = build_ours(request["release"], decoder_causal=True)
        found = {name: peak(run, minus_output=True) for name, run in stream_operations(vae, request["num_frames"]).items()}
    else:
        runs = operations(request["release"], Shape(*request["shape"]))[request["what"]]
        found = {name: peak(run, minus_output=False) for name, run in runs.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
