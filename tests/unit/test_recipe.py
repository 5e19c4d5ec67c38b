"""Recipes: what is done is skipped, what is stale runs again and moves aside, what was interrupted resumes in place."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from videofm import recipe as recipes
from videofm import registry
from videofm.config import RecipeConfig
from videofm.errors import ConfigError, DataError, Interrupted, VideofmError
from videofm.recipe import dry_run, plan, run_recipe
from videofm.run_dir import RunDirectory, read_json

CALLS: list[str] = []
MISHAPS: dict[str, Any] = {}


def fake_stage(config: Any, run: RunDirectory) -> dict[str, Any]:
    """Notes that it ran, leaves a file, and has the mishap that the test asks for."""
    CALLS.append(run.path.name)
    with (run.path / "work.txt").open("a") as file:
        file.write("x")
    mishap = MISHAPS.pop(run.path.name, None)
    if isinstance(mishap, BaseException):
        raise mishap
    if mishap is not None:
        mishap(run)
    return {"answer": 42}


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    MISHAPS.clear()
    for kind in registry.STAGES:
        monkeypatch.setitem(registry.STAGES, kind, f"{__name__}:fake_stage")


def a_recipe(tmp_path: Path, **changes: Any) -> RecipeConfig:
    """demo -> curate -> export; evaluate reads what export wrote; report reads the whole run."""
    stages = {
        "demo": {"kind": "demo_data", "seed": changes.get("seed", 0)},
        "curate": {"kind": "curate", "source": "${stage.demo}", "stages": [{"kind": "probe"}]},
        "export": {"kind": "export", "run": "${stage.curate}", "output": "${run}/export"},
        "evaluate": {
            "kind": "evaluate",
            "seed": changes.get("evaluate_seed", 0),
            "metrics": [{"kind": "caption_following", "samples": "${run}/export/samples"}],
        },
        "report": {"kind": "report", "run": "${run}"},
    }
    return RecipeConfig.model_validate(
        {"name": "test", "run": str(tmp_path / "run"), "stages": stages | changes.get("stages", {})}
    )


def test_inputs_follow_from_what_configs_name(tmp_path: Path) -> None:
    inputs = {stage.name: list(stage.inputs) for stage in plan(a_recipe(tmp_path)).stages}
    assert inputs == {
        "demo": [],
        "curate": ["demo"],
        "export": ["curate"],
        "evaluate": ["export"],
        "report": ["demo", "curate", "export", "evaluate"],
    }


def test_inputs_are_found_however_a_path_is_spelt(tmp_path: Path) -> None:
    stage = {"kind": "export", "run": "${run}/stages/demo/../curate/./checkpoints", "output": "${run}/export"}
    assert list(plan(a_recipe(tmp_path, stages={"export": stage})).stage("export").inputs) == ["curate"]


def test_what_is_done_is_skipped(tmp_path: Path) -> None:
    results = run_recipe(a_recipe(tmp_path))
    assert CALLS == ["demo", "curate", "export", "evaluate", "report"]
    assert results["demo"] == {"answer": 42}
    assert run_recipe(a_recipe(tmp_path)) == {}
    assert len(CALLS) == 5
    assert read_json(tmp_path / "run" / "recipe.json")["order"] == ["demo", "curate", "export", "evaluate", "report"]


def test_a_changed_stage_runs_again_with_what_depends_on_it(tmp_path: Path) -> None:
    run_recipe(a_recipe(tmp_path))
    CALLS.clear()
    changed = a_recipe(tmp_path, evaluate_seed=1)
    assert [stage.state for stage in plan(changed).stages] == ["done", "done", "done", "stale", "stale"]
    run_recipe(changed)
    assert CALLS == ["evaluate", "report"]
    assert (tmp_path / "run" / "stale" / "evaluate-0001" / "work.txt").read_text() == "x"
    run_recipe(a_recipe(tmp_path, evaluate_seed=2))
    assert (tmp_path / "run" / "stale" / "evaluate-0002").is_dir()


def test_a_change_at_the_root_reaches_everything(tmp_path: Path) -> None:
    run_recipe(a_recipe(tmp_path))
    assert {stage.state for stage in plan(a_recipe(tmp_path, seed=1)).stages} == {"stale"}


def test_force_runs_a_stage_and_its_dependents(tmp_path: Path) -> None:
    run_recipe(a_recipe(tmp_path))
    CALLS.clear()
    run_recipe(a_recipe(tmp_path), force="export")
    assert CALLS == ["export", "evaluate", "report"]
    with pytest.raises(ConfigError, match="no stage 'exprt', did you mean 'export'"):
        run_recipe(a_recipe(tmp_path), force="exprt")


def test_until_stops_after_a_stage(tmp_path: Path) -> None:
    run_recipe(a_recipe(tmp_path), until="curate")
    assert CALLS == ["demo", "curate"]


def test_an_interrupted_stage_resumes_in_place(tmp_path: Path) -> None:
    MISHAPS["curate"] = Interrupted("saved at step 3")
    with pytest.raises(Interrupted, match="saved at step 3"):
        run_recipe(a_recipe(tmp_path))
    stages = plan(a_recipe(tmp_path)).stages
    assert [(stage.state, stage.reason) for stage in stages[:2]] == [("done", ""), ("resume", "interrupted")]
    run_recipe(a_recipe(tmp_path))
    assert CALLS == ["demo", "curate", "curate", "export", "evaluate", "report"]
    assert (tmp_path / "run" / "stages" / "curate" / "work.txt").read_text() == "xx"
    assert not (tmp_path / "run" / "stale").exists()


def test_our_errors_keep_their_message_and_have_no_traceback(tmp_path: Path) -> None:
    MISHAPS["curate"] = DataError("no usable clip in src")
    with pytest.raises(DataError, match="^no usable clip in src$"):
        run_recipe(a_recipe(tmp_path))
    run = RunDirectory(tmp_path / "run" / "stages" / "curate")
    assert run.outcome is not None
    assert (run.outcome["state"], run.outcome["message"]) == ("failed", "no usable clip in src")
    assert not (run.path / "attempts" / "0001" / "traceback.txt").exists()
    assert CALLS == ["demo", "curate"]


def test_a_fault_leaves_its_traceback_in_the_attempt(tmp_path: Path) -> None:
    MISHAPS["curate"] = ZeroDivisionError("by zero")
    with pytest.raises(VideofmError, match=r"failed: ZeroDivisionError: by zero \(traceback in .*0001/traceback.txt\)"):
        run_recipe(a_recipe(tmp_path))
    attempt = tmp_path / "run" / "stages" / "curate" / "attempts" / "0001"
    assert "fake_stage" in (attempt / "traceback.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_the_running_stage_to_stop(tmp_path: Path, number: int) -> None:
    def hear(run: RunDirectory) -> None:
        os.kill(os.getpid(), number)
        assert run.stop_requested
        raise Interrupted("saved")

    MISHAPS["curate"] = hear
    before = signal.getsignal(number)
    with pytest.raises(Interrupted):
        run_recipe(a_recipe(tmp_path))
    assert signal.getsignal(number) is before


def test_a_signal_that_came_too_late_stops_before_the_next_stage(tmp_path: Path) -> None:
    MISHAPS["demo"] = lambda run: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped before stage curate"):
        run_recipe(a_recipe(tmp_path))
    assert RunDirectory(tmp_path / "run" / "stages" / "demo").finished
    assert CALLS == ["demo"]


@pytest.mark.parametrize(
    ("stage", "match"),
    [
        ({"kind": "curate", "source": "${stage.demos}", "stages": [{"kind": "probe"}]}, r"did you mean \$\{stage.demo\}"),
        (
            {"kind": "curate", "source": "${stage.report}", "stages": [{"kind": "probe"}]},
            "'report' does not come before 'curate'",
        ),
        (
            {"kind": "curate", "source": "${stage.curate}", "stages": [{"kind": "probe"}]},
            "'curate' does not come before 'curate'",
        ),
        ({"kind": "curate", "source": "${source}", "stages": [{"kind": "probe"}]}, "the recipe has no `source`"),
    ],
)
def test_wrong_references(tmp_path: Path, stage: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        plan(a_recipe(tmp_path, stages={"curate": stage}))


def test_a_name_of_a_stage_stays_inside_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it becomes a folder"):
        plan(a_recipe(tmp_path, stages={"../x": {"kind": "demo_data"}}))


def test_dry_run_runs_nothing_and_says_what_it_could_not_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipelines.curate.config_hash", lambda config: "0123456789abcdef")
    size = {"height": 32, "width": 32, "fps": 25.0}
    stages = [{"kind": "probe"}, {"kind": "transcode", **size}]
    text = dry_run(a_recipe(tmp_path, stages={"curate": {"kind": "curate", "source": "${stage.demo}", "stages": stages}}))
    told = "curate: probe+transcode, groups of 32 sources, config hash 0123456789ab\n    it reads demo, not finished yet"
    assert told in text
    assert CALLS == []
    assert not (tmp_path / "run").exists()


def test_two_processes_do_not_share_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("videofm.stages.execute.LOCK_PATIENCE", 0.0)
    with recipes.locked(tmp_path / "run"), pytest.raises(ConfigError, match="another videofm works in"):
        run_recipe(a_recipe(tmp_path))
