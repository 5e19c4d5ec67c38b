"""ARLON (arXiv 2410.20502): what an autoregressive model guides a diffusion transformer with."""
