"""Diffusion transformers, one folder each."""
