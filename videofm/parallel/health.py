"""What a device, a network and a clock do, measured: for the checks before training starts, and for `videofm doctor`.

Measures only; what is too little or too much is judged by those who ask.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

_SIZE = 512
"""Rows and columns of the test matrices. Their elements are whole numbers up to 8, so that a sum of 512 products stays below
2^24: every order of adding, with inputs in fp32, TF32 or bf16, gives the same exact fp32 result."""
_NUM_TRIES = 3


@dataclass(frozen=True)
class DeviceHealth:
    """A device as this process finds it.

    Attributes:
        name: `cpu`, or the model of the GPU.
        identity: tells GPUs apart, also where each process sees only its own; empty for the CPU.
        wrong_products: elements of a matrix product that are not those of the CPU in fp64, of `_SIZE` squared.
        free_memory, total_memory: bytes; 0 for the CPU, whose memory ranks share.
        uncorrected_errors: of the GPU's memory since its driver was loaded; None where nobody tells (no ECC, no nvidia-smi).
    """

    name: str
    identity: str = ""
    wrong_products: int = 0
    free_memory: int = 0
    total_memory: int = 0
    uncorrected_errors: int | None = None


def measure_device(device: torch.device) -> DeviceHealth:
    """Let a device compute something whose result is known, and ask how it is."""
    if device.type != "cuda":
        return DeviceHealth(device.type, wrong_products=wrong_products(device))
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    identity = str(getattr(properties, "uuid", "")).lower()
    wrong = max(wrong_products(device) for _ in range(_NUM_TRIES))
    return DeviceHealth(properties.name, identity, wrong, free, total, uncorrected_errors(ask_nvidia_smi(), identity))


def wrong_products(device: torch.device, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.matmul) -> int:
    """Elements of a `product` of matrices on `device` that differ from those of the CPU in fp64."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-8, 9, (_SIZE, _SIZE), generator=generator).double() for _ in range(2))
    found = product(left.float().to(device), right.float().to(device))
    return int((found.cpu().double() != left @ right).sum())


def ask_nvidia_smi() -> str:
    """Identity and uncorrected memory errors of each GPU, a line each; empty where nvidia-smi is not there or fails."""
    path = shutil.which("nvidia-smi")
    if path is None:
        return ""
    command = [path, "--query-gpu=uuid,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def uncorrected_errors(table: str, identity: str) -> int | None:
    """The errors of one GPU in what `ask_nvidia_smi` returned; None where the table does not have them.

    torch and nvidia-smi write the same identity with and without `GPU-` before it.
    """
    for line in table.splitlines():
        name, _, count = (part.strip() for part in line.partition(","))
        if identity and name.lower().removeprefix("gpu-") == identity.removeprefix("gpu-"):
            return int(count) if count.isdecimal() else None
    return None


def wrong_summands(rank: int, world_size: int, device: torch.device) -> list[int]:
    """Ranks whose part in an all-reduce over all ranks does not arrive at this one as it was given. All ranks call it.

    Each rank gives its number plus one at its own place and zeros elsewhere, so that the sum has one place for each of them.
    """
    value = torch.zeros(world_size, device=device)
    value[rank] = rank + 1
    dist.all_reduce(value)
    return [other for other, found in enumerate(value.tolist()) if found != other + 1]


def measure_bandwidth(world_size: int, device: torch.device, num_bytes: int | None = None) -> float:
    """Bytes a second that leave each rank in an all-reduce over all ranks, the best of three. All ranks call it.

    Counted as NCCL's tests count bus bandwidth: of n bytes, 2 (W - 1) / W of them go out of each of W ranks.
    """
    count = (num_bytes or (64 << 20 if device.type == "cuda" else 4 << 20)) // 4
    value = torch.zeros(count, device=device)
    best = float("inf")
    for _ in range(_NUM_TRIES):
        started = time.perf_counter()
        dist.all_reduce(value)
        value[0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - started)
    return 2 * (world_size - 1) / world_size * 4 * count / best


@dataclass(frozen=True)
class ClockReading:
    """The clock of a rank, in seconds, before it entered and after it left each of a row of collectives."""

    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True)
class Skew:
    """By how many seconds a clock is ahead of another: surely between `least` and `most`."""

    least: float
    most: float

    @property
    def sure(self) -> float:
        """The smallest size of the skew that the bounds allow; 0 where the clocks may agree."""
        return max(0.0, self.least, -self.most)


def read_clock(
    synchronize: Callable[[], object], num_readings: int = 5, clock: Callable[[], float] = time.time
) -> ClockReading:
    """Read the clock around collectives. All ranks call it; `synchronize` ends on no rank before it has begun on all."""
    before, after = [], []
    for _ in range(num_readings):
        before.append(clock())
        synchronize()
        after.append(clock())
    return ClockReading(tuple(before), tuple(after))


def skew_of(one: ClockReading, other: ClockReading) -> Skew:
    """How far the clock of `one` is ahead of that of `other`.

    A collective ends on a rank after it has begun on the other. So with clocks that are ahead of true time by s and t, both
    before_one - s <= after_other - t and before_other - t <= after_one - s hold, and s - t lies between before_one -
    after_other and after_one - before_other. Each further reading can only narrow this.
    """
    least = max(before - after for before, after in zip(one.before, other.after, strict=True))
    most = min(after - before for before, after in zip(other.before, one.after, strict=True))
    return Skew(least, most)
