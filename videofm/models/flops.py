"""Floating-point operations of a training step, counted by hand, for the model FLOPs utilisation (MFU).

A multiply-add counts as two. Only matrix products and attention count, as `torch.utils.flop_counter` has it, and what is
computed a second time to save memory does not.
"""

from __future__ import annotations

from typing import Any

from videofm.errors import ConfigError


def flops_per_sample(model_or_config: Any, num_tokens: int, num_text_tokens: int) -> int:
    """FLOPs of one sample forward and backward through the blocks of a transformer, and through what is injected into them.

    Args:
        model_or_config: the model, or its config, which has `flops(num_tokens, num_text_tokens)`.
        num_tokens: latent tokens that the blocks see.
        num_text_tokens: tokens of text that these attend to, padding included.

    Raises:
        ConfigError: a model without a formula, or a count below 1.
    """
    config = getattr(model_or_config, "config", model_or_config)
    if not hasattr(config, "flops"):
        raise ConfigError(f"{type(model_or_config).__name__} has no formula for its FLOPs: its config needs a method `flops`.")
    if num_tokens < 1 or num_text_tokens < 1:
        raise ConfigError(f"num_tokens {num_tokens} and num_text_tokens {num_text_tokens} must be at least 1.")
    injection = getattr(model_or_config, "injection", None)
    guidance = 0 if injection is None else injection.flops(config, num_tokens, num_text_tokens)
    return config.flops(num_tokens, num_text_tokens) + guidance


def cross_attention_transformer_flops(num_layers: int, width: int, num_tokens: int, num_text_tokens: int) -> int:
    """FLOPs, forward and backward, of blocks of self-attention, attention to a text, and a feed-forward of ratio 4.

    With d the width, s tokens and T text tokens, a product with a d x d matrix costs `2 d^2` a token. A block has

    - on its tokens, q, k, v, out (4), q and out to the text (2), the feed-forward (4 + 4): 14 such products, `28 s d^2`;
    - on the text, k and v: `4 T d^2`;
    - logits and weighted sum of self-attention, `2 s^2 d` each: `4 s^2 d`; of attention to the text: `4 s T d`.

    The gradient of a product is two of its size, one for each factor: forward and backward are 3 times forward. Left out is
    what does not grow with the number of layers: the first and the last layer, the projection of the text, and the embedding of
    the noise level, which is the largest of them where every token has its own (`14 s d^2` forward, half a layer).
    This is the count of Step-Video (arXiv 2502.10248, table 3; spec step-video A3).
    """
    d, s, text = width, num_tokens, num_text_tokens
    return 3 * num_layers * (28 * s * d**2 + 4 * text * d**2 + 4 * s**2 * d + 4 * s * text * d)
