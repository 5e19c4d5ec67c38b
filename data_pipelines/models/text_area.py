"""How much of a frame is text, by a detector of transformers: PP-OCR (a map of text) or one of the DETR family (boxes)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from data_pipelines.models.contract import Array, Scored, passes
from data_pipelines.models.folder import ModelFolder, Pixels, combined_hash
from videofm.config.curation_models import OcrTextConfig
from videofm.errors import ConfigError
from videofm.registry import nearest

UNCLIP = 1.5
"""A text map marks the core of a line; its box is that of the core, grown by UNCLIP * area / perimeter (Liao et al. 2020)."""
_GRID = 256
"""Boxes are drawn on a grid of this many cells a side, to measure their union."""
_MAPS = ("pp_ocrv5_mobile_det", "pp_ocrv5_server_det", "pp_ocrv6_medium_det", "pp_ocrv6_small_det")
"""Model types that answer with a map of text."""
_WITH_NO_OBJECT = ("detr", "yolos", "table-transformer")
"""Model types with boxes, whose last logit means `no object`: the logits are those of one softmax."""
_SIGMOID = ("conditional_detr", "deformable_detr", "rt_detr", "rt_detr_v2", "d_fine")
"""Model types with boxes, whose classes have a sigmoid each."""
ARCHITECTURES = {kind: MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES[kind] for kind in (*_MAPS, *_WITH_NO_OBJECT, *_SIGMOID)}


class TextArea:
    """See `OcrTextConfig`."""

    def __init__(self, config: OcrTextConfig, dtype: str, batch_size: int) -> None:
        self.folder = ModelFolder(config.weights, ARCHITECTURES, "a text detector")
        values = self.folder.config()
        self.kind = str(values.model_type)
        self.is_map = self.kind in _MAPS
        self.classes = _classes(config, values.id2label, self.folder)
        self.frame_size, self.min_confidence = (config.height, config.width), config.min_confidence
        self.pixels = Pixels(self.folder)
        self.dtype, self.batch_size, self.device = getattr(torch, dtype), batch_size, "cpu"

    def weights_hash(self) -> str:
        return combined_hash(self.folder.files())

    def load(self, device: str) -> None:
        self.device = device
        self.model = self.folder.model(transformers.AutoModelForObjectDetection, device, self.dtype)

    @torch.inference_mode()
    def score(self, clips: Sequence[Array], captions: Sequence[str]) -> list[Scored]:
        shares: list[float] = []
        for frames, count in passes(np.concatenate(list(clips)), self.batch_size):
            pixels = self.pixels(frames, self.device, self.dtype)
            if self.is_map:  # PP-OCR reads BGR, scaled in the order of RGB
                maps = self.model(pixel_values=pixels.flip(1)).last_hidden_state[:count, 0].float().cpu().numpy()
                shares += [area_of(boxes_of_map(one, self.min_confidence)) for one in maps]
            else:
                shares += [area_of(boxes) for boxes in self._boxes(self.model(pixel_values=pixels))[:count]]
        edges = np.cumsum([len(clip) for clip in clips])[:-1]
        return [Scored(frames={"text_area_model": part}) for part in np.split(np.array(shares), edges)]

    def _boxes(self, output: Any) -> list[Array]:
        """Boxes `(K, 4)` of each frame: left, top, right, bottom as shares of the frame."""
        logits: Tensor = output.logits.float()  # (N, K, V) or (N, K, V + 1)
        probability = logits.softmax(-1)[..., :-1] if self.kind in _WITH_NO_OBJECT else logits.sigmoid()
        sure = probability[..., self.classes].amax(-1) >= self.min_confidence  # (N, K)
        x, y, w, h = output.pred_boxes.float().unbind(-1)  # centre and size
        corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1).cpu().numpy()
        return [boxes[chosen] for boxes, chosen in zip(corners, sure.cpu().numpy(), strict=True)]


def boxes_of_map(text: Array, min_confidence: float) -> Array:
    """Boxes `(K, 4)`, left, top, right, bottom as shares of the frame, of a map `(H, W)` of probabilities of text."""
    height, width = text.shape
    count, _, stats, _ = cv2.connectedComponentsWithStats((text >= min_confidence).astype(np.uint8), connectivity=8)
    boxes = []
    for left, top, w, h, _ in stats[1:count]:  # the first is the background
        grow = UNCLIP * w * h / (2 * (w + h))
        boxes.append([(left - grow) / width, (top - grow) / height, (left + w + grow) / width, (top + h + grow) / height])
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def area_of(boxes: Array) -> float:
    """The share of the frame that the union of `boxes` covers, to 1/256 of a side."""
    grid = np.zeros((_GRID, _GRID), dtype=bool)
    for left, top, right, bottom in np.rint(np.clip(boxes, 0, 1) * _GRID).astype(int):
        grid[top:bottom, left:right] = True
    return float(grid.mean())


def _classes(config: OcrTextConfig, id2label: dict[int, str], folder: ModelFolder) -> list[int]:
    labels = {str(label): int(index) for index, label in id2label.items()}
    for wanted in config.labels or []:
        if wanted not in labels:
            raise ConfigError(
                f"label {wanted!r} is no class of {folder.path}{nearest(wanted, labels)}; "
                f"there are {', '.join(sorted(labels)[:20])}"
            )
    return sorted(labels[name] for name in (config.labels or labels))
