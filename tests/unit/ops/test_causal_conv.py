"""Streaming equals the whole clip (spec E)."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv3d, pad

from videofm.errors import ConfigError
from videofm.ops.causal_conv import CausalConv3d, ChunkCache


def stack(strides, channels=3):
    torch.manual_seed(0)
    return nn.ModuleList(CausalConv3d(channels, channels, stride=(s, 1, 1)) for s in strides).double()


def stream(convs, video, chunks, padded_each_time=False):
    cache, outputs = ChunkCache(), []
    for x in video.split(chunks, dim=2):
        for conv in convs:
            x = conv(x, cache)
        outputs.append(x)
        cache = ChunkCache() if padded_each_time else cache.following()
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("chunks", [[1] + [4] * 8, [1] + [8] * 4, [9, 8, 16], [17, 16], [1] * 33, [2, 3, 5, 7, 11, 5]])
def test_any_chunking_is_exact(chunks):
    convs, video = stack([1, 2, 1, 2, 1]), torch.randn(1, 3, 33, 4, 4, dtype=torch.float64)
    whole = video
    for conv in convs:
        whole = conv(whole)
    assert whole.shape[2] == 9
    torch.testing.assert_close(stream(convs, video, chunks), whole, rtol=0, atol=1e-12)


def test_padding_every_chunk_is_wrong():
    """The negative control: without the cache the seams differ."""
    convs, video = stack([1, 1]), torch.randn(1, 3, 9, 4, 4, dtype=torch.float64)
    whole = convs[1](convs[0](video))
    assert (stream(convs, video, [5, 4], padded_each_time=True) - whole).abs().max() > 1e-3


@pytest.mark.parametrize(("stride", "kept"), [(1, 2), (2, 1)])
def test_frames_kept_for_kernel_three(stride, kept):
    (conv,) = stack([stride])
    cache = ChunkCache()
    conv(torch.randn(1, 3, 9, 4, 4, dtype=torch.float64), cache)
    assert cache.tails[conv].shape[2] == kept


def test_a_causal_output_does_not_see_later_frames_and_a_centred_one_does():
    video = torch.randn(1, 3, 7, 4, 4)
    changed = video.clone()
    changed[:, :, 4:] += 1
    causal, centred = CausalConv3d(3, 2), CausalConv3d(3, 2, causal=False)
    assert torch.equal(causal(video)[:, :, :4], causal(changed)[:, :, :4])
    assert not torch.allclose(centred(video)[:, :, :4], centred(changed)[:, :, :4])


def test_a_clip_can_go_on_twice_from_one_cache():
    (conv,) = stack([1])
    video, other = torch.randn(2, 1, 3, 6, 4, 4, dtype=torch.float64)
    cache = ChunkCache()
    conv(video[:, :, :4], cache)
    for rest in (other[:, :, 4:], video[:, :, 4:]):
        whole = torch.cat([video[:, :, :4], rest], dim=2)
        torch.testing.assert_close(conv(rest, cache.following()), conv(whole)[:, :, 4:])


def test_a_centred_convolution_cannot_stream():
    with pytest.raises(ConfigError, match="only a causal convolution can stream"):
        CausalConv3d(3, 3, causal=False)(torch.zeros(1, 3, 2, 4, 4), ChunkCache())


def test_paddings():
    """Against conv3d with the padding written out: zeros or repeats in time, before or around; zeros or borders in space."""
    x = torch.randn(2, 3, 4, 6, 6, dtype=torch.float64)

    def reference(conv, time, space, mode):
        padded = pad(pad(x, (0, 0, 0, 0, *time), "replicate" if mode[0] == "r" else "constant"), (*space, *space, 0, 0),
                     "replicate" if mode[1] == "r" else "constant")  # fmt: skip
        return conv3d(padded, conv.weight, conv.bias, conv.stride)

    cases = [
        ({}, (2, 0), (1, 1), "rz"),
        ({"causal": False}, (1, 1), (1, 1), "rz"),
        ({"time_padding": "zeros"}, (2, 0), (1, 1), "zz"),
        ({"space_padding": "replicate"}, (2, 0), (1, 1), "rr"),
        ({"space_padding": "end", "stride": (1, 2, 2)}, (2, 0), (0, 1), "rz"),
        ({"kernel_size": (1, 3, 3)}, (0, 0), (1, 1), "zz"),
        ({"kernel_size": (3, 1, 1), "causal": False, "time_padding": "zeros"}, (1, 1), (0, 0), "zz"),
    ]
    for options, time, space, mode in cases:
        conv = CausalConv3d(3, 2, **options).double()
        torch.testing.assert_close(conv(x), reference(conv, time, space, mode), msg=str(options))


def plain(conv, x):
    """The convolution by `conv3d` with the padding written out, first frame repeated in front."""
    return conv3d(torch.cat([x[:, :, :1]] * 2 + [x], dim=2), conv.weight, conv.bias, conv.stride, conv.padding)


def gradients(value, *inputs, **options):
    return torch.autograd.grad(value.square().sum(), inputs, **options)


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2)])
def test_one_small_clip_goes_through_onednn_with_the_same_values_and_gradients(stride, monkeypatch):
    """One clip of 8 * 7 * 6 rows, padded, is below aten's limit of 20480; two clips, or 8 * 10 * 320 rows, stay with conv3d."""
    calls = []
    original = torch.ops.aten.mkldnn_convolution
    monkeypatch.setattr(torch.ops.aten, "mkldnn_convolution", lambda *args: calls.append(args[0].shape) or original(*args))
    torch.manual_seed(0)
    conv = CausalConv3d(8, 4, stride=stride)
    small = torch.randn(1, 8, 5, 6, 7, requires_grad=True)
    for x in (small, small.detach().repeat(2, 1, 1, 1, 1), torch.randn(1, 8, 8, 320, 3)):
        torch.testing.assert_close(conv(x), plain(conv, x))
    assert calls == [(1, 8, 7, 6, 7)]
    for ours, theirs in zip(
        gradients(conv(small), small, *conv.parameters()), gradients(plain(conv, small), small, *conv.parameters()), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # sums of 70 products, in another order


def test_small_clips_have_second_derivatives():
    """Those of a gradient penalty, against conv3d."""
    torch.manual_seed(0)
    conv, x = CausalConv3d(2, 3), torch.randn(1, 2, 3, 4, 4, requires_grad=True)
    penalties = [gradients(f(x), x, create_graph=True)[0].square().sum() for f in (conv, lambda x: plain(conv, x))]
    ours, theirs = (torch.autograd.grad(penalty, conv.weight)[0] for penalty in penalties)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_repeated_frames(causal):
    """Numerically in float64, and twice; one frame is the first and the last at once."""
    torch.manual_seed(0)
    conv = CausalConv3d(1, 2, causal=causal).double()
    for num_frames in (1, 3):
        x = torch.randn(2, 1, num_frames, 2, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(conv, x)
        assert torch.autograd.gradgradcheck(conv, x)
