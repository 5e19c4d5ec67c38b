"""Every configs/debug/dit_*.yaml for a few steps, and videos from what it left: from text, and from an image."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.demo_shards import write_demo_shards
from videofm import media, models
from videofm.run_dir import RunDirectory

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with shards, a VAE with random weights, and an image."""
    folder = tmp_path_factory.mktemp("dits")
    write_demo_shards(folder / "data", num_clips=16)
    torch.manual_seed(0)
    models.save(models.build("vae/ltx", "tiny"), folder / "vae")
    Image.new("RGB", (32, 32), (200, 30, 30)).save(folder / "first.png")
    return folder


def videofm(*arguments: str) -> str:
    command = [sys.executable, "-m", "videofm", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1800)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["ltx", "step_video"])
def test_trains_resumes_and_samples(name: str, work: Path) -> None:
    run, sources = work / f"dit_{name}", [f"data.manifest={work / 'data'}", f"models.vae.path={work / 'vae'}"]
    steps = ["trainer.num_threads=1", "trainer.checkpoint_every=2", "trainer.log_every=1", "--run-dir", str(run)]
    videofm("train", f"configs/debug/dit_{name}.yaml", *sources, "trainer.max_steps=4", *steps)
    rows = RunDirectory(run).metrics()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(0 <= row["share_first_frame"] <= 1 for row in rows) and any(row["given"] > 0 for row in rows)

    sampling = {"kind": "sample", "run": str(run), "fps": 25, "num_frames": 9, "height": 32, "width": 32, "num_steps": 2}
    (work / "sample.yaml").write_text(json.dumps({**sampling, "prompts": ["a red circle moving left"]}))
    for kind, extra in (("text", []), ("image", ["--image", str(work / "first.png")])):
        folder = work / f"{name}_{kind}"
        videofm("sample", str(work / "sample.yaml"), "--seed", "1", *extra, "--run-dir", str(folder))
        (video,) = sorted((folder / "samples").glob("*.mp4"))
        assert media.read_video(video).shape == (9, 32, 32, 3)
    first = [media.read_video(work / f"{name}_{kind}" / "samples" / "000.mp4")[0] for kind in ("text", "image")]
    assert abs(first[0].astype(int) - first[1]).mean() > 1, "the image changes the first frame"
