"""Clips a second of StepLoader (decoding each time, with workers, from memory) against a bare decode loop over the same clips.

python tools/bench/loader.py [--clips 256] [--repeats 3]

The bare loop has the compressed bytes in memory and calls the decoder; StepLoader also plans, reads the shards and makes
tensors, on one thread. Time counts from the first batch on, so that the start of decoding processes does not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for the renderer of the tests

from tests.demo_shards import write_demo_shards  # noqa: E402
from videofm.config.data import DataConfig  # noqa: E402
from videofm.data import decode  # noqa: E402
from videofm.data.loader import StepLoader  # noqa: E402
from videofm.data.manifest import Manifest  # noqa: E402
from videofm.data.shards import read_clip  # noqa: E402

NUM_FRAMES, STORED_FRAMES, SIZE, BATCH = 9, 20, 32, 16


def bare(folder: Path, num_clips: int) -> Callable[[], float]:
    """Decode clips in their order on disk, 9 of 20 frames of each; clips a second."""
    decoder = decode.choose("auto")
    records = Manifest.load(folder).records("train")
    contents = [read_clip(folder, record) for record in records]

    def decode_all() -> float:
        started = time.perf_counter()
        for index in range(num_clips):
            decoder.read(contents[index % len(contents)], range(NUM_FRAMES))
        return num_clips / (time.perf_counter() - started)

    return decode_all


def loader(folder: Path, num_clips: int, **changes: Any) -> Callable[[], float]:
    """Take batches of a StepLoader until `num_clips` are full; clips a second. A cache lives from call to call."""
    size = {"num_frames": NUM_FRAMES, "height": SIZE, "width": SIZE, "micro_batch_size": BATCH}
    steps = StepLoader(DataConfig.model_validate({"manifest": str(folder)} | size | changes), seed=0)

    def take() -> float:
        endless, count = steps.steps(), 0
        next(endless)
        started = time.perf_counter()
        while count < num_clips:
            count += sum(len(batch.captions) for batch in next(endless).batches)
        return count / (time.perf_counter() - started)

    return take


def main() -> int:
    """Print one table: median and range over the repeats, which take turns; the first round does not count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=256, help="clips of one measurement (default 256)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each (default 3)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="videofm-bench-") as name:
        folder = write_demo_shards(Path(name), num_clips=128, num_frames=STORED_FRAMES, size=SIZE, held_out=0)
        ways = {
            "bare decode loop": bare(folder, arguments.clips),
            "StepLoader": loader(folder, arguments.clips),
            "StepLoader, 2 workers": loader(folder, arguments.clips, num_workers=2),
            "StepLoader, clips in memory": loader(folder, arguments.clips, cache_mib=512),
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(arguments.repeats + 1):
            for way, run in ways.items():
                rates[way].append(run())
    reference = statistics.median(rates["bare decode loop"][1:])
    print(f"{'clips/s':30} {'median':>9} {'lowest':>9} {'highest':>9}  of bare")
    for way, (_, *counted) in rates.items():
        middle = statistics.median(counted)
        print(f"{way:30} {middle:9.0f} {min(counted):9.0f} {max(counted):9.0f}  {middle / reference:7.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
