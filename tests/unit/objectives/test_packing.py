"""The law of packing: the loss, the metrics and the gradients of a pack are the sums over its clips run one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from videofm import models
from videofm.attention import Documents
from videofm.config.flow_matching import FlowMatchingConfig
from videofm.data.packing import pack
from videofm.errors import DataError
from videofm.models.spec import ParallelOptions
from videofm.objectives.flow_matching import FlowMatchingObjective
from videofm.objectives.packing import join_texts
from videofm.parallel.rng import KeyedRng
from videofm.types import Batch, Conditioning

SIZES = {"a": (2, 9, 32, 32), "b": (1, 1, 32, 64), "c": (3, 17, 32, 32)}
"""Name -> clips, frames, height, width: with the tiny VAE's compression sequences of 3 x 4 x 4 tokens and others."""
COMMON: dict[str, Any] = {
    "kind": "flow_matching",
    "noise_levels": {"kind": "shifted_logit_normal"},
    "conditioning": {"first_frame": 0.5, "inpainting": {"probability": 0.25}, "condition_sigma": 0.1},
    "caption_dropout": 0.4,
    "train_text_encoder": True,
}
LAWS: dict[str, dict[str, Any]] = {
    "sample": {"loss_weighting": "cosmap"},
    "frame": {"sigma_per": "frame"},
    "plain": {"conditioning": {}, "train_text_encoder": False},
}
DITS = {
    "ltx": {"num_layers": 2},
    "step_video": {"num_layers": 2, "clip_channels": 32},
    "step_video_alone": {"num_layers": 2, "clip_channels": 0},
}


class PairedText(nn.Module):
    """A trained text encoder and, beside it, what a second one makes of each text."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = models.build("text/t5", "tiny")
        self.width = width

    def encode(self, prompts: list[str]) -> Conditioning:
        text = self.first.encode(prompts)
        if not self.width:
            return text
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        clip = torch.sin(lengths[:, None, None] * torch.arange(1, 1 + 3 * self.width).view(1, 3, self.width))
        return replace(text, clip_embeddings=clip)

    def cuts(self, prompts: list[str]) -> dict[str, list[bool]]:
        return self.first.cuts(prompts)


def roles(name: str) -> dict[str, nn.Module]:
    """The models of a case, with a transformer whose every tensor matters."""
    torch.manual_seed(0)
    overrides = DITS[name]
    dit = models.build(f"dit/{name.removesuffix('_alone')}", "tiny", **overrides)
    with torch.no_grad():
        for parameter in dit.parameters():
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape))
    return {"dit": dit, "vae": models.build("vae/ltx", "tiny"), "text_encoder": PairedText(overrides.get("clip_channels", 0))}


def parts_of(step: int = 3) -> list[Batch]:
    draw = torch.Generator().manual_seed(1)
    total = sum(size[0] for size in SIZES.values())
    return [
        Batch(
            torch.rand(count, 3, *shape, generator=draw) * 2 - 1,
            [f"the {name} clip" + " that moves" * (7 * index) for index in range(count)],
            torch.arange(8.0, 8.0 + count),
            [f"{name}{index}@0" for index in range(count)],
            step,
            total,
        )
        for name, (count, *shape) in SIZES.items()
    ]


def alone(batch: Batch, index: int) -> Batch:
    """One clip of a batch."""
    rows = slice(index, index + 1)
    held = {name: getattr(batch, name) for name in ("latents", "logvar")}
    extra: dict[str, Any] = {name: value[rows] for name, value in held.items() if value is not None}
    if batch.text is not None and batch.text_lengths is not None:
        both = [index, len(batch.captions)]
        extra |= {"text": batch.text[both], "text_lengths": [batch.text_lengths[row] for row in both]}
        extra["clip_text"] = None if batch.clip_text is None else batch.clip_text[both]
    return replace(
        batch,
        video=batch.video[rows],
        captions=batch.captions[rows],
        fps=batch.fps[rows],
        sample_ids=batch.sample_ids[rows],
        **extra,
    )


def run(objective: FlowMatchingObjective, of: dict[str, nn.Module], batches: list[Batch]) -> dict[str, dict[str, torch.Tensor]]:
    """Sums over batches of total and metrics, and the gradients of the sum."""
    metrics: dict[str, torch.Tensor] = {}
    trained = [of[role] for role in objective.phases["train"]]
    for model in trained:
        model.zero_grad()
    for batch in batches:
        found = objective.loss(of, batch, KeyedRng(7, batch.step, batch.sample_ids), "train")
        found.total.backward()
        for name, value in {"total": found.total.detach(), **found.metrics}.items():
            metrics[name] = metrics.get(name, torch.zeros(())) + value
    grads = {
        f"{role}.{name}": parameter.grad.clone()
        for role in objective.phases["train"]
        for name, parameter in of[role].named_parameters()
        if parameter.grad is not None
    }
    return {"metrics": metrics, "grads": grads}


COUNTED = {"text_tokens", "padding_share", "flops"}
"""Metrics that know how long the longest text beside a sample is."""


def assert_same(packed: dict[str, Any], single: dict[str, Any]) -> None:
    assert set(packed["metrics"]) == set(single["metrics"]) and set(packed["grads"]) == set(single["grads"])
    for name in set(packed["metrics"]) - COUNTED:
        torch.testing.assert_close(packed["metrics"][name], single["metrics"][name], rtol=1e-5, atol=1e-6, msg=name)
    largest = max(value.abs().max() for value in single["grads"].values())
    assert largest > 0.1
    for name, value in single["grads"].items():
        assert (packed["grads"][name] - value).abs().max() < 1e-5 * max(1.0, value.abs().max()), name


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", DITS)
def test_a_pack_is_the_sum_of_its_clips(name: str, law: str) -> None:
    objective, of = FlowMatchingObjective(FlowMatchingConfig.model_validate(COMMON | LAWS[law])), roles(name)
    parts = parts_of()
    packed = run(objective, of, [pack(parts)])
    single = run(objective, of, [alone(part, index) for part in parts for index in range(len(part.captions))])
    assert_same(packed, single)
    assert_same(packed, run(objective, of, parts))  # and over batches of one size
    if law != "plain":
        assert packed["metrics"]["given"] > 0 and packed["metrics"]["share_first_frame"] > 0


def test_backends_and_recomputation_change_nothing() -> None:
    objective, of = FlowMatchingObjective(FlowMatchingConfig.model_validate(COMMON)), roles("ltx")
    wanted = run(objective, of, [pack(parts_of())])
    for options in ({"attention": "math", "cross_attention": "math"}, {"activation_checkpointing": "selective"}):
        models.model_spec("dit/ltx").parallelize(of["dit"], None, ParallelOptions(**options))
        assert_same(run(objective, of, [pack(parts_of())]), wanted)


def test_a_pack_of_what_was_encoded_before() -> None:
    """Latents and text of a cache: texts of the parts have other lengths, and are padded to the longest."""
    objective, of = (
        FlowMatchingObjective(FlowMatchingConfig.model_validate({**COMMON, "train_text_encoder": False})),
        roles("step_video"),
    )
    stored = []
    for part, width in zip(parts_of(), (64, 32, 96), strict=True):
        posterior = of["vae"].encode(part.video)
        text = of["text_encoder"].encode([*part.captions, ""])
        lengths = text.mask.sum(dim=1).tolist()
        padded = torch.zeros(len(lengths), max(width, max(lengths)), text.embeddings.shape[2])
        padded[:, : max(lengths)] = text.embeddings[:, : max(lengths)]
        stored.append(
            replace(
                part, video=part.video.new_zeros(len(part.captions), 3, 0, 0, 0), latents=posterior.mean.detach(),
                logvar=posterior.logvar.detach(), text=padded.detach(), text_lengths=lengths, clip_text=text.clip_embeddings,
            )
        )  # fmt: skip
    packed = run(objective, of, [pack(stored)])
    assert_same(packed, run(objective, of, [alone(part, i) for part in stored for i in range(len(part.captions))]))
    assert_same(packed, run(objective, of, [pack(parts_of())]))  # and it is what encoding in the step gives


@pytest.mark.parametrize("name", DITS)
def test_documents_do_not_see_each_other(name: str) -> None:
    """Another clip and another text beside a document change no bit of its velocity."""
    dit, draw = roles(name)["dit"], torch.Generator().manual_seed(0)
    lengths, width = (12, 5, 8), DITS[name].get("clip_channels", 0)
    tokens, sigma = torch.randn(1, 25, 16, generator=draw), torch.rand(1, 25, generator=draw)
    places = torch.randint(0, 6, (1, 3, 25), generator=draw).float()
    text = Conditioning(
        torch.randn(3, 7, 64, generator=draw),
        torch.arange(7) < torch.tensor([[7], [2], [4]]),
        torch.randn(3, 3, width, generator=draw) if width else None,
    )
    before = dit(tokens, sigma, text, places, Documents.of(lengths))
    clip = None if text.clip_embeddings is None else text.clip_embeddings.clone()
    other = Conditioning(text.embeddings.clone(), text.mask.clone(), clip)
    other.embeddings[1] += 1.0
    other.mask[1] = True
    if clip is not None:
        clip[1] -= 1.0
    changed = tokens.clone()
    changed[:, 12:17] *= -2.0
    after = dit(changed, sigma, other, places, Documents.of(lengths))
    torch.testing.assert_close(after[:, :12], before[:, :12], rtol=0, atol=0)
    torch.testing.assert_close(after[:, 17:], before[:, 17:], rtol=0, atol=0)
    assert (after[:, 12:17] - before[:, 12:17]).abs().max() > 1e-3
    without = dit(tokens, sigma, text.rows(slice(1)), places)  # one text for all: not what documents do
    assert (without - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["ltx", "step_video"])
def test_documents_that_do_not_fit_are_refused(name: str) -> None:
    dit = roles(name)["dit"]
    text = Conditioning(
        torch.zeros(2, 3, 64), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 1, 32) if name != "ltx" else None
    )
    with pytest.raises(DataError, match="2 packed documents have 8 at hand: packed clips are one sequence of just these"):
        dit(torch.zeros(2, 8, 16), torch.zeros(2), text, torch.zeros(2, 3, 8), Documents.of([4, 4]))
    with pytest.raises(DataError, match="3 packed documents come with 2 texts"):
        dit(torch.zeros(1, 8, 16), torch.zeros(1), text, torch.zeros(1, 3, 8), Documents.of([4, 3, 1]))


def test_texts_of_several_lengths() -> None:
    short = Conditioning(torch.ones(1, 2, 4), torch.ones(1, 2, dtype=torch.bool), longest=2)
    long = Conditioning(torch.ones(2, 5, 4), torch.ones(2, 5, dtype=torch.bool), longest=5)
    joined = join_texts([short, long])
    assert joined.embeddings.sum(dim=(1, 2)).tolist() == [8, 20, 20] and joined.longest == 5
    assert joined.mask.sum(dim=1).tolist() == [2, 5, 5] and joined.clip_embeddings is None
    assert join_texts([replace(short, longest=None), long]).longest is None
