"""The metric `next_token`, on tokens that `videofm encode` stored and a run of random models."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from data_pipelines.demo import render_shot
from data_pipelines.encode.shard import ShardEncoder
from videofm import media, models
from videofm.config import StageConfig, TrainConfig
from videofm.config.encode import EncodeConfig
from videofm.data import decode
from videofm.data.draws import Draw
from videofm.data.loader import video_tensor
from videofm.data.manifest import Manifest
from videofm.data.shards import ShardWriter, read_clip
from videofm.errors import ConfigError, DataError, Interrupted
from videofm.progress import progress
from videofm.run_dir import RunDirectory
from videofm.shapes import Motif, motifs
from videofm.stages import evaluate
from videofm.stages.evaluate_ar import _new_rows

SIZE = {"num_frames": 9, "height": 32, "width": 32}
ADAPTER: TypeAdapter[Any] = TypeAdapter(StageConfig)
NUM_HELD_OUT, NUM_TRAIN = 5, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shards` with nine clips of the demo renderer, four of them for training; `models/ROLE`; `tokens`, of all clips."""
    root = tmp_path_factory.mktemp("ar")
    write_shards(root / "shards", motifs()[: NUM_HELD_OUT + NUM_TRAIN], NUM_HELD_OUT)
    for role, model in roles().items():
        models.save(model, root / "models" / role)
    encode(root, "tokens", "all")
    return root


def write_shards(path: Path, shown: Sequence[Motif], num_held_out: int) -> None:
    """A dataset of one clip of each motif, the first `num_held_out` of them held out."""
    if path.exists():
        return
    rng = np.random.default_rng(0)
    with ShardWriter(path, "00000", "hash") as writer:
        for index, motif in enumerate(shown):
            frames = render_shot(motif.colour, motif.shape, motif.direction, 9, 32, rng)
            media.write_video(path / "clip.mp4", frames, 25)
            split = "held_out" if index < num_held_out else "train"
            facts = {"num_frames": 9, "fps": 25.0, "height": 32, "width": 32, "source_id": str(index)}
            writer.add(f"clip-{index:02d}", (path / "clip.mp4").read_bytes(), caption=motif.caption, split=split, **facts)  # type: ignore[arg-type]
        writer.commit()


def roles(seed: int = 0) -> dict[str, torch.nn.Module]:
    torch.manual_seed(seed)
    quantizer = {"kind": "vq", "codebook_size": 32, "dim": 4}
    tokenizer = {"latent_channels": 16, "rate": (1, 2, 2), "widths": (8, 8), "num_groups": 2, "quantizer": quantizer}
    found = {
        "vae": models.build("vae/ltx", "tiny"),
        "tokenizer": models.build("arlon/tokenizer", "tiny", **tokenizer),
        "text_encoder": models.build("text/t5", "tiny", max_length=24),
        "ar": models.build("ar/transformer", "tiny", vocab_size=32, width=32, num_heads=2, num_layers=2),
    }
    found["vae"].set_latent_statistics(torch.zeros(16), torch.ones(16))  # type: ignore[operator]
    with torch.no_grad():
        for parameter in found["ar"].parameters():
            parameter.mul_(4.0 if parameter.ndim == 2 else 1.0)
    return found


def encode(root: Path, name: str, split: str, shards: str = "shards") -> None:
    """What an actor of `videofm encode` does, here."""
    exact = {"precision": "fp32", "batch_size": 2}
    places = {role: {"path": str(root / "models" / role)} for role in ("vae", "tokenizer")}
    config = EncodeConfig.model_validate(
        {"kind": "encode", "manifest": str(root / shards), "split": split, **SIZE, "tokens": places | exact}
    )
    threads = torch.get_num_threads()
    assert ShardEncoder(config, root / name, "cpu").encode("00000") is not None
    torch.set_num_threads(threads)


def run_of(root: Path, path: Path, cache: str = "tokens", seed: int = 0, **objective: Any) -> Path:
    """The run directory of a training of `roles(seed)`."""
    found = roles(seed)
    step = path / "checkpoints" / "step_00000002"
    models.save(found["ar"], step / "models" / "ar")
    (step / "COMMITTED.json").write_text("{}")
    for role in ("text_encoder", "tokenizer"):
        models.save(found[role], path / "frozen" / role)
    values = {
        "kind": "train",
        "models": {
            "ar": {"name": "ar/transformer"},
            "text_encoder": {"path": str(root / "models/text_encoder")},
            "tokenizer": {"path": str(root / "models/tokenizer")},
        },
        "objective": {"kind": "next_token", **objective},
        "data": {
            "manifest": str(root / "shards"), "micro_batch_size": 2, "num_micro_batches": 2, "start": "first", **SIZE,
            "cache": {"path": str(root / cache), "mode": "tokens"},
        },
        "optimizer": {"lr": 1e-3},
        "trainer": {"max_steps": 2},
    }  # fmt: skip
    config = TrainConfig.model_validate(values)
    (path / "config.yaml").write_text(config.model_dump_json())
    (path / "lineage.json").write_text("{}")
    return path


def change(run: Path, **data: Any) -> None:
    """Other fields of section `data` in the config of a run."""
    config = json.loads((run / "config.yaml").read_text())
    config["data"] |= data
    (run / "config.yaml").write_text(json.dumps(config))


def measure(run: Path, where: Path, **fields: Any) -> dict[str, Any]:
    where.mkdir(parents=True, exist_ok=True)
    metric = {"kind": "next_token", "run": str(run), "batch_size": 2} | fields
    found = evaluate.run(ADAPTER.validate_python({"kind": "evaluate", "metrics": [metric]}), RunDirectory(where))
    written = json.loads((where / "evaluation.json").read_text())
    assert written["metrics"] == found["metrics"]
    return found["metrics"][0]  # type: ignore[no-any-return]


def stored(root: Path) -> dict[str, tuple[torch.Tensor, str]]:
    """Key -> tokens `(T, H, W)` and caption of each clip, made by hand of the decoded file."""
    found, tokens = roles(), {}
    decoder = decode.choose("auto")
    for record in Manifest.load(str(root / "shards")).records("held_out") + Manifest.load(str(root / "shards")).records(
        "train"
    ):
        video = video_tensor(decoder.read(read_clip(root / "shards", record), range(9))[None])
        with torch.no_grad():
            latents = found["vae"].normalize(found["vae"].encode(video).mode())  # type: ignore[operator]
            tokens[record.key] = (found["tokenizer"].encode(latents)[0], record.caption)  # type: ignore[operator]
    return tokens


def test_numbers_are_those_of_the_clips(folder: Path, tmp_path: Path) -> None:
    """All five held-out clips, against the same by hand: teacher forcing over the tokens of each decoded clip, frequencies of
    the four training clips plus one."""
    run = run_of(folder, tmp_path / "run")
    found, clips = roles(), list(stored(folder).values())
    held_out, trained = clips[:NUM_HELD_OUT], clips[NUM_HELD_OUT:]
    counts = torch.bincount(torch.cat([tokens.flatten() for tokens, _ in trained]), minlength=32) + 1.0
    nll = unigram = correct = 0.0
    for tokens, caption in held_out:
        inputs = found["ar"].inputs_of(tokens[None])  # type: ignore[operator]
        with torch.no_grad():
            text = found["text_encoder"].encode([caption])  # type: ignore[operator]
            logits = found["ar"](inputs.tokens, inputs.positions, inputs.cells, text)[0]
        nll -= float(logits.log_softmax(dim=1).gather(1, tokens.view(-1, 1)).sum())
        unigram -= float((counts / counts.sum()).log()[tokens.flatten()].sum())
        correct += float((logits.argmax(dim=1) == tokens.flatten()).sum())
    total = sum(tokens.numel() for tokens, _ in held_out)
    numbers = measure(run, tmp_path / "eval")
    assert (numbers["num_clips"], numbers["num_tokens"], numbers["shuffled_share"]) == (5, total, 1.0)
    assert numbers["nll"] == pytest.approx(nll / total, rel=1e-5)
    assert numbers["unigram_nll"] == pytest.approx(unigram / total, rel=1e-6)
    assert numbers["accuracy"] == pytest.approx(correct / total)
    assert abs(numbers["shuffled_nll"] - numbers["nll"]) > 1e-4  # the captions are read
    assert numbers["unigram_nll"] < math.log(32)  # and so are the frequencies


def test_fewer_clips_another_split_and_another_cache(folder: Path, tmp_path: Path) -> None:
    """The cache of the training may hold its own split alone; `cache` then names that of the clips to measure on."""
    encode(folder, "train_tokens", "train")
    run = run_of(folder, tmp_path / "run", cache="train_tokens")
    with pytest.raises(DataError, match="it was not among the clips encoded"):
        measure(run, tmp_path / "without")
    both = measure(run, tmp_path / "with", cache=str(folder / "tokens"))
    alone = measure(run_of(folder, tmp_path / "other"), tmp_path / "alone")
    assert {**both, "of": None} == {**alone, "of": None}
    few = measure(run, tmp_path / "few", split="train", num_clips=3)
    assert few["num_clips"] == 3 and few["nll"] != both["nll"]


def test_a_window_of_the_training_is_what_is_predicted(folder: Path, tmp_path: Path) -> None:
    """A training on windows of one token frame: the first frame of each clip, and no place that it never saw."""
    whole = measure(run_of(folder, tmp_path / "whole"), tmp_path / "a")
    first = measure(run_of(folder, tmp_path / "window", window=1), tmp_path / "b")
    num_frames = next(iter(stored(folder).values()))[0].shape[0]
    assert num_frames > 1 and first["num_tokens"] * num_frames == whole["num_tokens"]


def test_what_is_no_such_run(folder: Path, tmp_path: Path) -> None:
    run = run_of(folder, tmp_path / "run")
    other = json.loads((run / "config.yaml").read_text())
    other["objective"] = {"kind": "flow_matching"}
    (tmp_path / "dit").mkdir()
    (tmp_path / "dit" / "config.yaml").write_text(json.dumps(other))
    (tmp_path / "dit" / "lineage.json").write_text("{}")
    with pytest.raises(ConfigError, match="dit is a training of objective flow_matching; give the run of an autoregressive"):
        measure(tmp_path / "dit", tmp_path / "a")
    with pytest.raises(ConfigError, match="is no training run; give the run"):
        measure(folder / "models" / "ar", tmp_path / "b")
    mix = [{"name": "one", "manifest": str(folder / "shards"), "weight": 1.0}]
    change(run, manifest=None, mix=mix, cache={"mode": "tokens", "mix": {"one": str(folder / "tokens")}})
    assert measure(run, tmp_path / "mix")["num_clips"] == NUM_HELD_OUT
    with pytest.raises(ConfigError, match="the training reads several datasets"):
        measure(run, tmp_path / "c", cache=str(folder / "tokens"))


@pytest.mark.parametrize("weight", [1, 3])
def test_each_clip_of_a_mix_comes_once(folder: Path, tmp_path: Path, weight: int) -> None:
    """Datasets of five and two clips take turns, so the small one begins again before the large one ends; all have as many
    tokens, so the mean over all seven is that of five and of two."""
    write_shards(folder / "small", motifs()[20:23], num_held_out=2)
    encode(folder, "small_tokens", "all", shards="small")
    alone = {}
    for name, shards, tokens in (("five", "shards", "tokens"), ("two", "small", "small_tokens")):
        run = run_of(folder, tmp_path / name, cache=tokens)
        change(run, manifest=str(folder / shards))
        alone[name] = measure(run, tmp_path / f"{name}_eval")
    run = run_of(folder, tmp_path / "run")
    places = {"five": str(folder / "shards"), "two": str(folder / "small")}
    weights = {"five": 1, "two": weight}
    mix = [{"name": name, "manifest": place, "weight": weights[name]} for name, place in places.items()]
    caches = {"five": str(folder / "tokens"), "two": str(folder / "small_tokens")}
    change(run, manifest=None, mix=mix, cache={"mode": "tokens", "mix": caches})
    found = measure(run, tmp_path / "eval")
    assert (alone["five"]["num_clips"], alone["two"]["num_clips"], found["num_clips"]) == (5, 2, 7)
    for name in ("nll", "accuracy"):
        assert found[name] == pytest.approx((5 * alone["five"][name] + 2 * alone["two"][name]) / 7, rel=1e-5)
    assert measure(run, tmp_path / "few", num_clips=6)["num_clips"] == 6


def test_a_clip_that_cannot_be_read_has_no_row_and_no_end_is_waited_for() -> None:
    """Of the draws a b | a c | d a, b cannot be read: c stands in its place, and has its own turn. Four clips are all."""

    def batch_of(keys: str, step: int, read: str) -> tuple[Any, Any]:
        draws = [Draw(key, step, 0, 9, 1, (32, 32), 0, 0, 32, 32, step=step) for key in keys]
        ids = [d.sample_id if d.key == used else f"{used}@{step}~{d.sample_id}" for d, used in zip(draws, read, strict=True)]
        return SimpleNamespace(micro_batches=[draws]), SimpleNamespace(batches=[SimpleNamespace(sample_ids=ids)])

    steps = [batch_of("ab", 0, "ac"), batch_of("ac", 1, "ac"), batch_of("da", 2, "da")]
    plans = SimpleNamespace(steps=lambda: chain((plan for plan, _ in steps), endless()))
    loader: Any = SimpleNamespace(plan=plans, steps=lambda: chain((step for _, step in steps), endless()))
    with progress("clips", 4) as bar:
        found = [([i.partition("@")[0] for i in batch.sample_ids], rows) for batch, rows in _new_rows(loader, 4, bar)]
    assert found == [(["a", "c"], [0]), (["a", "c"], [1]), (["d", "a"], [0])]


def endless() -> Iterator[Any]:
    """Fails where more is asked for."""
    raise AssertionError("all clips were drawn, and more are asked for")
    yield


def test_tokens_of_another_tokenizer_are_refused(folder: Path, tmp_path: Path) -> None:
    run = run_of(folder, tmp_path / "run", seed=1)
    with pytest.raises(DataError, match="the cached tokens are stale"):
        measure(run, tmp_path / "a")


def test_it_stops_on_request(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "eval" / "control").mkdir(parents=True)
    (tmp_path / "eval" / "control" / "stop").touch()
    with pytest.raises(Interrupted, match="stopped on request"):
        measure(run_of(folder, tmp_path / "run"), tmp_path / "eval")
