"""Micro-batches of tokens: in the order of the pixels and without them; ids that are no codes, and modes that do not fit."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.encode.shard import ShardEncoder, data_config
from tests.demo_shards import write_demo_shards
from tests.unit.encoding import encode_config, save_encoders, save_tokenizer, tokens_section
from videofm import models
from videofm.config.cache import KINDS, MODES_OF
from videofm.config.data import DataConfig
from videofm.config.train import TrainConfig
from videofm.data.encoded import ClipCache, clip_source
from videofm.data.encoded_loader import EncodedLoader
from videofm.data.fixed import fixed_draw
from videofm.data.loader import StepLoader
from videofm.data.manifest import Manifest
from videofm.data.plan import PlanState
from videofm.data.sidecar import SidecarWriter, entry_path
from videofm.errors import DataError


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Six clips in two shards, with latents, tokens and text of them."""
    folder = tmp_path_factory.mktemp("token-batches")
    shards, encoders = write_demo_shards(folder / "shards", 6, 2, 11, 32, 0), save_encoders(folder)
    tokenizer = save_tokenizer(folder)
    config = encode_config(shards, encoders, tokens=tokens_section(encoders, tokenizer))
    encoder = ShardEncoder(config, folder / "run", "cpu")
    for group in ("00000", "00001"):
        encoder.encode(group)
    return {"config": config, "encoders": encoders, "tokenizer": tokenizer, "run": folder / "run", "shards": shards}


def data(shared: dict[str, Any], mode: str, run: Path | None = None, **changes: Any) -> DataConfig:
    values = data_config(shared["config"]).model_dump() | {"micro_batch_size": 2, "num_micro_batches": 2}
    return DataConfig.model_validate(values | {"cache": {"path": str(run or shared["run"]), "mode": mode}} | changes)


def test_tokens_come_in_the_order_of_the_pixels_and_are_theirs(shared: dict[str, Any]) -> None:
    """Three steps, and the third one again from the position before it; what a micro-batch brings is what its mode says."""
    vae, tokenizer = (models.load(path) for path in (shared["encoders"]["vae"], shared["tokenizer"]))
    pixels = list(islice(StepLoader(data(shared, "tokens"), 0).steps(), 3))
    for mode, kinds in KINDS.items():
        if "tokens" not in kinds:
            continue
        config = data(shared, mode)
        found = list(islice(EncodedLoader(config, 0, ClipCache(config)).steps(), 3))
        again = next(EncodedLoader(config, 0, ClipCache(config)).steps(found[1].after))
        assert again.after == found[2].after
        for step, other in zip([*found, again], [*pixels, pixels[2]], strict=True):
            assert (step.after, step.num_samples) == (other.after, other.num_samples)
            for batch, live in zip(step.batches, other.batches, strict=True):
                assert (batch.sample_ids, batch.captions) == (live.sample_ids, live.captions)
                assert torch.equal(batch.fps, live.fps) and batch.video.shape == (2, 3, 0, 0, 0)
                assert (batch.latents is not None, batch.text is not None) == ("latents" in kinds, "text" in kinds)
                assert batch.rollouts is None and batch.indices is not None and batch.indices.dtype == torch.int64
                with torch.no_grad():
                    latents = vae.normalize(vae.encode(live.to("cpu").video).mean)  # type: ignore[operator]
                    expected = tokenizer.encode(latents)  # type: ignore[operator]
                assert (batch.indices != expected).float().mean() < 0.03  # last bits of a batch of other clips
                assert batch.to("meta").indices.device.type == "meta"


def test_no_pixel_is_read(shared: dict[str, Any], tmp_path: Path) -> None:
    """Tars without a byte of video: tokens come as before, and a loader of pixels finds nothing."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in ("manifest", "index"):
        (shards / name).symlink_to(Path(shared["shards"]) / name)
    config = data(shared, "tokens")
    expected = list(islice(EncodedLoader(config, 0, ClipCache(config)).steps(), 3))
    config = data(shared, "tokens", manifest=str(shards))
    found = list(islice(EncodedLoader(config, 0, ClipCache(config)).steps(), 3))
    for step, other in zip(found, expected, strict=True):
        assert step.num_replaced == 0
        for batch, same in zip(step.batches, other.batches, strict=True):
            assert batch.sample_ids == same.sample_ids and batch.indices is not None and same.indices is not None
            assert torch.equal(batch.indices, same.indices)
    with pytest.raises(DataError):
        next(StepLoader(config, 0).steps(PlanState()))


@pytest.mark.parametrize(("id_", "span"), [(64, "0 to 64"), (-1, "-1 to 0")])
def test_ids_that_are_no_codes_are_refused(shared: dict[str, Any], tmp_path: Path, id_: int, span: str) -> None:
    """A sidecar with a right header and a right content key, and one id that the vocabulary of 64 does not have."""
    config = data(shared, "tokens", run=tmp_path)
    header = json.loads((shared["run"] / "header-tokens.json").read_text())
    (tmp_path / "header-tokens.json").write_text(json.dumps(header))
    dataset = Manifest.load(shared["shards"])
    record = dataset.records()[0]
    draw = fixed_draw(record, config, None)
    assert draw is not None
    indices = torch.zeros(3, 2, 2, dtype=torch.int32)
    for value, fine in ((63, True), (id_, False)):
        entry_path(tmp_path, "00000", "tokens").unlink(missing_ok=True)
        indices[1, 1, 0] = value
        with SidecarWriter(tmp_path, "00000", "tokens", header, dataset.entries[0].sha256) as writer:
            writer.add(record.key, {"indices": indices}, clip_source(header, record, draw))
            writer.commit()
        if fine:
            assert ClipCache(config).read("", "00000", record, draw).tokens is not None
        else:
            with pytest.raises(
                DataError, match=rf"indices of {record.key} have ids from {span}, and the tokenizer's are 0 to 63"
            ):
                ClipCache(config).read("", "00000", record, draw)


def test_rollouts_of_a_mix_are_of_all_datasets_or_none(shared: dict[str, Any], tmp_path: Path) -> None:
    header = json.loads((shared["run"] / "header-tokens.json").read_text())
    for name, rollouts in (("a", None), ("b", None), ("c", {"keep_frames": 1})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "header-tokens.json").write_text(json.dumps({**header, "rollouts": rollouts}))
    mix = [{"name": name, "manifest": "m", "weight": 1} for name in ("a", "b")]

    def cache(b: str) -> ClipCache:
        places = {"a": str(tmp_path / "a"), "b": str(tmp_path / b)}
        return ClipCache(data(shared, "tokens", manifest=None, mix=mix, cache={"mix": places, "mode": "tokens"}))

    cache("b").check({"a": [], "b": []})
    with pytest.raises(DataError, match=r"data\.cache\.mix holds rollouts of some datasets and none of others"):
        cache("c").check({"a": [], "b": []})


def test_tokens_are_of_one_window(shared: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"cache\.mode tokens_text holds one window .* start: random"):
        data(shared, "tokens_text", start="random")
    with pytest.raises(ValueError, match=r"cache\.mode tokens decodes no clip for a step: num_workers 2"):
        data(shared, "tokens", num_workers=2)
    other = data(shared, "tokens", start="centre")
    with pytest.raises(DataError, match="holds other windows than the training asks for: start was 'first', now 'centre'"):
        ClipCache(other).check({"data": []})


ROLES = {
    "autoencoder": {"vae": {"path": "x"}},
    "flow_matching": {"vae": {"path": "x"}},
    "latent_tokens": {"tokenizer": {"path": "x"}},
    "next_token": {"ar": {"path": "x"}},
}


def train(shared: dict[str, Any], kind: str, source: dict[str, Any], **objective: Any) -> TrainConfig:
    values = data_config(shared["config"]).model_dump() | source
    rest = {"optimizer": {"lr": 1e-3, "ema_decay": 0}, "trainer": {"max_steps": 1}, "models": ROLES[kind]}
    return TrainConfig.model_validate({"kind": "train", "objective": {"kind": kind, **objective}, "data": values} | rest)


@pytest.mark.parametrize("kind", sorted(ROLES))
def test_every_objective_takes_its_modes_and_no_other(shared: dict[str, Any], kind: str) -> None:
    for mode in KINDS:
        cache = {"cache": {"path": "x", "mode": mode}}
        objective = {"features": {"rollouts": 0.5}} if mode == "latents_tokens" and kind == "flow_matching" else {}
        if mode in MODES_OF.get(kind, ()):
            assert train(shared, kind, cache, **objective).data.cache is not None
        else:
            match = rf"data\.cache\.mode {mode}: objective {kind} trains on" if kind in MODES_OF else "needs pixels"
            with pytest.raises(ValueError, match=match):
                train(shared, kind, cache)
    if kind == "next_token":
        with pytest.raises(ValueError, match="objective next_token reads tokens and no pixels: run `videofm encode`"):
            train(shared, kind, {})
    if kind in ("next_token", "latent_tokens"):
        match = "reads tokens and no pixels" if kind == "next_token" else "for objective flow_matching, not for latent_tokens"
        with pytest.raises(ValueError, match=match):
            train(shared, kind, {"online": {}})


def test_rollouts_are_read_where_they_are_asked_for(shared: dict[str, Any]) -> None:
    match = r"features\.rollouts and data\.cache\.mode latents_tokens go together"
    with pytest.raises(ValueError, match=match + ".* are off and the mode is latents_tokens"):
        train(shared, "flow_matching", {"cache": {"path": "x", "mode": "latents_tokens"}})
    for source, mode in (({}, "none"), ({"cache": {"path": "x", "mode": "latents"}}, "latents")):
        with pytest.raises(ValueError, match=match + f".* are on and the mode is {mode}"):
            train(shared, "flow_matching", source, features={"rollouts": 0.5})
