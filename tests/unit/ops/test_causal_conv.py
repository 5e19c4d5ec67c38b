"""Streaming equals the whole clip (spec E)."""

import pytest
import torch
from torch import nn

from videofm.errors import ConfigError
from videofm.ops.causal_conv import CausalConv3d


def stack(strides, channels=3):
    torch.manual_seed(0)
    return nn.ModuleList(CausalConv3d(channels, channels, stride=(s, 1, 1)) for s in strides).double()


def stream(convs, video, chunks, padded_each_time=False):
    caches, outputs = [None] * len(convs), []
    for x in video.split(chunks, dim=2):
        for i, conv in enumerate(convs):
            result = conv.stream(x, None if padded_each_time else caches[i])
            x, caches[i] = result.output, result.cache
        outputs.append(x)
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
    assert conv.stream(torch.randn(1, 3, 9, 4, 4, dtype=torch.float64), None).cache.shape[2] == kept


def test_a_causal_output_does_not_see_later_frames_and_a_centred_one_does():
    video = torch.randn(1, 3, 7, 4, 4)
    changed = video.clone()
    changed[:, :, 4:] += 1
    causal, centred = CausalConv3d(3, 2), CausalConv3d(3, 2, causal=False)
    assert torch.equal(causal(video)[:, :, :4], causal(changed)[:, :, :4])
    assert not torch.allclose(centred(video)[:, :, :4], centred(changed)[:, :, :4])


def test_forward_continues_from_a_cache():
    (conv,) = stack([1])
    video = torch.randn(1, 3, 6, 4, 4, dtype=torch.float64)
    cache = conv.stream(video[:, :, :4], None).cache
    torch.testing.assert_close(conv(video[:, :, 4:], cache), conv(video)[:, :, 4:])


def test_a_centred_convolution_cannot_stream():
    with pytest.raises(ConfigError, match="only a causal convolution can stream"):
        CausalConv3d(3, 3, causal=False).stream(torch.zeros(1, 3, 2, 4, 4), None)
