"""Models in roles of another kind are refused by name, and models of the kind are not, whichever they are."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from tests.unit.train.test_build import config
from videofm import models
from videofm.config.latent_tokens import LatentTokensConfig
from videofm.config.next_token import NextTokenConfig
from videofm.config.train import TrainConfig
from videofm.errors import ConfigError
from videofm.objectives.latent_tokens import LatentTokensObjective
from videofm.objectives.next_token import NextTokenObjective
from videofm.objectives.roles import KINDS, check_kinds
from videofm.train.build import build_models, dry_run

FAMILIES = {"dit/": "dit", "vae/": "vae", "text/": "text_encoder", "arlon/": "tokenizer", "ar/": "ar"}
"""Beginning of a registered name -> a role for it."""


@pytest.fixture(scope="module")
def built() -> dict[str, nn.Module]:
    """A model of each registered name of a family."""
    names = [name for name in models.names() if name.startswith(tuple(FAMILIES))]
    return {name: models.build(name, models.sizes(name)[0], device="meta") for name in names}


def role_of(name: str) -> str:
    return next(role for prefix, role in FAMILIES.items() if name.startswith(prefix))


def test_each_kind_fills_its_roles_and_no_others(built: dict[str, nn.Module]) -> None:
    assert {role_of(name) for name in built} == set(FAMILIES.values())
    for name, model in built.items():
        for role, kind in KINDS.items():
            if kind is KINDS[role_of(name)]:
                check_kinds({role: model})
                continue
            with pytest.raises(
                ConfigError, match=f"models.{role} is {name}, and the role {role} takes an? .*: set models.{role}"
            ):
                check_kinds({role: model})
    check_kinds({"discriminator": built["dit/ltx"]})


def test_objectives_name_the_role(built: dict[str, nn.Module]) -> None:
    dit, vae, text = built["dit/ltx"], built["vae/ltx"], built["text/t5"]
    with pytest.raises(ConfigError, match="models.tokenizer is dit/ltx, and the role tokenizer takes a latent tokenizer"):
        LatentTokensObjective(LatentTokensConfig(kind="latent_tokens")).check({"tokenizer": dit, "vae": vae})
    given = {"ar": vae, "text_encoder": text, "tokenizer": built["arlon/tokenizer"]}
    with pytest.raises(ConfigError, match="models.ar is vae/ltx, and the role ar takes an autoregressive transformer"):
        NextTokenObjective(NextTokenConfig(kind="next_token")).check(given)


@pytest.mark.parametrize("role", ["dit", "vae", "text_encoder"])
def test_a_training_of_a_dit_is_refused_when_it_is_built_and_by_a_dry_run(role: str) -> None:
    fields: dict[str, Any] = config()
    fields["models"][role] = {"name": "ar/transformer"}
    wanted = TrainConfig.model_validate(fields)
    for attempt in (build_models, dry_run):
        with pytest.raises(ConfigError, match=f"models.{role} is ar/transformer, and the role {role} takes a"):
            attempt(wanted)
