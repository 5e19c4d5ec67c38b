"""`videofm data ...`: looking at datasets of clips, and taking care of them. What a part needs is imported when it runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from videofm.cli_verb import OVERRIDES, Verb, about
from videofm.errors import ConfigError

if TYPE_CHECKING:
    from videofm.config.train import TrainConfig


def verb(train_config: Callable[[argparse.Namespace], TrainConfig]) -> Verb:
    """The verb `data`; `train_config` reads the config that `data buckets` is about."""

    def buckets(arguments: argparse.Namespace) -> int:
        from videofm.data.bucket_report import report_of

        config = train_config(arguments)
        print(report_of(config.data, config.seed))
        return 0

    parts = {**_PARTS, "buckets": _buckets_part(buckets)}
    width = max(map(len, parts))
    lines = "\n".join(f"  {name.ljust(width)}  {part.summary}" for name, part in parts.items())
    examples = (
        "videofm data stats runs/curated\n"
        "videofm data view configs/data/views/pretrain.yaml runs/curated\n"
        "videofm data index /data/webdataset --held-out 0.02\n"
        "videofm data PART --help                             purpose, examples and options of a part"
    )
    text = about(f"Look at a dataset of clips, and take care of it.\n\nparts:\n{lines}", examples)
    return Verb("look at datasets: stats, views, damage; index those of others", text, _no_arguments, _no_part, parts=parts)


def _view(arguments: argparse.Namespace) -> int:
    from videofm.data import view_report
    from videofm.data.manifest import Manifest
    from videofm.data.view import View

    view = View.load(arguments.view)
    manifest = Manifest.load(arguments.dataset)
    print(view_report.as_text(view_report.report(view.resolve(manifest, scan=True), manifest)))
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from data_pipelines import foreign

    options = foreign.Options(
        held_out=arguments.held_out,
        source_field=arguments.source_field,
        scores=tuple(arguments.score or ()),
        missing_caption="drop" if arguments.drop_uncaptioned else "keep",
        variable_rate="keep" if arguments.keep_variable_rate else "drop",
        max_member_bytes=arguments.max_member_mib << 20,
    )
    execution = foreign.Execution(arguments.workers, arguments.memory_mib, arguments.timeout)
    found = foreign.index_folder(Path(arguments.folder), options, execution, tell=_tell)
    print(foreign.as_text(found))
    return 0 if found.num_indexed else 1


def _tell(report: object) -> None:
    """A line about a tar that is done, for people who wait."""
    values = vars(report)
    state = (
        f"not used: {values['damage']}" if values["damage"] else f"{values['num_indexed']} of {values['num_samples']} samples"
    )
    print(f"{values['tar']}: {state}", file=sys.stderr, flush=True)


def _verify(arguments: argparse.Namespace) -> int:
    from videofm.data import verify

    found = verify.verify(arguments.dataset)
    print(verify.as_text(found, arguments.dataset))
    return 1 if found.damage else 0


def _stats(arguments: argparse.Namespace) -> int:
    from videofm.data import stats
    from videofm.data.manifest import Manifest

    found = stats.stats(Manifest.load(arguments.dataset))
    print(json.dumps(found.to_json(), indent=2, sort_keys=True) if arguments.json else stats.as_text(found))
    return 0


def _gc(arguments: argparse.Namespace) -> int:
    from videofm.data import gc

    folder = Path(arguments.dataset)
    garbage = gc.find_garbage(folder, arguments.older_than)
    if arguments.delete:
        gc.delete(folder, garbage)
    print(gc.as_text(garbage, deleted=arguments.delete))
    return 0


def _no_part(arguments: argparse.Namespace) -> int:
    raise ConfigError(f"`videofm data` needs a part: {', '.join([*_PARTS, 'buckets'])}. `videofm data --help` explains them.")


# -- declarations


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "videofm data PART ..."


def _dataset(parser: argparse.ArgumentParser, urls: bool = True) -> None:
    where = "folder or URL (file, http, https, s3, gs)" if urls else "folder"
    parser.add_argument("dataset", metavar="DATASET", help=f"{where} of shards that `videofm curate` or `data index` made")


def _view_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("view", metavar="VIEW.yaml", help="the rules")
    _dataset(parser)


def _index_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="folder with tars, searched recursively")
    decides = parser.add_argument_group("what decides about the index; to change it, delete FOLDER/index and FOLDER/manifest")
    decides.add_argument("--held-out", type=float, default=0.0, metavar="SHARE", help="share of sources that are held out (0)")
    decides.add_argument("--source-field", default="url", metavar="NAME", help="field of KEY.json that names the source (url)")
    decides.add_argument(
        "--score", action="append", metavar="NAME", help="a number of KEY.json that becomes a score; repeat it"
    )
    decides.add_argument("--drop-uncaptioned", action="store_true", help="drop samples without a caption")
    decides.add_argument("--keep-variable-rate", action="store_true", help="take videos whose frames are not evenly spaced")
    decides.add_argument("--max-member-mib", type=int, default=2048, metavar="MIB", help="largest member of a tar (2048)")
    how = parser.add_argument_group("how it is done")
    how.add_argument("--workers", type=int, default=1, metavar="N", help="decoding processes (1)")
    how.add_argument("--memory-mib", type=int, default=1024, metavar="MIB", help="memory that decoding a video may use (1024)")
    how.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="longest time for a video (120)")


def _stats_arguments(parser: argparse.ArgumentParser) -> None:
    _dataset(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _gc_arguments(parser: argparse.ArgumentParser) -> None:
    _dataset(parser, urls=False)
    parser.add_argument("--older-than", type=float, default=24.0, metavar="HOURS", help="leave younger files alone (24)")
    parser.add_argument("--delete", action="store_true", help="delete them; without this they are only listed")


def _buckets_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file of a train stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it")
    parser.add_argument("--stage", metavar="NAME", help="CONFIG is a recipe: look at the data of this stage of it")
    parser.set_defaults(run_dir=None)


def _buckets_part(action: Callable[[argparse.Namespace], int]) -> Verb:
    text = about(
        "Play the order of samples of a train config with data.buckets through, without decoding: which clips fall into which\n"
        "size and which nowhere and why, tokens, micro-batches, shares of steps, how much step times differ, and how long\n"
        "ranks wait for each other.",
        "videofm data buckets train.yaml\n"
        "videofm data buckets train.yaml data.buckets.budget=8192 data.micro_batch_size=4\n"
        "videofm data buckets recipe.yaml --stage dit",
        OVERRIDES,
    )
    return Verb("what the sizes of a train config make of its clips", text, _buckets_arguments, action)


_PARTS = {
    "stats": Verb(
        "clips, hours, sizes, captions, quantiles of scores",
        about(
            "Count what a dataset holds: clips and hours by split, sizes, frame rates, captions, and quantiles of every score.",
            "videofm data stats runs/curated\nvideofm data stats s3://bucket/clips --json > stats.json",
        ),
        _stats_arguments,
        _stats,
    ),
    "view": Verb(
        "what each rule of a view removes, and what stays",
        about(
            "A view is a YAML of rules over scores and facts (`videofm schema view --text` has its fields). Prints what each\n"
            "rule drops: alone, after the rules before it, and that no other rule drops; and what stays, by split.\n"
            "Thresholds of quantiles are stored in the dataset (views/), so that training reads them and scans nothing.",
            "videofm data view configs/data/views/pretrain.yaml runs/curated\n"
            "videofm train train.yaml data.view=configs/data/views/pretrain.yaml",
        ),
        _view_arguments,
        _view,
        "view",
    ),
    "index": Verb(
        "make webdataset shards of others readable, where they lie",
        about(
            "Write an index and a manifest beside tars with KEY.mp4, KEY.txt, KEY.json (video2dataset's layout), which stay\n"
            "as they are. Every video is decoded in a process with limits on time and memory. A sample that cannot be used is\n"
            "told with its reason in indexing/GROUP.json; a tar that cannot be trusted is not used at all. A second run does\n"
            "what is missing.",
            "videofm data index /data/webvid --workers 16 --held-out 0.01\n"
            "videofm data index /data/webvid --score aesthetic_score --drop-uncaptioned",
        ),
        _index_arguments,
        _index,
    ),
    "verify": Verb(
        "read everything and name all damage",
        about(
            "Compare every tar, index and clip with the SHA-256 that was committed, and the structure of each tar with its\n"
            "index. All damage is told, clip by clip; the exit code is 1 if there is any.",
            "videofm data verify runs/curated",
        ),
        _dataset,
        _verify,
    ),
    "gc": Verb(
        "find, and with --delete remove, what dead writers left",
        about(
            "List temporary files, tars without an entry, superseded indexes and thresholds of views for older manifests.\n"
            "Only --delete removes them, and only those that are old enough that no writer can be about to commit them.",
            "videofm data gc runs/curated\nvideofm data gc runs/curated --older-than 1 --delete",
        ),
        _gc_arguments,
        _gc,
    ),
}
