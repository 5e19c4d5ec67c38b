"""Triton kernels, each beside nothing but its operator; imported only where there is a GPU to run them, or by their tests."""
