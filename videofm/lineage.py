"""What a stage reads from outside of its recipe, by content: a part of its fingerprint and of its lineage.

A file is its SHA-256; a view what it says together with the files that it extends; a dataset its manifest; preferences their
header, which has the hash of every record; a training run its newest checkpoint; any other folder the names and sizes of its
files, which is what a listing can tell without reading everything.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from videofm.config.source import read_file
from videofm.data.preferences import HEADER
from videofm.files import sha256_of

_READING = {
    *("source", "prompts_file", "manifest", "mix", "view", "path", "run", "samples", "inflate_from", "init_from", "image_vae"),
    *("cache", "weights", "lpips_weights", "i3d_weights"),
    *("image", "images", "video", "videos", "pairs"),
}
"""Names of the fields that hold a path to read, or a list or mapping of them."""


def outside_inputs(config: BaseModel, inside: Path | None = None) -> dict[str, str]:
    """`field: path` -> digest, for each path that `config` reads, that exists, and that does not lie in the folder `inside`.

    Raises:
        ConfigError: a view, or a file that it extends, cannot be read.
    """
    found = {}
    root = None if inside is None else inside.resolve()
    for field, value in _paths(config):
        path = Path(value)
        if path.exists() and not (root is not None and path.resolve().is_relative_to(root)):
            is_view = field.rpartition(".")[2] == "view"
            found[f"{field}: {os.path.normpath(value)}"] = _digest_of_view(path) if is_view else digest(path)
    return found


def digest(path: Path) -> str:
    """SHA-256 (hex) that stands for the content of `path`; see the head of this file."""
    if path.is_file():
        return sha256_of(path)
    committed = sorted(path.glob("checkpoints/step_*/COMMITTED.json")) or sorted(path.glob("COMMITTED.json"))
    if committed:
        return digest(committed[-1])
    manifest = sorted(path.glob("manifest/*.json"))
    if manifest:
        return _hash(f"{entry.name} {digest(entry)}" for entry in manifest)
    if (path / HEADER).is_file():  # other votes leave names and sizes as they are
        return digest(path / HEADER)
    files = sorted(entry for entry in path.rglob("*") if entry.is_file())
    return _hash(f"{entry.relative_to(path)} {entry.stat().st_size}" for entry in files)


def _digest_of_view(path: Path) -> str:
    return _hash(iter([json.dumps(read_file(path).values, sort_keys=True)]))


def _hash(lines: Iterator[str]) -> str:
    total = hashlib.sha256()
    for line in lines:
        total.update(line.encode() + b"\n")
    return total.hexdigest()


def _paths(value: Any, field: str = "", reading: bool = False) -> Iterator[tuple[str, str]]:
    """Every reading field of a section and of the sections in it, with its dotted name; `reading`: `value` holds paths."""
    if isinstance(value, str):
        if reading:
            yield field, value
        return
    if isinstance(value, BaseModel):
        items = [(name, getattr(value, name), name in _READING) for name in type(value).model_fields]
    elif isinstance(value, dict):
        items = [(str(name), item, reading) for name, item in value.items()]
    elif isinstance(value, list):
        items = [(str(index), item, reading) for index, item in enumerate(value)]
    else:
        return
    for name, item, is_path in items:
        yield from _paths(item, f"{field}.{name}" if field else name, is_path)
