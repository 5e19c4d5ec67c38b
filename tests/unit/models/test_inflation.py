"""From an image VAE on disk to the weights of a video VAE (spec A.3)."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import conv2d, pad

from videofm import models
from videofm.errors import CheckpointError, ConfigError
from videofm.models.vae.inflation import (
    fill,
    fold_quant_convs,
    image_tensors,
    inflate_kernel,
    our_names,
    reverse_stages,
)
from videofm.ops.causal_conv import CausalConv3d

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def image_vae(**overrides):
    torch.manual_seed(0)
    return models.build("vae/image_kl", "tiny", **overrides).eval()


def image_folder(tmp_path, **overrides):
    return models.save_public(image_vae(**overrides), tmp_path / "image")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_taps", [1, 3, 5])
@torch.no_grad()
def test_an_inflated_kernel_is_the_2d_convolution_of_each_frame(num_taps, causal):
    """The tap that is the present: the last of a causal convolution, else the centre. Another tap sees another frame."""
    torch.manual_seed(0)
    kernel, x = torch.randn(4, 3, 3, 3), torch.randn(2, 3, 6, 5, 5)
    conv = CausalConv3d(3, 4, (num_taps, 3, 3), causal=causal, time_padding="zeros")
    conv.bias.zero_()
    expected = torch.stack([conv2d(frame, kernel, padding=1) for frame in x.unbind(2)], dim=2)
    conv.weight.copy_(inflate_kernel(kernel, num_taps, causal))
    torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-5)
    assert int((conv.weight != 0).flatten(3).any(dim=3).any(dim=0).any(dim=0).sum()) == 1
    if num_taps > 1:
        conv.weight.copy_(inflate_kernel(kernel, num_taps, not causal))
        assert (conv(x) - expected).abs().max() > 0.1


def test_old_attention_names_are_accepted(tmp_path):
    """Files of the first diffusers call the four projections otherwise, and some store them as 1x1 convolutions."""
    folder = image_folder(tmp_path)
    modern = image_tensors(folder)
    assert modern.config["_class_name"] == "AutoencoderKL"
    old = {}
    for key, tensor in modern.tensors.items():
        for new, name in OLD.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        is_projection = key.split(".")[-2] in OLD.values() and tensor.ndim == 2
        old[key] = tensor[..., None, None].contiguous() if is_projection else tensor
    assert set(old) != set(modern.tensors)
    save_file(old, folder / "diffusion_pytorch_model.safetensors")
    again = image_tensors(folder)
    assert set(again.tensors) == set(modern.tensors)
    first, second = our_names(again), our_names(modern)
    assert all(torch.equal(first[key], second[key]) for key in second)
    ours, theirs = "encoder.middle.attention.q.weight", "encoder.mid_block.attentions.0.to_q.weight"
    assert torch.equal(second[ours], modern.tensors[theirs])


def test_stages_are_counted_from_the_finest(tmp_path):
    image = image_tensors(image_folder(tmp_path))
    ours = our_names(image)
    assert len(ours) == len(image.tensors)
    for name, theirs in (
        ("decoder.stages.0.blocks.1.conv2.weight", "decoder.up_blocks.3.resnets.1.conv2.weight"),
        ("decoder.stages.3.upsample.conv.bias", "decoder.up_blocks.0.upsamplers.0.conv.bias"),
        ("encoder.stages.0.downsample.bias", "encoder.down_blocks.0.downsamplers.0.conv.bias"),
    ):
        assert torch.equal(ours[name], image.tensors[theirs])
    assert list(reverse_stages(reverse_stages(ours))) == list(ours)


@torch.no_grad()
def test_quant_convs_fold(tmp_path):
    """`quant_conv` exactly. `post_quant_conv` exactly in the interior, and where its bias is zero; at the border its bias is
    not padded with zeros by the image VAE, and is by the folded convolution."""
    image = image_tensors(image_folder(tmp_path, quant_convs=(True, True)))
    before = our_names(image)
    folded = fold_quant_convs(before)
    assert set(before) - set(folded) == {f"{name}quant_conv.{p}" for name in ("", "post_") for p in ("weight", "bias")}

    x = torch.randn(2, 32, 6, 6)
    moments = conv2d(x, before["encoder.conv_out.weight"], before["encoder.conv_out.bias"], padding=1)
    moments = conv2d(moments, before["quant_conv.weight"], before["quant_conv.bias"])
    once = conv2d(x, folded["encoder.conv_out.weight"], folded["encoder.conv_out.bias"], padding=1)
    torch.testing.assert_close(once, moments, rtol=0, atol=1e-5)

    def error(tensors):
        z, one = torch.randn(2, 4, 6, 6), fold_quant_convs(tensors)
        mixed = conv2d(z, tensors["post_quant_conv.weight"], tensors["post_quant_conv.bias"])
        expected = conv2d(pad(mixed, (1, 1, 1, 1)), tensors["decoder.conv_in.weight"], tensors["decoder.conv_in.bias"])
        return (conv2d(z, one["decoder.conv_in.weight"], one["decoder.conv_in.bias"], padding=1) - expected).abs()

    assert error(before)[..., 1:-1, 1:-1].max() < 1e-5
    assert error(before).max() > 1e-2
    assert error(before | {"post_quant_conv.bias": torch.zeros(4)}).max() < 1e-5


@torch.no_grad()
def test_an_image_vae_with_quant_convs_inflates(tmp_path):
    """Encoding is exact; decoding too once the bias of `post_quant_conv` is zero, and off by little otherwise."""
    for bias, exact in ((0.0, True), (0.5, False)):
        image = image_vae(quant_convs=(True, True))
        image.image_vae.post_quant_conv.bias.fill_(bias)
        video = models.build("vae/cv_vae", "tiny").eval()
        models.inflate(video, models.save_public(image, tmp_path / str(bias)))
        clip, latents = torch.rand(1, 3, 5, 32, 32) * 2 - 1, torch.randn(1, 4, 1, 4, 4)
        torch.testing.assert_close(video.encode(clip).mean, image.encode(clip[:, :, ::4]).mean, rtol=0, atol=1e-5)
        error = (video.decode(latents) - image.decode(latents)).abs().max()
        assert (error < 1e-5) if exact else (error > 1e-3)


def test_what_is_no_image_vae(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config.json: expected a folder of diffusers' AutoencoderKL"):
        image_tensors(tmp_path / "nothing")
    folder = image_folder(tmp_path)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"truncated")
    with pytest.raises(CheckpointError, match="diffusion_pytorch_model.safetensors is damaged"):
        image_tensors(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="diffusion_pytorch_model.safetensors does not exist"):
        image_tensors(folder)
    (folder / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(CheckpointError, match="is of class 'VQModel'; expected 'AutoencoderKL'"):
        image_tensors(folder)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"widths": (16, 32, 32)}, r"28 not in the model: decoder\.stages\.3\.blocks\.0.* and 23 more"),
        ({"num_res_blocks": 2}, r"does not fit vae/cv_vae. Tensors \d+ missing: encoder\.stages\.0\.blocks\.1"),
        ({"widths": (16, 32, 32, 64)}, r"of another shape: encoder\.stages\.3"),
        ({"latent_channels": 8}, r"encoder\.conv_out\.weight \(8, 32, 3, 3\) for \(16, 32, 3, 3, 3\)"),
    ],
)
def test_an_image_vae_of_another_shape(tmp_path, overrides, message):
    model = models.build("vae/cv_vae", "tiny", **overrides)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        models.inflate(model, image_folder(tmp_path))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_foreign_tensors_of_an_image_vae(tmp_path):
    folder = image_folder(tmp_path)
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"encoder.wings": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"encoder\.wings is not in the public layout"):
        models.inflate(models.build("vae/cv_vae", "tiny"), folder)
    with pytest.raises(CheckpointError, match=r"1 not in the model: wings\.weight"):
        fill(models.build("vae/cv_vae", "tiny"), {"wings.weight": torch.zeros(1)}, "here")


def test_models_without_an_image_vae_to_start_from(tmp_path):
    with pytest.raises(ConfigError, match=r"vae/ltx cannot start from a smaller model.*These can: .*vae/cv_vae"):
        models.inflate(models.build("vae/ltx", "tiny"), tmp_path)
