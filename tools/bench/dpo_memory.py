"""Peak memory of a step of preference training over that of flow matching with the same tokens; ratio of adapters, aim <= 1.15.

python -m tools.bench.dpo_memory [--device cuda] [--layers 6] [--tokens 1024] [--pairs 1]

Every case is an optimizer step of ours (the trainer's, DeepSpeed included) in a process of its own: 2 P clips of flow matching
against P pairs of dpo, in fp32 on latents and text that are in memory. `resident` is what is held between steps, weights and
optimizer state, `step` what a second step needs beyond it at its worst moment, and `peak` both. On the CPU it is the resident
set of the process less what it had before the models were built, on CUDA what torch's allocator held. Exit code 1 above it.

The ratio that is aimed at is that of adapters against adapters: `adapters_off` and `second_adapter`. `cached` has no reference
forward at all, `frozen` a second copy of the weights, and `frozen_offload` one that is on the device in its forward pass only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from tools.bench.vae_memory import ENVIRONMENT, ROOT, peak, status_bytes
from videofm.config.train import TrainConfig
from videofm.data.loader import Step
from videofm.data.plan import PlanState
from videofm.parallel.mesh import create_mesh, destroy_mesh
from videofm.run_dir import RunDirectory
from videofm.train.build import Job, build_job, build_models
from videofm.train.trainer import train_step
from videofm.types import Batch

AIM = 1.15
REFERENCES: dict[str, dict[str, Any] | None] = {
    "flow_matching": None,
    "adapters_off": {"kind": "adapters_off"},
    "second_adapter": {"kind": "second_adapter", "refresh_every": 1},
    "cached": {"kind": "cached", "num_draws": 1},
    "frozen": {"kind": "frozen"},
    "frozen_offload": {"kind": "frozen", "offload": True},
}
AIMED = ("adapters_off", "second_adapter")
TEXT_TOKENS, WIDTH_OF_TEXT, CHANNELS = 32, 64, 16


def config_of(case: str, request: dict[str, Any]) -> TrainConfig:
    """Adapters of rank 8 on a transformer of `request["layers"]` blocks, 8 heads of 32."""
    sizes = {"name": "dit/ltx", "overrides": {"num_layers": request["layers"], "num_heads": 8}}
    models: dict[str, Any] = {
        "dit": sizes | {"lora": {"rank": 8}},
        "vae": {"name": "vae/ltx"},
        "text_encoder": {"name": "text/t5"},
    }
    reference, pairs = REFERENCES[case], request["pairs"]
    objective: dict[str, Any] = {"kind": "flow_matching"}
    data = {"manifest": "none", "num_frames": 9, "height": 64, "width": 64, "start": "first"}
    data |= {"micro_batch_size": 2 * pairs}
    if reference is not None:
        objective = {"kind": "dpo", "reference": reference}
        data |= {"micro_batch_size": pairs, "pairs": {"path": "none"}}
        if reference["kind"] == "frozen":
            models["reference"] = sizes
    return TrainConfig.model_validate(
        {
            "kind": "train", "models": models, "objective": objective, "data": data, "optimizer": {"lr": 1e-4},
            "trainer": {"max_steps": 1, "precision": "fp32", "device": request["device"]},
        }
    )  # fmt: skip


def batch_of(request: dict[str, Any]) -> Batch:
    """2 P clips of `request["tokens"]` latent cells, with text; P pairs where they are taken as such."""
    pairs, tokens = request["pairs"], request["tokens"]
    clips, draw = 2 * pairs, torch.Generator().manual_seed(0)
    latents = torch.randn(clips, CHANNELS, 4, tokens // 64, 16, generator=draw)
    text = torch.randn(clips + 1, TEXT_TOKENS, WIDTH_OF_TEXT, generator=draw)
    return Batch(
        video=torch.zeros(clips, 3, 0, 0, 0), captions=["a caption"] * clips, fps=torch.full((clips,), 24.0),
        sample_ids=[f"pair{index}@0" for index in range(pairs)] * 2, step=1, num_step_samples=pairs, latents=latents,
        text=text, text_lengths=[TEXT_TOKENS] * (clips + 1), pair_weights=torch.ones(pairs),
        pair_ties=torch.zeros(pairs, dtype=torch.bool),
    )  # fmt: skip


def build(case: str, request: dict[str, Any], mesh: Any) -> Job:
    """The job of a case; what a cached reference has measured is made up, as it is small."""
    config = config_of(case, request)
    job = build_job(config, RunDirectory("none"), mesh, None, build_models(config))  # type: ignore[arg-type]
    if (wanted := getattr(job.objective, "precomputed", None)) is not None:
        wanted.take({f"pair{index}": torch.zeros(1, 2, 1) for index in range(request["pairs"])})
    return job


def measure(case: str, request: dict[str, Any]) -> dict[str, int]:
    """Bytes of one case, in this process."""
    device = torch.device(request["device"])
    mesh = create_mesh(config_of(case, request).parallel, device)
    try:
        batch, before = batch_of(request), status_bytes("VmRSS")
        job = build(case, request, mesh)

        def step() -> None:
            train_step(job, Step([batch], batch.num_step_samples, PlanState(step=2)))

        if device.type == "cuda":
            return _measure_cuda(step)
        step()  # Adam's state is made in the first step
        gc.collect()
        resident = status_bytes("VmRSS") - before
        return {"resident": resident, "step": peak(step, minus_output=False)}
    finally:
        destroy_mesh()


def _measure_cuda(step: Callable[[], None]) -> dict[str, int]:
    step()
    torch.cuda.synchronize()
    gc.collect()
    resident = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return {"resident": resident, "step": torch.cuda.max_memory_allocated() - resident}


def run_child(case: str, request: dict[str, Any]) -> dict[str, int]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "tools.bench.dpo_memory", "--case", case, "--request", json.dumps(request)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stderr}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found | {"peak": found["resident"] + found["step"]}


def main() -> int:
    """Print one table; 1 when a ratio that is aimed at is above the aim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--layers", type=int, default=6, help="blocks of the transformer (default 6)")
    parser.add_argument("--tokens", type=int, default=1024, help="latent tokens of a clip, a multiple of 64 (default 1024)")
    parser.add_argument("--pairs", type=int, default=1, help="pairs of the step (default 1)")
    parser.add_argument("--case", choices=list(REFERENCES), help=argparse.SUPPRESS)
    parser.add_argument("--request", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(measure(arguments.case, arguments.request)))
        return 0
    request = {name: getattr(arguments, name) for name in ("device", "layers", "tokens", "pairs")}
    print(f"{request}\nMiB                 resident     step     peak   peak / flow matching")
    above, base = False, 0
    for case in REFERENCES:
        found = run_child(case, request)
        base = base or found["peak"]
        row = "".join(f"{found[name] / 2**20:9.1f}" for name in ("resident", "step", "peak"))
        aim = f"   aim <= {AIM}" if case in AIMED else ""
        print(f"{case:18} {row} {found['peak'] / base:12.3f}{aim}", flush=True)
        above |= case in AIMED and found["peak"] > AIM * base
    return int(above)


if __name__ == "__main__":
    raise SystemExit(main())
