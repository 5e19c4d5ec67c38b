"""How fast a step was: rates, use of the device, time lost to the data, memory. Reads clocks and counters, never the device.

A step's `seconds` end where the host has queued the update. On CUDA the last kernels may still run then, and their time falls
into the next step; the host waits for the device twice a step in any case, for the loss and for the gradient's norm.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping

import torch

from videofm.parallel.mesh import Mesh

TERA, GIBI = 1e12, 2**30
TIMINGS = (
    "seconds",
    "data_wait",
    "data_wait_share",
    "samples_per_second",
    "tokens_per_second",
    "tflops",
    "mfu",
    "peak_memory",
)
"""What this file adds to the metrics: numbers that no second run has again."""


def with_speed(
    metrics: Mapping[str, float],
    num_samples: int,
    seconds: float,
    data_wait: float,
    mesh: Mesh,
    peak_tflops: float | None = None,
) -> dict[str, float]:
    """`metrics` of a step and how fast it was, as this rank saw it.

    - `seconds`, of which `data_wait` were spent until the clips were there, a share of `data_wait_share`;
    - `samples_per_second`, over all ranks;
    - `peak_memory`, in GiB: of tensors on CUDA, of the process elsewhere; the most since the process began.

    Where the objective counts what a sample costs (see `types.Loss`), its `tokens` and `flops`, means over the samples, give

    - `tokens_per_second`, over all ranks;
    - `tflops`, TFLOP/s of one device, in place of `flops`; and `mfu`, its share of `peak_tflops`.

    Args:
        metrics: of the step, means over its samples.
        num_samples: of the step, over all ranks.
        seconds: the step's time, with that for the data.
        data_wait: seconds until the data were there.
        mesh: how many ranks there are, and on what they compute.
        peak_tflops: what one device could do; None gives no `mfu`.
    """
    found = {name: value for name, value in metrics.items() if name != "flops"}
    rate = num_samples / seconds
    found |= {"seconds": seconds, "data_wait": data_wait, "data_wait_share": data_wait / seconds, "samples_per_second": rate}
    if "tokens" in metrics:
        found["tokens_per_second"] = metrics["tokens"] * rate
    if "flops" in metrics:
        found["tflops"] = metrics["flops"] * rate / mesh.world_size / TERA
        if peak_tflops is not None:
            found["mfu"] = found["tflops"] / peak_tflops
    return found | {"peak_memory": peak_memory(mesh.device) / GIBI}


def peak_memory(device: torch.device) -> int:
    """The most bytes in use since this process began: of tensors on a CUDA `device`, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
