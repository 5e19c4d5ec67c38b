"""How one rank starts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from videofm.errors import ParallelError
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
