"""The section of `videofm dpo import`: preferences that others have collected, and how their lists are read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from videofm.config.base import Section, execution
from videofm.config.curation_stages import TranscodeConfig


class VideoDPOFormat(Section):
    """VideoDPO: `metadata.json`, a list of clips, and `pair.json`, a list of {video1, video2, label, frame_caption}, whose
    videos are places in the first."""

    kind: Literal["videodpo"]
    metadata: str = Field("metadata.json", description="File of clips, in the source folder.")
    pairs: str = Field("pair.json", description="File of pairs, in the source folder.")


class VideoRewardFormat(Section):
    """VideoReward (VideoAlign): a CSV file, or a JSON-lines one, of prompt, path_A, path_B, and the better side by visual
    quality, motion and text: VQ, MQ, TA of A, B, same or tie."""

    kind: Literal["video_reward"]
    file: str = Field("data.csv", description="File of pairs, in the source folder; .csv, else JSON lines.")
    judged_by: Literal["majority", "Overall", "VQ", "MQ", "TA"] = Field(
        "majority", description="Column that says which video is the better one; or the side for which more of VQ, MQ, TA are."
    )


class FolderPairsFormat(Section):
    """Folders `NAME/w` and `NAME/l` of videos with the same names, and the prompt of all in `NAME.txt` or `NAME/prompt.txt`, or
    of each in `NAME/w/STEM.txt`."""

    kind: Literal["folder_pairs"]
    winners: str = Field("w", min_length=1, description="Folder of the better ones.")
    losers: str = Field("l", min_length=1, description="Folder of the worse ones.")


class ChosenRejectedFormat(Section):
    """Two folders of videos with the same names; the prompt of a pair is in the text file of that name, in the folder of the
    better ones, in the source folder, or in `prompts/`."""

    kind: Literal["chosen_rejected"]
    chosen: str = Field("chosen", min_length=1, description="Folder of the better ones.")
    rejected: str = Field("rejected", min_length=1, description="Folder of the worse ones.")


class JSONLFormat(Section):
    """JSON lines with prompt, chosen and rejected (paths of videos): as `videofm dpo export` writes them, and others do."""

    kind: Literal["jsonl"]
    file: str = Field("pairs.jsonl", description="File of pairs, in the source folder.")


PairFormat = Annotated[
    VideoDPOFormat | VideoRewardFormat | FolderPairsFormat | ChosenRejectedFormat | JSONLFormat, Field(discriminator="kind")
]


class ImportPairsConfig(Section):
    """Make a dataset of clips and preferences of ours out of preferences that others have collected."""

    kind: Literal["dpo_import"]
    source: str = Field(description="Folder with the list of pairs, or with the folders of videos.")
    format: PairFormat = Field(description="How pairs are written down.")
    videos: str | None = Field(
        None,
        description="Folder that paths of videos start at, and that none may leave; null is the source folder.",
    )
    generator: str = Field("", description="Name of what made the videos, where the pairs do not say.")
    transcode: TranscodeConfig | None = Field(
        None, description="Re-encode the videos to one size and rate; null stores the files as they are."
    )
    rarity_alpha: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Exponent of the weight of a pair by how rare its difference of scores is (VideoDPO), of pairs that have "
        "scores; it takes the place of weights that were read. 0 leaves weights alone.",
    )
    rarity_bins: int = Field(10, ge=1, description="Bins of the histogram of differences that rarity is read from.")
    on_bad: Literal["fail", "skip"] = Field(
        "fail",
        description="What to do with a bad record (a missing file, a video that does not decode, a pair of one video or of two "
        "shapes, votes that contradict): stop, or leave it out and count it.",
    )
    clips_a_shard: int = Field(500, ge=1, description="Clips of a shard.")
    num_workers: int = execution(1, ge=1, description="Processes that decode videos.")
    memory_mib: int = execution(1024, ge=64, description="Memory that decoding a video may use, in MiB.")
    timeout: float = execution(120.0, gt=0, description="Longest time for a video, in seconds.")


__all__ = [
    "ChosenRejectedFormat",
    "FolderPairsFormat",
    "ImportPairsConfig",
    "JSONLFormat",
    "PairFormat",
    "VideoDPOFormat",
    "VideoRewardFormat",
]
