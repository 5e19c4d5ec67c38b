"""A vision-language model of transformers in a local folder: clips and a question in, texts out.

The frames of a clip are given as images, in order, in one turn of the model's own chat template. What is not said here (top-p,
penalties, beams) is as in the folder's generation_config.json.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from PIL import Image
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from data_pipelines.models.contract import Array
from data_pipelines.models.folder import ModelFolder, combined_hash
from videofm.errors import CheckpointError


@dataclass(frozen=True)
class Written:
    """What a model wrote about a clip; `cut` says that it was stopped at the limit of tokens."""

    text: str
    cut: bool


class Captioner:
    """The model in the folder `place`.

    Raises:
        CheckpointError: it is missing, incomplete, no vision-language model, or has no chat template.
    """

    def __init__(self, place: str, dtype: str, batch_size: int, max_new_tokens: int, temperature: float) -> None:
        self.folder = ModelFolder(place, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "a vision-language model")
        if self.folder.config().is_encoder_decoder:
            raise CheckpointError(f"{self.folder.path} holds an encoder-decoder; captions need a model that continues a chat")
        self.processor = self.folder.processor()
        if not getattr(self.processor, "chat_template", None):
            raise CheckpointError(
                f"{self.folder.path} has no chat template (chat_template.jinja); take the `instruct` form of the model"
            )
        self.processor.tokenizer.padding_side = "left"  # an answer begins where its question ends
        self.dtype, self.batch_size, self.device = dtype, batch_size, "cpu"
        self.max_new_tokens, self.temperature = max_new_tokens, temperature

    def weights_hash(self) -> str:
        """SHA-256 (hex) over the files that determine its answers."""
        return combined_hash(self.folder.files())

    def load(self, device: str) -> None:
        """Read the weights onto `device`."""
        name = self.dtype if self.dtype != "auto" else ("float32" if device == "cpu" else "bfloat16")
        self.device = device
        self.model = self.folder.model(transformers.AutoModelForImageTextToText, device, getattr(torch, name))

    def write(self, clips: Sequence[Array], prompt: str, seeds: Sequence[str]) -> list[Written]:
        """One text a clip, `(T, H, W, 3)` uint8; `seeds` name the draws of each clip, for a temperature above 0."""
        if self.temperature > 0:
            return [self._drawn(clip, prompt, seed) for clip, seed in zip(clips, seeds, strict=True)]
        answers: list[Written | None] = [None] * len(clips)
        # Clips of one length make prompts of one length, and all passes are full: an answer does not depend on its neighbours.
        for length in sorted({len(clip) for clip in clips}):
            same = [i for i, clip in enumerate(clips) if len(clip) == length]
            for start in range(0, len(same), self.batch_size):
                chosen = same[start : start + self.batch_size]
                filled = chosen + chosen[-1:] * (self.batch_size - len(chosen))
                for i, answer in zip(filled, self._pass([clips[i] for i in filled], prompt), strict=True):
                    answers[i] = answer
        return [answer for answer in answers if answer is not None]

    def _drawn(self, clip: Array, prompt: str, seed: str) -> Written:
        """A text by drawing, from a generator of this clip's own."""
        devices = [] if self.device == "cpu" else [torch.device(self.device)]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1)
            return self._pass([clip], prompt)[0]

    @torch.inference_mode()
    def _pass(self, clips: Sequence[Array], prompt: str) -> list[Written]:
        chats = [_chat(clip, prompt) for clip in clips]
        inputs = self.processor.apply_chat_template(
            chats, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
            processor_kwargs={"padding": True},
        ).to(self.device, dtype=self.model.dtype)  # fmt: skip
        draw = {"do_sample": True, "temperature": self.temperature} if self.temperature > 0 else {"do_sample": False}
        output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, **draw)
        tokens = output[:, inputs["input_ids"].shape[1] :]  # (N, L)
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        cut = ~torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype, device=tokens.device)).any(1)
        return [Written(" ".join(text.split()), bool(stopped)) for text, stopped in zip(texts, cut, strict=True)]


def _chat(clip: Array, prompt: str) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": Image.fromarray(frame)} for frame in clip]
    return [{"role": "user", "content": [*images, {"type": "text", "text": prompt}]}]
