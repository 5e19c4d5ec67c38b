"""What is measured of a device and a clock: a wrong product is counted, bounds hold the true skew whatever the delays."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from videofm.parallel import health
from videofm.parallel.health import (
    ClockReading,
    Skew,
    ask_nvidia_smi,
    measure_device,
    skew_of,
    uncorrected_errors,
    wrong_products,
)

CPU = torch.device("cpu")


def test_a_product_is_exact_and_each_wrong_element_counts() -> None:
    """Elements are whole numbers, so also inputs that are rounded to bf16 give the product to the last bit."""
    assert wrong_products(CPU) == 0
    assert wrong_products(CPU, lambda left, right: left.bfloat16().float() @ right.bfloat16().float()) == 0

    def flipped(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = left @ right
        product[3, 5] += 1 / 64
        product[7, 2] = torch.nan
        return product

    assert wrong_products(CPU, flipped) == 2


def test_the_cpu_is_measured() -> None:
    assert measure_device(CPU) == health.DeviceHealth("cpu")


TABLE = "GPU-0000aaaa-1, 0\nGPU-0000bbbb-2, 3\nGPU-0000cccc-3, [N/A]\n"


@pytest.mark.parametrize(
    ("identity", "errors"),
    [("0000aaaa-1", 0), ("gpu-0000bbbb-2", 3), ("0000cccc-3", None), ("0000dddd-4", None), ("", None)],
)
def test_memory_errors_of_one_gpu(identity: str, errors: int | None) -> None:
    assert uncorrected_errors(TABLE, identity) == errors


def test_nvidia_smi_is_asked_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that answers, then one that fails as it does without a driver, then none."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program = tmp_path / "nvidia-smi"
    query = "--query-gpu=uuid,ecc.errors.uncorrected.volatile.total --format=csv,noheader,nounits"
    program.write_text(f'#!/bin/sh\n[ "$*" = "{query}" ] && echo "GPU-A, 7"\n')
    program.chmod(0o755)
    assert uncorrected_errors(ask_nvidia_smi(), "a") == 7
    program.write_text("#!/bin/sh\necho 'no driver'; exit 9\n")
    assert ask_nvidia_smi() == ""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert ask_nvidia_smi() == ""


def test_bounds_hold_the_true_skew_whatever_the_delays() -> None:
    """Ranks enter a collective when they like, it begins when the last has entered, and each leaves some time after that."""
    draw = random.Random(0)
    for _ in range(200):
        skews = [draw.uniform(-100, 100) for _ in range(2)]
        before: list[list[float]] = [[], []]
        after: list[list[float]] = [[], []]
        now = 1e9
        for _ in range(4):
            entered = [now + draw.expovariate(10) for _ in range(2)]
            left = [max(entered) + draw.expovariate(10) for _ in range(2)]
            for rank in range(2):
                before[rank].append(entered[rank] + skews[rank])
                after[rank].append(left[rank] + skews[rank])
            now = max(left)
        one, other = (ClockReading(tuple(before[rank]), tuple(after[rank])) for rank in range(2))
        skew = skew_of(one, other)
        assert skew.least - 1e-6 <= skews[0] - skews[1] <= skew.most + 1e-6
        assert skew.sure <= abs(skews[0] - skews[1]) + 1e-6
        mirrored = skew_of(other, one)
        assert (mirrored.least, mirrored.most) == (-skew.most, -skew.least)
        assert skew_of(one, one).sure == 0


def test_what_is_sure_of_a_skew() -> None:
    assert (Skew(-1.0, 2.0).sure, Skew(3.0, 4.0).sure, Skew(-7.0, -5.0).sure) == (0.0, 3.0, 5.0)


def test_a_clock_is_read_around_each_collective() -> None:
    ticks = iter(range(100))
    calls: list[int] = []
    reading = health.read_clock(lambda: calls.append(next(ticks)), num_readings=3, clock=lambda: float(next(ticks)))
    assert reading == ClockReading((0.0, 3.0, 6.0), (2.0, 5.0, 8.0)) and calls == [1, 4, 7]
