"""Networks that judge videos: what a GAN trains against a decoder."""
