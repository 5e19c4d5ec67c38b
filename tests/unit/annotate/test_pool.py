"""Votes are begun on candidates that stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.annotate_candidates import write_candidates
from videofm.annotate.pool import open_store
from videofm.config.base import Section
from videofm.errors import DataError
from videofm.run_dir import RunDirectory


class Plan(Section):
    """A config of a run that stands for `dpo generate`."""

    kind: str = "dpo_generate"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run of which one shard is committed; it goes on."""
    found = RunDirectory.create(write_candidates(tmp_path / "candidates", num_candidates=2), Plan())
    found.start_attempt()
    return found


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (None, "no outcome yet: it is running, or was killed"),
        ("interrupted", "interrupted"),
        ("failed", "failed"),
    ],
)
def test_no_votes_are_begun_on_a_run_that_is_not_finished(run: RunDirectory, state: str | None, said: str) -> None:
    """Its next shard would make them votes on other candidates; nothing is left behind, and once it has finished they begin."""
    if state is not None:
        run.set_outcome(state)
    votes = run.path / "annotations" / "votes.sqlite"
    with pytest.raises(DataError, match=rf"candidates is a run that is not finished \({said}\).*Let it finish first"):
        open_store(run.path, votes)
    assert not votes.parent.exists()
    run.set_outcome("finished")
    pool, store = open_store(run.path, votes)
    store.close()
    assert len(pool.pairs) == 3


def test_a_run_without_a_shard_yet_is_told_to_be_unfinished(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "candidates", Plan())
    run.start_attempt()
    with pytest.raises(DataError, match="is a run that is not finished"):
        open_store(run.path, tmp_path / "votes.sqlite")


def test_votes_that_were_begun_are_taken_up_whatever_the_run_does(run: RunDirectory, tmp_path: Path) -> None:
    """It is the candidates that must be the same, and a file of votes knows which they are."""
    run.set_outcome("finished")
    open_store(run.path, tmp_path / "votes.sqlite")[1].close()
    run.start_attempt()
    open_store(run.path, tmp_path / "votes.sqlite")[1].close()
    with pytest.raises(DataError, match="is a run that is not finished"):
        open_store(run.path, tmp_path / "others.sqlite")
