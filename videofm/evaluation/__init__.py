"""Measurements on tensors and frames. Models come as arguments; nothing here reads a file."""
