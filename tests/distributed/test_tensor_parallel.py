"""Tensor parallelism on 2 and 4 ranks: outputs, gradients, training steps and checkpoints are those of one rank.

The references are the model as it is and `torch.optim.AdamW`, in the same process. All cases of one number of ranks share one
spawn; each returns numbers, which the tests judge.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers import run_distributed
from videofm import models
from videofm.config.train import TrainConfig
from videofm.models.recompute import treat_blocks
from videofm.parallel.rng import KeyedRng
from videofm.parallel.shards import gather_tensor, tensor_shard
from videofm.registry import resolve
from videofm.types import Batch, Compression, Conditioning, Loss

SIZES: dict[str, dict[str, int]] = {
    # 40 channels: 40 % 6 of them are not rotated, all of which are the first rank's.
    "dit/ltx": {"num_layers": 2, "num_heads": 4, "head_width": 10, "caption_channels": 12},
    "dit/step_video": {"num_layers": 2, "num_heads": 4, "head_width": 8, "caption_channels": 12, "clip_channels": 8},
}
GRID, LENGTH, NUM_TEXT, NUM_CLIP = (3, 2, 2), 12, 5, 3
SAMPLES, STEPS, CLIP, RATE, EPS, DECAY = 4, 3, 0.05, 0.01, 1e-3, 0.9
"""Adam's epsilon is large, so that a gradient that is zero but for rounding moves nothing."""


def build(name: str) -> Any:
    torch.manual_seed(0)
    model: Any = models.build(name, "tiny", **SIZES[name])
    with torch.no_grad():
        for parameter in model.parameters():  # zeros and small numbers of the start would hide mistakes
            if parameter.abs().max() < 0.1:
                parameter.normal_(std=0.1)
    return model


def split(name: str, model: Any, mesh: Any) -> Any:
    if mesh.tensor_degree > 1:
        resolve(f"videofm.models.{name.replace('/', '.')}.parallelize:split_tensors")(model, mesh)
    return model


@dataclass(frozen=True)
class Case:
    """One forward and backward pass: what goes in, and the weights of the output in the loss."""

    tokens: Tensor
    sigma: Tensor
    text: Conditioning
    coordinates: Tensor
    slope: Tensor


def case(name: str, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.arange(NUM_TEXT)[None] < torch.tensor([[2], [NUM_TEXT]])
    clip = draw(2, NUM_CLIP, SIZES[name]["clip_channels"]) if "clip_channels" in SIZES[name] else None
    coordinates = build(name).coordinates(GRID, torch.tensor([8.0, 24.0]), Compression(4, 8, 8))
    text = Conditioning(draw(2, NUM_TEXT, 12), mask, clip)
    return Case(draw(2, LENGTH, 16), torch.rand(2, LENGTH, generator=generator), text, coordinates, draw(2, LENGTH, 16))


def passes(model: Any, given: Case) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the latent tokens; those of parameters are left on them."""
    tokens = given.tokens.clone().requires_grad_(True)
    output = model(tokens, given.sigma, given.text, given.coordinates)
    (output * given.slope).sum().backward()
    assert tokens.grad is not None
    return output.detach(), tokens.grad


def furthest(found: Tensor, expected: Tensor) -> float:
    """Largest difference, over the largest expected number."""
    return float((found - expected).abs().max() / expected.abs().max())


def numerics(name: str, dtype: torch.dtype, mesh: Any) -> dict[str, float]:
    """Errors against the model as it is. In float64 what the model computes in float32 is lifted, else it hides behind that."""
    lifted = mock.patch.object(torch.Tensor, "float", torch.Tensor.double if dtype == torch.float64 else torch.Tensor.float)
    given = case(name, dtype)
    with lifted:
        dense, model = build(name).to(dtype), split(name, build(name).to(dtype), mesh)
        expected, expected_slope = passes(dense, given)
        output, slope = passes(model, given)
        with torch.no_grad():
            quiet = model(given.tokens, given.sigma, given.text, given.coordinates)
    grads = {key: parameter.grad for key, parameter in dense.named_parameters()}
    errors = {"output": furthest(output, expected), "slope": furthest(slope, expected_slope)}
    errors["without gradients"] = furthest(quiet, output)
    assert list(grads) == [key for key, _ in model.named_parameters()] == list(model.state_dict())
    for key, parameter in model.named_parameters():
        errors[f"gradient of {key}"] = furthest(gather_tensor(parameter, parameter.grad), grads[key])
        if tensor_shard(parameter) is None:
            everyones = [torch.empty_like(parameter) for _ in range(mesh.tensor_degree)]
            dist.all_gather(everyones, parameter.grad.contiguous(), group=mesh.tensor_group)
            errors[f"replicas of {key}"] = max(furthest(other, parameter.grad) for other in everyones)
    return errors


def frozen(name: str, mesh: Any) -> float:
    """Error of the gradient of the latent tokens through a model whose weights are frozen."""
    given = case(name, torch.float32)
    model = split(name, build(name).requires_grad_(False), mesh)
    _, expected = passes(build(name), given)
    _, found = passes(model, given)
    return furthest(found, expected)


def autocast(name: str, mesh: Any) -> dict[str, Any]:
    """Errors in bfloat16 against float32, of the model as it is and split; and the dtypes that attention sees."""
    given, seen = case(name, torch.float32), set()
    exact, _ = passes(build(name), given)
    errors = {}
    for label, model in (("dense", build(name)), ("split", split(name, build(name), mesh))):
        for block in model.blocks:
            attend = block.self_attention.attend
            block.self_attention.attend = lambda q, k, v, mask, attend=attend: (
                seen.add((q.dtype, k.dtype, v.dtype)) or attend(q, k, v, mask)
            )
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = passes(model, given)
        errors[label] = furthest(output.float(), exact)
    return {**errors, "dtypes": sorted({str(dtype) for dtypes in seen for dtype in dtypes})}


def saved(name: str, mesh: Any, folder: Path) -> list[str]:
    """Tensors of a frozen role in the run directory that differ from those of the model as it is."""
    from videofm.train.state import save_frozen

    job: Any = SimpleNamespace(
        models={"dit": split(name, build(name), mesh)}, trained_roles=(), objective=None, mesh=mesh,
        run=SimpleNamespace(path=folder / name.replace("/", "_")),
    )  # fmt: skip
    save_frozen(job)
    found, expected = models.load(job.run.path / "frozen" / "dit").state_dict(), build(name).state_dict()
    return [key for key in expected if not torch.equal(found[key], expected[key])]


def recomputed(name: str, mesh: Any) -> dict[str, float]:
    """Errors of gradients where blocks recompute, communication included, and where one is compiled, communication excluded."""
    given, dense = case(name, torch.float32), build(name)
    passes(dense, given)
    grads, found = {key: parameter.grad for key, parameter in dense.named_parameters()}, {}
    for way in ("selective", "full", "compiled"):
        model = split(name, build(name), mesh)
        if way == "compiled":
            model.blocks[0].compile(backend="aot_eager")
        else:
            treat_blocks(model.blocks, models.ParallelOptions(activation_checkpointing=way))
        passes(model, given)
        found[way] = max(furthest(gather_tensor(p, p.grad), grads[key]) for key, p in model.named_parameters())
    return found


# -- training


class Regression:
    """A velocity for each token of a clip from its noise; the texts are noise too."""

    roles = ("dit",)
    phases = {"train": ("dit",)}

    def __init__(self, name: str) -> None:
        self.name = name

    def loss(self, models: Any, batch: Batch, rng: Any, phase: str) -> Loss:
        clean, noise = batch.video.reshape(-1, LENGTH, 16), rng.normal("noise", (LENGTH, 16))
        sigma = rng.uniform("sigma")
        clip = rng.normal("clip", (NUM_CLIP, 8)) if "clip_channels" in SIZES[self.name] else None
        text = rng.normal("text", (NUM_TEXT, 12))
        words = Conditioning(text, torch.ones(text.shape[:2], dtype=torch.bool), clip)
        where = models["dit"].coordinates(GRID, batch.fps, Compression(4, 8, 8))
        noisy = (1 - sigma[:, None, None]) * clean + sigma[:, None, None] * noise
        error = (models["dit"](noisy, sigma, words, where) - (noise - clean)).square().mean(dim=(1, 2))
        return Loss(error.sum(), {})


def batches(step: int, data_rank: int = 0, data_degree: int = 1) -> list[Batch]:
    video = torch.randn(SAMPLES, 3, 1, 8, 8, generator=torch.Generator().manual_seed(step))
    return [
        Batch(video[i : i + 1], [""], torch.full((1,), 8.0), [f"clip-{i}"], step, SAMPLES)
        for i in range(data_rank, SAMPLES, data_degree)
    ]


def config(stage: int, tensor_degree: int, data_degree: int) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "kind": "train",
            "seed": 3,
            "models": {"dit": {"name": "dit/ltx"}},  # stands for any: the model is given to the engine directly
            "objective": {"kind": "autoencoder"},
            "data": {
                "manifest": "none", "num_frames": 1, "height": 8, "width": 8,
                "micro_batch_size": 1, "num_micro_batches": SAMPLES,
            },
            "optimizer": {"lr": RATE, "grad_clip": CLIP, "eps": EPS},
            "trainer": {"max_steps": STEPS, "precision": "fp32"},
            "parallel": {"zero_stage": stage, "data_degree": data_degree, "tensor_degree": tensor_degree},
        }
    )  # fmt: skip


def reference(name: str) -> dict[str, Any]:
    """The steps by plain torch: weights and averages behind each, moments, and norms before clipping."""
    model, objective = build(name), Regression(name)
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    assert config(0, 1, 1).optimizer.weight_decay == 0.01
    betas = config(0, 1, 1).optimizer.betas
    optimizer = torch.optim.AdamW(groups, lr=RATE, eps=EPS, betas=(betas[0], betas[1]))
    average = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for batch in batches(step):
            loss = objective.loss({"dit": model}, batch, KeyedRng(3, step, batch.sample_ids), "train")
            (loss.total / SAMPLES).backward()
        norms.append(float(nn.utils.clip_grad_norm_(parameters.values(), CLIP)))
        optimizer.step()
        decay = min(DECAY, (1 + step) / (10 + step))
        average = {key: decay * average[key] + (1 - decay) * parameters[key].detach() for key in average}
    return {
        "weights": {key: parameter.detach() for key, parameter in parameters.items()},
        "average": average,
        "moments": {
            f"{moment}.dit.{key}": optimizer.state[p][moment]
            for key, p in parameters.items()
            for moment in ("exp_avg", "exp_avg_sq")
        },
        "norms": norms,
    }


class Run:
    """Training on a mesh, from the start or from what another run gave."""

    def __init__(self, name: str, stage: int, mesh: Any, given: dict[str, Any] | None = None) -> None:
        from videofm.train.engine import PhaseEngine
        from videofm.train.optim import MovingAverage

        model = build(name)
        if given is not None:  # before anything is split, as a resumed run does
            models.load_weights(model, given["weights"], "the other run")
        self.mesh, self.model = mesh, split(name, model, mesh)
        objective: Any = Regression(name)
        self.engine = PhaseEngine({"dit": model}, objective, "train", config(stage, mesh.tensor_degree, mesh.data_degree), mesh)
        self.average = MovingAverage(model.named_parameters(), DECAY)
        self.norms: list[float] = []
        if given is not None:
            self.engine.load_optimizer_state(given["moments"])
            self.average.load(given["average"], mesh.gradient_group)

    def steps(self, first: int, last: int) -> Run:
        for step in range(first, last):
            row = self.engine.step(batches(step, self.mesh.data_rank, self.mesh.data_degree), lr=RATE)
            self.norms.append(row["grad_norm"])
            self.average.update(step)
        return self

    def whole(self) -> dict[str, Any]:
        """What a checkpoint has of it."""
        from videofm.train.state import whole_weights

        job: Any = SimpleNamespace(models={"dit": self.model}, mesh=self.mesh)
        weights = {key: value.clone() for key, value in whole_weights(job, "dit").items()}
        self.average.swap()
        swapped = {key: value.clone() for key, value in whole_weights(job, "dit").items()}
        self.average.swap()
        average = {key: value.clone() for key, value in self.average.whole(self.mesh.gradient_group).items()}
        assert all(torch.equal(swapped[key], average[key]) for key in average), "the models carry their averages inside"
        return {"weights": weights, "average": average, "moments": self.engine.optimizer_state(), "norms": self.norms}


def errors(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    result = {
        "norms": max(abs(a / b - 1) for a, b in zip(found["norms"], expected["norms"][-len(found["norms"]) :], strict=True))
    }
    for kind in ("weights", "average", "moments"):
        assert set(expected[kind]) <= set(found[kind]), kind
        result[kind] = max(furthest(found[kind][key], tensor) for key, tensor in expected[kind].items())
    return result


# -- what the ranks do

PAIRS = {"dit/ltx": (0, 3), "dit/step_video": (1, 2)}
"""ZeRO stages of four ranks, and of checkpoints that go to the other stage of the pair, between tensor degrees 2 and 1."""


def training(name: str, world_size: int, mesh_of: Any) -> dict[str, dict[str, float]]:
    """Errors of three steps: on two ranks at every ZeRO stage, on four at two of them; on two ranks also of steps that change
    the layout before the last."""
    found, expected = {}, reference(name)
    kept: dict[tuple[int, int], dict[str, Any]] = {}
    all_, moves = ((0, 1, 2, 3), PAIRS[name]) if world_size == 2 else (PAIRS[name], ())
    for degree, stages in ((2, all_), (1, moves)):
        mesh = mesh_of(degree)
        for stage in stages:
            run = Run(name, stage, mesh).steps(0, 2)
            kept[degree, stage] = run.whole()
            label = f"{name}, tensor {degree} x data {world_size // degree}, ZeRO {stage}"
            found[label] = errors(run.steps(2, STEPS).whole(), expected)
    for degree in (2, 1):
        mesh = mesh_of(degree)
        for stage in moves:
            run = Run(name, stage, mesh, kept[3 - degree, 3 - stage]).steps(2, STEPS)
            label = f"{name}, from tensor {3 - degree} at ZeRO {3 - stage} to tensor {degree} at ZeRO {stage}"
            found[label] = errors(run.whole(), expected)
    return found


def rank_main(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    from megatron.core import parallel_state

    from videofm.parallel.mesh import split_mesh

    results: dict[str, Any] = {"numerics": {}, "training": {}}

    def mesh_of(tensor_degree: int) -> Any:
        if parallel_state.is_initialized():
            parallel_state.destroy_model_parallel()
        parallel = config(0, tensor_degree, world_size // tensor_degree).parallel
        return split_mesh(parallel, torch.device("cpu"))

    mesh = mesh_of(world_size)
    for name in SIZES:
        for dtype in (torch.float32, torch.float64):
            results["numerics"][f"{name}, tensor {world_size}, {dtype}"] = numerics(name, dtype, mesh)
    if world_size == 2:
        results["frozen"] = {name: frozen(name, mesh) for name in SIZES}
        results["autocast"] = {name: autocast(name, mesh) for name in SIZES}
        results["saved"] = {name: saved(name, mesh, folder) for name in SIZES}
        results["recomputed"] = {name: recomputed(name, mesh) for name in SIZES}
    for name in SIZES:
        results["training"] |= training(name, world_size, mesh_of)
    parallel_state.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def by_size(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {size: run_distributed(rank_main, size, folder) for size in (2, 4)}


@pytest.fixture
def ranks(by_size):
    """Results of each of two ranks."""
    return by_size[2]


@pytest.mark.parametrize("size", [2, 4])
def test_outputs_and_gradients_are_those_of_one_rank(by_size, size):
    for rank, results in enumerate(by_size[size]):
        for label, found in results["numerics"].items():
            most = 1e-12 if "float64" in label else 1e-5
            for what, error in found.items():
                assert error <= (0 if what.startswith("replicas") else most), f"rank {rank}, {label}: {what} off by {error}"


def test_gradients_pass_through_frozen_weights(ranks):
    for results in ranks:
        for name, error in results["frozen"].items():
            assert error <= 1e-5, f"{name}: {error}"


def test_autocast_computes_in_bfloat16(ranks):
    """The split model is off by about as much as the whole one, and attention gets bfloat16 of both."""
    for results in ranks:
        for name, found in results["autocast"].items():
            assert found["dtypes"] == ["torch.bfloat16"], f"{name}: {found}"
            assert 0 < found["split"] < 2 * found["dense"], f"{name}: {found}"


def test_recomputed_and_compiled_blocks_have_the_same_gradients(ranks):
    for results in ranks:
        for name, found in results["recomputed"].items():
            assert max(found.values()) <= 1e-5, f"{name}: {found}"


def test_a_frozen_role_is_saved_whole(ranks):
    for results in ranks:
        assert results["saved"] == {name: [] for name in SIZES}


@pytest.mark.parametrize("size", [2, 4])
def test_steps_are_those_of_one_rank(by_size, size):
    """Three steps with clipping on, straight and through a checkpoint of another layout, against plain torch."""
    for rank, results in enumerate(by_size[size]):
        assert results["training"]
        for label, found in results["training"].items():
            assert found["norms"] <= 1e-5, f"rank {rank}, {label}: {found}"
            for what, most in {"weights": 1e-6, "average": 1e-6, "moments": 1e-4}.items():
                assert found[what] <= most, f"rank {rank}, {label}: {what} off by {found[what]}"


@pytest.mark.parametrize("name", SIZES)
def test_the_reference_clips_and_moves_every_weight(name):
    expected = reference(name)
    assert min(expected["norms"]) > 2 * CLIP
    moved = {key: furthest(expected["weights"][key], value.detach()) for key, value in build(name).named_parameters()}
    assert min(moved.values()) > 1e-4, moved
