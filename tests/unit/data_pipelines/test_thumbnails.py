"""Pictures for the report: the right frame, small, made in a child, refused with a reason."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipelines import thumbnails
from data_pipelines.rows import Row, Unusable
from data_pipelines.thumbnails import MAX_BYTES, MAX_HEIGHT, MAX_WIDTH, Thumbnails, as_jpeg, place_of, spaced_frames
from videofm import media
from videofm.data import storage
from videofm.errors import ConfigError, DataError

NUM_FRAMES = 30


def grey(frame: np.ndarray) -> int:
    """The frame's number: frame n has the level 8 n + 4."""
    return int(frame.mean()) // 8


def decoded(content: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos")
    levels = np.arange(NUM_FRAMES, dtype=np.uint8) * 8 + 4
    media.write_video(path / "a.mp4", np.broadcast_to(levels[:, None, None, None], (NUM_FRAMES, 32, 48, 3)).copy(), 10)
    (path / "bad.mp4").write_bytes(b"\x00" * 999)
    return path


def row(path: Path, **more: object) -> Row:
    return Row("id", path.name, str(path), 1, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("near", [600, -1])
@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({}, [3, 11, 18, 26]),  # the middles of the quarters of 30 frames
        ({"start": 8, "stop": 16}, [9, 11, 13, 15]),
        ({"start": 5, "stop": 7}, [5, 6]),  # fewer frames than asked for
        ({"span": (1.0, 2.0)}, [11, 13, 16, 18]),  # frames 10 to 19
        ({"start": 2, "stop": 6, "span": (1.0, 2.0)}, [12, 13, 14, 15]),
        ({"span": (0.96, 1.96)}, [11, 13, 16, 18]),  # the frame at 0.9 s is before it
        ({"span": (2.0, 3603.0)}, [21, 23, 26, 28]),  # the last span ends with the file
        ({"start": 29, "stop": 33}, [29]),  # beyond the end stands the last frame
    ],
)
def test_frames_are_the_middles_of_equal_parts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, near: int, bounds: dict, expected: list[int]
) -> None:
    """Counting frames and seeking to their times find the same ones."""
    monkeypatch.setattr(thumbnails, "_NEAR", near)
    found = [grey(frame) for frame in spaced_frames(folder / "a.mp4", row(folder / "a.mp4", **bounds), 4)]
    assert list(dict.fromkeys(found)) == expected


def test_a_picture_fits_and_keeps_its_shape() -> None:
    """Noise is the worst for JPEG; a small frame is not made larger."""
    noise = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), dtype=np.uint8)
    content = as_jpeg(noise)
    assert len(content) <= MAX_BYTES
    assert decoded(content).shape[:2] == (round(720 * MAX_WIDTH / 1280), MAX_WIDTH)
    assert decoded(as_jpeg(noise[:, :100])).shape[0] == MAX_HEIGHT
    assert decoded(as_jpeg(noise[:20, :30])).shape == (20, 30, 3)


def test_colours_are_not_swapped() -> None:
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 255
    blue, green, found = decoded(as_jpeg(red)).reshape(-1, 3).mean(0)
    assert found > 240 and max(blue, green) < 15


def test_no_quality_is_small_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thumbnails, "MAX_BYTES", 10)
    with pytest.raises(Unusable, match="no JPEG of 32x32 pixels has at most 10 bytes"):
        as_jpeg(np.zeros((32, 32, 3), np.uint8))


def test_pictures_are_made_in_a_child(folder: Path) -> None:
    """The middle frame of a source, four frames of a clip's bytes, and refusals that say why."""
    with Thumbnails(str(folder), timeout=120) as pictures:
        assert grey(decoded(pictures.of_source("a.mp4", None, None, None))) == 15
        assert grey(decoded(pictures.of_source("a.mp4", 20, 30, None))) == 25
        frames = pictures.of_clip((folder / "a.mp4").read_bytes(), 4)
        assert [grey(decoded(frame)) for frame in frames] == [3, 11, 18, 26]
        with pytest.raises(DataError, match="^the source is gone$"):
            pictures.of_source("gone.mp4", 0, 9, None)
        with pytest.raises(DataError, match="^no picture: not_video$"):
            pictures.of_source("bad.mp4", None, None, None)
        with pytest.raises(DataError, match="leads out of its folder"):
            pictures.of_source("../bad.mp4", None, None, None)
        pictures.seconds = 0.0
        with pytest.raises(DataError, match="no time left: all pictures have 0 s"):
            pictures.of_source("a.mp4", None, None, None)
        scratch = pictures._scratch
    assert not scratch.exists()


def test_a_child_that_hangs_costs_its_timeout(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The child's wall time is limited: a decoder that never answers is killed, and the next picture is made."""
    stub = tmp_path / "stub.py"
    stub.write_text(
        "import sys, time\n"
        "from data_pipelines import thumbnails\n"
        "real = thumbnails.spaced_frames\n"
        "def hang(path, row, num_frames):\n"
        "    if row.name == 'bad.mp4':\n"
        "        while True: time.sleep(1)\n"
        "    return real(path, row, num_frames)\n"
        "thumbnails.spaced_frames = hang\n"
        "thumbnails.main()\n"
    )
    monkeypatch.setattr(thumbnails, "COMMAND", (thumbnails.COMMAND[0], str(stub)))
    with Thumbnails(str(folder), timeout=1.5) as pictures:
        with pytest.raises(DataError, match="^no picture: timeout$"):
            pictures.of_source("bad.mp4", None, None, None)
        pictures.timeout = 120.0
        assert pictures.of_clip((folder / "a.mp4").read_bytes(), 4)


def test_a_remote_source_is_copied_if_it_is_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.put_file(folder / "a.mp4", "memory://thumbnails/a.mp4")
    with Thumbnails("memory://thumbnails", timeout=120) as pictures:
        assert grey(decoded(pictures.of_source("a.mp4", None, None, None))) == 15
        with pytest.raises(DataError, match="^the source is gone$"):
            pictures.of_source("b.mp4", None, None, None)
        monkeypatch.setattr(thumbnails, "MAX_FETCH", 99)
        with pytest.raises(DataError, match="not fetched: larger than 0 MiB"):
            pictures.of_source("a.mp4", None, None, None)
        monkeypatch.setattr(thumbnails, "MAX_FETCHED", 50)
        with pytest.raises(DataError, match="not fetched: 0 MiB of other sources were"):
            pictures.of_source("a.mp4", None, None, None)


@pytest.mark.parametrize(
    ("source", "name", "expected"),
    [
        ("/raw", "x/a.mp4", "/raw/x/a.mp4"),
        ("s3://bucket/raw", "x/a.mp4", "s3://bucket/raw/x/a.mp4"),
        ("/lists/clips.jsonl", "x/a.mp4", "/lists/x/a.mp4"),
        ("/lists/clips.jsonl", "/raw/a.mp4", "/raw/a.mp4"),
        ("/lists/clips.parquet", "https://host/a.mp4", "https://host/a.mp4"),
        ("s3://bucket/clips.jsonl", "x/a.mp4", "s3://bucket/x/a.mp4"),
        ("https://host/lists/clips.jsonl?sign=a/b", "x/a.mp4", "https://host/lists/x/a.mp4"),
        ("/lists/clips.jsonl", "file:///raw/a.mp4", "/raw/a.mp4"),
    ],
)
def test_a_source_is_found_again_by_its_name(source: str, name: str, expected: str) -> None:
    assert place_of(source, name) == expected


def test_a_name_that_is_a_command_is_refused() -> None:
    with pytest.raises(ConfigError, match="is no place for data"):
        place_of("/lists/clips.jsonl", "pipe:cat /etc/passwd")
