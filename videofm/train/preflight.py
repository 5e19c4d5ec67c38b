"""Before models are moved to devices: is every rank fit to train, and do all run the same thing?

Each rank measures (`measure_node`, and what takes all ranks, `measure_together`), all ranks hear what each has found, and each
judges all of it by the same rules (`preflight_rules`). So all come to the same findings and, where one is an error, stop
together with the same message, which names the nodes.
"""

from __future__ import annotations

import hashlib
import platform
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

import videofm
from videofm import models
from videofm.checkpoint.peers import Peers
from videofm.config.train import TrainConfig
from videofm.errors import VideofmError
from videofm.files import look_into
from videofm.models.injection import PREFIX
from videofm.models.lora import is_lora
from videofm.parallel.health import ClockReading, DeviceHealth, measure_bandwidth, measure_device, read_clock, wrong_summands
from videofm.parallel.mesh import Mesh
from videofm.progress import LOG
from videofm.run_dir import RunDirectory
from videofm.train.build import build_objective
from videofm.train.preflight_rules import (
    Finding,
    JointReport,
    Needs,
    NodeReport,
    as_text,
    describe,
    judge_nodes,
    judge_together,
)
from videofm.train.state import peers_of

_PACKAGES = ("torch", "deepspeed", "megatron-core")
_GIB = 2**30
_PATIENCE = 10.0
"""Seconds until a file that the main rank wrote must be visible to the others: shared file systems cache names."""


class PreflightError(VideofmError):
    """A rank is not fit to train, or ranks do not run the same thing."""


def preflight(config: TrainConfig, run: RunDirectory, mesh: Mesh, built: Mapping[str, nn.Module], attempt: int) -> None:
    """Make all checks; all ranks call it.

    Args:
        config: of the run.
        run: its directory, which all ranks share.
        mesh: of all ranks.
        built: role -> model, for the sizes of checkpoints and weights.
        attempt: number of this attempt.

    Raises:
        PreflightError: there is an error, on any rank. All ranks raise it, with one message.
    """
    if not config.faults.preflight.enabled:
        return
    started, peers = time.monotonic(), peers_of(mesh)
    needs = needs_of(config, mesh, built)
    file = run.path / f".preflight-{attempt:04d}"
    expected, problem = peers.share(_write_nonce(file) if mesh.is_main else None)[0]
    if problem:
        raise PreflightError(f"preflight: {problem}")
    try:
        reports = [node_report(said) for said in peers.share(asdict(measure_node(config, run, mesh, file, expected)))]
    finally:
        if mesh.is_main:
            file.unlink(missing_ok=True)
    _act(judge_nodes(reports, expected, needs), mesh.is_main)
    text = f"{needs.disk / _GIB:.2f} GiB for checkpoints, {min(report.free_disk for report in reports) / _GIB:.1f} GiB free"
    if mesh.world_size > 1:
        joint = [joint_report(said) for said in peers.share(asdict(measure_together(mesh, peers)))]
        least = config.faults.preflight.min_bandwidth
        _act(judge_together(joint, least, config.faults.preflight.max_clock_skew), mesh.is_main)
        text = f"{describe(joint)}; {text}"
    if mesh.is_main:
        LOG.info("preflight: %s; %.2f s", text, time.monotonic() - started)


def needs_of(config: TrainConfig, mesh: Mesh, built: Mapping[str, nn.Module]) -> Needs:
    """What a run takes, by the numbers of its parameters in fp32. Weights are the least that a device must hold: gradients,
    moments and activations come on top, and tensor ranks and ZeRO 3 share weights out."""
    objective = build_objective(config)
    checkpoint = 0
    for phase, roles in objective.phases.items():
        averaged = config.phase_optimizers.get(phase, config.optimizer).ema_decay > 0
        for role in roles:
            chosen = config.models.get(role)
            count = num_trained(built[role], chosen is not None and chosen.freeze_base)
            checkpoint += 4 * count * (3 + averaged)  # weights, two moments, moving average
    weights = sum(4 * parameter.numel() for model in built.values() for parameter in model.parameters())
    shared = mesh.tensor_degree * (mesh.gradient_degree if config.parallel.zero_stage == 3 else 1)
    disk = int(config.faults.preflight.min_free_checkpoints * checkpoint)
    return Needs(disk, weights // shared, config.trainer.spare_checkpoints is not None)


def num_trained(model: nn.Module, freeze_base: bool) -> int:
    """Numbers that training moves: those of adapters or of an injection alone where nothing else is trained."""
    if models.lora_spec(model) is not None:
        return sum(parameter.numel() for name, parameter in model.named_parameters() if is_lora(name))
    start = PREFIX if freeze_base else ""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith(start))


def _write_nonce(file: Path) -> tuple[str, str]:
    """What was written for the other ranks to read, and why it was not."""
    nonce = secrets.token_hex(8)
    try:
        file.write_text(nonce)
    except OSError as error:
        return nonce, (
            f"rank 0 on {socket.gethostname()} cannot write to the run directory {file.parent}: {error.strerror}. Choose "
            "another run directory, or free space there"
        )
    return nonce, ""


# -- what is measured


def measure_node(config: TrainConfig, run: RunDirectory, mesh: Mesh, file: Path, expected: str) -> NodeReport:
    """What this rank finds by itself. What it cannot measure it reports, so that all ranks hear of it."""
    problems: dict[str, str] = {}

    def tried(name: str, measure: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return measure()
        except Exception as error:
            problems[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            return otherwise

    return NodeReport(
        rank=mesh.rank,
        node=socket.gethostname(),
        device=tried("device", lambda: measure_device(mesh.device), DeviceHealth(mesh.device.type)),
        versions=tried("versions", versions, {}),
        config=hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:16],
        nonce=tried("run directory", lambda: read_nonce(file, expected), None),
        free_disk=tried("disk", lambda: shutil.disk_usage(run.path).free, 0),
        problems=problems,
    )


def measure_together(mesh: Mesh, peers: Peers) -> JointReport:
    """What this rank finds with the others; all ranks call it."""
    wrong = wrong_summands(mesh.rank, mesh.world_size, mesh.device)
    bandwidth = measure_bandwidth(mesh.world_size, mesh.device)
    clock = read_clock(lambda: peers.share(None))
    return JointReport(mesh.rank, socket.gethostname(), tuple(wrong), bandwidth, clock)


def versions() -> dict[str, str]:
    """Versions of what must be the same on all ranks; `code` is a digest of the sources of videofm, local changes included."""
    found = {"python": platform.python_version(), "videofm": videofm.__version__, "code": code_digest()}
    return found | {package: metadata.version(package) for package in _PACKAGES}


def code_digest(folder: Path | None = None) -> str:
    """Of all sources of videofm, by name and content."""
    folder = folder or Path(videofm.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def read_nonce(file: Path, expected: str, patience: float = _PATIENCE) -> str | None:
    """The content of a file that another node has just written, or None where it does not come to be seen."""
    deadline = time.monotonic() + patience
    while True:
        look_into(file.parent)
        found = file.read_text() if file.exists() else None
        if found == expected or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def node_report(said: Mapping[str, Any]) -> NodeReport:
    """A report as it came over JSON."""
    return NodeReport(**{**said, "device": DeviceHealth(**said["device"])})


def joint_report(said: Mapping[str, Any]) -> JointReport:
    """A report as it came over JSON."""
    clock = ClockReading(tuple(said["clock"]["before"]), tuple(said["clock"]["after"]))
    return JointReport(**{**said, "wrong_summands": tuple(said["wrong_summands"]), "clock": clock})


# -- what is done about it


def _act(findings: Sequence[Finding], is_main: bool) -> None:
    """Log warnings; stop for errors."""
    warnings = [one for one in findings if one.severity == "warning"]
    for line in as_text(warnings).splitlines():
        if is_main:
            LOG.warning("preflight: %s", line)
    errors = [one for one in findings if one.severity == "error"]
    if errors:
        raise PreflightError(f"preflight: the ranks cannot train together like this.\n{as_text(errors)}")
