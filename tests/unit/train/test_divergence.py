"""When a run has left its course, which data it gives up, and which checkpoints are still of the course that it is on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.checkpoint.written import together
from videofm.checkpoint.peers import Peers
from videofm.config.faults import DivergenceConfig
from videofm.data.draws import PlanState
from videofm.errors import VideofmError
from videofm.run_dir import RunDirectory, write_json
from videofm.train import divergence
from videofm.train.divergence import Diverged, Divergence, is_on_course, keep_to_course, read_windows, roll_back

MESH: Any = SimpleNamespace(is_main=True, barrier=lambda: None)


def course(config: DivergenceConfig, skipped: set[int], steps: int, passed_over: int = 0) -> Divergence:
    """What has counted `steps` steps, of which those with these numbers in the order were skipped."""
    found = Divergence(config)
    for step in range(1, steps + 1):
        position = PlanState(step=step, passed_over=passed_over)
        found.count(position, position.data_step - 1 in skipped)
    return found


def test_steps_are_counted_within_the_window() -> None:
    """Two of ten are borne. Steps 3, 9 and 12 lie within ten, 3 to 12; 3, 9 and 13 do not."""
    config = DivergenceConfig(skip=2, window=10)
    for last, spent in ((12, True), (13, False)):
        found = course(config, {3, 9, last}, last + 1)
        assert found.spent is spent
        assert found.skipped == ([3, 9, 12] if spent else [9, 13])


def test_healthy_is_where_no_step_of_the_window_was_skipped() -> None:
    """Step 3 is skipped: the states after steps 3 to 12 are not to be trusted, those before and after are."""
    config = DivergenceConfig(window=10)
    assert [course(config, {3}, steps).healthy for steps in range(1, 16)] == [True] * 3 + [False] * 10 + [True] * 2


def test_without_patience_the_first_one_is_one_too_many() -> None:
    assert not course(DivergenceConfig(skip=0), set(), 5).spent and course(DivergenceConfig(skip=0), {4}, 5).spent


def test_a_state_that_goes_on_counts_as_one_that_was_never_saved() -> None:
    """What a checkpoint keeps is the list, and numbers are those of the order, so that steps which are passed over count."""
    config = DivergenceConfig(skip=1, window=6)
    whole = course(config, {3, 8}, 9)
    half = course(config, {3, 8}, 5)
    resumed = Divergence(config)
    resumed.skipped = json.loads(json.dumps(half.skipped))
    for step in range(6, 10):
        resumed.count(PlanState(step=step), step - 1 == 8)
    assert resumed.skipped == whole.skipped == [3, 8] and resumed.spent
    resumed.count(PlanState(step=10, passed_over=20), False)
    assert resumed.healthy


def a_checkpoint(run: RunDirectory, position: PlanState, healthy: bool | None = True) -> Path:
    """As far as it is looked at here: a marker of the first format, which knew nothing of health, where that is None."""
    folder = run.path / "checkpoints" / f"step_{position.step:08d}"
    write_json(folder / "state.json", {"position": position.to_json()})
    marker: dict[str, Any] = {"format": 1, "step": position.step, "time": "", "files": {}}
    write_json(folder / "COMMITTED.json", marker if healthy is None else {**marker, "healthy": healthy})
    return folder


def places(run: RunDirectory) -> list[Path]:
    return [run.path / "checkpoints"]


def names(run: RunDirectory) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in sorted((run.path / "checkpoints").glob("step_*"))]


@pytest.mark.parametrize(
    ("checkpoints", "first", "resume"),
    [
        ({10: True, 20: True, 26: False}, 22, 20),  # the newest healthy one is older than the window before the first skip
        ({10: True, 24: True, 26: False}, 24, 24),  # it is in it
        ({10: None}, 22, 10),  # of an earlier version
        ({26: False}, 26, 26),  # none is healthy: the newest one before the first skip
        ({10: False, 20: True, 26: False, 28: True}, 22, 20),  # a healthy one comes before a newer one that is not
        ({28: False}, 22, 0),  # there is none
    ],
)
def test_what_is_given_up(tmp_path: Path, checkpoints: dict[int, bool | None], first: int, resume: int) -> None:
    """Steps 25 and 27 to 29 of a run are skipped, where three of three steps before are borne: what is given up begins three
    steps before the first of those that count, 25 (out of sight by then: 27), but not before the checkpoint to go back to."""
    run = RunDirectory(tmp_path)
    for step, healthy in checkpoints.items():
        a_checkpoint(run, PlanState(step=step), healthy)
    found = course(DivergenceConfig(skip=2, window=3), {25, 27, 28, 29}, 30)
    assert found.skipped == [27, 28, 29] and found.spent
    found.config = DivergenceConfig(skip=2, window=5)
    with pytest.raises(
        Diverged, match=rf"leaving out the data of steps {first} to 29 of the order \(rollback 1 of at most 2\)"
    ):
        roll_back(run, found, PlanState(step=30), Peers(), places(run))
    (entry,) = json.loads((tmp_path / divergence.FILE).read_text())
    assert entry.pop("time")
    assert entry == {"first": first, "end": 30, "skipped": [27, 28, 29], "step": 30, "resume_step": resume}
    assert read_windows(run) == [range(first, 30)]


def test_a_checkpoint_with_skipped_steps_in_it_is_no_way_back(tmp_path: Path) -> None:
    """Its marker may say that it is healthy, if the window was shorter when it was made."""
    run = RunDirectory(tmp_path)
    a_checkpoint(run, PlanState(step=10))
    a_checkpoint(run, PlanState(step=28))
    with pytest.raises(Diverged, match="going back to the checkpoint of step 10"):
        roll_back(run, course(DivergenceConfig(skip=1, window=9), {25, 29}, 30), PlanState(step=30), Peers(), places(run))


def test_after_so_many_rollbacks_it_says_what_to_do(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    config = DivergenceConfig(skip=0, rollbacks=2, window=4)
    for number in (1, 2):
        with pytest.raises(Diverged, match=rf"going back to the start.*rollback {number} of at most 2"):
            roll_back(run, course(config, {9}, 10), PlanState(step=10), Peers(), places(run))
    told = r"1 of the last 4 steps were skipped.*went back 2 times.*rollbacks allows 2.*a smaller optimizer.lr.*start a new run"
    with pytest.raises(VideofmError, match=told) as error:
        roll_back(run, course(config, {9}, 10), PlanState(step=10), Peers(), places(run))
    assert not isinstance(error.value, Diverged) and len(read_windows(run)) == 2


def test_only_one_rank_writes_and_all_say_the_same(tmp_path: Path) -> None:
    """The ranks are on two nodes, and the second one's NFS does not show yet what was written a moment ago: the window of the
    rollback before, and a checkpoint. What the main rank sees is what counts for both."""
    write_json(tmp_path / "0" / divergence.FILE, [{"first": 1, "end": 3}])
    a_checkpoint(RunDirectory(tmp_path / "0"), PlanState(step=4, passed_over=2))

    def one_rank(peers: Peers) -> list[Any]:
        run = RunDirectory(tmp_path / str(peers.rank))
        windows = read_windows(run, peers)
        found = course(DivergenceConfig(skip=0, window=4), {9}, 8, passed_over=2)
        with pytest.raises(Diverged) as error:
            roll_back(run, found, PlanState(step=8, passed_over=2), peers, places(run))
        with pytest.raises(VideofmError, match="went back 2 times") as last:
            roll_back(run, found, PlanState(step=8, passed_over=2), peers, places(run))
        return [windows, str(error.value), str(last.value)]

    first, second = together(2, one_rank)
    assert first == second and first[0] == [range(1, 3)]
    assert "going back to the checkpoint of step 4, and leaving out the data of steps 6 to 9" in first[1]
    assert "rollback 2 of at most 2" in first[1]
    assert len(json.loads((tmp_path / "0" / divergence.FILE).read_text())) == 2
    assert not (tmp_path / "1").exists(), "only the main rank writes"


@pytest.mark.parametrize(
    ("step", "passed_over", "on_course"),
    [
        (5, 0, True),  # before
        (6, 0, True),  # at the edge: the next step is the first of the window
        (7, 0, False),  # one of it was read
        (40, 0, False),  # made before it was given up
        (6, 3, True),  # behind it: 6 steps, then 3 that were passed over
        (20, 3, True),
        (21, 3, False),  # before the second one was given up: data step 24 of 23
        (20, 5, True),
    ],
)
def test_which_states_are_on_course(step: int, passed_over: int, on_course: bool) -> None:
    """A run that leaves out data steps 6 to 8, 23 and 24, which two windows that overlap say."""
    windows = [range(6, 9), range(23, 24), range(23, 25)]
    assert is_on_course(PlanState(step=step, passed_over=passed_over), windows) is on_course


def test_checkpoints_of_a_course_that_was_given_up_are_removed(tmp_path: Path) -> None:
    """Also from a second place; a damaged one stays for whoever resumes to tell of."""
    run, spare, plans = RunDirectory(tmp_path), RunDirectory(tmp_path / "spare"), []
    plan: Any = SimpleNamespace(pass_over=plans.append)
    for step, passed_over in ((4, 0), (8, 0), (12, 0), (16, 4)):
        a_checkpoint(run, PlanState(step=step, passed_over=passed_over))
    a_checkpoint(spare, PlanState(step=13))
    damaged = a_checkpoint(run, PlanState(step=14))
    (damaged / "state.json").write_text("{")
    keep_to_course(plan, [], MESH, places(run))
    assert plans == [] and names(run) == [4, 8, 12, 14, 16]
    windows = [range(8, 12)]
    keep_to_course(plan, windows, SimpleNamespace(is_main=False, barrier=lambda: None), places(run))  # type: ignore[arg-type]
    assert plans == [windows] and names(run) == [4, 8, 12, 14, 16], "one process removes"
    keep_to_course(plan, windows, MESH, [*places(run), *places(spare)])
    assert names(run) == [4, 8, 14, 16] and names(spare) == []
    assert [path.name for path in (run.path / "checkpoints").glob(".*")] == []


def test_a_rollback_removes_what_lies_behind_the_way_back(tmp_path: Path) -> None:
    """Also what is on course but not healthy (24, of which no data are left out), so that the next attempt goes on from the
    checkpoint that the message names; one process does so, once the window is written, and a damaged one is resuming's."""
    run, spare = RunDirectory(tmp_path), RunDirectory(tmp_path / "spare")
    for step in (10, 24, 26, 29):
        a_checkpoint(run, PlanState(step=step), healthy=step == 10)
    a_checkpoint(spare, PlanState(step=30), healthy=False)
    (a_checkpoint(run, PlanState(step=28)) / "state.json").write_text("{")
    both, config = [*places(run), *places(spare)], DivergenceConfig(skip=2, window=3)
    steps: list[list[int]] = []

    class Watched(Peers):
        """Of two; what the main rank says is given to the other."""

        def share(self, value: Any) -> list[Any]:
            steps.append(names(run))
            return [value if self.is_main else ([], [24, 30, 10])[len(steps) - 1]]

    told = "the checkpoint of step 10, and leaving out the data of steps 24 to 29"
    with pytest.raises(Diverged, match=told):
        roll_back(run, course(config, {27, 28, 29}, 30), PlanState(step=30), Watched(1, 2), both)
    assert steps == [[10, 24, 26, 28, 29]] * 2 == [names(run)] * 2
    with pytest.raises(Diverged, match=told):
        roll_back(run, course(config, {27, 28, 29}, 30), PlanState(step=30), Watched(0, 2), both)
    assert steps[2:] == [[10, 24, 26, 28, 29], [10, 28]] and names(spare) == []
    assert [path for place in both for path in place.glob(".*")] == []


def test_nothing_is_removed_before_the_window_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, the next attempt would read the same data again, from further back."""
    run = RunDirectory(tmp_path)
    for step in (10, 26):
        a_checkpoint(run, PlanState(step=step), healthy=step == 10)

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(divergence, "write_json", fails)
    with pytest.raises(OSError, match="No space"):
        roll_back(run, course(DivergenceConfig(skip=0, window=3), {27}, 28), PlanState(step=28), Peers(), places(run))
    assert names(run) == [10, 26]
