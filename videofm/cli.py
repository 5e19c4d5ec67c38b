"""The command line: one thin function a verb. What a verb needs is imported when it runs, so that `--help` is quick."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from videofm import __version__, cli_data, cli_dpo
from videofm.cli_verb import EXIT_CODES, OVERRIDES, STOPPING, Verb, about, spoken
from videofm.errors import ConfigError, Interrupted, VideofmError
from videofm.registry import nearest

if TYPE_CHECKING:
    from videofm.config.recipe import RecipeConfig
    from videofm.config.train import TrainConfig
    from videofm.recipe import PlannedStage


class _Parser(argparse.ArgumentParser):
    """Prints the fields of a config below the help, read from the schema only when help is asked for."""

    schema: str | None = None

    def error(self, message: str) -> NoReturn:
        """Exit with 2; a misspelt option is told with the nearest there is."""
        wrong = next((word for word in message.split() if word.startswith("--")), None)
        if wrong is not None and message.startswith("unrecognized arguments"):
            message += nearest(wrong.partition("=")[0], self._option_string_actions)
        super().error(message)

    def format_help(self) -> str:
        """The help, with the fields."""
        text = super().format_help()
        if self.schema is None:
            return text
        from videofm.config.describe import describe, schema_of

        fields = "\n".join(f"  {line}" for line in describe(schema_of(self.schema)).splitlines())
        return f"{text}\nfields of a {self.schema} config:\n{fields}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit code; a user's mistake becomes one message, never a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        return _dispatch(arguments)
    except VideofmError as error:
        if debug:
            traceback.print_exc()
        print(f"videofm: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("videofm: interrupted", file=sys.stderr)
        return Interrupted.exit_code
    except BrokenPipeError:
        # The reader (`| head`) went away; point stdout elsewhere so that Python's exit does not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        with tempfile.NamedTemporaryFile("w", prefix="videofm-traceback-", suffix=".txt", delete=False) as file:
            file.write(traceback.format_exc())
        print(f"videofm: {type(error).__name__}: {error} (traceback in {file.name}; --debug shows it)", file=sys.stderr)
        return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"videofm {__version__}")
        return 0
    name = arguments[0]
    if name not in VERBS:
        close = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.5)
        hint = f", did you mean `videofm {close[0]}`?" if close else "."
        raise ConfigError(f"no verb is called {name!r}{hint} Verbs: {', '.join(VERBS)}. `videofm --help` explains them.")
    verb, rest = VERBS[name], arguments[1:]
    if verb.parts and rest and not rest[0].startswith("-"):
        if rest[0] not in verb.parts:
            raise ConfigError(
                f"`videofm {name}` has no part {rest[0]!r}{nearest(rest[0], verb.parts)}. It has: {', '.join(verb.parts)}."
            )
        name, verb, rest = f"{name} {rest[0]}", verb.parts[rest[0]], rest[1:]
    parser = _Parser(
        prog=f"videofm {name}", description=verb.about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.schema = verb.schema
    verb.arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parsed = parser.parse_intermixed_args(rest)
    parsed.verb = name
    return verb.action(parsed)


def overview() -> str:
    """What `videofm --help` prints."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name.ljust(width)}  {verb.summary}" for name, verb in VERBS.items())
    return f"""videofm {__version__}: from raw video files to a video model that inference software loads.

usage: videofm VERB ... [key.path=value ...]

verbs:
{verbs}

start here:
  videofm doctor                                       what works on this machine
  videofm run configs/quickstart.yaml                  the whole chain on a demo set: data, training, samples, export
  videofm run configs/real_clips.yaml source=FOLDER    the same on your own videos
  videofm VERB --help                                  purpose, examples and every field of the config

{OVERRIDES}

{STOPPING}

{EXIT_CODES}"""


# -- the verbs


def _run(arguments: argparse.Namespace) -> int:
    from videofm import recipe as recipes

    recipe = _load_recipe(arguments)
    if arguments.list:
        print(recipes.plan(recipe, arguments.force).table())
    elif arguments.dry_run:
        print(recipes.dry_run(recipe, arguments.force))
    else:
        recipes.run_recipe(recipe, arguments.until, arguments.force)
        print(f"{recipe.name}: done{' up to ' + arguments.until if arguments.until else ''}. Run directory: {recipe.run}")
        for name in ("report.html", "export"):
            if (Path(recipe.run) / name).exists():
                print(f"  {Path(recipe.run) / name}")
    return 0


def _stage(arguments: argparse.Namespace) -> int:
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
        config, path = _stage_config(arguments)
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


def _sample(arguments: argparse.Namespace) -> int:
    """`_stage`, with what the short options say put behind the overrides."""
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
    return _stage(arguments)


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


def _train_config(arguments: argparse.Namespace) -> TrainConfig:
    """The config of a train stage, from its file or from a recipe."""
    arguments.verb = "train"
    config = _stage_of_recipe(arguments)[0].config if arguments.stage is not None else _stage_config(arguments)[0]
    assert config.kind == "train"
    return config


def _doctor(arguments: argparse.Namespace) -> int:
    from videofm import doctor

    checks = doctor.examine(folder=Path(arguments.folder))
    print(doctor.as_json(checks) if arguments.json else doctor.as_text(checks))
    return doctor.exit_code(checks)


def _schema(arguments: argparse.Namespace) -> int:
    from videofm.config.describe import describe, json_schema, schema_of

    text = arguments.text
    print(describe(schema_of(arguments.name)) if text else json.dumps(json_schema(arguments.name), indent=2))
    return 0


MADE_ONCE = ("train", "curate", "encode", "dpo_generate", "dpo_rank", "dpo_import")
"""Kinds of stages that a verb does not run again where they are finished."""


# -- from arguments to configs


def _load_recipe(arguments: argparse.Namespace) -> RecipeConfig:
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

    chain = plan(_load_recipe(arguments))
    stage = chain.stage(arguments.stage)
    if stage.config.kind != arguments.verb:
        kind = stage.config.kind
        raise ConfigError(f"stage {stage.name!r} is of kind {kind!r}: `videofm {spoken(kind)}` runs it")
    return stage, [other.name for other in chain.stages if other.name in stage.inputs and other.state != "done"]


def _stage_config(arguments: argparse.Namespace) -> tuple[Any, Path]:
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


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="RECIPE.yaml", help="the recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it")
    parser.add_argument("--run-dir", metavar="DIR", help="run directory of the recipe, the same as run=DIR")
    parser.add_argument("--list", action="store_true", help="show the stages and their states, run nothing")
    parser.add_argument("--dry-run", action="store_true", help="check and build everything, run nothing")
    parser.add_argument("--until", metavar="NAME", help="stop after this stage")
    parser.add_argument("--force", metavar="NAME", help="run this stage again, and what depends on it")


def _stage_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file (for sample, export and report also a run directory)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it")
    parser.add_argument("--run-dir", metavar="DIR", help="run directory; default runs/CONFIG (without .yaml)")
    parser.add_argument("--stage", metavar="NAME", help="CONFIG is a recipe: run this stage of it, in the recipe's directory")
    parser.add_argument("--dry-run", action="store_true", help="check and build everything, run nothing")


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


def _sample_arguments(parser: argparse.ArgumentParser) -> None:
    _stage_arguments(parser)
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


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for programs and bug reports")
    parser.add_argument("--folder", default=".", metavar="DIR", help="where runs will be written; its free space is told")


def _schema_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", default="recipe", help="recipe (default), or a kind of stage: train, curate, ...")
    parser.add_argument("--text", action="store_true", help="print the fields for people")


def _stage_verb(name: str, summary: str, purpose: str, examples: str) -> Verb:
    return Verb(summary, about(purpose, examples, OVERRIDES, STOPPING), _stage_arguments, _stage, name)


VERBS = {
    "run": Verb(
        "run a recipe, a chain of stages; what is done is skipped",
        about(
            "Walk a recipe: each stage has its own run directory in RUN/stages/NAME. A finished stage is skipped, an\n"
            "interrupted one resumes, a changed one runs again together with what depends on it (the old directory moves to\n"
            "RUN/stale/).",
            "videofm run configs/quickstart.yaml\n"
            "videofm run configs/real_clips.yaml source=../videos stages.dit.trainer.max_steps=2000\n"
            "videofm run configs/quickstart.yaml --list            # what is done, what would run, and why\n"
            "videofm run configs/quickstart.yaml --until vae       # stop after a stage\n"
            "videofm run configs/quickstart.yaml --force sample    # once more, and what depends on it",
            "in a recipe:\n  ${run} is its run directory, ${source} its source folder,\n"
            "  ${stage.NAME} the run directory of an earlier stage.",
            OVERRIDES,
            STOPPING,
        ),
        _run_arguments,
        _run,
        "recipe",
    ),
    "curate": _stage_verb(
        "curate",
        "raw videos to training shards",
        "Probe, split into shots, filter, deduplicate, caption, transcode and pack a folder of raw videos into webdataset\n"
        "shards. A funnel says what was kept and why the rest was not; a broken file is quarantined with its reason, it\n"
        "never stops the job.",
        "videofm curate configs/real_clips.yaml --stage curate source=/data/videos",
    ),
    "data": cli_data.verb(_train_config),
    "encode": _stage_verb(
        "encode",
        "latents, tokens and text embeddings of shards, for training",
        "Run the frozen VAE, latent tokenizer and text encoder once over a dataset, on Ray actors, into sidecar shards that\n"
        "`data.cache` of a training reads. They are keyed by content: other weights, clips or captions are refused.",
        "videofm encode configs/debug/encode.yaml\n"
        "videofm encode configs/debug/encode.yaml engine.num_actors=8 engine.num_gpus=1\n"
        "videofm train configs/debug/dit_ltx.yaml data.start=first data.cache.path=runs/encode data.cache.mode=latents",
    ),
    "train": _stage_verb(
        "train",
        "train a model on shards",
        "Train one objective (autoencoder, flow matching) through DeepSpeed, in one process or several; resumes where it\n"
        "stopped.",
        "videofm train configs/debug/vae_ltx.yaml --dry-run\n"
        "videofm train configs/debug/vae_ltx.yaml trainer.max_steps=500 parallel.data_degree=2\n"
        "videofm train configs/quickstart.yaml --stage dit",
    ),
    "sample": Verb(
        "videos from prompts and images",
        about(
            "Generate videos from captions with a trained run, a checkpoint or an exported folder: MP4 files and a contact\n"
            "sheet. An image can be the first frame; images and clips at other frames stand under `conditions`.",
            "videofm sample runs/quickstart/stages/dit --prompt 'a red circle moving left' --fps 25\n"
            "videofm sample runs/quickstart/stages/dit --prompt 'a red circle' --image first.png --fit crop --seed 3\n"
            "videofm sample models/ltx --prompts-file prompts.txt --frames 121 --height 512 --width 768 --fps 24\n"
            "videofm sample models/ltx --prompt 'a beach' --frames 481 'window={num_frames: 121, overlap_frames: 25}' ...\n"
            "videofm sample runs/arlon/stages/guided --guide runs/arlon/stages/ar --frames 257 --prompts storyboard.yaml\n"
            "videofm sample configs/quickstart.yaml --stage sample",
            "storyboards:\n"
            "  a video whose prompt changes on the way: a file that ends in .yaml, for --prompts. Segments tile the frames;\n"
            "  a window has the prompt of its first new frame. Where no `window` is given, those of a run are as long\n"
            "  as the clips of its training, and share a frame. Several videos are `videos: [[...], [...]]`.\n"
            "    - {start: 0, stop: 129, prompt: a red circle moving left}\n"
            "    - {start: 129, stop: 257, prompt: a red circle moving right}",
            OVERRIDES,
            STOPPING,
        ),
        _sample_arguments,
        _sample,
        "sample",
    ),
    "dpo": cli_dpo.verb(_stage_arguments, _stage),
    "evaluate": _stage_verb(
        "evaluate",
        "measure models and generated videos",
        "Of a VAE: PSNR, SSIM, LPIPS and rFVD, its latents and their statistics, whether an image VAE decodes them. Of a DiT:\n"
        "held-out flow loss. Of videos: caption following. Writes evaluation.json and sheets into its run directory; a table\n"
        "of reconstructions comes last (on stderr: stdout is JSON).",
        "videofm evaluate configs/quickstart.yaml --stage evaluate",
    ),
    "export": _stage_verb(
        "export",
        "a folder that diffusers loads",
        "Write a diffusers folder (safetensors) from a trained DiT and its VAE; an older export is replaced once the new one\n"
        "is complete.",
        "videofm export runs/quickstart/stages/dit output=ltx-tiny\n"
        "videofm export runs/dit/checkpoints/step_00000200 output=out",
    ),
    "report": _stage_verb(
        "report",
        "one HTML page about a run",
        "Curves, funnel, contact sheets, evaluation, throughput, config and lineage on one self-contained page.",
        "videofm report runs/quickstart\nvideofm report runs/quickstart/stages/vae output=vae.html",
    ),
    "doctor": Verb(
        "what this machine can do, and what is missing",
        about(
            "Run each decoder, attention backend and communication library once on something tiny and tell what works. For\n"
            "each missing optional part: what it would give and how to install it. Exit code 1 when a required part does not\n"
            "work.",
            "videofm doctor\nvideofm doctor --json > doctor.json",
        ),
        _doctor_arguments,
        _doctor,
    ),
    "schema": Verb(
        "the schema of the YAML files, for editors",
        about(
            "Print the JSON schema of a recipe or of a stage: editors use it for completion and checks.",
            "videofm schema > recipe.schema.json\nvideofm schema train --text",
        ),
        _schema_arguments,
        _schema,
    ),
}
