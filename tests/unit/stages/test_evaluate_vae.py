"""Metrics of video VAEs on stored clips: numbers against an independent path, the way of decoding, files, and refusals."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.demo_shards import write_demo_shards
from videofm import media, models
from videofm.cli import main
from videofm.config import EvaluateConfig
from videofm.data.manifest import Manifest
from videofm.data.shards import read_clip
from videofm.errors import CheckpointError, ConfigError, DataError
from videofm.lineage import outside_inputs
from videofm.models.vae.statistics import apply_statistics, read_statistics
from videofm.models.vae.tiling import Tiles, encode_tiled
from videofm.parallel.rng import keyed_generator
from videofm.progress import LOG
from videofm.run_dir import RunDirectory
from videofm.stages import evaluate

SIZE = {"num_frames": 9, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, a tiny VAE of each kind that is measured here, and perceptual networks with random weights."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_demo_shards(folder / "clips", num_clips=6, num_shards=1, num_frames=9, held_out=3)
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "vae": ("vae/ltx", {}),
        "causal": ("vae/ltx", {"decoder_causal": True}),
        "noisy": ("vae/ltx", {"timestep_conditioning": True, "inject_noise": (True, True, True)}),
        "four": ("vae/ltx", {"latent_channels": 4}),
        "image": ("vae/image_kl", {}),
        "dit": ("dit/ltx", {"num_layers": 1}),
    }
    for seed, (name, (model, overrides)) in enumerate(kinds.items()):
        models.save(random_model(model, seed, **overrides), folder / name)
    models.save_public(models.load(folder / "image"), folder / "diffusers")
    for seed, name in enumerate(("lpips", "i3d")):
        torch.manual_seed(seed)
        network = models.build(f"perceptual/{name}", "tiny")
        for parameter in network.parameters():
            parameter.mul_(2)  # torch's own start lets what a clip shows fade from layer to layer
        save_file(network.state_dict(), folder / f"{name}.safetensors")
    return folder


def random_model(name: str, seed: int, **overrides: Any) -> torch.nn.Module:
    """A tiny model none of whose weights is zero, so that every path counts."""
    torch.manual_seed(seed)
    model = models.build(name, "tiny", **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        if name == "vae/ltx":
            model.last_layer.mul_(8)  # some pixels leave [-1, 1]
    return model


def measure(folder: Path, tmp_path: Path, seed: int = 0, **fields: Any) -> dict[str, Any]:
    """The result of one metric; `run` and other models by their names in `folder`."""
    return evaluate.run(config(folder, seed=seed, **fields), directory(tmp_path))["metrics"][0]


def config(folder: Path, *others: dict[str, Any], seed: int = 0, **fields: Any) -> EvaluateConfig:
    defaults = {"kind": "reconstruction", "run": "vae", "manifest": "clips", **SIZE}
    metrics = []
    for each in (fields, *others):
        metric = defaults | each
        paths = {key: str(folder / metric[key]) for key in ("run", "manifest", "image_vae") if key in metric}
        weights = {key: str(folder / f"{metric[key]}.safetensors") for key in ("lpips_weights", "i3d_weights") if key in metric}
        metrics.append(metric | paths | weights)
    return EvaluateConfig.model_validate({"kind": "evaluate", "metrics": metrics, "seed": seed})


def directory(path: Path) -> RunDirectory:
    path.mkdir(parents=True, exist_ok=True)
    return RunDirectory(path)


def held_out(folder: Path, tmp_path: Path) -> Tensor:
    """The held-out clips `(3, 3, 9, 32, 32)` in [-1, 1], read without the loader."""
    clips = []
    for record in Manifest.load(folder / "clips").records("held_out"):
        (tmp_path / "clip.mp4").write_bytes(read_clip(folder / "clips", record))
        clips.append(media.read_video(tmp_path / "clip.mp4"))
    frames = torch.from_numpy(np.stack(clips)).float() / 127.5 - 1  # (B, T, H, W, 3)
    return frames.permute(0, 4, 1, 2, 3)


def decibels(a: Tensor, b: Tensor) -> float:
    """10 log10(2^2 / mse)."""
    return 10 * math.log10(4 / float((a.double() - b.double()).square().mean()))


def test_one_clip_recomputed(folder: Path, tmp_path: Path) -> None:
    """Of the one clip that is measured: PSNR from its error, LPIPS frame by frame, and means of curves."""
    found = measure(folder, tmp_path / "run", num_clips=1, lpips_weights="lpips", lpips_size="tiny")
    vae = models.load(folder / "vae")
    lpips = models.build("perceptual/lpips", "tiny", weights=str(folder / "lpips.safetensors"))
    candidates = []
    with torch.no_grad():
        for clip in held_out(folder, tmp_path).split(1):
            output = vae.decode(vae.encode(clip).mode()).clamp(-1, 1)
            distances = [float(lpips(output[:, :, [t]], clip[:, :, [t]])) for t in range(9)]
            curve = [decibels(output[:, :, t], clip[:, :, t]) for t in range(9)]
            candidates.append((decibels(output, clip), curve, distances))
    psnr, curve, distances = min(candidates, key=lambda candidate: abs(candidate[0] - found["psnr"]))
    assert found["num_clips"] == 1
    assert found["psnr"] == found["psnr_min"] == pytest.approx(psnr, abs=1e-3)
    assert found["psnr_std"] == 0
    assert found["per_frame"]["psnr"] == pytest.approx(curve, abs=1e-3)
    assert found["per_frame"]["lpips"] == pytest.approx(distances, rel=1e-3)
    assert found["lpips"] == pytest.approx(sum(distances) / 9, rel=1e-3)
    assert found["ssim"] == pytest.approx(sum(found["per_frame"]["ssim"]) / 9, rel=1e-5)
    assert max(distances) > 1.01 * min(distances), "frames differ, or the order of the curve is not tested"


def test_all_clips_in_any_batches(folder: Path, tmp_path: Path) -> None:
    """Statistics over three clips, of which batches of 2 and 1 are the same; the columns of the table are there."""
    found = measure(folder, tmp_path / "run")
    vae, video = models.load(folder / "vae"), held_out(folder, tmp_path)
    with torch.no_grad():
        output = vae.decode(vae.encode(video).mode())
    assert output.abs().max() > 1.1, "clipping is not tested"
    output = output.clamp(-1, 1)
    values = [decibels(*pair) for pair in zip(output, video, strict=True)]
    assert found["psnr"] == pytest.approx(np.mean(values), abs=1e-3)
    assert found["psnr_std"] == pytest.approx(np.std(values), abs=1e-3)
    assert found["psnr_min"] == pytest.approx(min(values), abs=1e-3)
    assert found["model"] == "vae/ltx"
    assert found["num_parameters"] == sum(parameter.numel() for parameter in vae.parameters())
    assert found["compression"] == [4, 8, 8]
    assert found["latent_channels"] == 16
    assert not {"lpips", "rfvd"} & found.keys()
    batched = measure(folder, tmp_path / "batched", batch_size=2)
    assert batched["per_frame"]["psnr"] == pytest.approx(found["per_frame"]["psnr"], abs=1e-4)
    sheets = [np.asarray(Image.open(tmp_path / name / "originals_vs_reconstructions.png"), int) for name in ("run", "batched")]
    assert np.abs(sheets[0] - sheets[1]).max() <= 1  # the same clips in the same order


def test_rfvd_recomputed_and_networks_built_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace of (A B)^1/2 from the eigenvalues of A B; two metrics with one file share one network."""
    built = []
    build = models.build
    monkeypatch.setattr(models, "build", lambda *a, **k: built.append(a[0]) or build(*a, **k))
    fields = {"i3d_weights": "i3d", "i3d_size": "tiny", "lpips_weights": "lpips", "lpips_size": "tiny"}
    found, _ = evaluate.run(config(folder, fields, **fields), directory(tmp_path / "run"))["metrics"]
    assert sorted(built) == ["perceptual/i3d", "perceptual/lpips"]
    vae, video = models.load(folder / "vae"), held_out(folder, tmp_path)
    i3d = build("perceptual/i3d", "tiny", weights=str(folder / "i3d.safetensors"))
    with torch.no_grad():
        output = vae.decode(vae.encode(video).mode()).clamp(-1, 1)
        a, b = (i3d(clips).double().numpy() for clips in (video, output))
    root = np.sqrt(np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real.clip(0)).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * root
    assert found["rfvd"] == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-3 * np.square(a).sum(1).mean(), "features do not see the clips"
    assert found["rfvd_num_features"] == 16


def test_a_conditioned_decoder_is_told_no_noise(folder: Path, tmp_path: Path) -> None:
    """sigma 0, and the injected noise of the seed: another seed or another sigma has another PSNR."""
    found = measure(folder, tmp_path / "run", seed=3, run="noisy")
    assert measure(folder, tmp_path / "again", seed=3, run="noisy", batch_size=1)["psnr"] == pytest.approx(
        found["psnr"], abs=1e-4
    )
    vae, video = models.load(folder / "noisy"), held_out(folder, tmp_path)

    def psnr(sigma: float, seed: int) -> float:
        with torch.no_grad():
            latents, level = vae.encode(video).mode(), torch.full((3,), sigma)
            output = vae.decode(latents, level, keyed_generator(seed, "decoder_noise")).clamp(-1, 1)
        return float(np.mean([decibels(*pair) for pair in zip(output, video, strict=True)]))

    assert found["psnr"] == pytest.approx(psnr(0.0, 3), abs=1e-4)
    assert abs(found["psnr"] - psnr(0.5, 3)) > 1e-3
    assert abs(found["psnr"] - psnr(0.0, 4)) > 1e-3


def test_streaming_gives_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    whole, streamed = (measure(folder, tmp_path / str(way), run="causal", streaming=way) for way in (False, True))
    assert (whole["mode"], streamed["mode"]) == ("whole", "streaming")
    assert streamed["per_frame"]["psnr"] == pytest.approx(whole["per_frame"]["psnr"], abs=1e-4)
    with pytest.raises(ConfigError, match="the decoder of this vae/ltx looks at later frames, so it cannot stream exactly"):
        measure(folder, tmp_path / "refused", run="vae", streaming=True)


def test_a_stream_goes_by_the_chunks_of_the_vae(folder: Path, tmp_path: Path) -> None:
    """vae/step_video takes 17 frames at a time, twice the 8 that it compresses into one and one more."""
    models.save(random_model("vae/step_video", 0, blend_seams=False), tmp_path / "step")
    write_demo_shards(tmp_path / "long", num_clips=1, num_shards=1, num_frames=34, held_out=1)
    fields = {"run": str(tmp_path / "step"), "manifest": str(tmp_path / "long"), "num_frames": 34}
    whole, streamed = (measure(folder, tmp_path / str(way), streaming=way, **fields) for way in (False, True))
    assert len(streamed["per_frame"]["psnr"]) == 34
    assert streamed["per_frame"]["psnr"] == pytest.approx(whole["per_frame"]["psnr"], abs=1e-4)


def test_tiles_and_their_seams(folder: Path, tmp_path: Path) -> None:
    """One tile gives the numbers of no tiling and no seam; four give others, and errors that are those of the first clip."""
    whole = measure(folder, tmp_path / "whole")
    one = measure(folder, tmp_path / "one", tiles={"height": 32, "width": 32, "overlap": 8})
    assert one["per_frame"] == whole["per_frame"]
    assert one["seam_error"]["video"]["max"] == one["seam_error"]["latents"]["max"] == 0
    four = measure(folder, tmp_path / "four", tiles={"height": 24, "width": 24, "overlap": 16})
    assert four["mode"] == "tiles"
    assert four["psnr"] != whole["psnr"]
    tiles = Tiles(24, 24, 16, 16)
    vae, first = models.load(folder / "vae"), held_out(folder, tmp_path)[:1]
    with torch.no_grad():
        latents = vae.encode(first).mode()
        difference = (encode_tiled(vae, first, tiles).mode() - latents).abs()
    assert max(four["seam_error"]["latents"][key] for key in ("max", "max_elsewhere")) == pytest.approx(float(difference.max()))
    unmeasured = measure(folder, tmp_path / "off", tiles={"height": 24, "width": 24, "overlap": 16, "seam_error": False})
    assert unmeasured["psnr"] == four["psnr"]
    assert "seam_error" not in unmeasured
    with pytest.raises(ConfigError, match="tiles have a height of 20"):
        measure(folder, tmp_path / "refused", tiles={"height": 20, "width": 24, "overlap": 8})


def test_latents_and_their_statistics(folder: Path, tmp_path: Path) -> None:
    """The file holds mean and std of each channel over the held-out clips, and is accepted as this VAE's."""
    found = measure(folder, tmp_path / "run", kind="latent_diagnostics", split="held_out")
    vae, video = models.load(folder / "vae"), held_out(folder, tmp_path)
    with torch.no_grad():
        std, mean = torch.std_mean(vae.encode(video).mode().double(), dim=(0, 2, 3, 4), correction=0)
    file = tmp_path / "run" / found["statistics"]
    assert file.name == "latent_statistics.json"
    stored = read_statistics(file)
    assert stored.num_clips == found["num_clips"] == 3
    torch.testing.assert_close(stored.statistics.mean.double(), mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stored.statistics.std.double(), std, rtol=1e-4, atol=1e-6)
    assert apply_statistics(vae, file).hash == found["statistics_hash"]
    with pytest.raises(DataError, match="it was trained on, or is another one"):
        apply_statistics(random_model("vae/ltx", 99), file)


def test_alarms_are_told(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder whose means are a thousandth of the others' has no active channel."""
    vae = models.load(folder / "vae")
    with torch.no_grad():
        vae.encoder.conv_out.weight[:-1] *= 1e-3
    models.save(vae, tmp_path / "collapsed")
    # Handlers of its own, as after setup_logging nothing reaches those of the root logger.
    monkeypatch.setattr(LOG, "handlers", [caplog.handler])
    monkeypatch.setattr(LOG, "propagate", False)
    found = measure(folder, tmp_path / "run", kind="latent_diagnostics", run=str(tmp_path / "collapsed"))
    assert any("0 of 16 channels are active" in alarm for alarm in found["alarms"])
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == [f"latents of {tmp_path / 'collapsed'}: {alarm}" for alarm in found["alarms"]]


def test_image_compatibility_recomputed(folder: Path, tmp_path: Path) -> None:
    """Frames 0, 4 and 8 through both; the image VAE as our folder and as a diffusers folder."""
    found = measure(folder, tmp_path / "run", kind="image_compatibility", run="four", image_vae="image")
    vae, image_vae = models.load(folder / "four"), models.load(folder / "image")
    video = held_out(folder, tmp_path)
    frames = video[:, :, [0, 4, 8]]
    with torch.no_grad():
        own = image_vae.decode(image_vae.encode(frames).mode()).clamp(-1, 1)
        crossed = image_vae.decode(vae.encode(video).mode()).clamp(-1, 1)
    assert found["psnr_image_vae"] == pytest.approx(
        np.mean([decibels(*pair) for pair in zip(own, frames, strict=True)]), abs=1e-3
    )
    expected = np.mean([decibels(*pair) for pair in zip(crossed, frames, strict=True)])
    assert found["psnr_video_latents"] == pytest.approx(expected, abs=1e-3)
    assert len(found["mean_difference"]) == 4
    assert (tmp_path / "run" / found["sheet"]).name == "originals_vs_image_vae_vs_video_latents.png"
    assert (tmp_path / "run" / found["sheet"]).exists()
    public = measure(folder, tmp_path / "public", kind="image_compatibility", run="four", image_vae="diffusers")
    assert public["psnr_drop"] == pytest.approx(found["psnr_drop"], abs=1e-4)


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none.safetensors does not exist. LPIPS reads one safetensors file"):
        measure(folder, tmp_path, lpips_weights="none")
    with pytest.raises(CheckpointError, match="I3D reads one safetensors file in the layout"):
        measure(folder, tmp_path, i3d_weights="lpips", i3d_size="tiny")
    with pytest.raises(DataError, match="rFVD|covariance needs at least 2 clips"):
        measure(folder, tmp_path, i3d_weights="i3d", i3d_size="tiny", num_clips=1)
    with pytest.raises(DataError, match=r"video has 8 frames; this VAE takes 1 \+ 4 \* n"):
        measure(folder, tmp_path, num_frames=8)
    with pytest.raises(ConfigError, match="holds dit/ltx, which is no video VAE"):
        measure(folder, tmp_path, run="dit")
    with pytest.raises(CheckpointError, match="image_vae = '.*nowhere' does not exist"):
        measure(folder, tmp_path, kind="image_compatibility", image_vae="nowhere")
    with pytest.raises(ConfigError, match="of the video VAE have 16 channels at 1/8 x 1/8, those of the image VAE 4 channels"):
        measure(folder, tmp_path, kind="image_compatibility", image_vae="image")
    with pytest.raises(ValueError, match="either `tiles` or `streaming`"):
        config(folder, streaming=True, tiles={"height": 16, "width": 16, "overlap": 8})


def test_files_that_are_read_are_part_of_the_run(folder: Path) -> None:
    """Other weights under the same name make another evaluation: they are in the lineage, by content."""
    weights = {"lpips_weights": "lpips", "lpips_size": "tiny", "i3d_weights": "i3d", "i3d_size": "tiny"}
    compatibility = {"kind": "image_compatibility", "run": "four", "image_vae": "image"}
    read = {name.split(":")[0] for name in outside_inputs(config(folder, compatibility, **weights))}
    assert {"metrics.0.lpips_weights", "metrics.0.i3d_weights", "metrics.1.image_vae", "metrics.1.run"} <= read


def test_the_verb_ends_with_a_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON on stdout; behind it, on stderr, one row for each reconstruction. Files of a kind are numbered."""
    wanted = config(folder, {"run": "causal", "streaming": True}, {"kind": "latent_diagnostics"}, num_clips=2)
    (tmp_path / "evaluate.yaml").write_text(wanted.model_dump_json())
    assert main(["evaluate", str(tmp_path / "evaluate.yaml"), "--run-dir", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr()
    metrics = json.loads(printed.out)["results"]["metrics"]
    assert metrics == json.loads((tmp_path / "run" / "evaluation.json").read_text())["metrics"]
    assert [metric.get("sheet") for metric in metrics[:2]] == [f"originals_vs_reconstructions{n}.png" for n in ("", "_2")]
    head, first, second = (line.split() for line in printed.err.splitlines()[-3:])
    assert head == ["model", "run", "params", "compression", "channels", "PSNR", "SSIM", "LPIPS", "rFVD", "clips"]
    psnr, ssim = f"{metrics[0]['psnr']:.2f}", f"{metrics[0]['ssim']:.4f}"
    params = f"{metrics[0]['num_parameters'] / 1e6:.1f}M"
    assert first == ["vae/ltx", str(folder / "vae"), params, "4x8x8", "16", psnr, ssim, "-", "-", "2", "of", "9x32x32"]
    assert second[1:3] == [str(folder / "causal"), "(streaming)"]
