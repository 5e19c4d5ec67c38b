"""Video-DPO as a user runs it: the chain of configs/debug/dpo_chain.yaml once, and what must hold of it whatever it makes."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.integration.test_arlon import LAST, LIGHT, end, kill_once_saved, rows, same_config, start
from tools.scripted_annotator import by_score, cast_votes, serving
from videofm.data.preferences import read_preferences
from videofm.run_dir import RunDirectory, read_json

STAGES = [
    *("demo", "curate", "vae", "dit", "candidates", "candidate_latents", "labelled", "reward", "rank", "tune", "tune_whole"),
    *("weighted", "sample", "evaluate", "export", "report"),
]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stages of a chain that was run to its end."""
    run = tmp_path_factory.mktemp("dpo") / "run"
    end(start("run", "configs/debug/dpo_chain.yaml", f"run={run}"))
    return run / "stages"


def test_every_stage_finished_and_the_report_has_them(chain: Path) -> None:
    assert {name: RunDirectory(chain / name).finished for name in STAGES} == dict.fromkeys(STAGES, True)
    page = (chain.parent / "report.html").read_text(encoding="utf-8")
    assert [name for name in STAGES if name not in page] == []


def test_pairs_know_the_policy_that_made_them(chain: Path) -> None:
    """All candidates are of one policy, whose hash the stage tells; every prompt has two, and so one pair."""
    policy = RunDirectory(chain / "candidates").outcome["results"]["policy"]
    pairs = read_preferences(chain / "rank" / "preferences").pairs
    assert len(pairs) == len({pair.prompt for pair in pairs}) == 48
    assert {side.origin.policy for pair in pairs for side in (pair.winner, pair.loser)} == {policy}
    assert all(pair.winner.scores["overall"] > pair.loser.scores["overall"] for pair in pairs)


def test_trainings_start_at_the_reference_and_leave_it(chain: Path) -> None:
    """At the first step policy and reference are one: log 2, and a margin of 0. Adapters begin with B = 0, so that their
    second step moves too."""
    for name in ("tune", "tune_whole"):
        found = rows(chain / name)
        assert found[0]["loss"] == pytest.approx(0.693147, abs=1e-6) and found[0]["margin"] == 0, name
        assert found[0]["grad_norm"] > 0 and found[-1]["margin"] != 0, name
        assert found[0]["winner_error"] == found[0]["winner_reference_error"], name
    # The second adapter was refreshed before the step of number 3, the fourth row.
    refreshed = rows(chain / "tune")[3]
    assert refreshed["margin"] == 0 and refreshed["loss"] == pytest.approx(0.693147, abs=1e-6)


def test_the_lineage_names_what_the_tuned_model_is_made_of(chain: Path) -> None:
    inputs = read_json(chain / "tune" / "lineage.json")["inputs"]
    names = {"vae", "dit", "candidates", "rank", "candidate_latents"}
    assert inputs == {name: read_json(chain / name / "lineage.json")["fingerprint"] for name in names}


@pytest.mark.parametrize("stage", ["tune", "tune_whole"])
def test_killed_and_resumed_it_ends_as_if_it_had_not_been(chain: Path, tmp_path: Path, stage: str) -> None:
    """SIGKILL once step 2 is saved, before the second adapter is refreshed; the same command again. Rows and tensors are those
    of the chain's own training, to the last bit."""
    run = tmp_path / "run"
    command = ["train", same_config(chain / stage, tmp_path), "--run-dir", str(run)]
    kill_once_saved(run, 2, command, tmp_path / "hold")
    assert "resuming from step_" in end(start(*command))
    assert rows(run) == rows(chain / stage)
    files = sorted((chain / stage / LAST).rglob("*.safetensors"))
    assert files
    for path in files:
        ours, theirs = load_file(run / path.relative_to(chain / stage)), load_file(path)
        assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in theirs), path


@pytest.mark.parametrize("degree", ["context_degree", "data_degree"])
def test_two_ranks_give_the_losses_of_one(chain: Path, tmp_path: Path, degree: str) -> None:
    run = tmp_path / "run"
    end(start("train", same_config(chain / "tune", tmp_path), f"parallel.{degree}=2", *LIGHT, "--run-dir", str(run)))
    one, two = rows(chain / "tune"), rows(run)
    assert [row["step"] for row in two] == [row["step"] for row in one]
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True)) < 1e-4
    assert max(abs(a["grad_norm"] - b["grad_norm"]) for a, b in zip(one, two, strict=True)) < 1e-3


def test_votes_that_were_cast_on_the_page_train(chain: Path, tmp_path: Path) -> None:
    """A scripted browser prefers the brighter video of each of six pairs; what is exported says so, and trains."""
    store, votes = tmp_path / "votes.sqlite", tmp_path / "votes"
    candidates = chain / "candidates"
    with serving(candidates, "--store", str(store), "--num-pairs", "6", "--overlap", "0") as addresses:
        count = cast_votes(addresses[0], by_score(lambda frames, prompt: float(frames.mean())), annotator="script")
    assert count == 6
    end(start("dpo", "annotate", str(candidates), "--store", str(store), "--export", str(votes)))
    assert len(read_preferences(votes).pairs) == 6
    run = tmp_path / "run"
    end(start("train", same_config(chain / "tune", tmp_path), f"data.pairs.path={votes}", "trainer.max_steps=2",
              "data.pairs.ties=true", "--run-dir", str(run)))  # fmt: skip
    assert [row["step"] for row in rows(run)] == [1, 2]
