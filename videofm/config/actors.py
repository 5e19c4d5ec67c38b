"""The section about Ray actors that take a shard at a time."""

from __future__ import annotations

from videofm.config.base import Section, execution


class ActorsConfig(Section):
    """The Ray actors of a stage; a shard is the unit of work."""

    num_actors: int = execution(1, ge=1, description="Actors; what they write does not depend on how many there are.")
    num_gpus: float = execution(0.0, ge=0, description="GPUs of an actor; 0 computes on its CPUs.")
    num_cpus: int = execution(1, ge=1, description="CPUs of an actor, which are also its threads.")
    address: str | None = execution(None, description="Ray cluster to join; null starts one local node on loopback.")
    max_deaths: int = execution(2, ge=0, description="Actors that may die over one shard before the stage fails.")
