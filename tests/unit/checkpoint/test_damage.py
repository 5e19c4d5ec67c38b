"""Whatever happens to any file of a checkpoint is found and told by name, and the checkpoint before it is used; and nothing
that is called a checkpoint can make us unpickle.

The checkpoints are real ones, of one rank and of three, whose models lie in shards with an index.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.checkpoint.written import tiny_dit, together, write_step
from videofm import models
from videofm.checkpoint import listing
from videofm.checkpoint.averaging import average
from videofm.checkpoint.difference import compare
from videofm.checkpoint.record import COMMITTED, FileEntry, read_record, verify
from videofm.checkpoint.resume import newest_whole
from videofm.checkpoint.save import read_tensors
from videofm.errors import CheckpointError, VideofmError
from videofm.files import sha256_of
from videofm.models.initial import initial
from videofm.progress import LOG
from videofm.run_dir import RunDirectory
from videofm.train import state

OLD, NEW = 10, 20


def truncate(path: Path) -> None:
    """Two bytes: the last one of the marker ends its last line, and says nothing."""
    path.write_bytes(path.read_bytes()[:-2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path, place: float) -> None:
    """One bit of the byte at `place`, a share of the file."""
    content = bytearray(path.read_bytes())
    content[min(int(place * len(content)), len(content) - 1)] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "empty": empty,
    "first byte flipped": lambda path: flip(path, 0.0),
    "middle byte flipped": lambda path: flip(path, 0.5),
    "last byte flipped": lambda path: flip(path, 1.0),
    "deleted": Path.unlink,
}


@pytest.fixture(scope="module", params=[1, 3])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, of as many ranks as the parameter says."""
    run = tmp_path_factory.mktemp("run") / "run"
    for step in (OLD, NEW):
        write_step(run, step, {"dit": tiny_dit(step)}, ema={"dit": tiny_dit(step + 1)}, num_ranks=request.param)
    return run


@pytest.fixture
def log() -> Iterator[list[str]]:
    """The lines of the log."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    LOG.addHandler(handler)
    try:
        yield lines
    finally:
        LOG.removeHandler(handler)


def newest_of(run: Path) -> Path:
    return run / "checkpoints" / f"step_{NEW:08d}"


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_in_turn(written: Path, tmp_path: Path, log: list[str], damage: str) -> None:
    """`verify` names the file, resume passes the checkpoint over and says so, and takes the one before."""
    names = files_of(newest_of(written))
    assert COMMITTED in names and "models/dit/model.json" in names and "state.json" in names
    assert ("models/dit/model.safetensors.index.json" in names) == (len(list(newest_of(written).rglob("model-*"))) > 0)
    for number, name in enumerate(names):
        run = shutil.copytree(written, tmp_path / str(number))
        DAMAGES[damage](newest_of(run) / name)
        (found,) = listing.damage(run)
        assert found.folder == newest_of(run) and len(found.problems) == 1 and name in found.problems[0], name
        assert found.instead is not None and found.instead.name == f"step_{OLD:08d}"
        with pytest.raises(CheckpointError, match=name):
            verify(newest_of(run))
        log.clear()
        resumed = state.resume_folder(RunDirectory(run))
        assert resumed is not None and resumed.name == f"step_{OLD:08d}", name
        assert any(name in line and newest_of(run).name in line for line in log), (name, log)
    assert len(names) > 6


def test_every_byte_of_the_marker(written: Path, tmp_path: Path) -> None:
    """The marker has no other file that knows its hash: it knows it itself."""
    run = shutil.copytree(written, tmp_path / "run")
    marker = newest_of(run) / COMMITTED
    whole = marker.read_bytes()
    assert listing.damage(run) == []
    for place in range(len(whole)):
        for bit in (1, 0x20):  # the second makes capitals of letters, and numbers of what is none
            marker.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            try:
                verify(newest_of(run))
            except CheckpointError:
                continue
            pytest.fail(f"byte {place} of {len(whole)}, {whole[place : place + 1]!r} xor {bit}, was not missed")


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ranks_find_damage_together(written: Path, tmp_path: Path, num_ranks: int) -> None:
    """Each hashes a share of the files; all come to the same checkpoint."""
    run = shutil.copytree(written, tmp_path / "run")
    for name in ("state.json", files_of(newest_of(run))[3]):
        flip(newest_of(run) / name, 0.5)
        found = together(num_ranks, lambda peers: newest_whole([run / "checkpoints"], peers))
        assert [folder.name for folder in found] == [f"step_{OLD:08d}"] * num_ranks


def test_with_nothing_whole_there_is_an_error_that_says_what_to_do(written: Path, tmp_path: Path) -> None:
    run = shutil.copytree(written, tmp_path / "run")
    for folder in (run / "checkpoints").iterdir():
        truncate(folder / "optimizer" / files_of(folder / "optimizer")[0])
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints in .* is whole .*move the folder away to start again"):
        state.resume_folder(RunDirectory(run))


def test_a_run_whose_only_marker_is_gone_does_not_begin_anew(written: Path, tmp_path: Path) -> None:
    """Its weights are there: to start from step 0 without a word, and to save over them, would be the worst."""
    run = shutil.copytree(written, tmp_path / "run")
    for folder in (run / "checkpoints").iterdir():
        (folder / COMMITTED).unlink()
    with pytest.raises(CheckpointError, match=f"none of the 2 checkpoints in .* is whole .*{COMMITTED}"):
        state.resume_folder(RunDirectory(run))


def test_a_reader_of_one_tensor_names_the_damaged_file(written: Path, tmp_path: Path) -> None:
    """Headers and indexes that no longer fit: told as damage of a file, never as an error of a library."""
    run = shutil.copytree(written, tmp_path / "run")
    folder = newest_of(run)
    shards = sorted((folder / "models/dit").glob("model*.safetensors"))
    (folder / "models/dit" / shards[0].name).write_bytes(shards[0].read_bytes()[:40])
    readers: list[Callable[[], Any]] = [
        lambda: read_tensors(folder, "models/dit/model"),
        lambda: compare(folder, folder),
        lambda: models.load(folder, ema=False),
    ]
    for read in readers:
        with pytest.raises(CheckpointError, match=shards[0].name):
            read()
    shards[0].unlink()
    for read in (readers[0], readers[2]):  # a comparison tells of a model that is absent on both sides nothing
        with pytest.raises(CheckpointError, match="model.*(missing|does not exist)"):
            read()


# -- pickles


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


@pytest.fixture
def planted(written: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run whose newest checkpoint has pickles in the place of its weights, averages and moments, and beside them under names
    that others use; the markers are made anew, so that hashes are right. The second path exists once one was unpickled."""
    run, proof = shutil.copytree(written, tmp_path / "planted"), tmp_path / "proof"
    folder = newest_of(run)
    for path in [*folder.rglob("*.safetensors")]:
        torch.save({"state_dict": Payload(proof)}, path)
    for name in ("model.pt", "pytorch_model.bin", "diffusion_pytorch_model.bin", "model.ckpt"):
        (folder / "models/dit" / name).write_bytes(pickle.dumps(Payload(proof)))
    commit_anew(folder)
    return run, proof


def commit_anew(folder: Path) -> None:
    """A marker that an attacker, or a careless script, has made for the files that are there."""
    names = [name for name in files_of(folder) if name != COMMITTED]
    entries = {name: FileEntry((folder / name).stat().st_size, sha256_of(folder / name)) for name in names}
    record = replace(read_record(folder), files=entries)
    (folder / COMMITTED).write_text(json.dumps(record.to_json()))


def test_the_payload_works(tmp_path: Path) -> None:
    """Else the tests below would prove nothing."""
    torch.save(Payload(tmp_path / "one"), tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    pickle.loads(pickle.dumps(Payload(tmp_path / "two")))
    assert (tmp_path / "one").exists() and (tmp_path / "two").exists()


READERS: dict[str, Callable[[Path, Path], Any]] = {
    "models.load of a run": lambda run, _: models.load(run),
    "models.load of a checkpoint": lambda run, _: models.load(newest_of(run), ema=False),
    "models.load of a model's folder": lambda run, _: models.load(newest_of(run) / "models/dit"),
    "models.load of a file": lambda run, _: models.load(newest_of(run) / "models/dit/model.pt"),
    "models.load of a file that is called safetensors": lambda run, _: models.load(
        next((newest_of(run) / "models/dit").glob("*.safetensors"))
    ),
    "init_from": lambda run, _: initial("dit/ltx", run, role="dit"),
    "resume, weights": lambda run, _: state.load_weights(newest_of(run), {"dit": tiny_dit(0)}, ("dit",)),
    "resume, moments": lambda run, _: dict(read_tensors(newest_of(run), "optimizer/train")),
    "resume, averages": lambda run, _: dict(read_tensors(newest_of(run), "ema/dit/model")),
    "average": lambda run, out: average(listing.finished_checkpoints(run), out),
    "average of moving averages": lambda run, out: average(listing.finished_checkpoints(run), out, ema=True),
    "diff": lambda run, _: compare(*listing.finished_checkpoints(run)),
    "diff of files": lambda run, _: compare(newest_of(run) / "models/dit/model.pt", newest_of(run)),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_planted_pickle_is_never_loaded(planted: tuple[Path, Path], tmp_path: Path, reader: str) -> None:
    """Hashes are right, names are right: still it is an error of ours, and the payload has not run."""
    run, proof = planted
    with pytest.raises(VideofmError):
        READERS[reader](run, tmp_path / "out")
    assert not proof.exists(), "a pickle was loaded"


def test_verify_tells_what_was_put_there(written: Path, tmp_path: Path) -> None:
    run = shutil.copytree(written, tmp_path / "run")
    (newest_of(run) / "models/dit/model.pt").write_bytes(pickle.dumps(Payload(tmp_path / "proof")))
    (found,) = listing.damage(run)
    assert "models/dit/model.pt is no part of it" in found.problems[0] and not (tmp_path / "proof").exists()
