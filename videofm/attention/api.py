"""What an attention call will look like, and the choice of the code that serves it, made when a model is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from videofm.errors import ConfigError
from videofm.registry import ATTENTION_BACKENDS, lookup

if TYPE_CHECKING:
    from videofm.types import AttentionFn

AUTO_ORDER = ("flash_attn", "xformers", "sdpa", "math")
"""What `auto` tries, best first."""


@dataclass(frozen=True)
class AttentionSpec:
    """The calls that a backend must serve: `num_heads` heads of `head_width` channels, their dtype and device, mask or not."""

    num_heads: int
    head_width: int
    dtype: torch.dtype = torch.float32
    device_type: str = "cpu"
    has_mask: bool = False


class AttentionBackend(Protocol):
    """One implementation of softmax attention."""

    name: str

    def supports(self, spec: AttentionSpec) -> str | None:
        """None when this backend can serve `spec`, else the reason why it cannot, with the fix."""
        ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """`softmax(q k^T / sqrt(K) + mask) v`.

        q `(B, Lq, N, K)`, k and v `(B, Lk, N, K)` -> `(B, Lq, N, K)`. The mask broadcasts to `(B, N, Lq, Lk)`: bool (True = may
        attend; each query must have one True) or float (added to the logits).
        """
        ...


def choose(name: str, spec: AttentionSpec) -> AttentionFn:
    """The backend called `name`, or for `"auto"` the first of `AUTO_ORDER` that serves `spec`.

    Raises:
        ConfigError: there is no such backend, or it cannot serve `spec`; the message gives each backend's reason.
    """
    names = AUTO_ORDER if name == "auto" else (name,)
    reasons = []
    for candidate in names:
        backend: AttentionBackend = lookup(ATTENTION_BACKENDS, candidate, "attention backend")
        reason = backend.supports(spec)
        if reason is None:
            return backend
        reasons.append(f"{candidate}: {reason}")
    raise ConfigError(f"no attention backend for {_in_words(spec)}. " + " ".join(reasons))


def _in_words(spec: AttentionSpec) -> str:
    mask = "a mask" if spec.has_mask else "no mask"
    return f"{spec.num_heads} heads of width {spec.head_width}, {spec.dtype}, on {spec.device_type}, with {mask}"
