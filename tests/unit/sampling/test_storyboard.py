"""Storyboards: how they are read, which prompt a window has, and that each slip is told with its line and its remedy."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from videofm.errors import ConfigError
from videofm.sampling import Segment, Storyboard, Window
from videofm.sampling.storyboard import check_storyboards, prompt_at, read_storyboards, texts_of
from videofm.sampling.windows import new_frames, spans

LEFT, RIGHT = "a red circle moving left", "a red circle moving right"


def board(*borders: int) -> Storyboard:
    """A segment between each two of `borders`, called by number."""
    pairs = pairwise(borders)
    return Storyboard(tuple(Segment(start, stop, f"prompt {number}") for number, (start, stop) in enumerate(pairs)))


def written(folder: Path, text: str) -> Path:
    file = folder / "board.yaml"
    file.write_text(text)
    return file


def test_a_list_is_one_video_and_videos_are_several(tmp_path: Path) -> None:
    one = f"- {{start: 0, stop: 129, prompt: {LEFT}}}\n- start: 129\n  stop: 257\n  prompt: {RIGHT}  # the rest\n"
    (found,) = read_storyboards(written(tmp_path, one))
    assert found == Storyboard((Segment(0, 129, LEFT), Segment(129, 257, RIGHT)))
    assert (found.num_frames, texts_of(found), texts_of("a")) == (257, [LEFT, RIGHT], ["a"])
    assert [prompt_at(found, frame) for frame in (0, 128, 129, 256)] == [LEFT, LEFT, RIGHT, RIGHT]
    assert prompt_at("", 999) == ""
    several = (
        "videos:\n  - [{start: 0, stop: 9, prompt: a}]\n  - [{start: 0, stop: 5, prompt: b}, {start: 5, stop: 9, prompt: c}]\n"
    )
    assert [texts_of(video) for video in read_storyboards(written(tmp_path, several))] == [["a"], ["b", "c"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "- {start: 0, stop: 20, prompt: a}\n- {start: 16, stop: 33, prompt: b}",
            r"board.yaml:1: segment \[0, 20\) 'a' and .*board.yaml:2: segment \[16, 33\) 'b' overlap in frames 16 to 19: let "
            "the first stop at 16, or the second start at 20",
        ),
        (
            "- {start: 0, stop: 9, prompt: a}\n\n- {start: 12, stop: 33, prompt: b}",
            r"frames 9 to 11 lie between .*:1: segment \[0, 9\) 'a' and .*:3: segment \[12, 33\) 'b', and have no prompt: let "
            "the first stop at 12, or the second start at 9",
        ),
        (
            "- {start: 0, stop: 9, prompt: a}\n- {start: 17, stop: 25, prompt: b}\n- {start: 9, stop: 17, prompt: c}",
            "lie between",
        ),
        (
            "- {start: 0, stop: 9, prompt: a}\n- {start: 9, stop: 25, prompt: b}\n- {start: 0, stop: 9, prompt: c}",
            r":3: segment \[0, 9\) 'c' stands behind .*:2: segment \[9, 25\) 'b', but begins earlier: write segments in order",
        ),
        ("- {start: 1, stop: 9, prompt: a}", r":1: segment \[1, 9\) 'a' is the first, and a video begins at frame 0: write"),
        ("- {start: 0, stop: 9, prompt: '  '}", r":1: segment \[0, 9\) '  ' has an empty prompt"),
        ("- {start: 0, stop: 0, prompt: a}", r":1: segment \[0, 0\) 'a' has no frames: `stop` is the number behind its last"),
        ("- {start: 0, stop: 9, promt: a}", "board.yaml:1: unknown key 'promt', did you mean 'prompt'"),
        ("- {start: 0, stop: 9}", "board.yaml:1: `prompt` is missing"),
        ("- {start: 0, stop: '9', prompt: a}", "board.yaml:1: stop = '9' must be a whole number"),
        ("- {start: 0, stop: true, prompt: a}", "board.yaml:1: stop = True must be a whole number"),
        ("- {start: 0, stop: 9, prompt: 4}", "board.yaml:1: prompt = 4 must be text"),
        ("- a red circle", "board.yaml:1: a segment is .*, not 'a red circle'"),
        ("videos:\n- {start: 0, stop: 9, prompt: a}", "board.yaml:2: a video is a list of segments"),
        ("videos: []", "a storyboard is a list of segments, .*or `videos:`"),
        ("prompt: a", "a storyboard is a list of segments, .*or `videos:`"),
        ("[]", "a storyboard has no segments"),
        ("- {start: 0, start: 1, stop: 9, prompt: a}", "board.yaml:1: duplicate key '0.start'"),
    ],
)  # fmt: skip
def test_slips_are_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_storyboards(written(tmp_path, text))


def test_an_absent_file_is_told(tmp_path: Path) -> None:
    written(tmp_path, "[]")
    with pytest.raises(ConfigError, match="no such file, did you mean .*board.yaml"):
        read_storyboards(tmp_path / "bord.yaml")


def test_a_window_has_the_prompt_of_its_first_new_frame() -> None:
    """Windows of 9 that share 1: new frames from 0, 9, 17 and 25 on. The second prompt, from 16 on, is first heard at 17."""
    new = new_frames(spans(33, Window(9, 1)))
    assert new == [range(9), range(9, 17), range(17, 25), range(25, 33)]
    told = board(0, 16, 25, 33)
    check_storyboards([told, "a"], 33, new)
    assert [prompt_at(told, window.start) for window in new] == ["prompt 0", "prompt 0", "prompt 1", "prompt 2"]


def test_storyboards_that_do_not_fit_the_video() -> None:
    new = new_frames(spans(33, Window(9, 1)))
    with pytest.raises(ConfigError, match="stops at 25, but the video has 33 frames: write `stop: 33`, or make 25 frames"):
        check_storyboards([board(0, 17, 25)], 33, new)
    with pytest.raises(
        ConfigError, match=r"segment \[18, 24\) 'prompt 1' has no window: .* are 0, 9, 17, 25. Let it hold frame 17"
    ):
        check_storyboards([board(0, 18, 24, 33)], 33, new)
    with pytest.raises(
        ConfigError, match=r"\[17, 33\) 'prompt 1' changes the prompt of .*\[0, 17\) 'prompt 0', but the video is "
    ):
        check_storyboards([board(0, 17, 33)], 33, new_frames(spans(33, None)))
    check_storyboards([board(0, 33)], 33, new_frames(spans(33, None)))
