"""Trained models in the layouts that other software loads."""

from videofm.export.diffusers_folder import write_diffusers_folder

__all__ = ["write_diffusers_folder"]
