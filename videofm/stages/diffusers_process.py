"""Start `sample_with_diffusers.py` in a fresh, isolated process, watch it, and stop it on request."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from videofm.errors import CheckpointError, Interrupted, VideofmError
from videofm.run_dir import RunDirectory, read_json, write_json

_SCRIPT = Path(__file__).with_name("sample_with_diffusers.py")
_QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
_SCRATCH = ".diffusers-"
_POLL_SECONDS, _STOP_SECONDS = 0.2, 10.0


def run_diffusers(
    folder: Path, run: RunDirectory, request: Mapping[str, Any], on_poll: Callable[[Path], None] | None = None
) -> dict[str, Any]:
    """Check the exported `folder` with plain diffusers and make the videos of `request` (see the script) in a child process.

    Args:
        folder: an exported folder.
        run: whose request to stop is heard.
        request: what the script reads, without `folder` and `output`.
        on_poll: called several times a second, and once more after the last video, with the folder where `NAME.npy` appear.

    Returns:
        What the script says: version of diffusers, number of parameters by component.

    Raises:
        CheckpointError: `folder` is not an exported folder.
        Interrupted: stopped on request.
        VideofmError: the child failed; its last words are in the message.
    """
    if not (folder / "model_index.json").exists():
        raise CheckpointError(f"{folder} has no model_index.json: plain diffusers needs a folder that `videofm export` wrote.")
    on_poll = on_poll or (lambda _: None)
    for leftover in run.path.glob(f"{_SCRATCH}*"):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=run.path) as scratch:
        output, said = Path(scratch), Path(scratch) / "output.txt"
        write_json(output / "request.json", dict(request) | {"folder": str(folder), "output": str(output)})
        command = [sys.executable, "-I", str(_SCRIPT), str(output / "request.json")]
        with said.open("wb") as log:
            child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | _QUIET)
        try:
            while child.poll() is None:
                if run.stop_requested:
                    raise Interrupted("sampling with diffusers stopped on request")
                on_poll(output)
                time.sleep(_POLL_SECONDS)
        finally:
            _end(child)
        if run.stop_requested:  # Ctrl-C reaches the child too, and may end it first
            raise Interrupted("sampling with diffusers stopped on request")
        if child.returncode != 0:
            last = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
            raise VideofmError(f"diffusers could not use {folder} (exit code {child.returncode}): {' | '.join(last)}")
        on_poll(output)
        return dict(read_json(output / "result.json"))


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
