"""Trained models in the layouts that other software loads."""

from videofm.export.adapter_folder import write_adapter_folder
from videofm.export.diffusers_folder import write_diffusers_folder
from videofm.export.vae_folder import write_vae_folder

__all__ = ["write_adapter_folder", "write_diffusers_folder", "write_vae_folder"]
