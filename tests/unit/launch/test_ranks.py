"""What ranks wrote and how they ended becomes one outcome, which knows its error and whether another attempt may help."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.ranks import Attempt, Outcome, outcome_of
from videofm.errors import CheckpointError, ConfigError, DataError, Interrupted, TransientError, VideofmError
from videofm.run_dir import RunDirectory, write_json

NOTICED = "all_reduce over the data group (ranks 0, 1) failed"


def say(folder: Path, rank: int, state: str, message: str = "", kind: str = "") -> None:
    write_json(folder / f"rank_{rank}.json", {"state": state, "message": message, "kind": kind})


@pytest.mark.parametrize(
    ("kind", "error", "exit_code", "again"),
    [
        ("ConfigError", ConfigError, 2, False),
        ("DataError", DataError, 1, False),
        ("CheckpointError", CheckpointError, 1, False),
        ("VideofmError", VideofmError, 1, False),
        ("TransientError", TransientError, 1, True),
        ("CollectiveError", VideofmError, 1, True),
        ("", VideofmError, 1, True),
    ],
)
def test_the_class_of_a_failure_is_kept(
    tmp_path: Path, kind: str, error: type[VideofmError], exit_code: int, again: bool
) -> None:
    """And decides about another attempt: what is wrong in the request, the data or a checkpoint would be so again."""
    say(tmp_path, 0, "failed", "no size is called 'tyni'", kind)
    outcome = outcome_of(tmp_path, {0: 1})
    with pytest.raises(VideofmError, match="^no size is called 'tyni'$") as caught:
        raise outcome.error()
    assert (type(caught.value), caught.value.exit_code) == (error, exit_code)
    assert (outcome.state, outcome.rank, outcome.may_restart) == ("failed", 0, again)


def test_who_said_why_comes_before_who_just_died(tmp_path: Path) -> None:
    say(tmp_path, 1, "failed", "the disk is full")
    (tmp_path / "rank_1_traceback.txt").write_text("...")
    outcome = outcome_of(tmp_path, {0: 3, 1: 1})
    assert (outcome.state, outcome.rank) == ("failed", 1)
    assert outcome.message == f"the disk is full (rank 1); traceback in {tmp_path / 'rank_1_traceback.txt'}"


def test_the_cause_comes_before_who_noticed(tmp_path: Path) -> None:
    """A rank that waited for another says so; what counts is why the other failed, or how it died."""
    say(tmp_path, 0, "failed", NOTICED, "CollectiveError")
    outcome = outcome_of(tmp_path, {0: 1, 1: -9})
    assert outcome == Outcome("died", f"rank 1 was killed by SIGKILL; rank 0 says: {NOTICED}", rank=1)
    say(tmp_path, 1, "failed", "no clip", "DataError")
    assert outcome_of(tmp_path, {0: 1, 1: 1}) == Outcome("failed", "no clip (rank 1)", "DataError", 1)


def test_a_rank_that_was_killed_comes_before_what_others_say(tmp_path: Path) -> None:
    """Here the thread that saves says that the checkpoint failed: another attempt is worth it all the same."""
    say(tmp_path, 0, "failed", "the checkpoint of step 6 could not be written", "CheckpointError")
    outcome = outcome_of(tmp_path, {0: 1, 1: -9})
    told = "rank 1 was killed by SIGKILL; rank 0 says: the checkpoint of step 6 could not be written"
    assert outcome == Outcome("died", told, rank=1)
    assert outcome.may_restart
    assert outcome_of(tmp_path, {0: 1, 1: -6}).kind == "CheckpointError"  # aborted: by a library, as another rank had left
    assert outcome_of(tmp_path, {0: 1, 1: None}).kind == "CheckpointError"
    assert outcome_of(tmp_path, {0: 1, 1: None}, gone={1: "node n2"}).state == "died"


def test_who_noticed_is_told_where_nobody_failed(tmp_path: Path) -> None:
    """As where a rank hangs: it is ended by the launcher, which is no cause."""
    say(tmp_path, 0, "failed", NOTICED, "CollectiveError")
    outcome = outcome_of(tmp_path, {0: 1, 1: -9}, ended={1})
    assert outcome == Outcome("failed", f"{NOTICED} (rank 0)", "CollectiveError", 0)


def test_a_rank_that_hung_is_told_and_its_silent_neighbour_is_not(tmp_path: Path) -> None:
    """A stopped process says nothing and is ended by the launcher; the watchdogs of the others speak."""
    say(tmp_path, 1, "hung", "no step for 900 s after step 12, in barrier")
    outcome = outcome_of(tmp_path, {0: -9, 1: 1}, ended={0})
    assert (outcome.state, outcome.message) == ("hung", "no step for 900 s after step 12, in barrier (rank 1)")
    assert outcome.may_restart


def test_ranks_that_diverged_agree(tmp_path: Path) -> None:
    for rank in range(2):
        say(tmp_path, rank, "diverged", "11 of 100 steps were skipped")
    outcome = outcome_of(tmp_path, {0: 1, 1: 1})
    assert (outcome.state, outcome.message, outcome.may_restart) == ("diverged", "11 of 100 steps were skipped", True)


@pytest.mark.parametrize(
    ("code", "how"),
    [(3, "ended with code 3"), (0, "ended with code 0"), (-11, "was killed by SIGSEGV"), (-63, "was killed by signal 63")],
)
def test_a_silent_rank_is_told_with_how_it_ended(tmp_path: Path, code: int, how: str) -> None:
    """Also with code 0: one that has not said that it finished has not."""
    assert outcome_of(tmp_path, {0: code}) == Outcome("died", f"rank 0 {how}", rank=0)


def test_a_launcher_need_not_know_codes(tmp_path: Path) -> None:
    """Where one code stands for many, the rank whose end is known is told, and a place that is gone is named."""
    say(tmp_path, 0, "finished")
    assert outcome_of(tmp_path, {0: 0, 1: None}).message == "rank 1 ended without a word"
    assert outcome_of(tmp_path, {0: 0, 1: None, 2: -9}).message == "rank 2 was killed by SIGKILL"
    outcome = outcome_of(tmp_path, {0: 0, 1: None}, gone={1: "node n2"})
    assert (outcome.message, outcome.gone) == ("rank 1 ended without a word on node n2, which is gone", {1: "node n2"})


def test_a_stop_is_no_failure_and_no_reason_to_go_on(tmp_path: Path) -> None:
    say(tmp_path, 0, "interrupted", "stopped after step 3")
    say(tmp_path, 1, "interrupted", "stopped after step 3")
    outcome = outcome_of(tmp_path, {0: 75, 1: 75})
    with pytest.raises(Interrupted, match="^stopped after step 3$"):
        raise outcome.error()
    assert not outcome.may_restart


def test_all_must_have_finished(tmp_path: Path) -> None:
    say(tmp_path, 0, "finished")
    assert outcome_of(tmp_path, {0: 0}) == Outcome("finished")
    assert outcome_of(tmp_path, {0: 0, 1: -9}, ended={1}).state == "died"


def test_every_rank_is_told_its_place(tmp_path: Path) -> None:
    attempt = Attempt(RunDirectory(tmp_path), tmp_path / "attempts" / "0012", 8)
    assert attempt.command[1:] == ["-m", "videofm.train.worker", str(tmp_path), "12"]
    assert attempt.environment(5, 1, 4) == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    assert attempt.output(5) == tmp_path / "attempts/0012/rank_5.out"


def test_a_stop_that_a_full_disk_kept_from_being_told_is_a_stop(tmp_path: Path) -> None:
    """Ranks that could not write their word say by their code how they ended; one that could is heard before them."""
    outcome = outcome_of(tmp_path, {0: 75, 1: 75})
    assert (outcome.state, outcome.rank, outcome.may_restart) == ("interrupted", 0, False)
    with pytest.raises(Interrupted, match=r"^rank 0 was interrupted, as its exit code 75 says.*disk.*is full"):
        raise outcome.error()
    say(tmp_path, 1, "interrupted", "its state is in spare/step_00000004")
    assert outcome_of(tmp_path, {0: 75, 1: 75}) == Outcome("interrupted", "its state is in spare/step_00000004", rank=1)
    assert outcome_of(tmp_path, {0: 75, 1: 75, 2: 1}).state == "died"
    assert outcome_of(tmp_path, {0: 75}, gone={0: "node n2"}).state == "died"
