"""Preflight on two ranks, of which the second lies: both stop with one message, which names it and its node."""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.helpers import run_distributed
from videofm.config.train import ParallelConfig, TrainConfig
from videofm.models import build
from videofm.parallel import health
from videofm.parallel.mesh import destroy_mesh, split_mesh
from videofm.progress import LOG
from videofm.run_dir import RunDirectory
from videofm.train import preflight as module
from videofm.train.preflight import PreflightError, preflight

CPU = torch.device("cpu")


def config(**faults: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "kind": "train",
            "models": {"vae": {"name": "vae/ltx"}},
            "objective": {"kind": "autoencoder"},
            "optimizer": {"lr": 1e-3},
            "data": {
                "manifest": "nowhere", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 1,
                "num_micro_batches": 2,
            },
            "trainer": {"max_steps": 1, "device": "cpu"},
            "parallel": {"data_degree": 2},
            "faults": {"preflight": faults},
        }
    )  # fmt: skip


def lying(name: str, lie: Callable[..., Any]) -> Any:
    return mock.patch.object(module, name, lie)


def old_torch() -> dict[str, str]:
    return {**honest_versions(), "torch": "1.0"}


honest_versions, honest_read, honest_clock = module.versions, module.read_nonce, module.read_clock


def broken_device(_: torch.device) -> health.DeviceHealth:
    raise RuntimeError("no kernel image")


@contextmanager
def lossy() -> Iterator[None]:
    """What this rank gives to all-reduces goes lost."""
    honest = dist.all_reduce

    def all_reduce(value: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        value.zero_()
        return honest(value, *arguments, **options)

    with mock.patch.object(dist, "all_reduce", all_reduce):
        yield


def lies(other: Path) -> dict[str, Any]:
    """What rank 1 does in each case."""
    return {
        "version": lying("versions", old_torch),
        "nonce": lying("read_nonce", lambda file, expected: honest_read(other / file.name, expected, patience=0.0)),
        "clock ahead": lying("read_clock", partial(honest_clock, clock=lambda: time.time() + 3600)),
        "clock behind": lying("read_clock", partial(honest_clock, clock=lambda: time.time() - 3600)),
        "device": lying("measure_device", broken_device),
        "sum": lossy(),
    }


def case(run: RunDirectory, mesh: Any, built: Any, read: TrainConfig) -> str:
    try:
        preflight(read, run, mesh, built, 1)
    except PreflightError as error:
        return str(error)
    return ""


def all_cases(rank: int, world_size: int, folder: Path) -> dict[str, str]:
    """Case -> what was raised on this rank."""
    mesh = split_mesh(ParallelConfig(data_degree=2), CPU)
    run = RunDirectory(folder / "run")
    run.path.mkdir(exist_ok=True)
    dist.barrier()
    with torch.random.fork_rng():
        built = {"vae": build("vae/ltx", "tiny", encoder_widths=[8, 8, 16], decoder_widths=[16, 8], latent_channels=4)}
    logged: list[str] = []
    LOG.addHandler(handler := logging.Handler())
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    LOG.setLevel(logging.INFO)
    found = {"honest": case(run, mesh, built, config())}
    found["log"] = " ".join(logged)
    for name, lie in lies(folder).items():
        if rank == 1:
            with lie:
                found[name] = case(run, mesh, built, config())
        else:
            found[name] = case(run, mesh, built, config())
    found["config"] = case(run, mesh, built, config(max_clock_skew=5.0 + rank))
    found["bandwidth"] = case(run, mesh, built, config(min_bandwidth=1e6))
    found["honest again"] = case(run, mesh, built, config(min_bandwidth=1e-6))
    found["left"] = " ".join(path.name for path in run.path.iterdir())
    destroy_mesh()
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run_distributed(all_cases, 2, tmp_path_factory.mktemp("preflight"))


HERE = socket.gethostname()
EXPECTED = {
    "version": f"versions: rank 1 (on {HERE}): torch 1.0; has to be: torch {torch.__version__}, as most ranks have. Fix: ",
    "nonce": f"run directory: rank 1 (on {HERE}): no file; has to be: the file that rank 0 on {HERE} has just written. Fix: ",
    "clock ahead": f"clock: rank 1 (on {HERE}): a clock at least ",
    "clock behind": f"clock: rank 1 (on {HERE}): a clock at least ",
    "device": f"device: rank 1 (on {HERE}): RuntimeError: no kernel image; has to be: every check can be made. Fix: ",
    "config": f"config: rank 1 (on {HERE}): digest ",
    "sum": f"rank 0 (on {HERE}), rank 1 (on {HERE}): a wrong sum: the part of rank 1 (on {HERE}); has to be: each part",
    "bandwidth": f"bandwidth: rank 0 (on {HERE}): ",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_both_ranks_stop_with_one_message_that_names_the_one(told: list[dict[str, str]], name: str) -> None:
    first, second = (found[name].partition("\n") for found in told)
    assert first == second and first[0] == "preflight: the ranks cannot train together like this."
    assert EXPECTED[name] in first[2]


def test_honest_ranks_pass_and_leave_nothing(told: list[dict[str, str]]) -> None:
    """The log has what was measured."""
    assert [found["honest"] + found["honest again"] + found["left"] for found in told] == ["", ""]
    assert told[0]["log"].startswith("preflight: 2 ranks on 1 node, all-reduce ") and "clocks within " in told[0]["log"]
    assert told[1]["log"] == ""


@pytest.mark.parametrize(("name", "way"), [("clock ahead", "ahead of"), ("clock behind", "behind")])
def test_a_clock_is_off_by_no_more_than_is_sure(told: list[dict[str, str]], name: str, way: str) -> None:
    """An hour, less what the quickest of five collectives takes."""
    found = re.search(rf"at least ([\d.]+) s {way} that of rank 0 on .*; has to be: 10 s at most", told[0][name])
    assert found is not None and 3590 < float(found[1]) <= 3600
