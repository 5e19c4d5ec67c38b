"""Faults of a training on two ranks: signals to one of them, ranks that hang, batches that make no finite loss.

The ranks are forked as `tests.helpers` does, two attempts at a time; `Mishap` says what happens to one of them, in the forward
pass of which step. Runs that leave their course are made in one pair of processes, one after the other.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch.local import LocalRanks
from launch.ranks import Attempt, Outcome
from tests.demo_shards import write_mixed_shards
from tests.helpers import ForkedPython, launch_ranks
from videofm.config.train import TrainConfig
from videofm.data.plan import DataPlan, PlanState, StepPlan
from videofm.run_dir import RunDirectory

STEPS = 8
SMALL_VAE = {"encoder_widths": [8, 8, 16], "decoder_widths": [16, 8], "latent_channels": 4}
SMALL_DIT = {"num_layers": 1, "num_heads": 2, "head_width": 8, "in_channels": 4}


def config(folder: Path, **sections: dict[str, Any]) -> TrainConfig:
    """A step is a clip of each of two ranks."""
    values: dict[str, Any] = {
        "kind": "train",
        "seed": 3,
        "models": {
            "vae": {"name": "vae/ltx", "overrides": SMALL_VAE},
            "dit": {"name": "dit/ltx", "overrides": SMALL_DIT, "attention": "math", "cross_attention": "math"},
            "text_encoder": {"name": "text/t5"},
        },
        "objective": {"kind": "flow_matching"},
        "data": {
            "manifest": str(folder / "shards"), "num_frames": 9, "height": 32, "width": 32, "crop": "random",
            "micro_batch_size": 1, "num_micro_batches": 2,
        },
        "optimizer": {"lr": 1e-3},
        "trainer": {
            "max_steps": STEPS, "precision": "fp32", "device": "cpu", "num_threads": 1, "checkpoint_every": 3, "log_every": 1,
        },
        "parallel": {"data_degree": 2, "timeout": 600.0},
        "faults": {"hang_timeout": 300.0},
        "wandb": {"mode": "disabled"},
    }  # fmt: skip
    return TrainConfig.model_validate(values | {name: values.get(name, {}) | section for name, section in sections.items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("faults")
    write_mixed_shards(found / "shards", [(12, 32, 32)] * 24)
    return found


def rows(run: Path) -> list[dict[str, Any]]:
    return RunDirectory(run).metrics()


def losses(run: Path) -> list[tuple[int, float | None]]:
    return [(row["step"], row["loss"]) for row in rows(run)]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """All of the last checkpoint, by file and name."""
    last = max((run / "checkpoints").glob("step_*"))
    files = sorted(last.rglob("*.safetensors"))
    return {f"{last.name}/{file.relative_to(last)}/{name}": value for file in files for name, value in load_file(file).items()}


def assert_same_end(run: Path, other: Path) -> None:
    """Losses of all steps, and weights, averages and optimizer state of the last, to the last bit."""
    assert losses(run) == losses(other)
    ours, theirs = tensors(run), tensors(other)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert [name for name in theirs if not ours[name].equal(theirs[name])] == []


# -- what happens to a rank, in its own process


def two_signals(run: RunDirectory, number: int) -> None:
    """Both within the step, which does not end before a thread of the rank has heard them."""
    for _ in range(2):
        os.kill(os.getpid(), number)
    while not run.stop_requested:
        time.sleep(0.01)


def one_more_later(run: RunDirectory) -> None:
    """Twice the same signal, the second time once the first was heard; no patience makes that late enough."""
    os.kill(os.getpid(), signal.SIGTERM)
    while not run.stop_requested:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)


def asleep_in_the_forward_pass() -> None:
    time.sleep(600)


MISHAPS: dict[str, Callable[[RunDirectory], None]] = {
    "none": lambda run: None,
    "term": lambda run: two_signals(run, signal.SIGTERM),
    "usr1": lambda run: two_signals(run, signal.SIGUSR1),
    "second": one_more_later,
    "stop": lambda run: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda run: asleep_in_the_forward_pass(),
}


def be_a_rank(mishap: str, rank: str, step: str, path: str, attempt: str) -> int:
    """`videofm.train.worker`, with a mishap in the forward pass of a step of this process."""
    from videofm.objectives.flow_matching import FlowMatchingObjective
    from videofm.train import watchdog, worker

    watchdog.ANSWER_SECONDS = 3.0 if mishap == "stop" else 60.0  # a disk may be slow; a rank that is stopped never answers
    steps, loss = iter(range(1, 1000)), FlowMatchingObjective.loss

    def with_mishap(*arguments: Any) -> Any:
        if next(steps) == int(step) and os.environ["RANK"] == rank:
            MISHAPS[mishap](RunDirectory(path))
        return loss(*arguments)

    FlowMatchingObjective.loss = with_mishap  # type: ignore[method-assign]
    if mishap == "second":
        worker.RankSignals = partial(worker.RankSignals, patience=0.0)  # type: ignore[misc,assignment]
    return worker.main([path, attempt])


# -- attempts


def begin(folder: Path, name: str, mishap: str = "none", rank: int = 0, step: int = 0, **faults: float) -> LocalRanks:
    """Start an attempt of the run `name` on two ranks, one of which has a mishap."""
    run = RunDirectory.create(folder / name, config(folder, faults={"hang_timeout": 300.0, **faults}))
    attempt = Attempt(run, run.start_attempt(), 2)
    arguments = [__file__, "rank", mishap, str(rank), str(step), str(run.path), str(attempt.number)]
    own = {"VIDEOFM_RENDEZVOUS": str(attempt.folder / "rendezvous"), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes: list[Any] = [
        ForkedPython(arguments, {**os.environ, **attempt.environment(number, number, 2), **own}, attempt.output(number))
        for number in range(2)
    ]
    return LocalRanks(attempt, processes)


def codes(ranks: LocalRanks) -> list[int | None]:
    return [process.poll() for process in ranks._processes]


@pytest.fixture(scope="module")
def attempts(folder: Path) -> Iterator[dict[str, tuple[LocalRanks, Outcome]]]:
    """What became of each: two at a time, and those that were interrupted once more."""
    hang = {"hang_timeout": 6.0}
    pairs: list[dict[str, Callable[[], LocalRanks]]] = [
        {
            "straight": lambda: begin(folder, "straight"),
            "term": lambda: begin(folder, "term", "term", rank=1, step=3),
        },
        {
            "usr1": lambda: begin(folder, "usr1", "usr1", rank=0, step=5),
            "stop": lambda: begin(folder, "stop", "stop", rank=1, step=4, **hang),
        },
        {
            "sleep": lambda: begin(folder, "sleep", "sleep", rank=1, step=4, **hang),
            "second": lambda: begin(folder, "second", "second", rank=1, step=2),
        },
        {
            "term again": lambda: begin(folder, "term"),
            "usr1 again": lambda: begin(folder, "usr1"),
        },
    ]
    found: dict[str, tuple[LocalRanks, Outcome]] = {}
    started: dict[str, LocalRanks] = {}
    try:
        for pair in pairs:
            started = {name: make() for name, make in pair.items()}
            found |= {name: (ranks, ranks.wait()) for name, ranks in started.items()}
        yield found
    finally:
        for ranks in started.values():
            ranks.end()


def printed(folder: Path, name: str) -> str:
    return "\n".join(path.read_text() for path in sorted((folder / name).rglob("rank_*.*")))


def test_the_undisturbed_run_leaves_no_trace_of_a_watchdog(folder: Path, attempts: Any) -> None:
    ranks, outcome = attempts["straight"]
    assert outcome.state == "finished" and codes(ranks) == [0, 0], printed(folder, "straight")
    assert list((folder / "straight" / "attempts").rglob("*stacks*")) == []
    assert {row["slowest_rank_id"] for row in rows(folder / "straight")} <= {0.0, 1.0}


@pytest.mark.parametrize(("name", "step"), [("term", 3), ("usr1", 5)])
def test_a_signal_to_one_rank_makes_all_save_at_the_end_of_that_step(folder: Path, attempts: Any, name: str, step: int) -> None:
    """It comes twice within a moment, as from a scheduler that preempts; both ranks end with the code that asks for more, and
    the run then ends as if nobody had disturbed it."""
    ranks, outcome = attempts[name]
    assert outcome.state == "interrupted" and codes(ranks) == [75, 75], printed(folder, name)
    assert f"stopped on request after step {step} of {STEPS}" in outcome.message
    for rank in range(2):
        said = json.loads((folder / name / "attempts" / "0001" / f"rank_{rank}.json").read_text())
        assert said["state"] == "interrupted"
    log = (folder / name / "log.txt").read_text()
    assert f"resuming from step_{step:08d}" in log
    ranks, outcome = attempts[f"{name} again"]
    assert outcome.state == "finished" and codes(ranks) == [0, 0], printed(folder, name)
    assert_same_end(folder / name, folder / "straight")


def test_a_signal_that_insists_ends_the_rank_at_once(folder: Path, attempts: Any) -> None:
    """In the middle of step 2, of which nothing is saved."""
    ranks, _ = attempts["second"]
    assert codes(ranks)[1] == 75, printed(folder, "second")
    said = json.loads((folder / "second" / "attempts" / "0001" / "rank_1.json").read_text())
    assert said["state"] == "interrupted" and said["message"].startswith(
        "a second SIGTERM: stopped at once, with nothing saved"
    )
    assert list((folder / "second" / "checkpoints").glob("step_*")) == []


def test_a_rank_that_is_stopped_is_named_and_ended(folder: Path, attempts: Any) -> None:
    """The other one, which waits for its gradients, notices and says where it stands; the launcher kills what hears no other
    signal. The attempt may be made again."""
    ranks, outcome = attempts["stop"]
    assert outcome.state == "hung" and outcome.may_restart, printed(folder, "stop")
    assert "hung after step 3: rank 1 did not answer: stopped, gone, or stuck outside of Python" in outcome.message
    assert codes(ranks) == [1, -signal.SIGKILL]
    stacks = (folder / "stop" / "attempts" / "0001" / "rank_0_stacks.txt").read_text()
    assert "steps done: 3; last begun: step 4" in stacks and "samples of micro-batch 0: " in stacks
    assert "main thread: waits in " in stacks and "(ranks 0, 1)" in stacks and "distributed_c10d.py" in stacks


def test_a_rank_that_sleeps_writes_where_and_is_named(folder: Path, attempts: Any) -> None:
    """Both have stacks; the message is about the one that waits for nobody, and names the function."""
    ranks, outcome = attempts["sleep"]
    assert outcome.state == "hung" and codes(ranks) == [1, 1], printed(folder, "sleep")
    assert "hung after step 3: rank 1 is in asleep_in_the_forward_pass" in outcome.message
    assert "and the others wait" in outcome.message and "rank 0" not in outcome.message.removesuffix("(rank 0)")
    attempt = folder / "sleep" / "attempts" / "0001"
    assert "in asleep_in_the_forward_pass" in (attempt / "rank_1_stacks.txt").read_text()
    assert "in the forward pass" in (attempt / "rank_1_stacks.txt").read_text()
    assert "main thread: waits in " in (attempt / "rank_0_stacks.txt").read_text()


# -- runs that leave their course

BAD_STEPS = {"skip": {4}, "diverged": {7, 8}, "lost": {7, 8}}
"""Steps of the order of which the clip of rank 1 gives no finite loss."""
COURSE = 11
LIMITS = {"skip": 1, "window": 4, "rollbacks": 1}


def course_config(folder: Path, name: str) -> TrainConfig:
    limits = {**LIMITS, "rollbacks": 0} if name == "lost" else LIMITS
    trainer = {**config(folder).trainer.model_dump(), "max_steps": COURSE, "asynchronous_checkpoints": False}
    return config(folder, trainer=trainer, faults={"divergence": limits})


def be_a_rank_that_leaves_its_course(folder: Path) -> None:
    """Each run of `BAD_STEPS` until it does not want another attempt; and one that never had the steps that were left out."""
    from videofm.data.loader import StepLoader
    from videofm.errors import VideofmError
    from videofm.objectives.flow_matching import FlowMatchingObjective
    from videofm.progress import setup_logging
    from videofm.train import worker
    from videofm.train.divergence import Diverged

    rank, real_loss, real_fit = int(os.environ["RANK"]), FlowMatchingObjective.loss, worker.fit
    bad: set[str] = set()
    held: dict[str, str] = {}

    def loss(objective: Any, models: Any, batch: Any, *rest: Any) -> Any:
        found = real_loss(objective, models, batch, *rest)
        if not bad & set(batch.sample_ids):
            return found
        return replace(
            found, total=found.total * float("nan"), metrics={**found.metrics, "loss": found.total.detach() * float("nan")}
        )

    def fit(job: Any, *rest: Any) -> Any:
        done = real_fit(job, *rest)
        weights = job.models["dit"].state_dict()
        held[job.run.path.name] = hashlib.sha256(b"".join(value.numpy().tobytes() for value in weights.values())).hexdigest()
        return done

    FlowMatchingObjective.loss, worker.fit = loss, fit  # type: ignore[method-assign,assignment]

    def attempt(name: str, number: int) -> str:
        os.environ["VIDEOFM_RENDEZVOUS"] = str(folder / f"rendezvous-{name}-{number}")
        run = RunDirectory(folder / name)
        run.path.mkdir(exist_ok=True)
        if rank == 0:
            setup_logging(run.path / "log.txt")
        try:
            worker.train(course_config(folder, name), run, number)
        except Diverged as error:
            return f"diverged: {error}"
        except VideofmError as error:
            return f"failed: {error}"
        return "finished"

    ends: dict[str, list[str]] = {}
    order = [step.micro_batches[1][0].sample_id for _, step in zip(range(20), StepLoader(
        config(folder).data, 3).plan.steps(), strict=False)]  # fmt: skip
    for name, steps in BAD_STEPS.items():
        bad = {order[step] for step in steps}
        ends[name] = [attempt(name, 1)]
        if ends[name][0].startswith("diverged"):
            ends[name].append(attempt(name, 2))
    bad.clear()
    (window,) = json.loads((folder / "diverged" / "skipped_windows.json").read_text())
    DataPlan.steps = without(DataPlan.steps, range(window["first"], window["end"]))  # type: ignore[method-assign]
    ends["oracle"] = [attempt("oracle", 1)]
    (folder / f"ends_{rank}.json").write_text(json.dumps({"ends": ends, "held": held}))


def without(steps: Callable[..., Iterator[StepPlan]], window: range) -> Callable[..., Iterator[StepPlan]]:
    """The order of a dataset that never had these steps: it is read from its beginning, and they are thrown away."""

    def rest(plan: DataPlan, state: PlanState | None = None) -> Iterator[StepPlan]:
        assert state is None or state.step == 0
        kept = (step for number, step in enumerate(steps(plan)) if number not in window)
        for number, step in enumerate(kept, 1):
            yield replace(step, after=replace(step.after, step=number))

    return rest


@pytest.fixture(scope="module")
def courses(folder: Path) -> list[dict[str, Any]]:
    launch_ranks(__file__, 2, "course", folder)
    return [json.loads((folder / f"ends_{rank}.json").read_text()) for rank in range(2)]


def test_a_batch_of_one_rank_without_a_finite_loss_is_skipped_by_all(folder: Path, courses: list[dict[str, Any]]) -> None:
    """The weights stay equal over the ranks, to the last bit; it is counted once, and the run goes on."""
    assert [found["ends"]["skip"] for found in courses] == [["finished"]] * 2
    assert courses[0]["held"]["skip"] == courses[1]["held"]["skip"]
    found = rows(folder / "skip")
    assert [row["skipped"] for row in found] == [float(step == 5) for step in range(1, COURSE + 1)]
    assert found[-1]["num_skipped"] == 1 and found[4]["loss"] is None and found[4]["grad_norm"] is None
    assert "the loss of step 4 in phase train is not finite" in (folder / "skip" / "log.txt").read_text()
    assert not (folder / "skip" / "skipped_windows.json").exists()


def test_a_run_that_left_its_course_goes_back_and_reads_on_past_the_data(folder: Path, courses: list[dict[str, Any]]) -> None:
    """Steps 7 and 8 of the order are one too many. The newest healthy checkpoint is that of step 6, and the window before the
    first of them begins at 3: what is left out is 6 to 8. The losses of all steps, and the state after the last, are those of a
    run that never had these steps, to the last bit."""
    for found in courses:
        first, second = found["ends"]["diverged"]
        assert first.startswith("diverged: training left its course at step 9: 2 of the last 4 steps were skipped")
        assert "going back to the checkpoint of step 6, and leaving out the data of steps 6 to 8" in first
        assert second == found["ends"]["oracle"][0] == "finished"
    (window,) = json.loads((folder / "diverged" / "skipped_windows.json").read_text())
    assert {name: window[name] for name in ("first", "end", "skipped", "step", "resume_step")} == {
        "first": 6, "end": 9, "skipped": [7, 8], "step": 9, "resume_step": 6,
    }  # fmt: skip
    log = (folder / "diverged" / "log.txt").read_text()
    _, resumed, after = log.partition("resuming from step_00000006")
    assert resumed and log.count("checkpoint step_00000009") == after.count("checkpoint step_00000009") == 1
    assert [row.get("data/passed_over") for row in rows(folder / "diverged")] == [None] * 6 + [3.0] * (COURSE - 6)
    ours, theirs = losses(folder / "diverged"), losses(folder / "oracle")
    assert ours == theirs and [step for step, _ in ours] == list(range(1, COURSE + 1)) and None not in dict(ours).values()
    assert courses[0]["held"]["diverged"] == courses[1]["held"]["diverged"] == courses[0]["held"]["oracle"]
    assert_same_end(folder / "diverged", folder / "oracle")


def test_a_run_that_may_not_go_back_says_what_to_do(courses: list[dict[str, Any]]) -> None:
    for found in courses:
        (end,) = found["ends"]["lost"]
        assert end.startswith("failed: training left its course at step 9") and "rollbacks allows 0" in end
        assert "a smaller optimizer.lr" in end


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "rank":
        os._exit(be_a_rank(*sys.argv[2:]))
    be_a_rank_that_leaves_its_course(Path(sys.argv[2]))
