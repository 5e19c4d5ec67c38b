"""When ranks are started again, when not, and what is said then; with a launcher that plays what it is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from launch import supervise as supervisor
from launch.ranks import Attempt, Outcome
from launch.supervise import supervise
from videofm.config.train import TrainConfig
from videofm.errors import ConfigError, Interrupted, ParallelError, TransientError, VideofmError
from videofm.run_dir import RunDirectory, read_json, read_jsonl

DIED = Outcome("died", "rank 1 was killed by SIGKILL", rank=1)
FINISHED = Outcome("finished")


def config(max_restarts: int = 3, fewer_ranks: bool = False, rollbacks: int = 2, **parallel: int) -> TrainConfig:
    """A training on four micro-batches; nothing of it is run."""
    return TrainConfig.model_validate(
        {
            "kind": "train",
            "models": {"vae": {"name": "vae/ltx", "size": "tiny"}},
            "objective": {"kind": "autoencoder"},
            "data": {
                "manifest": "nowhere",
                "num_frames": 9,
                "height": 32,
                "width": 32,
                "micro_batch_size": 1,
                "num_micro_batches": 4,
            },
            "optimizer": {"lr": 1e-3},
            "trainer": {"max_steps": 100},
            "parallel": parallel,
            "faults": {"max_restarts": max_restarts, "fewer_ranks": fewer_ranks, "divergence": {"rollbacks": rollbacks}},
        }
    )


class Played:
    """A launcher whose attempts end as `script` says: the step that each reaches, and its outcome (or what it does)."""

    def __init__(self, *script: tuple[int, Outcome | Callable[[], Outcome]]) -> None:
        self.script, self.running = list(script), 0
        self.attempts: list[Attempt] = []

    def __call__(self, attempt: Attempt) -> Played:
        self.attempts.append(attempt)
        self.running += 1
        return self

    def wait(self) -> Outcome:
        step, outcome = self.script[len(self.attempts) - 1]
        row = {"step": step, "attempt": self.attempts[-1].number, "seconds": 1.0, "data_wait": 0.0}
        with self.attempts[-1].run.metrics_path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return outcome if isinstance(outcome, Outcome) else outcome()

    def end(self) -> None:
        self.running = 0


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.0)
    found = RunDirectory.create(tmp_path / "run", config())
    found.start_attempt()
    return found


def outcomes(run: RunDirectory) -> list[tuple[str, str]]:
    found = sorted(run.path.glob("attempts/*/outcome.json"))
    return [(read_json(path)["state"], read_json(path)["message"]) for path in found]


def events(run: RunDirectory, name: str) -> list[dict[str, Any]]:
    return [event for event in read_jsonl(run.path / "events.jsonl") if event["event"] == name]


def test_a_rank_that_died_is_followed_by_another_attempt(run: RunDirectory) -> None:
    """Which has a folder of its own; that of the first says how it ended, and the verb writes the last outcome itself."""
    launcher = Played((3, DIED), (9, FINISHED))
    assert supervise(run, config(), launcher) is not None
    assert [attempt.folder.name for attempt in launcher.attempts] == ["0001", "0002"]
    assert outcomes(run) == [("failed", "rank 1 was killed by SIGKILL")]
    assert [(event["attempt"], event["state"]) for event in events(run, "ended")] == [(1, "died"), (2, "finished")]
    assert launcher.running == 0


@pytest.mark.parametrize(
    "outcome",
    [
        DIED,
        Outcome("hung", "no step for 900 s"),
        Outcome("diverged", "11 of 100 steps were skipped"),
        Outcome("failed", "RuntimeError: DataLoader worker is killed"),
        Outcome("failed", "barrier failed", "CollectiveError"),
        Outcome("failed", "the store does not answer", "TransientError"),
    ],
    ids=lambda outcome: f"{outcome.state}-{outcome.kind}",
)
def test_what_may_pass_is_tried_again(run: RunDirectory, outcome: Outcome) -> None:
    launcher = Played((3, outcome), (9, FINISHED))
    supervise(run, config(), launcher)
    assert len(launcher.attempts) == 2


@pytest.mark.parametrize("kind", ["ConfigError", "DataError", "CheckpointError", "ParallelError", "VideofmError"])
def test_a_wrong_request_is_not_tried_again(run: RunDirectory, kind: str) -> None:
    """Nor data, a checkpoint or a layout that do not fit: the message is that of the rank, and nothing else."""
    launcher = Played((3, Outcome("failed", "no clip", kind)), (9, FINISHED))
    with pytest.raises(VideofmError, match="^no clip$") as caught:
        supervise(run, config(), launcher)
    assert type(caught.value).__name__ == kind
    assert len(launcher.attempts) == 1


def test_a_run_that_was_stopped_is_not_started_again(run: RunDirectory) -> None:
    launcher = Played((3, Outcome("interrupted", "stopped on request after step 3 of 9")), (9, FINISHED))
    with pytest.raises(Interrupted, match="^stopped on request after step 3 of 9$"):
        supervise(run, config(), launcher)
    assert len(launcher.attempts) == 1


def test_the_limit_is_told_with_the_attempts_and_the_last_cause(run: RunDirectory) -> None:
    """Each attempt makes new steps, and yet a limit is a limit."""
    last = Outcome("died", "rank 0 ended with code 3", rank=0)
    launcher = Played((3, DIED), (5, DIED), (7, last), (9, FINISHED))
    with pytest.raises(
        VideofmError,
        match=r"^3 attempts failed, and faults.max_restarts 2 allows no more; the last: rank 0 ended with code 3; run the same "
        "command again to go on from the last checkpoint$",
    ):
        supervise(run, config(max_restarts=2), launcher)
    assert len(launcher.attempts) == 3


def test_without_restarts_the_cause_stands_alone(run: RunDirectory) -> None:
    with pytest.raises(VideofmError, match="^rank 1 was killed by SIGKILL; run the same command again to go on"):
        supervise(run, config(max_restarts=0), Played((3, DIED)))


def test_advice_is_given_once(run: RunDirectory) -> None:
    """The message of a failed collective has it already."""
    outcome = Outcome(
        "failed", "barrier failed. Run the same command again to go on from the last checkpoint.", "CollectiveError"
    )
    with pytest.raises(VideofmError, match=r"^barrier failed\. Run the same command again to go on from the last checkpoint$"):
        supervise(run, config(max_restarts=0), Played((3, outcome)))


def test_a_crash_that_comes_again_is_not_repeated(run: RunDirectory) -> None:
    """The first attempt does steps 1 to 5, the two after it begin at a checkpoint and come to step 5 again, no further."""
    launcher = Played((5, DIED), (5, DIED), (4, DIED), (9, FINISHED))
    with pytest.raises(
        VideofmError,
        match=r"^2 attempts in a row ended without a step beyond 5, so another one would not help: rank 1 was killed",
    ):
        supervise(run, config(max_restarts=9), launcher)
    assert len(launcher.attempts) == 3


def test_a_new_step_between_two_fruitless_attempts_begins_their_count_anew(run: RunDirectory) -> None:
    launcher = Played((5, DIED), (5, DIED), (6, DIED), (6, DIED), (9, FINISHED))
    supervise(run, config(max_restarts=9), launcher)
    assert len(launcher.attempts) == 5


def test_rollbacks_have_a_limit_of_their_own(run: RunDirectory) -> None:
    """They read other data, so that an earlier step is no repetition; and no restart of a rank that died is used up."""
    back = Outcome("diverged", "11 of 100 steps were skipped")
    supervise(run, config(max_restarts=0), Played((5, back), (3, back), (9, FINISHED)))
    with pytest.raises(
        VideofmError, match=r"^2 attempts failed, and faults.divergence.rollbacks 1 allows no more; .* skipped; run"
    ):
        supervise(run, config(rollbacks=1), Played((5, back), (3, back), (9, FINISHED)))


def test_a_stop_while_ranks_die_is_a_stop(run: RunDirectory) -> None:
    """A scheduler that ends a job asks first and kills then; the work can go on, and the message says what was not saved."""

    def stop() -> Outcome:
        run.request_stop()
        return DIED

    launcher = Played((3, stop), (9, FINISHED))
    with pytest.raises(Interrupted, match="^stopped on request before everything was saved: rank 1 was killed by SIGKILL$"):
        supervise(run, config(), launcher)
    assert len(launcher.attempts) == 1


def test_a_stop_between_two_attempts_is_heard(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 30.0)
    monkeypatch.setattr(supervisor.time, "sleep", lambda seconds: run.request_stop())
    launcher = Played((3, DIED), (9, FINISHED))
    with pytest.raises(Interrupted, match="^stopped on request between two attempts; the last ended: rank 1 was killed"):
        supervise(run, config(), launcher)
    assert len(launcher.attempts) == 1


def test_a_stop_at_the_last_moment_is_left_for_the_ranks(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the next attempt is made after the last look: the request must not be taken for an old one."""
    seen = []

    def look() -> Outcome:
        seen.append(run.stop_requested)
        return FINISHED

    launcher = Played((3, DIED), (9, look))
    start_attempt = run.start_attempt

    def late(again: bool = False) -> Path:
        run.request_stop()
        return start_attempt(again)

    monkeypatch.setattr(run, "start_attempt", late)
    supervise(run, config(), launcher)
    assert seen == [True]


def test_pauses_double_up_to_a_minute(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = [0.0]
    waited: list[float] = []
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 1.0)
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: moment[0])

    def sleep(seconds: float) -> None:
        moment[0] += seconds
        waited[-1] += seconds

    def begin() -> Outcome:
        waited.append(0.0)
        return DIED

    monkeypatch.setattr(supervisor.time, "sleep", sleep)
    launcher = Played(*[(step, begin) for step in range(1, 9)], (9, FINISHED))
    supervise(run, config(max_restarts=8), launcher)
    assert waited == pytest.approx([1, 2, 4, 8, 16, 32, 60, 60], abs=0.11)


GONE = Outcome("died", "rank 3 ended without a word on n2, which is gone", rank=3, gone={2: "n2", 3: "n2"})


def degrees(launcher: Played) -> list[int]:
    return [attempt.world_size for attempt in launcher.attempts]


def test_the_ranks_that_are_left_go_on(run: RunDirectory) -> None:
    """Of four data ranks two are gone: two of them divide the four micro-batches. The ranks read it from the run directory, and
    the launcher is told what to avoid."""
    wide = config(fewer_ranks=True, data_degree=4)
    launcher = Played((3, GONE), (9, FINISHED))
    supervise(run, wide, launcher)
    assert degrees(launcher) == [4, 2]
    assert run.config["parallel"]["data_degree"] == 2
    assert {**run.config, "parallel": None} == {**wide.model_dump(mode="json"), "parallel": None}
    assert [attempt.avoid for attempt in launcher.attempts] == [frozenset(), {"n2"}]


@pytest.mark.parametrize(
    ("gone", "parallel", "expected"),
    [
        ({3: "n2"}, {"data_degree": 4}, 2),  # three do not divide four micro-batches
        ({1: "n2", 2: "n2", 3: "n2"}, {"data_degree": 4}, 1),
        ({3: "n2"}, {"data_degree": 2, "context_degree": 2}, 2),  # one data group of two context ranks
    ],
)
def test_the_largest_degree_that_fits_is_taken(
    run: RunDirectory, gone: Mapping[int, str], parallel: dict[str, int], expected: int
) -> None:
    launcher = Played((3, Outcome("died", "gone", gone=gone)), (9, FINISHED))
    supervise(run, config(fewer_ranks=True, **parallel), launcher)
    assert degrees(launcher) == [4, expected]


def test_where_no_group_is_left_it_is_said(run: RunDirectory) -> None:
    with pytest.raises(
        ParallelError,
        match=r"^2 of 4 ranks are gone with n2, and .* of 2 ranks cannot be made: a data group needs 4 "
        r"\(context_degree 4 x tensor_degree 1\)\. Run the same command again",
    ):
        supervise(run, config(fewer_ranks=True, context_degree=4), Played((3, GONE)))


def test_ranks_are_not_given_up_unasked(run: RunDirectory) -> None:
    """Without `fewer_ranks` the next attempt is as large, elsewhere."""
    launcher = Played((3, GONE), (9, FINISHED))
    supervise(run, config(data_degree=4), launcher)
    assert degrees(launcher) == [4, 4]
    assert launcher.attempts[1].avoid == {"n2"}


def test_a_launcher_that_cannot_start_is_heard(run: RunDirectory) -> None:
    def start(attempt: Attempt) -> Played:
        raise ConfigError("srun is not here")

    with pytest.raises(ConfigError, match="^srun is not here$"):
        supervise(run, config(), start)
    assert [event["state"] for event in events(run, "ended")] == ["failed"]


def test_a_start_that_failed_by_chance_is_an_attempt(run: RunDirectory) -> None:
    """As on Ray, where a second node is lost while the ranks start again: it counts, and is tried again."""
    launcher, lost = Played((3, DIED), (3, DIED), (9, FINISHED)), TransientError("a node was lost while ranks were started")

    def start(attempt: Attempt) -> Played:
        ranks = launcher(attempt)
        if len(launcher.attempts) == 2:
            raise lost
        return ranks

    supervise(run, config(max_restarts=2), start)
    assert [event["state"] for event in events(run, "ended")] == ["died", "failed", "finished"]
    assert [message for _, message in outcomes(run)] == [DIED.message, str(lost)]


def test_starts_that_fail_again_and_again_end_the_run(run: RunDirectory) -> None:
    def start(attempt: Attempt) -> Played:
        raise TransientError("a node was lost while ranks were started")

    with pytest.raises(TransientError, match="^2 attempts failed, and faults.max_restarts 1 allows no more; the last: a node"):
        supervise(run, config(max_restarts=1), start)


def test_a_file_that_cannot_be_read_does_not_hide_the_outcome(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "videofm")
    launcher = Played((3, DIED))
    run.path.joinpath("goodput.json").mkdir()
    with pytest.raises(VideofmError, match="^rank 1 was killed by SIGKILL"):
        supervise(run, config(max_restarts=0), launcher)


def test_a_full_disk_is_no_reason_not_to_try_again(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The outcome of the attempt before cannot be written; the log has it."""

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunDirectory, "set_outcome", fails)
    launcher = Played((3, DIED), (9, FINISHED))
    supervise(run, config(), launcher)
    assert len(launcher.attempts) == 2
    assert "(rank 1 was killed by SIGKILL) cannot be written: [Errno 28] No space left" in caplog.text
