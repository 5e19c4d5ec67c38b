"""Whose latents a tokenizer speaks of: the VAE that its training had, against the one at hand.

Two VAEs may have as many channels and quite other latents; codes and features of one mean nothing in the space of the other.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from videofm.errors import ConfigError
from videofm.progress import LOG
from videofm.registry import resolve
from videofm.sampling.source import models_folder, training_config
from videofm.sampling.token_guide import TokenGuide


def trained_vae(source: str | Path | None) -> nn.Module | None:
    """The VAE on whose latents the tokenizer at `source` was trained, or None where nothing tells.

    The run of a tokenizer keeps its VAE in `frozen/`. A run that only used a tokenizer says where that came from. The folder of
    a single model, as an export is one, has no VAE beside it; nor has a tokenizer that was built anew (`source` None).
    """
    while source is not None:
        folder = models_folder(source)
        is_run = (folder / "checkpoints").is_dir() or (folder / "COMMITTED.json").is_file()
        if not is_run or not (config := training_config(folder)):
            return None
        told = config.get("models", {})
        if "vae" in told or "tokenizer" not in told:
            found: nn.Module = resolve("videofm.models:load")(folder, role="vae")
            return found
        source = told["tokenizer"].get("path")
    return None


def check_vae(source: str | Path | None, vae: nn.Module, tokenizer: str, other: str) -> None:
    """Refuse a tokenizer for latents of another VAE than the one that it was trained on; where nothing tells, the log says so.

    Args:
        source: the run, checkpoint or folder that the tokenizer is loaded from; None for one that was built anew.
        vae: the VAE whose latents it is to work on.
        tokenizer: what messages call the tokenizer.
        other: what they call `vae`.

    Raises:
        ConfigError: the VAE of its training has other weights.
    """
    theirs = trained_vae(source)
    if theirs is None:
        warn_unchecked(tokenizer)
    elif not same_weights(theirs, vae):
        raise another_vae(tokenizer, source, other)


def warn_unchecked(tokenizer: str) -> None:
    """Say that nothing tells whether a tokenizer is of the VAE at hand."""
    LOG.warning("no run of its training tells which VAE %s is of: that it is this one was not checked", tokenizer)


def another_vae(tokenizer: str, source: str | Path | None, other: str) -> ConfigError:
    """The error of a tokenizer, from `source`, that is of another VAE than the one called `other`."""
    return ConfigError(
        f"{tokenizer} at {source} was trained on latents of another VAE than {other}. Features and tokens belong to the space "
        "of latents: train the tokenizer, the autoregressive model and the DiT with one VAE."
    )


def check_origin(guide: TokenGuide, guide_run: str | Path, vae: nn.Module, run: str | Path) -> None:
    """Refuse a guide that does not belong to `vae`, or whose tokenizer has changed since its autoregressive model was trained.

    Args:
        guide: what `TokenGuide.load(guide_run)` gives.
        guide_run: the run of its autoregressive model, which names that of the tokenizer.
        vae: that of the pipeline.
        run: where the pipeline comes from, for messages.

    Raises:
        ConfigError: the tokenizer of that run, or its VAE, has other weights.
    """
    told = training_config(models_folder(guide_run)).get("models", {}).get("tokenizer", {})
    path = told.get("path")
    if path is not None and (folder := models_folder(path)).exists():
        theirs = resolve("videofm.models:load")(folder, role=told.get("role") or "tokenizer")
        if not same_weights(theirs, guide.tokenizer):
            raise ConfigError(
                f"guide {str(guide_run)!r}: the tokenizer at {path} is not the one that this AR model was trained with, whose "
                "indices would mean something else: train the AR model anew, or bring that tokenizer back."
            )
    check_vae(path, vae, f"the tokenizer of guide {str(guide_run)!r}", f"that of run = {str(run)!r}")


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have tensors of the same names and values, rounded to bfloat16: a model and its bfloat16 copy have."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(_rounded(first[name]), _rounded(second[name])) for name in first)


def _rounded(tensor: Tensor) -> Tensor:
    return (tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor).cpu()
