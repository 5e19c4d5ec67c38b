"""videofm: train video foundation models, from raw video files to a model that inference software loads."""

__version__ = "0.1.0"
