"""Convert the public weights of perceptual networks, which you have downloaded, to the safetensors files that videofm reads.

python tools/convert_perceptual.py lpips --vgg vgg16.pth --heads vgg.pth --output lpips.safetensors
python tools/convert_perceptual.py i3d --checkpoint rgb_imagenet.pt --output i3d.safetensors
"""

from __future__ import annotations

import argparse
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from videofm import models
from videofm.errors import CheckpointError, VideofmError
from videofm.models.io import load_weights


def convert_lpips(vgg: Path, heads: Path, out: Path, size: str = "vgg16") -> None:
    """Write VGG16's convolutions and the linear heads into `out`; the classifier of VGG16 is not needed.

    Raises:
        CheckpointError: a file that cannot be read, or that is not what it should be.
    """
    convolutions = {key: tensor for key, tensor in _read(vgg).items() if not key.startswith("classifier.")}
    _write("perceptual/lpips", size, convolutions | _read(heads), out, f"{vgg} with {heads}")


def convert_i3d(checkpoint: Path, out: Path, size: str = "kinetics400") -> None:
    """Write the network of `checkpoint` into `out`.

    Raises:
        CheckpointError: a file that cannot be read, or that is not what it should be.
    """
    _write("perceptual/i3d", size, _read(checkpoint), out, str(checkpoint))


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} cannot be read as a file of tensors (no code in it is run): {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path} is not a state dict: names with tensors.")
    return tensors


def _write(name: str, size: str, public: dict[str, Tensor], out: Path, source: str) -> None:
    try:
        tensors = models.adapter(name).from_public(public)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    load_weights(models.build(name, size, device="meta"), tensors, source)  # refuses what does not fit
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.float().contiguous() for key, tensor in tensors.items()}, out, metadata={"format": "pt"})


def main(arguments: Sequence[str]) -> int:
    """Run one conversion; 0 when the file is written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    networks = parser.add_subparsers(dest="network", required=True)
    lpips = networks.add_parser("lpips", help="LPIPS v0.1 on VGG16")
    lpips.add_argument("--vgg", type=Path, required=True, help="state dict of torchvision's vgg16 (ImageNet)")
    lpips.add_argument("--heads", type=Path, required=True, help="weights/v0.1/vgg.pth of the lpips package")
    i3d = networks.add_parser("i3d", help="Inception I3D on RGB, Kinetics-400")
    i3d.add_argument("--checkpoint", type=Path, required=True, help="rgb_imagenet.pt of pytorch-i3d")
    for network in (lpips, i3d):
        network.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    given = parser.parse_args(arguments)
    try:
        if given.network == "lpips":
            convert_lpips(given.vgg, given.heads, given.output)
        else:
            convert_i3d(given.checkpoint, given.output)
    except VideofmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {given.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
