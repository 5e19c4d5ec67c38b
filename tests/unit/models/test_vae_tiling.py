"""Tiles: one is none, weights sum to 1, a local VAE does not notice them, streams are exact, seams are measured (F CV-8)."""

from dataclasses import dataclass, field

import pytest
import torch
from einops import reduce, repeat

from videofm import models
from videofm.errors import ConfigError, DataError
from videofm.models.vae.base import VideoVAE
from videofm.models.vae.tiling import Tiles, blend_weights, decode_tiled, encode_tiled, seam_error
from videofm.types import Compression, Posterior


@dataclass(frozen=True)
class LocalConfig:
    in_channels: int = 3
    latent_channels: int = 3
    compression: Compression = field(default_factory=lambda: Compression(4, 8, 8))
    scaling_factor: float = 1.0


class LocalVAE(VideoVAE):
    """Latents are the mean pixels of a cell (of frame 0 alone, then of 4 frames each), and decode to constant cells.

    It says that it looks ahead, so that time is tiled; `seen` holds the shapes that it got.
    """

    spec_name = "vae/local"
    encoder_causal = decoder_causal = False

    def __init__(self):
        super().__init__(LocalConfig())
        self.seen = []

    def _encode(self, video, cache=None):
        self.seen.append(tuple(video.shape[2:]))
        first, rest = video[:, :, :1], video[:, :, 1:]
        cells = [
            reduce(part, "b c (t s) (h i) (w j) -> b c t h w", "mean", s=s, i=8, j=8)
            for part, s in ((first, 1), (rest, 4))
            if part.shape[2]
        ]
        mean = torch.cat(cells, dim=2)
        return Posterior(mean, mean - 1)

    def _decode(self, latents, sigma, generator, cache=None):
        self.seen.append(tuple(latents.shape[2:]))
        return repeat(latents, "b c t h w -> b c (t s) (h i) (w j)", s=4, i=8, j=8)[:, :, 3:]


def tiny_ltx(**overrides):
    torch.manual_seed(0)
    model = models.build("vae/ltx", "tiny", **overrides).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim != 0 and parameter.abs().max() < 0.1:
                parameter.normal_(std=0.1)
    return model


def clip(*shape):
    return torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


SPACE = Tiles(32, 24, 16, 8)
BOTH = Tiles(32, 24, 16, 8, num_frames=9, overlap_frames=5)


@pytest.mark.parametrize("tiles", [Tiles(48, 48, 0, 0), Tiles(64, 64, 32, 32, num_frames=17)])
@torch.no_grad()
def test_one_tile_is_no_tiling(tiles):
    """Bitwise, whether the tile is just as large as the clip or larger."""
    vae, video = tiny_ltx(), clip(9, 48, 48)
    whole, tiled = vae.encode(video), encode_tiled(vae, video, tiles)
    assert torch.equal(tiled.mean, whole.mean)
    assert torch.equal(tiled.logvar, whole.logvar)
    assert torch.equal(decode_tiled(vae, whole.mean, tiles), vae.decode(whole.mean))


@pytest.mark.parametrize("from_zero", [False, True])
@pytest.mark.parametrize(
    "spans",
    [[(0, 9)], [(0, 4), (4, 8)], [(0, 5), (3, 8), (4, 9)], [(0, 8), (2, 10), (4, 12), (5, 13)], [(0, 17), (16, 33)]],
)
def test_weights_sum_to_one(spans, from_zero):
    """Also where three tiles or more meet; a position of one tile only has weight 1, and no weight is negative."""
    slices = [slice(*span) for span in spans]
    total, count = torch.zeros(2, spans[-1][1], dtype=torch.float64)
    weights = blend_weights(slices, from_zero)
    for span, weight in zip(slices, weights, strict=True):
        assert (weight >= 0).all()
        total[span] += weight
        count[span] += 1
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-15)
    assert (total[count == 1] == 1).all()


def test_weights_are_linear_ramps():
    """Three shared positions: 1/4, 1/2, 3/4, or from zero 0, 1/3, 2/3."""
    spans = [slice(0, 5), slice(2, 7)]
    first, second = blend_weights(spans)
    assert first.tolist() == [1, 1, 0.75, 0.5, 0.25]
    assert second.tolist() == [0.25, 0.5, 0.75, 1, 1]
    first, second = blend_weights(spans, from_zero=True)
    torch.testing.assert_close(second, torch.tensor([0, 1 / 3, 2 / 3, 1, 1], dtype=torch.float64))
    torch.testing.assert_close(first, torch.tensor([1, 1, 1, 2 / 3, 1 / 3], dtype=torch.float64))


@pytest.mark.parametrize("tiles", [SPACE, BOTH, Tiles(16, 16, 8, 0, num_frames=9), Tiles(40, 40, 32, 32, 17, 13)])
@pytest.mark.parametrize("shape", [(21, 56, 40), (13, 64, 24), (1, 40, 56)])
def test_a_local_vae_does_not_notice_tiles(tiles, shape):
    """Every tile gives the same values where tiles meet, so any weights that sum to 1 give the whole: corners are right, and
    the first latent frame of a later tile, which is of one frame instead of four, has no weight.
    """
    vae, video = LocalVAE().double(), clip(*shape).double()
    whole = vae.encode(video)
    vae.seen.clear()
    tiled = encode_tiled(vae, video, tiles)
    assert len(vae.seen) > 1
    assert all(t <= (tiles.num_frames or 21) and h <= tiles.height and w <= tiles.width for t, h, w in vae.seen)
    torch.testing.assert_close(tiled.mean, whole.mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(tiled.logvar, whole.logvar, rtol=0, atol=1e-14)
    torch.testing.assert_close(decode_tiled(vae, whole.mean, tiles), vae.decode(whole.mean), rtol=0, atol=1e-14)


def test_the_first_latent_frame_of_a_tile_would_be_noticed(monkeypatch):
    """The negative control: with ramps from above zero in time too, the local VAE's latents are wrong."""
    monkeypatch.setattr("videofm.models.vae.tiling.blend_weights", lambda spans, from_zero=False: blend_weights(spans))
    vae, video = LocalVAE(), clip(21, 40, 40)
    assert (encode_tiled(vae, video, BOTH).mean - vae.encode(video).mean).abs().max() > 1e-2


@pytest.mark.parametrize("num_frames", [5, 9, 13])
@torch.no_grad()
def test_time_is_streamed_exactly_where_it_is_causal(num_frames):
    """One tile in space: what is left of tiling is the stream, for chunks that divide the clip and that do not."""
    vae, video = tiny_ltx(decoder_causal=True), clip(21, 16, 16)
    tiles = Tiles(16, 16, 0, 0, num_frames)
    whole = vae.encode(video)
    torch.testing.assert_close(encode_tiled(vae, video, tiles).mean, whole.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(decode_tiled(vae, whole.mean, tiles), vae.decode(whole.mean), rtol=0, atol=1e-5)


@torch.no_grad()
def test_time_tiles_of_a_decoder_that_looks_ahead_are_not_exact_but_more_overlap_helps():
    """The negative control of the test above, on the decoder that is released; the encoder streams."""
    vae, video = tiny_ltx(), clip(33, 16, 16)
    short, long = (seam_error(vae, video, Tiles(16, 16, 0, 0, 17, overlap)) for overlap in (1, 9))
    assert short.latents.max == long.latents.max == 0
    assert short.latents.max_elsewhere < 1e-5
    assert short.video.mean > 1e-2
    assert long.video.mean < 0.7 * short.video.mean
    assert long.video.mean_elsewhere < 0.7 * short.video.mean_elsewhere


@torch.no_grad()
def test_seams_in_space_are_bounded():
    """On noise, on average: at most half of the spread of the values, and less away from seams. Blending beats a cut: without
    an overlap no position is shared, and what the edges lose is all in `elsewhere`.
    """
    vae, video = tiny_ltx(), clip(5, 64, 64)
    blended = seam_error(vae, video, Tiles(40, 40, 16, 16))
    for error in (blended.latents, blended.video):
        assert 0 < error.mean < 0.5 * error.scale
        assert error.mean_elsewhere < 0.6 * error.mean
        assert error.mean <= error.max
    cut = seam_error(vae, video, Tiles(32, 32, 0, 0))
    assert cut.video.max == cut.video.mean == 0
    assert cut.video.mean_elsewhere > blended.video.mean_elsewhere


def test_gradients_pass_through_tiles():
    """Training on tiles: the gradient of the local VAE's tiles is that of the whole."""
    vae, video = LocalVAE().double(), clip(13, 40, 40).double().requires_grad_()
    (tiled,) = torch.autograd.grad(decode_tiled(vae, encode_tiled(vae, video, BOTH).mean, BOTH).square().sum(), video)
    (whole,) = torch.autograd.grad(vae.decode(vae.encode(video).mean).square().sum(), video)
    torch.testing.assert_close(tiled, whole)


@torch.no_grad()
def test_injected_noise_and_sigma_reach_every_tile():
    overrides = {"timestep_conditioning": True, "inject_noise": (True, True, True), "decoder_causal": True}
    vae = tiny_ltx(**overrides)
    latents, sigma, tiles = torch.randn(1, 16, 4, 4, 4), torch.tensor([0.1]), Tiles(16, 16, 0, 0, 9)

    def decode(seed, sigma=sigma):
        return decode_tiled(vae, latents, tiles, sigma, torch.Generator().manual_seed(seed))

    assert torch.equal(decode(0), decode(0))
    assert not torch.equal(decode(0), decode(1))
    assert not torch.equal(decode(0), decode(0, torch.tensor([0.9])))
    corner = vae.decode(latents[..., :2, :2], sigma, torch.Generator().manual_seed(0))
    torch.testing.assert_close(decode(0)[..., :16, :16], corner, rtol=0, atol=1e-4)


def test_step_video_is_tiled_in_space_only():
    """It cuts time into chunks of 17 frames, 3 latent frames each."""
    vae = models.build("vae/step_video", "tiny").eval()
    c = vae.compression
    video = clip(17, 2 * c.height, 3 * c.width)
    with torch.no_grad():
        tiles = Tiles(2 * c.height, 2 * c.width, 0, c.width)
        posterior = encode_tiled(vae, video, tiles)
        assert posterior.mean.shape == vae.encode(video).mean.shape
        assert decode_tiled(vae, posterior.mean, tiles).shape == video.shape
    with pytest.raises(ConfigError, match=r"cuts time into chunks of 17 frames itself: leave num_frames out \(it is 17\)"):
        encode_tiled(vae, video, Tiles(c.height, c.width, 0, 0, num_frames=17))


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        (Tiles(36, 32, 0, 0), "a height of 36 and an overlap_height of 0 pixels; both must be multiples of 8"),
        (Tiles(32, 32, 0, 4), "a width of 32 and an overlap_width of 4 pixels; both must be multiples of 8"),
        (Tiles(0, 32, 0, 0), "a height of 0"),
        (Tiles(32, 32, 32, 0), "overlap_height is 32, but a tile has 32 pixels: give less than 32"),
        (Tiles(32, 32, 0, 0, 8), r"num_frames of a tile is 8; this VAE takes 1 \+ 4 \* n, at least 5"),
        (Tiles(32, 32, 0, 0, 1), "num_frames of a tile is 1"),
        (Tiles(32, 32, 0, 0, 9, 4), r"overlap_frames of a tile is 4; this VAE takes 1 \+ 4 \* n, at least 1"),
        (Tiles(32, 32, 0, 0, 9, 9), "overlap_frames is 9, but a tile has 9 frames: give at most 5"),
    ],
)
def test_tiles_that_do_not_fit(tiles, message):
    with pytest.raises(ConfigError, match=message):
        encode_tiled(LocalVAE(), clip(9, 64, 64), tiles)
    with pytest.raises(ConfigError, match=message):
        decode_tiled(LocalVAE(), torch.zeros(1, 3, 3, 8, 8), tiles)


def test_clips_that_do_not_fit():
    with pytest.raises(DataError, match="video has 8 frames"):
        encode_tiled(LocalVAE(), clip(8, 64, 64), BOTH)
    with pytest.raises(DataError, match="height of 60 pixels"):
        encode_tiled(LocalVAE(), clip(9, 60, 64), BOTH)
    with pytest.raises(DataError, match="latents have shape"):
        decode_tiled(LocalVAE(), torch.zeros(1, 4, 3, 8, 8), BOTH)
