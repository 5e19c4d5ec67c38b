"""Decoders: frame identity on a bar-coded clip, rotation, and errors that say what to do."""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest

from tests.unit.data_pipelines import media
from videofm.data import decode
from videofm.errors import ConfigError, DataError

REAL = Path(__file__).resolve().parents[4] / "shared" / "clips" / "odd"


@pytest.fixture(params=decode.ORDER)
def decoder(request):
    found = decode.get(request.param)
    if found.unavailable():
        pytest.skip(found.unavailable())
    return found


def test_conformance(decoder):
    assert decode.conformance(decoder.name) is None


def test_frames_by_index_from_bytes_and_from_a_path(decoder, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(decode.bar_code_clip())
    wanted = [23, 0, 5, 5, 9, 1, 22, 16]
    for source in (path, decode.bar_code_clip()):
        frames = decoder.read(source, wanted)
        assert frames.shape == (8, 64, 64, 3) and frames.dtype == np.uint8
        assert [decode.bar_code(frame) for frame in frames] == wanted
    info = decoder.probe(path)
    assert (info.num_frames, info.fps, info.height, info.width) == (24, 25.0, 64, 64)
    assert info.duration == pytest.approx(24 / 25, abs=1e-3)


def test_every_single_frame(decoder):
    assert [decode.bar_code(decoder.read(decode.bar_code_clip(), [i])[0]) for i in range(24)] == list(range(24))


def test_decoders_agree_on_pixels():
    clip = decode.bar_code_clip()
    frames = [decode.get(name).read(clip, range(24)).astype(int) for name in decode.ORDER if not decode.get(name).unavailable()]
    for other in frames[1:]:
        assert np.abs(other - frames[0]).max() <= 2


@pytest.mark.parametrize("indices", [[24], [0, -1], [1000]])
def test_index_outside_is_refused(decoder, indices):
    with pytest.raises(DataError, match=r"were asked for, but the video has 24 \(0 to 23\)"):
        decoder.read(decode.bar_code_clip(), indices)


@pytest.mark.parametrize("content", [b"", b"not a video at all" * 50, "cut"], ids=["empty", "text", "cut"])
def test_what_is_no_video_is_refused(decoder, content):
    with pytest.raises(DataError, match=decoder.name.replace("pyav", "PyAV")):
        decoder.read(decode.bar_code_clip()[:900] if content == "cut" else content, [0])


def test_rotation_is_applied(decoder, tmp_path):
    """The file stores a picture whose left half is bright and asks for a quarter turn; width and height swap."""
    path = tmp_path / "turned.mp4"
    image = np.full((32, 64, 3), 20, np.uint8)
    image[:, :32] = 220
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"threads": "1"})
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    content = bytearray(path.read_bytes())
    at = content.index((0x40000000).to_bytes(4, "big"), content.index(b"tkhd")) - 32  # the 3x3 matrix of the track header
    quarter = [0, 0x10000, 0, -0x10000, 0, 0, 32 << 16, 0, 0x40000000]
    content[at : at + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in quarter)
    path.write_bytes(content)
    frame = decoder.read(path, [1])[0]
    assert frame.shape == (64, 32, 3)
    assert frame[:32].mean() > 180 and frame[32:].mean() < 60  # turned clockwise, left is now up
    assert (decoder.probe(path).height, decoder.probe(path).width) == (64, 32)


def _odd(kind: str, folder: Path) -> tuple[Path, list[int]]:
    """A file that no curation of ours would leave so, and the codes of the frames that a player shows, in order."""
    frames, every = media.coded(), list(range(media.NUM_FRAMES))
    plain = {"bf": "2"}
    if kind == "pyramid":  # B-frames that others refer to: decode order is far from presentation order
        return media.write(folder / "x.mp4", frames, options={"bf": "5", "x264-params": "b-pyramid=normal:b-adapt=0"}), every
    if kind == "open-groups":
        params = "open-gop=1:keyint=8:min-keyint=8:bframes=3:b-adapt=0:scenecut=0"
        return media.write(folder / "x.mp4", frames, options={"bf": "3", "x264-params": params}), every
    if kind == "variable-rate":
        times = [40 * i + (400 if i > 9 else 0) + 7 * (i % 3) for i in every]
        return media.write(folder / "x.mp4", frames, options=plain, pts=times), every
    whole = media.write(folder / "whole.mp4", frames, options=plain)
    if kind == "edit-list":  # as a cut without re-encoding leaves it: five frames are there, but not shown
        return media.copy(whole, folder / "x.mp4", shift=-5), every[5:]
    if kind == "edit-list-past-a-key-frame":
        return media.copy(whole, folder / "x.mp4", shift=-11), every[11:]
    if kind == "late-start":
        return media.copy(whole, folder / "x.mp4", shift=50), every
    return media.copy(whole, folder / f"x.{kind}", shift=100 if kind == "ts" else 0), every


KINDS = ("pyramid", "open-groups", "variable-rate", "edit-list", "edit-list-past-a-key-frame", "late-start", "ts", "mkv")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in decode.ORDER if name not in decode.OWN_CLIPS_ONLY])
def test_files_of_others_give_exactly_the_frames_asked_for(name, kind, tmp_path):
    """Invariant 11 for foreign files, from bytes as the loader reads them. The truth is the code that each frame shows."""
    path, shown = _odd(kind, tmp_path)
    decoder, content, last = decode.get(name), path.read_bytes(), len(shown) - 1
    assert decoder.probe(path).num_frames == len(shown)
    several = ([0], [last], range(len(shown)), range(1, last, 3), [last, 0, 7, 7, 3, last - 1])
    for wanted in [*several, *([index] for index in range(len(shown)))]:
        assert [media.code(frame) for frame in decoder.read(content, wanted)] == [shown[index] for index in wanted]
    with pytest.raises(DataError, match=f"the video has {len(shown)} "):
        decoder.read(content, [len(shown)])


@pytest.mark.parametrize("name", decode.OWN_CLIPS_ONLY)
def test_files_of_others_are_not_for_decoders_that_err(name, tmp_path):
    """Where this fails, the library has learnt it and may leave the list."""
    if decode.get(name).unavailable():
        pytest.skip(decode.get(name).unavailable())
    errors = 0
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        path, shown = _odd(kind, tmp_path / kind)
        for index in range(len(shown)):
            with suppress(DataError):
                errors += media.code(decode.get(name).read(path.read_bytes(), [index])[0]) != shown[index]
    assert errors
    with pytest.raises(
        ConfigError, match=f"decoder {name!r} returns wrong frames of files that `videofm curate` did not encode"
    ):
        decode.choose(name, canonical=False)


def test_auto_takes_none_of_them_for_files_of_others(monkeypatch):
    assert decode.choose("auto", canonical=False).name == "pyav"
    monkeypatch.setattr(decode.get("pyav"), "unavailable", lambda: "not here", raising=False)
    match = "torchcodec: not for files that `videofm curate` did not encode; decord: not for files"
    with pytest.raises(DataError, match=match):
        decode.choose("auto", canonical=False)
    if any(decode.get(name).unavailable() is None for name in decode.OWN_CLIPS_ONLY):
        assert decode.choose("auto", canonical=True).name in decode.OWN_CLIPS_ONLY


def test_choose_names_the_rule_and_the_fix(monkeypatch):
    assert decode.choose("auto").name in decode.ORDER
    assert decode.choose("pyav").name == "pyav"
    with pytest.raises(ConfigError, match="no decoder is called 'pyva', did you mean 'pyav'"):
        decode.choose("pyva")
    monkeypatch.setattr(decode.get("decord"), "unavailable", lambda: "it is not here; install it", raising=False)
    with pytest.raises(ConfigError, match="'decord' cannot be used here: it is not here; install it. Or take `decoder: auto`"):
        decode.choose("decord")
    monkeypatch.setattr(decode, "conformance", lambda name: "wrong frames")
    with pytest.raises(DataError, match="'pyav' failed its self-test: wrong frames"):
        decode.choose("pyav")
    with pytest.raises(DataError, match="no video decoder works here. pyav: wrong frames; .*decord: it is not here"):
        decode.choose("auto")


def test_conformance_finds_a_decoder_that_is_off_by_one(monkeypatch):
    pyav = decode.get("pyav")
    read = pyav.read
    monkeypatch.setattr(pyav, "read", lambda source, indices: read(source, [min(23, i + 1) for i in indices]), raising=False)
    assert "asked for frames" in decode.conformance.__wrapped__("pyav")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real clips are not on this machine")
def test_odd_real_files():
    pyav = decode.get("pyav")
    assert pyav.read(REAL / "rotated_90_3_frames.mov", [0, 2]).shape == (2, 568, 320, 3)
    assert pyav.probe(REAL / "unordered_pts_4_frames.mov").num_frames == 4
    assert pyav.read(REAL / "av1.mkv", [124]).shape == (1, 360, 640, 3)
    with pytest.raises(DataError, match="corrupted.mp4"):
        pyav.read(REAL / "corrupted.mp4", range(50))


def test_playlist_named_mp4_opens_nothing(tmp_path):
    """A playlist that names another file must not be followed."""
    (tmp_path / "secret.ts").write_bytes(b"secret")
    path = tmp_path / "clip.mp4"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(DataError, match="PyAV cannot decode"):
        decode.get("pyav").read(path, [0])


def test_bar_code_clip_is_what_it_says():
    with av.open(io.BytesIO(decode.bar_code_clip())) as container:
        kinds = [av.video.frame.PictureType(frame.pict_type).name for frame in container.decode(video=0)]
    assert len(kinds) == 24 and "B" in kinds and kinds.count("I") >= 3
