"""Tokens of shards: what the tokenizer makes of the most likely latents, and how an AR model goes on from their beginnings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.encode.run import dry_run
from data_pipelines.encode.shard import ShardEncoder, data_config
from tests.demo_shards import write_demo_shards
from tests.unit.encoding import encode_config, save_ar_run, save_encoders, save_tokenizer, tokens_section
from videofm import models
from videofm.config.data import DataConfig
from videofm.data.decode import choose
from videofm.data.encoded import ClipCache, EncodedClip, batch_fields
from videofm.data.fixed import fixed_draw
from videofm.data.index import ClipRecord
from videofm.data.manifest import Manifest
from videofm.data.reader import video_tensor
from videofm.data.shards import read_clip
from videofm.data.sidecar import Sidecars
from videofm.errors import ConfigError, DataError
from videofm.parallel.rng import derive_seed
from videofm.sampling.autoregressive import TokenSampling, sample_tokens
from videofm.train.encoders import codebook_hash, identity

GROUPS = ("00000", "00001")
ROLLOUTS = {"keep_frames": 1, "temperature": 0.9, "top_k": 20, "top_p": 0.95, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Five clips in two shards, a VAE, a text encoder, a tokenizer and a run of an AR model; and a run that encoded tokens with
    rollouts."""
    folder = tmp_path_factory.mktemp("tokens")
    shards, encoders = write_demo_shards(folder / "shards", 5, 2, 11, 32, 0), save_encoders(folder)
    tokenizer = save_tokenizer(folder)
    ar_run = save_ar_run(folder, tokenizer, encoders["text_encoder"])
    found = {"folder": folder, "shards": shards, "encoders": encoders, "tokenizer": tokenizer, "ar_run": ar_run}
    found["run"] = encode(found, folder / "run", rollouts={"run": ar_run, **ROLLOUTS})
    return found


def config_of(shared: dict[str, Any], **changes: Any) -> Any:
    section = tokens_section(shared["encoders"], shared["tokenizer"], **changes)
    return encode_config(shared["shards"], shared["encoders"], latents=None, text=None, tokens=section)


def encode(shared: dict[str, Any], run: Path, **changes: Any) -> Path:
    encoder = ShardEncoder(config_of(shared, **changes), run, "cpu")
    for group in GROUPS:
        encoder.encode(group)
    return run


def data_of(shared: dict[str, Any], run: Path) -> DataConfig:
    return DataConfig.model_validate(
        data_config(config_of(shared)).model_dump() | {"cache": {"path": str(run), "mode": "tokens"}}
    )


def stored_in(shared: dict[str, Any], run: Path) -> dict[str, EncodedClip]:
    """What a run holds of each clip, as a training reads it."""
    data = data_of(shared, run)
    cache, dataset = ClipCache(data), Manifest.load(shared["shards"])
    found = {}
    for record in dataset.records():
        draw = fixed_draw(record, data, None)
        assert draw is not None
        found[record.key] = cache.read("", Path(record.shard).stem.removeprefix("shard-"), record, draw)
    return found


def direct(shared: dict[str, Any], record: ClipRecord) -> torch.Tensor:
    """Indices `(1, T', H', W')` by the models themselves, of frames that are decoded here."""
    vae, tokenizer = models.load(shared["encoders"]["vae"]), models.load(shared["tokenizer"])
    frames = choose("pyav").read(read_clip(str(shared["shards"]), record), range(9))
    with torch.no_grad():
        posterior: Any = vae.encode(video_tensor(frames[None]))  # type: ignore[operator]
        return tokenizer.encode(vae.normalize(posterior.mean))  # type: ignore[operator]


def tree(folder: Path) -> dict[str, str]:
    names = ("sidecars", "index", "manifest")
    files = [path for name in names for path in (folder / name).iterdir()] + list(folder.glob("header-*.json"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_tokens_are_those_of_the_most_likely_latents(shared: dict[str, Any]) -> None:
    stored = stored_in(shared, shared["run"])
    used = set()
    for record in Manifest.load(shared["shards"]).records():
        clip = stored[record.key]
        assert clip.tokens is not None and (clip.latents, clip.text) == (None, None)
        assert clip.tokens["indices"].dtype == clip.tokens["rollouts"].dtype == torch.int32
        assert torch.equal(clip.tokens["indices"].long(), direct(shared, record)[0])
        used |= set(clip.tokens["indices"].flatten().tolist())
    assert len(used) > 4  # not one id everywhere
    fields = batch_fields(list(stored.values()), None)
    assert fields.keys() == {"indices", "rollouts"} and fields["indices"].dtype == torch.int64
    assert fields["indices"].shape == fields["rollouts"].shape == (5, *direct(shared, record).shape[1:])


def test_rollouts_are_the_models_own_continuations_whatever_the_batch(shared: dict[str, Any], tmp_path: Path) -> None:
    """By hand, clip by clip, with guidance; and with batches of one clip, whose header alone differs."""
    text_encoder, ar = (models.load(shared["ar_run"], role=role) for role in ("text_encoder", "ar"))
    stored = stored_in(shared, shared["run"])
    single = stored_in(shared, encode(shared, tmp_path / "run", batch_size=1, rollouts={"run": shared["ar_run"], **ROLLOUTS}))
    settings = TokenSampling(temperature=0.9, top_k=20, top_p=0.95, guidance_scale=2.0)
    differ = 0
    for record in Manifest.load(shared["shards"]).records():
        clip = stored[record.key].tokens
        assert clip is not None
        indices = clip["indices"].long()[None]
        texts = [text_encoder.encode([caption]) for caption in (record.caption, "")]  # type: ignore[operator]
        seeds = [derive_seed("rollouts", record.sha256)]
        expected = sample_tokens(ar, *texts, tuple(indices.shape[1:]), seeds, settings, prefix=indices[:, :1])  # type: ignore[arg-type]
        assert torch.equal(clip["rollouts"].long(), expected[0])
        assert torch.equal(clip["rollouts"][:1], clip["indices"][:1])
        assert (single[record.key].tokens or {})["rollouts"].equal(clip["rollouts"])
        differ += int((clip["rollouts"] != clip["indices"]).sum())
    assert differ > 0  # a model that knows nothing does not find the truth


def test_a_second_run_writes_the_same_bytes_and_one_goes_on(shared: dict[str, Any], tmp_path: Path) -> None:
    whole = {"rollouts": {"run": shared["ar_run"], **ROLLOUTS}}
    assert tree(encode(shared, tmp_path / "again", **whole)) == tree(shared["run"])
    half = tmp_path / "half"
    ShardEncoder(config_of(shared, **whole), half, "cpu").encode("00001")
    assert tree(encode(shared, half, **whole)) == tree(shared["run"])


def test_the_header_says_what_made_them(shared: dict[str, Any]) -> None:
    header = json.loads((shared["run"] / "header-tokens.json").read_text())
    tokenizer: Any = models.load(shared["tokenizer"])
    assert header["encoder"] == json.loads(json.dumps(identity(tokenizer)))
    assert header["vae"]["weights"] == identity(models.load(shared["encoders"]["vae"]))["weights"]
    assert (header["codebook"], header["vocab_size"]) == (codebook_hash(tokenizer), tokenizer.vocab_size)
    rollouts = header["rollouts"]
    assert rollouts.pop("ar")["model"] == "ar/transformer" and rollouts.pop("text_encoder")["model"] == "text/t5"
    assert rollouts == ROLLOUTS
    assert header["geometry"]["num_frames"] == 9
    assert dry_run(config_of(shared)) == "tokens of clips of 9x32x32, 1 actors"


def test_a_caption_decides_rollouts_and_nothing_without_them(shared: dict[str, Any], tmp_path: Path) -> None:
    plain = encode(shared, tmp_path / "plain")
    record = Manifest.load(shared["shards"]).records()[0]
    other = dataclasses.replace(record, caption="another caption")
    for run, stale in ((plain, False), (shared["run"], True)):
        data = data_of(shared, run)
        draw = fixed_draw(record, data, None)
        assert draw is not None
        cache = ClipCache(data)
        assert (cache.read("", "00000", record, draw).tokens or {}).keys() == (
            {"indices", "rollouts"} if stale else {"indices"}
        )
        if stale:
            with pytest.raises(DataError, match=r"tokens of clip-00000 .* are stale: caption was .* now 'another caption'"):
                cache.read("", "00000", other, draw)
        else:
            cache.read("", "00000", other, draw)


def test_what_fits_no_model_is_refused(shared: dict[str, Any], tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            encode(shared, tmp_path / "run", **changes)

    other = save_tokenizer(tmp_path / "other", seed=1)
    rollouts = {"run": shared["ar_run"], "keep_frames": 1}
    refused(DataError, "trained on tokens of another tokenizer .*weights was", tokenizer={"path": other}, rollouts=rollouts)
    refused(ConfigError, r"keep_frames is 3, and these clips have 3 token frames", rollouts={**rollouts, "keep_frames": 3})
    books = {"kind": "rvq", "codebook_size": 16, "dim": 8, "num_levels": 2}
    several = save_tokenizer(tmp_path / "books", quantizer=books)
    refused(ConfigError, "has 2 codebooks, so a token is 2 numbers", tokenizer={"path": several})
    narrow = save_tokenizer(tmp_path / "narrow", latent_channels=4)
    refused(ConfigError, "takes latents of 4 channels, and the VAE's have 16", tokenizer={"path": narrow})
    encode(shared, tmp_path / "first")
    with pytest.raises(DataError, match=r"holds tokens of another encoder: .*codebook was '\w{12}', now '\w{12}'"):
        encode(shared, tmp_path / "first", tokenizer={"path": other})


def test_clips_that_do_not_decode_are_named_once(shared: dict[str, Any], tmp_path: Path) -> None:
    """With latents and tokens a clip is decoded for each, and is one failure."""
    shards = write_demo_shards(tmp_path / "shards", 3, 1, 11, 32, 0)
    bad = Manifest.load(shards).records()[1]
    with (shards / bad.shard).open("r+b") as file:
        file.seek(bad.offset + bad.size // 2)
        file.write(b"\0" * 64)
    section = tokens_section(shared["encoders"], shared["tokenizer"])
    config = encode_config(shards, shared["encoders"], tokens=section)
    report = ShardEncoder(config, tmp_path / "run", "cpu").encode("00000")
    assert report is not None and (report.num_clips, report.num_failed) == ({"latents": 2, "tokens": 2, "text": 3}, 1)
    assert set(Sidecars(str(tmp_path / "run"), "tokens").entry("00000").failed) == {bad.key}
