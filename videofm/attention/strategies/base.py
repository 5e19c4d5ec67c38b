"""What strategies have in common: they are refused with a reason, and bound to a backend and a place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from videofm.attention import ops
from videofm.attention.api import AttentionBackend, AttentionSpec
from videofm.attention.masks import MaskSpec
from videofm.attention.strategies.call import AttentionCall, AttentionResult, Gradients
from videofm.attention.strategies.place import SequencePlace
from videofm.errors import ConfigError, ParallelError

if TYPE_CHECKING:
    from videofm.types import AttentionFn

FULL = MaskSpec.full().to_text()


class Strategy(ABC):
    """A way to compute attention of sequences that several ranks share; see `ops.Algorithm` for the computation."""

    name: str

    def refuse(self, spec: AttentionSpec, context_degree: int, ulysses_degree: int) -> str | None:
        """None when this strategy can serve `spec` at these degrees, else the reason why it cannot, with the fix.

        Args:
            spec: the calls.
            context_degree: ranks that share a sequence.
            ulysses_degree: ranks among them that trade tokens for heads; counts for `unified` only.
        """
        if spec.has_mask and context_degree > 1:
            return (
                "masks that are tensors are not split over ranks: describe the mask by a MaskSpec, or keep this call whole "
                "with strategy none."
            )
        return None

    def wrap(
        self, backend: AttentionBackend, place: SequencePlace, spec: AttentionSpec | None = None, opaque: bool = False
    ) -> AttentionFn:
        """The function that a model calls with this rank's tokens; every rank of the groups calls it the same number of times.

        Where no rank shares the sequence this is `backend` itself.

        Args:
            backend: computes on one rank.
            place: this rank's groups, and the layout of the sequence at the time of the call.
            spec: the calls, where known: what cannot work is then refused now and not at the first call.
            opaque: one rank computes through the operator `ops.attention` too, which selective checkpointing can keep; it
                takes a MaskSpec but no mask tensors.

        Raises:
            ConfigError: the operator is needed, and the backend has no `forward` and `backward`.
            ParallelError: this strategy cannot serve `spec` with these groups.
        """
        is_alone = place.context_degree == 1
        if is_alone and not opaque:
            return backend
        if not backend.supports_lse:
            raise ConfigError(
                f"attention strategy {self.name} needs the log-sum-exp of the softmax, which backend {backend.name} does not "
                "give: choose sdpa, flash_attn or math."
            )
        if is_alone:
            return DistributedAttention("none", backend, SequencePlace(), "", "")
        self.check_groups(place)
        if spec and (reason := self.refuse(spec, place.context_degree, place.ulysses_degree)):
            raise ParallelError(f"attention strategy {self.name}: {reason}")
        inner, outer = self.groups(place)
        return DistributedAttention(self.name, backend, place, ops.group_name(inner), ops.group_name(outer))

    def check_groups(self, place: SequencePlace) -> None:
        """Raises ParallelError where `place` lacks a group that this strategy needs; most need `context` alone."""
        return

    @abstractmethod
    def groups(self, place: SequencePlace) -> tuple[ProcessGroup | None, ProcessGroup | None]:
        """The group that trades tokens for heads, and the one that shares keys and values."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionResult:
        """q `(B, L, N, K)`, k and v `(B, L, G, K)` of this rank's tokens."""

    @abstractmethod
    def backward(self, dout: Tensor, saved: Sequence[Tensor], lse: Tensor, num_kv_heads: int, call: AttentionCall) -> Gradients:
        """Gradients for this rank's tokens. `saved` is q, k, v and out, or what was traded; `num_kv_heads` is G."""


@dataclass(frozen=True, eq=False)
class DistributedAttention:
    """Attention of this rank's tokens to those of all ranks, as one operator (`ops.attention`)."""

    strategy: str
    backend: AttentionBackend
    place: SequencePlace
    inner: str
    outer: str

    @property
    def name(self) -> str:
        """Strategy and backend, for reports: `ring(sdpa)`."""
        return f"{self.strategy}({self.backend.name})"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec | Tensor | None = None) -> Tensor:
        """q `(B, L, N, K)`, k and v `(B, L, G, K)` of this rank's tokens -> `(B, L, N, K)`.

        Raises:
            ParallelError: `mask` is a tensor, no layout is set, or the tokens are not those of the layout.
        """
        if isinstance(mask, Tensor):
            raise ParallelError(
                f"{self.name} takes no mask tensor, because no rank holds all its rows: describe the mask by a MaskSpec, or "
                "keep this call whole with strategy none."
            )
        text = self.place.layout_text
        if self.inner or self.outer:
            self._check(q, mask)
        q, k, v = (_autocast(x) for x in (q, k, v))
        shown = FULL if mask is None else mask.to_text()
        scale = q.shape[-1] ** -0.5
        result = torch.ops.videofm.attention(
            q, k, v, self.strategy, self.backend.name, text, shown, self.inner, self.outer, scale
        )
        out: Tensor = result[0]
        return out

    def _check(self, q: Tensor, mask: MaskSpec | None) -> None:
        layout, rank = self.place.layout, self.place.context_rank
        if layout is None:
            raise ParallelError(
                f"{self.name} does not know which tokens this rank holds: set `place.layout` before the model runs."
            )
        if q.shape[1] != layout.lengths[rank]:
            raise ParallelError(
                f"context rank {rank} calls {self.name} with {q.shape[1]} tokens, but the layout gives it "
                f"{layout.lengths[rank]} of {layout.length}: split the sequence by `place.layout`."
            )
        if mask is not None:
            mask.check(layout.length, q.shape[0])


def _autocast(x: Tensor) -> Tensor:
    """`x` in the dtype that products of matrices have here; `scaled_dot_product_attention` does the same."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
