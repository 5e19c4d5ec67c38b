"""Who holds what of a clip, in one process; what several processes exchange is in `tests/distributed/test_vae_context.py`."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from videofm import models
from videofm.errors import ConfigError
from videofm.models.vae.parallelize import latent_spans, pixel_spans
from videofm.ops.causal_conv import ChunkCache
from videofm.ops.norm import GroupNorm
from videofm.parallel.halo import Span, scale_gradient, spans_of

VIDEO_VAES = ("vae/ltx", "vae/cv_vae", "vae/cv_vae_sd3", "vae/od_vae", "vae/step_video")


@pytest.mark.parametrize("degree", [2, 3, 4, 8])
@pytest.mark.parametrize("time", [1, 4, 8])
def test_latent_frames_are_shared_out_evenly_and_pixels_follow(degree, time):
    """Spans lie side by side and cover the clip. Pixel frames differ by one latent frame's at most, plus the first frame."""
    for num_latent_frames in range(1, 40):
        latents = latent_spans(num_latent_frames, degree)
        if num_latent_frames < degree:
            assert latents is None
            continue
        pixels = pixel_spans(latents, time)
        for spans, length in ((latents, num_latent_frames), (pixels, 1 + time * (num_latent_frames - 1))):
            assert (spans[0].start, spans[-1].stop, len(spans)) == (0, length, degree)
            assert all(a.stop == b.start for a, b in pairwise(spans))
        counts = [span.num_frames for span in pixels]
        assert min(counts) >= 1
        assert max(counts) - min(counts) <= (time - 1 if num_latent_frames == degree else time + 1)


def test_spans():
    assert spans_of([2, 0, 3]) == (Span(0, 2), Span(2, 2), Span(2, 5))
    assert Span(2, 6).overlap(Span(4, 9)) == Span(4, 6)
    assert Span(2, 4).overlap(Span(7, 9)).num_frames == 0
    assert list(range(10, 20))[Span(12, 15).within(Span(10, 20))] == [12, 13, 14]


def test_a_gradient_is_scaled_and_its_value_is_not():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = scale_gradient(x, 0.25)
    assert torch.equal(y, x)
    (y * y).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.5, -1.0]))  # 2 x / 4


@pytest.mark.parametrize("name", VIDEO_VAES)
def test_tensor_ranks_do_not_split_a_clip(name):
    model = models.build(name, size="tiny", device="meta")
    assert models.model_spec(name).parallelize(model, SimpleNamespace(context_degree=1, tensor_degree=2)).split is None


def test_a_stream_has_nothing_of_later_frames():
    x = torch.zeros(1, 4, 2, 3, 3)
    with pytest.raises(ConfigError, match="a norm over the clip needs all its frames, so it cannot stream"):
        GroupNorm(2, 4, scope="clip")(x, ChunkCache())
    layer = torch.nn.Identity()
    with pytest.raises(ConfigError, match="Identity looks at later frames, so it cannot stream"):
        ChunkCache().around(layer, x, 1, 1)
    with pytest.raises(ConfigError, match="Identity looks at all frames, so it cannot stream"):
        ChunkCache().whole(layer, x)


@pytest.mark.parametrize(("offset", "dtype", "atol"), [(0.0, torch.float64, 1e-12), (1000.0, torch.float32, 1e-3)])
def test_a_norm_over_the_clip_from_its_chunks(offset, dtype, atol):
    """Chunks of 1, 4 and 2 frames, with means far from zero too, where a difference of squares would lose all digits."""
    torch.manual_seed(0)
    norm, x = GroupNorm(2, 4, scope="clip").to(dtype), torch.randn(2, 4, 7, 3, 3, dtype=dtype) + offset
    torch.nn.init.normal_(norm.weight)
    chunks, statistics = x.split([1, 4, 2], dim=2), []

    class Collects(ChunkCache):
        def of_all_chunks(self, values):
            statistics.append(values)
            return torch.stack(statistics)

    class Knows(ChunkCache):
        def of_all_chunks(self, values):
            return torch.stack(statistics)

    for chunk in chunks:
        norm(chunk, Collects())
    parts = torch.cat([norm(chunk, Knows()) for chunk in chunks], dim=2)
    whole = norm.double()(x.double())
    torch.testing.assert_close(parts.double(), whole, rtol=0, atol=atol)
