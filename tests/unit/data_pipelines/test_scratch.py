"""Scratch folders: gone at the end, and those of killed processes are cleared away, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.scratch import CLIPS, RAY, here, remove_stale, scratch_folder


@pytest.fixture
def dead_pid() -> int:
    """The id of a process that has ended and was waited for."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_scratch_folder_lives_as_long_as_its_context(tmp_path: Path) -> None:
    with scratch_folder(CLIPS, tmp_path) as folder:
        (folder / "clip.mp4").write_bytes(b"x")
        assert folder.name.startswith(f"videofm-clips-{here()}-{os.getpid()}-")
    assert list(tmp_path.iterdir()) == []


def test_a_scratch_folder_goes_when_the_work_fails(tmp_path: Path) -> None:
    def work() -> None:
        with scratch_folder(CLIPS, tmp_path):
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        work()
    assert list(tmp_path.iterdir()) == []


def test_only_what_dead_processes_left_is_removed(tmp_path: Path, dead_pid: int) -> None:
    """Another kind, a living process (this one, and process 1), a name without a process id, a file, a link, and folders of
    another machine or container, where that process may live, all stay."""
    ours, elsewhere = f"{RAY}-{here()}", f"{RAY}-{'0000' if here() != '0000' else '1111'}"
    stale = [f"{ours}-{dead_pid}-abc123_x", f"{ours}-{dead_pid}-second"]
    kept = [f"{ours}-{os.getpid()}-mine", f"{ours}-1-init", f"{CLIPS}-{here()}-{dead_pid}-other", f"{RAY}-notes"]
    kept += [f"{ours}-{10**30}-x", f"{elsewhere}-{dead_pid}-theirs", f"{RAY}-{dead_pid}-nobodys"]
    for name in (*stale, *kept):
        (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / f"{ours}-{dead_pid}-file").write_text("")
    (tmp_path / f"{ours}-{dead_pid}-link").symlink_to(tmp_path / kept[0])
    assert sorted(remove_stale(RAY, tmp_path)) == sorted(stale)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*kept, f"{ours}-{dead_pid}-file", f"{ours}-{dead_pid}-link"]
    )


def test_making_one_clears_the_dead_of_its_kind(tmp_path: Path, dead_pid: int) -> None:
    (tmp_path / f"{CLIPS}-{here()}-{dead_pid}-a").mkdir()
    with scratch_folder(CLIPS, tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder]
