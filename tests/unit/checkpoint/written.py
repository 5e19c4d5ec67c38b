"""Real checkpoints of a tiny DiT, written by the saver itself: by one rank, or by several that are threads here."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from videofm import models
from videofm.checkpoint.content import Content, replicated
from videofm.checkpoint.peers import Peers
from videofm.checkpoint.record import Facts
from videofm.checkpoint.save import save_now

TINY = {"in_channels": 4, "num_layers": 1, "num_heads": 2, "head_width": 8, "caption_channels": 16}
CONFIG: dict[str, Any] = {
    "kind": "train",
    "models": {"dit": {"name": "dit/ltx", "overrides": TINY}},
    "objective": {"kind": "flow_matching"},
    "data": {"manifest": "data", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 2},
    "optimizer": {"lr": 0.01},
    "trainer": {"max_steps": 100},
}


class ThreadPeers(Peers):
    """A rank that is a thread: what ranks say meets on a board."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(board))
        object.__setattr__(self, "_board", board)
        object.__setattr__(self, "_barrier", barrier)

    def share(self, value: Any) -> list[Any]:
        """As JSON, like the real ones."""
        board, barrier = self._board, self._barrier  # type: ignore[attr-defined]
        board[self.rank] = json.dumps(value)
        barrier.wait(timeout=60)
        answers = [json.loads(text) for text in board]
        barrier.wait(timeout=60)
        return answers


def together(num_ranks: int, action: Any) -> list[Any]:
    """`action(peers)` on each of `num_ranks` threads."""
    board: list[Any] = [None] * num_ranks
    barrier = threading.Barrier(num_ranks)
    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(lambda rank: action(ThreadPeers(rank, board, barrier)), range(num_ranks)))


def tiny_dit(seed: int, **overrides: Any) -> nn.Module:
    """A DiT whose every weight is drawn."""
    model = models.build("dit/ltx", "tiny", **{**TINY, **overrides})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def write_step(
    run: Path,
    step: int,
    trained: Mapping[str, nn.Module],
    *,
    ema: Mapping[str, nn.Module] | None = None,
    num_ranks: int = 1,
    healthy: bool = True,
    metrics: Mapping[str, float | None] | None = None,
    config: Mapping[str, Any] | None = None,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """The checkpoint of a step, with `num_ranks` files of each model, moments of Adam, and the config of the training."""
    tensors: dict[str, dict[str, Tensor]] = {f"models/{role}/model": models.weights(model) for role, model in trained.items()}
    tensors |= {f"ema/{role}/model": models.weights(model) for role, model in (ema or {}).items()}
    moments = {
        f"{moment}.{name}": value + step for moment in ("exp_avg", "exp_avg_sq") for name, value in _all(trained).items()
    }
    tensors["optimizer/train"] = {**moments, "num_steps": torch.tensor(step)}
    for name, more in (extra or {}).items():
        tensors[name] = {**tensors.get(name, {}), **more}
    values: dict[str, Any] = {"state": {"step": step, "position": {"step": step}}, "train_config": config or CONFIG}
    for place, built in (("models", trained), ("ema", ema or {})):
        values |= {f"{place}/{role}/model": models.describe(model) for role, model in built.items()}
    stored = [replicated(file, name, value.detach()) for file, own in tensors.items() for name, value in own.items()]
    content = Content(stored, values)
    facts = Facts(step, healthy, "test", "fingerprint", {"data": num_ranks}, 2 * step, metrics or {})
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    if not (run / "config.yaml").exists():
        (run / "config.yaml").write_text(json.dumps(config or CONFIG))
    return together(num_ranks, lambda peers: save_now(run / "checkpoints", facts, content, peers))[0]  # type: ignore[no-any-return]


def _all(trained: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{role}.{name}": value.detach() for role, model in trained.items() for name, value in model.named_parameters()}


def edit_config(run: Path, **trainer: Any) -> None:
    """Set fields of the section `trainer` in the config of a run."""
    config = json.loads((run / "config.yaml").read_text())
    config["trainer"] |= trainer
    (run / "config.yaml").write_text(json.dumps(config))
