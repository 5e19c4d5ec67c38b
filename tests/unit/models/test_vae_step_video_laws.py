"""The laws of Step-Video's VAE: frames, causality, dual path, attention, streams and seams (spec step-video A2, F-A)."""

import pytest
import torch

from tests.unit.models.step_video import clip, small
from videofm import models
from videofm.errors import CheckpointError, ConfigError, DataError
from videofm.models.spec import ParallelOptions
from videofm.models.vae.step_video import blocks, parallelize
from videofm.models.vae.step_video.model import blend_seams

# -- frames and chunks


@pytest.mark.parametrize(("num_frames", "num_latents"), [(1, 1), (17, 3), (68, 12), (136, 24), (204, 36)])
def test_frame_rule(num_frames, num_latents):
    """Spec F-A.3. Shapes of the real model, on the meta device; stage one has 5 latent frames a chunk."""
    model = models.build("vae/step_video", "16x16x8", device="meta")
    assert model.latent_frames(num_frames) == num_latents
    assert model.pixel_frames(num_latents) == num_frames
    if num_frames <= 68:
        latents = model.encode(torch.empty(1, 3, num_frames, 32, 48, device="meta")).mean
        assert latents.shape == (1, 64, num_latents, 2, 3)
        assert model.decode(latents).shape == (1, 3, num_frames, 32, 48)
    stage_one = models.build("vae/step_video", "8x8x4", device="meta")
    assert stage_one.latent_frames(num_frames) == (1 if num_frames == 1 else num_frames // 17 * 5)
    assert stage_one.pixel_frames(stage_one.latent_frames(num_frames)) == num_frames


@torch.no_grad()
def test_tiny_fits_quick_runs():
    model = models.build("vae/step_video", "tiny")
    video = clip(17, 32)
    assert model.encode(video).mean.shape == (1, 8, 3, 2, 2)
    assert model(video).shape == video.shape
    assert (model.encoder_causal, model.decoder_causal, model.strictly_causal) == (True, False, False)


@pytest.mark.parametrize("dual_path", [True, False])
@torch.no_grad()
def test_encoder_causality(dual_path):
    """Spec F-A.4: latent frame j of a chunk sees frames up to `stride * j` of that chunk: bitwise, and not one frame less."""
    model = small(dual_path=dual_path)
    stride, per_chunk = model.compression.time, model.config.chunk_latents
    video = clip(34)
    whole = model.encode(video).mean
    for latent in range(per_chunk - 1):
        changed = video.clone()
        changed[:, :, stride * latent + 1 : 17] += 0.01
        found = model.encode(changed.clamp(-1, 1)).mean
        assert torch.equal(found[:, :, : latent + 1], whole[:, :, : latent + 1])
        assert not torch.equal(found[:, :, latent + 1 : per_chunk], whole[:, :, latent + 1 : per_chunk])
        assert torch.equal(found[:, :, per_chunk:], whole[:, :, per_chunk:])  # no other chunk
        changed = video.clone()
        changed[:, :, stride * latent] *= 0.5
        assert not torch.equal(model.encode(changed).mean[:, :, latent], whole[:, :, latent])
    image = model.encode(video[:, :, :1]).mean
    torch.testing.assert_close(image, whole[:, :, :1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_norms_over_the_clip_are_not_causal():
    """The negative control of the test above, inside a chunk; other chunks are still not seen."""
    model = small(norm_scope="clip")
    video = clip(34)
    changed = video.clone()
    changed[:, :, 9:17] *= 0.5
    before, after = model.encode(video).mean, model.encode(changed).mean
    assert not torch.equal(before[:, :, :2], after[:, :, :2])
    assert torch.equal(before[:, :, 3:], after[:, :, 3:])
    assert not model.encoder_causal
    assert not small(norm_scope="clip", blend_seams=False).decoder_causal


@pytest.mark.parametrize("blend", [True, False])
@torch.no_grad()
def test_decoder_causality_is_what_the_config_says(blend):
    """Frame n of a chunk sees latent frames up to n / 8, rounded up. Blending shows the next chunk to the last frame only."""
    model = small(blend_seams=blend)
    latents = torch.randn(1, 2, 6, 1, 1)
    whole = model.decode(latents)
    for latent in (1, 2, 4, 5):
        changed = latents.clone()
        changed[:, :, latent] += 1
        found, first = model.decode(changed), latent // 3 * 17 + 8 * (latent % 3) - 7
        assert torch.equal(found[:, :, :first], whole[:, :, :first])
        assert not torch.equal(found[:, :, first], whole[:, :, first])
    next_chunk = latents.clone()
    next_chunk[:, :, 3] += 1
    found = model.decode(next_chunk)
    assert torch.equal(found[:, :, :16], whole[:, :, :16])
    assert torch.equal(found[:, :, 16], whole[:, :, 16]) is not blend
    assert model.decoder_causal is model.strictly_causal is not blend
    error = (model.decode(latents[:, :, :3]) - whole[:, :, :17]).abs().max()
    assert (error > 1e-3) if blend else (error == 0)


@torch.no_grad()
def test_norms_per_frame():
    """Permuting frames permutes the output, and (which norms over a clip fail) a frame does not notice another."""
    x, order = torch.randn(2, 16, 5, 4, 4), torch.tensor([3, 0, 4, 1, 2])
    changed = x.clone()
    changed[:, :, 2] += torch.randn(4, 4)
    for scope in ("frame", "clip"):
        norm = small(norm_scope=scope).encoder.norm_out
        torch.testing.assert_close(norm(x[:, :, order]), norm(x)[:, :, order])
        same = torch.equal(norm(changed)[:, :, :2], norm(x)[:, :, :2])
        assert same is (scope == "frame")


# -- dual path


@torch.no_grad()
def test_dual_path_without_its_convolutions():
    """Spec F-A.5: what is left averages groups of channels of the cells on the way down, and repeats on the way up.

    One after the other they give the input back, except in the first frame, where half of a cell is the zeros in front.
    """
    down, down_1 = blocks.DualPathDown(4, 16, 2), blocks.DualPathDown(32, 8, 1)
    up, up_1 = blocks.DualPathUp(16, 4, 2), blocks.DualPathUp(8, 32, 1)
    for block in (down, down_1, up, up_1):
        block.conv.weight.zero_()
        block.conv.bias.zero_()
    x = torch.randn(1, 4, 5, 4, 4)
    # Groups of two: a channel's cell is (time, height, width), so that neighbours along the width are averaged.
    pairs = torch.cat([torch.zeros(1, 4, 1, 4, 2), (x[..., ::2] + x[..., 1::2]) / 2], dim=2)
    expected = torch.stack([pairs[:, :, t::2, h::2] for t in (0, 1) for h in (0, 1)], dim=2).flatten(1, 2)
    torch.testing.assert_close(down(x), expected)

    z = torch.randn(1, 16, 3, 2, 2)
    assert up(z).shape == (1, 4, 5, 4, 4)
    torch.testing.assert_close(down(up(z))[:, :, 1:], z[:, :, 1:])
    narrow = torch.randn(1, 8, 3, 2, 2)
    assert torch.equal(up_1(narrow)[:, 4:8], narrow[:, 1:2].expand(-1, 4, -1, -1, -1))
    torch.testing.assert_close(down_1(up_1(narrow)), narrow)


@pytest.mark.parametrize("num_frames", [1, 5])
def test_unshuffle_and_shuffle(num_frames):
    """They undo each other; the first frame stays alone, behind a frame of zeros."""
    x = torch.randn(2, 3, num_frames, 4, 6)
    cells = blocks.unshuffle(x, 2)
    assert cells.shape == (2, 24, (num_frames + 1) // 2, 2, 3)
    assert not cells.unflatten(1, (3, 2, 4))[:, :, 0, :, 0].any()
    assert torch.equal(blocks.shuffle(cells, 2), x)
    assert torch.equal(blocks.unshuffle(x, 1), x)


# -- attention


@torch.no_grad()
def test_attention_is_causal_over_tokens_in_blocks_as_in_one(monkeypatch):
    """Tokens count frame by frame, then row by row: the 20th of 3 x 3 x 4 is (1, 1, 3). Blocks of 7 queries change nothing."""
    attention = small().encoder.middle.attention
    attention.norm = torch.nn.Identity()  # a norm shows each token to its whole frame
    x = torch.randn(2, 16, 3, 3, 4)
    whole = attention(x)
    changed = x.clone()
    changed[:, :, 1, 1, 3] += 1
    same = (attention(changed) == whole).all(dim=1).flatten(1)  # (B, T H W)
    assert same[:, :19].all()
    assert not same[:, 19:].any()
    monkeypatch.setattr(blocks, "QUERY_BLOCK", 7)
    torch.testing.assert_close(attention(x), whole, rtol=0, atol=1e-6)


@torch.no_grad()
def test_parallelize_binds_both_attentions():
    model = small()
    video = clip(17)
    before = model(video)
    defaults = {coder.middle.attention.attend for coder in (model.encoder, model.decoder)}
    parallelize(model, None, ParallelOptions(attention="math"))
    bound = {coder.middle.attention.attend for coder in (model.encoder, model.decoder)}
    assert len(bound) == 1
    assert not bound & defaults
    torch.testing.assert_close(model(video), before, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="no attention backend for 1 heads of width 16"):
        parallelize(model, None, ParallelOptions(attention="xformers"))


# -- streaming and seams


@pytest.mark.parametrize("overrides", [{}, {"dual_path": False}, {"norm_scope": "clip"}])
@torch.no_grad()
def test_streams_equal_the_whole(overrides):
    """Chunks of 17 and 34 frames, bitwise; an image is a stream of one."""
    model = small(blend_seams=False, **overrides)
    video = clip(51)
    whole = model.encode(video)
    first = model.encode_stream(video[:, :, :17])
    second = model.encode_stream(video[:, :, 17:], first.cache)
    streamed = torch.cat([first.posterior.logvar, second.posterior.logvar], dim=2)
    assert torch.equal(streamed, whole.logvar)
    latents, length = whole.mean, model.config.chunk_latents
    head = model.decode_stream(latents[:, :, : 2 * length])
    tail = model.decode_stream(latents[:, :, 2 * length :], head.cache)
    assert torch.equal(torch.cat([head.video, tail.video], dim=2), model.decode(latents))
    image = model.encode_stream(video[:, :, :1])
    assert torch.equal(image.posterior.mean, model.encode(video[:, :, :1]).mean)
    with pytest.raises(DataError, match="one frame is an image, a clip of its own"):
        model.encode_stream(video[:, :, :17], image.cache)
    with pytest.raises(DataError, match="one frame is an image, a clip of its own"):
        model.decode_stream(latents[:, :, :1], head.cache)


def test_blended_decoding_does_not_stream():
    with pytest.raises(ConfigError, match="cannot stream exactly: build it with blend_seams=False"):
        small().decode_stream(torch.zeros(1, 2, 3, 1, 1))


@torch.no_grad()
def test_seams():
    """At each seam (a, b) becomes (0.76 a + 0.24 b, 0.4 a + 0.6 b); nothing else changes, and a still clip stays still."""
    model, plain = small(), small(blend_seams=False)
    latents = torch.randn(2, 2, 9, 1, 1)
    expected = plain.decode(latents)
    for seam in (17, 34):
        a, b = expected[:, :, seam - 1].clone(), expected[:, :, seam].clone()
        expected[:, :, seam - 1], expected[:, :, seam] = 0.76 * a + 0.24 * b, 0.4 * a + 0.6 * b
    torch.testing.assert_close(model.decode(latents), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(blend_seams(torch.full((1, 3, 51, 2, 2), 0.3)), torch.full((1, 3, 51, 2, 2), 0.3))


def test_gradients_reach_every_parameter():
    """Through two chunks, whose frames are written and blended in place. (Keys have a bias that softmax cancels.)"""
    model = small()
    video = clip(34)
    posterior = model.encode(video)
    reconstruction = model.decode(posterior.sample(torch.randn_like(posterior.mean)))
    (reconstruction - video).square().mean().backward()
    untouched = [
        name for name, p in model.named_parameters() if not bool(p.grad.any()) and not name.endswith("attention.k.bias")
    ]
    assert untouched == []
    assert model.last_layer.shape == (3, 8, 3, 3, 3)


def test_stage_two_starts_from_a_folder_of_stage_one(tmp_path):
    torch.manual_seed(0)
    stage_one = models.build("vae/step_video", "tiny", dual_path=False)
    stage_two = models.build("vae/step_video", "tiny")
    models.inflate(stage_two, models.save(stage_one, tmp_path / "one"))
    assert torch.equal(stage_two.encoder.conv_in.weight, stage_one.encoder.conv_in.weight)
    with pytest.raises(CheckpointError, match=r"holds vae/ltx; expected vae/step_video with dual_path off"):
        models.inflate(stage_two, models.save(models.build("vae/ltx", "tiny"), tmp_path / "other"))
