"""Slurm's two short forms, read by ourselves: lists of nodes (`n[01-03,7],login1`) and tasks of each node (`2(x3),1`).

No program of Slurm is needed, so that a rank can read them inside of a container too. Imports no torch.
"""

from __future__ import annotations

import re
from itertools import product
from math import prod

from videofm.errors import ParallelError

MOST_HOSTS = 1 << 20
"""A list of more is refused before it is written out."""

_ITEM = re.compile(r"(?:[^\[\],]|\[[^\[\]]*\])+")
"""One of the items between commas: plain text, and brackets that may hold commas."""
_PART = re.compile(r"\[([^\[\]]*)\]|([^\[\]]+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def expand_hosts(text: str) -> list[str]:
    """The hosts of a Slurm node list, in its order; doubles stay.

    `rack[1-2]-gpu[03-04]` is `rack1-gpu03 rack1-gpu04 rack2-gpu03 rack2-gpu04`: numbers are at least as wide as the first of
    their range, and the last bracket runs fastest.

    Raises:
        ParallelError: it is not such a list.
    """
    hosts: list[str] = []
    items = _ITEM.findall(text)
    if not items or ",".join(items) != text:
        raise _refused(text, "commas, brackets or names do not fit together")
    for item in items:
        parts = [_numbers(inside, text) if not plain else [plain] for inside, plain in _PART.findall(item)]
        if len(hosts) + prod(map(len, parts)) > MOST_HOSTS:
            raise _refused(text, f"it has more than {MOST_HOSTS} hosts")
        hosts += ["".join(chosen) for chosen in product(*parts)]
    return hosts


def expand_counts(text: str) -> list[int]:
    """Tasks of each node, as in `SLURM_TASKS_PER_NODE`: `2(x3),1` is 2, 2, 2, 1.

    Raises:
        ParallelError: it is not such a list.
    """
    counts: list[int] = []
    for item in text.split(","):
        found = _COUNT.fullmatch(item)
        if found is None:
            raise ParallelError(f"{text!r} does not say how many tasks each node has; Slurm writes 2(x3),1 for 2, 2, 2, 1.")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _numbers(inside: str, text: str) -> list[str]:
    """`01-03,7` -> 01, 02, 03, 7."""
    numbers: list[str] = []
    for item in inside.split(","):
        found = _RANGE.fullmatch(item)
        if found is None:
            raise _refused(text, f"[{inside}] is not made of numbers and ranges of them")
        first, last = found[1], found[2] or found[1]
        if int(last) < int(first):
            raise _refused(text, f"the range {item} runs backwards")
        if int(last) - int(first) >= MOST_HOSTS:
            raise _refused(text, f"it has more than {MOST_HOSTS} hosts")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _refused(text: str, why: str) -> ParallelError:
    return ParallelError(
        f"{text!r} is not a Slurm node list: {why}. It is written as n[01-03,7],login1; see SLURM_JOB_NODELIST, or set "
        "MASTER_ADDR to the first node."
    )
