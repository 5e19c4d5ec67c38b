"""`videofm dpo ...`: preference tuning, from candidate videos to pairs. What a part needs is imported when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from videofm import cli_annotate
from videofm.cli_verb import OVERRIDES, STOPPING, Verb, about
from videofm.errors import ConfigError

Arguments = Callable[[argparse.ArgumentParser], None]
Action = Callable[[argparse.Namespace], int]


def verb(arguments: Arguments, action: Action) -> Verb:
    """The verb `dpo`; `arguments` and `action` are those of every verb that runs a stage."""
    parts = {
        "generate": _stage_part(
            "dpo_generate",
            "several videos of each prompt, to choose from",
            "Make N videos of each prompt with a trained DiT, on Ray actors, and store them as a dataset of clips: `dpo rank`\n"
            "or `dpo annotate` judges them, `encode` caches their latents, a training reads them. Each clip says by which\n"
            "weights, seed and sampler it was made. A candidate is the same for any number of actors; a run that was stopped\n"
            "or killed goes on behind the last batch of videos.",
            "videofm dpo generate candidates.yaml run=runs/dit prompts_file=prompts.txt num_candidates=4\n"
            "videofm dpo generate candidates.yaml engine.num_actors=8 engine.num_gpus=1 batch_size=4\n"
            "videofm dpo generate candidates.yaml prompts_file=null 'from_clips={manifest: runs/curated}'\n"
            "videofm dpo generate recipe.yaml --stage candidates --dry-run",
            arguments,
            action,
        ),
        "rank": _stage_part(
            "dpo_rank",
            "score candidates with a reward, and pair the better with the worse",
            "Score every candidate of a dataset with rules or with a trained reward model, and write which of two of a prompt\n"
            "is better: RUN/preferences, which `data.pairs.path` of a training reads, and RUN/scores.jsonl. Ties,\n"
            "contradictions and everything that was left out are counted. A run that was stopped keeps its scores.",
            "videofm dpo rank rank.yaml manifest=runs/candidates 'reward={kind: moving_shapes}'\n"
            "videofm dpo rank rank.yaml pairs=all num_pairs=3 margin=0.1 'require_axes=[smoothness]'\n"
            "videofm dpo rank recipe.yaml --stage rank",
            arguments,
            action,
        ),
        "import": _stage_part(
            "dpo_import",
            "preferences of others, with their videos, into ours",
            "Read pair lists of VideoDPO, VideoReward triplets, folders of better and worse videos, or JSON lines with\n"
            "prompt, chosen and rejected. Every video is decoded in a process with limits; the run directory is then a\n"
            "dataset of clips with RUN/preferences. Bad records are told with their place (RUN/bad.jsonl) and, with\n"
            "on_bad: skip, left out.",
            "videofm dpo import import.yaml source=/data/videodpo 'format={kind: videodpo}' on_bad=skip\n"
            "videofm dpo import import.yaml source=exported 'format={kind: jsonl}'\n"
            "videofm dpo import import.yaml source=/data/pairs 'format={kind: folder_pairs}' \\\n"
            "  'transcode={height: 256, width: 256, fps: 16}'",
            arguments,
            action,
        ),
        "export": EXPORT,
        "annotate": cli_annotate.part(),
    }
    width = max(map(len, parts))
    lines = "\n".join(f"  {name.ljust(width)}  {part.summary}" for name, part in parts.items())
    examples = (
        "videofm dpo generate candidates.yaml                 N videos of each prompt\n"
        "videofm dpo rank rank.yaml manifest=runs/candidates  which of them are better, by a reward\n"
        "videofm dpo annotate runs/candidates                 or by people, on a web page\n"
        "videofm train dpo.yaml                               tune on preferences, objective `dpo`\n"
        "videofm dpo PART --help                              purpose, examples and options of a part"
    )
    text = about(f"Tune a model by preferences: make candidates, judge them, train on the pairs.\n\nparts:\n{lines}", examples)

    def no_part(_: argparse.Namespace) -> int:
        raise ConfigError(f"`videofm dpo` needs a part: {', '.join(parts)}. `videofm dpo --help` explains them.")

    return Verb("candidates, votes and pairs for preference tuning", text, _no_arguments, no_part, parts=parts)


def _stage_part(kind: str, summary: str, purpose: str, examples: str, arguments: Arguments, action: Action) -> Verb:
    """A part that runs a stage of `kind`."""

    def run(parsed: argparse.Namespace) -> int:
        parsed.verb = kind
        return action(parsed)

    return Verb(summary, about(purpose, examples, OVERRIDES, STOPPING), arguments, run, kind)


def _export(parsed: argparse.Namespace) -> int:
    from data_pipelines.preferences.export import export_preferences

    count = export_preferences(Path(parsed.preferences), Path(parsed.output))
    print(f"{count} pairs in {Path(parsed.output) / 'pairs.jsonl'}")
    return 0


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preferences", metavar="PREFERENCES", help="folder of preferences, as RUN/preferences of `dpo rank`")
    parser.add_argument("output", metavar="OUT", help="folder to write; it must not exist, or be empty")


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "videofm dpo PART ..."


EXPORT = Verb(
    "pairs and their videos as JSON lines that others read",
    about(
        "Write OUT/pairs.jsonl, one object a pair with prompt, chosen, rejected (paths of videos), and all that is known of\n"
        "how both were made and judged; and OUT/videos. `videofm dpo import` reads it back.",
        "videofm dpo export runs/rank/preferences exported",
    ),
    _export_arguments,
    _export,
)
