"""Every odd file of spec section 7, through probe and transcode: what must come out of it, or why it is refused."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import av
import numpy as np
import pytest

from data_pipelines import video
from data_pipelines.rows import Refusal, Rejected, Row, Unusable
from data_pipelines.stages.probe import ProbeStage
from data_pipelines.stages.transcode import TranscodeStage
from data_pipelines.workspace import Workspace
from tests.unit.data_pipelines import media
from videofm.config.curation_stages import ProbeConfig, TranscodeConfig
from videofm.media import read_video

ALL = list(range(media.NUM_FRAMES))


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """An ordinary MP4 file with its index at the end."""
    return media.write(tmp_path_factory.mktemp("media") / "plain.mp4", media.coded())


def curate(path, tmp_path, fps=None, **limits):
    """The row that probe and transcode make of a file, and the frames of the clip."""
    work = Workspace(path, tmp_path)
    row = Row("0" * 24, path.name, str(path), path.stat().st_size)
    (row,) = ProbeStage(ProbeConfig(**limits)).process(row, work)
    (row,) = TranscodeStage(TranscodeConfig(short_side=720, min_frames=1, crf=8, fps=fps)).process(row, work)
    return row, read_video(row.clip.path)


def codes(frames):
    return [media.code(frame) for frame in frames]


def test_the_plain_file_comes_out_whole(plain, tmp_path):
    row, frames = curate(plain, tmp_path)
    assert codes(frames) == ALL and frames.shape[1:3] == (media.HEIGHT, media.WIDTH)
    assert (row.info.codec, row.info.num_frames, row.clip.fps) == ("h264", media.NUM_FRAMES, 25.0)


@pytest.mark.parametrize("options", [{}, {"movflags": "faststart"}], ids=["moov-last", "moov-first"])
def test_truncated(tmp_path, options):
    path = media.write(tmp_path / "x.mp4", media.coded(), container_options=options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(Unusable, match="truncated"):
        curate(path, tmp_path)


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n"
CONCAT = b"ffconcat version 1.0\nfile /etc/passwd\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (np.random.default_rng(0).bytes(9999), "not_video"),
        (b"This is a text.\n" * 99, "not_video"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "not_video"),
        (PLAYLIST, "not_video"),
        (CONCAT, "not_video"),
    ],
    ids=["zero-length", "noise", "text", "png", "hls", "concat"],
)
def test_what_is_no_video(tmp_path, content, reason):
    path = tmp_path / "x.mp4"
    path.write_bytes(content)
    with pytest.raises(Unusable) as refused:
        curate(path, tmp_path)
    assert refused.value.reason == reason


def test_audio_only(tmp_path):
    with pytest.raises(Unusable, match="no_video: the file has no video stream"):
        curate(media.audio(tmp_path / "x.mp4"), tmp_path)


def test_variable_rate_becomes_constant(tmp_path):
    """Each stored frame is the one nearest in time, worked out here by looking at all of them."""
    times = [40 * i + (200 if i > 9 else 0) + 7 * (i % 3) for i in range(media.NUM_FRAMES)]
    path = media.write(tmp_path / "x.mp4", media.coded(), pts=times)
    row, frames = curate(path, tmp_path, fps=25.0)
    wanted = [min(ALL, key=lambda i, at=40 * k: (abs(times[i] - at), i)) for k in range(len(frames))]
    assert codes(frames) == wanted and len(frames) in range(28, 31)
    with av.open(row.clip.path) as container:
        stamps = sorted(packet.pts for packet in container.demux(video=0) if packet.size)
    assert len({b - a for a, b in itertools.pairwise(stamps)}) == 1


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_baked(plain, tmp_path, degrees):
    path = media.rotate(shutil.copy(plain, tmp_path / "x.mp4"), degrees)
    row, frames = curate(path, tmp_path)
    size = (media.WIDTH, media.HEIGHT) if degrees != 180 else (media.HEIGHT, media.WIDTH)
    assert (row.info.height, row.info.width) == (row.clip.height, row.clip.width) == frames.shape[1:3] == size
    assert codes(np.rot90(frames, degrees // 90, axes=(1, 2))) == ALL  # turned clockwise when shown; here back
    with av.open(row.clip.path) as container:
        assert all(frame.rotation == 0 for frame in container.decode(video=0))


def test_edit_list_trims(tmp_path):
    whole = media.write(tmp_path / "a.mp4", media.coded(), options={"bf": "2"})
    row, frames = curate(media.copy(whole, tmp_path / "b.mp4", shift=-5), tmp_path)
    assert codes(frames) == ALL[5:] and row.info.num_frames == len(ALL) - 5
    assert b"elst" not in Path(row.clip.path).read_bytes()


def test_open_groups_are_closed(tmp_path):
    params = "open-gop=1:keyint=8:min-keyint=8:bframes=3:b-adapt=0:scenecut=0"
    path = media.write(tmp_path / "x.mp4", media.coded(), options={"bf": "3", "x264-params": params})
    with av.open(str(path)) as container:  # a frame is shown before the key frame that comes before it in the file: open
        packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
    assert any(pts < before for (before, key), (pts, _) in itertools.pairwise(packets) if key)
    row, frames = curate(path, tmp_path)
    assert codes(frames) == ALL
    with av.open(row.clip.path) as container:
        assert all(packet.pts == packet.dts for packet in container.demux(video=0) if packet.size)


def test_transport_stream_with_an_offset(plain, tmp_path):
    path = media.copy(plain, tmp_path / "x.ts", shift=100 * media.FPS)
    assert Workspace(path, tmp_path).probe().pts[0] / 90_000 >= 100
    assert codes(curate(path, tmp_path)[1]) == ALL


def test_one_and_two_frames(tmp_path):
    one, two = (media.write(tmp_path / f"{count}.mp4", media.coded(count)) for count in (1, 2))
    with pytest.raises(Rejected, match="too_few_frames: 1 frames, at least 2"):
        curate(one, tmp_path)
    assert codes(curate(two, tmp_path)[1]) == [0, 1]
    assert codes(curate(one, tmp_path, min_frames=1)[1]) == [0]


@pytest.mark.parametrize(
    ("height", "width", "reason"), [(16, 16384, "too_large"), (8192, 8192, "too_many_pixels"), (32, 320, "aspect")]
)
def test_sizes_are_refused_before_decoding(tmp_path, monkeypatch, height, width, reason):
    path = media.blank(tmp_path / "x.mkv", height, width)
    monkeypatch.setattr("data_pipelines.video._demux", lambda *_: pytest.fail("it went on to the packets"))
    with pytest.raises(Rejected) as refused:
        curate(path, tmp_path)
    assert refused.value.reason == reason


def test_odd_sizes_are_cropped_even(tmp_path):
    path = media.write(tmp_path / "x.mp4", media.coded(height=49, width=67), pix_fmt="yuv444p")
    row, frames = curate(path, tmp_path)
    assert (row.info.height, row.info.width) == (49, 67) and frames.shape[1:3] == (48, 66) and codes(frames) == ALL


@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv444p", "yuv422p"])
def test_other_pixel_formats_are_converted(tmp_path, pix_fmt):
    row, frames = curate(media.write(tmp_path / "x.mp4", media.coded(), pix_fmt=pix_fmt), tmp_path)
    assert codes(frames) == ALL
    with av.open(row.clip.path) as container:
        assert container.streams.video[0].pix_fmt == "yuv420p"
    assert np.abs(frames.astype(float) - media.coded()).mean() < 4


@pytest.mark.parametrize(("transfer", "name"), [("smpte2084", "PQ"), ("arib-std-b67", "HLG")])
def test_high_dynamic_range_is_refused(tmp_path, transfer, name):
    options = {"x264-params": f"transfer={transfer}:colorprim=bt2020:colormatrix=bt2020nc"}
    path = media.write(tmp_path / "x.mp4", media.coded(), pix_fmt="yuv420p10le", options=options)
    with pytest.raises(Rejected, match=f"hdr: high dynamic range, {name}"):
        curate(path, tmp_path)
    with pytest.raises(Rejected, match="hdr"):  # also where nothing probed it
        TranscodeStage(TranscodeConfig(short_side=32)).process(Row("0" * 24, "x", str(path), 1), Workspace(path, tmp_path))


@pytest.mark.parametrize(
    ("codec", "name", "ending", "options"),
    [
        ("libx265", "hevc", "mp4", {"x265-params": "log-level=none:pools=1"}),
        ("libsvtav1", "av1", "mp4", {"preset": "10"}),
        ("libvpx-vp9", "vp9", "webm", {"cpu-used": "8"}),
        ("libvpx", "vp8", "webm", {"auto-alt-ref": "1", "lag-in-frames": "10"}),
    ],
)
def test_other_codecs(tmp_path, codec, name, ending, options):
    path = media.write(tmp_path / f"x.{ending}", media.coded(height=96, width=128), codec=codec, options=options)
    row, frames = curate(path, tmp_path)
    assert row.info.codec == name and codes(frames) == ALL
    with pytest.raises(Rejected, match=f"codec: {name}, not one of h264"):
        curate(path, tmp_path, codecs=["h264"])


def test_a_decoder_that_may_not_run(tmp_path):
    path = media.write(tmp_path / "x.avi", media.coded(), codec="huffyuv", pix_fmt="yuv422p")
    with pytest.raises(Unusable, match="codec_not_allowed: huffyuv; decoders that may run: av1, "):
        curate(path, tmp_path)


@pytest.mark.parametrize(("codec", "pix_fmt"), [("cinepak", "rgb24"), ("flv", "yuv420p"), ("msmpeg4", "yuv420p")])
def test_opening_a_file_runs_no_other_decoder(tmp_path, codec, pix_fmt):
    """FFmpeg decodes while it opens a file; the pixel format is known only if it did."""
    path = media.write(tmp_path / "x.avi", media.coded(), codec=codec, pix_fmt=pix_fmt)
    with av.open(str(path)) as container:
        assert container.streams.video[0].pix_fmt == pix_fmt
    with av.open(str(path), options=video.OPTIONS) as container:
        assert container.streams.video[0].pix_fmt == (None if codec == "cinepak" else pix_fmt)
    if codec == "cinepak":
        with pytest.raises(Unusable, match="codec_not_allowed: cinepak"):
            curate(path, tmp_path)


def test_every_decoder_that_may_run_is_known_by_its_name():
    for codec in sorted(video.CODECS):
        assert av.codec.Codec(codec, "r").name in video.OPTIONS["codec_whitelist"].split(","), codec


def test_of_two_streams_the_first_counts(tmp_path):
    path = media.write(tmp_path / "x.mp4", media.coded(), num_copies=2)
    assert codes(curate(path, tmp_path)[1]) == ALL
    with pytest.raises(Rejected, match="too_many_streams: 2 streams, at most 1"):
        curate(path, tmp_path, max_streams=1)


def test_cover_art_is_not_a_stream(tmp_path):
    path = media.write(tmp_path / "x.mp4", media.coded(), cover=True)
    with av.open(str(path)) as container:
        assert sorted(stream.codec_context.name for stream in container.streams.video) == ["h264", "mjpeg"]
    row, frames = curate(path, tmp_path)
    assert codes(frames) == ALL and row.info.codec == "h264"
    with pytest.raises(Unusable, match="no_video"):  # music with a cover is no video
        curate(media.write(tmp_path / "y.mp4", media.coded(), num_copies=0, cover=True), tmp_path)


@pytest.mark.parametrize(
    ("ending", "shift"), [("mkv", 30 * 86400 * media.FPS), ("ts", -5 * media.FPS), ("mkv", -5 * media.FPS)], ids=str
)
def test_timestamps_out_of_range(plain, tmp_path, ending, shift):
    path = media.copy(plain, tmp_path / f"x.{ending}", shift, {"avoid_negative_ts": "disabled"})
    with pytest.raises(Unusable, match="bad_timestamps"):
        curate(path, tmp_path)


def test_a_frame_far_away_does_not_become_millions(tmp_path):
    """Ten frames and one an hour later: at a constant rate that would be 90,000 frames out of a file of a few kB."""
    path = media.write(tmp_path / "x.mp4", media.coded(11), pts=[40 * i for i in range(10)] + [3_600_000])
    with pytest.raises(Rejected, match=r"frame_rate: 0\.00.* frames a second, 1 to 240 are taken"):
        curate(path, tmp_path)


@pytest.mark.parametrize("count", [1, 16, 200])
def test_flipped_bytes(tmp_path, count):
    path = media.flip_middle(media.write(tmp_path / "x.mp4", media.coded(), options={"crf": "1"}), count)
    with pytest.raises(Refusal) as refused:
        curate(path, tmp_path)
    assert (refused.value.kind, refused.value.reason) == ("quarantined", "undecodable")


def test_presentation_times_are_those_of_the_packets(plain, tmp_path):
    """Seeking and spans rest on it: demuxing tells the times that decoding gives."""
    shifted = media.write(tmp_path / "b.mp4", media.coded(), options={"bf": "3"})
    for path in (
        plain,
        shifted,
        media.copy(shifted, tmp_path / "c.ts", shift=50),
        media.copy(shifted, tmp_path / "d.mp4", shift=-4),
    ):
        work = Workspace(path, tmp_path)
        probed = work.probe()
        assert np.allclose(work.scan().times, (np.array(probed.pts) - probed.pts[0]) * probed.time_base)


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
def test_a_span_is_read_as_if_it_were_the_whole(tmp_path, ending):
    """Spans that follow each other give all frames once, whether or not the container seeks well."""
    path = media.write(tmp_path / f"x.{ending}", media.coded(60), options={"bf": "2", "g": "12"})
    found = []
    for edges in ((0.0, 0.8), (0.8, 1.2), (1.2, 9.0)):
        work = Workspace(path, tmp_path, span=edges)
        scan = work.scan()
        frames = list(work.frames(0, len(scan.times)))
        assert work.first_frame() == len(found) and scan.times[0] == 0 and len(frames) == len(scan.times)
        assert codes(work.frames(3, 5)) == codes(frames[3:5])
        found += codes(frames)
    assert found == list(range(60))


def test_a_kept_scan_saves_the_decoding(plain, tmp_path, monkeypatch):
    kept = tmp_path / "scan.npz"
    first = Workspace(plain, tmp_path, kept_scan=kept).scan()
    monkeypatch.setattr("data_pipelines.video.decoded", lambda *_: pytest.fail("it was decoded again"))
    again = Workspace(plain, tmp_path, kept_scan=kept).scan()
    assert np.array_equal(first.times, again.times) and np.array_equal(first.motion, again.motion) and again.box == first.box
