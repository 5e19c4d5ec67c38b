"""One rule for gradients: data x context x tensor ranks at every ZeRO stage take the step that one rank takes.

The toy has what a split model has. Context ranks hold unequal numbers of tokens and gather their results; the way back takes a
rank's own, so that each has a part of every weight's gradient. Tensor ranks hold columns of one matrix and rows of the next,
and two vectors whole. The optimizer's first moment after one step is the clipped gradient, a tenth of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers import run_distributed
from videofm.config.train import TrainConfig
from videofm.types import Batch, Loss

SAMPLES, MICRO_BATCHES, STEPS, HIDDEN = 4, 2, 2, 12
BOUNDS = {1: [0, 64], 2: [0, 41, 64], 4: [0, 1, 20, 41, 64]}
"""Context degree -> where its ranks' tokens begin, of 64; those from 41 on are the last rank's, whole."""
WORLDS = {
    1: [(1, 1, 1)],
    2: [(2, 1, 1), (1, 2, 1), (1, 1, 2)],
    4: [(2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)],
}
"""World size -> degrees data, context, tensor."""
SHARDED = {"up.weight": 0, "up.bias": 0, "down.weight": 1}
"""Weights that tensor ranks share -> the dim along which they do."""
LIMIT = 0.05
"""Of the clipped cases; the norms are more than four times as large."""
TASKS = [("", 0.0), ("first", LIMIT)]
"""Which tokens bear loss, and the limit of the norm."""
STAGES = [(0, False), (1, False), (2, False), (3, False)]
OFFLOADED = [(1, True), (2, True), (3, True)]
"""ZeRO stage, and whether the optimizer's state is kept on the CPU."""


class Copy(torch.autograd.Function):
    """As it is; the gradients of the tensor ranks are added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class Add(torch.autograd.Function):
    """The sum over the tensor ranks; the gradient as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Gather(torch.autograd.Function):
    """All tokens `(B, L)` from each rank's own; the gradient of the own ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, bounds: list[int]) -> Tensor:
        sizes = [last - first for first, last in pairwise(bounds)]
        rank = dist.get_rank(group)
        ctx.own = slice(bounds[rank], bounds[rank + 1])
        padded = x.new_zeros(len(x), max(sizes))
        padded[:, : x.shape[1]] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[:, ctx.own].contiguous(), None, None


class Toy(nn.Module):
    """Tokens `(B, L, 3)` -> `(B, L)`, on a mesh."""

    def __init__(self, mesh: Any) -> None:
        super().__init__()
        self.mesh = mesh
        self.up, self.down = nn.Linear(3, HIDDEN // mesh.tensor_degree), nn.Linear(HIDDEN // mesh.tensor_degree, 1, bias=False)
        self.scale, self.shift = nn.Parameter(torch.empty(3)), nn.Parameter(torch.empty(1))
        generator = torch.Generator().manual_seed(0)
        shapes = {"scale": (3,), "shift": (1,), "up.weight": (HIDDEN, 3), "up.bias": (HIDDEN,), "down.weight": (1, HIDDEN)}
        whole = {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for name, parameter in self.named_parameters():
            parameter.data.copy_(share(name, whole[name], mesh.tensor_rank, mesh.tensor_degree))
            if mesh.tensor_degree > 1 and name in SHARDED:
                parameter.tensor_model_parallel = True  # as megatron-core marks them

    def forward(self, tokens: Tensor) -> Tensor:
        mesh = self.mesh
        bounds = BOUNDS[mesh.context_degree]
        x = tokens[:, bounds[mesh.context_rank] : bounds[mesh.context_rank + 1]] * self.scale
        x = self.down(torch.nn.functional.gelu(self.up(Copy.apply(x, mesh.tensor_group))))
        x = Add.apply(x, mesh.tensor_group) + self.shift
        return Gather.apply(x[..., 0], mesh.context_group, bounds)


class Objective:
    """Mean squared error over the tokens that bear loss, all or those before 41; the caption says which."""

    roles = ("model",)
    phases = {"generator": ("model",)}

    def loss(self, models: Any, batch: Batch, rng: Any, phase: str) -> Loss:
        tokens = batch.video.flatten(2).transpose(1, 2)  # (B, 3, T, H, W) -> (B, L, 3)
        counted = slice(0, 41 if batch.captions[0] == "first" else 64)
        error = (models["model"](tokens) - tokens.prod(-1))[:, counted].square().mean(1)
        return Loss(error.sum(), {"squared": error.detach().sum()})


def share(name: str, whole: Tensor, rank: int, degree: int) -> Tensor:
    """What tensor rank `rank` holds of the weight `name`, or of a moment of it."""
    return whole.chunk(degree, dim=SHARDED[name])[rank] if name in SHARDED else whole


def partition(whole: Tensor, place: tuple[int, int] | None) -> Tensor:
    """What ZeRO 3 leaves of `whole` on a rank: its piece of as many equal ones as there are ranks, the last ones cut short."""
    if place is None:
        return whole
    rank, count = place
    size = -(-whole.numel() // count)
    return whole.flatten()[rank * size : (rank + 1) * size]


def config(degrees: tuple[int, int, int], stage: int, offload: bool, grad_clip: float) -> TrainConfig:
    data, context, tensor = degrees
    return TrainConfig.model_validate(
        {
            "kind": "train",
            "models": {"model": {"name": "vae/ltx"}},  # stands for any: the toy is given to the engine directly
            "objective": {"kind": "autoencoder"},
            "data": {
                "manifest": "none", "num_frames": 1, "height": 8, "width": 8,
                "micro_batch_size": SAMPLES // MICRO_BATCHES, "num_micro_batches": MICRO_BATCHES,
            },
            # A large epsilon: Adam would divide rounding by next to nothing otherwise.
            "optimizer": {"lr": 0.01, "grad_clip": grad_clip, "betas": [0.9, 0.99], "eps": 1e-3},
            "trainer": {"max_steps": STEPS, "precision": "fp32"},
            "parallel": {
                "data_degree": data, "context_degree": context, "tensor_degree": tensor, "zero_stage": stage,
                "offload_optimizer": offload,
            },
        }
    )  # fmt: skip


def batches(step: int, mesh: Any, caption: str) -> list[Batch]:
    video = torch.randn(SAMPLES, 3, 1, 8, 8, generator=torch.Generator().manual_seed(step))
    size = SAMPLES // MICRO_BATCHES
    ids = [str(index) for index in range(size)]
    return [
        Batch(part, [caption] * size, torch.ones(size), ids, step, SAMPLES)
        for part in video.split(size)[mesh.data_rank :: mesh.data_degree]
    ]


def cases(world_size: int) -> list[tuple[tuple[int, bool], tuple[str, float]]]:
    """Stage and offload, loss tokens and clip; offload where it is cheap to look at."""
    return [*product(STAGES, TASKS), *([] if world_size == 4 else product(OFFLOADED, TASKS[1:]))]


def meshes(world_size: int) -> Iterator[tuple[tuple[int, int, int], Any]]:
    from videofm.parallel.mesh import parallel_state, split_mesh

    for degrees in WORLDS[world_size]:
        yield degrees, split_mesh(config(degrees, 0, False, 0).parallel, torch.device("cpu"))
        parallel_state.destroy_model_parallel()


def steps_of(rank: int, world_size: int) -> dict[Any, dict[str, Any]]:
    """Two steps of every case on every mesh of this many ranks: losses, norms, moments after the first step, last weights."""
    from videofm.train.engine import PhaseEngine
    from videofm.train.optim import local_shard

    results = {}
    for degrees, mesh in meshes(world_size):
        for (stage, offload), (caption, grad_clip) in cases(world_size):
            model = Toy(mesh)
            settings = config(degrees, stage, offload, grad_clip)
            engine = PhaseEngine({"model": model}, Objective(), "generator", settings, mesh)
            rows = [engine.step(batches(0, mesh, caption), lr=0.01)]
            moments = engine.optimizer_state()
            rows.append(engine.step(batches(1, mesh, caption), lr=0.01))
            results[degrees, stage, offload, caption, grad_clip] = {
                "tensor": (mesh.tensor_rank, mesh.tensor_degree),
                "partition": (dist.get_rank(mesh.gradient_group), mesh.gradient_degree) if stage == 3 else None,
                "rows": rows,
                "moments": {name: value for name, value in moments.items() if name.startswith("exp_avg.")},
                "weights": {name: local_shard(p).detach().clone() for name, p in model.named_parameters()},
            }
    return results


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """The largest by which a rank's step is off from one rank's: of numbers as a share of them, else as it is."""
    found = {
        key: max(abs(a[key] / b[key] - 1) for a, b in zip(ours["rows"], theirs["rows"], strict=True))
        for key in ("loss", "squared", "grad_norm")
    }
    for name, value in ours["weights"].items():
        held = partition(share(name, theirs["weights"][name], *ours["tensor"]), ours["partition"])
        kept = value.flatten()[: held.numel()]  # behind it there is padding, which nobody reads
        found[name] = float(torch.cat([kept - held.flatten(), held.new_zeros(1)]).abs().max())
    for name, value in ours["moments"].items():
        held = share(name.removeprefix("exp_avg.model."), theirs["moments"][name], *ours["tensor"])
        found[name] = float((value - held).abs().max())
    return found


@pytest.fixture(scope="module")
def one_rank() -> dict[Any, Any]:
    return run_distributed(steps_of, 1)[0]


@pytest.mark.parametrize("world_size", WORLDS)
def test_every_mesh_takes_the_step_of_one_rank(one_rank: dict[Any, Any], world_size: int) -> None:
    """Loss, metrics, gradient norm, clipped gradient (as a moment) and weights, on every rank, to 1e-6; numbers to 2e-6."""
    ranks = [one_rank] if world_size == 1 else run_distributed(steps_of, world_size)
    for rank, results in enumerate(ranks):
        assert len(results) == len(WORLDS[world_size]) * len(cases(world_size))
        for case, ours in results.items():
            theirs = one_rank[(1, 1, 1), 0, False, *case[3:]]
            off = {
                name: value
                for name, value in differences(ours, theirs).items()
                if not value <= (2e-6 if name in ours["rows"][0] else 1e-6)
            }
            assert not off, f"rank {rank}, (degrees, stage, offload, loss tokens, clip) {case}: {off}"


def test_the_reference_is_the_gradient_by_hand(one_rank: dict[Any, Any]) -> None:
    """Autograd of the toy without engine and groups: the norm, and a tenth of the clipped gradient as the moment."""
    shapes = {"scale": (3,), "shift": (1,), "up.weight": (HIDDEN, 3), "up.bias": (HIDDEN,), "down.weight": (1, HIDDEN)}
    generator = torch.Generator().manual_seed(0)
    w = {name: (0.5 * torch.randn(shape, generator=generator)).requires_grad_() for name, shape in shapes.items()}
    video = torch.randn(SAMPLES, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = video.flatten(2).transpose(1, 2)  # (B, 3, T, H, W) -> (B, L, 3)
    for (caption, clip), count in zip(TASKS, (64, 41), strict=True):
        hidden = torch.nn.functional.gelu((tokens * w["scale"]) @ w["up.weight"].T + w["up.bias"])
        error = (hidden @ w["down.weight"].T + w["shift"])[..., 0] - tokens.prod(-1)
        loss = error[:, :count].square().mean()
        grads = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
        norm = torch.cat([grad.flatten() for grad in grads.values()]).norm().item()
        assert norm > 4 * LIMIT, "clipping must be active"
        found = one_rank[(1, 1, 1), 0, False, caption, clip]
        assert found["rows"][0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert found["rows"][0]["grad_norm"] == pytest.approx(norm, rel=1e-6)
        for name, grad in grads.items():
            expected = 0.1 * grad * (min(1.0, clip / norm) if clip else 1.0)
            assert torch.allclose(found["moments"][f"exp_avg.model.{name}"], expected, rtol=2e-5, atol=1e-7), (caption, name)


def probes(rank: int, world_size: int) -> dict[Any, str]:
    """What the probe says at each stage, of DeepSpeed as it is and of one that adds where it averaged."""
    from videofm.train import zero

    make, said = zero.initialize, {}

    def adding(*arguments: Any) -> Any:
        engine = make(*arguments)
        zero_optimizer = engine.optimizer
        for owner in (engine, zero_optimizer):
            if hasattr(owner, "gradient_average"):
                owner.gradient_average = False
        if hasattr(zero_optimizer, "_gradient_averaging_world_size"):
            zero_optimizer._gradient_averaging_world_size = lambda *_: 1
        return engine

    for degrees, mesh in meshes(world_size):
        for stage, offload in [*STAGES, *OFFLOADED]:
            settings = config(degrees, stage, offload, 0).parallel
            for changed in (False, True):
                zero.initialize = adding if changed else make
                try:
                    zero.check_scaling(settings, mesh)
                    said[degrees, stage, offload, changed] = ""
                except AssertionError as error:
                    said[degrees, stage, offload, changed] = str(error)
    return said


def test_the_probe_sees_how_deepspeed_averages() -> None:
    """Two ranks have the slopes 1 + 1 and 2 + 1, which is 5; a DeepSpeed that no longer halves makes 10 of it."""
    for said in run_distributed(probes, 2):
        assert len(said) == 3 * 7 * 2
        for (degrees, stage, offload, changed), text in said.items():
            if changed and degrees != (1, 1, 2):  # tensor ranks do not sum gradients
                assert f"at ZeRO stage {stage} makes a gradient of 10 from parts whose sum over 2 ranks is 5" in text, (
                    f"{degrees} {stage} {offload}: {text or 'it saw nothing'}"
                )
            else:
                assert text == "", (degrees, stage, offload, changed)
