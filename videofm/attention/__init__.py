"""Attention has one door: `choose(name, spec)` returns the function that a model calls as `self.attend(q, k, v, mask)`."""

from videofm.attention.api import AttentionSpec, choose
from videofm.attention.documents import Documents
from videofm.attention.layout import SequenceLayout
from videofm.attention.masks import MaskSpec
from videofm.attention.merge import BlockOutput, merge

__all__ = ["AttentionSpec", "BlockOutput", "Documents", "MaskSpec", "SequenceLayout", "choose", "merge"]
