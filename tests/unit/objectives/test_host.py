"""A training step reads nothing from the device: it runs on the meta device, whose tensors have no numbers to read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.objectives.test_flow_matching import PlainVae, config
from videofm import models
from videofm.objectives.flow_matching import FlowMatchingObjective
from videofm.objectives.host import from_host, on_host
from videofm.parallel.rng import KeyedRng
from videofm.types import Batch

IDS = [f"clip{index}" for index in range(3)]
CAPTIONS = ["a red circle", "", "x" * 30]
EVERYTHING: dict[str, Any] = {
    "sigma_per": "frame",
    "loss_weighting": "cosmap",
    "conditioning": {
        "first_frame": 0.2,
        "first_and_last": 0.2,
        "continuation": {"probability": 0.2},
        "inpainting": {"probability": 0.2},
    },
    "token_dropping": {"num_tokens": 6},
    "caption_dropout": 0.5,
    "train_text_encoder": True,
}


def test_draws_on_the_host_are_those_of_the_device() -> None:
    rng = KeyedRng(1, 2, IDS, "meta")
    here = on_host(rng).uniform("caption")
    assert here.equal(KeyedRng(1, 2, IDS).uniform("caption"))
    assert rng.uniform("caption").is_meta, "the draws of the batch stay where they were"
    assert from_host([2, 0, 1], torch.device("cpu")).tolist() == [2, 0, 1]
    assert from_host([0.1], torch.device("cpu"), torch.float64).item() == 0.1


def roles(name: str, text: str) -> dict[str, nn.Module]:
    channels = {} if name == "dit/ltx" or text == "text/step_video" else {"clip_channels": 0}
    dit = models.build(name, "tiny", device="meta", num_layers=1, in_channels=3, **channels)
    masked = {"masked": True} if name == "dit/ltx" else {}
    return {"dit": dit, "vae": PlainVae(), "text_encoder": models.build(text, "tiny", device="meta", **masked)}


@pytest.mark.parametrize("fields", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize(
    ("name", "text"), [("dit/ltx", "text/t5"), ("dit/step_video", "text/t5"), ("dit/step_video", "text/step_video")]
)
def test_a_step_reads_nothing_from_the_device(name: str, text: str, fields: dict[str, Any]) -> None:
    """Forward and backward; text is cut to 32 columns although no mask can be read: 30 bytes, and a start or an end. The
    control: reading a number there raises."""
    models_, fps = roles(name, text), torch.full((3,), 24.0, device="meta")
    batch = Batch(torch.zeros(3, 3, 4, 16, 16, device="meta"), CAPTIONS, fps, IDS, 0, 3)
    loss = FlowMatchingObjective(config(**fields)).loss(models_, batch, KeyedRng(0, 0, IDS, "meta"), "train")
    loss.total.backward()
    assert loss.total.is_meta
    assert all(metric.is_meta for metric in loss.metrics.values())
    conditioning = FlowMatchingObjective(config())._conditioning(models_["text_encoder"], CAPTIONS)
    assert conditioning.mask.shape == (3, 32)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        loss.total.item()


@pytest.mark.parametrize(("name", "expected"), [("text/t5", 31), ("text/step_video", 32)])
def test_the_host_knows_the_longest_text(name: str, expected: int) -> None:
    """30 bytes and an end token, or start and end; what lies behind is masked in every row."""
    encoder = models.build(name, "tiny", max_length=40)
    with torch.no_grad():
        found = encoder.encode(CAPTIONS)  # type: ignore[operator]
    assert found.longest == expected == int(found.mask.sum(dim=1).max())
    assert not found.mask[:, expected:].any()
    assert found.trimmed(8).longest == 8
    assert found.rows(torch.tensor([1])).longest == expected


def test_captions_that_are_cut_are_counted() -> None:
    """T5 takes 24 tokens, 23 bytes; the pair takes 40 and 20, 38 and 18 bytes. Counts are sums over the samples."""
    prompts = ["a" * 18, "a" * 23, "a" * 24, "a" * 39]
    t5, pair = (
        models.build("text/t5", "tiny", max_length=24),
        models.build("text/step_video", max_length=40, clip_max_length=20),
    )
    assert t5.cuts(prompts) == {"text": [False, False, True, True]}  # type: ignore[operator]
    assert pair.cuts(prompts) == {"text": [False, False, False, True], "clip": [False, True, True, True]}  # type: ignore[operator]
    ids = [f"clip{index}" for index in range(4)]
    batch = Batch(torch.zeros(4, 3, 2, 8, 8), prompts, torch.full((4,), 24.0), ids, 0, 4)
    dit = models.build("dit/step_video", "tiny", num_layers=1, in_channels=3)
    for dropout, expected in ((0.0, (1, 3)), (1.0, (0, 0))):
        objective = FlowMatchingObjective(config(caption_dropout=dropout))
        parts = {
            "dit": dit,
            "vae": PlainVae(),
            "text_encoder": models.build("text/step_video", max_length=40, clip_max_length=20),
        }
        metrics = objective.loss(parts, batch, KeyedRng(0, 0, ids), "train").metrics
        assert (float(metrics["cut_text"]), float(metrics["cut_clip"])) == expected
