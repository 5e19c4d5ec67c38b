"""The commit protocol of checkpoints.

A checkpoint is `checkpoints/step_00000200/`. It is written aside, every file is flushed and hashed, `COMMITTED.json` (the list
of files with bytes and SHA-256) comes last, and one rename makes it visible. A reader trusts only folders that hold that
file, checks every hash before it uses one, and falls back to the checkpoint before a damaged one, saying so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from videofm.errors import CheckpointError
from videofm.files import sha256_of, sync
from videofm.progress import LOG
from videofm.run_dir import now, read_json, write_json

COMMITTED = "COMMITTED.json"
_FORMAT = 1


@dataclass(frozen=True)
class CheckpointFiles:
    """What a checkpoint holds: tensors and JSON values by relative path (`models/dit/model`, without the suffix)."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any]


def step_folder(checkpoints: Path, step: int) -> Path:
    """`checkpoints/step_00000200`."""
    return checkpoints / f"step_{step:08d}"


def write_checkpoint(checkpoints: Path, step: int, files: CheckpointFiles) -> Path:
    """Write and commit the checkpoint of `step`; one process calls this. A checkpoint of that step that is whole stays."""
    target = step_folder(checkpoints, step)
    if (target / COMMITTED).exists():
        return target
    aside = checkpoints / f".{target.name}.tmp"
    for leftover in (aside, target):
        shutil.rmtree(leftover, ignore_errors=True)
    for name, tensors in files.tensors.items():
        path = aside / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Contiguous copies: safetensors refuses views that share memory.
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path, {"format": "pt"})
    for name, value in files.values.items():
        write_json(aside / f"{name}.json", value)
    written = sorted(path for path in aside.rglob("*") if path.is_file())
    for path in written:
        sync(path)
    listing = {str(path.relative_to(aside)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in written}
    write_json(aside / COMMITTED, {"format": _FORMAT, "step": step, "time": now(), "files": listing})
    sync(aside)
    os.replace(aside, target)
    sync(checkpoints)
    return target


def committed(checkpoints: Path) -> list[Path]:
    """The folders of complete checkpoints, oldest first."""
    return sorted(path.parent for path in checkpoints.glob(f"step_*/{COMMITTED}"))


def verify(folder: Path) -> None:
    """Check that every file of a checkpoint is there with its bytes and hash.

    Raises:
        CheckpointError: a file is missing or differs; the message names it.
    """
    if not (folder / COMMITTED).exists():
        raise CheckpointError(f"{folder} has no {COMMITTED}: it was never completed, or is no checkpoint")
    for name, expected in read_json(folder / COMMITTED)["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} is damaged: {name} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{folder} is damaged: {name} has {path.stat().st_size} bytes, not {expected['bytes']}")
        if sha256_of(path) != expected["sha256"]:
            raise CheckpointError(f"{folder} is damaged: the SHA-256 of {name} is not the one recorded when it was written")


def newest(checkpoints: Path) -> Path | None:
    """The newest checkpoint that verifies, or None where there is none; a damaged one is named in the log and passed over.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged.
    """
    candidates = committed(checkpoints)
    for folder in reversed(candidates):
        try:
            verify(folder)
        except CheckpointError as error:
            LOG.warning("%s; trying the checkpoint before it", error)
            continue
        return folder
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {checkpoints} is whole; move the folder away to start again"
        )
    return None


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of `name` (a relative path without suffix) in a checkpoint."""
    return load_file(folder / f"{name}.safetensors")


def prune(checkpoints: Path, keep: int) -> None:
    """Delete all but the `keep` newest complete checkpoints, each renamed first so that none is ever seen half deleted."""
    for folder in committed(checkpoints)[:-keep]:
        trash = folder.with_name(f".{folder.name}.trash")
        os.replace(folder, trash)
        shutil.rmtree(trash)
