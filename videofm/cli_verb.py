"""What a verb of the command line is, and the words that several of them share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

EXIT_CODES = """exit codes:
  0   what was asked for is done
  1   the work failed (data, checkpoint, or a fault of ours)
  2   the request was wrong (a key, a value, a path, a combination)
  75  interrupted with everything saved; the same command resumes"""

OVERRIDES = """overrides:
  key.path=value changes one value; values are YAML: 3, 2e-4, true, null, '[a, b]', '{name: vae/ltx}'.
  A number steps into a list (stages.2.min_frames=30). Later ones win. Relative paths, in files too, start at the
  current directory; only `extends: base.yaml` starts at the file that says it."""

STOPPING = """stopping:
  Ctrl-C, SIGTERM or SIGUSR1 (or touching RUN/control/stop) saves and stops at the next safe point. A second Ctrl-C stops at
  once; so does another signal 5 seconds after the first, since schedulers send theirs twice within a moment."""


@dataclass(frozen=True)
class Verb:
    """A verb: one line for the overview, its own help, how its arguments are declared, what it does.

    A verb with `parts` (`videofm data stats`) hands over to the one that is named. One that stands `alone` too takes any other
    word as its own argument.
    """

    summary: str
    about: str
    arguments: Callable[[argparse.ArgumentParser], None]
    action: Callable[[argparse.Namespace], int]
    schema: str | None = None
    parts: Mapping[str, Verb] = field(default_factory=dict)
    alone: bool = False


def spoken(kind: str) -> str:
    """How the command line calls what runs a stage of `kind`: `dpo_generate` is `dpo generate`."""
    return kind.replace("_", " ", 1) if kind.startswith("dpo_") else kind


def about(purpose: str, examples: str, *more: str) -> str:
    """The help of a verb."""
    return "\n\n".join([purpose, "examples:\n" + "\n".join(f"  {line}" for line in examples.splitlines()), *more, EXIT_CODES])
