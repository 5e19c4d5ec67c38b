"""Preference tuning by votes that are cast on the page: configs/dpo/quickstart.yaml with an annotator in the place of the rule.

    python -m tools.tune_by_votes runs/dpo --votes 900

After that recipe has run: serves its candidates by `videofm dpo annotate`, lets a scripted annotator look at both videos of a
pair in a real Chromium and press a button, exports the votes, and runs the recipe's stages `tune`, `sample` and `evaluate` with
them. The annotator says which shape moves as the prompt tells; where both do or none does, it is a tie.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tools.scripted_annotator import by_score, cast_votes, serving
from videofm.evaluation.caption_following import ShapeClassifier
from videofm.media import Frames
from videofm.run_dir import read_json, write_atomic
from videofm.shapes import COLOURS, DIRECTIONS


def main() -> None:
    """Vote, tune, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of configs/dpo/quickstart.yaml, finished")
    parser.add_argument("--votes", type=int, default=900, help="pairs to judge")
    arguments = parser.parse_args()
    stages, folder = arguments.run / "stages", arguments.run / "votes"
    folder.mkdir(exist_ok=True)
    store, pairs = folder / "votes.sqlite", folder / "preferences"
    options = ("--store", str(store), "--num-pairs", str(arguments.votes), "--overlap", "0")
    started = time.monotonic()
    with serving(stages / "candidates", *options) as addresses:
        count = cast_votes(addresses[0], by_score(_follows), annotator="script")
    print(f"{count} votes in {time.monotonic() - started:.0f} s", flush=True)
    _videofm("dpo", "annotate", str(stages / "candidates"), "--store", str(store), "--export", str(pairs))
    config = folder / "config.json"  # not recipe.json, which is the run's own record
    write_atomic(config, json.dumps(_recipe(stages, folder, pairs), indent=2))  # stages in their order
    _videofm("run", str(config))
    print(json.dumps(read_json(folder / "stages/evaluate/evaluation.json")["metrics"], indent=2))


def _follows(frames: Frames, prompt: str) -> float:
    """1 where the shape moves as the prompt says, else 0."""
    return float(_CLASSIFIER.look(frames).direction == _CLASSIFIER.named(prompt).direction)


_CLASSIFIER = ShapeClassifier(COLOURS, DIRECTIONS)


def _recipe(stages: Path, folder: Path, pairs: Path) -> dict[str, Any]:
    """The recipe's stages from the tuning on, with the votes in the place of the ranks."""
    tune, sample = (read_json(stages / name / "config.yaml") for name in ("tune", "sample"))
    tune["data"]["pairs"]["path"] = str(pairs)
    sample["run"] = "${stage.tune}"
    held_out = {"kind": "held_out_loss", "run": "${stage.tune}", "manifest": tune["held_out"]["manifest"]}
    cut = {name: tune["data"][name] for name in ("num_frames", "height", "width")}
    metrics = [{"kind": "caption_following", "samples": "${stage.sample}"}, {**held_out, **cut}]
    evaluate = {"kind": "evaluate", "metrics": metrics}
    return {"name": "votes", "run": str(folder), "stages": {"tune": tune, "sample": sample, "evaluate": evaluate}}


def _videofm(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "videofm", *arguments], check=True)


if __name__ == "__main__":
    main()
