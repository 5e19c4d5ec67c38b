"""Step-Video's text pair: against the decoder layer and the BERT of transformers, and in the folders of the authors."""

import json
import sys

import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import save_file
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from videofm import models
from videofm.errors import CheckpointError, ConfigError
from videofm.models.text.step_llm import alibi_slopes, causal_bias
from videofm.models.text.step_video import ADAPTER

PROMPTS = ["a cat on a mat", "", "x" * 400]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "on", "mat", "##s"]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return models.build("text/step_video", "tiny").eval()


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@torch.no_grad()
def test_shapes_and_masks(encoder):
    """A byte a token, with start and end; cut at 320 and 77."""
    found = encoder.encode(PROMPTS)
    assert found.embeddings.shape == (3, 320, 64) and found.clip_embeddings.shape == (3, 77, 32)
    assert found.mask.dtype == torch.bool and found.mask.sum(dim=1).tolist() == [16, 2, 320]
    assert all(row.sum() == row.long().cumprod(0).sum() for row in found.mask)  # real tokens come first
    assert encoder.num_tokens(PROMPTS) == [16, 2, 402]


@pytest.mark.parametrize("num_heads", [1, 2, 4, 6, 12, 48])
def test_slopes_are_those_of_bloom(num_heads):
    """Whose table is `slope * position`: at position 1 the slopes themselves, also between powers of two."""
    theirs = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(num_heads), theirs, rtol=1e-6, atol=0)


def test_the_bias_is_a_square_root_of_distance():
    """Two heads have the slopes 2^-4 and 2^-8."""
    bias = causal_bias(5, 2)
    assert bias.shape == (1, 2, 5, 5)
    assert bias[0, 0, 4].tolist() == pytest.approx([-((4 - key) ** 0.5) / 16 for key in range(5)])
    assert bias[0, 1, 4, 0] == -2 / 256 and torch.isinf(bias[0, :, 1, 2:]).all()


@torch.no_grad()
def test_a_block_is_the_layer_of_llama_with_another_position(encoder):
    """Their layer, rotated by nothing, with our bias as its mask; its separate projections are rows of ours: all queries, then
    for each group keys and values."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
        attn_implementation="eager",
    )  # fmt: skip
    theirs, block = LlamaDecoderLayer(config, 0).eval(), encoder.llm.blocks[1]
    for norm in (block.attention_norm, block.mlp_norm):
        norm.weight.normal_(mean=1.0, std=0.3)
    queries, groups = block.attention.qkv.weight.split([64, 64])
    keys, values = groups.reshape(2, 2, 16, 64).unbind(dim=1)  # (groups, k and v, K, D)
    gate, value = block.mlp_in.weight.chunk(2)
    weights = {
        "self_attn.q_proj": queries, "self_attn.k_proj": keys.reshape(32, 64), "self_attn.v_proj": values.reshape(32, 64),
        "self_attn.o_proj": block.attention.out.weight, "mlp.gate_proj": gate, "mlp.up_proj": value,
        "mlp.down_proj": block.mlp_out.weight, "input_layernorm": block.attention_norm.weight,
        "post_attention_layernorm": block.mlp_norm.weight,
    }  # fmt: skip
    theirs.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()}, strict=True)
    x, bias = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1)), causal_bias(9, 4)
    unmoved = (torch.ones(1, 9, 16), torch.zeros(1, 9, 16))
    expected = theirs(x, attention_mask=bias, position_embeddings=unmoved)
    torch.testing.assert_close(block(x, bias), expected, rtol=0, atol=1e-5)
    flat = bias.masked_fill(bias.isfinite(), 0.0)
    assert (block(x, flat) - expected).abs().max() > 1e-3  # the test sees positions


@torch.no_grad()
def test_a_token_sees_those_before_it_only(encoder):
    """Hence padding changes no real token, and prompts with one beginning share its states."""
    one, other = encoder.encode(["a cat on a mat", "a cat sits"]).embeddings
    assert torch.equal(one[:7], other[:7])  # start and "a cat "
    assert (one[7:11] - other[7:11]).abs().amax(dim=-1).min() > 1e-3
    shorter = models.build("text/step_video", "tiny", max_length=40).eval()
    shorter.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(shorter.encode(PROMPTS[:1]).embeddings[:, :16], one[None, :16], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_other_reads_both_ways_and_no_padding(encoder):
    one, other = encoder.encode(["a cat on a mat", "a cat sits"]).clip_embeddings
    assert (one[:7] - other[:7]).abs().amax(dim=-1).min() > 1e-3
    shorter = models.build("text/step_video", "tiny", clip_max_length=20).eval()
    shorter.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(shorter.encode(PROMPTS[:1]).clip_embeddings[0], one[:20], rtol=0, atol=1e-5)


def test_both_can_be_trained(encoder):
    found = encoder.encode(PROMPTS[:2])
    (found.embeddings.square().mean() + found.clip_embeddings.square().mean()).backward()
    without = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    encoder.zero_grad(set_to_none=True)
    assert without == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the authors release, tiny: a BERT with its pooler behind `bert.`, Step-LLM in two shards, and both tokenizers."""
    torch.manual_seed(1)
    root = tmp_path_factory.mktemp("stepvideo")
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
    ).eval()
    clip, llm = root / "hunyuan_clip", root / "step_llm"
    bert.config.save_pretrained(clip / "clip_text_encoder")
    save_file({f"bert.{k}": v for k, v in bert.state_dict().items()}, clip / "clip_text_encoder" / "model.safetensors")
    (clip / "tokenizer").mkdir()
    (clip / "tokenizer" / "vocab.txt").write_text("\n".join(WORDS))
    llm.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat on a mat", "cats on mats"]), model_prefix=str(llm / "step1_chat_tokenizer"),
        vocab_size=280, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    model = models.build("text/step_video", vocab_size=300, width=32, num_layers=2, num_heads=4, hidden_width=256)
    public = ADAPTER.to_public(model.state_dict())
    public = {key.removeprefix("step_llm."): value for key, value in public.items() if key.startswith("step_llm.")}
    described = ADAPTER.public_config(model.config)["step_llm"] | {"ffn_hidden_size": 200, "architectures": ["Step1Model"]}
    (llm / "config.json").write_text(json.dumps(described))
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    halves = [dict(list(public.items())[:5]), dict(list(public.items())[5:])]
    for name, half in zip(names, halves, strict=True):
        save_file(half, llm / name)
    index = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (llm / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return root, bert, model


@torch.no_grad()
def test_the_folders_of_the_authors(folder):
    """Sizes from both configs (200 is rounded up to 256), the tokens of both tokenizers, and what BERT makes of them."""
    root, bert, model = folder
    built = models.build("text/step_video", path=str(root))
    sizes = {name: getattr(built.config, name) for name in ("width", "hidden_width", "vocab_size", "clip_width")}
    assert sizes == {"width": 32, "hidden_width": 256, "vocab_size": 300, "clip_width": 16}
    assert all(torch.equal(tensor, built.llm.state_dict()[key]) for key, tensor in model.llm.state_dict().items())
    found = built.encode(["a cat on a mat", "cats"])
    tokenizer = transformers.BertTokenizer.from_pretrained(str(root / "hunyuan_clip" / "tokenizer"), local_files_only=True)
    tokens = tokenizer(["a cat on a mat", "cats"], padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert tokens.input_ids[:, :8].tolist() == [[2, 4, 5, 6, 4, 7, 3, 0], [2, 5, 8, 3, 0, 0, 0, 0]]
    torch.testing.assert_close(found.clip_embeddings, bert(**tokens).last_hidden_state, rtol=0, atol=1e-5)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(root / "step_llm" / "step1_chat_tokenizer.model"))
    ids = [1, *pieces.encode_as_ids("a cat on a mat"), 2]
    assert found.mask.sum(dim=1)[0] == len(ids) == built.num_tokens(["a cat on a mat"])[0]
    states = built(torch.tensor([ids + [2] * (320 - len(ids))]))
    torch.testing.assert_close(found.embeddings[:1], states, rtol=0, atol=1e-5)


@torch.no_grad()
def test_save_and_load(folder, encoder, tmp_path):
    """Ours, of bytes or with the tokenizers where they lie; and the public layout, all in one folder."""
    built = models.build("text/step_video", path=str(folder[0]))
    for model in (encoder, built):
        for save in (models.save, models.save_public):
            loaded = models.load(save(model, tmp_path / f"{save.__name__}_{model.config.width}"))
            assert same(loaded, model)
            if save is models.save:
                assert torch.equal(loaded.encode(PROMPTS).embeddings, model.encode(PROMPTS).embeddings)
                assert torch.equal(loaded.encode(PROMPTS).clip_embeddings, model.encode(PROMPTS).clip_embeddings)


def test_names_both_ways(encoder):
    state, public = encoder.state_dict(), ADAPTER.to_public(encoder.state_dict())
    assert ADAPTER.from_public(public).keys() == state.keys()
    assert "step_llm.transformer.layers.1.attention.wqkv.weight" in public
    assert "hunyuan_clip.encoder.layer.0.attention.self.query.weight" in public
    for translate, key, message in (
        (ADAPTER.to_public, "vae.weight", "vae.weight is not a tensor of text/step_video"),
        (ADAPTER.from_public, "vae.weight", "vae.weight is not in the public layout of text/step_video"),
        (ADAPTER.from_public, "step_llm.lm_head.weight", "lm_head.weight is not in the public layout"),
    ):
        with pytest.raises(CheckpointError, match=message):
            translate({key: torch.zeros(1)})


def test_without_its_tokenizer_or_sentencepiece(folder, tmp_path, monkeypatch):
    built = models.build("text/step_video", path=str(folder[0]), tokenizer_path=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"step1_chat_tokenizer\.model does not exist: it is the tokenizer of Step-LLM"):
        built.num_tokens([""])
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        ConfigError, match=r"needs sentencepiece, which is not installed: pip install -c constraints\.txt -e '\.\[text\]'"
    ):
        built.num_tokens([""])


def test_what_cannot_be_built(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json does not exist: text/step_video needs the authors' folders"):
        models.build("text/step_video", path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"with 300 and 259 tokens has no tokenizers: set path"):
        models.build("text/step_video", clip_vocab_size=300).encode([""])
    with pytest.raises(ConfigError, match=r"width 64 must be a multiple of num_heads 4, that of num_groups 3"):
        models.config("text/step_video", "tiny", num_groups=3)
    with pytest.raises(ConfigError, match="hidden_width 100 cannot be exported"):
        ADAPTER.public_config(models.config("text/step_video", "tiny", hidden_width=100))
    good = ADAPTER.public_config(models.config("text/step_video", "tiny"))
    good["hunyuan_clip"]["hidden_act"] = "relu"
    del good["step_llm"]["num_layers"]
    with pytest.raises(ConfigError, match=r"no step_llm\.num_layers, hunyuan_clip\.hidden_act 'relu' \(must be 'gelu'\)"):
        ADAPTER.config_from_public(good)
    place = tmp_path / "hunyuan_clip" / "clip_text_encoder"
    place.mkdir(parents=True)
    (tmp_path / "step_llm").symlink_to(folder[0] / "step_llm")
    (place / "config.json").write_text((folder[0] / "hunyuan_clip" / "clip_text_encoder" / "config.json").read_text())
    (place / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"It has pytorch_model\.bin, a pickle, which is not read: convert it"):
        models.build("text/step_video", path=str(tmp_path))
