"""One clip on several ranks gives what one device gives: values, gradients of inputs, and gradients of parameters once summed.

Four processes, in two groupings: all four share a clip (context degree 4), or two pairs each share one (degree 2; the second
pair does not contain global rank 0). The reference is what one process alone computes: of VAEs, which take long, each process
computes a share of the references and all have them from it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers import run_distributed
from videofm import models
from videofm.models.vae.base import VideoVAE
from videofm.models.vae.cv_vae.model import TemporalAttention
from videofm.models.vae.parallelize import ContextCache
from videofm.ops.causal_conv import CausalConv3d
from videofm.ops.norm import GroupNorm
from videofm.parallel.halo import ContextRanks, spans_of

COUNTS: dict[int, dict[int, list[list[int]]]] = {
    2: {17: [[9, 8], [1, 16]]},
    4: {17: [[5, 4, 4, 4], [1, 1, 1, 14]], 21: [[6, 5, 5, 5], [2, 1, 17, 1]], 33: [[9, 8, 8, 8], [1, 2, 3, 27]]},
}
"""Frames of each rank, by degree and length of the clip. The second of each has chunks shorter than a halo of 4 frames, which
then comes from up to three ranks, and at stride 2 ranks without an output."""

VAES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "ltx": ("vae/ltx", {}, (13, 25)),
    "ltx noise": (
        "vae/ltx",
        {"inject_noise": (True, True, True), "timestep_conditioning": True, "decoder_causal": True},
        (17,),
    ),
    "ltx conv": ("vae/ltx", {"encoder_widths": (16, 32), "encoder_downsample": ("conv", "conv")}, (17,)),
    "cv": ("vae/cv_vae", {}, (13, 17)),
    "cv released": ("vae/cv_vae", {"norm_scope": "clip", "temporal_attention": "released", "norm_eps": 1e-5}, (17,)),
    "cv sd3": ("vae/cv_vae_sd3", {}, (21,)),
    "od": ("vae/od_vae", {}, (13, 17)),
    "od clip": ("vae/od_vae", {"norm_scope": "clip", "middle_block": "half"}, (21,)),
    "od causal": ("vae/od_vae", {"time_interpolation": "nearest"}, (13,)),
    "step": ("vae/step_video", {}, (1, 51)),
    "step stage one": ("vae/step_video", {"dual_path": False, "norm_scope": "clip", "blend_seams": False}, (34,)),
}
"""Kind, overrides of the tiny size, and lengths of clips. 13 frames are 4 latent frames: on 4 ranks one each, so that rank 0
has a single frame at every level."""


# -- what the four processes do


def _everything(rank: int, world_size: int) -> dict[str, Any]:
    whole = dist.new_group(list(range(world_size)))
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {2: pairs[rank // 2], 4: whole}
    torch.manual_seed(0)
    meshes = {
        degree: SimpleNamespace(context_degree=degree, context_rank=dist.get_rank(group), context_group=group, tensor_degree=1)
        for degree, group in groups.items()
    }
    results: dict[str, Any] = {"layers": {}}
    for degree, mesh in meshes.items():
        ranks = ContextRanks(mesh.context_group)
        results["layers"] |= {f"{degree} ranks, {name}": errors for name, errors in _layer_errors(ranks)}
    results["vaes"] = dict(_all_vae_errors(meshes, VAES, (2, 4), torch.float64))
    last = {name: (*VAES[name][:2], VAES[name][2][-1:]) for name in ("ltx", "cv released", "od", "step")}
    results["float32"] = dict(_all_vae_errors(meshes, last, (4,), torch.float32))
    results["images"] = dict(_image_errors(meshes))
    results["sent"] = _what_is_sent(meshes)
    return results


def _random_weights(module: Any) -> Any:
    """Nothing stays zero, lest a part of the network says nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.3 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.3
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    return module


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative where the expected values are large."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1.0))


Outputs = dict[str, Tensor]


def _gradients(outputs: Outputs, x: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Of a weighted sum of all outputs: that of `x`, and those of the parameters in a row."""
    total = sum((y * _random(*y.shape, seed=7).to(y)).sum() for y in outputs.values())
    assert isinstance(total, Tensor)
    grads = torch.autograd.grad(total, [x, *module.parameters()])
    return grads[0], torch.cat([grad.flatten() for grad in grads[1:]])


@dataclass(frozen=True)
class _Dense:
    """What one process alone gets, to which others are compared."""

    outputs: Outputs
    grad_x: Tensor
    grad_weights: Tensor

    @classmethod
    def of(cls, outputs: Outputs, x: Tensor, module: nn.Module) -> _Dense:
        return cls({name: y.detach() for name, y in outputs.items()}, *_gradients(outputs, x, module))

    def errors(self, outputs: Outputs, x: Tensor, module: nn.Module, group: dist.ProcessGroup) -> dict[str, float]:
        """Of `outputs`, of `x`'s gradient, which is whole on each rank, and of those of the parameters, summed over ranks."""
        grad_x, grad_weights = _gradients(outputs, x, module)
        dist.all_reduce(grad_weights, group=group)
        values = {name: _error(outputs[name].detach(), y) for name, y in self.outputs.items()}
        return values | {"input": _error(grad_x, self.grad_x), "weights": _error(grad_weights, self.grad_weights)}


def _layer_errors(ranks: ContextRanks) -> Iterator[tuple[str, dict[str, float]]]:
    for num_frames, splits in COUNTS[ranks.degree].items():
        x = _random(1, 2, num_frames, 4, 4).requires_grad_()
        for name, layer, stride in _layers():
            dense = _Dense.of({"y": layer(x)}, x, layer)
            for counts in splits:
                spans = spans_of(counts)
                # An output stands at every `stride`-th frame of the clip and belongs to the rank that has it.
                standing = spans_of([len([t for t in range(*span) if t % stride == 0]) for span in spans])
                y = ranks.join(layer(ranks.take(x, spans), ContextCache(ranks, {}, 0)), standing)
                yield f"{name} of {counts}", dense.errors({"y": y}, x, layer, ranks.group)


def _layers() -> Iterator[tuple[str, nn.Module, int]]:
    """Name, layer and stride in time."""
    for kernel in (1, 3, 5):
        for stride in (1, 2):
            for causal, padding in ((True, "repeat"), (False, "repeat"), (False, "zeros"))[:kernel]:
                conv = CausalConv3d(2, 3, (kernel, 3, 3), (stride, 1, 1), causal, padding)  # type: ignore[arg-type]
                name = f"kernel {kernel}, stride {stride}, causal {causal}, {padding}"
                yield name, _random_weights(conv.double()), stride
    yield "group norm", _random_weights(GroupNorm(1, 2, scope="clip").double()), 1
    yield "temporal attention", _random_weights(TemporalAttention(2).double()), 1


class _Clip:
    """A clip, and its way through a VAE as in training: moments and decoded video both have a share in the loss."""

    def __init__(self, vae: VideoVAE, num_frames: int) -> None:
        size, dtype = vae.compression, vae.last_layer.dtype
        self.vae = vae
        self.video = _random(1, 3, num_frames, size.height, 2 * size.width).clamp(-1, 1).to(dtype).requires_grad_()
        self.noise = _random(1, vae.latent_channels, vae.latent_frames(num_frames), 1, 2, seed=3).to(dtype)
        self.sigma = torch.full((1,), 0.3, dtype=dtype) if vae.timestep_conditioning else None

    def through(self, vae: VideoVAE) -> Outputs:
        posterior = vae.encode(self.video)
        # Frames of the latents are mixed on the way, as a term of a loss may do it: partial gradients would get lost here.
        latents = posterior.sample(self.noise) + posterior.mean.flip(2)
        decoded = vae.decode(latents, self.sigma, torch.Generator().manual_seed(5))
        return {"mean": posterior.mean, "logvar": posterior.logvar, "decoded": decoded}

    def dense(self) -> _Dense:
        return _Dense.of(self.through(self.vae), self.video, self.vae)

    def errors(self, dense: _Dense, mesh: Any) -> dict[str, float]:
        split = models.model_spec(self.vae.spec_name).parallelize(copy.copy(self.vae), mesh)
        assert split.split is not None and self.vae.split is None
        return dense.errors(self.through(split), self.video, split, mesh.context_group)


def _all_vae_errors(
    meshes: dict[int, Any],
    vaes: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]],
    degrees: tuple[int, ...],
    dtype: torch.dtype,
) -> Iterator[tuple[str, dict[str, float]]]:
    clips: dict[str, _Clip] = {}
    for name, (kind, overrides, lengths) in vaes.items():
        vae = _random_weights(models.build(kind, size="tiny", device="cpu", **overrides).to(dtype))
        clips |= {f"{name}, {num_frames} frames": _Clip(vae, num_frames) for num_frames in lengths}
    owners = {name: index % dist.get_world_size() for index, name in enumerate(clips)}
    own = {name: clip.dense() for name, clip in clips.items() if owners[name] == dist.get_rank()}
    for name, clip in clips.items():
        held: list[Any] = [own.get(name)]
        dist.broadcast_object_list(held, src=owners[name])
        for degree in degrees:
            yield f"{name}, {degree} ranks", clip.errors(held[0], meshes[degree])


def _image_errors(meshes: dict[int, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """Fewer latent frames than ranks: one, or two on four ranks. Nothing is sent."""
    vae = _random_weights(models.build("vae/od_vae", size="tiny", device="cpu", norm_scope="clip").double())
    for num_frames, degrees in ((1, (2, 4)), (5, (4,))):
        clip = _Clip(vae, num_frames)
        dense = clip.dense()
        yield from ((f"{num_frames} frames, {degree} ranks", clip.errors(dense, meshes[degree])) for degree in degrees)
    split = models.model_spec(vae.spec_name).parallelize(vae, meshes[4])
    video = torch.zeros(1, 3, 5, 8, 8, dtype=torch.float64, requires_grad=True)
    with _recorded(4) as sent:
        split.decode(split.encode(video).mode()).sum().backward()
    yield "sent", {"calls": float(len(sent))}


@contextmanager
def _recorded(degree: int) -> Iterator[list[tuple[str, int]]]:
    """Every collective of the block: its name and the bytes that this rank sends to others."""
    sent: list[tuple[str, int]] = []
    originals = {name: getattr(dist, name) for name in ("all_to_all_single", "all_gather", "all_reduce")}

    def recorder(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[0] if name == "all_reduce" else args[1]
            times = {"all_to_all_single": 1, "all_gather": degree - 1, "all_reduce": 2}[name]
            sent.append((name, times * tensor.numel() * tensor.element_size()))
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, recorder(name))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _what_is_sent(meshes: dict[int, Any]) -> dict[str, list[tuple[str, int]]]:
    """One causal convolution, then the VAEs, once in the first step and again in the second, which knows the layout."""
    ranks = ContextRanks(meshes[4].context_group)
    conv, x = CausalConv3d(2, 3), torch.randn(1, 2, 17, 4, 4, requires_grad=True)
    part = ranks.take(x, spans_of([5, 4, 4, 4]))
    cache = ContextCache(ranks, {}, 5)
    records = {}
    with _recorded(4) as records["convolution"]:
        y = conv(part, cache)
    with _recorded(4) as records["its gradient"]:
        y.sum().backward()
    for name in ("ltx", "cv", "cv released", "od", "step"):
        kind, overrides, _ = VAES[name]
        vae = models.model_spec(kind).parallelize(models.build(kind, size="tiny", device="cpu", **overrides), meshes[4])
        video = torch.zeros(1, 3, 68 if name == "step" else 17, 16, 16)
        for step in ("first", "second"):
            with _recorded(4) as records[f"{name}, encode, {step}"]:
                latents = vae.encode(video).mode()
            with _recorded(4) as records[f"{name}, decode, {step}"]:
                decoded = vae.decode(latents)
            with _recorded(4) as records[f"{name}, backward, {step}"]:
                decoded.sum().backward()
    return records


# -- what is asserted


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_distributed(_everything, 4)


def _assert_small(cases: list[dict[str, dict[str, float]]], tolerance: float) -> None:
    wrong = [
        f"rank {rank}: {name}: {kind} {error:.1e}"
        for rank, found in enumerate(cases)
        for name, errors in found.items()
        for kind, error in errors.items()
        if not error <= tolerance
    ]
    assert not wrong, "\n".join(wrong)


def _named(cases: dict[str, Any], start: str, wanted: bool) -> dict[str, Any]:
    """The cases whose name starts so, or those whose name does not."""
    return {name: errors for name, errors in cases.items() if name.startswith(start) is wanted}


def test_layers(results):
    """Convolutions, the norm over the clip and attention among frames: float64, 1e-10."""
    assert all(len(found["layers"]) == (2 * 1 + 2 * 3) * (2 * (1 + 3 + 3) + 2) for found in results)
    _assert_small([found["layers"] for found in results], 1e-10)


def test_vaes(results):
    """Moments, decoded video, and gradients of video and parameters, in float64; a noise level is embedded in float32."""
    num_lengths = sum(len(lengths) for _, _, lengths in VAES.values())
    assert all(len(found["vaes"]) == num_lengths * 2 for found in results)
    _assert_small([_named(found["vaes"], "ltx noise", True) for found in results], 1e-6)
    _assert_small([_named(found["vaes"], "ltx noise", False) for found in results], 1e-10)


def test_vaes_in_float32(results):
    _assert_small([found["float32"] for found in results], 1e-5)


def test_clips_of_fewer_latent_frames_than_ranks_are_computed_whole(results):
    """Nothing is sent (0 calls), and gradients, summed over ranks, are not those of so many clips."""
    _assert_small([found["images"] for found in results], 1e-10)


def test_all_ranks_enter_the_same_collectives(results):
    for name in results[0]["sent"]:
        calls = [[call for call, _ in found["sent"][name]] for found in results]
        assert calls[0] == calls[1] == calls[2] == calls[3], name


def test_a_causal_convolution_sends_its_halo_and_nothing_else(results):
    """17 frames on 4 ranks, kernel 3: each rank but the last sends 2 frames of 2 x 4 x 4 float32, 256 bytes; the gradient goes
    the other way, after which that of the clip, 5 or 4 frames of 128 bytes, goes to the 3 others."""
    for rank, found in enumerate(results):
        asked, halo = found["sent"]["convolution"]
        assert asked == ("all_gather", 3 * 8)
        assert halo == ("all_to_all_single", 256 if rank < 3 else 0)
        back, taken = found["sent"]["its gradient"]
        assert back == ("all_to_all_single", 256 if rank > 0 else 0)
        assert taken == ("all_to_all_single", 3 * 128 * (5 if rank == 0 else 4))


def test_layouts_are_asked_for_once(results):
    """The norm over the clip gathers in every step; of the others nothing is gathered in the second."""
    for name in ("ltx", "cv", "od", "step"):
        for direction in ("encode", "decode"):
            calls = [call for call, _ in results[0]["sent"][f"{name}, {direction}, second"]]
            assert set(calls) == {"all_to_all_single"}, (name, direction)


def test_chunks_that_do_not_see_each_other_exchange_results_only(results):
    """Step-Video: posterior and video go round once, and so do the gradients of latents on the way back."""
    for found in results:
        counts = [len(found["sent"][f"step, {part}, second"]) for part in ("encode", "decode", "backward")]
        assert counts == [1, 1, 1]
