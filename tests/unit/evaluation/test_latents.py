"""Latent diagnostics against closed forms of planted posteriors (spec tokenizers-quantization 2e)."""

from __future__ import annotations

import json
import math

import pytest
import torch

from videofm.errors import DataError
from videofm.evaluation.latents import LatentDiagnostics, alarms
from videofm.types import Posterior


def gaussian(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def diagnose(mean: torch.Tensor, logvar: torch.Tensor | None = None, **options: object) -> dict:
    diagnostics = LatentDiagnostics(**options)  # type: ignore[arg-type]
    diagnostics.update(Posterior(mean, torch.full_like(mean, -4.0) if logvar is None else logvar))
    return diagnostics.result()


def whitened(num_positions: int, num_channels: int) -> torch.Tensor:
    """Random rows whose sample mean is 0 and sample covariance is the identity, exactly: QR of centred noise."""
    noise = gaussian((num_positions, num_channels))
    q, _ = torch.linalg.qr(noise - noise.mean(0))
    return q * num_positions**0.5


def as_latents(rows: torch.Tensor, num_frames: int = 5) -> torch.Tensor:
    """Rows `(positions, C)` as latents `(B, C, T, 4, 4)`."""
    return rows.reshape(-1, num_frames, 4, 4, rows.shape[1]).permute(0, 4, 1, 2, 3).contiguous()


def linear_vae(spectrum: torch.Tensor, noise: float, num_positions: int) -> Posterior:
    """The optimal linear VAE on Gaussian data with variances `spectrum` along its axes.

    With decoder noise eta^2 and KL weight beta, mode i with lambda > beta eta^2 = `noise` has posterior variance
    noise / lambda and a mean of variance 1 - noise / lambda; the others are the prior (mean 0, variance 1).
    """
    kept = spectrum > noise
    variance = torch.where(kept, noise / spectrum, torch.ones_like(spectrum))
    rows = whitened(num_positions, len(spectrum)) * (1 - variance).sqrt()
    logvar = variance.log().expand_as(rows)
    return Posterior(as_latents(rows), as_latents(logvar))


def test_a_planted_linear_vae() -> None:
    """The spectrum 4, 2, 1, .5, .25, .1 with beta eta^2 = .3 keeps four modes, with 1/2 log(lambda / .3) nats: 1.295, .949,
    .602, .255. The aggregated posterior is the prior, so the information is the sum of the KL, 3.101 nats."""
    spectrum = torch.tensor([4, 2, 1, 0.5, 0.25, 0.1], dtype=torch.float64)
    diagnostics = LatentDiagnostics()
    diagnostics.update(linear_vae(spectrum, 0.3, 4 * 5 * 16))
    result = diagnostics.result()
    expected = [0.5 * math.log(max(value, 0.3) / 0.3) for value in spectrum.tolist()]
    assert expected[:4] == pytest.approx([1.295, 0.949, 0.602, 0.255], abs=5e-4)
    assert result["kl"] == pytest.approx(expected, abs=1e-9)
    assert (result["num_active"], result["num_collapsed"]) == (4, 2)
    assert result["active_share"] == pytest.approx(4 / 6)
    assert result["kl_total"] == pytest.approx(sum(expected), abs=1e-9)
    assert result["mutual_information_bound"] == pytest.approx(sum(expected), abs=1e-9)
    assert (result["num_clips"], result["num_positions"], result["num_nonfinite_positions"]) == (4, 320, 0)


def test_a_posterior_that_ignores_its_input_has_no_information() -> None:
    """Every position the same N(2, 1/4): the KL is 1/2 (4 + 1/4 - 1 + log 4) = 2.318 nats a channel, none of it information."""
    mean = torch.full((2, 3, 2, 4, 4), 2.0)
    result = diagnose(mean, torch.full_like(mean, -math.log(4)))
    assert result["kl"] == pytest.approx([0.5 * (4 + 0.25 - 1 + math.log(4))] * 3)
    assert result["mutual_information_bound"] == pytest.approx(0, abs=1e-9)
    assert (result["num_active"], result["effective_rank"]) == (0, 0)
    assert result["kurtosis"] == [None] * 3 and result["first_frame_std_ratio"] is None


@pytest.mark.parametrize(
    ("spectrum", "rank"),
    [
        ([1.0] * 8, 8),
        ([1.0] * 3 + [0.0] * 5, 3),
        ([8.0, 4.0, 2.0, 2.0], 2**1.75),  # shares 1/2, 1/4, 1/8, 1/8 have 1.75 bits
    ],
)
def test_effective_rank_of_a_known_spectrum(spectrum: list[float], rank: float) -> None:
    """Channels are mixed by a rotation, which leaves the eigenvalues as they are."""
    scaled = whitened(320, len(spectrum)) * torch.tensor(spectrum, dtype=torch.float64).sqrt()
    rotation, _ = torch.linalg.qr(gaussian((len(spectrum), len(spectrum)), seed=1))
    assert diagnose(as_latents(scaled @ rotation + 3))["effective_rank"] == pytest.approx(rank, rel=1e-6)


def test_moments_of_a_channel() -> None:
    """Kurtosis is 3 for a Gaussian (standard error sqrt(24 / n) = .014 for n = 122,880), 9/5 for a uniform law (the same over
    its grid of n points, to 1e-3), and 1 for a coin."""
    n = 24 * 5 * 1024
    grid = torch.linspace(-1, 1, n, dtype=torch.float64)
    coin = torch.arange(n, dtype=torch.float64) % 2 * 2 - 1
    rows = torch.stack([gaussian((n,)) * 5 + 20, grid, coin * 0.1 - 7], dim=1)
    result = diagnose(rows.reshape(24, 5, 32, 32, 3).permute(0, 4, 1, 2, 3))
    assert result["kurtosis"][0] == pytest.approx(3, abs=0.07)
    assert result["kurtosis"][1:] == pytest.approx([1.8, 1.0], abs=1e-3)
    assert result["mean"] == pytest.approx([20, 0, -7], abs=0.1)
    assert result["std"] == pytest.approx([5, 3**-0.5, 0.1], rel=1e-2)


def test_a_pass_in_pieces_is_the_pass() -> None:
    """In three batches of clips of two lengths, and by two processes that merge, against everything at once."""
    mean, logvar = gaussian((6, 4, 3, 2, 2)) + 1, gaussian((6, 4, 3, 2, 2), seed=1)
    image = gaussian((2, 4, 1, 2, 2), seed=2)
    whole, first, second = LatentDiagnostics(), LatentDiagnostics(), LatentDiagnostics()
    for part in (slice(0, 1), slice(1, 4)):
        first.update(Posterior(mean[part], logvar[part]))
    second.update(Posterior(image, image))
    second.update(Posterior(mean[4:], logvar[4:]))
    whole.update(Posterior(mean, logvar))
    whole.update(Posterior(image, image))
    size = {name: value.shape for name, value in first.sums.items()}
    first.merge(second)
    assert {name: value.shape for name, value in first.sums.items()} == size  # memory does not grow with clips
    merged, expected = first.result(), whole.result()
    for key, value in expected.items():
        assert merged[key] == pytest.approx(value, rel=1e-9), key
    assert json.loads(json.dumps(merged)) == merged


def test_statistics_over_time() -> None:
    """Frame t of the planted latents has exactly the std `scale[t]`, in every channel. Later frames 1, 1.1, 1.2, 1.3 lie on a
    line that rises by .3 over a mean of 1.15. Their pooled variance is the mean of squares, 1.335, and the first frame's 4."""
    scale = torch.tensor([2.0, 1.0, 1.1, 1.2, 1.3], dtype=torch.float64)
    frames = torch.stack([whitened(96, 3) * value for value in scale], dim=1)  # (96, 5, 3)
    mean = frames.reshape(6, 4, 4, 5, 3).permute(0, 4, 3, 1, 2)
    result = diagnose(mean)
    relative = torch.tensor(result["frame_std"], dtype=torch.float64)
    torch.testing.assert_close(relative / relative[0] * 2, scale)
    assert result["first_frame_std_ratio"] == pytest.approx(2 / 1.335**0.5)
    assert result["std_drift"] == pytest.approx(0.3 / 1.15)
    assert diagnose(mean[:, :, :1])["first_frame_std_ratio"] is None
    assert diagnose(mean[:, :, :2])["std_drift"] is None


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    mean = gaussian((2, 4, 2, 3, 3))
    broken = mean.clone()
    broken[0, 1, 0, 2, 2] = math.nan
    broken[1, 3, 1, 0, 0] = math.inf
    result = diagnose(broken)
    assert (result["num_nonfinite_positions"], result["num_positions"]) == (2, 34)
    assert all(math.isfinite(value) for value in result["mean"] + result["kl"])
    assert any("2 positions have latents that are NaN" in alarm for alarm in alarms(result))
    with pytest.raises(DataError, match="no finite latents to diagnose"):
        diagnose(torch.full((1, 2, 1, 1, 1), math.nan))


def test_clamped_log_variances() -> None:
    """3 of the 2 * 4 * 2 * 9 = 144 are at a bound: 2.1 %."""
    mean, logvar = gaussian((2, 4, 2, 3, 3)), torch.zeros(2, 4, 2, 3, 3, dtype=torch.float64)
    logvar[0, 0, 0, 0, :2], logvar[1, 3, 1, 2, 2] = -30.0, 20.0
    result = diagnose(mean, logvar)
    assert result["clamped_share"] == pytest.approx(3 / 144)
    assert any("2.1% of log-variances are at their bounds" in alarm for alarm in alarms(result))
    assert diagnose(mean, logvar, logvar_range=(-40.0, 30.0))["clamped_share"] == 0


def test_alarms() -> None:
    """Each planted fault rings its own alarm, and good latents ring none."""
    good = as_latents(whitened(640, 8))
    assert alarms(diagnose(good)) == []

    collapsed = good * torch.tensor([1.0] * 3 + [0.05] * 5).view(1, 8, 1, 1, 1)  # variance 0.0025
    assert any("3 of 8 channels are active" in alarm for alarm in alarms(diagnose(collapsed)))

    repeated = good[:, :1].expand_as(good)
    assert any("effective rank of the latents is 1.0 of 8" in alarm for alarm in alarms(diagnose(repeated)))

    loud = good.clone()
    loud[:, :, 0] *= 1.5
    ringing = alarms(diagnose(loud))
    assert len(ringing) == 1 and "the first latent frame is 1.5" in ringing[0]


def test_posteriors_that_do_not_fit() -> None:
    diagnostics = LatentDiagnostics()
    with pytest.raises(DataError, match=r"expected \(B, C, T, H, W\)"):
        diagnostics.update(Posterior(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3)))
    diagnostics.update(Posterior(torch.zeros(1, 4, 1, 3, 3), torch.zeros(1, 4, 1, 3, 3)))
    with pytest.raises(DataError, match="has 8 channels, those before had 4"):
        diagnostics.update(Posterior(torch.zeros(1, 8, 1, 3, 3), torch.zeros(1, 8, 1, 3, 3)))
    with pytest.raises(DataError, match="no batch was given"):
        LatentDiagnostics().result()
