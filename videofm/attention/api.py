"""What an attention call will look like, and the choice of the code that serves it, made when a model is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from videofm.attention.masks import MaskSpec
from videofm.attention.merge import BlockOutput
from videofm.errors import ConfigError
from videofm.registry import ATTENTION_BACKENDS, lookup

AUTO_ORDER = ("flash_attn", "xformers", "sdpa", "math")
"""What `auto` tries, best first. `flex` is chosen by name: it compiles a kernel for each mask."""


@dataclass(frozen=True)
class AttentionSpec:
    """The calls that a backend must serve: heads, the type and device of tensors, and what a strategy asks for.

    `num_heads` heads of `head_width` channels, with `num_kv_heads` heads of keys and values (None: as many; otherwise a
    divisor, each serving a group of query heads). `has_mask`: calls bring a tensor as mask (a `MaskSpec` is no tensor).
    `needs_lse`: the strategy merges partial results, so `forward` and `backward` are called. `needs_grad`: results are
    differentiated.
    """

    num_heads: int
    head_width: int
    dtype: torch.dtype = torch.float32
    device_type: str = "cpu"
    has_mask: bool = False
    num_kv_heads: int | None = None
    needs_lse: bool = False
    needs_grad: bool = True

    def __post_init__(self) -> None:
        if self.num_kv_heads is not None and (self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads):
            raise ConfigError(
                f"{self.num_heads} heads cannot share {self.num_kv_heads} heads of keys and values: give a divisor of "
                f"{self.num_heads}."
            )


class AttentionBackend(Protocol):
    """One implementation of softmax attention.

    A call serves whole sequences; `forward` and `backward` serve one block of keys for strategies that merge blocks, without
    autograd. `supports_lse` says whether these two exist, `supports_mask` whether they take masks.

    A mask in `forward` and `backward` is bool, True = may attend, and broadcasts to `(B, N, Lq, Lk)`. There is no causal flag:
    which tokens a block may see follows from global positions (`MaskSpec.block`), never from a kernel's idea of alignment.
    """

    name: str
    supports_lse: bool
    supports_mask: bool

    def supports(self, spec: AttentionSpec) -> str | None:
        """None when this backend can serve `spec`, else the reason why it cannot, with the fix."""
        ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | MaskSpec | None = None) -> Tensor:
        """`softmax(q k^T / sqrt(K) + mask) v`, differentiable.

        q `(B, Lq, N, K)`, k and v `(B, Lk, G, K)` -> `(B, Lq, N, K)`. A tensor mask broadcasts to `(B, N, Lq, Lk)`: bool (True
        = may attend) or float (added to the logits). A `MaskSpec` is for whole sequences that start at position 0.
        """
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> BlockOutput:
        """Attention of q `(B, Lq, N, K)` to the keys of one block, k and v `(B, Lk, G, K)`; any length may be 0."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k, v from this block of keys, in their shapes and type.

        `out` `(B, Lq, N, K)` and `lse` `(B, N, Lq)` are those of the whole softmax, over all blocks; `dout` is like `out`. Sum
        over blocks the gradients of q. Heads of k and v that serve several heads of q get the sum of their gradients.
        """
        ...


def choose(name: str, spec: AttentionSpec) -> AttentionBackend:
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
    words = f"{spec.num_heads} heads of width {spec.head_width}, {spec.dtype}, on {spec.device_type}, with {mask}"
    return words + (", merging partial results" if spec.needs_lse else "")
