"""Sections about making data: rendering the demo set, curating raw video."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from videofm.config.base import Section, execution
from videofm.config.curation_stages import CaptionConfig, DedupConfig, FilterConfig, ProbeConfig, SplitConfig, TranscodeConfig


class DemoDataConfig(Section):
    """Render a small captioned set of moving shapes as real H.264 files, with the broken files that curation must catch."""

    kind: Literal["demo_data"]
    num_videos: int = Field(192, ge=1, description="Ordinary source files to render; each holds several shots.")
    shots_per_video: int = Field(4, ge=1, description="Shots (one caption each) in a source file.")
    num_frames: int = Field(24, ge=2, description="Frames of a shot.")
    size: int = Field(32, ge=16, multiple_of=2, description="Height and width of the frames, in pixels.")
    fps: int = Field(25, ge=1, description="Frames a second.")
    broken: bool = Field(True, description="Also write static, black, duplicate, truncated and audio-only files.")
    seed: int = Field(0, description="The set is a function of this seed and the fields above.")


CurationStage = Annotated[
    ProbeConfig | DedupConfig | SplitConfig | FilterConfig | CaptionConfig | TranscodeConfig, Field(discriminator="kind")
]


class EngineConfig(Section):
    """How the Ray engine runs: workers, limits, retries."""

    num_workers: int | None = execution(None, ge=1, description="Tasks at once; null takes every CPU of the Ray cluster.")
    address: str | None = execution(None, description="Ray cluster to join; null starts one local node on loopback.")
    group_size: int = Field(32, ge=1, description="Sources of a group; a group becomes one shard.")
    task_memory_mib: int = execution(1024, ge=64, description="Memory that a child process may use, in MiB.")
    task_timeout: float = execution(120.0, gt=0, description="Longest time for one source in one stage, in seconds.")
    max_attempts: int = execution(2, ge=1, description="Crashes after which a source is quarantined.")
    object_store_mib: int = execution(128, ge=80, description="Shared memory of a local Ray node, in MiB (rows carry paths).")


class CurateConfig(Section):
    """Raw video files -> webdataset shards with an index and a manifest."""

    kind: Literal["curate"]
    source: str = Field(description="Folder that holds the raw videos; searched recursively.")
    stages: list[CurationStage] = Field(min_length=1, description="What each source passes through, in order.")
    held_out: float = Field(0.1, ge=0, lt=1, description="Share of the sources whose clips go to the split `held_out`.")
    engine: EngineConfig = Field(EngineConfig(), description="How the Ray engine runs.")
