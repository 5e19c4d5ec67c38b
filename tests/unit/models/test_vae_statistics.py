"""The latent statistics file: round trip, and what it is refused for."""

import json

import pytest
import torch

from videofm import models
from videofm.errors import DataError
from videofm.models.vae.statistics import (
    STATISTICS_FILE,
    apply_statistics,
    read_statistics,
    weights_hash,
    write_statistics,
)


def measured(seed=0, **overrides):
    torch.manual_seed(seed)
    vae = models.build("vae/ltx", "tiny", **overrides)
    vae.set_latent_statistics(torch.randn(vae.latent_channels), torch.rand(vae.latent_channels) + 0.5)
    return vae


def twin(vae):
    """The same weights with the statistics that a fresh model has."""
    other = models.build("vae/ltx", "tiny")
    other.load_state_dict(vae.state_dict())
    other.latents_mean.zero_()
    other.latents_std.fill_(1)
    return other


def test_written_and_applied(tmp_path):
    """Decimal and back is bitwise: a float32 is exact in JSON's float64."""
    vae = measured()
    written = write_statistics(vae, tmp_path, num_clips=7)
    content = json.loads((tmp_path / STATISTICS_FILE).read_text())
    assert set(content) == {"mean", "std", "num_clips", "hash", "vae"}
    assert content["hash"] == written.hash == vae.latent_statistics.hash
    read = read_statistics(tmp_path / STATISTICS_FILE)
    assert (read.num_clips, read.vae_name, read.weights_hash) == (7, "vae/ltx", weights_hash(vae))
    fresh = twin(vae)
    apply_statistics(fresh, tmp_path)
    assert torch.equal(fresh.latents_mean, vae.latents_mean) and torch.equal(fresh.latents_std, vae.latents_std)


def test_the_hash_is_the_encoders():
    """It follows any of the encoder's tensors, and neither the decoder, nor the statistics, nor the dtype."""
    vae = measured()
    before = weights_hash(vae)
    same = twin(vae)
    with torch.no_grad():
        for parameter in same.decoder.parameters():
            parameter.add_(1)
    assert weights_hash(same) == weights_hash(same.bfloat16()) == before
    for name, parameter in vae.encoder.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1].add_(0.1)
        assert weights_hash(vae) != before, name
        with torch.no_grad():
            parameter.copy_(kept)
    assert weights_hash(vae) == before


@pytest.mark.parametrize("name", [name for name in models.names() if name.startswith("vae/")])
def test_every_vae_has_an_encoder_to_hash(name):
    torch.manual_seed(0)
    one, other = (models.build(name, "tiny") for _ in range(2))
    assert weights_hash(one) != weights_hash(other)
    other.load_state_dict(one.state_dict())
    assert weights_hash(one) == weights_hash(other)


def test_statistics_of_another_vae_are_refused(tmp_path):
    write_statistics(measured(), tmp_path, num_clips=1)
    with pytest.raises(DataError, match=r"measured on an encoder with weights [0-9a-f]{64}, but this one has [0-9a-f]{64}"):
        apply_statistics(measured(seed=1), tmp_path)
    with pytest.raises(DataError, match="measured on vae/ltx with 16 latent channels, but this is vae/ltx with 8"):
        apply_statistics(models.build("vae/ltx", "tiny", latent_channels=8), tmp_path)


def test_files_that_are_none(tmp_path):
    vae, file = measured(), tmp_path / STATISTICS_FILE
    with pytest.raises(DataError, match=r"latent_statistics\.json does not exist: measure"):
        apply_statistics(vae, file)
    with pytest.raises(DataError, match="were not measured"):
        write_statistics(models.build("vae/ltx", "tiny"), file, num_clips=3)
    with pytest.raises(DataError, match=r"num_clips 0\) were not measured"):
        write_statistics(vae, file, num_clips=0)
    write_statistics(vae, file, num_clips=3)
    good = json.loads(file.read_text())
    for bad in (good | {"vae": None}, good | {"mean": "no"}, good | {"mean": [[0.0]]}, [1], {"mean": [0.0]}):
        file.write_text(json.dumps(bad))
        with pytest.raises(DataError, match=r"is no latent statistics file .*; it needs hash, mean, num_clips, std, vae"):
            read_statistics(file)
    file.write_text("{")
    with pytest.raises(DataError, match="is no latent statistics file"):
        read_statistics(file)
    file.write_text(json.dumps(good | {"std": [2.0] * 16}))
    with pytest.raises(DataError, match=r"says hash [0-9a-f]{64}, but its numbers have .* it was edited"):
        read_statistics(file)
