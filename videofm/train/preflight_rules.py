"""The rules by which what ranks have measured before training is judged: small functions of all reports, the same on each rank.

What is measured, and what is done about a finding, is in `preflight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from videofm.parallel.health import ClockReading, DeviceHealth, skew_of

_GIB, _GB = 2**30, 1e9
_USED_BY_OTHERS = 0.1
"""Share of a GPU's memory in use before training from which the log warns; the driver and our own context take less."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as it has to be (`error`) or should be (`warning`).

    Attributes:
        name: of the check.
        node: host of the rank.
        rank: number of the rank.
        value: what was found.
        rule: what has to be.
        fix: what to do about it.
        severity: an error stops all ranks.
    """

    name: str
    node: str
    rank: int
    value: str
    rule: str
    fix: str
    severity: Literal["error", "warning"] = "error"


@dataclass(frozen=True)
class NodeReport:
    """What a rank finds by itself.

    Attributes:
        rank, node: its number and its host.
        device: its device.
        versions: of Python, packages and our own code.
        config: digest of the whole resolved config.
        nonce: what it reads in the file that the main rank wrote into the run directory; None where there is none.
        free_disk: bytes that it may still write there.
        problems: checks that could not be made -> why.
    """

    rank: int
    node: str
    device: DeviceHealth = field(default_factory=lambda: DeviceHealth("cpu"))
    versions: Mapping[str, str] = field(default_factory=dict)
    config: str = ""
    nonce: str | None = None
    free_disk: int = 0
    problems: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class JointReport:
    """What a rank finds with the others: `rank`, `node`, and the measures of `parallel.health`; bandwidth in bytes a second."""

    rank: int
    node: str
    wrong_summands: tuple[int, ...]
    bandwidth: float
    clock: ClockReading


@dataclass(frozen=True)
class Needs:
    """What a run takes: bytes of disk for the checkpoints to have room for, and of memory on each device for weights alone.

    With a `spare` folder for checkpoints a full disk is a warning.
    """

    disk: int = 0
    memory: int = 0
    spare: bool = False


def judge_nodes(reports: Sequence[NodeReport], expected: str, needs: Needs) -> list[Finding]:
    """All that is wrong with what ranks find by themselves. `expected` is the nonce of the main rank."""
    return [
        *check_problems(reports),
        *check_versions(reports),
        *check_config(reports),
        *check_run_directory(reports, expected),
        *check_device(reports),
        *check_sharing(reports),
        *check_memory(reports, needs.memory),
        *check_disk(reports, needs.disk, needs.spare),
    ]


def judge_together(reports: Sequence[JointReport], min_bandwidth: float | None, max_skew: float) -> list[Finding]:
    """All that is wrong with what ranks find together; bandwidth in GB/s, skew in seconds."""
    return [*check_sums(reports), *check_bandwidth(reports, min_bandwidth), *check_clocks(reports, max_skew)]


def check_problems(reports: Sequence[NodeReport]) -> list[Finding]:
    """A rank that cannot even be looked at is not fit."""
    rule, fix = "every check can be made", "look at the node, or leave it out of the job"
    return [Finding(name, one.node, one.rank, why, rule, fix) for one in reports for name, why in one.problems.items()]


def check_versions(reports: Sequence[NodeReport]) -> list[Finding]:
    """Other versions compute other numbers, or hang in a collective that only some of them make."""
    readable = [report for report in reports if "versions" not in report.problems]
    found = []
    for name in dict.fromkeys(name for report in readable for name in report.versions):
        values = [report.versions.get(name, "absent") for report in readable]
        for place, value, common in odd_ones_out(values):
            one = readable[place]
            fix = "install the same environment on all nodes (pip install -c constraints.txt), or start them from one image"
            if name == "code":
                fix = "give all nodes the same sources of videofm, local changes included"
            found.append(
                Finding("versions", one.node, one.rank, f"{name} {value}", f"{name} {common}, as most ranks have", fix)
            )
    return found


def check_config(reports: Sequence[NodeReport]) -> list[Finding]:
    """Ranks read the config from the run directory by themselves."""
    fix = "let nothing change config.yaml of the run directory while ranks start, and start again"
    return [
        Finding(
            "config", reports[place].node, reports[place].rank, f"digest {value}", f"digest {common}, as most ranks have", fix
        )
        for place, value, common in odd_ones_out([report.config for report in reports])
    ]


def check_run_directory(reports: Sequence[NodeReport], expected: str) -> list[Finding]:
    """All ranks must see what the main rank writes: config, checkpoints, requests to stop."""
    rule = f"the file that rank 0 on {reports[0].node} has just written"
    fix = "put the run directory on a file system that all nodes share, mounted at the same path"
    return [
        Finding("run directory", one.node, one.rank, "no file" if one.nonce is None else "another file", rule, fix)
        for one in reports
        if one.nonce != expected and "run directory" not in one.problems
    ]


def check_device(reports: Sequence[NodeReport]) -> list[Finding]:
    """A device computes what is known beforehand, and its memory holds what was written."""
    found = []
    fix = "take the node out of the job (Slurm: --exclude), and have the device reset or replaced"
    for one in reports:
        if one.device.wrong_products:
            value = f"{one.device.wrong_products} wrong elements in a matrix product on {one.device.name}"
            found.append(Finding("device", one.node, one.rank, value, "none", fix))
        if one.device.uncorrected_errors:
            value = f"{one.device.uncorrected_errors} uncorrected memory errors on {one.device.name}"
            found.append(Finding("device", one.node, one.rank, value, "none since the driver was loaded", fix))
    return found


def check_sharing(reports: Sequence[NodeReport]) -> list[Finding]:
    """No two ranks compute on one GPU."""
    first: dict[tuple[str, str], int] = {}
    found = []
    for one in reports:
        place = (one.node, one.device.identity)
        if one.device.identity and place in first:
            value = f"GPU {one.device.identity}, which rank {first[place]} has"
            fix = "ask for as many GPUs as ranks on each node (Slurm: --gpus-per-node, --ntasks-per-node)"
            found.append(Finding("device", one.node, one.rank, value, "a GPU of its own", fix))
        first.setdefault(place, one.rank)
    return found


def check_memory(reports: Sequence[NodeReport], needed: int) -> list[Finding]:
    """Memory of GPUs: room for the weights at least, and nobody else's."""
    found = []
    for one in reports:
        free, total = one.device.free_memory, one.device.total_memory
        value = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free on {one.device.name}"
        end = "end what else runs on the GPU (nvidia-smi lists it)"
        if total and free < needed:
            rule = f"{needed / _GIB:.1f} GiB for the weights alone"
            fix = f"{end}, or split the weights: raise parallel.tensor_degree, or take parallel.zero_stage 3"
            found.append(Finding("memory", one.node, one.rank, value, rule, fix))
        elif free < (1 - _USED_BY_OTHERS) * total:
            rule = f"{1 - _USED_BY_OTHERS:.0%} free before training"
            found.append(Finding("memory", one.node, one.rank, value, rule, end, "warning"))
    return found


def check_disk(reports: Sequence[NodeReport], needed: int, spare: bool) -> list[Finding]:
    """Room in the run directory."""
    rule = f"{needed / _GIB:.2f} GiB (faults.preflight.min_free_checkpoints times one checkpoint)"
    fix = "free space, choose a run directory on another disk, or name one in trainer.spare_checkpoints"
    severity: Literal["error", "warning"] = "warning" if spare else "error"
    return [
        Finding("disk", one.node, one.rank, f"{one.free_disk / _GIB:.2f} GiB free for the run", rule, fix, severity)
        for one in reports
        if one.free_disk < needed and "disk" not in one.problems
    ]


def check_sums(reports: Sequence[JointReport]) -> list[Finding]:
    """What each rank brings to an all-reduce arrives at every other."""
    nodes = {one.rank: one.node for one in reports}
    fix = "test the network between the nodes (nccl-tests), and leave the one that is wrong out of the job"
    return [
        Finding(
            "all-reduce",
            one.node,
            one.rank,
            f"a wrong sum: the part of {', '.join(f'rank {other} (on {nodes[other]})' for other in one.wrong_summands)}",
            "each part as it was given",
            fix,
        )
        for one in reports
        if one.wrong_summands
    ]


def check_bandwidth(reports: Sequence[JointReport], least: float | None) -> list[Finding]:
    """In GB/s; judged where the config says what is expected of the network."""
    fix = "see which network the ranks use (NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), or lower the limit"
    return [
        Finding(
            "bandwidth",
            one.node,
            one.rank,
            f"{one.bandwidth / _GB:.2f} GB/s in an all-reduce",
            f"{least:g} GB/s (faults.preflight.min_bandwidth)",
            fix,
        )
        for one in reports
        if least is not None and one.bandwidth < least * _GB
    ]


def check_clocks(reports: Sequence[JointReport], most: float) -> list[Finding]:
    """Against the clock of rank 0, as far as the round-trip of a collective lets it be known. Where rank 0 is the odd one, all
    others are named."""
    found = []
    for one in reports:
        skew = skew_of(one.clock, reports[0].clock)
        if skew.sure > most:
            ahead = "ahead of" if skew.least > 0 else "behind"
            value = f"a clock at least {skew.sure:.1f} s {ahead} that of rank 0 on {reports[0].node}"
            rule = f"{most:g} s at most (faults.preflight.max_clock_skew)"
            found.append(Finding("clock", one.node, one.rank, value, rule, "set the clocks of the nodes by NTP (chronyd)"))
    return found


def odd_ones_out(values: Sequence[str]) -> list[tuple[int, str, str]]:
    """Place, value and the most common value of each that differs from it; of two as common, the first counts."""
    counts = {value: values.count(value) for value in dict.fromkeys(values)}
    common = max(counts, key=lambda value: counts[value], default="")
    return [(place, value, common) for place, value in enumerate(values) if value != common]


# -- what is said about it


def as_text(findings: Iterable[Finding]) -> str:
    """A line for each thing that was found, with all ranks and nodes of which it is true."""
    together: dict[tuple[str, str, str, str], list[Finding]] = {}
    for one in findings:
        together.setdefault((one.name, one.value, one.rule, one.fix), []).append(one)
    lines = []
    for (name, value, rule, fix), ones in together.items():
        ranks = ", ".join(f"rank {one.rank} (on {one.node})" for one in ones[:8])
        more = f" and {len(ones) - 8} more" if len(ones) > 8 else ""
        lines.append(f"{name}: {ranks}{more}: {value}; has to be: {rule}. Fix: {fix}.")
    return "\n".join(lines)


def describe(reports: Sequence[JointReport]) -> str:
    """What is measured among ranks, in words for the log."""
    skews = [skew_of(one.clock, reports[0].clock) for one in reports]
    unsure = max(max(abs(skew.least), abs(skew.most)) for skew in skews)
    nodes = len({one.node for one in reports})
    slowest = min(one.bandwidth for one in reports) / _GB
    return (
        f"{len(reports)} ranks on {nodes} node{'s' * (nodes > 1)}, all-reduce {slowest:.2f} GB/s, "
        f"clocks within {1000 * unsure:.0f} ms"
    )
