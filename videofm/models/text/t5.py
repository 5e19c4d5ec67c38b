"""T5 v1.1 encoders (Raffel et al. 2020) as text encoders; the network itself is that of `transformers`. Nothing is
downloaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from einops import repeat
from torch import Tensor, nn

from videofm.errors import CheckpointError, ConfigError
from videofm.models.spec import ParallelOptions
from videofm.types import Conditioning, ModelSpec

NUM_BYTE_TOKENS = 384
"""Bytes, special tokens and sentinels of the byte-level tokenizer."""


@dataclass(frozen=True)
class T5EncoderConfig:
    """Sizes of the encoder, in the words of this project (those of T5 in brackets).

    Attributes:
        vocab_size: V.
        width: D (d_model), also of the embeddings that come out.
        num_layers: encoder blocks.
        num_heads, head_width: N and K (d_kv); their product need not be D.
        hidden_width: of the gated feed-forward (d_ff).
        max_length: tokens that every prompt is padded or cut to.
        masked: hide padding from real tokens (LTX-Video 0.9.5 and later), see `T5TextEncoder.encode`.
        path: a local folder in the layout of `transformers`, whose weights and sizes are used in place of the above. May be
            a pipeline folder of diffusers with `text_encoder/` and `tokenizer/`.
        tokenizer_path: a local folder with the tokenizer; None for that of `path`, or for bytes when V is 384.
    """

    vocab_size: int = 32128
    width: int = 4096
    num_layers: int = 24
    num_heads: int = 64
    head_width: int = 64
    hidden_width: int = 10240
    max_length: int = 128
    masked: bool = False
    path: str | None = None
    tokenizer_path: str | None = None


SIZES = {
    "tiny": T5EncoderConfig(vocab_size=NUM_BYTE_TOKENS, width=64, num_layers=2, num_heads=4, head_width=16, hidden_width=128),
    "xxl": T5EncoderConfig(),
}

_SIZE_FIELDS = {
    "vocab_size": "vocab_size",
    "width": "d_model",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "head_width": "d_kv",
    "hidden_width": "d_ff",
}
"""Our fields and those of `transformers.T5Config`."""
_OURS = ("max_length", "masked")
"""Fields that no folder of `transformers` knows."""


class T5TextEncoder(nn.Module):
    """Prompts to embeddings. `config` is the resolved one: with `path`, its sizes are those of the folder."""

    spec_name = "text/t5"

    def __init__(self, config: T5EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = transformers.T5EncoderModel(_network_config(config))

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, of `tokenizer_path` or of bytes.

        Raises:
            ConfigError: there is no tokenizer for this vocabulary.
        """
        if self.config.tokenizer_path is not None:
            return transformers.AutoTokenizer.from_pretrained(self.config.tokenizer_path, local_files_only=True)
        if self.config.vocab_size != NUM_BYTE_TOKENS:
            raise ConfigError(
                f"text/t5 with {self.config.vocab_size} tokens has no tokenizer: set path (or tokenizer_path) to a "
                f"local folder that holds one. Only the byte vocabulary ({NUM_BYTE_TOKENS}) needs no files."
            )
        return transformers.ByT5Tokenizer()

    def encode(self, prompts: list[str], masked: bool | None = None) -> Conditioning:
        """Embeddings `(B, max_length, D)` of prompts, and the mask `(B, max_length)` of real tokens.

        A model must be trained on what inference software will feed it: `LTXPipeline` of diffusers runs T5 without the mask, so
        that real tokens attend to padding, `LTXConditionPipeline` with it. `masked` says which, None takes what the config
        says. Prompts are cut at `max_length`; `cuts` tells which are.
        """
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.config.max_length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        device = self.transformer.get_input_embeddings().weight.device
        longest = int(tokens.attention_mask.any(dim=0).nonzero().max()) + 1  # on the CPU
        ids, mask = (x.to(device, non_blocking=True) for x in (tokens.input_ids, tokens.attention_mask.bool()))
        attended: Tensor | None = None
        if self.config.masked if masked is None else masked:
            # As it is added to logits, (B, 1, L, L): of a mask (B, L) T5 asks on the host whether anything is masked at all.
            bias = (~mask).to(self.transformer.dtype) * torch.finfo(self.transformer.dtype).min
            attended = repeat(bias, "b key -> b 1 query key", query=mask.shape[1])
        embeddings = self.transformer(ids, attention_mask=attended).last_hidden_state
        return Conditioning(embeddings, mask, longest=longest)

    def num_tokens(self, prompts: list[str]) -> list[int]:
        """Tokens of each prompt before it is cut, with the end token."""
        return [len(ids) for ids in self.tokenizer(prompts).input_ids]

    def cuts(self, prompts: list[str]) -> dict[str, list[bool]]:
        """Which prompts are longer than is encoded: `text`."""
        return {"text": [length > self.config.max_length for length in self.num_tokens(prompts)]}

    def forward(self, token_ids: Tensor) -> Tensor:
        """Token ids `(B, L)` -> embeddings `(B, L, D)`."""
        return self.transformer(token_ids).last_hidden_state


def _network_config(config: T5EncoderConfig) -> transformers.T5Config:
    sizes = {theirs: getattr(config, ours) for ours, theirs in _SIZE_FIELDS.items()}
    return transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0, tie_word_embeddings=False)


def _resolve(config: T5EncoderConfig) -> T5EncoderConfig:
    """`config` with the sizes and the tokenizer of `config.path`."""
    if config.path is None:
        return config
    root = Path(config.path)
    folder = root / "text_encoder" if (root / "text_encoder").is_dir() else root
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json: text/t5 needs the local folder of a T5 encoder, and downloads nothing."
        )
    found = ADAPTER.config_from_public(transformers.T5Config.from_pretrained(folder, local_files_only=True).to_dict())
    beside = [place for place in (root / "tokenizer", folder.parent / "tokenizer") if place.is_dir()]
    tokenizer_path = config.tokenizer_path or str(beside[0] if beside else folder)
    ours = {name: getattr(config, name) for name in _OURS}
    return dataclasses.replace(found, path=str(folder), tokenizer_path=tokenizer_path, **ours)


def build(config: T5EncoderConfig) -> T5TextEncoder:
    """The encoder on the default device; with `path`, and unless that device is meta, with the weights of the folder.

    Raises:
        CheckpointError: `path` holds no T5 encoder.
        ConfigError: what it holds is not T5 v1.1.
    """
    config = _resolve(config)
    device = torch.get_default_device()
    if config.path is None or device.type == "meta":
        return T5TextEncoder(config)
    with torch.device("meta"):
        model = T5TextEncoder(config)
    model.transformer = transformers.T5EncoderModel.from_pretrained(config.path, local_files_only=True).to(device)
    return model.eval()


class T5Adapter:
    """Our names carry the prefix `transformer.`; the public ones are those of `transformers.T5EncoderModel`."""

    public_class = "T5EncoderModel"
    prefix = "transformer."

    def to_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict under the names of `transformers`.

        Raises:
            CheckpointError: a key that is not of this model.
        """
        if foreign := [key for key in state_dict if not key.startswith(self.prefix)]:
            raise CheckpointError(f"{', '.join(foreign[:5])} is not a tensor of text/t5.")
        return {key.removeprefix(self.prefix): tensor for key, tensor in state_dict.items()}

    def from_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of `transformers` under our names."""
        return {self.prefix + key: tensor for key, tensor in state_dict.items()}

    def public_config(self, config: T5EncoderConfig) -> dict[str, Any]:
        """The `config.json` of `transformers`."""
        return _network_config(config).to_dict() | {"architectures": [self.public_class]}

    def config_from_public(self, config: Mapping[str, Any]) -> T5EncoderConfig:
        """Our config for a `config.json` of `transformers`.

        Raises:
            ConfigError: not T5 v1.1 (gated GELU).
        """
        if config.get("model_type") != "t5" or config.get("feed_forward_proj") != "gated-gelu":
            raise ConfigError(
                f"model_type {config.get('model_type')!r} with feed_forward_proj {config.get('feed_forward_proj')!r} "
                "is not T5 v1.1: text/t5 needs 't5' with 'gated-gelu'."
            )
        return T5EncoderConfig(**{ours: config[theirs] for ours, theirs in _SIZE_FIELDS.items()})


def parallelize(model: T5TextEncoder, mesh: Any = None, options: ParallelOptions | None = None) -> T5TextEncoder:
    """`model`, unchanged: it runs whole on each rank. A split transformer takes what it gives, so that a gradient of it is part
    of a sum already."""
    return model


ADAPTER = T5Adapter()
SPEC = ModelSpec("text/t5", T5EncoderConfig, SIZES, build, parallelize, ADAPTER)
