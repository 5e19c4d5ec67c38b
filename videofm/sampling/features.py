"""Features that guide a window (ARLON): who makes them, where the flow starts from them, and which tokens have them.

They lie in the space of normalised latents and have the shape of the window's. The flow may start from them: at noise level
`start_sigma` = s a window begins as `(1 - s) * features + s * noise`, and the schedule, scaled by s, begins there; fewer steps
then go as far (SDEdit, Meng et al. 2021, arXiv 2108.01073). What is given of the window stays given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from videofm.errors import ConfigError
from videofm.ops import flow
from videofm.ops.patchify import tokens_from_latents
from videofm.sampling.conditioning import Condition, Start
from videofm.sampling.frames import FrameRule
from videofm.sampling.guidance import TokenFeatures
from videofm.sampling.token_guide import GuideFeatures


class Guide(Protocol):
    """What makes features; `token_guide.TokenGuide` is one."""

    def features(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        shape: tuple[int, int, int],
        head: Tensor | None = None,
        on_token: Callable[[], None] | None = None,
    ) -> GuideFeatures:
        """Features of a window of `shape` (T, H, W) latent cells for B prompts; it goes on from `head` `(B, C, k, H, W)`.
        `on_token` is called before each token is drawn, and may raise to stop."""
        ...

    def check_latents(self, num_channels: int) -> None:
        """Refuse latents that it has no features for."""
        ...

    def cuts(self, texts: list[str]) -> dict[str, list[bool]]:
        """Which of `texts` are longer than it reads, by each text encoder that it reads them with."""
        ...

    def head_lengths(self, num_frames: int) -> range:
        """How many latent frames a head may have in a window of `num_frames`."""
        ...


def check_guide(
    guide: Guide | None,
    dit: nn.Module,
    start_sigma: float,
    features_in_negative: bool,
) -> None:
    """Refuse settings of features that nothing would read.

    Raises:
        ConfigError: there is no guide, or none that the model has a place for; features in the negative evaluation of a model
            that has none for them in any; a noise level outside of (0, 1].
    """
    if not 0 < start_sigma <= 1:
        raise ConfigError(f"start_sigma is {start_sigma:g}: it lies in (0, 1]; 1 starts from noise, less from the features.")
    if guide is None:
        if start_sigma != 1 or features_in_negative:
            raise ConfigError(
                f"start_sigma is {start_sigma:g} and features_in_negative {features_in_negative}, but there is no guide that "
                "makes features: give one (guide=TokenGuide.load(RUN), or --guide RUN), or leave them at 1 and false."
            )
    elif not injects(dit) and start_sigma == 1:
        raise ConfigError(
            "a guide is given, but this model has no injection that would read its features: take the run of a DiT that was "
            "trained with `models.dit.injection`, or start from the features with a start_sigma below 1."
        )
    elif not injects(dit) and features_in_negative:
        raise ConfigError(
            "features_in_negative is True, but this model has no injection that would read features, in either evaluation: "
            "take the run of a DiT that was trained with `models.dit.injection`, or leave it false."
        )


def check_heads(guide: Guide, rule: FrameRule, windows: Sequence[tuple[range, int]]) -> None:
    """Refuse windows that go on from a part of a token.

    Args:
        guide: whose tokens they are.
        rule: of the VAE.
        windows: the pixel frames of each window, and how many of the first are made or given already.

    Raises:
        ConfigError: a head that ends inside a token frame; the frames that windows may share are offered.
    """
    for number, (frames, num_given) in enumerate(windows):
        if num_given == 0:
            continue
        length = rule.vae.latent_frames(len(frames))
        lengths = guide.head_lengths(length)
        if rule.vae.latent_frames(num_given) not in lengths:
            fit = [str(n) for n in range(1, len(frames)) if rule.whole(n) and rule.vae.latent_frames(n) in lengths]
            raise ConfigError(
                f"window {number} (frames {frames.start} to {frames.stop - 1}) begins with {num_given} that are there already, "
                f"{rule.vae.latent_frames(num_given)} of its {length} latent frames, and the tokens of the guide do not end "
                f"there: in a window of {len(frames)} frames it can be {' or '.join(fit) or 'none'}."
            )


def injects(dit: nn.Module) -> bool:
    """Whether `dit` reads features."""
    return getattr(dit, "injection", None) is not None


def head_of(conditions: Sequence[Condition], num_videos: int) -> Tensor | None:
    """The latents `(B, C, k, H, W)` that are given from the first frame on, at whatever strength; None where none are."""
    found = next((condition.latents for condition in conditions if condition.frame == 0), None)
    return None if found is None else found.expand(num_videos, -1, -1, -1, -1)


def lifted(condition: Condition, start_sigma: float) -> Condition:
    """`condition` at no higher noise level than the window starts with: its strength is at least `1 - start_sigma`."""
    return replace(condition, strength=max(condition.strength, 1 - start_sigma))


def begun(start: Start, features: Tensor, start_sigma: float) -> Start:
    """`start`, with `features` `(B, C, T, H, W)` at noise level `start_sigma` where nothing is given; at 1 as it is."""
    if start_sigma == 1:
        return start
    clean = _behind(features, start).to(start.tokens)
    mixed = flow.add_noise(clean, start.tokens, clean.new_full((len(clean),), start_sigma))
    if start.ceilings is not None:
        mixed = torch.where((start.ceilings == 1)[:, :, None], mixed, start.tokens)
    return replace(start, tokens=mixed)


def on_tokens(features: Tensor, start: Start, in_negative: bool) -> TokenFeatures:
    """`features` `(B, C, T, H, W)` for the tokens of `start`; those behind the video's, of keyframes, have none."""
    tokens = _behind(features, start).to(start.tokens)
    kept = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    kept[:, : features[0, 0].numel()] = True
    return TokenFeatures(tokens, kept, in_negative)


def _behind(features: Tensor, start: Start) -> Tensor:
    """Tokens `(B, L + E, C)` of features, zeros for the E more."""
    tokens = tokens_from_latents(features)
    return pad(tokens, (0, 0, 0, start.tokens.shape[1] - tokens.shape[1]))
