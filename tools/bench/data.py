"""What a clip costs in the loader, next to the limits on the same machine and in the same run.

python tools/bench/data.py --loader [--clips 96] [--repeats 3] [--workers 2] [--noise 12]

Clips are 640x360, 48 frames, one key frame each 24, rendered by ffmpeg from test patterns and noise, in shards as curation
writes them; 16 frames, 2 apart, are read of each from a drawn start. As many processes decode on each side, one thread each:

- bare decode: each process has the compressed bytes in memory and decodes, with the fastest decoder here; nothing is sent.
- StepLoader: plans, reads shards, checks SHA-256, decodes with the decoder that `auto` takes, and gives uint8 tensors to the
  trainer.
- StepLoader, float: the same, and float tensors of the batches, by `Batch.to`, on the CPU in the trainer's process. A GPU would
  make them itself.
- webdataset + decord, as commonly written: WebLoader over a shuffled WebDataset; `decord.VideoReader` and `get_batch` in a map;
  the same float tensors. It is compared with the float tensors of StepLoader.

Counted from the first batches on, so that the start of processes does not enter. CPU time is that of all processes of a side,
and the number to trust on a machine that others use too.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from videofm.config.data import DataConfig
from videofm.data import decode
from videofm.data.loader import StepLoader
from videofm.data.manifest import Manifest
from videofm.data.shards import ShardWriter, read_clip

NUM_FRAMES, STRIDE, STORED, HEIGHT, WIDTH, BATCH = 16, 2, 48, 360, 640, 4
SPAN = (NUM_FRAMES - 1) * STRIDE + 1


@dataclass(frozen=True)
class Cost:
    """Of a clip, in seconds: by the clock, and of CPU time over all processes."""

    wall: float
    cpu: float


def render(folder: Path, num_clips: int, noise: int, num_shards: int = 4) -> int:
    """Shards of canonical clips: patterns that move, under noise, as camera video does not compress like a drawing. The bits a
    second of one."""
    contents = []
    for index in range(8):
        source = f"testsrc2=size={WIDTH}x{HEIGHT}:rate=24,hue=h={index * 45},noise=alls={noise}:allf=t:all_seed={index}"
        path = folder / "clip.mp4"
        x264 = ["-c:v", "libx264", "-preset", "veryfast", "-crf", "23", "-g", "24", "-pix_fmt", "yuv420p", "-threads", "2"]
        whole = ["-flags", "+cgop", "-movflags", "+faststart", "-frames:v", str(STORED)]
        command = ["ffmpeg", "-v", "error", "-nostdin", "-f", "lavfi", "-i", source, *x264, *whole, "-y", str(path)]
        subprocess.run(command, check=True)
        contents.append(path.read_bytes())
        path.unlink()
    facts: dict[str, Any] = {"num_frames": STORED, "fps": 24.0, "height": HEIGHT, "width": WIDTH, "caption": "a pattern"}
    for shard in range(num_shards):
        with ShardWriter(folder, f"{shard:05d}", "bench") as writer:
            for index in range(shard, num_clips, num_shards):
                writer.add(f"clip-{index:05d}", contents[index % 8], source_id=f"s{index}", split="train", **facts)
            writer.commit()
    return sum(map(len, contents)) // len(contents) * 8 * 24 // STORED


def _cpu_seconds() -> dict[int, float]:
    """CPU time of this process and of all below it, by process."""
    found = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            found[process.pid] = sum(process.cpu_times()[:2])
    return found


def _bare_process(folder: Path, decoder_name: str, num_clips: int, seed: int, ready: Any, start: Any, costs: Any) -> None:
    decoder, rng = decode.get(decoder_name), np.random.default_rng(seed)
    torch.set_num_threads(1)
    contents = [read_clip(folder, record) for record in Manifest.load(folder).records("train")]
    for index in range(4):
        decoder.read(contents[index], range(SPAN)[::STRIDE])
    ready.wait()
    start.wait()
    before, started = time.process_time(), time.perf_counter()
    for _ in range(num_clips):
        first = int(rng.integers(STORED - SPAN + 1))
        decoder.read(contents[int(rng.integers(len(contents)))], range(first, first + SPAN, STRIDE))
    costs.put((time.perf_counter() - started, time.process_time() - before))


def bare(folder: Path, decoder_name: str, num_clips: int, num_workers: int) -> Cost:
    """Decode loops in `num_workers` processes."""
    context = multiprocessing.get_context("spawn")
    ready, start, costs = context.Barrier(num_workers + 1), context.Event(), context.Queue()
    share = num_clips // num_workers
    processes = [
        context.Process(target=_bare_process, args=(folder, decoder_name, share, seed, ready, start, costs))
        for seed in range(num_workers)
    ]
    for process in processes:
        process.start()
    ready.wait()
    start.set()
    found = [costs.get() for _ in processes]
    for process in processes:
        process.join()
    total = share * num_workers
    return Cost(max(wall for wall, _ in found) / total, sum(cpu for _, cpu in found) / total)


def _cost(batches: Iterator[int], num_clips: int) -> Cost:
    """Of an iterator of batch sizes, once what was read ahead before the clock started is through."""
    for _ in range(num_clips // 2 // BATCH):
        next(batches)
    before, started, count = _cpu_seconds(), time.perf_counter(), 0
    while count < num_clips:
        count += next(batches)
    wall, after = time.perf_counter() - started, _cpu_seconds()
    return Cost(wall / count, sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items()) / count)


def ours(folder: Path, _: str, num_clips: int, num_workers: int, scaled: bool = False) -> Cost:
    """StepLoader as it comes; `scaled`: and what `Batch.to` does for a training on the CPU."""
    values = {"manifest": str(folder), "num_frames": NUM_FRAMES, "frame_strides": [STRIDE], "height": HEIGHT, "width": WIDTH}
    options = {"micro_batch_size": BATCH, "num_workers": num_workers, "reading": {"prefetch_mib": 64}}
    steps = StepLoader(DataConfig.model_validate(values | options), seed=0).steps()
    try:
        batches = (batch.to("cpu") if scaled else batch for step in steps for batch in step.batches)
        return _cost((len(batch.captions) for batch in batches), num_clips)
    finally:
        steps.close()  # type: ignore[attr-defined]


def _decord_sample(sample: tuple[bytes, str]) -> tuple[torch.Tensor, str]:
    import decord

    video = decord.VideoReader(io.BytesIO(sample[0]), num_threads=1)
    first = np.random.randint(len(video) - SPAN + 1)
    frames = video.get_batch(list(range(first, first + SPAN, STRIDE))).asnumpy()
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1, sample[1]  # (T, H, W, C) -> (C, T, H, W)


def peers(folder: Path, _: str, num_clips: int, num_workers: int) -> Cost:
    """webdataset with decord in a map."""
    import webdataset

    shards = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
    dataset = webdataset.WebDataset(shards, resampled=True, shardshuffle=False).shuffle(64)
    dataset = dataset.to_tuple("mp4", "txt").map(_decord_sample).batched(BATCH)
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=num_workers, multiprocessing_context="forkserver")
    return _cost((len(batch[1]) for batch in loader), num_clips)


def fastest_decoder(folder: Path) -> str:
    """The decoder that reads these clips with the least CPU time here."""
    record = Manifest.load(folder).records("train")[0]
    content, seconds = read_clip(folder, record), {}
    for name in decode.ORDER:
        if (decoder := decode.get(name)).unavailable() is None:
            decoder.read(content, range(SPAN)[::STRIDE])
            started = time.process_time()
            for first in range(12):
                decoder.read(content, range(first, first + SPAN, STRIDE))
            seconds[name] = time.process_time() - started
    return min(seconds, key=lambda name: seconds[name])


def main() -> int:
    """Print one table: medians over the repeats, in which all take turns, and of the ratios turn by turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loader", action="store_true", required=True, help="measure the loader")
    parser.add_argument("--clips", type=int, default=96, help="clips of one measurement (default 96)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each (default 3)")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes on each side (default 2)")
    parser.add_argument("--noise", type=int, default=12, help="strength of the noise, and so bits a second (default 12)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="videofm-bench-") as name:
        folder = Path(name)
        bits = render(folder, 64, arguments.noise)
        decoder, own = fastest_decoder(folder), decode.choose("auto").name
        ways: dict[str, Callable[[Path, str, int, int], Cost]] = {
            f"bare decode ({decoder})": bare,
            f"StepLoader ({own})": ours,
            "StepLoader, float": partial(ours, scaled=True),
            "webdataset + decord": peers,
        }
        costs: dict[str, list[Cost]] = {way: [] for way in ways}
        for _ in range(arguments.repeats):
            for way, run in ways.items():
                costs[way].append(run(folder, decoder, arguments.clips, arguments.workers))
    print(f"{arguments.workers} processes, {bits / 1e6:.1f} Mbit/s   CPU ms a clip (range)   clips/s")
    for way, found in costs.items():
        cpu = [cost.cpu * 1e3 for cost in found]
        rate = 1 / statistics.median(cost.wall for cost in found)
        print(f"{way:28} {statistics.median(cpu):8.1f} ({min(cpu):.1f} to {max(cpu):.1f}) {rate:12.1f}")
    bare_costs, own_costs, float_costs, peer_costs = costs.values()
    for what, pairs in (
        ("StepLoader is {} of the bare loop", zip(bare_costs, own_costs, strict=True)),
        ("StepLoader, float, is {} times webdataset + decord", zip(peer_costs, float_costs, strict=True)),
    ):
        ratios = [(theirs.cpu / mine.cpu, theirs.wall / mine.wall) for theirs, mine in pairs]
        cpu_ratio, wall_ratio = (statistics.median(values) for values in zip(*ratios, strict=True))
        print(f"{what.format(f'{cpu_ratio:.2f}')} by CPU time, {wall_ratio:.2f} by the clock")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
