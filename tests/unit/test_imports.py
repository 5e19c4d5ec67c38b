"""Every module can be imported, and the command line and the configuration import nothing heavy."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.sources import files
from videofm import registry

HEAVY = ("torch", "ray", "deepspeed", "megatron", "transformers", "diffusers", "cv2", "av", "numpy", "wandb")


@pytest.mark.parametrize("module", [file.module for file in files() if not file.module.endswith("__main__")])
def test_module_imports(module: str) -> None:
    assert importlib.import_module(module)


@pytest.mark.parametrize(
    "table", ["MODELS", "OBJECTIVES", "ATTENTION_BACKENDS", "DECODERS", "CURATION_STAGES", "STAGES", "LAUNCHERS", "REWARDS"]
)
def test_every_registered_name_resolves(table: str) -> None:
    for target in getattr(registry, table).values():
        assert registry.resolve(target) is not None, target


def test_config_and_command_line_import_nothing_heavy(repo: Path) -> None:
    code = f"import sys, videofm.cli, videofm.config.load, videofm.recipe; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_imports_no_pydantic(repo: Path) -> None:
    code = "import sys; from videofm.cli import main; main(['--help']); sys.exit('pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
