"""Held-out loss puts latent frames where the training run had them."""

from __future__ import annotations

from pathlib import Path

import pytest

from videofm.run_dir import write_json
from videofm.stages.evaluate import trained_with_causal_fix


@pytest.mark.parametrize("file", ["config.yaml", "train_config.json"])
def test_the_causal_fix_is_read_from_a_run_or_a_checkpoint(tmp_path: Path, file: str) -> None:
    for written, expected in (({"causal_fix": True}, True), ({"causal_fix": False}, False), ({}, False)):
        write_json(tmp_path / file, {"kind": "train", "objective": {"kind": "flow_matching"} | written})
        assert trained_with_causal_fix(tmp_path) is expected


def test_an_exported_folder_has_none(tmp_path: Path) -> None:
    write_json(tmp_path / "model_index.json", {"_class_name": "LTXPipeline"})
    assert not trained_with_causal_fix(tmp_path)
