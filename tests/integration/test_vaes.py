"""Every configs/debug/vae_*.yaml for a few steps with its GAN on, as a user runs them, and what a run leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo

from tests.demo_shards import write_demo_shards
from videofm import models
from videofm.config.data import DataConfig
from videofm.data.loader import StepLoader
from videofm.data.manifest import Manifest
from videofm.evaluation.reconstruction import psnr
from videofm.models.vae.base import VideoVAE
from videofm.models.vae.statistics import read_statistics
from videofm.run_dir import RunDirectory
from videofm.train.speed import TIMINGS

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["trainer.checkpoint_every=3", "trainer.num_threads=1", "trainer.log_every=1", "objective.num_statistics_clips=8"]
GAN = ["objective.gan.start_step=2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with shards of 17 and more frames of 64x64."""
    folder = tmp_path_factory.mktemp("vaes")
    write_demo_shards(folder / "data", num_clips=16, num_frames=18, size=64)
    return folder


@pytest.fixture(scope="module")
def image_vae(work: Path) -> Path:
    return train(work, "image", "trainer.max_steps=60")


def start(work: Path, name: str, *overrides: str) -> subprocess.Popen[str]:
    arguments = [f"data.manifest={work / 'data'}", *SHORT, *overrides, "--run-dir", str(work / f"vae_{name}")]
    command = [sys.executable, "-m", "videofm", "train", f"configs/debug/vae_{name}.yaml", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def train(work: Path, name: str, *overrides: str) -> Path:
    process = start(work, name, *overrides)
    try:
        output, _ = process.communicate(timeout=1800)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in output, output
    return work / f"vae_{name}"


def rows(run: Path) -> list[dict]:
    return RunDirectory(run).metrics()


def check_run(run: Path, num_steps: int, name: str) -> VideoVAE:
    """Both phases ran, the loss was finite, and the run holds its VAE with the statistics that were measured on it."""
    found = rows(run)
    assert [row["step"] for row in found] == list(range(1, num_steps + 1))
    assert any("discriminator_loss" in row for row in found) and any("adversarial" in row for row in found)
    vae = models.load(run)
    assert isinstance(vae, VideoVAE) and vae.spec_name == name
    assert read_statistics(run).statistics.hash == vae.latent_statistics.hash
    assert json.loads((run / "diagnostics.jsonl").read_text())["step"] == num_steps
    return vae


def test_ltx_trains_and_its_export_decodes_the_same_frames_in_diffusers(work: Path, tmp_path: Path) -> None:
    run = train(work, "ltx", "trainer.max_steps=5", *GAN)
    vae = check_run(run, 5, "vae/ltx")
    (tmp_path / "export.yaml").write_text(json.dumps({"kind": "export", "run": str(run), "output": str(tmp_path / "vae")}))
    command = [sys.executable, "-m", "videofm", "export", str(tmp_path / "export.yaml"), "--run-dir", str(tmp_path / "run")]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, timeout=1800)
    theirs = AutoencoderKLLTXVideo.from_pretrained(tmp_path / "vae", local_files_only=True).eval()
    latents, sigma = torch.randn(1, 16, 3, 8, 8), torch.tensor([0.05])
    with torch.no_grad():
        torch.testing.assert_close(theirs.decode(latents, sigma).sample, vae.decode(latents, sigma), rtol=0, atol=1e-5)


def test_cv_vae_stays_compatible_with_the_image_vae_that_it_grew_from(work: Path, image_vae: Path) -> None:
    """The frozen image decoder reads the video latents: PSNR on frames 0, 4, 8 within 3 dB of the image VAE's own."""
    sources = [f"models.vae.inflate_from={image_vae}", f"models.image_vae.path={image_vae}"]
    run = train(work, "cv_vae", "trainer.max_steps=8", *GAN, *sources)
    vae, image = check_run(run, 8, "vae/cv_vae"), models.load(image_vae)
    records = Manifest.load(work / "data").records("held_out")
    config = RunDirectory(run).config["data"] | {"split": "held_out", "micro_batch_size": len(records), "image_share": 0.0}
    config["image_micro_batch_size"] = None
    video = next(StepLoader(DataConfig.model_validate(config), seed=0).first_clips()).to("cpu").video
    frames = video[:, :, ::4]
    with torch.no_grad():
        own = psnr(image.decode(image.encode(frames).mode()).clamp(-1, 1), frames).mean()
        through = psnr(image.decode(vae.encode(video).mode()).clamp(-1, 1), frames).mean()
    assert own > 12, "the image VAE must have learned something"
    assert through > own - 3


def test_od_vae_and_step_video_train(work: Path, image_vae: Path) -> None:
    run = train(work, "od_vae", "trainer.max_steps=5", *GAN, f"models.vae.inflate_from={image_vae}")
    check_run(run, 5, "vae/od_vae")
    turns = ["discriminator_loss" in row for row in rows(run)]
    assert turns == [False, False, True, False, True], "generator and discriminator take turns from step 2 on"
    run = train(work, "step_video", "trainer.max_steps=4", *GAN)
    check_run(run, 4, "vae/step_video")


def test_killed_in_the_gan_phase_it_resumes_bitwise(work: Path) -> None:
    """SIGKILL after step 4 and the same command again: the rows, both phases', are those of a run that was left alone."""
    straight = rows(work / "vae_ltx")
    again = work / "again"
    again.mkdir()
    (again / "data").symlink_to(work / "data")
    process = start(again, "ltx", "trainer.max_steps=5", *GAN)
    deadline = time.monotonic() + 600
    try:
        while len(rows(again / "vae_ltx")) < 4:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
    process.communicate(timeout=60)
    run = train(again, "ltx", "trainer.max_steps=5", *GAN)
    timings = {*TIMINGS, "slowest_rank", "slowest_rank_id", "attempt", "checkpoint_stall"}

    def numbers(found: list[dict]) -> list[dict]:
        return [{name: value for name, value in row.items() if name not in timings} for row in found]

    assert numbers(rows(run)) == numbers(straight)
