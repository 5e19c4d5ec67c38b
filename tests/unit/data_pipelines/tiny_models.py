"""Tiny random models in the layout of transformers, saved locally, and a score model without weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from data_pipelines.models.contract import Scored
from data_pipelines.rows import Row

WORDS = ["red", "green", "blue", "circle", "square", "moves", "left", "right", "slowly", "Describe", "this", "video", "shortly"]
SIDE = 32
MAX_TOKENS = 12


def rows(count: int, **changes: Any) -> list[Row]:
    """Clips of one source."""
    return [Row("0" * 24, "a.mp4", "a.mp4", 1).with_(start=10 * i, stop=10 * i + 10, **changes) for i in range(count)]


def clips(*lengths: int, seed: int = 0, side: int = SIDE) -> list[np.ndarray[Any, Any]]:
    """Clips of noise, of so many frames each."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (length, side, side, 3), dtype=np.uint8) for length in lengths]


def tokenizer(*specials: str, ends: bool = True) -> Any:
    """A tokenizer of words. Begin and end of a text are marked where `ends`."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *specials, *WORDS, *(f"w{i}" for i in range(40))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=list(specials),
    )  # fmt: skip


def _spread(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that answers differ from one input to the next."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim > 1:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)


def save_clip(folder: Path, kind: str = "clip", seed: int = 0) -> Any:
    """A CLIP or SigLIP with features of width 24 (SigLIP: 32) for frames of 32x32; the model itself."""
    torch.manual_seed(seed)
    name = {"clip": "CLIP", "siglip": "Siglip"}[kind]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = tokenizer()
    text = {
        "vocab_size": len(words),
        "max_position_embeddings": MAX_TOKENS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    extra = {"projection_dim": 24} if kind == "clip" else {}
    config = getattr(transformers, f"{name}Config")(
        text_config={**sizes, **text}, vision_config={**sizes, "image_size": SIDE, "patch_size": 16}, **extra
    )
    model = getattr(transformers, f"{name}Model")(config).eval()
    _spread(model, seed)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    size = size if kind == "clip" else {"size": {"height": SIDE, "width": SIDE}}
    getattr(transformers, f"{name}ImageProcessorPil")(**size).save_pretrained(folder)
    return model


def save_classifier(folder: Path, **changes: Any) -> Any:
    """A ViT that tells `clean`, `watermark` and `logo` apart; the model itself."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE, patch_size=16,
        id2label={0: "clean", 1: "watermark", 2: "logo"}, label2id={"clean": 0, "watermark": 1, "logo": 2}, **changes,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    _spread(model, 0)
    model.save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return model


def save_yolos(folder: Path) -> Any:
    """A detector with boxes; the model itself."""
    torch.manual_seed(0)
    config = transformers.YolosConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=[SIDE, SIDE],
        patch_size=16, num_detection_tokens=6, id2label={0: "person", 1: "text"}, label2id={"person": 0, "text": 1},
    )  # fmt: skip
    model = transformers.YolosForObjectDetection(config).eval()
    _spread(model, 0)
    model.save_pretrained(folder)
    transformers.YolosImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return model


def save_text_map_detector(folder: Path) -> Any:
    """A PP-OCR detector (its smallest) that answers with a map; the model itself. Its own processor would need torchvision."""
    torch.manual_seed(0)
    model = transformers.PPOCRV5MobileDetForObjectDetection(transformers.PPOCRV5MobileDetConfig()).eval()
    _spread(model, 0)
    model.save_pretrained(folder)
    settings = {"image_mean": [0.406, 0.456, 0.485], "image_std": [0.225, 0.224, 0.229]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


CHAT = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %} ASSISTANT: {% endfor %}"
)


def save_vlm(folder: Path, chat: str | None = CHAT) -> Any:
    """A Llava that sees frames of 32x32; the model itself."""
    torch.manual_seed(0)
    words = tokenizer("<image>", "USER:", "ASSISTANT:", ends=False)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE, patch_size=16
    )
    text = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    image_token = words.convert_tokens_to_ids("<image>")
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=image_token, image_seq_length=4,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).eval()
    _spread(model, 3)
    model.save_pretrained(folder)
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    transformers.LlavaProcessor(
        images,
        words,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat,
    ).save_pretrained(folder)
    return model


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace weights of a saved model; None takes one away. Dots of names are written as two underscores."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path, metadata={"format": "pt"})


class FakeScoreModel:
    """Scores without weights: `fake` is the mean of a frame's red channel, `num` the frames of the clip."""

    frame_size = (4, 6)

    def __init__(self, config: Any, dtype: str, batch_size: int) -> None:
        self.made = (config.kind, dtype, batch_size)
        self.device: str | None = None

    def weights_hash(self) -> str:
        return "f" * 64

    def load(self, device: str) -> None:
        self.device = device

    def score(self, clips: Sequence[np.ndarray[Any, Any]], captions: Sequence[str]) -> list[Scored]:
        assert self.device is not None and len(clips) == len(captions)
        return [
            Scored({"fake": clip[..., 0].mean((1, 2))}, {"num": float(len(clip))}, {"shape": np.array(clip.shape, np.int32)})
            for clip in clips
        ]
