"""Write a folder aside and put it in the place of an older one as a whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from videofm.errors import ConfigError


@contextmanager
def replacing(output: str | Path, marker: str) -> Iterator[Path]:
    """A folder to write into, which takes the place of `output` once the block ends without an error.

    Raises:
        ConfigError: `output` exists and has no file `marker`, so it is something else than an older export.
    """
    output = Path(output)
    _check_replaceable(output, marker)
    aside = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        _replace(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_replaceable(output: Path, marker: str) -> None:
    if not output.exists():
        return
    if not output.is_dir() or (any(output.iterdir()) and not (output / marker).exists()):
        raise ConfigError(
            f"{output} exists and is not an exported folder (it has no {marker}): it is not replaced. "
            "Choose another output, or move it away."
        )


def _replace(aside: Path, output: Path) -> None:
    # No call exchanges two folders everywhere: for a moment between two renames there is none. A crash there leaves both.
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        os.rename(output, old)
    try:
        os.rename(aside, output)
    except OSError:
        if old.exists():
            os.rename(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)
