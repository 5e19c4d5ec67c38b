"""`videofm dpo ...` from outside: what help holds, and what a wrong request is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from videofm.cli import VERBS, main

CANDIDATES = "run: dit\nprompts: [a red circle, b]\nnum_frames: 9\nheight: 32\nwidth: 32\nfps: 25\nnum_candidates: 3\n"
RECIPE = """\
name: tiny
run: run
stages:
  demo: {kind: demo_data}
  candidates: {kind: dpo_generate, run: "${run}/dit", prompts_file: "${stage.demo}/prompts.txt", num_frames: 9, height: 32,
               width: 32, fps: 25}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "candidates.yaml").write_text(CANDIDATES)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.parametrize("part", list(VERBS["dpo"].parts))
def test_help_of_the_parts(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["dpo", part, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and f"usage: videofm dpo {part}" in text
    assert "examples:" in text and "exit codes:" in text
    schema = VERBS["dpo"].parts[part].schema
    assert schema is None or f"fields of a {schema} config:" in text


def test_help_names_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["dpo", "--help"])
    text = capsys.readouterr().out
    for part in VERBS["dpo"].parts:
        assert f"  {part} " in text


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["dpo"], 2, "`videofm dpo` needs a part: generate"),
        (["dpo", "genrate", "x"], 2, "`videofm dpo` has no part 'genrate', did you mean 'generate'"),
        (["dpo", "generate", "candidates.yaml", "num_candidate=2"], 2, "unknown key, did you mean 'num_candidates'"),
        (["dpo", "generate", "candidates.yaml", "height=31"], 2, "frames of 31x32 cannot be stored"),
        (["dpo", "generate", "."], 2, "is a folder; `videofm dpo generate` takes a YAML file"),
        (["dpo", "generate", "recipe.yaml"], 2, "`videofm dpo generate recipe.yaml --stage NAME` runs one stage"),
        (["dpo", "generate", "recipe.yaml", "--stage", "demo"], 2, "stage 'demo' is of kind 'demo_data'"),
        (["sample", "recipe.yaml", "--stage", "candidates"], 2, "of kind 'dpo_generate': `videofm dpo generate` runs it"),
        (["dpo", "generate", "recipe.yaml", "--stage", "candidates"], 2, "stage 'candidates' reads demo, which is not done"),
    ],
)
def test_wrong_requests(arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == code
    assert says in capsys.readouterr().err


def test_dry_run_makes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dpo", "generate", "candidates.yaml", "--dry-run"]) == 0
    assert "3 candidates of 9x32x32 for each of 2 prompts, 1 actors" in capsys.readouterr().out
    assert main(["dpo", "generate", "recipe.yaml", "--stage", "candidates", "--dry-run"]) == 0
    assert "it reads demo, not finished yet" in capsys.readouterr().out
    assert not (folder / "runs").exists() and not (folder / "run").exists()


def test_a_storyboard_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "board.yaml").write_text("- {start: 0, stop: 9, prompt: a}\n")
    assert main(["dpo", "generate", "candidates.yaml", "prompts=[]", "prompts_file=board.yaml"]) == 2
    assert "is a storyboard: a text file with one caption a line is needed" in capsys.readouterr().err
