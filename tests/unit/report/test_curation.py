"""The page about a curation: every reason with its count and pictures, all text escaped, small, and the same each time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.unit.report.test_curation_data import CONFIG, a_loss, funnel_of, write_dataset, write_losses
from videofm.config import DemoDataConfig
from videofm.errors import DataError
from videofm.report import curation_data
from videofm.report.page import build
from videofm.run_dir import RunDirectory, write_json

EVIL = "<script>alert('x')</script>\"&"


class FakePictures:
    """Pictures of a fixed size, and what was asked for."""

    def __init__(self, num_bytes: int = 3) -> None:
        self.content, self.asked = b"\xff" * num_bytes, list[Any]()

    def of_source(self, name: str, start: int | None, stop: int | None, span: tuple[float, float] | None) -> bytes:
        self.asked.append((name, start, stop, span))
        if name.startswith("gone"):
            raise DataError("the source is gone")
        return self.content

    def of_clip(self, video: bytes, num_frames: int) -> list[bytes]:
        assert video == b"no video"
        return [self.content] * num_frames

    @contextmanager
    def open(self, source: str) -> Iterator[FakePictures]:
        self.source = source
        yield self


def a_run(path: Path, funnel: list[dict[str, Any]], config: dict[str, Any] | None = None) -> Path:
    run = RunDirectory.create(path, DemoDataConfig(kind="demo_data"))
    write_json(run.path / "config.yaml", {"kind": "curate", "source": "/raw", **(config or CONFIG)})
    write_json(path / "funnel.json", {"funnel": funnel, "num_sources": 20, "manifest_hash": "abc", "num_clips": {"train": 12}})
    return path


def page_of(path: Path, pictures: FakePictures | None) -> str:
    return build(path, writing=path, open_pictures=pictures.open if pictures else None)


def test_each_reason_has_its_count_its_share_and_its_pictures(tmp_path: Path) -> None:
    """8 of 20 clips were refused by the filter for two reasons; one source is gone; a crash is not tried again."""
    funnel = [
        {"stage": "probe", "num_in": 3, "num_out": 2, "num_made": 20, "quarantined": {"crash": 1}, "latency_p50": 0.25},
        *funnel_of(static=6, dark=2),
    ]
    path = a_run(tmp_path / "run", funnel)
    write_dataset(path)
    losses = [a_loss(i) for i in range(6)] + [a_loss(i, "dark", source=f"gone-{i}.mp4") for i in range(2)]
    write_losses(path, losses)
    crash = {"kind": "quarantined", "stage": "probe", "source": "bad.mp4", "reason": "crash", "detail": "killed by SIGSEGV"}
    write_losses(path, [crash], "quarantine.jsonl")
    pictures = FakePictures()
    page = page_of(path, pictures)
    assert pictures.source == "/raw"
    assert "<h4>static <span" in page and "dropped by filter, 6 of 20 (30 %)" in page
    assert "dropped by filter, 2 of 20 (10 %)" in page and "quarantined by probe, 1 of 3 (33.3 %)" in page
    assert page.index("<h4>crash") < page.index("<h4>static") < page.index("<h4>dark")
    assert [asked[0] for asked in pictures.asked] == [*(f"{i:04d}.mp4" for i in range(6)), "gone-0.mp4", "gone-1.mp4"]
    assert pictures.asked[1] == ("0001.mp4", 10, 20, None)
    assert page.count("the source is gone") == 2
    assert "crash: no picture was tried" in page and "killed by SIGSEGV" in page
    assert page.count("data:image/jpeg;base64,") == 6 + 12 * 4
    assert "kept clips: 12 drawn by hash" in page and "motion <b>0.333</b>" in page
    assert "filter: min 0.3</span>" in page
    assert '<th class="n">p50 s</th>' in page and "p95" not in page
    assert "1 broken, set aside" in page and "<code>abc</code>" in page and "12 train" in page


def test_a_second_writing_gives_the_same_page(tmp_path: Path) -> None:
    path = a_run(tmp_path / "run", funnel_of(static=40))
    write_dataset(path)
    write_losses(path, [a_loss(i, scores={"motion": 0.1}) for i in range(40)])
    first, second = (re.sub("<footer>.*</footer>", "", page_of(path, FakePictures())) for _ in range(2))
    assert first == second
    assert "filter, 40 of 52 (76.9 %), 12 shown" in first


def test_every_text_is_escaped(tmp_path: Path) -> None:
    funnel = [{"stage": EVIL, "num_in": 3, "num_out": 1, "num_made": 1, "dropped": {EVIL: 2}}]
    path = a_run(tmp_path / "run", funnel)
    named = dict.fromkeys(("stage", "source", "reason", "detail", "start", "span"), EVIL)
    loss = {"kind": "dropped", **named, "scores": {EVIL: 1.0}}
    write_losses(path, [loss, {**loss, "kind": "quarantined"}], "quarantine.jsonl")
    page = page_of(path, FakePictures())
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 8


def test_the_page_stays_small_whatever_was_refused(tmp_path: Path) -> None:
    """40 reasons, long details, 24 kept clips, 5,000 broken files, pictures of the largest size: below 3 MB."""
    reasons = {f"reason_{number}": 30 for number in range(40)}
    path = a_run(tmp_path / "run", funnel_of(**reasons))
    write_dataset(path, num_shards=8)
    scores = {f"score_{number}": float(number) for number in range(20)}
    losses = [a_loss(i, f"reason_{i % 40}", detail="why " * 500, scores=scores) for i in range(1200)]
    write_losses(path, losses)
    why = {"kind": "errors", "stage": "probe", "reason": "odd", "detail": "x" * 400}
    broken = [{**why, "source": f"{i}" * 90} for i in range(5000)]
    write_losses(path, broken, "quarantine.jsonl")
    pictures = FakePictures(num_bytes=8 << 10)
    page = page_of(path, pictures)
    assert len(page.encode()) < 3_000_000
    assert len(pictures.asked) <= curation_data.MAX_ALL_LOST
    assert page.count("data:image/jpeg;base64,") > 40 * 3 + 24 * 4 - 1


def test_a_sampled_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = a_run(tmp_path / "run", funnel_of(static=3))
    write_dataset(path)
    write_losses(path, [a_loss(i) for i in range(3)])
    assert "Below the funnel" not in page_of(path, None)
    monkeypatch.setattr(curation_data, "MAX_SHARDS", 2)
    monkeypatch.setattr(curation_data, "MAX_LIST_BYTES", 100)
    page = page_of(path, None)
    assert "2 of 3 shards" in page and "evenly spaced pieces of the lists" in page


def test_damage_leaves_the_funnel(tmp_path: Path) -> None:
    path = a_run(tmp_path / "run", funnel_of(static=3))
    (path / "dropped.jsonl").write_text('{"kind": "dropped", "stage')
    page = page_of(path, FakePictures())
    assert "could not be read: Unterminated string" in page
    assert "3 static" in page


def test_a_list_of_broken_files_ends(tmp_path: Path) -> None:
    funnel = [{"stage": "probe", "num_in": 90, "num_out": 10, "num_made": 10, "quarantined": {"empty": 80}}]
    path = a_run(tmp_path / "run", funnel)
    why = {"kind": "quarantined", "stage": "probe", "reason": "empty", "detail": ""}
    lines = [{**why, "source": f"{i}.mp4"} for i in range(80)]
    write_losses(path, lines, "quarantine.jsonl")
    page = page_of(path, None)
    assert "80 broken, set aside" in page and "and 30 more in quarantine.jsonl" in page


def test_spans_are_asked_for_and_shown(tmp_path: Path) -> None:
    path = a_run(tmp_path / "run", funnel_of(static=1))
    write_losses(path, [json.loads(json.dumps(a_loss(1, span=(60.0, 120.0))))])
    pictures = FakePictures()
    assert "seconds 60 to 120" in page_of(path, pictures)
    assert pictures.asked == [("0001.mp4", 10, 20, (60.0, 120.0))]
