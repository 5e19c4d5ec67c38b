"""The command line from outside: exit codes, messages without tracebacks, what `--help` holds."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from videofm.cli import VERBS, main, overview
from videofm.cli_stage import stage_config
from videofm.config import CurateConfig, TrainConfig
from videofm.errors import ConfigError
from videofm.run_dir import RunDirectory

RECIPE = """\
name: tiny
run: run
stages:
  demo: {kind: demo_data}
  curate: {kind: curate, source: "${stage.demo}", stages: [{kind: probe}]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "curate.yaml").write_text("source: nowhere\nstages: [{kind: probe}]\n")
    return tmp_path


def run_videofm(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`videofm ARGUMENTS` in a process of its own."""
    command = [sys.executable, "-P", "-m", "videofm", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=_environment())


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.mark.parametrize(("options", "code"), [(["-P"], 1), ([], 7)])
def test_processes_that_a_verb_starts_look_for_modules_where_it_does(options: list[str], code: int, tmp_path: Path) -> None:
    """A file of the user's that has the name of a library is not taken for it, unless the command itself looks there."""
    (tmp_path / "name_of_a_library.py").write_text("raise SystemExit(7)")
    told = "import subprocess, sys; from videofm.__main__ import command; command(); "
    told += "sys.exit(subprocess.call([sys.executable, '-m', 'name_of_a_library']))"
    environment = {name: value for name, value in _environment().items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, *options, "-c", told, "--version"]
    assert subprocess.run(command, cwd=tmp_path, env=environment, check=False).returncode == code


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (["--help"], 0, ""),
        (["--version"], 0, ""),
        (["run", "--help"], 0, ""),
        (["run", "recipe.yaml", "--list"], 0, ""),
        (["trian"], 2, "no verb is called 'trian', did you mean `videofm train`?"),
        (["run"], 2, "required"),
        (["run", "recpe.yaml"], 2, "did you mean recipe.yaml"),
        (["run", "recipe.yaml", "nam=x"], 2, "unknown key, did you mean 'name'"),
        (["run", "recipe.yaml", "--until", "curat"], 2, "did you mean 'curate'"),
        (["train", "recipe.yaml"], 2, "recipe.yaml is a recipe"),
        (["train", "recipe.yaml", "--stage", "curate"], 2, "is of kind 'curate'"),
        (
            ["curate", "recipe.yaml", "--stage", "curate"],
            2,
            "stage 'curate' reads demo, which is not done: `videofm run recipe",
        ),
        (["curate", "recipe.yaml", "--stage", "curate", "--dry-run"], 2, "stages: the last must be 'transcode'"),
        (["curate", "."], 2, "is a folder"),
        (["curate", "curate.yaml", "--dry-run"], 1, "the source folder nowhere does not exist"),
        (["report", "curate.yaml"], 2, "source = 'nowhere'"),
        (["report", "."], 1, "is no run directory"),
        (["schema", "recip"], 2, "did you mean 'recipe'"),
        (["data"], 2, "`videofm data` needs a part: stats, view, index, verify, gc, buckets"),
        (["data", "stast", "x"], 2, "`videofm data` has no part 'stast', did you mean 'stats'"),
        (["data", "stats"], 2, "required"),
        (["data", "stats", "nowhere"], 1, "the folder of shards nowhere does not exist"),
        (["data", "view", "nowhere.yaml", "."], 2, "nowhere.yaml"),
        (["data", "buckets", "recipe.yaml", "--stage", "curate"], 2, "is of kind 'curate'"),
    ],
)
def test_exit_code_and_message(folder: Path, arguments: list[str], code: int, match: str) -> None:
    done = run_videofm(*arguments, folder=folder)
    assert (done.returncode, match in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr


def test_options_and_overrides_mix(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "recipe.yaml", "stages.demo.seed=3", "--list", "run=other"]) == 0
    assert "demo_data" in capsys.readouterr().out


@pytest.mark.parametrize("verb", list(VERBS))
def test_help_is_worth_reading(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "examples:" in text
    assert "exit codes:" in text
    if VERBS[verb].schema:
        assert f"fields of a {VERBS[verb].schema} config:" in text


@pytest.mark.parametrize("part", list(VERBS["data"].parts))
def test_help_of_the_parts_of_data(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["data", part, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and f"usage: videofm data {part}" in text
    assert "examples:" in text and "exit codes:" in text
    assert ("fields of a view config:" in text) == (part == "view")


def test_an_unexpected_fault_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("videofm.config.load.load", fail)
    assert main(["run", "recipe.yaml"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("videofm: RuntimeError: boom (traceback in ")
    path = Path(error.split("traceback in ")[1].split(";")[0])
    assert "boom" in path.read_text()
    path.unlink()


def test_ctrl_c_is_clean(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("videofm.config.load.load", interrupt)
    assert main(["run", "recipe.yaml"]) == 75
    assert capsys.readouterr().err == "videofm: interrupted\n"


def test_a_training_run_tells_the_sampler_its_sizes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curate = {"kind": "curate", "source": "s", "stages": [{"kind": "transcode", "height": 32, "width": 48, "fps": 12.0}]}
    RunDirectory.create("clips", CurateConfig.model_validate(curate))
    train = {
        "kind": "train",
        "models": {"dit": {"name": "dit/ltx"}},
        "objective": {"kind": "flow_matching"},
        "data": {"manifest": "clips", "num_frames": 17, "height": 32, "width": 48, "micro_batch_size": 1},
        "optimizer": {"lr": 1e-3},
        "trainer": {"max_steps": 1},
    }
    RunDirectory.create("dit", TrainConfig.model_validate(train))
    arguments = Namespace(verb="sample", config="dit", overrides=["prompts=[a cat]", "num_frames=9"])
    config, path = stage_config(arguments)
    assert (config.run, config.num_frames, config.height, config.width, config.fps) == ("dit", 9, 32, 48, 12.0)
    assert path == Path("runs/dit-sample")
    with pytest.raises(ConfigError, match="give either `prompts`"):
        stage_config(Namespace(verb="sample", config="dit", overrides=[]))


def test_short_options_of_sample_are_overrides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They win over key=value, several prompts and images become lists, and in a recipe they mean the stage."""
    seen: list[list[str]] = []

    def record(arguments: Namespace) -> int:
        seen.append(arguments.overrides)
        return 0

    monkeypatch.setattr("videofm.cli_stage.run_stage", record)
    short = ["--prompt", "a: 'cat'", "--prompt", "b", "--image", "1.png", "--image", "2.png", "--frames", "9", "--seed", "3"]
    assert main(["sample", "dit", "fps=12", "--fit", "crop", "num_frames=5", *short]) == 0
    assert main(["sample", "recipe.yaml", "--stage", "sample", "--prompts-file", "p.txt", "--guidance", "1.5"]) == 0
    assert seen[1] == [
        "stages.sample.guidance_scale=1.5",
        "stages.sample.prompts=[]",
        'stages.sample.prompts_file="p.txt"',
    ]
    (folder / "dit").mkdir()
    size = ["height=32", "width=32"]
    config, _ = stage_config(Namespace(verb="sample", config="dit", overrides=[*seen[0], *size]))
    assert (config.prompts, config.images, config.image) == (["a: 'cat'", "b"], ["1.png", "2.png"], None)
    assert (config.num_frames, config.fps, config.seed, config.fit) == (9, 12, 3, "crop")


def test_a_storyboard_on_a_run_is_made_in_windows_of_its_clips(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where neither the command nor the length says otherwise; `--prompts` and `--guide` set the file and the run."""
    seen: list[list[str]] = []
    monkeypatch.setattr("videofm.cli_stage.run_stage", lambda arguments: seen.append(arguments.overrides) or 0)  # type: ignore[func-returns-value]
    data = {"manifest": "none", "num_frames": 9, "height": 32, "width": 48, "frame_strides": [2]}
    (folder / "dit").mkdir()
    (folder / "dit" / "config.yaml").write_text(json.dumps({"kind": "train", "data": data}))
    (folder / "dit" / "lineage.json").write_text(json.dumps({"fingerprint": "x"}))
    told = ["sample", "dit", "--prompts", "board.yaml", "--guide", "ar", "fps=25"]
    long, short = ["--frames", "65"], ["--frames", "9"]
    others = (["num_frames=65"], ["num_frames=65", "num_frames=9"], ["num_frames=65", *short], ["num_frames=many"])
    for more in (long, short, [*long, "window.num_frames=5"], [], *others):
        assert main([*told, *more]) == 0
    assert "made in windows of 9 frames, as the clips of the training, that share 1" in capsys.readouterr().err
    window = 'window={"num_frames": 9, "overlap_frames": 1}'
    assert [window in overrides for overrides in seen] == [True, False, False, False, True, False, False, False]
    config, _ = stage_config(Namespace(verb="sample", config="dit", overrides=seen[0]))
    assert (config.prompts_file, config.guide.run, config.num_frames) == ("board.yaml", "ar", 65)
    assert (config.window.num_frames, config.window.overlap_frames) == (9, 1)


def test_a_misspelt_option_is_told_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sample", "dit", "--promts", "board.yaml"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --promts board.yaml, did you mean '--prompts'?" in capsys.readouterr().err


def test_an_export_lies_in_the_run_by_default(folder: Path) -> None:
    (folder / "dit").mkdir()
    config, _ = stage_config(Namespace(verb="export", config="dit", overrides=[]))
    assert (config.run, config.output) == ("dit", "dit/export")


def test_configs_that_are_named_exist() -> None:
    """Help and README name no file that is not there."""
    root = Path(__file__).parents[2]
    texts = [verb.about for verb in VERBS.values()] + [overview(), (root / "README.md").read_text()]
    named = {name for text in texts for name in re.findall(r"configs/[\w/]+\.yaml", text)}
    assert len(named) >= 3
    assert [name for name in sorted(named) if not (root / name).is_file()] == []


@pytest.mark.parametrize("verb", ["encode", "train", "sample"])
def test_examples_of_a_help_do_not_share_a_run_directory(verb: str) -> None:
    """A directory is of one config, so a second example of another config would be refused."""
    examples = VERBS[verb].about.partition("examples:\n")[2].partition("\n\n")[0].replace(" \\\n", " ")
    taken: dict[Path, tuple[str, ...]] = {}
    for _, name, config, *rest in map(shlex.split, examples.splitlines()):
        if "--stage" in rest or "--dry-run" in rest:
            continue
        default = Path("runs") / (Path(config).stem if config.endswith(".yaml") else f"{Path(config).name}-{name}")
        place = Path(rest[rest.index("--run-dir") + 1]) if "--run-dir" in rest else default
        decisive = (config, *(word for word in rest if not word.startswith("engine.")))  # engines do not decide what comes out
        assert taken.setdefault(place, decisive) == decisive, f"{place} is of two configs"
    assert taken


@pytest.mark.parametrize("verb", ["sample", "train"])
def test_help_says_where_runs_go(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "run directory, one a config; default runs/CONFIG (without .yaml), or runs/NAME-VERB of a run directory" in shown


@pytest.mark.parametrize(
    ("config", "made_by"),
    [
        ("configs/dpo/ltx_2b_lora.yaml", "configs/dpo"),
        ("configs/dpo/reward_ltx_2b.yaml", "configs/dpo"),
        ("configs/dpo/latents_ltx_2b.yaml", "configs/dpo"),
        ("configs/arlon/ar.yaml", "configs/arlon"),
        ("configs/arlon/sample.yaml", "configs/arlon"),
    ],
)
def test_what_a_recipe_of_real_size_reads_is_made_by_a_command_beside_it(config: str, made_by: str) -> None:
    root = Path(__file__).parents[2]
    files = list((root / made_by).glob("*.yaml"))
    texts = [file.read_text() for file in files if file.name not in ("quickstart.yaml", "ablation.yaml")]
    made = {place for text in texts for place in re.findall(r"^#.*--(?:run-dir|export) (runs/\w+)", text, flags=re.MULTILINE)}
    named = {f"runs/{file.stem}" for file in files}  # without --run-dir
    clashing = {f"runs/{file.stem}" for file in (root / "configs").glob("*/*.yaml") if file not in files}
    values = "\n".join(line for line in (root / config).read_text().splitlines() if not line.startswith("#"))
    read = set(re.findall(r"runs/\w+", values))
    assert read
    assert read <= made | (named - clashing), f"{config} reads {read - made - named}, or what another folder's config makes too"


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "train"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "videofm train"
    assert main(["schema", "view"]) == 0
    assert "rules" in json.loads(capsys.readouterr().out)["properties"]
