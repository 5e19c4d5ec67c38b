"""How many bytes a forward pass leaves for the backward pass, counted by torch's allocator: the same on a busy machine."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes of host memory that `forward` allocates and that its result and graph hold when it returns.

    Recomputed blocks are told from others by it, and so are compiled ones, whose saved tensors no hook sees. A first call does
    not count: it fills caches.
    """
    forward().sum().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = forward()
    del result
    return sum(event.self_cpu_memory_usage for event in profiler.events() or [])
