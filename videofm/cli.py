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
from typing import NoReturn

from videofm import __version__, cli_checkpoint, cli_data, cli_dpo, cli_launch
from videofm.cli_stage import load_recipe, run_stage, sample, sample_arguments, stage_arguments, stage_verb, train_config
from videofm.cli_verb import EXIT_CODES, OVERRIDES, STOPPING, Verb, about
from videofm.errors import ConfigError, Interrupted, VideofmError
from videofm.registry import nearest


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
    if verb.parts and rest and not rest[0].startswith("-") and (rest[0] in verb.parts or not verb.alone):
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

    recipe = load_recipe(arguments)
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


# -- declarations


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="RECIPE.yaml", help="the recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it")
    parser.add_argument("--run-dir", metavar="DIR", help="run directory of the recipe, the same as run=DIR")
    parser.add_argument("--list", action="store_true", help="show the stages and their states, run nothing")
    parser.add_argument(
        "--dry-run", action="store_true", help="check every config, build the models that need no files, say what would run"
    )
    parser.add_argument("--until", metavar="NAME", help="stop after this stage")
    parser.add_argument("--force", metavar="NAME", help="run this stage again, and what depends on it")


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for programs and bug reports")
    parser.add_argument("--folder", default=".", metavar="DIR", help="where runs will be written; its free space is told")


def _schema_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", default="recipe", help="recipe (default), or a kind of stage: train, curate, ...")
    parser.add_argument("--text", action="store_true", help="print the fields for people")


VERBS = {
    "run": Verb(
        "run a recipe, a chain of stages; what is done is skipped",
        about(
            "Walk a recipe: each stage has its own run directory in RUN/stages/NAME. A finished stage is skipped, an\n"
            "interrupted one resumes, a changed one runs again together with what depends on it (the old directory moves to\n"
            "RUN/stale/).",
            "videofm run configs/quickstart.yaml\n"
            "videofm run configs/real_clips.yaml source=/path/to/videos stages.dit.trainer.max_steps=2000\n"
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
    "curate": stage_verb(
        "curate",
        "raw videos to training shards",
        "Probe, split into shots, filter, deduplicate, caption, transcode and pack a folder of raw videos into webdataset\n"
        "shards. A funnel says what was kept and why the rest was not; a broken file is quarantined with its reason, it\n"
        "never stops the job.",
        "videofm curate configs/real_clips.yaml --stage curate source=/data/videos",
    ),
    "data": cli_data.verb(train_config),
    "encode": stage_verb(
        "encode",
        "latents, tokens and text embeddings of shards, for training",
        "Run the frozen VAE, latent tokenizer and text encoder once over a dataset, on Ray actors, into sidecar shards that\n"
        "`data.cache` of a training reads. They are keyed by content: other weights, clips or captions are refused.",
        "videofm encode configs/debug/encode.yaml\n"
        "videofm encode configs/debug/encode.yaml engine.num_actors=8 engine.num_gpus=1\n"
        "videofm train configs/debug/dit_ltx.yaml data.start=first data.cache.path=runs/encode data.cache.mode=latents \\\n"
        "  --run-dir runs/dit_ltx_cached",
    ),
    "train": stage_verb(
        "train",
        "train a model on shards",
        "Train one objective through DeepSpeed, in one process or several; it resumes where it stopped. Objectives: a VAE\n"
        "(autoencoder), a DiT (flow_matching), the same by preferences (dpo, reward_weighted), a reward model (reward), a\n"
        "latent tokenizer (latent_tokens), an autoregressive model of its tokens (next_token).",
        "videofm train configs/debug/vae_ltx.yaml --dry-run\n"
        "videofm train configs/debug/vae_ltx.yaml trainer.max_steps=500 parallel.data_degree=2\n"
        "videofm train configs/quickstart.yaml --stage dit",
    ),
    "checkpoint": cli_checkpoint.verb(),
    "sample": Verb(
        "videos from prompts and images",
        about(
            "Generate videos from captions with a trained run, a checkpoint or an exported folder: MP4 files and a contact\n"
            "sheet. An image can be the first frame; images and clips at other frames stand under `conditions`.",
            "videofm sample runs/quickstart/stages/dit --prompt 'a red circle moving left' --fps 25\n"
            "videofm sample runs/quickstart/stages/dit --prompt 'a red circle' --image first.png --fit crop --seed 3 \\\n"
            "  --run-dir runs/moved_image\n"
            "videofm sample models/ltx --prompts-file prompts.txt --frames 121 --height 512 --width 768 --fps 24 \\\n"
            "  --run-dir runs/of_prompts\n"
            "videofm sample models/ltx --prompt 'a beach' --frames 481 'window={num_frames: 121, overlap_frames: 25}' \\\n"
            "  --height 512 --width 768 --fps 24 --run-dir runs/beach\n"
            "videofm sample runs/arlon/stages/guided --guide runs/arlon/stages/ar --frames 257 --prompts storyboard.yaml \\\n"
            "  --run-dir runs/storyboard\n"
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
        sample_arguments,
        sample,
        "sample",
    ),
    "dpo": cli_dpo.verb(stage_arguments, run_stage),
    "evaluate": stage_verb(
        "evaluate",
        "measure models and generated videos",
        "Of a VAE: PSNR, SSIM, LPIPS and rFVD (by local weights), its latents and their statistics, whether an image VAE\n"
        "decodes them. Of a DiT: held-out flow loss, image to video, few steps with and without a guide, long videos. Of a\n"
        "tokenizer, an autoregressive model and a reward model: what they keep, predict and prefer. Of videos: caption\n"
        "following. Models and videos are there before. Writes evaluation.json and sheets into its run directory; a table\n"
        "of reconstructions comes last (on stderr: stdout is JSON).",
        "videofm evaluate configs/quickstart.yaml --stage evaluate",
    ),
    "export": stage_verb(
        "export",
        "a folder that diffusers loads",
        "Write a diffusers folder (safetensors): of a run of dit/ltx the pipeline with its vae/ltx and text/t5, with\n"
        "adapter=true its adapters alone; of a VAE's run the VAE alone in its public layout. An older export is replaced once\n"
        "the new one is complete.",
        "videofm export runs/quickstart/stages/dit output=ltx-tiny\n"
        "videofm export runs/dit/checkpoints/step_00000200 output=out",
    ),
    "report": stage_verb(
        "report",
        "one HTML page about a run",
        "Curves, funnel, contact sheets, evaluation, throughput, config and lineage on one self-contained page.",
        "videofm report runs/quickstart\nvideofm report runs/quickstart/stages/vae output=vae.html",
    ),
    "launch": cli_launch.verb(_dispatch),
    "doctor": Verb(
        "what this machine can do, and what is missing",
        about(
            "Run each decoder, attention backend and communication library once on something tiny, let two processes meet,\n"
            "look at limits, compilers, disks and GPUs, and tell what works. For each missing optional part: what it would\n"
            "give and how to install it. Exit code 1 when a required part does not work. In --json each check has a\n"
            "severity: ok, note (an optional part is not there), warning (it does not work) or error (a required part).",
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
