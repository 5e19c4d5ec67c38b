"""Checkpoints: whole or absent, of safetensors and JSON, independent of the layout that wrote them."""
