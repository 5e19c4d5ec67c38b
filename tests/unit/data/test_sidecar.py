"""Sidecar shards: what is stored comes back, nothing stale or damaged is ever used, two writers agree."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from videofm.data import storage
from videofm.data.sidecar import (
    Sidecars,
    SidecarWriter,
    canonical,
    content_key,
    differences,
    hash_of,
    header_name,
    text_source,
)
from videofm.errors import DataError

HEADER = {"kind": "text", "encoder": {"weights": "a" * 64, "config": {"max_length": 8}}, "dtype": "fp32"}


def tensors(seed: int) -> dict[str, Tensor]:
    return {"text": torch.randn(3 + seed, 4, generator=torch.Generator().manual_seed(seed))}


def write(folder: Path, captions: Mapping[str, str], header: dict[str, Any] = HEADER, shard: str = "s" * 64) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / header_name("text")).write_text(canonical(header))
    with SidecarWriter(folder, "00003", "text", header, shard) as writer:
        writer.add_empty(tensors(0))
        for number, (key, caption) in enumerate(sorted(captions.items()), start=1):
            writer.add(key, tensors(number), text_source(caption))
        writer.fail("broken", "truncated")
        return writer.commit()


@pytest.mark.parametrize("remote", [False, True], ids=["local", "memory"])
def test_what_is_stored_comes_back(tmp_path: Path, remote: bool) -> None:
    write(tmp_path, {"b": "blue", "a": "red"})
    place = str(tmp_path)
    if remote:
        place = f"memory://sidecars/{tmp_path.name}"
        for found in list(storage.list_files(str(tmp_path))):
            storage.put_file(found.place, storage.join(place, found.name))
    sidecars = Sidecars(place, "text")
    assert sidecars.header == HEADER
    for key, caption, seed in (("a", "red", 1), ("b", "blue", 2), ("", "", 0)):
        torch.testing.assert_close(sidecars.read("00003", key, text_source(caption)), tensors(seed), rtol=0, atol=0)
    sidecars.check("00003", "s" * 64)


def test_the_tar_is_a_plain_one_with_the_header_first(tmp_path: Path) -> None:
    entry = write(tmp_path, {"a": "red"})
    with tarfile.open(tmp_path / entry.tar) as archive:
        names = archive.getnames()
        assert names == ["header.json", "header.empty.safetensors", "a.text.safetensors"]
        assert all((info.mtime, info.uid, info.mode) == (0, 0, 0o644) for info in archive)
        content = archive.extractfile("header.json")
        assert content is not None
        assert content.read() == canonical(HEADER).encode()
    assert entry.num_clips == 1
    assert entry.failed == {"broken": "truncated"}


def test_bytes_depend_on_content_alone(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, {"a": "red", "b": "blue"}) for name in ("one", "two"))
    assert first == second
    assert write(tmp_path / "three", {"a": "red", "b": "green"}).index_sha256 != first.index_sha256


VIDEO = {"video": "v" * 64, "frames": [0, 9, 1], "resized": [32, 40], "window": [0, 4, 32, 32]}


@pytest.mark.parametrize(
    "changed",
    [{"video": "w" * 64}, {"frames": [1, 9, 1]}, {"frames": [0, 9, 2]}, {"resized": [32, 48]}, {"window": [0, 3, 32, 32]}],
    ids=str,
)
def test_any_change_of_the_pixels_changes_the_key(changed: dict[str, Any]) -> None:
    assert content_key(hash_of(HEADER), VIDEO | changed) != content_key(hash_of(HEADER), VIDEO)


def test_weights_and_caption_change_the_key() -> None:
    other = {**HEADER, "encoder": {"weights": "b" * 64, "config": {"max_length": 8}}}
    keys = {content_key(hash_of(header), text_source(text)) for header in (HEADER, other) for text in ("red", "Red")}
    assert len(keys) == 4
    # One caption in two Unicode forms is one caption.
    assert text_source("gro\u0308\u00dfe") == text_source("gr\u00f6\u00dfe")


def test_a_changed_caption_is_stale(tmp_path: Path) -> None:
    write(tmp_path, {"a": "red"})
    with pytest.raises(DataError, match=r"the text of a in shard 00003 are stale: caption was 'red', now 'blue'"):
        Sidecars(str(tmp_path), "text").read("00003", "a", text_source("blue"))


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    write(tmp_path, {"a": "red"})
    sidecars = Sidecars(str(tmp_path), "text")
    with pytest.raises(DataError, match="does not decode: truncated"):
        sidecars.read("00003", "broken", text_source("x"))
    with pytest.raises(DataError, match="it was not among the clips encoded"):
        sidecars.read("00003", "c", text_source("x"))
    with pytest.raises(DataError, match=r"the text of shard 00004 are not in .*videofm encode"):
        sidecars.read("00004", "a", text_source("red"))
    with pytest.raises(DataError, match="has no header-latents.json: no latents were encoded there"):
        Sidecars(str(tmp_path), "latents")


def test_a_sidecar_of_another_shard_or_encoder_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a": "red"})
    with pytest.raises(DataError, match=r"shard 00003 .* are stale: they were made from a tar with SHA-256 ssssssssssss"):
        Sidecars(str(tmp_path), "text").check("00003", "t" * 64)
    (tmp_path / header_name("text")).write_text(canonical({**HEADER, "dtype": "bf16"}))
    with pytest.raises(DataError, match=r"of another encoder than header-text\.json"):
        Sidecars(str(tmp_path), "text").entry("00003")


def test_damage_is_found(tmp_path: Path) -> None:
    entry = write(tmp_path, {"a": "red"})
    tar = tmp_path / entry.tar
    content = bytearray(tar.read_bytes())
    at = bytes(content).rindex(tensors(1)["text"].numpy().tobytes()[:16])
    content[at] ^= 1
    tar.write_bytes(bytes(content))
    with pytest.raises(DataError, match="are damaged: their SHA-256 is not the one of the index"):
        Sidecars(str(tmp_path), "text").read("00003", "a", text_source("red"))
    (tmp_path / entry.index).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"shard-00003\.text\.parquet is damaged: SHA-256 expected"):
        Sidecars(str(tmp_path), "text").read("00003", "a", text_source("red"))
    (tmp_path / "manifest/shard-00003.text.json").write_text('{"version": 7}')
    with pytest.raises(DataError, match=r"not a sidecar entry of version 1 \(found version 7\)"):
        Sidecars(str(tmp_path), "text").entry("00003")


def test_nothing_is_visible_before_the_commit_and_one_of_two_writers_wins(tmp_path: Path) -> None:
    with SidecarWriter(tmp_path, "00003", "text", HEADER, "s" * 64) as late:
        late.add("a", tensors(1), text_source("red"))
        first = write(tmp_path, {"a": "red"})
        assert late.commit() == first
    assert not [path.name for path in tmp_path.rglob("*.tmp-*")]
    with SidecarWriter(tmp_path, "00004", "text", HEADER, "s" * 64) as writer:
        writer.add("a", tensors(1), text_source("red"))
    assert not list(tmp_path.rglob("*00004*"))


def test_differences_name_fields_and_shorten_hashes() -> None:
    before = {"encoder": {"weights": "a" * 64, "config": {"width": 4}}, "same": 1}
    now = {"encoder": {"weights": "b" * 64, "config": {}}, "same": 1}
    assert differences(before, now) == [
        "encoder.weights was 'aaaaaaaaaaaa', now 'bbbbbbbbbbbb'",
        "encoder.config.width was 4, now None",
    ]
