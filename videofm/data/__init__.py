"""Shards, decoders, and the order in which training reads them."""
