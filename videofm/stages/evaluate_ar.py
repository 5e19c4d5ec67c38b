"""What stage `evaluate` measures of autoregressive models: how well they predict the stored tokens of clips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from videofm import models
from videofm.config import TrainConfig
from videofm.config.next_token import NextTokenConfig
from videofm.config.recipe import NextTokenMetric
from videofm.data.encoded_loader import EncodedLoader
from videofm.errors import ConfigError, Interrupted
from videofm.evaluation.next_token import TokenClips, next_token_scores, unigram
from videofm.progress import Progress, progress
from videofm.run_dir import RunDirectory
from videofm.sampling.pipeline import evaluating
from videofm.sampling.source import training_config
from videofm.sampling.token_guide import ROLES
from videofm.stages.stored_clips import device, existing
from videofm.train.cached import open_cache
from videofm.types import Batch


def measure_next_token(metric: NextTokenMetric, run: RunDirectory, seed: int) -> dict[str, Any]:
    """The numbers of `NextTokenScores`: of the model, of token frequencies in training clips, and under shuffled captions.

    Clips are read as the training read them, from its cache of tokens. Where its objective cuts clips to a window, the first
    window of each is predicted. Nothing is drawn but the order of clips (`seed`), which matters where more are stored than
    measured.

    Raises:
        ConfigError: `metric.run` is no training of an autoregressive model on stored tokens, or `metric.cache` does not fit.
        DataError: the split has no stored clip, or its tokens are of another tokenizer.
        Interrupted: stopped on request.
    """
    folder = existing(metric.run)
    config = _training(metric, training_config(folder))
    found = {role: models.load(folder, role=role, device=device()) for role in ROLES}
    with evaluating(*found.values()):
        measured = list(_clips(metric, config, found, seed, run))
        trained = _clips(_of_training(metric), config, found, seed, run)
        baseline = unigram((clips.indices for clips in trained), found["ar"].config.vocab_size)

        def predict(indices: Tensor, captions: Sequence[str]) -> Tensor:
            inputs = found["ar"].inputs_of(indices)
            text = found["text_encoder"].encode(list(captions))
            logits: Tensor = found["ar"](inputs.tokens, inputs.positions, inputs.cells, text)
            return logits

        return asdict(next_token_scores(predict, measured, baseline))


def _training(metric: NextTokenMetric, found: Mapping[str, Any]) -> TrainConfig:
    """The config of the training at `metric.run`."""
    if found.get("kind") != "train" or found["objective"]["kind"] != "next_token":
        what = f"a training of objective {found['objective']['kind']}" if found.get("kind") == "train" else "no training run"
        raise ConfigError(
            f"next_token: {metric.run} is {what}; give the run of an autoregressive model (objective next_token), whose config "
            "says how its clips are read."
        )
    config = TrainConfig.model_validate(found)
    if metric.cache is not None and config.data.mix is not None:
        raise ConfigError(
            "next_token: `cache` names one folder of tokens, and the training reads several datasets (data.mix); leave it out, "
            "and the caches of the training are read."
        )
    return config


def _of_training(metric: NextTokenMetric) -> NextTokenMetric:
    """The clips that the baseline counts the tokens of, which the training's own cache holds."""
    return metric.model_copy(update={"split": "train", "num_clips": metric.num_train_clips, "cache": None})


def _clips(
    metric: NextTokenMetric, config: TrainConfig, found: Mapping[str, nn.Module], seed: int, run: RunDirectory
) -> Iterator[TokenClips]:
    """Tokens and captions of `metric.num_clips` clips of the split, or of all there are; each once."""
    data, objective = config.data, config.objective
    assert data.cache is not None and isinstance(objective, NextTokenConfig), "it was checked"
    changes: dict[str, Any] = {
        "split": metric.split,
        "num_micro_batches": 1,
        "micro_batch_size": metric.batch_size,
        "packing": None,
        "cache": data.cache if metric.cache is None else data.cache.model_copy(update={"path": metric.cache}),
    }
    if data.mix is not None:  # a dataset's own split is that of the training
        changes["mix"] = [source.model_copy(update={"split": None}) for source in data.mix]
    own = config.model_copy(update={"data": data.model_copy(update=changes)})
    cache = open_cache(own, found)
    assert cache is not None
    loader = EncodedLoader(own.data, seed, cache)
    wanted = loader.plan.num_usable(metric.num_clips)
    with progress(f"{metric.kind} clips, {metric.split}", wanted) as bar:
        for batch, rows in _new_rows(loader, wanted, bar):
            if run.stop_requested:
                raise Interrupted("evaluation stopped on request; the same command starts it again")
            assert batch.indices is not None, "the mode of the cache has tokens"
            if rows:  # none where all were seen before
                yield TokenClips(batch.indices[rows, : objective.window].to(device()), [batch.captions[row] for row in rows])


def _new_rows(loader: EncodedLoader, wanted: int, bar: Progress) -> Iterator[tuple[Batch, list[int]]]:
    """Micro-batches until `wanted` clips were drawn, each with its rows of clips that none before had.

    Datasets of a mix end their epochs one by one, and buckets carry clips over, so that clips come again before others come
    once. A clip that cannot be read counts as drawn, and no row is of it: the spare in its place has a turn of its own.
    """
    seen: set[tuple[str, str]] = set()
    for plan, step in zip(loader.plan.steps(), loader.steps(), strict=False):
        for draws, batch in zip(plan.micro_batches, step.batches, strict=True):
            rows = []
            for row, (draw, sample_id) in enumerate(zip(draws, batch.sample_ids, strict=True)):
                if len(seen) < wanted and (draw.source, draw.key) not in seen:
                    seen.add((draw.source, draw.key))
                    bar.advance(1)
                    rows += [row] if sample_id == draw.sample_id else []
            yield batch, rows
            if len(seen) == wanted:
                return
