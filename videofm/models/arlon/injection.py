"""How features enter the blocks of a diffusion transformer (ARLON, arXiv 2410.20502; spec step-video-arlon-dpo B5).

Three kinds behind one interface (`videofm.models.injection`), for the ablation of the paper: gated adaptive norm, which is the
paper's choice, an MLP beside the residual stream, and a ControlNet (arXiv 2302.05543; for transformers arXiv 2401.05252). The
last linear layer of each starts at zero, so that training starts from the model without features bit for bit.

No code of the paper is public: that the MLP of a block has one hidden layer, and that the first linear layer is shared by all
blocks, is our choice.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

from videofm.errors import ConfigError
from videofm.models.injection import Injection, InjectionSpec

NORM_EPS = 1e-6


class ZeroMLP(nn.Module):
    """Linear, GELU (tanh form), Linear; the last starts at zero."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, width)
        self.linear2 = nn.Linear(width, out_width)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.zeros_(self.linear1.bias)
        zero_(self.linear2)

    def forward(self, side: Tensor) -> Tensor:
        """`(B, L, width)` -> `(B, L, out_width)`."""
        return self.linear2(gelu(self.linear1(side), approximate="tanh"))


class AdaptiveNormLayer(nn.Module):
    """`x + gate * (norm(x) * (1 + scale) + shift)`; shift, scale and gate come from the token's feature."""

    def __init__(self, side_width: int, width: int) -> None:
        super().__init__()
        self.mlp = ZeroMLP(side_width, 3 * width)

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        """`x` `(B, L, D)`, `side` `(B, L, E)` -> `(B, L, D)`, in the dtype of `x` under autocast too."""
        shift, scale, gate = self.mlp(side).to(x.dtype).chunk(3, dim=-1)  # (B, L, 3 D) -> 3 x (B, L, D)
        h = layer_norm(x, x.shape[-1:], eps=NORM_EPS)
        return torch.addcmul(x, gate, torch.addcmul(shift, h, 1 + scale))


class MLPLayer(nn.Module):
    """`x + MLP(side)`."""

    def __init__(self, side_width: int, width: int) -> None:
        super().__init__()
        self.mlp = ZeroMLP(side_width, width)

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        """`x` `(B, L, D)`, `side` `(B, L, E)` -> `(B, L, D)`, in the dtype of `x` under autocast too."""
        return x + self.mlp(side).to(x.dtype)


class LinearLayer(nn.Module):
    """`x + Linear(side)`, which starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        zero_(self.linear)

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        """`x` and `side` `(B, L, D)` -> `(B, L, D)`, in the dtype of `x` under autocast too."""
        return x + self.linear(side).to(x.dtype)


class AdaptiveNorm(Injection):
    """The paper's kind: a norm before the block that the feature scales, shifts and gates."""

    def __init__(self, model: Any, spec: InjectionSpec) -> None:
        super().__init__(spec)
        self.layers.extend(AdaptiveNormLayer(self.side_width, model.config.width) for _ in spec.blocks)


class MLP(Injection):
    """What an MLP of a block makes of the feature is added before the block."""

    def __init__(self, model: Any, spec: InjectionSpec) -> None:
        super().__init__(spec)
        self.layers.extend(MLPLayer(self.side_width, model.config.width) for _ in spec.blocks)


class ControlNet(Injection):
    """Copies of the model's first blocks, one for each guided block, run on tokens plus features beside the model.

    What the k-th copy makes goes through a linear layer into the k-th guided block, wherever that is. A copy starts with the
    weights that its block has when the injection is made; it takes the same arguments.

    Raises:
        ConfigError: another `hidden_width` than the width of the blocks.
    """

    def __init__(self, model: Any, spec: InjectionSpec) -> None:
        super().__init__(spec)
        width = model.config.width
        if self.side_width != width:
            raise ConfigError(
                f"injection.hidden_width is {self.side_width}: a controlnet runs copies of blocks of width {width}, so it can "
                "only be that, or null."
            )
        copied = list(model.blocks)[: len(spec.blocks)]
        self.blocks.extend(copy.deepcopy(block).requires_grad_(True) for block in copied)
        self.layers.extend(LinearLayer(width) for _ in spec.blocks)

    def start(self, x: Tensor, side: Tensor) -> Tensor:
        """Tokens plus features, `(B, L, D)`."""
        return x + side

    def advance(self, place: int, side: Tensor, args: tuple[Any, ...]) -> Tensor:
        """`side` through the copy in `place`."""
        return self.blocks[place](side, *args)


@torch.no_grad()
def zero_(linear: nn.Linear) -> None:
    """Set weight and bias to zero, in place."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
