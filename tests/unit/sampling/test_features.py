"""A guide in the sampler: what it is asked, where its features go, and that a flow which starts from them ends where it should.

Most tests know the features: a stand-in draws them from the seeds. The last ones take an autoregressive model and a tokenizer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.sampling import tiny
from videofm import models
from videofm.errors import ConfigError
from videofm.ops.patchify import latents_from_tokens, tokens_from_latents
from videofm.sampling import Pipeline, PixelCondition, Segment, ShiftedSchedule, Storyboard, Window
from videofm.sampling.conditioning import Condition, Start
from videofm.sampling.features import begun, lifted, on_tokens
from videofm.sampling.guidance import TokenFeatures
from videofm.sampling.noise import derived_seed, initial_noise, named_noise, video_seed
from videofm.sampling.token_guide import GuideFeatures, TokenGuide

SIZE: dict[str, Any] = {"height": 16, "width": 16, "fps": 25.0}
LONG: dict[str, Any] = {"num_frames": 21, "window": Window(13, 5), **SIZE}
PROMPTS = ["a red circle moving left", "b"]


class Given:
    """A guide whose features are random numbers of the seeds, and which notes what it is asked."""

    def __init__(self, rate: int = 1) -> None:
        self.rate = rate
        self.asked: list[tuple[list[str], list[int], tuple[int, int, int], Tensor | None]] = []
        self.made: list[Tensor] = []

    def features(
        self, prompts: Any, seeds: Any, shape: tuple[int, int, int], head: Tensor | None = None, on_token: Any = None
    ) -> GuideFeatures:
        self.asked.append((list(prompts), list(seeds), shape, head))
        self.made.append(named_noise(seeds, "features", (16, *shape)))
        return GuideFeatures(self.made[-1], torch.zeros(len(prompts), *shape, dtype=torch.int64), 0.5)

    def cuts(self, texts: list[str]) -> dict[str, list[bool]]:
        return {"text": [len(text) > 30 for text in texts]}

    def check_latents(self, num_channels: int) -> None:
        if num_channels != 16:
            raise ConfigError(f"16 channels, not {num_channels}")

    def head_lengths(self, num_frames: int) -> range:
        return range((num_frames - 1) % self.rate + 1, num_frames, self.rate)


class Oracle(nn.Module):
    """A DiT that takes its features for the data: the velocity `noise - features` of what it sees. A null feature is data 0."""

    def __init__(self, dit: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.injection = nn.Identity()
        self.config, self.coordinates = dit.config, dit.coordinates
        self.calls: list[dict[str, Tensor]] = []

    def forward(
        self, noisy: Tensor, sigma: Tensor, text: Any, coordinates: Tensor, features: Tensor, features_kept: Tensor
    ) -> Tensor:
        self.calls.append({"noisy": noisy, "sigma": sigma, "features": features, "kept": features_kept})
        level = sigma.reshape(len(sigma), -1, 1)
        return (noisy - features * features_kept[..., None]) / level.clamp_min(1e-9)


@pytest.fixture(scope="module")
def plain() -> Pipeline:
    return tiny.pipeline()


@pytest.fixture(scope="module")
def injected(plain: Pipeline) -> Pipeline:
    """The same models, with an injection whose last layers are not zero any more."""
    dit = models.build("dit/ltx", "tiny", num_layers=2)
    dit.load_state_dict(plain.dit.state_dict())
    models.inject_features(dit, models.injection.InjectionSpec(blocks="all"))
    assert dit.injection is not None
    for parameter in dit.injection.parameters():  # type: ignore[union-attr]
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return replace(plain, dit=dit)


def oracle(plain: Pipeline, rate: int = 1) -> tuple[Pipeline, Oracle, Given, list[Tensor]]:
    """A pipeline of the stand-ins, and the latents that it decodes."""
    dit, guide = Oracle(plain.dit), Given(rate)
    pipeline = Pipeline(dit, plain.vae, plain.text_encoder, guide=guide)
    decoded: list[Tensor] = []
    decode = pipeline.decode
    pipeline.decode = lambda latents, *rest: decoded.append(latents) or decode(latents, *rest)  # type: ignore[method-assign, assignment, func-returns-value]
    return pipeline, dit, guide, decoded


@pytest.mark.parametrize("start_sigma", [1.0, 0.6, 0.3])
def test_one_step_of_an_oracle_lands_on_the_features(plain: Pipeline, start_sigma: float) -> None:
    """x = (1 - s) F + s e, so (x - F) / s = e - F and x - s (e - F) = F, for any s; with more steps too. What the model sees
    first is x, at level s."""
    for num_steps in (1, 3):
        pipeline, dit, guide, decoded = oracle(plain)
        pipeline.generate(PROMPTS, num_frames=13, num_steps=num_steps, guidance_scale=1.0, start_sigma=start_sigma, **SIZE)
        (clean,) = guide.made
        torch.testing.assert_close(decoded[0], clean, atol=2e-6, rtol=0)
        seeds = [video_seed(0, index) for index in range(2)]
        noise = initial_noise(seeds, (16, 4, 2, 2))
        first = latents_from_tokens(dit.calls[0]["noisy"], (4, 2, 2))
        torch.testing.assert_close(first, (1 - start_sigma) * clean + start_sigma * noise, atol=1e-6, rtol=0)
        assert dit.calls[0]["sigma"].tolist() == pytest.approx([start_sigma] * 2)
        assert guide.asked[0][:3] == (PROMPTS, seeds, (4, 2, 2))


def test_levels_are_those_of_the_schedule_scaled(plain: Pipeline) -> None:
    """Shift 3 in 4 steps: 1, .9, .75, .5; half of each."""
    pipeline, dit, _, _ = oracle(plain)
    how = {"schedule": ShiftedSchedule(3.0), "num_steps": 4, "guidance_scale": 1.0}
    pipeline.generate(["a"], num_frames=5, start_sigma=0.5, **how, **SIZE)  # type: ignore[arg-type]
    assert [call["sigma"].item() for call in dit.calls] == pytest.approx([0.5, 0.45, 0.375, 0.25])


def test_a_head_stays_and_the_guide_goes_on_from_it(plain: Pipeline) -> None:
    """The second window is given the latents of the 5 frames before it: the guide gets them, the model sees them at level 0 and
    they come out bit for bit; all others start at 0.4 and land on the features."""
    pipeline, dit, guide, decoded = oracle(plain)
    told = Storyboard((Segment(0, 13, "a"), Segment(13, 21, "c")))
    pieces = list(
        pipeline.stream_windows([told, "b"], num_steps=1, guidance_scale=1.0, start_sigma=0.4, prompt_suffix="!", **LONG)
    )
    seeds = [video_seed(0, index) for index in range(2)]
    own = [derived_seed(seed, "window:1") for seed in seeds]
    assert [asked[:3] for asked in guide.asked] == [(["a!", "b!"], seeds, (4, 2, 2)), (["c!", "b!"], own, (4, 2, 2))]
    assert guide.asked[0][3] is None
    with torch.no_grad():
        head = plain.vae.normalize(plain.vae.encode(pieces[0].video[:, :, -5:]).mode())  # type: ignore[operator]
    assert guide.asked[1][3] is not None and guide.asked[1][3].equal(head)
    assert decoded[1][:, :, :2].equal(head)
    torch.testing.assert_close(decoded[1][:, :, 2:], guide.made[1][:, :, 2:], atol=2e-6, rtol=0)
    assert dit.calls[1]["sigma"][0].tolist() == pytest.approx([0.0] * 8 + [0.4] * 8)
    assert [piece.ar_seconds for piece in pieces] == [0.5, 0.5] and pieces[1].indices is not None


def test_what_is_given_in_part_waits_at_its_own_level_or_below(plain: Pipeline) -> None:
    """Strength 0.9 is level 0.1 whatever the start; strength 0.2 would be 0.8, above a start at 0.3, and becomes 0.7."""
    assert lifted(Condition(torch.zeros(1), 0, 0.9), 0.3).strength == 0.9
    assert lifted(Condition(torch.zeros(1), 0, 0.2), 0.3).strength == pytest.approx(0.7)
    assert lifted(Condition(torch.zeros(1), 0, 0.2), 1.0).strength == 0.2
    pipeline, dit, guide, _ = oracle(plain)
    image = PixelCondition(torch.full((1, 3, 1, 16, 16), 0.5), 0, 0.2)
    pipeline.generate(PROMPTS, num_frames=13, conditions=[image], num_steps=1, guidance_scale=1.0, start_sigma=0.3, **SIZE)
    with torch.no_grad():
        given = plain.vae.normalize(plain.vae.encode(image.video).mode())  # type: ignore[operator]
    noise = initial_noise([video_seed(0, index) for index in range(2)], (16, 4, 2, 2))
    seen = latents_from_tokens(dit.calls[0]["noisy"], (4, 2, 2))
    torch.testing.assert_close(seen[:, :, :1], 0.7 * given + 0.3 * noise[:, :, :1], atol=1e-6, rtol=0)
    torch.testing.assert_close(seen[:, :, 1:], 0.7 * guide.made[0][:, :, 1:] + 0.3 * noise[:, :, 1:], atol=1e-6, rtol=0)
    assert dit.calls[0]["sigma"][0].tolist() == pytest.approx([0.3] * 16)
    head = guide.asked[0][3]
    assert head is not None and head.equal(given.expand(2, -1, -1, -1, -1))


def test_start_sigma_one_is_the_plain_start(plain: Pipeline) -> None:
    start = Start(torch.randn(2, 4, 16), torch.zeros(2, 3, 4), torch.ones(2, 4))
    assert begun(start, torch.randn(2, 16, 1, 2, 2), 1.0) is start


def test_a_guide_of_a_fresh_injection_changes_nothing(plain: Pipeline) -> None:
    """Its last layer is zero: with features and starting from noise, every bit is that of the model without."""
    dit = models.build("dit/ltx", "tiny", num_layers=2)
    dit.load_state_dict(plain.dit.state_dict())
    models.inject_features(dit, models.injection.InjectionSpec())
    guided = replace(plain, dit=dit, guide=Given())
    assert guided.generate(PROMPTS, num_steps=2, **LONG).equal(plain.generate(PROMPTS, num_steps=2, **LONG))


def test_features_reach_the_model(plain: Pipeline, injected: Pipeline) -> None:
    """Other features, another video; without a guide the null feature stands everywhere, as with all features dropped."""
    guide = Given()
    found = replace(injected, guide=guide).generate(PROMPTS, num_frames=13, num_steps=2, **SIZE)
    again = replace(injected, guide=Given()).generate(PROMPTS, num_frames=13, num_steps=2, **SIZE)
    assert again.equal(found)
    unguided = injected.generate(PROMPTS, num_frames=13, num_steps=2, **SIZE)
    strengthened = replace(injected, guide=Given())
    both = strengthened.generate(PROMPTS, num_frames=13, num_steps=2, features_in_negative=True, **SIZE)
    for other in (unguided, both, plain.generate(PROMPTS, num_frames=13, num_steps=2, **SIZE)):
        assert (found - other).abs().max() > 1e-3
    batch = replace(injected, guide=Given()).generate(PROMPTS, num_frames=13, num_steps=2, batch_size=1, **SIZE)
    torch.testing.assert_close(batch, found, atol=1e-5, rtol=0)


def test_rows_of_guidance_and_keyframes() -> None:
    """The negative has the null feature unless it is told otherwise; tokens behind those of the video have it always."""
    clean = torch.randn(2, 16, 1, 1, 2)
    found = on_tokens(clean, Start(torch.zeros(2, 3, 16), torch.zeros(2, 3, 3)), False)
    assert found.tokens[:, :2].equal(tokens_from_latents(clean)) and not found.tokens[:, 2].any()
    for in_negative, negative in ((False, [False] * 3), (True, [True, True, False])):
        rows = replace(found, in_negative=in_negative).arguments(True, True, torch.bfloat16)
        assert rows["features_kept"].tolist() == [negative] * 2 + [[True, True, False]] * 4
        assert rows["features"].shape == (6, 3, 16) and rows["features"].dtype == torch.bfloat16
        assert rows["features"][2:4].equal(found.tokens.bfloat16())
    alone = TokenFeatures(found.tokens, found.kept).arguments(False, False, torch.float32)
    assert alone["features"].equal(found.tokens) and alone["features_kept"].equal(found.kept)


def test_a_start_from_features_needs_no_injection(plain: Pipeline) -> None:
    """Then the features are where the flow starts, and nothing else knows of them."""
    guided = replace(plain, guide=Given())
    found = guided.generate(PROMPTS, num_frames=13, num_steps=1, start_sigma=0.5, **SIZE)
    assert (found - plain.generate(PROMPTS, num_frames=13, num_steps=1, **SIZE)).abs().max() > 1e-3


def test_what_nothing_would_read_is_refused(plain: Pipeline, injected: Pipeline) -> None:
    short: dict[str, Any] = {"num_frames": 13, "num_steps": 1, **SIZE}
    with pytest.raises(ConfigError, match="a guide is given, but this model has no injection that would read its features"):
        replace(plain, guide=Given()).generate(PROMPTS, **short)
    with pytest.raises(ConfigError, match="start_sigma is 0.5 and features_in_negative False, but there is no guide"):
        injected.generate(PROMPTS, start_sigma=0.5, **short)
    with pytest.raises(ConfigError, match="start_sigma is 1 and features_in_negative True, but there is no guide"):
        injected.generate(PROMPTS, features_in_negative=True, **short)
    with pytest.raises(ConfigError, match="features_in_negative is True, but this model has no injection .* in either"):
        replace(plain, guide=Given()).generate(PROMPTS, start_sigma=0.5, features_in_negative=True, **short)
    for wrong in (0.0, 1.5):
        with pytest.raises(ConfigError, match=rf"start_sigma is {wrong:g}: it lies in \(0, 1\]"):
            replace(injected, guide=Given()).generate(PROMPTS, start_sigma=wrong, **short)


def test_windows_that_end_inside_a_token_are_refused(injected: Pipeline) -> None:
    """13 frames are 4 latent frames. Tokens of 2 (rate 2): a head may have 2 of 4, so 5 frames; not 1 or 3. The last window of
    17 = 13 + 4 has 9 frames, 3 latent frames, of which it may have 1."""
    guided = replace(injected, guide=Given(rate=2))
    assert guided.generate(["a"], num_steps=1, **LONG).shape == (1, 3, 21, 16, 16)
    with pytest.raises(ConfigError, match=r"window 1 \(frames 12 to 24\) begins with 1 .*, 1 of its 4 latent .* it can be 5"):
        guided.generate(["a"], num_steps=1, **LONG | {"window": Window(13, 1), "num_frames": 25})
    with pytest.raises(ConfigError, match=r"window 1 \(frames 8 to 16\) begins with 5 .*, 2 of its 3 latent .* it can be 1\."):
        guided.generate(["a"], num_steps=1, **LONG | {"num_frames": 17})
    image = PixelCondition(torch.zeros(1, 3, 1, 16, 16))
    with pytest.raises(ConfigError, match=r"window 0 \(frames 0 to 12\) begins with 1 that are there already"):
        guided.generate(["a"], num_steps=1, num_frames=13, conditions=[image], **SIZE)


@pytest.fixture(scope="module")
def token_guide() -> TokenGuide:
    torch.manual_seed(0)
    tokenizer = models.build("arlon/tokenizer", "tiny", latent_channels=16)
    ar = models.build("ar/transformer", "tiny", vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        for parameter in ar.parameters():
            parameter.mul_(8.0 if parameter.ndim == 2 else 1.0)
    return TokenGuide(ar, models.build("text/t5", "tiny", max_length=24), tokenizer)


def test_a_long_video_with_an_autoregressive_guide(injected: Pipeline, token_guide: TokenGuide) -> None:
    """The tokens of a window begin with those of the frames it shares; alone or in a batch, a video is the same."""
    guided = replace(injected, guide=token_guide)
    pieces = list(guided.stream_windows(PROMPTS, num_steps=2, start_sigma=0.7, **LONG))
    assert [piece.indices.shape for piece in pieces if piece.indices is not None] == [(2, 4, 1, 1)] * 2
    with torch.no_grad():
        head = injected.vae.normalize(injected.vae.encode(pieces[0].video[:, :, -5:]).mode())  # type: ignore[operator]
    assert pieces[1].indices is not None and pieces[1].indices[:, :2].equal(token_guide.tokenizer.encode(head))  # type: ignore[operator]
    assert all(piece.ar_seconds > 0 and piece.dit_seconds > 0 for piece in pieces)
    whole = torch.cat([piece.video for piece in pieces], dim=2)
    alone = guided.generate(PROMPTS, num_steps=2, start_sigma=0.7, batch_size=1, **LONG)
    torch.testing.assert_close(alone, whole, atol=1e-4, rtol=0)


def test_what_the_guide_cuts_is_told_apart(plain: Pipeline, token_guide: TokenGuide, caplog: pytest.LogCaptureFixture) -> None:
    """24 bytes with the end token by the text encoder of the DiT, 30 by that of the guide, and a suffix counts."""
    guide = replace(token_guide, text_encoder=models.build("text/t5", "tiny", max_length=30))
    assert guide.cuts(["a" * 29, "a" * 30]) == {"text": [False, True]}
    how = {"num_frames": 5, "num_steps": 1, "start_sigma": 0.5, "prompt_suffix": "..", **SIZE}
    with caplog.at_level("WARNING", logger="videofm"):
        replace(plain, guide=guide).generate(["a", "b" * 27], **how)
        replace(plain, guide=guide).generate(["a" * 25, "b" * 28], **how)
    assert caplog.messages == [
        "1 of 2 prompts are longer than the text encoder takes; their ends are cut",
        "2 of 2 prompts are longer than the text encoder takes; their ends are cut",
        "1 of 2 prompts are longer than the text encoder of the guide takes; their ends are cut",
    ]


def test_a_guide_of_other_latents_is_refused(plain: Pipeline, token_guide: TokenGuide) -> None:
    vae = models.build("vae/ltx", "tiny", latent_channels=8)
    guided = replace(plain, vae=vae, guide=token_guide)
    with pytest.raises(ConfigError, match="latents of 8 channels, and the tokenizer of the guide was trained on latents of 16"):
        guided.generate(PROMPTS, num_frames=13, num_steps=1, start_sigma=0.5, **SIZE)
