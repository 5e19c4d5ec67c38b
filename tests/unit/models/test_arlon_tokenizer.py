"""The latent tokenizer: shapes, causality and prefixes, gradients, sizes, and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from videofm import models
from videofm.errors import CheckpointError, ConfigError, DataError
from videofm.models.arlon.config import SIZES, TokenizerConfig
from videofm.models.arlon.tokenizer import LatentTokenizer
from videofm.models.quantizers import QuantizerOutput
from videofm.types import ALONE

NAME = "arlon/tokenizer"
VQ = {"kind": "vq", "codebook_size": 64, "dim": 4}


def narrow(size: str, **fields: Any) -> LatentTokenizer:
    """A size with few channels: rates, halvings and all paths are its own. Random codes near the encoder's vectors."""
    config = SIZES[size]
    thin = {"widths": [8] * len(config.widths), "num_groups": 4, "num_blocks": 1, "latent_channels": 3, "quantizer": VQ}
    torch.manual_seed(0)
    model = models.build(NAME, size, **{**thin, **fields}).eval()
    assert isinstance(model, LatentTokenizer)
    return model


def latents(num_frames: int, height: int = 16, width: int = 16, size: int = 2, channels: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(size, channels, num_frames, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_frames", [1, 4, 5, 6])
def test_features_have_the_shape_of_the_latents(size: str, num_frames: int) -> None:
    """For every size, so that tokenizers of other rates are interchangeable where features are taken; the numbers of tokens are
    T' = ceil(T / rate), H / rate and W / rate, which differ here."""
    model, (time, height, width) = narrow(size), SIZES[size].rate
    z = latents(num_frames, 2 * height, 3 * width)
    out = model(z)
    assert out.features.shape == z.shape and out.features.dtype == z.dtype
    shape = model.token_shape((num_frames, 2 * height, 3 * width))
    assert shape == (-(-num_frames // time), 2, 3)
    assert out.quantized.indices.shape == (2, *shape) and out.quantized.indices.dtype == torch.int64
    assert torch.equal(model.encode(z), out.quantized.indices)
    assert torch.equal(model.decode(out.quantized.indices, num_frames), out.features)


@pytest.mark.parametrize("size", ["tiny", "4x8x8", "2x4x4"])
def test_encoder_is_causal_and_sees_every_frame(size: str) -> None:
    """Vectors of tokens before a change stay, bit for bit; the token that stands for the changed frame moves. The latter fails
    where a strided convolution is padded by kernel - 1 frames: then the last frames of a clip are in no token."""
    model, rate = narrow(size), SIZES[size].rate[0]
    z = latents(2 * rate + 1)
    before = model._vectors(z)
    missing = -z.shape[2] % rate
    for frame in range(z.shape[2]):
        changed = z.clone()
        changed[:, :, frame] += latents(1, seed=9)[:, :, 0]
        moved = (model._vectors(changed) != before).flatten(3).any(dim=3).any(dim=1)  # (B, D, T', H', W') -> (B, T')
        first = (frame + missing) // rate
        assert not moved[:, :first].any() and moved[:, first].all(), frame


def test_decoder_is_causal() -> None:
    """Features of frames before those that a changed token stands for stay; the first of these moves."""
    model = narrow("4x8x8")
    indices = model.encode(latents(9))  # three frames of tokens, of 1, 4 and 4 frames
    before = model.decode(indices, 9)
    for frame, first in ((1, 1), (2, 5)):
        changed = indices.clone()
        changed[:, frame] = (changed[:, frame] + 1) % model.vocab_size
        moved = (model.decode(changed, 9) != before).flatten(3).any(dim=3).any(dim=1)  # (B, C, T, H, W) -> (B, T)
        assert not moved[:, :first].any() and moved[:, first].all()


@pytest.mark.parametrize("size", ["4x8x8", "2x2x2"])
def test_tokens_of_a_prefix_are_a_prefix_of_the_tokens(size: str) -> None:
    """Of 1 + rate n frames for any n; another rest is padded otherwise, and gives other vectors (negative control)."""
    model, rate = narrow(size), SIZES[size].rate[0]
    z = latents(1 + 3 * rate)
    whole, tokens = model._vectors(z), model.encode(z)
    assert len(tokens.unique()) > 4, "one token for all would prove nothing"
    for number in range(3):
        prefix = z[:, :, : 1 + number * rate]
        torch.testing.assert_close(model._vectors(prefix), whole[:, :, : 1 + number], atol=1e-5, rtol=1e-5)
        assert torch.equal(model.encode(prefix), tokens[:, : 1 + number])
    assert (model._vectors(z[:, :, : 2 + rate]) - whole[:, :, : -(-(2 + rate) // rate)]).abs().max() > 1e-2


def test_gradient_passes_straight_through() -> None:
    """dL/dz_e = dL/dz_q at the quantizer, whose own losses are left out; the first layer gets a gradient."""
    model = narrow("tiny").train()
    grads: dict[str, Tensor] = {}

    def watch(_: nn.Module, args: tuple[Tensor, ...], out: QuantizerOutput) -> None:
        args[0].register_hook(lambda grad: grads.update(e=grad))
        out.z_q.register_hook(lambda grad: grads.update(q=grad))

    model.quantizer.register_forward_hook(watch)
    z = latents(3)
    (model(z).features - z).square().mean().backward()
    torch.testing.assert_close(grads["e"], grads["q"], atol=0, rtol=0)
    assert grads["e"].abs().max() > 0
    first = model.encoder.conv_in.weight.grad
    assert first is not None and first.abs().max() > 0


def test_encode_in_training_counts_nothing() -> None:
    """A codebook that follows averages takes no notice of `encode`; of `forward` it does (negative control)."""

    def after(look: str) -> dict[str, Tensor]:
        model = narrow("tiny", quantizer={"kind": "vq_ema", "codebook_size": 16, "dim": 4}).train()
        getattr(model, look)(latents(3, size=8))
        assert model.quantizer.training
        model.quantizer.update(ALONE)
        return {key: value.clone() for key, value in model.quantizer.state_dict().items()}

    encoded, seen, again = after("encode"), after("forward"), after("forward")
    assert all(torch.equal(seen[key], again[key]) for key in seen)
    assert any(not torch.equal(encoded[key], seen[key]) for key in seen)


def conv(kernel: int, before: int, after: int) -> int:
    return kernel**3 * before * after + after


def count(config: TokenizerConfig, dim: int) -> int:
    """By hand: encoder and decoder each have blocks of two norms and two 3^3 convolutions, a 3^3 convolution for each step
    between widths, one norm, a 3^3 convolution at the latents and a 1^3 one at the codes."""
    block = sum(config.num_blocks * 2 * (2 * width + conv(3, width, width)) for width in config.widths)
    pairs = list(zip(config.widths, config.widths[1:], strict=False))
    down, up = sum(conv(3, a, b) for a, b in pairs), sum(conv(3, b, a) for a, b in pairs)
    first, last, z = config.widths[0], config.widths[-1], config.latent_channels
    encoder = conv(3, z, first) + block + down + 2 * last + conv(1, last, dim)
    decoder = conv(1, dim, last) + block + up + 2 * first + conv(3, first, z)
    return encoder + decoder


@pytest.mark.parametrize(
    ("size", "recorded"),
    [
        ("tiny", 693_784),
        ("tiny_coarse", 1_358_232),
        ("4x8x8", 154_026_004),
        ("4x16x16", 224_818_196),
        ("2x2x2", 79_664_272),
        ("2x4x4", 150_456_464),
    ],
)
def test_number_of_parameters(size: str, recorded: int) -> None:
    """The default quantizer, moved by averages, has none."""
    model = models.build(NAME, size, device="meta")
    assert isinstance(model, LatentTokenizer)
    assert sum(parameter.numel() for parameter in model.parameters()) == recorded == count(model.config, model.quantizer.dim)


def test_every_size_is_recorded() -> None:
    mark = next(mark for mark in test_number_of_parameters.pytestmark if mark.name == "parametrize")  # type: ignore[attr-defined]
    assert [size for size, _ in mark.args[1]] == list(SIZES) == models.sizes(NAME)


@pytest.mark.parametrize(("size", "strides"), [("4x8x8", ((2, 2, 2), (2, 2, 2), (1, 2, 2))), ("tiny", ((1, 2, 2),))])
def test_strides_multiply_to_the_rate(size: str, strides: tuple[tuple[int, int, int], ...]) -> None:
    assert SIZES[size].strides == strides
    assert tuple(torch.tensor(strides).prod(dim=0).tolist()) == SIZES[size].rate
    assert TokenizerConfig(rate=(1, 1, 1), widths=(32,)).strides == ()


def quantizer_state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if key.startswith("quantizer.")}


@pytest.mark.parametrize("quantizer", [{"kind": "vq_ema", "codebook_size": 16, "dim": 4}, {"kind": "fsq", "levels": [4, 3]}])
def test_save_and_load_keep_every_bit(quantizer: dict[str, Any], tmp_path: Path) -> None:
    """After some updates: weights, codebook and its statistics, and so tokens and features; in our layout and in the public
    one, which is the same."""
    model = narrow("tiny", quantizer=quantizer).train()
    z = latents(3, size=8)
    for seed in range(3):
        model(latents(3, size=8, seed=seed))
        model.quantizer.update(ALONE)
    model.eval()
    loaded = models.load(models.save(model, tmp_path / "ours"))
    public = models.load(models.save_public(model, tmp_path / "public"))
    for other in (loaded, public):
        assert other.config == model.config and not other.training
        state = other.state_dict()
        assert state.keys() == model.state_dict().keys()
        for key, value in model.state_dict().items():
            assert torch.equal(state[key], value) and state[key].dtype == value.dtype, key
        assert torch.equal(other.encode(z), model.encode(z)) and torch.equal(other(z).features, model(z).features)
    assert quantizer_state(model) or quantizer["kind"] == "fsq"
    described = json.loads((tmp_path / "ours" / "model.json").read_text())
    assert described["name"] == NAME and described["config"]["quantizer"]["kind"] == quantizer["kind"]


def test_a_foreign_tensor_is_refused() -> None:
    with pytest.raises(CheckpointError, match="unet.conv is not a tensor of this model, which has encoder, quantizer, decoder"):
        models.adapter(NAME).to_public({"unet.conv": torch.zeros(1)})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": (3, 2, 2)}, r"rate \(3, 2, 2\) must be three powers of two"),
        ({"rate": (2, 2)}, "must be three powers of two"),
        ({"rate": (2, 4, 4)}, r"widths \(128, 256, 512, 512\) are 4, but rate \(2, 4, 4\) takes 2 halvings: give 3"),
        ({"widths": (100, 256, 512, 512)}, r"widths \[100\] are not multiples of num_groups 32"),
        ({"num_blocks": 0}, "num_blocks 0 must be at least 1"),
        ({"quantizer": {"kind": "vqq"}}, "vqq.*did you mean 'vq'"),
        ({"quantizer": "vq_ema"}, "a quantizer is a mapping with a 'kind' .*, not 'vq_ema'"),
        ({"quantizer": None}, "a quantizer is a mapping with a 'kind' .*, not None"),
        ({"num_groups": 0}, "num_groups 0 must be at least 1"),
        ({"num_groups": 2.0}, "num_groups is 2.0; it must be a whole number"),
        ({"latent_channels": "four"}, "latent_channels is 'four'; it must be a whole number"),
        ({"rate": 2}, "rate is 2; it must be a list of whole numbers"),
        ({"rate": [1, 2, "x"]}, r"rate is \[1, 2, 'x'\]; it must be a list of whole numbers"),
        ({"widths": None}, "widths is None; it must be a list of whole numbers"),
    ],
)
def test_configs_that_cannot_work(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenizerConfig(**fields)


def test_wrong_inputs() -> None:
    model = narrow("4x8x8")
    with pytest.raises(DataError, match=r"\(1, 5, 4, 16, 16\); this tokenizer takes \(B, 3, T, H, W\)"):
        model(torch.zeros(1, 5, 4, 16, 16))
    with pytest.raises(DataError, match="4 frames of 12x16 do not fit .* height must be a multiple of 8"):
        model.encode(torch.zeros(1, 3, 4, 12, 16))
    with pytest.raises(DataError, match="0 frames of 16x16"):
        model.token_shape((0, 16, 16))
    tokens = model.encode(latents(5))
    with pytest.raises(DataError, match="2 token frames at rate 4 stand for 5 to 8 latent frames, not 9"):
        model.decode(tokens, 9)
    with pytest.raises(DataError, match=r"indices here are integers \(B, T, H, W\), got torch.int64 \(2, 8, 1\)"):
        model.decode(tokens.flatten(1), 5)
    with pytest.raises(DataError, match="indices from 64 to 64; this quantizer has codes 0 to 63"):
        model.decode(torch.full_like(tokens, 64), 5)


def test_several_codebooks() -> None:
    """Each token has a number for each; what predicts tokens is told to take another tokenizer."""
    model = narrow("tiny", quantizer={"kind": "rvq", "codebook_size": 16, "num_levels": 3, "dim": 4})
    z = latents(3)
    tokens = model.encode(z)
    assert tokens.shape == (2, 3, 8, 8, 3)
    assert torch.equal(model.decode(tokens, 3), model(z).features)
    with pytest.raises(DataError, match="indices here are integers"):
        model.decode(tokens[..., 0], 3)
    with pytest.raises(ConfigError, match="3 codebooks, so a token is 3 numbers"):
        _ = model.vocab_size
