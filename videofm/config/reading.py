"""The section about how clips are fetched and decoded: time limits, the local copy of remote shards, damaged clips."""

from __future__ import annotations

from videofm.config.base import Section, execution


class ReadingConfig(Section):
    """Fetching and decoding. Nothing here changes the order of samples or their pixels."""

    read_timeout: float = execution(
        30.0, gt=0, description="Longest wait for a store to connect or to send more, in seconds; then the request is repeated."
    )
    decode_timeout: float = execution(
        60.0,
        gt=0,
        description="Longest time for decoding one clip, in seconds; then its decoding process is killed, and after a second "
        "time another clip takes its place. Needs num_workers, as nothing can stop a decoder in the training process.",
    )
    clips_per_worker: int = execution(
        2000, ge=1, description="Clips after which a decoding process makes way for a fresh one, as decoders leak memory."
    )
    prefetch_mib: int = execution(
        512, ge=1, description="Frames that decoding processes may hold ready beyond the step at hand, per rank, in MiB."
    )
    cache_dir: str | None = execution(
        None,
        description="Folder on this node for copies of remote shards, shared by all ranks: for few nodes or several epochs, "
        "where a node reads most clips of a shard. null fetches clip by clip.",
    )
    cache_gib: float = execution(
        100.0, gt=0, description="Size of that folder, in GiB; the shards that were not used for longest make room for others."
    )
    max_replaced_share: float = execution(
        0.001,
        ge=0,
        le=1,
        description="Share of the clips read, by a rank and since it started, that may prove damaged before the run stops; "
        "three may in any case. Another clip takes the place of each.",
    )
