"""Verbs that run one stage: from arguments to a config and a run directory. What a stage needs is imported when it runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from videofm.cli_verb import OVERRIDES, STOPPING, Verb, about, spoken
from videofm.errors import ConfigError

if TYPE_CHECKING:
    from videofm.config.recipe import RecipeConfig
    from videofm.config.train import TrainConfig
    from videofm.recipe import PlannedStage

MADE_ONCE = ("train", "curate", "encode", "dpo_generate", "dpo_rank", "dpo_import")
"""Kinds of stages that a verb does not run again where they are finished."""


def run_stage(arguments: argparse.Namespace) -> int:
    from videofm.lineage import outside_inputs
    from videofm.recipe import check_stage
    from videofm.report.reconstruction import as_text
    from videofm.run_dir import RunDirectory, fingerprint
    from videofm.stages.execute import execute

    inputs: dict[str, str] = {}
    absent: list[str] = []
    if arguments.stage is not None:
        stage, absent = _stage_of_recipe(arguments)
        config, path, inputs = stage.config, stage.path, stage.inputs
    else:
        config, path = stage_config(arguments)
        inputs = {} if arguments.verb == "report" else outside_inputs(config)
    if arguments.run_dir is not None:
        path = Path(arguments.run_dir)
    if arguments.dry_run:
        print(f"{check_stage(config, absent)}\nrun directory: {path}; nothing was run")
        return 0
    if absent and arguments.verb != "report":
        # It would read what another config made, and its lineage would say otherwise.
        raise ConfigError(
            f"stage {arguments.stage!r} reads {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not done: "
            f"`videofm run {arguments.config} --until {arguments.stage}` runs what is missing, too"
        )
    run = RunDirectory(path)
    if arguments.verb in MADE_ONCE and run.fingerprint == fingerprint(config, inputs) and run.finished:
        print(f"{path} is finished with this config already; nothing to do. For another run give --run-dir.")
        return 0
    results = execute(config, path, inputs)
    print(json.dumps({"run": str(path), "results": results}, indent=2, sort_keys=True, default=str))
    if arguments.verb == "evaluate" and (table := as_text(results["metrics"])):
        # To stderr, for people: what reads the JSON on stdout does not see it.
        print(f"\n{table}", file=sys.stderr)
    return 0


def sample(arguments: argparse.Namespace) -> int:
    """`run_stage`, with what the short options say put behind the overrides."""
    prefix = f"stages.{arguments.stage}." if arguments.stage is not None else ""
    said = {field: getattr(arguments, name) for name, field in SAMPLE_OPTIONS.items() if getattr(arguments, name) is not None}
    if arguments.prompt:
        said |= {"prompts": arguments.prompt, "prompts_file": None}
    if arguments.prompts_file is not None:
        said |= {"prompts": [], "prompts_file": arguments.prompts_file} | _window_of_clips(arguments)
    if arguments.image:
        one = len(arguments.image) == 1
        said |= {"image": arguments.image[0] if one else None, "images": [] if one else arguments.image}
    arguments.overrides += [f"{prefix}{field}={json.dumps(value)}" for field, value in said.items()]
    return run_stage(arguments)


def _window_of_clips(arguments: argparse.Namespace) -> dict[str, Any]:
    """For a storyboard that is longer than the clips a run was trained on, and no word of windows: some of their length, that
    share one frame, which every VAE allows."""
    path, given = Path(arguments.config), [override.partition("=")[0].partition(".")[0] for override in arguments.overrides]
    if not arguments.prompts_file.endswith((".yaml", ".yml")) or "window" in given or not path.is_dir():
        return {}
    clip, wanted = _defaults_from(path, "sample").get("num_frames"), _wanted_frames(arguments)
    if clip is None or wanted is None or wanted <= clip:
        return {}
    window = {"num_frames": clip, "overlap_frames": 1}
    print(
        f"videofm: made in windows of {clip} frames, as the clips of the training, that share 1: window={window}",
        file=sys.stderr,
    )
    return {"window": window}


def _wanted_frames(arguments: argparse.Namespace) -> int | None:
    """Frames of a video by `--frames`, which stands behind all overrides, or by the last override `num_frames=N`."""
    if arguments.frames is not None:
        return int(arguments.frames)
    said = [value for key, _, value in (text.partition("=") for text in arguments.overrides) if key == "num_frames"]
    # What is no number is told when the config is read.
    return int(said[-1]) if said and said[-1].isdecimal() else None


def train_config(arguments: argparse.Namespace) -> TrainConfig:
    """The config of a train stage, from its file or from a recipe."""
    arguments.verb = "train"
    config = _stage_of_recipe(arguments)[0].config if arguments.stage is not None else stage_config(arguments)[0]
    assert config.kind == "train"
    return config


# -- from arguments to configs


def load_recipe(arguments: argparse.Namespace) -> RecipeConfig:
    """The recipe of `CONFIG`; `--run-dir` is its `run`, and for `videofm run` the default is `runs/FILE`."""
    from videofm.config.load import load
    from videofm.config.recipe import RecipeConfig

    path, overrides = Path(arguments.config), list(arguments.overrides)
    if arguments.run_dir is not None and arguments.verb == "run":
        overrides.append(f"run={json.dumps(arguments.run_dir)}")
    return load(path, overrides, RecipeConfig, {"run": f"runs/{path.stem}", "name": path.stem})


def _stage_of_recipe(arguments: argparse.Namespace) -> tuple[PlannedStage, list[str]]:
    """The stage that `--stage` names in a recipe, in the recipe's own run directory, and those it reads that are not done."""
    from videofm.recipe import plan

    chain = plan(load_recipe(arguments))
    stage = chain.stage(arguments.stage)
    if stage.config.kind != arguments.verb:
        kind = stage.config.kind
        raise ConfigError(f"stage {stage.name!r} is of kind {kind!r}: `videofm {spoken(kind)}` runs it")
    return stage, [other.name for other in chain.stages if other.name in stage.inputs and other.state != "done"]


def stage_config(arguments: argparse.Namespace) -> tuple[Any, Path]:
    """The config of a stage from a YAML file or from a run directory, and the default run directory."""
    from videofm.config.describe import schema_of
    from videofm.config.load import load
    from videofm.config.source import read_file

    verb, path = arguments.verb, Path(arguments.config)
    defaults: dict[str, Any] = {"kind": verb}
    if path.is_dir():
        if verb not in ("sample", "export", "report"):
            raise ConfigError(f"{path} is a folder; `videofm {spoken(verb)}` takes a YAML file")
        defaults |= {"run": str(path)} | _defaults_from(path, verb)
        return load(None, arguments.overrides, schema_of(verb), defaults), Path("runs") / f"{path.resolve().name}-{verb}"
    values = read_file(path).values
    if isinstance(values.get("stages"), dict):
        names = [name for name, stage in values["stages"].items() if isinstance(stage, dict) and stage.get("kind") == verb]
        raise ConfigError(
            f"{path} is a recipe: `videofm run {path}` runs it, `videofm {spoken(verb)} {path} --stage NAME` runs one stage; "
            f"stages of kind {verb}: {', '.join(names) or 'none'}"
        )
    return load(path, arguments.overrides, schema_of(verb), defaults), Path("runs") / path.stem


def _defaults_from(path: Path, verb: str) -> dict[str, Any]:
    """What a run directory tells about the fields of `verb`: the size of its clips, where to export."""
    from videofm.run_dir import RunDirectory

    if verb == "export":
        return {"output": str(path / "export")}
    run = RunDirectory(path)
    if verb != "sample" or run.fingerprint is None or "data" not in run.config:
        return {}
    data = run.config["data"]
    found = {key: data[key] for key in ("num_frames", "height", "width")}
    curated = RunDirectory(data["manifest"])
    for folder in (curated, RunDirectory(curated.path.parent)):
        if folder.fingerprint is not None:
            rates = [stage["fps"] for stage in folder.config.get("stages", []) if "fps" in stage]
            return found | {"fps": float(rates[-1]) / min(data.get("frame_strides", [1]))} if rates else found
    return found


# -- declarations


def stage_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file (for sample, export and report also a run directory)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it")
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        help="run directory, one a config; default runs/CONFIG (without .yaml), or runs/NAME-VERB of a run directory",
    )
    parser.add_argument("--stage", metavar="NAME", help="CONFIG is a recipe: run this stage of it, in the recipe's directory")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the config, build the models that need no files, say what would run"
    )


SAMPLE_OPTIONS = {
    "frames": "num_frames",
    "height": "height",
    "width": "width",
    "fps": "fps",
    "steps": "num_steps",
    "guidance": "guidance_scale",
    "seed": "seed",
    "fit": "fit",
    "guide": "guide.run",
}
"""Short options of `videofm sample` and the fields that they set."""


def sample_arguments(parser: argparse.ArgumentParser) -> None:
    stage_arguments(parser)
    short = parser.add_argument_group("short for key=value")
    short.add_argument("--prompt", action="append", metavar="TEXT", help="a caption; repeat it for more videos")
    short.add_argument(
        "--prompts-file", "--prompts", metavar="FILE", help="text file with one caption a line, or a storyboard (.yaml)"
    )
    short.add_argument("--guide", metavar="RUN", help="run of an autoregressive model that guides a DiT with an injection")
    short.add_argument("--image", action="append", metavar="FILE", help="first frame of all videos; repeat it: one a prompt")
    short.add_argument("--fit", choices=["crop", "pad"], help="what to do with an image of another shape than the video")
    short.add_argument("--frames", type=int, metavar="N", help="frames of a video")
    short.add_argument("--height", type=int, metavar="PIXELS", help="height")
    short.add_argument("--width", type=int, metavar="PIXELS", help="width")
    short.add_argument("--fps", type=float, metavar="N", help="frames a second")
    short.add_argument("--steps", type=int, metavar="N", help="steps from noise to data")
    short.add_argument("--guidance", type=float, metavar="SCALE", help="classifier-free guidance; 1 is off")
    short.add_argument("--seed", type=int, metavar="N", help="seed of the noise")


def stage_verb(name: str, summary: str, purpose: str, examples: str) -> Verb:
    return Verb(summary, about(purpose, examples, OVERRIDES, STOPPING), stage_arguments, run_stage, name)
