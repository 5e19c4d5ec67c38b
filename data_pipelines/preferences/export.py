"""`videofm dpo export`: preferences as JSON lines and video files, which others read and `videofm dpo import` reads back."""

from __future__ import annotations

import json
from pathlib import Path

from data_pipelines.preferences.lists import line_of
from videofm.data import storage
from videofm.data.index import ClipRecord
from videofm.data.manifest import SPLITS, Manifest
from videofm.data.preferences import PreferencePair, Side, describe_pair, read_preferences
from videofm.data.shards import read_clip
from videofm.errors import ConfigError, DataError
from videofm.run_dir import write_atomic


def export_preferences(preferences: Path, output: Path) -> int:
    """Write `pairs.jsonl` (last, so that it stands for a whole export) and `videos/KEY.mp4` into the folder `output`.

    Returns:
        the number of pairs.

    Raises:
        ConfigError: `output` holds something already, or the clips are not on this machine.
        DataError: the preferences are damaged, or a pair names a clip that is not in its dataset, or another file.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is not empty; export into a folder that is new")
    found = read_preferences(preferences)
    if not storage.is_local(found.clips):
        raise ConfigError(f"the clips of {preferences} are at {storage.redacted(found.clips)}; copy them to this machine first")
    manifest = Manifest.load(found.clips)
    records = {record.key: record for split in SPLITS for record in manifest.records(split)}
    folder = output / "videos"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for pair in found.pairs:
        names = []
        for side in (pair.winner, pair.loser):
            record = _record(pair, side, records, found.clips)
            path = folder / f"{side.key}.mp4"
            if not path.exists():
                path.write_bytes(read_clip(manifest.folder, record))
            names.append(path.relative_to(output).as_posix())
        lines.append(json.dumps(line_of(pair, *names), sort_keys=True, ensure_ascii=False))
    write_atomic(output / "pairs.jsonl", "".join(f"{line}\n" for line in lines))
    return len(lines)


def _record(pair: PreferencePair, side: Side, records: dict[str, ClipRecord], clips: str) -> ClipRecord:
    record = records.get(side.key)
    if record is None:
        raise DataError(
            f"{describe_pair(pair)}: the dataset {clips} has no clip {side.key}; give the preferences their dataset"
        )
    if record.sha256 != side.sha256:
        raise DataError(
            f"{describe_pair(pair)}: clip {side.key} has the SHA-256 {record.sha256}, the pair says {side.sha256}: the dataset "
            f"{clips} is another one than was judged"
        )
    return record
