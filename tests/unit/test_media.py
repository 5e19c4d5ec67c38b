"""Videos survive writing, sheets show what they should, and what cannot be written is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from videofm import media
from videofm.errors import DataError


def smooth(num_frames: int = 6, height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray:
    """A gradient that moves: what video compression is made for."""
    t, y, x = np.meshgrid(np.arange(num_frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin((x + 3 * t + seed) / 9), np.cos(y / 7 + t / 5), np.sin((x + y) / 11 + seed)]
    return (127 + 90 * np.stack(waves, axis=-1)).astype(np.uint8)


def test_a_video_is_read_back_nearly_as_it_was(tmp_path: Path) -> None:
    frames = smooth()
    media.write_video(tmp_path / "deep" / "a.mp4", frames, 24.0)
    read = media.read_video(tmp_path / "deep" / "a.mp4")
    assert read.shape == frames.shape
    assert read.dtype == np.uint8
    assert np.abs(read.astype(int) - frames).mean() < 4  # colour is stored at half the resolution
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.mp4"]


def test_the_same_frames_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        media.write_video(tmp_path / name, smooth(), 25)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_to_frames_maps_the_range_and_clips() -> None:
    video = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 5, 1, 1).expand(3, 5, 2, 2)
    assert media.to_frames(video)[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
    assert media.to_frames(video).shape == (5, 2, 2, 3)


def test_contact_sheet_shows_frames_enlarged(tmp_path: Path) -> None:
    """Five frames of 32x32 at three times their size, in three columns: wider than 3 * 5 * 96, with two rows of strips."""
    red = np.zeros((7, 32, 32, 3), np.uint8)
    red[..., 0] = 255
    media.contact_sheet([red] * 4, ["a red nothing", "", "x" * 500, "ünïcode 日本"], tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[1] >= 3 * 5 * 96
    assert (sheet == [255, 0, 0]).all(axis=2).sum() == 4 * 5 * 96 * 96


def test_comparison_sheet_has_both(tmp_path: Path) -> None:
    black, white = np.zeros((5, 200, 120, 3), np.uint8), np.full((5, 200, 120, 3), 255, np.uint8)
    media.comparison_sheet([black] * 3, [white] * 3, ["a", "b", "c"], tmp_path / "sheet.png", frames_per_video=2)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (sheet == 0).all(axis=2).sum() == (sheet == 255).all(axis=2).sum() == 3 * 2 * 192 * 115


def test_a_stack_has_any_number_of_strips(tmp_path: Path) -> None:
    """Three strips of two frames of 16x16 pixels, each pixel drawn as 6x6."""
    red, green, blue = (np.full((2, 16, 16, 3), np.eye(3, dtype=np.uint8)[channel] * 255) for channel in range(3))
    media.stacked_sheet([[red, green, blue]], ["a"], tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    for colour in (red, green, blue):
        assert (sheet == colour[0, 0, 0]).all(axis=2).sum() == 2 * 96 * 96


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"uint8 frames \(T, H, W, 3\), not float64"):
        media.write_video(tmp_path / "a.mp4", np.zeros((2, 8, 8, 3)), 25)
    with pytest.raises(DataError, match="cannot write 7x8 frames .* even sides"):
        media.write_video(tmp_path / "a.mp4", np.zeros((2, 7, 8, 3), np.uint8), 25)
    with pytest.raises(DataError, match="missing.mp4 cannot be read as a video"):
        media.read_video(tmp_path / "missing.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(DataError, match="text.mp4 cannot be read as a video"):
        media.read_video(tmp_path / "text.mp4")
    with pytest.raises(DataError, match="needs videos and a caption for each: got 0 and 0"):
        media.contact_sheet([], [], tmp_path / "s.png")
    with pytest.raises(DataError, match="needs stacks of videos and a caption for each: got 1 and 0"):
        media.stacked_sheet([[smooth()]], [], tmp_path / "s.png")
    with pytest.raises(DataError, match="got 1 originals, 0 reconstructions, 1 captions"):
        media.comparison_sheet([smooth()], [], ["a"], tmp_path / "s.png")


def test_equal_frames_give_equal_bytes(tmp_path: Path) -> None:
    """With x264's mbtree 1 to 3 of 60 tiny videos differed from the others."""
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    written = set()
    for _ in range(60):
        media.write_video(tmp_path / "video.mp4", frames, 25)
        written.add((tmp_path / "video.mp4").read_bytes())
    assert len(written) == 1


def test_a_video_written_in_pieces_is_the_one_written_at_once(tmp_path: Path) -> None:
    """To the byte, whatever the pieces; until the context ends nobody sees a file of that name."""
    frames = smooth(num_frames=11)
    media.write_video(tmp_path / "whole.mp4", frames, 25)
    with media.VideoWriter(tmp_path / "pieces.mp4", 25) as writer:
        for piece in (frames[:1], frames[1:7], frames[7:]):
            writer.write(piece)
            assert not (tmp_path / "pieces.mp4").exists()
    assert (tmp_path / "pieces.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    media.write_video(tmp_path / "a.mp4", smooth(), 25)
    before = (tmp_path / "a.mp4").read_bytes()

    def write(*pieces: np.ndarray) -> None:
        with media.VideoWriter(tmp_path / "a.mp4", 25) as writer:
            for piece in pieces:
                writer.write(piece)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(smooth(seed=1))
    with pytest.raises(DataError, match="frames of 16x48 cannot follow frames of 32x48: a video has one size"):
        write(smooth(), smooth(height=16))
    with pytest.raises(DataError, match="no frame was written to .*b.mp4"), media.VideoWriter(tmp_path / "b.mp4", 25):
        pass
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.mp4", before)]


def test_frames_spread_over_a_file_are_those_of_all(tmp_path: Path) -> None:
    """Of 11 frames five are 0, 2.5 -> 2, 5, 7.5 -> 8 and 10 (halves to even); of 3 frames all."""
    media.write_video(tmp_path / "a.mp4", smooth(num_frames=11), 25)
    assert np.array_equal(media.spread_frames(tmp_path / "a.mp4", 5), media.read_video(tmp_path / "a.mp4")[[0, 2, 5, 8, 10]])
    media.write_video(tmp_path / "b.mp4", smooth(num_frames=3), 25)
    assert np.array_equal(media.spread_frames(tmp_path / "b.mp4", 5), media.read_video(tmp_path / "b.mp4"))
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(DataError, match="text.mp4 cannot be read as a video"):
        media.spread_frames(tmp_path / "text.mp4", 5)


def test_spread_frames_are_no_larger_than_a_sheet_shows_them(tmp_path: Path) -> None:
    """400 x 600 pixels become 192 x 288, and the sheet of them is that of the whole frames."""
    media.write_video(tmp_path / "a.mp4", smooth(num_frames=5, height=400, width=600), 25)
    found = media.spread_frames(tmp_path / "a.mp4", 3)
    assert found.shape == (3, 192, 288, 3)
    whole = media.read_video(tmp_path / "a.mp4")[[0, 2, 4]]
    for name, frames in (("found", found), ("whole", whole)):
        media.contact_sheet([frames], ["a"], tmp_path / f"{name}.png", 3)
    assert (tmp_path / "found.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    """Of the same file, whatever its name; that of others stays."""
    for name in (".a[0].mp4.tmp-1", ".a[0].mp4.tmp-22", ".a0.mp4.tmp-1", ".b.mp4.tmp-1"):
        (tmp_path / name).write_bytes(b"half")
    media.write_video(tmp_path / "a[0].mp4", smooth(), 25)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a0.mp4.tmp-1", ".b.mp4.tmp-1", "a[0].mp4"]


def test_a_file_that_ends_before_its_index_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    media.write_video(tmp_path / "a.mp4", smooth(num_frames=4), 25)
    monkeypatch.setattr(media, "_spread", lambda length, count: [0, length + 3])
    with pytest.raises(DataError, match="a.mp4 has 4 frames by its index, but 1 of 2 were decoded"):
        media.spread_frames(tmp_path / "a.mp4", 2)
