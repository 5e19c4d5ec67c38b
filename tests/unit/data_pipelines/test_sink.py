"""The copy of a dataset to a place elsewhere: to whom the place belongs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from data_pipelines import curate, sink
from videofm.errors import DataError


def finished(folder, config_hash):
    """A curation that is done but for the copy."""
    (folder / "manifest").mkdir(parents=True)
    (folder / "manifest" / curate.SNAPSHOT).write_bytes(b"rows")
    return SimpleNamespace(folder=folder, hash=config_hash, groups=[[]], upload=lambda output, groups: None)


def test_two_datasets_of_one_config_do_not_mix(tmp_path):
    output = str(tmp_path / "out")
    curate._upload(output, finished(tmp_path / "a", "config"), "dataset a")
    with pytest.raises(
        DataError, match="holds another dataset .manifest hash dataset a, this one has dataset b.; set `output`"
    ):
        curate._upload(output, finished(tmp_path / "b", "config"), "dataset b")
    curate._upload(output, finished(tmp_path / "again", "config"), "dataset a")  # the same, made anew


def test_a_claim_that_cannot_be_read(tmp_path):
    (tmp_path / sink.CLAIM).write_text("[]")
    with pytest.raises(DataError, match="curation.json is no claim of a curation; set `output` to another place"):
        sink.claim(str(tmp_path), "dataset a")
