"""The probability of one class of an image classifier: watermark, NSFW, screen recording; any that transformers knows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from data_pipelines.models.contract import Array, Scored, passes
from data_pipelines.models.folder import ModelFolder, Pixels, combined_hash, frame_size
from videofm.config.curation_models import ImageClassifierConfig
from videofm.errors import ConfigError
from videofm.registry import nearest


class ImageClassifier:
    """See `ImageClassifierConfig`. A sigmoid where the classes do not exclude one another, or where there is one logit."""

    def __init__(self, config: ImageClassifierConfig, dtype: str, batch_size: int) -> None:
        self.folder = ModelFolder(config.weights, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, "an image classifier")
        values = self.folder.config()
        labels = {str(label): int(index) for index, label in values.id2label.items()}
        if config.label not in labels:
            raise ConfigError(
                f"label {config.label!r} is no class of {self.folder.path}{nearest(config.label, labels)}; "
                f"there are {', '.join(sorted(labels)[:20])}"
            )
        self.index, self.score_name = labels[config.label], config.score
        self.independent = values.problem_type == "multi_label_classification" or len(labels) == 1
        self.frame_size = frame_size(self.folder, values)
        self.pixels = Pixels(self.folder)
        self.dtype, self.batch_size, self.device = getattr(torch, dtype), batch_size, "cpu"

    def weights_hash(self) -> str:
        return combined_hash(self.folder.files())

    def load(self, device: str) -> None:
        self.device = device
        self.model = self.folder.model(transformers.AutoModelForImageClassification, device, self.dtype)

    @torch.inference_mode()
    def score(self, clips: Sequence[Array], captions: Sequence[str]) -> list[Scored]:
        parts = []
        for frames, count in passes(np.concatenate(list(clips)), self.batch_size):
            pixels = self.pixels(frames, self.device, self.dtype)
            parts.append(self._probability(self.model(pixel_values=pixels).logits[:count].float()))
        split = torch.cat(parts).cpu().split([len(clip) for clip in clips])
        return [Scored(frames={self.score_name: values.numpy()}) for values in split]

    def _probability(self, logits: Tensor) -> Tensor:
        """`(N, V)` -> `(N,)`."""
        return (logits.sigmoid() if self.independent else logits.softmax(-1))[:, self.index]
