"""How one rank starts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from videofm.checkpoint.peers import Peers
from videofm.config.faults import FaultsConfig
from videofm.errors import ConfigError, Interrupted, ParallelError
from videofm.parallel.rendezvous import Place
from videofm.run_dir import RunDirectory
from videofm.train import worker


class Alone(SimpleNamespace):
    """A mesh of one rank."""

    rank, world_size, checkpoint_group = 0, 1, None

    def __str__(self) -> str:
        return "the mesh"


def test_what_is_passed_over_is_what_the_main_rank_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This is rank 1, whose NFS does not show it the windows yet."""
    monkeypatch.setattr(worker, "build_objective", lambda config: None)
    monkeypatch.setattr(worker, "open_loader", lambda *_: SimpleNamespace(plan=SimpleNamespace(identity={"seed": 3})))
    monkeypatch.setattr(Peers, "share", lambda self, value: [[{"first": 4, "end": 9}], value])
    monkeypatch.setattr(worker, "compare_orders", lambda identity, mesh: compared.update(identity) or stops())
    compared: dict[str, Any] = {}

    def stops() -> None:
        raise ParallelError("here")

    mesh, config = Alone(rank=1, world_size=2), None
    with pytest.raises(ParallelError, match="here"):
        worker._train_on(mesh, config, RunDirectory(tmp_path), 0, {})  # type: ignore[arg-type]
    assert compared == {"seed": 3, "passed_over": [[4, 9]]}


def test_orders_are_compared_before_anything_is_written(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the comparison finds is in tests/distributed/test_mesh.py."""
    plan = SimpleNamespace(identity={"seed": 3})
    monkeypatch.setattr(worker, "build_objective", lambda config: None)
    monkeypatch.setattr(worker, "open_loader", lambda *_: SimpleNamespace(plan=plan))

    def compare(identity: Any, mesh: Any) -> None:
        raise ParallelError(f"{identity} {mesh}")

    monkeypatch.setattr(worker, "compare_orders", compare)
    config: Any = None
    mesh: Any = Alone()
    with pytest.raises(ParallelError, match="{'seed': 3} the mesh"):
        worker._train_on(mesh, config, RunDirectory(tmp_path), 0, {})
    assert list(tmp_path.iterdir()) == []


def test_tokenizers_are_looked_at_before_anything_is_written(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is in test_token_origin.py; here it is asked about the run's models, what it reads and what it trains."""
    loader = SimpleNamespace(plan=SimpleNamespace(identity={}))
    monkeypatch.setattr(worker, "build_objective", lambda config: SimpleNamespace(phases={"train": ("ar",)}))
    monkeypatch.setattr(worker, "open_loader", lambda *_: loader)
    monkeypatch.setattr(worker, "compare_orders", lambda *_: None)
    given: list[Any] = []

    def check(*arguments: Any) -> None:
        given.extend(arguments)
        raise ConfigError("another VAE")

    monkeypatch.setattr(worker, "check_tokenizers", check)
    config: Any = "the config"
    mesh: Any = Alone()
    with pytest.raises(ConfigError, match="another VAE"):
        worker._train_on(mesh, config, RunDirectory(tmp_path), 0, {})
    assert given == ["the config", {}, ("ar",), loader] and list(tmp_path.iterdir()) == []


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (Interrupted("the state is in spare/step_00000004"), 75, "rank_0 interrupted: the state is in spare/step_00000004"),
        (ValueError("a mistake"), 1, "rank_0 failed: ValueError: a mistake"),
        (None, 0, "rank_0 finished"),
    ],
)
def test_a_full_disk_does_not_change_how_a_rank_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], raised: Any, code: int, told: str
) -> None:
    """Its word and its traceback cannot be written: the exit code says it, and what is printed."""
    folder = tmp_path / "attempts" / "0001"
    folder.mkdir(parents=True)
    (folder / "rank_0_traceback.txt").symlink_to("/dev/full")
    (tmp_path / "config.yaml").write_text("{}")

    def train(*_: Any) -> None:
        if raised is not None:
            raise raised

    monkeypatch.setattr(worker, "_die_with_parent", lambda: None)
    monkeypatch.setattr(worker, "find_place", lambda attempt: Place())
    monkeypatch.setattr(worker, "setup_logging", lambda path: None)
    monkeypatch.setattr(worker.TrainConfig, "model_validate", lambda values: SimpleNamespace(faults=FaultsConfig()))
    monkeypatch.setattr(worker, "train", train)
    monkeypatch.setattr(worker, "write_json", full)
    try:
        assert worker.main([str(tmp_path), "1"]) == code
    finally:
        tempfile.tempdir = None
    assert f"videofm: {told} ({folder / 'rank_0.json'} cannot be written: [Errno 28]" in capfd.readouterr().err


def test_a_second_signal_ends_at_once_whatever_the_disk_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(worker.os, "_exit", codes.append)
    monkeypatch.setattr(worker, "write_json", full)
    worker._leave(tmp_path / "rank_0.json", "SIGTERM")
    assert codes == [75]
