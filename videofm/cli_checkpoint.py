"""`videofm checkpoint ...`: looking at checkpoints, and taking care of them. What a part needs is imported when it runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from videofm.cli_verb import Verb, about
from videofm.errors import ConfigError

if TYPE_CHECKING:
    from videofm.checkpoint.difference import Difference, TensorChange

_Number = TypeVar("_Number", int, float)
_SHOWN = 20
"""Tensors that `diff` names unless it is asked for all."""


def verb() -> Verb:
    """The verb `checkpoint`."""
    width = max(map(len, _PARTS))
    lines = "\n".join(f"  {name.ljust(width)}  {part.summary}" for name, part in _PARTS.items())
    examples = (
        "videofm checkpoint list runs/dit\n"
        "videofm checkpoint verify runs/dit\n"
        "videofm checkpoint average runs/dit --last 5 --out runs/dit-averaged\n"
        "videofm checkpoint PART --help                       purpose, examples and options of a part"
    )
    text = about(f"Look at the checkpoints of a training, and take care of them.\n\nparts:\n{lines}", examples)
    return Verb("look at checkpoints: list, verify, diff; average and prune them", text, _no_arguments, _no_part, parts=_PARTS)


def _list(arguments: argparse.Namespace) -> int:
    from videofm.checkpoint import listing

    found = listing.entries(Path(arguments.path))
    print(json.dumps([entry.to_json() for entry in found], indent=2) if arguments.json else listing.as_text(found))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from videofm.checkpoint import listing

    path = Path(arguments.path)
    folders, found = listing.checkpoints_of(path), listing.damage(path)
    if arguments.json:
        damaged = [
            {"folder": str(item.folder), "problems": item.problems, "instead": item.instead and str(item.instead)}
            for item in found
        ]
        print(json.dumps({"checked": [str(folder) for folder in folders], "damaged": damaged}, indent=2))
        return 1 if found else 0
    broken = {item.folder: item for item in found}
    for folder in folders:
        if folder not in broken:
            print(f"{folder}: whole")
            continue
        print("\n".join([*broken[folder].problems, f"  what to do: {broken[folder].advice}"]))
    return 1 if found else 0


def _diff(arguments: argparse.Namespace) -> int:
    from videofm.checkpoint import difference, listing

    if not arguments.tolerance >= 0:
        raise ConfigError(f"--tolerance {arguments.tolerance:g}: the largest absolute difference to allow is 0 or more")
    # Of a run the newest checkpoint is meant.
    sides = [listing.finished_checkpoints(path)[-1] if (path / "checkpoints").is_dir() else path for path in _paths(arguments)]
    found = difference.compare(*sides)
    if arguments.json:
        print(json.dumps(found.to_json(arguments.tolerance), indent=2))
    else:
        print(_told(found, arguments.tolerance, arguments.all))
    return 1 if found.differs(arguments.tolerance) else 0


def _paths(arguments: argparse.Namespace) -> tuple[Path, Path]:
    for path in (Path(arguments.a), Path(arguments.b)):
        if not path.exists():
            raise ConfigError(f"{path} does not exist: give a run, a checkpoint, a folder of a model, or a .safetensors file")
    return Path(arguments.a), Path(arguments.b)


def _told(found: Difference, tolerance: float, all_: bool) -> str:
    """What differs, for people."""
    lines = [f"A  {found.a}", f"B  {found.b}", ""]
    for value in found.values:
        note = "" if value.decides else "  (how it runs: no result depends on it)"
        lines.append(f"{value.file}  {value.key}: {value.a!r} | {value.b!r}{note}")
    different = [tensor for tensor in found.tensors if tensor.differs(tolerance)]
    by = f" by more than {tolerance:g}" if tolerance else ""
    lines.append(f"{len(found.tensors)} tensors, {len(different)} differ{by}")
    lines += _told_groups(found, tolerance)
    worst_first = sorted(different, key=_largest, reverse=True)
    shown = worst_first if all_ else worst_first[:_SHOWN]
    if shown:
        lines += ["", "the farthest apart:", *map(_told_tensor, shown)]
    if len(shown) < len(different):
        lines.append(f"... and {len(different) - len(shown)} more; --all shows them")
    return "\n".join(lines)


def _told_groups(found: Difference, tolerance: float) -> list[str]:
    """A line for each model, its average, and each optimizer of which something differs."""
    lines = []
    for group in dict.fromkeys(tensor.group for tensor in found.tensors):
        inside = [tensor for tensor in found.tensors if tensor.group == group]
        different = [tensor for tensor in inside if tensor.differs(tolerance)]
        distances = [tensor.distance for tensor in different if tensor.distance is not None]
        if different:
            largest = max((distance.largest for distance in distances), default=float("inf"))
            cosine = min((distance.cosine for distance in distances if distance.cosine is not None), default=float("nan"))
            lines.append(
                f"  {group}: {len(different)} of {len(inside)} differ, largest {largest:.3g}, least cosine {cosine:.6f}"
            )
    return lines


def _largest(tensor: TensorChange) -> float:
    return tensor.distance.largest if tensor.distance is not None else float("inf")


def _told_tensor(tensor: TensorChange) -> str:
    told = f"  {tensor.group}  {tensor.name}: {tensor.kind} {tensor.detail}".rstrip()
    if (distance := tensor.distance) is None:
        return told
    cosine = "-" if distance.cosine is None else f"{distance.cosine:.8f}"
    return (
        f"{told}, {distance.num_different:,} elements, largest {distance.largest:.3g}, relative {distance.relative:.3g}, "
        f"cosine {cosine}"
    )


def _average(arguments: argparse.Namespace) -> int:
    from videofm.checkpoint import averaging, listing

    steps = None if arguments.steps is None else _numbers(arguments.steps, int, "--steps")
    weights = None if arguments.weights is None else _numbers(arguments.weights, float, "--weights")
    if arguments.last is not None and (arguments.last < 2 or steps is not None):
        raise ConfigError(f"--last {arguments.last}: give 2 or more, and not together with --steps")
    folders: list[Path] = []
    for path in map(Path, arguments.paths):
        if not (path / "checkpoints").is_dir():
            folders += listing.checkpoints_of(path)
        elif steps is None and arguments.last is None:
            raise ConfigError(f"{path} is a run: say which of its checkpoints, by --last K or --steps A,B")
        else:
            folders += _chosen(path, listing.own_checkpoints(path), steps, arguments.last)
    made = averaging.average(folders, Path(arguments.out), weights, arguments.ema)
    for parent in made.parents:
        print(f"{parent.share:8.4f}  {parent.folder}")
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{made.folder}: the average of {len(made.parents)} checkpoints ({', '.join(made.roles)}); it is read like a run")
    return 0


def _chosen(run: Path, there: list[Path], steps: list[int] | None, last: int | None) -> list[Path]:
    """The checkpoints of a run that `--steps` or `--last` names."""
    by_step = {int(folder.name.removeprefix("step_")): folder for folder in there}
    has = ", ".join(map(str, by_step))
    if last is not None:
        if len(there) < last:
            raise ConfigError(
                f"--last {last}: {run} has {len(there)} checkpoints, of the steps {has}. A training keeps as many as "
                "trainer.keep_checkpoints says, and those of trainer.keep_every for good."
            )
        return there[-last:]
    if missing := [step for step in steps or [] if step not in by_step]:
        raise ConfigError(f"--steps: {run} has no checkpoint of step {', '.join(map(str, missing))}. There are: {has}.")
    return [by_step[step] for step in steps or []]


def _numbers(text: str, kind: Callable[[str], _Number], option: str) -> list[_Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: give numbers with commas between them, as 100,200") from None


def _prune(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from videofm.checkpoint import keep, listing

    run = Path(arguments.run)
    checkpoints = run / "checkpoints"
    if arguments.keep < 1 or (arguments.every is not None and arguments.every < 0):
        raise ConfigError("--keep is 1 or more; --every is 0 (none stays for its step) or more")
    if not checkpoints.is_dir():
        raise ConfigError(f"{run} is no run directory: it has no checkpoints/")
    rules = replace(listing.rules_of(run), last=arguments.keep)
    if arguments.every is not None:
        rules = replace(rules, every=arguments.every or None)
    folders = keep.to_delete(checkpoints, rules)
    keep.check_newest_kept(checkpoints, folders)
    if not arguments.dry_run:
        keep.prune(checkpoints, rules)
    for folder in folders:
        print(f"{'would delete' if arguments.dry_run else 'deleted'} {folder}")
    left = [folder.name for folder in keep.committed(checkpoints) if folder not in folders]
    print(f"{len(folders)} {'to go' if arguments.dry_run else 'gone'}, {len(left)} stay: {', '.join(left) or 'none'}")
    return 0


def _no_part(arguments: argparse.Namespace) -> int:
    raise ConfigError(f"`videofm checkpoint` needs a part: {', '.join(_PARTS)}. `videofm checkpoint --help` explains them.")


# -- declarations


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "videofm checkpoint PART ..."


def _look_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="RUN|CHECKPOINT", help="a run directory, or one of its checkpoints")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _diff_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("a", "b"):
        parser.add_argument(name, metavar=name.upper(), help="a run (its newest checkpoint), a checkpoint, a model, or a file")
    parser.add_argument("--tolerance", type=float, default=0.0, metavar="X", help="largest absolute difference allowed (0)")
    parser.add_argument("--all", action="store_true", help=f"name every tensor that differs, not the {_SHOWN} worst")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _average_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="RUN|CHECKPOINT", help="runs, with --last or --steps; or checkpoints")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write; it must not exist, or be empty")
    parser.add_argument("--last", type=int, metavar="K", help="the newest K checkpoints of each run")
    parser.add_argument("--steps", metavar="A,B,...", help="the checkpoints of these steps of each run")
    parser.add_argument(
        "--weights", metavar="X,Y,...", help="one a checkpoint, in their order, oldest first; default: all the same"
    )
    parser.add_argument("--ema", action="store_true", help="average the moving averages in the place of the weights")


def _prune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument("--keep", type=int, required=True, metavar="K", help="how many of the newest stay")
    parser.add_argument(
        "--every", type=int, metavar="N", help="those of steps that N divides stay (trainer.keep_every); 0: none"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be deleted, delete nothing")


_PARTS = {
    "list": Verb(
        "step, time, size and state of each",
        about(
            "List the checkpoints of a run: step, time, size, whether training was healthy there, whether it stays for good\n"
            "(permanent, best), and whether it is whole as far as names and sizes of files tell (`verify` reads them).",
            "videofm checkpoint list runs/dit\nvideofm checkpoint list runs/dit --json",
        ),
        _look_arguments,
        _list,
    ),
    "verify": Verb(
        "hash every file and name all damage",
        about(
            "Compare every file of every checkpoint with the size and SHA-256 that were committed. All damage is told, file\n"
            "by file, and what to do about it; the exit code is 1 if there is any.",
            "videofm checkpoint verify runs/dit\nvideofm checkpoint verify runs/dit/checkpoints/step_00000200",
        ),
        _look_arguments,
        _verify,
    ),
    "diff": Verb(
        "in what two of them differ: config and tensors",
        about(
            "Compare two checkpoints, folders of models or safetensors files: keys of their JSON files, and every tensor\n"
            "(shape, dtype, largest difference, that over the largest magnitude, cosine). The exit code is 1 if something\n"
            "differs that results depend on; a layout, for one, is told and does not count.",
            "videofm checkpoint diff runs/a runs/b\n"
            "videofm checkpoint diff runs/a/checkpoints/step_00000100 runs/a/checkpoints/step_00000200 --all\n"
            "videofm checkpoint diff runs/one_gpu runs/eight_gpus --tolerance 1e-6",
        ),
        _diff_arguments,
        _diff,
    ),
    "average": Verb(
        "the weighted average of several, as a run of its own",
        about(
            "Average the weights of checkpoints of one model: the last of a run, or the ends of runs on different data. Sums\n"
            "are in float64, one tensor in memory at a time. FOLDER is read like a run: by sample, export, evaluate,\n"
            "init_from and models.load. Its lineage.json names the parents.",
            "videofm checkpoint average runs/dit --last 5 --out runs/dit-averaged\n"
            "videofm checkpoint average runs/dit --steps 8000,9000,10000 --weights 1,2,3 --ema --out averaged\n"
            "videofm checkpoint average runs/a/checkpoints/step_00002000 runs/b/checkpoints/step_00002000 --out averaged\n"
            "videofm sample runs/dit-averaged --prompt 'a red circle'",
        ),
        _average_arguments,
        _average,
    ),
    "prune": Verb(
        "delete old ones",
        about(
            "Delete all checkpoints but the newest K, those that stay for good (trainer.keep_every or --every,\n"
            "trainer.keep_best) and the ones to go on from: the newest that is whole, and the newest whole one that is\n"
            "healthy.",
            "videofm checkpoint prune runs/dit --keep 2 --dry-run\nvideofm checkpoint prune runs/dit --keep 2 --every 10000",
        ),
        _prune_arguments,
        _prune,
    ),
}
