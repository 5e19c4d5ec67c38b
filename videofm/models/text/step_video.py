"""The text encoders of Step-Video (arXiv 2502.10248, section 4.2; spec step-video A3): a pair that reads every prompt twice.

The first is bidirectional: the text half of a bilingual CLIP (Hunyuan-CLIP), a BERT of `transformers`, 77 tokens. The second is
causal: Step-LLM, 320 tokens. Both come from local folders, as the authors lay them out:

```
hunyuan_clip/clip_text_encoder/{config.json, model.safetensors}  hunyuan_clip/tokenizer/vocab.txt
step_llm/{config.json, model-*.safetensors, model.safetensors.index.json, step1_chat_tokenizer.model}
```
The authors store the first as a pickle, which is not read: convert it once to safetensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from einops import repeat
from torch import Tensor, nn

from videofm.errors import CheckpointError, ConfigError
from videofm.models.auxiliary import whole
from videofm.models.io import load_weights, public_files
from videofm.models.spec import KeyMap, list_keys
from videofm.models.stored import read_json, read_weights
from videofm.models.text.step_llm import StepLLM, StepLLMConfig
from videofm.types import Conditioning, ModelSpec

BYTE_OFFSET, NUM_BYTE_TOKENS = 3, 259
"""Bytes as tokens, behind pad, start and end: the vocabulary that needs no files."""
CLIP_FOLDER, LLM_FOLDER = "hunyuan_clip", "step_llm"
CLIP_WEIGHTS, CLIP_TOKENIZER = f"{CLIP_FOLDER}/clip_text_encoder", f"{CLIP_FOLDER}/tokenizer"
LLM_TOKENIZER = f"{LLM_FOLDER}/step1_chat_tokenizer.model"
_HIDDEN_MULTIPLE = 256


@dataclass(frozen=True)
class StepVideoTextConfig:
    """Sizes of the pair; those with `clip_` are of the bidirectional encoder, the others of the causal one.

    Attributes:
        clip_vocab_size, vocab_size: V.
        clip_width, width: D, also of the embeddings that come out (released: 1024 and 6144).
        clip_num_layers, num_layers: blocks.
        clip_num_heads, num_heads: N.
        clip_hidden_width, hidden_width: of the feed-forwards.
        clip_max_length, max_length: tokens that every prompt is padded or cut to.
        num_groups: heads of keys and values; each serves `num_heads / num_groups` heads of queries.
        norm_eps: epsilon of the RMS norms.
        path: a local folder with `hunyuan_clip` and `step_llm`, whose weights and sizes are used in place of the above.
        tokenizer_path: a local folder with the two tokenizers at these places; None for that of `path`, or for bytes when both
            vocabularies have 259 tokens.
    """

    clip_vocab_size: int = NUM_BYTE_TOKENS
    clip_width: int = 32
    clip_num_layers: int = 2
    clip_num_heads: int = 2
    clip_hidden_width: int = 64
    clip_max_length: int = 77
    vocab_size: int = NUM_BYTE_TOKENS
    width: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_groups: int = 2
    hidden_width: int = 256
    norm_eps: float = 1e-5
    max_length: int = 320
    path: str | None = None
    tokenizer_path: str | None = None

    def __post_init__(self) -> None:
        if self.width % self.num_heads or self.num_heads % self.num_groups or self.clip_width % self.clip_num_heads:
            raise ConfigError(
                f"width {self.width} must be a multiple of num_heads {self.num_heads}, that of num_groups {self.num_groups}, "
                f"and clip_width {self.clip_width} of clip_num_heads {self.clip_num_heads}."
            )


SIZES = {"tiny": StepVideoTextConfig()}
"""A pair that can be trained; the released one has its sizes in its folder (`path`)."""


class StepVideoTextEncoder(nn.Module):
    """Prompts to what both encoders make of them. `config` is the resolved one, with the sizes of the folder at `path`."""

    spec_name = "text/step_video"

    def __init__(self, config: StepVideoTextConfig) -> None:
        super().__init__()
        self.config = config
        self.clip = transformers.BertModel(_bert_config(config), add_pooling_layer=False)
        # Constants that no state dict has: they are given with each call, so that a model may come from the meta device.
        del self.clip.embeddings.position_ids, self.clip.embeddings.token_type_ids
        self.llm = StepLLM(StepLLMConfig(**{field: getattr(config, field) for field in _LLM_FIELDS}))

    @cached_property
    def _clip_tokens(self) -> _Tokens:
        if (folder := self._tokenizers()) is None:
            return _Tokens(_bytes, 1, 2, 0)
        tokenizer = transformers.BertTokenizer.from_pretrained(str(folder / CLIP_TOKENIZER), local_files_only=True)
        ids = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
        return _Tokens(lambda prompt: tokenizer(prompt, add_special_tokens=False).input_ids, *ids)

    @cached_property
    def _llm_tokens(self) -> _Tokens:
        if (folder := self._tokenizers()) is None:
            return _Tokens(_bytes, 1, 2, 2)
        # Start 1, end 2, and the end again as padding: fixed in the authors' code, whatever the file says.
        return _Tokens(_sentencepiece(folder / LLM_TOKENIZER), 1, 2, 2)

    def _tokenizers(self) -> Path | None:
        """The folder with both tokenizers, or None for bytes.

        Raises:
            ConfigError: there are no tokenizers for these vocabularies.
        """
        if self.config.tokenizer_path is not None:
            return Path(self.config.tokenizer_path)
        sizes = (self.config.clip_vocab_size, self.config.vocab_size)
        if set(sizes) != {NUM_BYTE_TOKENS}:
            raise ConfigError(
                f"text/step_video with {sizes[0]} and {sizes[1]} tokens has no tokenizers: set path (or tokenizer_path) to a "
                f"local folder that holds {CLIP_TOKENIZER} and {LLM_TOKENIZER}. Only byte vocabularies ({NUM_BYTE_TOKENS}) "
                "need no files."
            )
        return None

    def encode(self, prompts: list[str]) -> Conditioning:
        """`embeddings` `(B, max_length, width)` of the causal encoder with the `mask` of its real tokens, and `clip_embeddings`
        `(B, clip_max_length, clip_width)` of the other.

        Prompts are cut at either length; `cuts` tells which are. What comes of padding is masked in the
        first; in the second it takes part (it attends to real tokens only), because the transformer was trained so.
        """
        device = self.llm.embedding.weight.device
        clip_tokens = self._clip_tokens.batch(prompts, self.config.clip_max_length)
        tokens = self._llm_tokens.batch(prompts, self.config.max_length)
        longest = int(tokens[1].sum(dim=1).max())  # on the CPU
        clip_ids, clip_mask, ids, mask = (x.to(device, non_blocking=True) for x in (*clip_tokens, *tokens))
        position = torch.arange(self.config.clip_max_length, device=device)[None]
        # As it enters attention, (B, 1, L, L): of a mask (B, L) BERT asks on the host whether anything is masked at all.
        attended = repeat(clip_mask, "b key -> b 1 query key", query=clip_mask.shape[1])
        states = self.clip(clip_ids, attended, token_type_ids=torch.zeros_like(clip_ids), position_ids=position)
        return Conditioning(self.llm(ids), mask, states.last_hidden_state, longest)

    def num_tokens(self, prompts: list[str]) -> list[int]:
        """Tokens of each prompt for the causal encoder before it is cut, with start and end."""
        return [len(self._llm_tokens.split(prompt)) + 2 for prompt in prompts]

    def cuts(self, prompts: list[str]) -> dict[str, list[bool]]:
        """Which prompts are longer than is encoded: `text` by the causal encoder, `clip` by the other."""
        clip_lengths = [len(self._clip_tokens.split(prompt)) + 2 for prompt in prompts]
        return {
            "text": [length > self.config.max_length for length in self.num_tokens(prompts)],
            "clip": [length > self.config.clip_max_length for length in clip_lengths],
        }

    def forward(self, token_ids: Tensor) -> Tensor:
        """Token ids `(B, L)` -> states of the causal encoder `(B, L, D)`."""
        return self.llm(token_ids)


@dataclass(frozen=True)
class _Tokens:
    """`split` turns a prompt into ids; `start`, `end` and `pad` are the ids around them."""

    split: Callable[[str], Sequence[int]]
    start: int
    end: int
    pad: int

    def batch(self, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Ids `(B, length)` and the mask of those that are not padding."""
        rows = [[self.start, *self.split(prompt)[: length - 2], self.end] for prompt in prompts]
        ids = torch.tensor([row + [self.pad] * (length - len(row)) for row in rows])
        return ids, torch.arange(length) < torch.tensor([[len(row)] for row in rows])


def _bytes(prompt: str) -> list[int]:
    return [byte + BYTE_OFFSET for byte in prompt.encode()]


def _sentencepiece(file: Path) -> Callable[[str], Sequence[int]]:
    try:
        import sentencepiece
    except ImportError as error:
        raise ConfigError(
            "the tokenizer of text/step_video needs sentencepiece, which is not installed: "
            "pip install -c constraints.txt -e '.[text]'."
        ) from error
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist: it is the tokenizer of Step-LLM.")
    return sentencepiece.SentencePieceProcessor(model_file=str(file)).encode_as_ids


def _bert_config(config: StepVideoTextConfig) -> transformers.BertConfig:
    return transformers.BertConfig(
        vocab_size=config.clip_vocab_size,
        hidden_size=config.clip_width,
        num_hidden_layers=config.clip_num_layers,
        num_attention_heads=config.clip_num_heads,
        intermediate_size=config.clip_hidden_width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


# -- the folders of the authors

_LLM = KeyMap(
    [
        ("embedding.weight", "tok_embeddings.word_embeddings.weight"),
        *(
            (f"blocks.{{i}}.{ours}.weight", f"transformer.layers.{{i}}.{public}.weight")
            for ours, public in {
                "attention_norm": "attention_norm",
                "attention.qkv": "attention.wqkv",
                "attention.out": "attention.wo",
                "mlp_norm": "ffn_norm",
                "mlp_in": "feed_forward.w1",
                "mlp_out": "feed_forward.w2",
            }.items()
        ),
    ]
)
_UNREAD = ("pooler.", "embeddings.position_ids")
"""Beginnings of names in the authors' BERT whose tensors nothing here computes with."""
_BERT_FIELDS = {
    "clip_vocab_size": "vocab_size",
    "clip_width": "hidden_size",
    "clip_num_layers": "num_hidden_layers",
    "clip_num_heads": "num_attention_heads",
    "clip_hidden_width": "intermediate_size",
}
_BERT_FIXED = ("model_type", "hidden_act", "max_position_embeddings", "type_vocab_size", "layer_norm_eps")
_LLM_FIELDS = {
    "vocab_size": "padded_vocab_size",
    "width": "hidden_size",
    "num_layers": "num_layers",
    "num_heads": "num_attention_heads",
    "num_groups": "num_attention_groups",
    "hidden_width": "ffn_hidden_size",
    "norm_eps": "layernorm_epsilon",
}
"""Our fields and those of the two `config.json`."""


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _behind(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in tensors.items()}


class StepVideoTextAdapter:
    """The public names are those of the authors' files, behind the name of the folder that they lie in."""

    public_class = "StepVideoTextEncoders"

    def to_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict under the authors' names.

        Raises:
            CheckpointError: a key that is not of this model.
        """
        clip, llm = _part(state_dict, "clip."), _part(state_dict, "llm.")
        if foreign := [key for key in state_dict if not key.startswith(("clip.", "llm."))]:
            raise CheckpointError(f"{list_keys(foreign)} is not a tensor of text/step_video.")
        return _behind(f"{CLIP_FOLDER}.", clip) | _behind(f"{LLM_FOLDER}.", _LLM.to_public(llm))

    def from_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' tensors under our names; `bert.`, with which some files begin names, and the pooler are left out.

        Raises:
            CheckpointError: a key that neither encoder has.
        """
        clip, llm = _part(state_dict, f"{CLIP_FOLDER}."), _part(state_dict, f"{LLM_FOLDER}.")
        if foreign := [key for key in state_dict if not key.startswith((f"{CLIP_FOLDER}.", f"{LLM_FOLDER}."))]:
            raise CheckpointError(f"{list_keys(foreign)} is not in the public layout of text/step_video.")
        read = {key.removeprefix("bert."): tensor for key, tensor in clip.items()}
        read = {key: tensor for key, tensor in read.items() if not key.startswith(_UNREAD)}
        return _behind("clip.", read) | _behind("llm.", _LLM.from_public(llm))

    def public_config(self, config: StepVideoTextConfig) -> dict[str, Any]:
        """The two `config.json`, each under the name of its folder.

        Raises:
            ConfigError: a `hidden_width` that the authors' code would round up.
        """
        if config.hidden_width % _HIDDEN_MULTIPLE:
            raise ConfigError(
                f"hidden_width {config.hidden_width} cannot be exported: the authors' code has multiples of {_HIDDEN_MULTIPLE}."
            )
        llm = {public: getattr(config, ours) for ours, public in _LLM_FIELDS.items()}
        return {"_class_name": self.public_class, CLIP_FOLDER: _bert_config(config).to_dict(), LLM_FOLDER: llm}

    def config_from_public(self, config: Mapping[str, Any]) -> StepVideoTextConfig:
        """Our config for those two.

        Raises:
            ConfigError: a field is missing, or the first is no such BERT.
        """
        clip, llm = config.get(CLIP_FOLDER, {}), config.get(LLM_FOLDER, {})
        missing = [f"{CLIP_FOLDER}.{key}" for key in _BERT_FIELDS.values() if key not in clip]
        missing += [f"{LLM_FOLDER}.{key}" for key in _LLM_FIELDS.values() if key not in llm]
        usual = transformers.BertConfig().to_dict()
        wrong = [f"no {key}" for key in missing]
        for key in _BERT_FIXED:
            if clip.get(key, usual[key]) != usual[key]:
                wrong.append(f"{CLIP_FOLDER}.{key} {clip[key]!r} (must be {usual[key]!r})")
        if wrong:
            raise ConfigError(f"not the configs of Step-Video's text encoders: {', '.join(wrong)}.")
        sizes = {ours: clip[public] for ours, public in _BERT_FIELDS.items()}
        sizes |= {ours: llm[public] for ours, public in _LLM_FIELDS.items()}
        sizes["hidden_width"] = math.ceil(sizes["hidden_width"] / _HIDDEN_MULTIPLE) * _HIDDEN_MULTIPLE
        return StepVideoTextConfig(**sizes)


def _resolve(config: StepVideoTextConfig) -> StepVideoTextConfig:
    """`config` with the sizes and the tokenizers of `config.path`."""
    if config.path is None:
        return config
    public = {}
    for name, place in ((CLIP_FOLDER, CLIP_WEIGHTS), (LLM_FOLDER, LLM_FOLDER)):
        file = Path(config.path) / place / "config.json"
        if not file.is_file():
            raise CheckpointError(
                f"{file} does not exist: text/step_video needs the authors' folders {CLIP_FOLDER} and {LLM_FOLDER} in one "
                "place, and downloads nothing."
            )
        public[name] = read_json(file)
    return dataclasses.replace(
        ADAPTER.config_from_public(public),
        path=config.path,
        tokenizer_path=config.tokenizer_path or config.path,
        max_length=config.max_length,
        clip_max_length=config.clip_max_length,
    )


def build(config: StepVideoTextConfig) -> StepVideoTextEncoder:
    """The pair on the default device; with `path`, and unless that device is meta, with the weights of the folders.

    Raises:
        CheckpointError: `path` does not hold both encoders, as safetensors.
        ConfigError: what it holds is something else.
    """
    config = _resolve(config)
    device = torch.get_default_device()
    if config.path is None or device.type == "meta":
        return StepVideoTextEncoder(config)
    with torch.device("meta"):
        model = StepVideoTextEncoder(config)
    tensors: dict[str, Tensor] = {}
    for name, place in ((CLIP_FOLDER, CLIP_WEIGHTS), (LLM_FOLDER, LLM_FOLDER)):
        for file in public_files(Path(config.path) / place):
            tensors |= _behind(f"{name}.", read_weights(file, device))
    load_weights(model, ADAPTER.from_public(tensors), config.path)
    return model.eval()


ADAPTER = StepVideoTextAdapter()
SPEC = ModelSpec("text/step_video", StepVideoTextConfig, SIZES, build, whole, ADAPTER)
