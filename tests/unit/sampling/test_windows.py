"""Long videos: how windows lie, that one window is plain sampling, and that each goes on from the one before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.unit.sampling import tiny
from videofm.errors import ConfigError
from videofm.sampling import Pipeline, PixelCondition, Window
from videofm.sampling.windows import in_window, spans

SETTINGS = {"height": 16, "width": 16, "fps": 25.0, "num_steps": 2}
PROMPTS = ["a red circle", "b"]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return tiny.pipeline()


def test_windows_cover_every_frame_and_share_what_they_should() -> None:
    """13 frames at once, 5 shared: 8 new ones a window. 29 = 13 + 8 + 8; of 25 the last window makes 4 new ones."""
    assert spans(29, Window(13, 5)) == [range(13), range(8, 21), range(16, 29)]
    assert spans(25, Window(13, 5)) == [range(13), range(8, 21), range(16, 25)]
    assert spans(13, Window(13, 5)) == spans(13, None) == [range(13)]
    assert spans(5, Window(13, 5)) == [range(5)]
    with pytest.raises(ConfigError, match="windows of 13 frames that share 13 do not go on: share at least 1 frame"):
        spans(29, Window(13, 13))


def test_what_is_given_is_used_in_one_window() -> None:
    """Frame 18 lies in the overlap of the second and the third window: the second made it."""
    given = [(PixelCondition(torch.zeros(1, 3, 1, 8, 8), frame), 1) for frame in (0, 12, 18, 28)]
    found = [
        [condition.frame for condition in in_window(given, frames, 5 if frames.start else 0)]
        for frames in spans(29, Window(13, 5))
    ]
    assert found == [[0, 12], [10], [12]]
    clip = (PixelCondition(torch.zeros(1, 3, 5, 8, 8), 12), 5)
    with pytest.raises(ConfigError, match="gives frames 12 to 16, across the end of a window at 13"):
        in_window([clip], range(13), 0)


def test_one_window_that_covers_the_video_is_plain_sampling(pipeline: Pipeline) -> None:
    plain = pipeline.generate(PROMPTS, num_frames=13, **SETTINGS)
    assert pipeline.generate(PROMPTS, num_frames=13, window=Window(13, 5), **SETTINGS).equal(plain)
    assert pipeline.generate(PROMPTS, num_frames=13, window=Window(29, 5), **SETTINGS).equal(plain)


def test_a_long_video_is_its_first_window_and_what_goes_on_from_it(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 13 frames are those of a video of 13; each later window starts with the latents of the 5 frames before it, and
    with noise of its own."""
    starts: list[Tensor] = []
    made: list[Tensor] = []
    decode = pipeline.decode
    monkeypatch.setattr(pipeline, "decode", lambda *arguments: made.append(decode(*arguments)) or made[-1])  # type: ignore[func-returns-value]
    hook = pipeline.dit.register_forward_pre_hook(lambda module, args: starts.append(args[0]))
    steps: list[int] = []
    settings = SETTINGS | {"guidance_scale": 1.0}
    with hook:
        video = pipeline.generate(PROMPTS, num_frames=25, window=Window(13, 5), on_step=lambda: steps.append(1), **settings)  # type: ignore[arg-type]
    assert video.shape == (2, 3, 25, 16, 16)
    assert len(steps) == 2 * 3
    assert torch.cat([made[0], made[1][:, :, 5:], made[2][:, :, 5:]], dim=2).equal(video)
    torch.testing.assert_close(video[:, :, :13], pipeline.generate(PROMPTS, num_frames=13, **settings))  # type: ignore[arg-type]
    with torch.no_grad():
        for call, frame in ((2, 8), (4, 16)):
            latents = pipeline.vae.normalize(pipeline.vae.encode(video[:, :, frame : frame + 5]).mode())  # type: ignore[operator]
            given = latents.flatten(2).transpose(1, 2)  # (B, C, 2, 2, 2) -> (B, 8, C)
            torch.testing.assert_close(starts[call][:, :8], given, atol=1e-5, rtol=0)
    assert (starts[2].shape[1], starts[4].shape[1]) == (16, 12)
    assert not starts[0][:, 8:12].equal(starts[2][:, 8:12])


def test_windows_do_not_depend_on_the_batch(pipeline: Pipeline) -> None:
    settings = {"num_frames": 21, "window": Window(13, 5), **SETTINGS}
    alone = pipeline.generate(PROMPTS, batch_size=1, **settings)
    torch.testing.assert_close(alone, pipeline.generate(PROMPTS, **settings), atol=1e-5, rtol=0)


def test_a_keyframe_in_a_later_window_changes_that_window_only(pipeline: Pipeline) -> None:
    settings = {"num_frames": 21, "window": Window(13, 5), **SETTINGS}
    last = PixelCondition(torch.full((1, 3, 1, 16, 16), 0.5), -1)
    free, given = pipeline.generate(PROMPTS, **settings), pipeline.generate(PROMPTS, conditions=[last], **settings)
    assert given[:, :, :13].equal(free[:, :, :13])
    assert not given[:, :, 13:].equal(free[:, :, 13:])


def test_sizes_of_windows_follow_the_vae(pipeline: Pipeline) -> None:
    for window in (Window(12, 5), Window(13, 4)):
        with pytest.raises(ConfigError, match=r"cannot make (12|4) frames of 16x16 pixels: this VAE makes 1 \+ 4 \* n frames"):
            pipeline.generate(PROMPTS, num_frames=21, window=window, **SETTINGS)
