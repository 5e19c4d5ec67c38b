"""Sections about making data: rendering the demo set, curating raw video."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from videofm.config.base import Section, execution
from videofm.config.curation_models import BalanceConfig, CaptionModelConfig, ScoreModelConfig
from videofm.config.curation_stages import (
    BordersConfig,
    CaptionConfig,
    DedupConfig,
    FilterConfig,
    NearDupConfig,
    ProbeConfig,
    ScoresConfig,
    SplitConfig,
    TranscodeConfig,
    check_scores,
)


class DemoDataConfig(Section):
    """Render a small captioned set of moving shapes as real H.264 files, with the broken files that curation must catch."""

    kind: Literal["demo_data"]
    num_videos: int = Field(192, ge=1, description="Ordinary source files to render; each holds several shots.")
    shots_per_video: int = Field(4, ge=1, description="Shots (one caption each) in a source file.")
    num_frames: int = Field(24, ge=2, description="Frames of a shot.")
    size: int = Field(32, ge=16, multiple_of=2, description="Height and width of the frames, in pixels.")
    fps: int = Field(25, ge=1, description="Frames a second.")
    speed: list[Annotated[float, Field(gt=0)]] = Field(
        [0.8, 1.0],
        min_length=2,
        max_length=2,
        description="Lowest and highest speed of a shape, in pixels a frame at size 32; less where it would leave the frame.",
    )
    radius: float = Field(
        7 / 32, gt=0, le=0.4, description="Radius of a circle, and half the side of a square times 1.1, over the frame's side."
    )
    wrong_direction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the shots whose caption tells one of the three directions that are not shown, drawn for each: "
        "what preference tuning has to put right.",
    )
    broken: bool = Field(True, description="Also write static, black, duplicate, truncated and audio-only files.")
    seed: int = Field(0, description="The set is a function of this seed and the fields above.")

    @field_validator("speed")
    @classmethod
    def _ordered(cls, speed: list[float]) -> list[float]:
        if speed[0] > speed[1]:
            raise ValueError(f"speed is [lowest, highest], not {speed}")
        return speed


CurationStage = Annotated[
    ProbeConfig
    | DedupConfig
    | SplitConfig
    | BordersConfig
    | ScoresConfig
    | FilterConfig
    | NearDupConfig
    | CaptionConfig
    | TranscodeConfig
    | ScoreModelConfig
    | CaptionModelConfig
    | BalanceConfig,
    Field(discriminator="kind"),
]


class EngineConfig(Section):
    """How the Ray engine runs: workers, limits, retries."""

    num_workers: int | None = execution(None, ge=1, description="Tasks at once; null takes every CPU of the Ray cluster.")
    address: str | None = execution(
        None,
        description="Ray cluster to join; null starts one local node on loopback. A public one must ask for a token.",
    )
    group_size: int = Field(32, ge=1, description="Sources of a group, on average; a group becomes one shard.")
    chunk_seconds: float | None = Field(
        None,
        gt=0,
        description="Sources longer than this many seconds are worked on in pieces of at most this, each with a task_timeout "
        "of its own; null: never.",
    )
    task_memory_mib: int = execution(1024, ge=64, description="Memory that a child process may use, in MiB.")
    task_timeout: float = execution(
        600.0, gt=0, description="Longest time for one source, or piece of one (chunk_seconds), in one stage, in seconds."
    )
    fetch_timeout: float = execution(
        3600.0,
        gt=0,
        description="Longest time for the copy of one remote source to scratch, in seconds; then it is quarantined.",
    )
    max_attempts: int = execution(2, ge=1, description="Crashes after which a source is quarantined.")
    object_store_mib: int = execution(128, ge=80, description="Shared memory of a local Ray node, in MiB (rows carry paths).")
    batch_mib: int = execution(16, ge=1, description="Frames that are sent to a model at once, in MiB at most.")
    scratch: str | None = execution(None, description="Folder on every node for what is worked on; null: the system's.")
    scratch_free_mib: int = execution(256, ge=0, description="Free space on a scratch disk before work begins, in MiB.")
    scratch_wait: float = execution(600.0, ge=0, description="Seconds to wait for that space before the run fails.")


class CurateConfig(Section):
    """Raw video files -> webdataset shards with an index and a manifest."""

    kind: Literal["curate"]
    source: str = Field(
        description="Raw videos: a folder (local, or a file, http, https, s3 or gs URL), searched recursively; or a list of "
        "them: a .jsonl or .parquet file with the field `uri`, and where known source_id, bytes, sha256, caption."
    )
    output: str | None = execution(None, description="URL of a folder to which the finished dataset is copied; null: nowhere.")
    stages: list[CurationStage] = Field(min_length=1, description="What each source passes through, in order.")
    held_out: float = Field(0.1, ge=0, lt=1, description="Share of the sources whose clips go to the split `held_out`.")
    engine: EngineConfig = Field(EngineConfig(), description="How the Ray engine runs.")

    @model_validator(mode="after")
    def _scores_are_made(self) -> CurateConfig:
        check_scores(self.stages)
        return self
