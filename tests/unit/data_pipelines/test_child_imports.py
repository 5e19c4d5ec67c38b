"""A source's fork loads no module: what it needs was loaded once, in its parent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.unit.data_pipelines import media

PROGRAM = """
import sys
from pathlib import Path
from data_pipelines import child
from data_pipelines.rows import Row
from data_pipelines.workspace import Workspace

path, scratch = map(Path, sys.argv[1:])
rules = [{"score": "motion", "min": 0.0, "reason": "static"}]
sections = [{"kind": "probe"}, {"kind": "split", "min_frames": 2}, {"kind": "borders"}, {"kind": "scores", "text": True}]
sections += [{"kind": "filter", "rules": rules}, {"kind": "caption"}, {"kind": "transcode", "short_side": 48, "min_frames": 2}]
stages = child.build_stages(sections)
before = set(sys.modules)
*_, last = child.run_stages(stages, [Row("a" * 24, path.name, str(path), path.stat().st_size)], Workspace(path, scratch))
assert last["rows"], last
print(sorted(set(sys.modules) - before))
"""


def test_a_fork_loads_nothing(tmp_path: Path) -> None:
    path = media.write(tmp_path / "clip.mp4", media.coded())
    found = subprocess.run([sys.executable, "-c", PROGRAM, path, tmp_path], capture_output=True, text=True, check=False)
    assert found.stdout == "[]\n", found.stdout + found.stderr
