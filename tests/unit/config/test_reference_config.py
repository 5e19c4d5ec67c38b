"""What a reference needs of the rest of a config: refused when it is read, with what to change."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from videofm.config.train import TrainConfig


def config(reference: dict[str, Any], lora: bool = True, zero_stage: int = 1, **data: Any) -> TrainConfig:
    frozen = {"vae": {"name": "vae/ltx"}, "text_encoder": {"name": "text/t5"}}
    if reference["kind"] == "frozen":
        frozen["reference"] = {"name": "dit/ltx"}
    return TrainConfig.model_validate(
        {
            "kind": "train",
            "models": {"dit": {"name": "dit/ltx"} | ({"lora": {"rank": 2}} if lora else {}), **frozen},
            "objective": {"kind": "dpo", "reference": reference},
            "data": {
                "manifest": "candidates", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 1,
                "pairs": {"path": "pairs"}, "start": "first", **data,
            },
            "optimizer": {"lr": 1e-4},
            "trainer": {"max_steps": 1},
            "parallel": {"zero_stage": zero_stage},
        }
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["adapters_off", "second_adapter"])
def test_adapters_are_needed_where_they_are_the_reference(kind: str) -> None:
    config({"kind": kind})
    with pytest.raises(
        ValidationError, match=rf"kind {kind} needs adapters, and models\.dit has no lora: give models\.dit\.lora"
    ):
        config({"kind": kind}, lora=False)
    for other in ("frozen", "cached"):
        config({"kind": other}, lora=False)


def test_stage_three() -> None:
    for fine in ({"kind": "adapters_off"}, {"kind": "frozen"}, {"kind": "cached"}):
        config(fine, zero_stage=3)
    with pytest.raises(ValidationError, match=r"second_adapter with parallel\.zero_stage 3: .*Take zero_stage 2"):
        config({"kind": "second_adapter"}, zero_stage=3)
    with pytest.raises(ValidationError, match=r"offload with parallel\.zero_stage 3: .*leave offload out"):
        config({"kind": "frozen", "offload": True}, zero_stage=3)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"start": "random"}, r"data\.start random \(take first or centre\)"),
        ({"crop": "random"}, r"data\.crop random \(take centre or none\)"),
        ({"frame_strides": [1, 2]}, r"data\.frame_strides \[1, 2\] \(name one\)"),
    ],
)
def test_a_cached_reference_is_of_one_cut_of_a_clip(data: dict[str, Any], named: str) -> None:
    config({"kind": "adapters_off"}, **data)
    with pytest.raises(ValidationError, match=f"kind cached measures each pair once, .*{named}"):
        config({"kind": "cached"}, **data)


def test_a_reference_of_random_weights_is_refused() -> None:
    tuned = config({"kind": "frozen"}, lora=False).model_dump(exclude_unset=True)
    tuned["models"]["dit"] = {"path": "runs/dit"}
    with pytest.raises(
        ValidationError, match=r"models\.reference is new, with random weights, and models\.dit starts from runs/dit"
    ):
        TrainConfig.model_validate(tuned)
    tuned["models"]["reference"] = {"path": "runs/dit"}
    TrainConfig.model_validate(tuned)


def test_offload_changes_no_result() -> None:
    """So that a run may go on with it switched on."""
    fields = config({"kind": "frozen", "offload": True}).objective.reference
    assert type(fields).model_fields["offload"].json_schema_extra == {"execution": True}
