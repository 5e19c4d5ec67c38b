"""How one rank starts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from videofm.errors import ConfigError, ParallelError
from videofm.run_dir import RunDirectory
from videofm.train import worker


def test_orders_are_compared_before_anything_is_written(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the comparison finds is in tests/distributed/test_mesh.py."""
    plan = SimpleNamespace(identity={"seed": 3})
    monkeypatch.setattr(worker, "build_objective", lambda config: None)
    monkeypatch.setattr(worker, "open_loader", lambda *_: SimpleNamespace(plan=plan))

    def compare(identity: Any, mesh: Any) -> None:
        raise ParallelError(f"{identity} {mesh}")

    monkeypatch.setattr(worker, "compare_orders", compare)
    config: Any = None
    mesh: Any = "the mesh"
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
    mesh: Any = "the mesh"
    with pytest.raises(ConfigError, match="another VAE"):
        worker._train_on(mesh, config, RunDirectory(tmp_path), 0, {})
    assert given == ["the config", {}, ("ar",), loader] and list(tmp_path.iterdir()) == []
