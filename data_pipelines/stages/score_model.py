"""Score clips with a model: the stage around `models/contract.py`. Every score and feature carries the hash of its model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_pipelines.models.contract import Scored, ScoreModel
from data_pipelines.rows import FrameRequest, Placement, Rejected, Row, pack_array
from videofm import registry
from videofm.config.curation_models import ScoreModelConfig
from videofm.errors import ConfigError, DataError

REDUCE: dict[str, Callable[[np.ndarray[Any, Any]], Any]] = {"mean": np.mean, "min": np.min, "max": np.max}


class ScoreModelStage:
    """See `ScoreModelConfig`. Building it checks the model's files; `load` reads the weights."""

    name, requires = "score_model", ()
    placement: Placement = "model"

    def __init__(self, config: ScoreModelConfig) -> None:
        self.config = config
        build = registry.lookup(registry.SCORE_MODELS, config.model.kind, "score model")
        self.model: ScoreModel = build(config.model, config.dtype, config.batch_size)
        self.frames = FrameRequest(config.num_frames, *self.model.frame_size)
        self._hash: str | None = None

    def weights_hash(self) -> str:
        """SHA-256 over the model's files; they are read once."""
        if self._hash is None:
            self._hash = self.model.weights_hash()
        return self._hash

    def load(self, device: str) -> None:
        """Read the weights onto `device`."""
        self.model.load(device)

    def process_batch(self, rows: Sequence[Row], frames: Sequence[np.ndarray[Any, Any]]) -> list[Row | Rejected]:
        """The rows with what the model found.

        Raises:
            ConfigError: an earlier stage made a score of the same name.
            DataError: the model answered with a number that is none.
        """
        answers = self.model.score(frames, [row.caption for row in rows])
        return [self._add(row, answer) for row, answer in zip(rows, answers, strict=True)]

    def _add(self, row: Row, answer: Scored) -> Row:
        reduce = REDUCE[self.config.reduce]
        scores = {name: float(reduce(values)) for name, values in answer.frames.items()} | answer.clip
        made = [*scores, *answer.features]
        for name in made:
            if name in row.scores or name in row.features:
                raise ConfigError(f"stage {self.config.name}: an earlier stage already made {name!r}; leave one of them out")
        for name, value in scores.items():
            if not np.isfinite(value):
                raise DataError(
                    f"stage {self.config.name}: {name} of {row.name} frame {row.start} is {value}; wrong weights or dtype?"
                )
        return row.with_(
            scores={**row.scores, **{name: round(value, 6) for name, value in scores.items()}},
            features={**row.features, **{name: pack_array(vector) for name, vector in answer.features.items()}},
            scored_by={**row.scored_by, **dict.fromkeys(made, self.weights_hash())},
        )
