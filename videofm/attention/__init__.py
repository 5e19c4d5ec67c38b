"""Attention has one door: `choose(name, spec)` returns the function that a model calls as `self.attend(q, k, v, mask)`."""

from videofm.attention.api import AttentionSpec, choose

__all__ = ["AttentionSpec", "choose"]
