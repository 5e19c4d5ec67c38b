"""The section `faults`: what a training run does about hangs, divergence, slow ranks and ranks that die."""

from __future__ import annotations

from videofm.config.base import Section, execution


class DivergenceConfig(Section):
    """What happens when a loss or the norm of a gradient is not finite, or a norm is a spike (`optimizer.spike_factor`).

    The step is skipped by all ranks and nothing moves. More of them than `skip` within `window` steps, and the run goes back to
    the newest checkpoint that is healthy (no skip in the `window` steps before it), and never reads the data from `window`
    steps before the first of them up to the last; after `rollbacks` of these it fails.
    """

    skip: int = execution(10, ge=0, description="Steps skipped within `window` steps that are borne; one more rolls back.")
    rollbacks: int = execution(2, ge=0, description="Rollbacks of a run, counted over all of its attempts; one more fails it.")
    window: int = execution(100, ge=1, description="Steps over which skipped ones are counted, and left out before the first.")


class PreflightConfig(Section):
    """What is checked on every rank before training: device, network, clock, disk, versions, config, run directory."""

    enabled: bool = execution(True, description="Make these checks; they take less than a second, and some more on GPUs.")
    min_bandwidth: float | None = execution(
        None,
        gt=0,
        description="Least bandwidth of an all-reduce over all ranks, in GB/s that leave a rank; slower, and nothing is "
        "started. null only logs what is measured.",
    )
    max_clock_skew: float = execution(
        10.0,
        gt=0,
        description="Most seconds by which the clock of a node may be off that of rank 0, as far as it can be known.",
    )
    min_free_checkpoints: float = execution(
        2.0, ge=0, description="Room that the run directory must have, in checkpoints; 0 does not ask."
    )


class FaultsConfig(Section):
    """Hangs, divergence, slow ranks, and ranks that die."""

    hang_timeout: float = execution(
        480.0,
        gt=0,
        description="Seconds without a step (or a save, a callback, a step of sampling) after which the ranks write their "
        "stacks to attempts/NNNN/rank_R_stacks.txt and the attempt ends as `hung`. Longer than the longest of these takes, and "
        "shorter than parallel.timeout, which ends a wait for another rank without stacks.",
    )
    startup_timeout: float = execution(
        3600.0, gt=0, description="The same for the time before the first step is done: building, loading, compiling; seconds."
    )
    divergence: DivergenceConfig = execution(DivergenceConfig(), description="Steps that are skipped, and rolling back.")
    max_restarts: int = execution(
        3,
        ge=0,
        description="How often one `videofm train` starts its ranks again after one of them died or hung, from the newest "
        "checkpoint; two attempts in a row that reach no new step end it before. Rollbacks have a limit of their own.",
    )
    fewer_ranks: bool = execution(
        False,
        description="Where ranks are gone for good (their node is), go on with the largest smaller parallel.data_degree that "
        "fits the rest: the same batches, on fewer ranks.",
    )
    preflight: PreflightConfig = execution(PreflightConfig(), description="Checks before training starts.")
    straggler_share: float = execution(
        1.25, gt=1, description="Busy time of the slowest rank over the mean of all from which it counts as a straggler."
    )
    straggler_steps: int = execution(
        20, ge=1, description="Steps in a row for which one rank is a straggler before the log warns, with its host."
    )
