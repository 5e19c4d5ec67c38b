"""From training stage one to stage two: the plain 4x8x8 VAE becomes the backbone of one with dual paths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from videofm.errors import CheckpointError, ConfigError
from videofm.models.io import load
from videofm.models.spec import list_keys
from videofm.models.vae.step_video.model import StepVideoVAE

_REPLACED = ("encoder.conv_out.", "decoder.conv_in.", "latents_")
"""What stage one has in place of the dual paths, and the statistics of its latents."""
_FRESH = ("encoder.dual_path.", "decoder.dual_path.", "latents_")


def load_stage_one(model: StepVideoVAE, state_dict: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Copy into `model` all that it shares with a VAE of stage one (arXiv 2502.10248, section 4.1.2).

    Args:
        model: has dual paths.
        state_dict: of a model built with `dual_path=False` and otherwise the same widths and depths, in our layout.

    Returns:
        The tensors of `model` that stay as they are: those of the dual paths, and the latent statistics.

    Raises:
        ConfigError: `model` has no dual path.
        CheckpointError: `state_dict` is not that of the same VAE without dual path.
    """
    if not model.config.dual_path:
        raise ConfigError("a VAE without dual path is of stage one itself: load its weights with models.load_weights.")
    own = model.state_dict()
    shared = {key: tensor for key, tensor in own.items() if not key.startswith(_FRESH)}
    given = {key: tensor for key, tensor in state_dict.items() if not key.startswith(_REPLACED)}
    missing = [key for key in shared if key not in given]
    unexpected = [key for key in given if key not in shared]
    reshaped = [key for key in shared if key in given and given[key].shape != shared[key].shape]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    if found := [f"{len(keys)} {what}: {list_keys(keys)}" for what, keys in problems.items() if keys]:
        raise CheckpointError(
            f"these weights are not of stage one of this {model.spec_name} (dual_path off, else the same config). Tensors "
            f"{'; '.join(found)}."
        )
    model.load_state_dict(given, strict=False)
    return tuple(key for key in own if key not in shared)


def grow(model: StepVideoVAE, path: str | Path) -> None:
    """`load_stage_one` from disk: a run, checkpoint or folder of a `vae/step_video` of stage one.

    Raises:
        CheckpointError: another model, or as `load_stage_one`.
    """
    source = load(path, role="vae")
    if source.spec_name != model.spec_name:
        raise CheckpointError(f"{path} holds {source.spec_name}; expected {model.spec_name} with dual_path off (size 8x8x4).")
    load_stage_one(model, source.state_dict())
