"""Score models on CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023): heads, match with a caption, embedding.

Frames come at the model's own size, cropped about the centre, so that only the scaling of pixels is left to do here. Image and
text features have length 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from data_pipelines.models.contract import Array, Scored, passes
from data_pipelines.models.folder import ModelFolder, Pixels, combined_hash, frame_size
from data_pipelines.models.head import Head
from videofm.config.curation_models import ClipAestheticConfig, ClipNsfwConfig, ClipTextMatchConfig, EmbeddingConfig
from videofm.errors import CheckpointError

CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel"}


class Tower:
    """CLIP or SigLIP in a local folder. `width` is D, that of its features; `frame_size` is height and width of its frames."""

    def __init__(self, place: str, dtype: str, batch_size: int) -> None:
        self.folder = ModelFolder(place, CLASSES, "a CLIP or SigLIP model")
        config = self.folder.config()
        self.kind = str(config.model_type)
        # SigLIP does not project: its features are as wide as its vision model.
        self.width = int(config.projection_dim if self.kind == "clip" else config.vision_config.hidden_size)
        self.frame_size = frame_size(self.folder, config.vision_config)
        side = config.vision_config.image_size
        if self.frame_size != (side, side):
            raise CheckpointError(
                f"{self.folder.path}: its preprocessing makes frames of {self.frame_size[0]}x{self.frame_size[1]}, "
                f"its vision model takes {side}x{side}"
            )
        self.max_tokens = int(config.text_config.max_position_embeddings)
        self.pixels = Pixels(self.folder)
        self.dtype, self.batch_size, self.device = getattr(torch, dtype), batch_size, "cpu"

    def load(self, device: str) -> None:
        """Read the weights."""
        self.device = device
        self.model = self.folder.model(getattr(transformers, CLASSES[self.kind]), device, self.dtype)

    @torch.inference_mode()
    def features(self, clips: Sequence[Array]) -> list[Tensor]:
        """Features of length 1 of the frames of each clip, float32 `(T, D)`."""
        parts = []
        for frames, count in passes(np.concatenate(list(clips)), self.batch_size):
            pixels = self.pixels(frames, self.device, self.dtype)
            features = self.model.get_image_features(pixel_values=pixels).pooler_output
            parts.append(F.normalize(features[:count].float(), dim=-1))
        return list(torch.cat(parts).split([len(clip) for clip in clips]))


class ClipHead:
    """See `ClipAestheticConfig` and `ClipNsfwConfig`."""

    def __init__(self, config: ClipAestheticConfig | ClipNsfwConfig, dtype: str, batch_size: int) -> None:
        self.tower = Tower(config.weights, dtype, batch_size)
        self.frame_size = self.tower.frame_size
        self.head = Head(Path(config.head), self.tower.width, config.activation, config.output)
        self.score_name = config.kind.removeprefix("clip_")

    def weights_hash(self) -> str:
        return combined_hash([*self.tower.folder.files(), self.head.path])

    def load(self, device: str) -> None:
        self.tower.load(device)
        self.head.load(device)

    def score(self, clips: Sequence[Array], captions: Sequence[str]) -> list[Scored]:
        return [Scored(frames={self.score_name: self.head(x).cpu().numpy()}) for x in self.tower.features(clips)]


class ClipTextMatch:
    """See `ClipTextMatchConfig`."""

    def __init__(self, config: ClipTextMatchConfig, dtype: str, batch_size: int) -> None:
        self.tower = Tower(config.weights, dtype, batch_size)
        self.frame_size = self.tower.frame_size
        self.tokenizer = self.tower.folder.tokenizer()

    def weights_hash(self) -> str:
        return combined_hash(self.tower.folder.files())

    def load(self, device: str) -> None:
        self.tower.load(device)

    def score(self, clips: Sequence[Array], captions: Sequence[str]) -> list[Scored]:
        answers = [Scored() for _ in clips]
        chosen = [i for i, caption in enumerate(captions) if caption.strip()]
        if not chosen:
            return answers
        images = self.tower.features([clips[i] for i in chosen])
        words = self._text_features([captions[i] for i in chosen])
        for i, image, word in zip(chosen, images, words, strict=True):
            cut = max(0, len(self.tokenizer(captions[i], verbose=False)["input_ids"]) - self.tower.max_tokens)
            answers[i] = Scored({"text_match": (image @ word).cpu().numpy()}, {"text_match_cut_tokens": float(cut)})
        return answers

    @torch.inference_mode()
    def _text_features(self, texts: list[str]) -> Tensor:
        """Features of length 1 of texts, float32 `(N, D)`."""
        limits = {"padding": "max_length", "truncation": True, "max_length": self.tower.max_tokens}
        encoded = self.tokenizer(texts, return_tensors="np", **limits)
        # SigLIP was trained without a mask: padding is part of the text.
        names = ("input_ids",) if self.tower.kind == "siglip" else ("input_ids", "attention_mask")
        tokens = np.stack([encoded[name] for name in names], 1)  # (N, 1 or 2, L)
        parts = []
        for part, count in passes(tokens, self.tower.batch_size):
            inputs = {name: torch.from_numpy(part[:, i]).to(self.tower.device) for i, name in enumerate(names)}
            features = self.tower.model.get_text_features(**inputs).pooler_output
            parts.append(F.normalize(features[:count].float(), dim=-1))
        return torch.cat(parts)


class ClipEmbedding:
    """See `EmbeddingConfig`."""

    def __init__(self, config: EmbeddingConfig, dtype: str, batch_size: int) -> None:
        self.tower = Tower(config.weights, dtype, batch_size)
        self.frame_size = self.tower.frame_size

    def weights_hash(self) -> str:
        return combined_hash(self.tower.folder.files())

    def load(self, device: str) -> None:
        self.tower.load(device)

    def score(self, clips: Sequence[Array], captions: Sequence[str]) -> list[Scored]:
        means = [F.normalize(features.mean(0), dim=0) for features in self.tower.features(clips)]
        return [Scored(features={"embedding": mean.cpu().numpy().astype(np.float16)}) for mean in means]
