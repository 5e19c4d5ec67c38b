"""Images that condition a video: how they are read, how they fit, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from videofm import media
from videofm.errors import ConfigError, DataError
from videofm.sampling.images import fitted, last_frames, nearest_sizes, read_image
from videofm.types import Compression

CELLS = Compression(8, 32, 32)


def stripes(height: int, width: int) -> media.Frames:
    """The upper half is red, the lower half blue; a column of green on the left."""
    frame = np.zeros((1, height, width, 3), np.uint8)
    frame[:, : height // 2, :, 0] = 255
    frame[:, height // 2 :, :, 2] = 255
    frame[:, :, : width // 4] = (0, 255, 0)
    return frame


def test_files_are_read_as_rgb_and_turned(tmp_path: Path) -> None:
    frame = stripes(8, 16)
    Image.fromarray(frame[0]).save(tmp_path / "image.png")
    assert np.array_equal(read_image(tmp_path / "image.png"), frame)
    assert np.array_equal(read_image(frame[0]), frame)
    Image.fromarray(frame[0]).convert("L").save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").shape == (1, 8, 16, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    Image.fromarray(frame[0]).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png")[0], np.rot90(frame[0], -1))


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "absent.png"):
        with pytest.raises(DataError, match=f"{name} cannot be read as an image"):
            read_image(tmp_path / name)
    with pytest.raises(DataError, match=r"an image is uint8 \(H, W, 3\), not float64 \(4, 4\)"):
        read_image(np.zeros((4, 4)))


def test_the_last_frames_of_a_video(tmp_path: Path) -> None:
    frames = np.stack([np.full((16, 16, 3), 20 * index, np.uint8) for index in range(9)])
    media.write_video(tmp_path / "clip.mp4", frames, 25)
    found = last_frames(tmp_path / "clip.mp4", 3)
    assert np.abs(found.astype(int) - frames[-3:]).max() <= 3
    with pytest.raises(DataError, match="has 9 frames, and the last 10 of them are wanted"):
        last_frames(tmp_path / "clip.mp4", 10)


def test_the_same_size_is_not_touched() -> None:
    frame = stripes(64, 96)
    found = fitted(frame, 64, 96, CELLS)
    assert found.shape == (1, 3, 1, 64, 96)
    expected = torch.from_numpy(frame).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    assert found.equal(expected)
    assert (found.min(), found.max()) == (-1, 1)


def test_another_shape_is_refused_with_sizes_that_fit() -> None:
    """A square of 100 pixels for a video of 64x192: square videos are 192x192 and 64x64. Both are accepted."""
    square = stripes(100, 100)
    with pytest.raises(ConfigError, match="100x100 .* the video 64x192: another shape. Make the video 192x192 or 64x64"):
        fitted(square, 64, 192, CELLS)
    for height, width in nearest_sizes((100, 100), (64, 192), CELLS):
        assert fitted(square, height, width, CELLS).shape == (1, 3, 1, height, width)


@pytest.mark.parametrize("have", [(1080, 1920), (1921, 1080), (333, 1000), (50, 47)])
def test_sizes_that_are_offered_are_accepted(have: tuple[int, int]) -> None:
    frame = np.zeros((1, *have, 3), np.uint8)
    for height, width in nearest_sizes(have, (512, 704), CELLS):
        assert height % 32 == width % 32 == 0
        assert fitted(frame, height, width, CELLS).shape[3:] == (height, width)


def test_crop_keeps_the_middle_and_pad_keeps_everything() -> None:
    """A wide image for a square video. Cropped: 64 of 128 columns, those from 32 on, so the green ones (the first 32) are gone.
    Padded: it is 32 rows high in the middle, black above and below."""
    wide = stripes(64, 128)
    cut = fitted(wide, 64, 64, CELLS, "crop")[0, :, 0]
    assert cut[1].max() < -0.5
    torch.testing.assert_close(cut[:, 8, 32], torch.tensor([1.0, -1.0, -1.0]))
    whole = fitted(wide, 64, 64, CELLS, "pad")[0, :, 0]
    assert (whole[:, :16] == -1).all()
    assert (whole[:, 48:] == -1).all()
    torch.testing.assert_close(whole[:, 32, 4], torch.tensor([-1.0, 1.0, -1.0]))
