"""A small perceptron on top of image embeddings: LAION's aesthetic and NSFW heads, or any stack of linear layers.

Layout of the file: `N.weight (out, in)` and `N.bias (out)`, under any prefix (`layers.0.weight`), in the order of N; or one
`weight` and `bias`. Optional `mean (in)` and `variance (in)` are taken off the embedding first (Keras' `Normalization`).
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from data_pipelines.models.folder import check_safetensors
from videofm.errors import CheckpointError

_LAYER = re.compile(r"(?:[A-Za-z_]\w*\.)*?(?:(\d+)\.|[A-Za-z_]\w*\.)?(weight|bias)")
_EPSILON = 1e-7
"""Least standard deviation that Keras' `Normalization` divides by."""
ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}
OUTPUTS = {"none": lambda x: x, "sigmoid": torch.sigmoid}


class Head:
    """Embeddings `(N, D)` to numbers `(N,)`.

    Raises:
        CheckpointError: the file is damaged, its layers do not fit together, or they do not take embeddings of `width`.
    """

    def __init__(self, path: Path, width: int, activation: str, output: str) -> None:
        self.path, self.activation, self.output = path, ACTIVATIONS[activation], OUTPUTS[output]
        shapes = check_safetensors(path)
        self.layers = _layers(path, shapes)
        widths = [shapes[weight] for weight, _ in self.layers]
        if widths[0][1] != width:
            raise CheckpointError(
                f"{path} takes embeddings of width {widths[0][1]}, the model makes {width}: it is of another one"
            )
        for (below, _), (_, above) in itertools.pairwise(widths):
            if below != above:
                raise CheckpointError(f"{path}: a layer of {below} outputs is followed by one of {above} inputs")
        if widths[-1][0] != 1:
            raise CheckpointError(f"{path} ends with {widths[-1][0]} outputs; a score is one number")
        for weight, bias in self.layers:
            if bias in shapes and shapes[bias] != shapes[weight][:1]:
                raise CheckpointError(f"{path}: {bias} is {shapes[bias]}, {weight} is {shapes[weight]}")
        for name in ("mean", "variance"):
            if name in shapes and shapes[name] != [width]:
                raise CheckpointError(f"{path}: {name} is {shapes[name]}, wanted is [{width}]")
        self._tensors: dict[str, Tensor] = {}

    def load(self, device: str) -> None:
        """Read the layers onto `device`, in float32."""
        self._tensors = {name: tensor.float() for name, tensor in load_file(self.path, device=device).items()}

    def __call__(self, embeddings: Tensor) -> Tensor:
        """`(N, D)` -> `(N,)`."""
        x, tensors = embeddings.float(), self._tensors
        if "mean" in tensors:
            x = (x - tensors["mean"]) / tensors["variance"].sqrt().clamp_min(_EPSILON)
        for number, (weight, bias) in enumerate(self.layers):
            x = F.linear(self.activation(x) if number else x, tensors[weight], tensors.get(bias))
        result: Tensor = self.output(x.squeeze(-1))
        return result


def _layers(path: Path, shapes: dict[str, list[int]]) -> list[tuple[str, str]]:
    """Names of weight and bias of each layer, in order."""
    found: dict[int, str] = {}
    norm = {"mean", "variance"} & shapes.keys()
    if len(norm) == 1:
        raise CheckpointError(f"{path} has {norm.pop()} without its partner; mean and variance belong together")
    for name, shape in shapes.items():
        match = _LAYER.fullmatch(name)
        if name in ("mean", "variance"):
            continue
        if match is None or (match[2] == "weight" and len(shape) != 2):
            raise CheckpointError(
                f"{path}: {name} {shape} is no part of a linear layer; wanted are N.weight (out, in), N.bias (out)"
            )
        if match[2] == "weight":
            number = int(match[1] or 0)
            if number in found:
                raise CheckpointError(f"{path}: {found[number]} and {name} both are layer {number}")
            found[number] = name
    layers = [(found[number], found[number].removesuffix("weight") + "bias") for number in sorted(found)]
    stray = shapes.keys() - {name for pair in layers for name in pair} - {"mean", "variance"}
    if stray or not layers:
        raise CheckpointError(f"{path} holds no stack of linear layers: {', '.join(sorted(stray)[:3]) or 'it is empty'}")
    return layers
