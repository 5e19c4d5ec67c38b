"""FlashAttention (Dao et al.), versions 2, 3 and 4 behind one name, for CUDA in half precision and without tensor masks.

The three are packages of their own: `flash_attn`, `flash_attn_interface` (Hopper) and `flash_attn.cute` (Hopper, Blackwell).
The best that is installed and fits the GPU is imported at the first call. They share one layout, `(B, L, N, K)` and lse
`(B, N, L)` in natural logarithm, serve fewer heads of keys natively, and differ in what functions are called and return.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from videofm.attention.api import AttentionSpec
from videofm.attention.backends import shared
from videofm.attention.backends.sdpa import BACKEND as SDPA
from videofm.attention.masks import MaskSpec
from videofm.attention.merge import BlockOutput
from videofm.attention.whole import attend_whole
from videofm.errors import ConfigError

MAX_HEAD_WIDTH = 256
VERSIONS = {2: "flash_attn.flash_attn_interface", 3: "flash_attn_interface", 4: "flash_attn.cute.interface"}
"""Version to the module that holds its functions."""
ORDER = {8: (2,), 9: (3, 4, 2), 10: (4, 2)}
"""Major compute capability of a GPU to the versions that run on it, best first; version 2 elsewhere."""

Gradients = tuple[Tensor, Tensor, Tensor]


class FlashAttnBackend:
    """Wraps whichever version is installed."""

    name = "flash_attn"
    supports_lse = True
    supports_mask = True

    def supports(self, spec: AttentionSpec) -> str | None:
        """The kernel's limits, in words."""
        if installed_version() is None:
            return "the package is not installed (pip install -c constraints.txt -e '.[gpu]')."
        if spec.device_type != "cuda":
            return f"it runs on cuda only, not on {spec.device_type} (use sdpa)."
        if spec.dtype not in (torch.float16, torch.bfloat16):
            return f"it needs float16 or bfloat16, not {spec.dtype} (use sdpa, or train in bf16)."
        if spec.head_width > MAX_HEAD_WIDTH or spec.head_width % 8:
            return f"head width {spec.head_width} is not a multiple of 8 up to {MAX_HEAD_WIDTH} (use sdpa)."
        if spec.has_mask:
            return "it takes no mask (use sdpa or xformers for this call)."
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | MaskSpec | None = None) -> Tensor:
        """q `(B, Lq, N, K)`, k and v `(B, Lk, G, K)` -> like q; see `AttentionBackend`.

        Raises:
            ConfigError: `mask` is of a kind that this kernel has not: a tensor, a window, padding.
        """
        if isinstance(mask, MaskSpec):
            if mask.kind == "documents" and q.numel():
                mask.check(k.shape[1])
                return _documents(q, k, v, mask)
            return attend_whole(self.__call__, q, k, v, mask, causal=lambda q, k, v: _api().whole(q, k, v, causal=True))
        if mask is not None:
            raise ConfigError("attention backend flash_attn takes no dense mask (padding, windows): choose sdpa or flex.")
        return _api().whole(q, k, v)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> BlockOutput:
        """See `AttentionBackend`.

        A block with a mask goes to PyTorch's memory-efficient kernel: strategies cut blocks so that few need one.
        """
        if mask is not None:
            return SDPA.forward(q, k, v, mask, scale)
        return _api().forward(q, k, v, scale) if q.numel() and k.numel() else shared.nothing_seen(q)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
    ) -> Gradients:
        """See `AttentionBackend`."""
        if mask is not None:
            return SDPA.backward(dout, q, k, v, out, lse, mask, scale)
        if not q.numel() or not k.numel():
            return shared.no_gradients(q, k, v)
        dout, out = (x.to(q.dtype).contiguous() for x in (dout, out))
        return _api().backward(dout, q, k, v, out, shared.finite_lse(lse, torch.inf), scale)


def installed_version() -> int | None:
    """The version that calls use: the best one installed that runs on this GPU (any GPU, where there is none); None without."""
    major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 9
    return next((version for version in ORDER.get(major, (2,)) if _is_installed(version)), None)


def _is_installed(version: int) -> bool:
    """Whether the file of its functions is there; nothing is imported to look."""
    package, *inside = VERSIONS[version].split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not inside:
        return spec is not None
    return any(Path(folder, *inside).with_suffix(".py").is_file() for folder in spec.submodule_search_locations or ())


@dataclass(frozen=True)
class _Api:
    """The functions of one version, with the differences between versions taken out."""

    version: int
    module: Any

    def whole(self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        """Differentiable attention of q `(B, L, N, K)`."""
        return _first(self.module.flash_attn_func(q, k, v, causal=causal))

    def packed(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, causal: bool) -> Tensor:
        """Differentiable attention inside the documents of q `(T, N, K)`, which begin at `starts` `(number + 1,)`, int32."""
        bounds = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
        return _first(self.module.flash_attn_varlen_func(q, k, v, **bounds, causal=causal))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> BlockOutput:
        if self.version == 2:
            options = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}
            out, lse, *_ = self.module._flash_attn_forward(q, k, v, 0.0, scale, False, **options, return_softmax=False)
        elif self.version == 3:
            out, lse, *_ = self.module._flash_attn_forward(q, k, v, softmax_scale=scale)
        else:
            out, lse, *_ = self.module._flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True)
        return BlockOutput(out, lse)

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> Gradients:
        if self.version == 4:
            dq, dk, dv, *_ = self.module._flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=scale)
            return dq, dk, dv
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        options: dict[str, Any] = {"dq": dq, "dk": dk, "dv": dv, "softmax_scale": scale}
        if self.version == 2:
            options |= {"dropout_p": 0.0, "causal": False, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0}
            options |= {"alibi_slopes": None, "deterministic": torch.are_deterministic_algorithms_enabled()}
        self.module._flash_attn_backward(dout, q, k, v, out, lse, **options)
        return dq, dk, dv


@lru_cache(maxsize=1)
def _api() -> _Api:
    version = installed_version()
    assert version is not None, "supports() refuses this"
    return _Api(version, importlib.import_module(VERSIONS[version]))


def _first(result: Any) -> Tensor:
    """Some versions return out, some out and lse."""
    return result[0] if isinstance(result, tuple) else result


def _documents(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec) -> Tensor:
    """All documents of all samples in one call: the samples of the batch are laid end to end."""
    lengths = [length for length in mask.lengths if length] * q.shape[0]
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=q.device)
    q_packed, k_packed, v_packed = (rearrange(x, "b l n k -> (b l) n k") for x in (q, k, v))
    packed = _api().packed(q_packed, k_packed, v_packed, starts, max(lengths), mask.is_causal)
    return rearrange(packed, "(b l) n k -> b l n k", b=q.shape[0])


BACKEND = FlashAttnBackend()
