"""Video autoencoders, one folder each."""
