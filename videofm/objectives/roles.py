"""What a model must be to fill a role: looked at before anything is asked of it, for every objective alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from videofm.errors import ConfigError


@dataclass(frozen=True)
class Kind:
    """What a role takes, in words, and attributes that such a model has and one of another kind lacks."""

    what: str
    attributes: tuple[str, ...]


_DIT = Kind("a diffusion transformer, such as dit/ltx", ("coordinates",))
_TOKENIZER = Kind("a latent tokenizer, such as arlon/tokenizer", ("num_books", "vocab_size"))

KINDS: dict[str, Kind] = {
    "dit": _DIT,
    "reference": _DIT,
    "vae": Kind("a video VAE, such as vae/ltx", ("normalize", "latent_channels")),
    "text_encoder": Kind("a text encoder, such as text/t5", ("cuts",)),
    "tokenizer": _TOKENIZER,
    "fine_tokenizer": _TOKENIZER,
    "ar": Kind("an autoregressive transformer over tokens, such as ar/transformer", ("inputs_of",)),
}
"""Role -> what it takes. Attributes and not names, so that a new model of a kind needs no entry."""


def check_kinds(models: Mapping[str, nn.Module]) -> None:
    """Refuse a model of the wrong kind in a role; roles without an entry in `KINDS` are not looked at.

    Raises:
        ConfigError: the message has the role, the model's name and what the role takes.
    """
    for role, model in models.items():
        kind = KINDS.get(role)
        if kind is not None and not all(hasattr(model, name) for name in kind.attributes):
            raise ConfigError(
                f"models.{role} is {getattr(model, 'spec_name', type(model).__name__)}, and the role {role} takes {kind.what}: "
                f"set models.{role}.name to one, or load another (models.{role}.path, with models.{role}.role where a run "
                "holds several)."
            )
