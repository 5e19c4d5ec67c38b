"""Where a rank finds a moment of Adam that it has by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from videofm.train.engine import PhaseEngine


def test_a_moment_in_host_memory_comes_to_the_device() -> None:
    """An optimizer that is offloaded has it there, and tensor ranks exchange it on the device. `meta` stands for a GPU."""
    fragment = torch.arange(6.0)
    parameter: Any = SimpleNamespace(
        _hp_mapping=SimpleNamespace(get_hp_fragment=lambda moment: fragment), shape=(2, 3), numel=lambda: 6
    )
    for device in ("cpu", "meta"):
        mesh = SimpleNamespace(gradient_degree=1, gradient_group=None, device=torch.device(device))
        engine: Any = SimpleNamespace(mesh=mesh)
        found = PhaseEngine._join_fragments(engine, parameter, "exp_avg", 0)
        assert found.device.type == device and found.shape == (2, 3)
        assert device == "meta" or torch.equal(found.flatten(), fragment)
