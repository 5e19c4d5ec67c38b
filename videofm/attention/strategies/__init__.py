"""How attention runs over ranks that share a sequence; one file a strategy, each holds a `STRATEGY` that wraps a backend."""

from videofm.attention.strategies.place import SequencePlace

__all__ = ["SequencePlace"]
