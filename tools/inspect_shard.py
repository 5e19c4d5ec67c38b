"""What is inside a shard: a table of its clips, and with --sheet a contact sheet with captions and scores.

python tools/inspect_shard.py SHARD.tar [--sheet OUT.png] [--clips N] [--frames N]

The tar alone is enough; where it lies in a dataset, the index adds sizes, splits and scores. Videos are decoded in a process of
their own with limits on memory and time, so any tar may be looked at.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import resource
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.foreign_samples import BadMember, Sample, describe, samples_of
from videofm.data.decoders.pyav import DECODER
from videofm.data.index import ClipRecord
from videofm.data.manifest import read_entries, read_index
from videofm.data.tar import scan_tar
from videofm.errors import ConfigError, DataError, VideofmError
from videofm.media import Frames, contact_sheet

TIMEOUT, MEMORY = 20.0, 2 << 30
"""Seconds and bytes that decoding a clip may take."""
_MAX_FRAME_BYTES = 64 << 20


@dataclass(frozen=True)
class Clip:
    """A sample of the tar: its caption (or what is wrong with it), and its row of the index where there is one."""

    sample: Sample
    caption: str
    record: ClipRecord | None


def inspect(path: Path) -> tuple[list[Clip], list[str]]:
    """The clips of a tar, and a line for each thing that is not one.

    Raises:
        DataError: the file is missing, or it is a damaged tar.
    """
    if not path.is_file():
        raise DataError(f"{path} is no file; give a tar, for example SHARDS/shards/shard-00000.tar")
    records = {record.offset: record for record in index_of(path)}
    samples = samples_of(scan_tar(path), "", path.name)
    notes = [f"not a clip: {loss.source}: {loss.reason}: {loss.detail}" for loss in samples.losses]
    notes += [f"not read: {count} members with the ending .{ending}" for ending, count in sorted(samples.ignored.items())]
    clips = []
    for sample in samples.found:
        try:
            caption = describe(path, sample, (), "url").caption
        except BadMember as error:
            caption = f"({error.reason}: {error.detail})"
        clips.append(Clip(sample, caption, records.get(sample.video.offset)))
    return clips, notes


def index_of(path: Path) -> list[ClipRecord]:
    """The committed index of a tar; empty where it is in no dataset."""
    for folder in path.resolve().parents:
        if (folder / "manifest").is_dir():
            name = path.resolve().relative_to(folder).as_posix()
            return [record for entry in read_entries(folder) if entry.tar == name for record in read_index(folder, entry)]
    return []


def table(path: Path, clips: list[Clip]) -> str:
    """A line a clip."""
    scores = sorted({name for clip in clips if clip.record for name in clip.record.scores})
    titles = ["key", "bytes", "frames", "fps", "size", "split", *scores, "caption"]
    rows = []
    for clip in clips:
        record = clip.record
        facts = ["-"] * 4
        if record is not None:
            facts = [str(record.num_frames), f"{record.fps:.4g}", f"{record.height}x{record.width}", record.split]
        values = [f"{record.scores[name]:.4g}" if record and name in record.scores else "-" for name in scores]
        rows.append([clip.sample.key[1:], f"{clip.sample.video.size:,}", *facts, *values, shorten(clip.caption, 60)])
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    left = (0, len(titles) - 1)
    lines = [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in [titles, *rows]
    ]
    without = sum(clip.record is None for clip in clips)
    told = f"; {without:,} are in no committed index" if without else ""
    return "\n".join([f"{path}: {len(clips):,} clips, {path.stat().st_size:,} bytes{told}", "", *lines])


def sheet(path: Path, clips: list[Clip], output: Path, num_frames: int) -> None:
    """Write the contact sheet: a strip a clip, with its key, scores and caption."""
    videos, titles = [], []
    for clip in clips:
        frames = decode_apart(path, clip.sample, num_frames)
        scores = " ".join(f"{name}={value:.3g}" for name, value in sorted(clip.record.scores.items())) if clip.record else ""
        title = f"{clip.sample.key[1:]}  {scores}  {clip.caption}"
        videos.append(np.full((num_frames, 96, 96, 3), 90, np.uint8) if isinstance(frames, str) else frames)
        titles.append(f"{clip.sample.key[1:]}  does not decode: {frames}" if isinstance(frames, str) else title)
    contact_sheet(videos, titles, output, num_frames, columns=2 if len(videos) > 1 else 1)


def decode_apart(path: Path, sample: Sample, num_frames: int) -> Frames | str:
    """Evenly spaced frames `(T, H, W, 3)` of a clip, decoded in a child process; or why there are none."""
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_decode, args=(send, path, sample, num_frames))
    child.start()
    send.close()
    try:
        if not receive.poll(TIMEOUT):
            return f"no answer within {TIMEOUT:g} s"
        # Bytes and plain numbers: nothing that the child sends is unpickled.
        head = receive.recv_bytes(4096).decode()
        if not head.startswith("frames "):
            return head
        shape = tuple(int(part) for part in head.split()[1:])
        return np.frombuffer(receive.recv_bytes(math.prod(shape)), np.uint8).reshape(shape)
    except EOFError:
        return "the decoding process died"
    finally:
        receive.close()
        child.kill()
        child.join()


def _decode(send: Connection, path: Path, sample: Sample, num_frames: int) -> None:
    """The child: sends a line, then the bytes of the frames."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY + _address_space(), MEMORY + _address_space()))
    resource.setrlimit(resource.RLIMIT_CPU, (int(TIMEOUT), int(TIMEOUT) + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with path.open("rb") as file:
            content = os.pread(file.fileno(), sample.video.size, sample.video.offset)
        info = DECODER.probe(content)
        if info.height * info.width * 3 > _MAX_FRAME_BYTES:
            raise DataError(f"frames of {info.height}x{info.width} are too large to show")
        indices = np.linspace(0, info.num_frames - 1, min(num_frames, info.num_frames)).round().astype(int).tolist()
        frames: Any = np.ascontiguousarray(DECODER.read(content, indices))
        send.send_bytes(("frames " + " ".join(map(str, frames.shape))).encode())
        send.send_bytes(frames.tobytes())
    except Exception as error:  # whatever it is, it is told and not thrown away
        send.send_bytes(f"{type(error).__name__}: {error}".encode()[:4096])


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def shorten(text: str, length: int) -> str:
    """Text on one line, cut; what a terminal would obey is shown instead."""
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
    return line if len(line) <= length else line[: length - 3] + "..."


def main(arguments: list[str]) -> int:
    """Print the table and write the sheet; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shard", type=Path, help="a tar")
    parser.add_argument("--sheet", type=Path, metavar="OUT.png", help="write a contact sheet")
    parser.add_argument("--clips", type=int, default=24, metavar="N", help="clips on the sheet, from the first on (24)")
    parser.add_argument("--frames", type=int, default=5, metavar="N", help="frames of a clip on the sheet (5)")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.clips < 1 or chosen.frames < 1:
            raise ConfigError(f"--clips {chosen.clips} and --frames {chosen.frames}: both are at least 1")
        clips, notes = inspect(chosen.shard)
        print("\n".join([table(chosen.shard, clips), *notes]))
        if chosen.sheet is not None:
            sheet(chosen.shard, clips[: chosen.clips], chosen.sheet, chosen.frames)
            print(f"{chosen.sheet}: {min(len(clips), chosen.clips):,} of {len(clips):,} clips")
    except VideofmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
