"""The table of reconstructions, as text and on the page, with curves of what is a number a frame or a channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from videofm.config import DemoDataConfig
from videofm.report.page import build
from videofm.report.reconstruction import as_text
from videofm.run_dir import RunDirectory, write_json

FULL: dict[str, Any] = {
    "kind": "reconstruction",
    "of": "runs/vae",
    "model": "vae/ltx",
    "num_parameters": 419_193_649,
    "compression": [8, 32, 32],
    "latent_channels": 128,
    "psnr": 33.8444,
    "psnr_min": 31.25,
    "ssim": 0.91237,
    "lpips": 0.038,
    "rfvd": 150.94,
    "num_clips": 64,
    "clip": [17, 256, 256],
    "mode": "tiles",
    "per_frame": {"psnr": [30.0, 34.0, 36.0], "ssim": [0.9, 0.91, 0.92]},
}
PLAIN = {"kind": "reconstruction", "of": "runs/small", "psnr": 20.0, "num_clips": 2}
LATENTS = {"kind": "latent_diagnostics", "of": "runs/vae", "kl": [0.5, None, 0.25], "alarms": ["1 of 3 <channels>"]}


def page(path: Path, *metrics: dict[str, Any]) -> str:
    run = RunDirectory.create(path, DemoDataConfig(kind="demo_data"))
    run.start_attempt()
    write_json(path / "evaluation.json", {"metrics": list(metrics)})
    run.set_outcome("finished", seconds=1.0)
    return build(path)


def test_text_has_a_row_for_each_reconstruction() -> None:
    lines = as_text([LATENTS, FULL, PLAIN]).splitlines()
    assert [line.split() for line in lines] == [
        ["model", "run", "params", "compression", "channels", "PSNR", "SSIM", "LPIPS", "rFVD", "clips"],
        [
            "vae/ltx",
            "runs/vae",
            "(tiles)",
            "419.2M",
            "8x32x32",
            "128",
            "33.84",
            "0.9124",
            "0.0380",
            "150.9",
            "64",
            "of",
            "17x256x256",
        ],
        ["-", "runs/small", "-", "-", "-", "20.00", "-", "-", "-", "2", "of", "-"],
    ]
    assert lines[1].index("33.84") + 5 == lines[2].index("20.00") + 5  # numbers stand below each other
    assert as_text([LATENTS]) == ""


def test_the_page_has_the_table_and_the_curves(tmp_path: Path) -> None:
    found = page(tmp_path / "run", FULL, PLAIN, LATENTS)
    for cell in ("vae/ltx", "runs/vae (tiles)", "419.2M", "8x32x32", "33.84", "0.9124", "0.0380", "150.9", "64 of 17x256x256"):
        assert f">{cell}</td>" in found, cell
    assert 'aria-label="psnr by frame"' in found
    assert "<title>frame 2: psnr 36</title>" in found
    assert 'aria-label="kl by channel"' in found
    assert "<title>channel 2: kl 0.25</title>" in found
    assert "1 of 3 &lt;channels&gt;" in found
    assert "psnr_min <b>31.25</b>" in found
    assert found.index('"psnr by frame"') < found.index('"ssim by frame"')
    assert "[30.0" not in found, "a list is a chart, not text"


@pytest.mark.parametrize(
    "broken",
    [
        {"per_frame": [1, 2]},
        {"per_frame": {"psnr": ["<b>", None]}},
        {"compression": "<b>", "clip": ["<b>"], "model": ["<b>"], "mode": "<b>"},
        {"psnr": None, "num_parameters": "<b>", "alarms": "<b>"},
    ],
)
def test_a_damaged_file_still_has_a_page(tmp_path: Path, broken: dict[str, Any]) -> None:
    found = page(tmp_path / "run", FULL | broken)
    assert ">rFVD</th>" in found
    assert "<td><b>" not in found
    assert "(<b>)" not in found
