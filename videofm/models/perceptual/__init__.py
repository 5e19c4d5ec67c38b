"""Frozen networks that see what people see: distances between frames (LPIPS) and features of clips (I3D).

Their weights are public but not ours to ship: `tools/convert_perceptual.py` turns the public files into the safetensors that
these models read.
"""
