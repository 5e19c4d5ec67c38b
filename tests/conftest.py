"""What all tests share: a marker from the folder, one thread for each process, no network accounts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parent
KINDS = ("unit", "distributed", "integration", "gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by its folder; tests in gpu/ are skipped where there is no CUDA device."""
    for item in items:
        kind = item.path.relative_to(ROOT).parts[0]
        if kind in KINDS:
            item.add_marker(kind)
        if kind == "gpu" and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture
def repo() -> Path:
    """The root of the checkout."""
    return ROOT.parent
