"""Long videos: how windows lie, that one window is plain sampling, that each goes on from the one before, and that neither
memory nor what is kept grows with the length."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.sampling import tiny
from videofm import models
from videofm.errors import ConfigError
from videofm.sampling import Pipeline, PixelCondition, Segment, Storyboard, Window
from videofm.sampling.frames import FrameRule
from videofm.sampling.windows import faded, in_window, new_frames, spans

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


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("vae/ltx", [(13, 5), (9, 1), (25, 17), (17, 13)]),
        ("vae/step_video", [(34, 17), (51, 17), (51, 34)]),
    ],
)
def test_the_loop_maths(name: str, windows: list[tuple[int, int]]) -> None:
    """ARLON, spec F-B 8: loops of F that share k make `loops * (F - k) + k` frames, in pixels and in latents, whether a VAE
    begins once (1 + 4 n frames) or with each chunk (17 n)."""
    vae = models.build(name, "tiny", device="meta")
    rule = FrameRule(vae)
    for length, shared in windows:
        latents, shared_latents = (vae.latent_frames(frames) for frames in (length, shared))  # type: ignore[operator]
        for loops in range(1, 9):
            total = loops * (length - shared) + shared
            parts = spans(total, Window(length, shared))
            assert [len(part) for part in parts] == [length] * loops
            assert [frame for new in new_frames(parts) for frame in new] == list(range(total))
            assert vae.latent_frames(total) == loops * (latents - shared_latents) + shared_latents  # type: ignore[operator]
            rule.check_windows(total, 32, 32, Window(length, shared))


@pytest.mark.parametrize(("name", "window", "asked", "near"), [
    ("vae/ltx", Window(13, 5), 26, "25 or 29"),
    ("vae/ltx", Window(13, 1), 27, "25 or 29"),
    ("vae/ltx", Window(13, 5), 14, "13 or 17"),
    ("vae/step_video", Window(34, 17), 60, "51 or 68"),
])  # fmt: skip
def test_a_last_window_that_is_no_length_is_refused_with_the_nearest(name: str, window: Window, asked: int, near: str) -> None:
    rule = FrameRule(models.build(name, "tiny", device="meta"))
    with pytest.raises(
        ConfigError, match=rf"{asked} frames in windows of .* the last window, .*: make a video of {near} frames"
    ):
        rule.check_windows(asked, 32, 32, window)
    for length in near.split(" or "):
        rule.check_windows(int(length), 32, 32, window)


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


LONG: dict[str, Any] = {"window": Window(13, 5), **SETTINGS}


def test_windows_are_the_video_in_pieces(pipeline: Pipeline) -> None:
    """To the bit, with a shorter last window and videos that do not begin at index 0."""
    whole = pipeline.generate(PROMPTS, num_frames=25, first_index=3, **LONG)
    pieces = list(pipeline.stream_windows(PROMPTS, num_frames=25, first_index=3, **LONG))
    assert [piece.frames for piece in pieces] == [range(13), range(13, 21), range(21, 25)]
    assert [piece.video.shape[2] for piece in pieces] == [13, 8, 4]
    assert torch.cat([piece.video for piece in pieces], dim=2).equal(whole)
    assert all(piece.dit_seconds > 0 and piece.ar_seconds == 0 and piece.prompts == tuple(PROMPTS) for piece in pieces)


def held() -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors()}
    return sum(storages.values())


def _tensors() -> list[Tensor]:
    return [item for item in gc.get_objects() if type(item) in (Tensor, torch.nn.Parameter)]


def test_memory_does_not_grow_with_the_length(pipeline: Pipeline) -> None:
    """After each window the generator keeps the frames that windows share, and no window that it gave away."""
    windows = pipeline.stream_windows(PROMPTS, num_frames=13 + 6 * 8, **LONG)
    gone: list[Any] = []
    bytes_held = {}
    for made in windows:
        gone.append(weakref.ref(made.video))
        if len(gone) in (2, 7):  # the first is longer than those behind it, which are alike
            bytes_held[len(gone)] = held()
        del made
        assert gone[-1]() is None, "the generator keeps a window that it gave away"
    assert len(gone) == 7 and bytes_held[2] == bytes_held[7]
    window, shared = (2 * 3 * frames * 16 * 16 * 4 for frames in (13, 5))
    windows = pipeline.stream_windows(PROMPTS, num_frames=61, **LONG)
    base = held()
    next(windows)
    kept = held() - base
    assert shared <= kept < window, f"{kept} bytes are kept between windows, of which {shared} are the shared frames"


def test_a_prompt_changes_on_the_way(pipeline: Pipeline) -> None:
    """Up to the change the video is that of the first prompt; texts are encoded when they change, and once for the negative."""
    one, two = "a red circle moving left", "a red circle moving right"
    told = Storyboard((Segment(0, 21, one), Segment(21, 37, two)))
    encoded: list[list[str]] = []
    encode = pipeline.text_encoder.encode
    pipeline.text_encoder.encode = lambda texts, **how: encoded.append(texts) or encode(texts, **how)  # type: ignore[assignment, operator, func-returns-value]
    try:
        found = pipeline.generate([told, "b"], num_frames=37, **LONG)
    finally:
        del pipeline.text_encoder.encode  # the method of the class again
    assert encoded == [[one, "b"], ["", ""], [two, "b"]]
    plain = pipeline.generate([one, "b"], num_frames=37, **LONG)
    torch.testing.assert_close(found[:, :, :21], plain[:, :, :21], atol=1e-5, rtol=0)
    assert (found[0, :, 21:] - plain[0, :, 21:]).abs().max() > 1e-3
    torch.testing.assert_close(found[1], plain[1], atol=1e-5, rtol=0)
    pieces = list(pipeline.stream_windows([told, "b"], num_frames=37, **LONG))
    assert [piece.prompts for piece in pieces] == [(one, "b"), (one, "b"), (two, "b"), (two, "b")]


def test_prompts_of_a_storyboard_are_checked_and_counted(pipeline: Pipeline) -> None:
    told = Storyboard((Segment(0, 13, "a"), Segment(13, 21, "b" * 40)))
    assert pipeline.num_cut_prompts([told, "c"]) == 1
    with pytest.raises(ConfigError, match="changes the prompt of .* but the video is made at once: give windows"):
        pipeline.generate([told], num_frames=21, **SETTINGS)
    with pytest.raises(ConfigError, match="stops at 21, but the video has 29 frames"):
        pipeline.generate([told], num_frames=29, **LONG)


def test_what_shared_frames_lack_fades():
    """Of a window whose shared frame comes back 0.3 darker, frame k of n new ones is 0.3 (1 - k / (n + 1)) brighter than it was
    decoded: for n = 3 by 0.225, 0.15, 0.075; later frames, and all without fading, are as decoded."""
    video = torch.linspace(-0.5, 0.5, 6).view(1, 1, 6, 1, 1).expand(1, 3, 6, 2, 2)
    tail = video[:, :, :1] + 0.3
    moved = faded(video, tail, 3) - video[:, :, 1:]
    assert moved[0, 0, :, 0, 0].tolist() == pytest.approx([0.225, 0.15, 0.075, 0, 0], abs=1e-6)
    assert torch.equal(faded(video, tail, 0), video[:, :, 1:])
    assert faded(video, tail, 9)[0, 0, -1, 0, 0] == pytest.approx(0.5 + 0.3 * (1 - 5 / 10))
    assert float(faded(video, torch.ones_like(tail), 9).max()) <= 1  # pixels stay in range
    two = torch.cat([video[:, :, :1], tail], dim=2)  # of two shared frames the last one counts
    assert faded(video, two, 1).shape[2] == 4
