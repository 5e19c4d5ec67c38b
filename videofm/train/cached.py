"""Training on what was encoded before: the cache is compared with the models of the run, at its start and now and then."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from videofm import registry
from videofm.config.cache import OnlineConfig
from videofm.config.encode import EncoderConfig, LatentsConfig, TextConfig, TokensConfig
from videofm.config.train import TrainConfig
from videofm.data.draws import Draw, PlanState
from videofm.data.encoded import ClipCache, EncodedClip
from videofm.data.encoded_loader import EncodedLoader, EncodedSource
from videofm.data.fixed import clip_request
from videofm.data.index import ClipRecord
from videofm.data.loader import StepLoader, reader_settings
from videofm.data.manifest import Manifest
from videofm.data.plan import DataPlan
from videofm.data.reader import BadClipError, ClipReader, video_tensor
from videofm.data.sidecar import differences
from videofm.errors import ConfigError, DataError
from videofm.parallel.mesh import Mesh
from videofm.progress import LOG
from videofm.train.build import Job
from videofm.train.encoders import LatentEncoder, TextEncoder, codebook_hash, identity
from videofm.train.token_encoder import TokenEncoder

ROLES = {"latents": "vae", "text": "text_encoder"}
"""Kind of sidecar -> the role of the model that made it; of tokens see `role_of`."""

_TOLERANCE = {"fp32": 0.02, "bf16": 0.05}
"""Largest distance of a stored tensor to a fresh one, over the norm of the fresh one. Kernels and decoders of two machines are
apart by less; a frame's offset or other weights are apart by far more."""

_TOKEN_TOLERANCE = {"fp32": 0.01, "bf16": 0.05}
"""Largest share of stored ids that are not the fresh ones, or one id of a small clip: a vector between two codes may fall to
either."""

_LIVE = EncoderConfig(path="a role of the training")


def open_cache(config: TrainConfig, models: Mapping[str, nn.Module]) -> ClipCache | None:
    """The cache of a training, or None where it has none; `models` are whole and as they were loaded.

    Raises:
        DataError: it is missing, or was made by other encoders than these; what differs is named.
    """
    if config.data.cache is None:
        return None
    cache = ClipCache(config.data)
    for kind in cache.kinds:
        role, live = role_of(kind, models), _live(kind, models)
        for header in cache.headers(kind):
            if changed := differences({name: header[name] for name in live}, live):
                roles = f"models.{role}{' with models.vae' * ('vae' in live)}"
                raise DataError(
                    f"the cached {kind} are stale: {roles} is not what encoded them; {'; '.join(changed)}. Load "
                    "the model that was meant, or run `videofm encode` with this one into a new run directory"
                )
            if role == "fine_tokenizer" and header["rollouts"] is None:
                raise DataError(
                    "objective.features.rollouts asks for what an AR model made of each clip, and the cached tokens have none; "
                    "run `videofm encode` with tokens.rollouts into a new run directory"
                )
    return cache


def role_of(kind: str, models: Mapping[str, nn.Module]) -> str:
    """The role of the model that made sidecars of a kind. Where features guide a dit, the tokens that are read are those of an
    AR model's rollouts, which are of `fine_tokenizer`."""
    if kind == "tokens":
        return "fine_tokenizer" if "fine_tokenizer" in models else "tokenizer"
    return ROLES[kind]


def _live(kind: str, models: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What a header of a kind says of the models of this training: of tokens also of the VAE, where it is one of them."""
    model = models[role_of(kind, models)]
    found: dict[str, Any] = {"encoder": identity(model)}
    if kind == "tokens":
        found = {"codebook": codebook_hash(model), **found}
        if "vae" in models:
            found["vae"] = identity(models["vae"])
    return found


def open_loader(config: TrainConfig, mesh: Mesh, models: Mapping[str, nn.Module], quarantine: Path | None = None) -> StepLoader:
    """The loader of a training: with the cache that it reads, once that has proven to be of these models and these clips.
    `quarantine` is the file of clips that cannot be read.

    Raises:
        DataError: the dataset cannot be used, or the cache is missing or stale.
    """
    if config.data.online is not None:
        pool = open_pool(config, config.data.online, models)
        return EncodedLoader(config.data, config.seed, pool, mesh.data_rank, mesh.data_degree, quarantine=quarantine)
    cache = open_cache(config, models)
    if cache is None:
        return StepLoader(config.data, config.seed, mesh.data_rank, mesh.data_degree, quarantine)
    loader = EncodedLoader(config.data, config.seed, cache, mesh.data_rank, mesh.data_degree, quarantine=quarantine)
    shards = {}
    for name, source in loader.plan.sources.items():
        table = cast(Manifest, source.dataset).table
        shards[name or config.data.sources[0].name] = list(
            zip(table["group"].to_pylist(), table["sha256"].to_pylist(), strict=True)
        )
    cache.check(shards)
    return loader


def open_pool(config: TrainConfig, online: OnlineConfig, models: Mapping[str, nn.Module]) -> EncodedSource:
    """The pool of encoders of one data rank; its actors start when the first micro-batch is asked for.

    Raises:
        ConfigError: a role has no weights that another process could load.
    """
    sections: dict[str, Any] = {}
    for kind, role in ROLES.items():
        chosen = config.models[role].model_dump(include=set(EncoderConfig.model_fields))
        try:
            encoder = EncoderConfig.model_validate(chosen)
        except ValidationError as error:
            raise ConfigError(f"data.online: models.{role} cannot be loaded by an actor: {error.errors()[0]['msg']}") from None
        if kind == "latents":
            sections[kind] = LatentsConfig(vae=encoder, dtype="fp32", precision=online.precision)
        else:
            sections[kind] = TextConfig(encoder=encoder, dtype="fp32", precision=online.precision)
    identities = {kind: identity(models[role]) for kind, role in ROLES.items()}
    pool: EncodedSource = registry.lookup(registry.ENCODER_POOLS, "online", "pool")(
        online, sections, identities, config.data.decoder, config.data.reading
    )
    return pool


class OnlineCounts:
    """`online_produced`, `online_consumed` (micro-batches of this rank) and `online_deaths`, in the metrics of each step."""

    def __init__(self, job: Job) -> None:
        assert isinstance(job.loader, EncodedLoader)
        self._pool: Any = job.loader.source

    def after_step(self, job: Job, position: PlanState, metrics: dict[str, float]) -> None:
        """Add the counts."""
        metrics |= self._pool.metrics()

    def after_training(self, job: Job, position: PlanState) -> None:
        """Let the actors go."""
        self._pool.close()


class SpotCheck:
    """Encodes a cached clip again, now and then, and compares: one in about `data.cache.spot_check_every`.

    Tokens are made again where the training has the VAE (role `vae`). Where it has none, as that of an AR model, nothing is
    loaded for them: tokenizer and codebook were compared by their hashes at the start, and ids are looked at whenever they are
    read.

    It is the first clip of a step over all ranks, and every rank does the same work, as ranks may share an encoder.
    """

    def __init__(self, job: Job) -> None:
        config, loader = job.config.data, job.loader
        assert config.cache is not None and isinstance(loader, EncodedLoader) and isinstance(loader.source, ClipCache)
        self.cache = loader.source
        self.every = max(1, int(config.cache.spot_check_every / config.mean_step_clips))

    def after_step(self, job: Job, position: PlanState, metrics: dict[str, float]) -> None:
        """Check a clip of the next step, where the count says so."""
        if position.step % self.every == 0:
            self.check(job, position)

    def after_training(self, job: Job, position: PlanState) -> None:
        """Nothing is left to check."""

    def check(self, job: Job, position: PlanState) -> None:
        """Encode the first clip of the step at `position`.

        Raises:
            DataError: what is stored of it is not what the models of the run make of it.
        """
        plan = job.loader.plan
        draw: Draw = next(plan.steps(position)).micro_batches[0][0]
        record = plan.record(draw)
        group = str(cast(Manifest, plan.sources[draw.source].dataset).table["group"][draw.shard].as_py())
        try:
            stored = self.cache.read(draw.source, group, record, draw)
            video = self._pixels(plan, record, draw, job.models)
        except BadClipError as error:  # of what is stored: whoever reads it in the step replaces it; no step needs the pixels
            LOG.warning("cache: %s is not checked: %s", record.key, error)
            return
        apart = compare(job.models, self.cache, draw.source, stored, video, record, job.mesh.device)
        for kind, (distance, allowed) in apart.items():
            if not distance <= allowed:
                role, whole = role_of(kind, job.models), "ids" if kind == "tokens" else "norm"
                raise DataError(
                    f"the cached {kind} of {record.key} are not what models.{role} makes of it now: they are apart by "
                    f"{distance:.3g} of their {whole}, at most {allowed:.3g} is allowed. "
                    "Another decoder or library may read other pixels; encode again on this machine, or find what changed"
                )
        if position.step == 0 and apart:
            LOG.info("cache: %s", ", ".join(f"{kind} apart by {distance:.2g}" for kind, (distance, _) in apart.items()))

    def _pixels(self, plan: DataPlan, record: ClipRecord, draw: Draw, models: Mapping[str, nn.Module]) -> Tensor:
        """`(1, 3, T, H, W)`; empty where nothing that is compared is made of pixels."""
        if not {"latents", "tokens"} & set(_compared(self.cache, models)):
            return torch.zeros(1, 3, 0, 0, 0)
        dataset = cast(Manifest, plan.sources[draw.source].dataset)
        frames = ClipReader(reader_settings(plan.config)).read(clip_request(dataset, draw.shard, record, draw))
        return video_tensor(frames[None])


def compare(
    models: Mapping[str, nn.Module],
    cache: ClipCache,
    source: str,
    stored: EncodedClip,
    video: Tensor,
    record: ClipRecord,
    device: torch.device,
) -> dict[str, tuple[float, float]]:
    """How far what is stored of a clip is from what the models make of it: kind -> distance (of tokens the share of ids that
    differ), and what is allowed.

    `video` is `(1, 3, T, H, W)`, empty where pixels are not in question; `record` is that of the clip.
    """
    found = {}
    for kind in _compared(cache, models):
        header, old = cache.header(source, kind), getattr(stored, kind) or {}
        fresh = _again(kind, header, models, video, record, device)
        low = "bf16" if "bf16" in (header["dtype"], header["precision"][:4]) else "fp32"
        if kind == "tokens":
            ids = fresh["indices"]
            found[kind] = _share(old["indices"], ids), max(_TOKEN_TOLERANCE[low], 1 / ids.numel())
        else:
            found[kind] = max(_distance(old[name], fresh[name]) for name in fresh), _TOLERANCE[low]
    return found


def _again(
    kind: str,
    header: Mapping[str, Any],
    models: Mapping[str, nn.Module],
    video: Tensor,
    record: ClipRecord,
    device: torch.device,
) -> dict[str, Tensor]:
    """What the models make of a clip now, as its sidecar would have it; of tokens without rollouts."""
    options = {name: header[name] for name in ("precision", "batch_size")}
    if kind == "text":
        text = TextConfig(encoder=_LIVE, dtype=header["dtype"], **options)
        return TextEncoder(models["text_encoder"], text, device).encode([record.caption])[0]
    tile, overlap = header["tiles"] or (None, 64)
    options |= {"vae": _LIVE, "tile": tile, "tile_overlap": overlap}
    if kind == "latents":
        latents = LatentsConfig(store=header["store"], dtype=header["dtype"], **options)
        return LatentEncoder(models["vae"], latents, device).encode(video, [record.sha256])[0]
    encoder = TokenEncoder(models[role_of(kind, models)], models["vae"], TokensConfig(tokenizer=_LIVE, **options), device)
    return encoder.encode(video, [record.sha256], [record.caption])[0]


def _compared(cache: ClipCache, models: Mapping[str, nn.Module]) -> list[str]:
    """The kinds that these models can make again."""
    return [kind for kind in cache.kinds if kind != "tokens" or "vae" in models]


def _distance(old: Tensor, new: Tensor) -> float:
    if old.shape != new.shape:
        return float("inf")
    return float((old.float() - new.float()).norm() / new.float().norm().clamp_min(1e-6))


def _share(old: Tensor, new: Tensor) -> float:
    """The share of ids that differ."""
    return float("inf") if old.shape != new.shape else float((old != new).float().mean())
