"""The text encoder against the pipeline of diffusers, which it must match."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import LTXConditionPipeline, LTXPipeline
from transformers import T5EncoderModel

from videofm import models
from videofm.errors import CheckpointError, ConfigError
from videofm.models.text.t5 import ADAPTER

PROMPTS = ["a cat on a mat", "", "x" * 300]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return models.build("text/t5", "tiny").eval()


@torch.no_grad()
def test_conditioning_is_what_the_pipeline_computes(encoder):
    pipeline = SimpleNamespace(tokenizer=encoder.tokenizer, text_encoder=encoder.transformer)
    embeddings, mask = LTXPipeline._get_t5_prompt_embeds(pipeline, PROMPTS, device="cpu", dtype=torch.float32)
    ours = encoder.encode(PROMPTS)
    assert ours.embeddings.shape == (3, 128, 64)
    assert ours.mask.dtype == torch.bool
    assert torch.equal(ours.embeddings, embeddings)
    assert torch.equal(ours.mask, mask)
    assert ours.mask.sum(dim=1).tolist() == [15, 1, 128]  # bytes and one end token; cut at 128
    assert encoder.num_tokens(PROMPTS) == [15, 1, 301]


@torch.no_grad()
def test_with_the_mask_it_is_what_the_condition_pipeline_computes(encoder, tmp_path):
    """Asked for once, or set in the config; which a folder of weights does not change, and saving keeps."""
    pipeline = SimpleNamespace(tokenizer=encoder.tokenizer, text_encoder=encoder.transformer)
    embeddings, mask = LTXConditionPipeline._get_t5_prompt_embeds(
        pipeline, PROMPTS, max_sequence_length=128, device="cpu", dtype=torch.float32
    )
    ours = encoder.encode(PROMPTS, masked=True)
    torch.testing.assert_close(ours.embeddings, embeddings, rtol=0, atol=1e-5)
    assert torch.equal(ours.mask, mask)
    assert not torch.allclose(ours.embeddings[:1, :15], encoder.encode(PROMPTS[:1]).embeddings[:, :15], atol=1e-3)

    encoder.transformer.save_pretrained(tmp_path / "text_encoder")
    encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")
    built = models.build("text/t5", path=str(tmp_path), masked=True).eval()
    loaded = models.load(models.save(built, tmp_path / "ours"))
    for masked in (built, loaded):
        assert masked.config.masked
        torch.testing.assert_close(masked.encode(PROMPTS).embeddings, embeddings, rtol=0, atol=1e-5)
        unmasked = masked.encode(PROMPTS, masked=False).embeddings
        torch.testing.assert_close(unmasked, encoder.encode(PROMPTS).embeddings, rtol=0, atol=1e-5)


@torch.no_grad()
def test_real_tokens_attend_to_padding(encoder):
    """T5 runs without the mask: another amount of padding changes the real tokens."""
    shorter = models.build("text/t5", "tiny", max_length=32)
    shorter.load_state_dict(encoder.state_dict())
    assert not torch.allclose(shorter.encode(PROMPTS[:1]).embeddings[:, :15], encoder.encode(PROMPTS[:1]).embeddings[:, :15])


def test_a_local_folder_brings_weights_sizes_and_tokenizer(encoder, tmp_path):
    encoder.transformer.save_pretrained(tmp_path / "text_encoder")
    encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")
    for path in (tmp_path, tmp_path / "text_encoder"):
        built = models.build("text/t5", path=str(path))
        assert built.config.width == 64
        assert torch.equal(built.encode(PROMPTS).embeddings, encoder.encode(PROMPTS).embeddings)
    loaded = models.load(tmp_path / "text_encoder")
    assert torch.equal(loaded.encode(PROMPTS).embeddings, encoder.encode(PROMPTS).embeddings)


def test_ours_on_disk_keeps_the_tied_embedding_one_tensor(encoder, tmp_path):
    loaded = models.load(models.save(encoder, tmp_path))
    assert torch.equal(loaded.encode(PROMPTS).embeddings, encoder.encode(PROMPTS).embeddings)
    assert loaded.transformer.shared.weight is loaded.transformer.encoder.embed_tokens.weight


def test_layout_both_ways(encoder):
    public = ADAPTER.to_public(encoder.state_dict())
    theirs = T5EncoderModel(T5EncoderModel.config_class.from_dict(ADAPTER.public_config(encoder.config)))
    theirs.load_state_dict(public, strict=True)
    assert set(ADAPTER.from_public(public)) == set(encoder.state_dict())
    assert ADAPTER.config_from_public(theirs.config.to_dict()) == encoder.config


def test_xxl_has_the_size_of_the_released_encoder():
    """24 blocks of 4 * 4096^2 + 3 * 4096 * 10240 + 2 * 4096, embeddings, 32 * 64 relative biases and the last norm."""
    model = models.build("text/t5", "xxl", device="meta")
    expected = 24 * (4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096) + 32128 * 4096 + 32 * 64 + 4096
    assert sum(p.numel() for p in model.parameters()) == expected == 4_762_310_656
    with pytest.raises(ConfigError, match="32128 tokens has no tokenizer: set path"):
        _ = model.tokenizer


def test_what_is_not_a_t5_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json: text/t5 needs the local folder"):
        models.build("text/t5", path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"is not T5 v1\.1"):
        ADAPTER.config_from_public({"model_type": "t5", "feed_forward_proj": "relu"})
    with pytest.raises(CheckpointError, match="stray is not a tensor of text/t5"):
        ADAPTER.to_public({"stray": torch.zeros(1)})
