"""From an image VAE to a video VAE: the weights of diffusers' `AutoencoderKL`, put into one temporal tap each (spec A.3).

A video VAE that follows the layout below, with a time axis in some of its kernels, equals the image VAE before it is trained: a
causal convolution takes the 2D kernel into its last tap, which is the present, any other into its centre.

Our names of the parts, in encoder and decoder: `conv_in`, `stages.{level}.blocks.{j}.{norm1,conv1,norm2,conv2,shortcut}`,
`stages.{level}.downsample` or `stages.{level}.upsample.conv`, `middle.blocks.{0,1}`, `middle.attention.{norm,q,k,v,out}`,
`norm_out`, `conv_out`; and `quant_conv`, `post_quant_conv`. Level 0 is the finest in both directions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from videofm.errors import CheckpointError
from videofm.models.catalog import model_spec
from videofm.models.io import COMMITTED, PUBLIC_WEIGHTS, load, read_json, read_weights
from videofm.models.spec import AS_IS, KeyMap, Layout, Pair, list_keys, pointwise
from videofm.ops.causal_conv import CausalConv3d

IMAGE_CLASS, IMAGE_MODEL = "AutoencoderKL", "vae/image_kl"
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _coder_pairs(ours: str, stages: str, resample: tuple[str, str], kernels: Layout) -> list[Pair]:
    flat = pointwise(0)  # very old files store attention as convolutions of size one
    pairs: list[Pair] = [
        (f"{ours}.{resample[0]}.{{p}}", f"{ours}.{resample[1]}.{{p}}"),
        (f"{ours}.conv_in.{{p}}", f"{ours}.conv_in.{{p}}"),
        (f"{ours}.norm_out.{{p}}", f"{ours}.conv_norm_out.{{p}}"),
        (f"{ours}.conv_out.{{p}}", f"{ours}.conv_out.{{p}}"),
        (f"{ours}.middle.attention.norm.{{p}}", f"{ours}.mid_block.attentions.0.group_norm.{{p}}"),
    ]
    for block, public in (("middle.blocks.{j}", "mid_block.resnets.{j}"), ("stages.{i}.blocks.{j}", stages + ".resnets.{j}")):
        pairs += [
            (f"{ours}.{block}.norm{{k}}.{{p}}", f"{ours}.{public}.norm{{k}}.{{p}}"),
            (f"{ours}.{block}.conv{{k}}.{{p}}", f"{ours}.{public}.conv{{k}}.{{p}}", kernels),
            (f"{ours}.{block}.shortcut.{{p}}", f"{ours}.{public}.conv_shortcut.{{p}}", kernels),
        ]
    for name, public in {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}.items():
        pairs.append((f"{ours}.middle.attention.{name}.{{p}}", f"{ours}.mid_block.attentions.0.{public}.{{p}}", flat))
    return pairs


def coder_pairs(kernels: Layout = AS_IS) -> list[Pair]:
    """Our names and those of diffusers for encoder and decoder, but for the order of decoder stages: see `reverse_stages`.

    Args:
        kernels: how convolutions of ResBlocks are stored in public.
    """
    return [
        *_coder_pairs("encoder", "down_blocks.{i}", ("stages.{i}.downsample", "down_blocks.{i}.downsamplers.0.conv"), kernels),
        *_coder_pairs("decoder", "up_blocks.{i}", ("stages.{i}.upsample.conv", "up_blocks.{i}.upsamplers.0.conv"), kernels),
    ]


QUANT_PAIRS: list[Pair] = [("quant_conv.{p}", "quant_conv.{p}"), ("post_quant_conv.{p}", "post_quant_conv.{p}")]


def reverse_stages(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with `decoder.stages` counted from the other end: we count from the finest, diffusers from the coarsest."""
    pattern = re.compile(r"decoder\.stages\.([0-9]+)\.")
    last = max((int(match[1]) for match in map(pattern.match, tensors) if match), default=0)
    return {pattern.sub(lambda match: f"decoder.stages.{last - int(match[1])}.", key): x for key, x in tensors.items()}


@dataclass(frozen=True)
class ImageVAETensors:
    """An image VAE on disk: its `config.json`, and its tensors under the names of diffusers' `AutoencoderKL`."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def image_tensors(folder: str | Path) -> ImageVAETensors:
    """Read an image VAE: a local folder of diffusers' `AutoencoderKL` (the attention names of its early days are accepted
    too), or a run or checkpoint that trained a `vae/image_kl` as role `vae`.

    Raises:
        CheckpointError: the folder, one of its two files, or the class is not what it should be.
    """
    folder = Path(folder)
    if (folder / "checkpoints").is_dir() or (folder / COMMITTED).is_file():
        return _of_run(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json: expected a folder of diffusers' {IMAGE_CLASS}, with config.json and "
            f"{PUBLIC_WEIGHTS[0]} (in a pipeline that is its vae folder)."
        )
    config = read_json(folder / "config.json")
    if config.get("_class_name") != IMAGE_CLASS:
        raise CheckpointError(f"{folder / 'config.json'} is of class {config.get('_class_name')!r}; expected {IMAGE_CLASS!r}.")
    return ImageVAETensors(config, modern_names(read_weights(folder / PUBLIC_WEIGHTS[0], "cpu")))


def _of_run(path: Path) -> ImageVAETensors:
    model = load(path, role="vae")
    if model.spec_name != IMAGE_MODEL:
        raise CheckpointError(f"{path} trained {model.spec_name}, which is no image VAE; expected {IMAGE_MODEL}.")
    adapter = model_spec(IMAGE_MODEL).adapter
    return ImageVAETensors(adapter.public_config(model.config), adapter.to_public(model.state_dict()))


def with_quant_convs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names with `quant_conv` and `post_quant_conv`: those that the image VAE lacks (SD3's has none) as identities."""
    full = dict(tensors)
    moments, latents = tensors["encoder.conv_out.weight"].shape[0], tensors["decoder.conv_in.weight"].shape[1]
    widths = {"quant_conv": moments, "post_quant_conv": latents}
    for name, width in widths.items():
        if f"{name}.weight" not in full:
            full[f"{name}.weight"] = torch.eye(width).view(width, width, 1, 1)
            full[f"{name}.bias"] = torch.zeros(width)
    return full


def modern_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with `to_q`, `to_k`, `to_v`, `to_out.0` for `query`, `key`, `value`, `proj_attn`."""
    pattern = re.compile(rf"(attentions\.[0-9]+)\.({'|'.join(_OLD_ATTENTION)})\.")
    return {pattern.sub(lambda match: f"{match[1]}.{_OLD_ATTENTION[match[2]]}.", key): x for key, x in tensors.items()}


def our_names(image: ImageVAETensors) -> dict[str, Tensor]:
    """The tensors of an image VAE under our names (see the head of this file), as they are: 2D kernels `(O, I, kh, kw)`.

    Raises:
        CheckpointError: a key that `AutoencoderKL` does not have.
    """
    return reverse_stages(KeyMap([*coder_pairs(), *QUANT_PAIRS]).from_public(image.tensors))


def inflate_kernel(kernel: Tensor, num_taps: int, causal: bool) -> Tensor:
    """A 2D kernel `(O, I, kh, kw)` as a 3D one `(O, I, num_taps, kh, kw)` that looks at one frame only.

    The last tap when causal, where that frame is the present; else the centre. All other taps are zero.
    """
    inflated = kernel.new_zeros(*kernel.shape[:2], num_taps, *kernel.shape[2:])
    inflated[:, :, num_taps - 1 if causal else num_taps // 2] = kernel
    return inflated


def fold_quant_convs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names without `quant_conv` and `post_quant_conv`, which go into the convolutions beside them.

    Folding `quant_conv` is exact. `post_quant_conv` comes before the zero padding of `decoder.conv_in`; folded, its bias counts
    in the padding too. So the outermost outputs of that convolution differ, and with them, through norms, a little of every
    pixel, unless that bias is zero.
    """
    folded = dict(tensors)
    if "quant_conv.weight" in folded:
        mix, bias = folded.pop("quant_conv.weight").flatten(1), folded.pop("quant_conv.bias")
        folded["encoder.conv_out.weight"] = torch.einsum("om,mihw->oihw", mix, folded["encoder.conv_out.weight"])
        folded["encoder.conv_out.bias"] = mix @ folded["encoder.conv_out.bias"] + bias
    if "post_quant_conv.weight" in folded:
        mix, bias = folded.pop("post_quant_conv.weight").flatten(1), folded.pop("post_quant_conv.bias")
        kernel = folded["decoder.conv_in.weight"]
        folded["decoder.conv_in.weight"] = torch.einsum("omhw,mi->oihw", kernel, mix)
        folded["decoder.conv_in.bias"] = folded["decoder.conv_in.bias"] + torch.einsum("omhw,m->o", kernel, bias)
    return folded


@torch.no_grad()
def fill(
    model: nn.Module, tensors: Mapping[str, Tensor], source: str | Path, without_counterpart: Collection[str] = ()
) -> None:
    """Put 2D `tensors`, under our names, into `model` in place.

    A kernel goes into one temporal tap, the last where the convolution is causal. An upsampler with r times the output
    channels, which become r frames, gets r copies.

    Args:
        model: with the layout at the head of this file.
        tensors: of the image VAE.
        source: named in errors.
        without_counterpart: beginnings of names of the model's own tensors, which stay as they are.

    Raises:
        CheckpointError: a tensor of the image VAE without a place, a place without a tensor, or one of another shape.
    """
    state = {
        key: tensor
        for key, tensor in model.state_dict(keep_vars=True).items()
        if not key.startswith(("latents_", *without_counterpart))
    }
    problems = {
        "not in the model": [key for key in tensors if key not in state],
        "missing": [key for key in state if key not in tensors],
    }
    inflated = {key: _inflated(model, key, tensors[key], state[key]) for key in state if key in tensors}
    problems["of another shape"] = [
        f"{key} {tuple(tensors[key].shape)} for {tuple(state[key].shape)}"
        for key, tensor in inflated.items()
        if tensor.shape != state[key].shape
    ]
    found = [f"{len(keys)} {what}: {list_keys(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise CheckpointError(f"the image VAE of {source} does not fit {model.spec_name}. Tensors {'; '.join(found)}.")
    for key, tensor in inflated.items():
        state[key].copy_(tensor)


def _inflated(model: nn.Module, key: str, tensor: Tensor, like: Tensor) -> Tensor:
    module = model.get_submodule(key.rpartition(".")[0])
    if like.ndim == 5 and tensor.ndim == 4:
        tensor = inflate_kernel(tensor, like.shape[2], isinstance(module, CausalConv3d) and module.causal)
    if ".upsample." in key:
        tensor = tensor.repeat(like.shape[0] // tensor.shape[0], *(1,) * (tensor.ndim - 1))  # (O, ...) -> (r O, ...)
    return tensor
