"""Run as a file in a process of its own: load an exported folder with plain diffusers, check it, make videos.

Usage: `python -I sample_with_diffusers.py REQUEST.json`. This file imports nothing of videofm, which is the point: what it
makes, any user of diffusers makes. The request holds `folder`, `output` (a folder), `prompts` (may be empty: then the export
is only checked), `all_prompts` (those of earlier calls too, to count which are cut), `seeds` (one generator seed each), `names`
(one each), and `num_frames height width fps num_steps
guidance_scale batch_size`. Videos go to `output/NAME.npy`, uint8 `(T, H, W, 3)`; each appears when it is whole, and
`output/result.json` comes last.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

# Component of the pipeline -> class that reads it.
_CLASSES = {
    "transformer": diffusers.LTXVideoTransformer3DModel,
    "vae": diffusers.AutoencoderKLLTXVideo,
    "text_encoder": transformers.T5EncoderModel,
}

_MAX_TOKENS = 128
"""Tokens of a prompt that LTXPipeline reads, by default."""


def check(folder: str) -> dict[str, Any]:
    """Load each component; number of parameters by component. Exits with a message when keys are missing or left over."""
    counts = {}
    for name, kind in _CLASSES.items():
        model, info = kind.from_pretrained(folder, subfolder=name, output_loading_info=True, local_files_only=True)
        problems = {key: list(map(str, value)) for key, value in info.items() if value}
        if problems:
            sys.exit(f"{folder}/{name} does not fit {kind.__name__}: {problems}")
        counts[name] = sum(parameter.numel() for parameter in model.parameters())
    return {"diffusers": diffusers.__version__, "num_parameters": counts}


def sample(request: dict[str, Any], output: Path) -> int:
    """Make the videos of `request`, a batch at a time; how many of all prompts are longer than the pipeline takes."""
    pipeline = diffusers.LTXPipeline.from_pretrained(request["folder"], local_files_only=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    size = request["batch_size"]
    for start in range(0, len(request["prompts"]), size):
        part = slice(start, start + size)
        frames = pipeline(
            prompt=request["prompts"][part],
            num_frames=request["num_frames"],
            height=request["height"],
            width=request["width"],
            frame_rate=request["fps"],
            num_inference_steps=request["num_steps"],
            guidance_scale=request["guidance_scale"],
            generator=[torch.Generator().manual_seed(seed) for seed in request["seeds"][part]],
            max_sequence_length=_MAX_TOKENS,
            output_type="np",
        ).frames
        for name, video in zip(request["names"][part], frames, strict=True):
            aside = output / f".{name}.tmp.npy"
            np.save(aside, np.rint(video * 255).clip(0, 255).astype(np.uint8), allow_pickle=False)
            os.replace(aside, output / f"{name}.npy")
    return sum(len(ids) > _MAX_TOKENS for ids in pipeline.tokenizer(request["all_prompts"]).input_ids)


def main() -> None:
    """Do what the request file says."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    output = Path(request["output"])
    result = check(request["folder"])
    if request["prompts"]:
        result["num_cut_prompts"] = sample(request, output)
    assert "videofm" not in sys.modules, "this process must not have imported videofm"
    (output / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
