"""The kill matrix: trainings of two ranks, one process of which is killed at a drawn moment, compared with undisturbed runs.

`Bench` makes the data and the undisturbed runs once, in a folder; `Bench.disturb` trains with a fault, goes on until the run is
finished, and says in what it differs. Ranks are forked from processes that have made their imports (`tests.helpers`), which
leaves of a start only the seconds of importing; with `started` they are processes as a user's are, through `python -m videofm`.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from data_pipelines.encode.shard import ShardEncoder
from launch import local
from tests.demo_shards import write_demo_shards
from tests.faults import Fault, environment, fired
from tests.helpers import ForkedPython
from tests.unit.data.preferred import neighbours, write_candidates
from tests.unit.encoding import encode_config, save_encoders, tokens_section
from videofm import cli, models
from videofm.data.manifest import Manifest
from videofm.data.preferences import write_preferences
from videofm.run_dir import RunDirectory, read_json, read_jsonl
from videofm.train.speed import TIMINGS

ROOT = Path(__file__).resolve().parents[1]
NUM_STEPS, CHECKPOINT_EVERY, NUM_RANKS = 6, 2, 2
MAX_COMMANDS = 5
"""Times that a command is given; a fault costs one where the supervisor may not start ranks again."""

CLOCKS = {*TIMINGS, "slowest_rank", "slowest_rank_id", "attempt", "checkpoint_stall"}
"""Metrics that no second run has again. All others have to be equal to the last bit."""

TRAININGS = {
    "dit": "LTX DiT, ZeRO 1, samples on the way",
    "vae": "LTX VAE with GAN, ZeRO 2",
    "tokenizer": "latent tokenizer with EMA codebook, ZeRO 0",
    "ar": "AR model on its tokens, ZeRO 3",
    "dpo": "DPO with a second adapter, ZeRO 1",
}
"""Name -> what it is. All are tiny, fp32, two data ranks, six steps, a checkpoint every second one."""

ORDER = (
    *("forward", "commit", "collective", "open", "data_worker", "backward", "fsync", "collected", "committed", "sampling"),
    *("vote", "write", "mkdir", "forward", "rename", "decode", "collective", "remove", "start", "backward", "collected"),
)
"""Which kinds of moments are drawn, in this order; short matrices still have one of each class."""
_NO_PIXELS = ("ar",)
"""Trainings that decode nothing but a few clips for a check of their cache, and have no decoding processes."""
_CLIPS_A_RANK = 2 * NUM_STEPS
"""A rank has a micro-batch of two clips, or of one pair, in each step."""
_SURE = 0.8
"""Share of the undisturbed run's collectives of which one is drawn: how often ranks ask whether a save is done is up to its
speed."""


@dataclass(frozen=True)
class Disturbed:
    """What came of one run with faults.

    Attributes:
        marks: what the faults that happened wrote.
        num_commands: how often the command was given until the run was finished.
        num_attempts: attempts in the run directory.
        differences: in what the run differs from the undisturbed one; none where all is equal.
        redone: steps that were done again, and gave the same.
        output: all that the verb said, for a failure.
    """

    marks: list[dict[str, Any]]
    num_commands: int
    num_attempts: int
    differences: list[str]
    redone: int
    output: str = field(default="", repr=False)


class Bench:
    """Data, configs and undisturbed runs in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._finished: set[str] = set()

    def config(self, name: str) -> dict[str, Any]:
        """The config of a training."""
        trainer = {
            "max_steps": NUM_STEPS, "precision": "fp32", "checkpoint_every": CHECKPOINT_EVERY, "log_every": 1,
            "num_threads": 1, "device": "cpu",
        }  # fmt: skip
        data = {
            "manifest": str(self._shards), "num_frames": 9, "height": 32, "width": 32, "start": "first", "micro_batch_size": 2,
            "num_micro_batches": NUM_RANKS, "cache_mib": 64,
        }  # fmt: skip
        optimizer = {"lr": 1e-3, "warmup_steps": 2, "ema_decay": 0.9}
        common: dict[str, Any] = {
            "kind": "train", "seed": 5, "trainer": trainer, "data": data, "optimizer": optimizer,
            "parallel": {"data_degree": NUM_RANKS}, "wandb": {"mode": "disabled"},
        }  # fmt: skip
        for section, values in getattr(self, f"_{name}")().items():
            common[section] = {**common.get(section, {}), **values}
        return common

    def straight(self, name: str) -> Path:
        """The undisturbed run of a training, which counted its moments."""
        run = self.folder / "straight" / name
        if name not in self._finished:
            environ = environment([], self.folder / "no_marks", self.census(name))
            code, output = self.train(name, run, environ)
            assert code == 0, output
            self._finished.add(name)
        return run

    def census(self, name: str) -> Path:
        """Where the undisturbed run of a training leaves the counts of its moments."""
        return self.folder / "census" / name

    def counts(self, name: str) -> list[dict[str, int]]:
        """How often each rank of the undisturbed run passed each moment."""
        self.straight(name)
        return [read_json(self.census(name) / f"rank_{rank}.json") for rank in range(NUM_RANKS)]

    def disturb(self, name: str, label: str, faults: Sequence[Fault], started: bool = False, restarts: int = 0) -> Disturbed:
        """Train with `faults`, and give the same command again until the run is finished.

        Args:
            name: of the training.
            label: names the run directory.
            faults: one after the other; each has to happen in the end.
            started: whether ranks are processes of their own, as a user's are.
            restarts: how often the supervisor may start the ranks again before the verb gives up.
        """
        straight, label = self.straight(name), f"{name}_{label}"
        run, marks = self.folder / "runs" / label, self.folder / "marks" / label
        marks.mkdir(parents=True)
        overrides = [] if all(fault.moment != "data_worker" for fault in faults) else ["data.num_workers=1"]
        overrides += [f"faults.max_restarts={restarts}"]
        said: list[str] = []
        code = -1
        while code != 0 and len(said) < MAX_COMMANDS:
            code, output = self.train(name, run, environment(faults, marks), overrides, started)
            said.append(output)
        if code != 0:
            found = [f"not finished: exit code {code}"]
        else:
            found = [*differences(run, straight), *(f"process {pid} was left" for pid in left_behind(marks))]
        return Disturbed(fired(marks), len(said), _num_attempts(run), found, len(superseded(run)), "\n".join(said))

    def train(
        self, name: str, run: Path, environ: Mapping[str, str], overrides: Sequence[str] = (), started: bool = False
    ) -> tuple[int, str]:
        """`videofm train` into `run`: its exit code and what it said."""
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(self.config(name)), encoding="utf-8")
        arguments = ["train", str(path), "--run-dir", str(run), *overrides]
        if started:
            command = [sys.executable, "-m", "videofm", *arguments]
            done = subprocess.run(
                command, cwd=ROOT, env={**os.environ, **environ}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            return done.returncode, done.stdout
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8") as said,
            mock.patch.dict(os.environ, environ),
            mock.patch.object(local, "_start", forked),
            redirect_stdout(said),
            redirect_stderr(said),
        ):
            code = cli.main(arguments)
            said.seek(0)
            return code, said.read()

    # -- data, each made when it is first needed

    @cached_property
    def _shards(self) -> Path:
        return write_demo_shards(self.folder / "shards", num_clips=24)

    @cached_property
    def _encoders(self) -> dict[str, str]:
        return save_encoders(self.folder / "encoders")

    @cached_property
    def _tokens(self) -> Path:
        """Tokens of all clips, by the tokenizer of the undisturbed run."""
        section = tokens_section(self._encoders, str(self.straight("tokenizer")))
        config = encode_config(self._shards, self._encoders, split="all", tokens=section, latents=None, text=None)
        encoder = ShardEncoder(config, self.folder / "tokens", "cpu")
        for group in Manifest.load(self._shards).table["group"].to_pylist():
            encoder.encode(group)
        return self.folder / "tokens"

    @cached_property
    def _base(self) -> str:
        """A transformer with random weights; a fresh one answers 0 whatever its adapters say."""
        dit = models.build("dit/ltx", "tiny", num_layers=1)
        with torch.no_grad():
            for name, parameter in dit.named_parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        return str(models.save(dit, self.folder / "base"))

    @cached_property
    def _pairs(self) -> tuple[str, str]:
        """Candidates, and preferences over them; five prompts, so that epochs do not end with steps."""
        clips = write_candidates(self.folder / "candidates", 5)
        records = sorted(Manifest.load(clips).records(), key=lambda record: record.key)
        return str(clips), str(write_preferences(self.folder / "pairs", neighbours(records), clips))

    # -- what the config of each training has besides

    def _dit(self) -> dict[str, Any]:
        prompts = {"prompts": ["a red circle moving left"], "num_frames": 9, "height": 32, "width": 32, "fps": 25}
        return {
            "models": {
                "vae": {"path": self._encoders["vae"]},
                "dit": {"name": "dit/ltx", "size": "tiny"},
                "text_encoder": {"name": "text/t5", "size": "tiny"},
            },
            "objective": {"kind": "flow_matching", "conditioning": {"first_frame": 0.3}, "train_text_encoder": True},
            "samples": {"every": 3, "num_steps": 2, **prompts},
        }

    def _vae(self) -> dict[str, Any]:
        return {
            "models": {
                "vae": {"name": "vae/ltx", "size": "tiny", "overrides": {"timestep_conditioning": True}},
                "discriminator": {"name": "discriminator/patchgan_3d", "size": "tiny", "overrides": {"in_channels": 6}},
            },
            "objective": {
                "kind": "autoencoder",
                "wavelet": {"weight": 0.1},
                "gan": {"loss": "reconstruction", "weight": 0.1, "start_step": 2, "ramp_steps": 2},
                "denoising_decoder": {"max_sigma": 0.2},
                "num_statistics_clips": 8,
            },
            "data": {"image_share": 0.25},
            "optimizer": {"grad_clip_ema": 2.0},
            "phase_optimizers": {"discriminator": {"lr": 2e-4, "betas": [0.5, 0.9], "weight_decay": 0.0, "ema_decay": 0.0}},
            "parallel": {"zero_stage": 2},
        }

    def _tokenizer(self) -> dict[str, Any]:
        codes = {"kind": "vq_ema", "codebook_size": 32, "dim": 8, "start_vectors": 2, "start_updates": 2}
        return {
            "models": {
                "vae": {"path": self._encoders["vae"]},
                "tokenizer": {"name": "arlon/tokenizer", "size": "tiny", "overrides": {"quantizer": codes}},
            },
            "objective": {"kind": "latent_tokens"},
            "optimizer": {"ema_decay": 0.5},
            "parallel": {"zero_stage": 0},
        }

    def _ar(self) -> dict[str, Any]:
        return {
            "models": {
                "ar": {"name": "ar/transformer", "size": "tiny", "overrides": {"vocab_size": 32}},
                "text_encoder": {"name": "text/t5", "size": "tiny"},
                "tokenizer": {"path": str(self.straight("tokenizer"))},
            },
            "objective": {"kind": "next_token", "train_text_encoder": True, "z_loss": 1e-4, "caption_dropout": 0.1},
            "data": {"cache": {"path": str(self._tokens), "mode": "tokens"}},
            "parallel": {"zero_stage": 3},
        }

    def _dpo(self) -> dict[str, Any]:
        clips, pairs = self._pairs
        return {
            "models": {
                "dit": {"path": self._base, "lora": {"rank": 2}},
                "vae": {"path": self._encoders["vae"]},
                "text_encoder": {"path": self._encoders["text_encoder"]},
            },
            "objective": {"kind": "dpo", "reference": {"kind": "second_adapter", "refresh_every": 3}, "beta": 200.0},
            "data": {"manifest": clips, "pairs": {"path": pairs}, "micro_batch_size": 1},
            "optimizer": {"lr": 3e-2, "ema_decay": 0.0},
        }


def forked(command: Sequence[str], environ: Mapping[str, str], output: Path | None) -> ForkedPython:
    """What `launch.local` starts, forked and watched; `command` begins with the interpreter and -m, and ends with run directory
    and attempt, where rank 0 leaves what it would say on the console."""
    assert command[1] == "-m"
    output = output or Path(command[-2]) / "attempts" / f"{int(command[-1]):04d}" / "rank_0.out"
    return ForkedPython(["-m", "tests.faults", *command[2:]], environ, output)


def draw(
    name: str, counts: Sequence[Mapping[str, int]], num_moments: int, seed: int, kinds: Sequence[str] = ORDER
) -> list[Fault]:
    """Moments of a training, of `kinds` in turn: rank and number at random, so that the moment comes. Kinds that no rank of the
    training passes are left out.

    Args:
        name: of the training.
        counts: how often each rank of the undisturbed run passed each moment.
        num_moments: how many.
        seed: of the draw.
        kinds: of `faults.MOMENTS`.
    """
    dice, found = random.Random(f"{seed}-{name}"), []
    most = {moment: [_most(name, moment, rank) for rank in counts] for moment in kinds}
    possible = [moment for moment in kinds if any(most[moment])]
    assert possible, f"no rank of {name} passes {', '.join(kinds)}"
    for moment in islice(cycle(possible), num_moments):
        rank = dice.choice([rank for rank, count in enumerate(most[moment]) if count])
        found.append(Fault(rank, moment, dice.randint(1, most[moment][rank])))
    return found


def _most(name: str, moment: str, counts: Mapping[str, int]) -> int:
    """The largest number of a moment that surely comes in a rank of which an undisturbed run gave `counts`."""
    if moment == "data_worker":  # which sees the clips of steps, and not those of statistics and checks
        return 0 if name in _NO_PIXELS else min(counts.get("decode", 0), _CLIPS_A_RANK)
    count = counts.get(moment, 0)
    return math.ceil(_SURE * count) if moment in ("collective", "collected") else count


def differences(run: Path, straight: Path) -> list[str]:
    """In what a run differs from the undisturbed one: rows of metrics, steps that were done twice, and every tensor of the last
    checkpoint (weights, moving averages, moments, buffers), bit by bit."""
    ours, theirs = RunDirectory(run).metrics(), RunDirectory(straight).metrics()
    found = []
    if [row["step"] for row in ours] != list(range(1, NUM_STEPS + 1)):
        found.append(f"steps {[row['step'] for row in ours]}")
    wanted = {row["step"]: _numbers(row) for row in theirs}
    for what, rows in (("", ours), (" (done again later)", superseded(run))):
        for row in rows:
            mine, other = _numbers(row), wanted[row["step"]]
            names = [name for name in {**mine, **other} if mine.get(name) != other.get(name)]
            found += [f"{name} of step {row['step']}{what}" for name in names]
    return found + _tensor_differences(run, straight)


def _tensor_differences(run: Path, straight: Path) -> list[str]:
    last = f"checkpoints/step_{NUM_STEPS:08d}"
    ours, theirs = _tensors(run / last), _tensors(straight / last)
    found = [f"tensor {name} in one run only" for name in sorted(ours.keys() ^ theirs.keys())]
    found += [f"tensor {name}" for name in sorted(ours.keys() & theirs.keys()) if not _equal(ours[name], theirs[name])]
    if read_json(run / last / "state.json") != read_json(straight / last / "state.json"):
        found.append("state.json")
    return found if theirs else ["the undisturbed run has no tensors"]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by the folder it is in and its name: into how many files they are split does not matter."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        part = path.relative_to(folder)
        stem = part.stem.split("-000")[0]
        found |= {f"{part.parent}/{stem}:{name}": value for name, value in load_file(path).items()}
    return found


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def superseded(run: Path) -> list[dict[str, Any]]:
    """Rows of steps that were done, lost, and done again."""
    return [row for path in sorted(run.glob("attempts/*/superseded_metrics.jsonl")) for row in read_jsonl(path)]


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in CLOCKS}


def _num_attempts(run: Path) -> int:
    return len(list((run / "attempts").glob("[0-9]*")))


def left_behind(marks: Path, patience: float = 60.0) -> list[int]:
    """Processes that were started for the run whose marks lie in `marks`, and still are there after `patience` seconds."""
    deadline = time.monotonic() + patience
    while (found := _belonging(marks)) and time.monotonic() < deadline:
        time.sleep(0.05)  # decoding processes notice a moment later that their rank has ended
    return found


def _belonging(marks: Path) -> list[int]:
    """Processes whose environment names `marks`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            known = (folder / "environ").read_bytes()
        except OSError:
            continue
        if str(marks).encode() in known and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found
