"""What a Ray cluster is, for a launch: `kind: ray` of the file of a cluster (`videofm launch --on ray --cluster FILE`).

The training YAML stays the same everywhere; what differs between places stands here. The part `ranks` travels with the job, in
`VIDEOFM_RAY`: the stage `train` reads it on the cluster when it starts its ranks.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator

from launch.variables import check_name, check_value
from videofm.config.base import Section
from videofm.errors import ConfigError

SETTINGS = "VIDEOFM_RAY"
"""Environment variable with the section `ranks` as JSON."""


class RayRanksConfig(Section):
    """How the ranks of a training are placed on a Ray cluster. Their number follows from `parallel`."""

    address: str = Field(
        "auto",
        min_length=1,
        description="Cluster to join, HOST:PORT of its head as nodes of the cluster see it; auto takes RAY_ADDRESS, which a "
        "job has, else the cluster of this machine.",
    )
    cpus: float = Field(1.0, gt=0, description="CPUs of a rank, its data workers included.")
    gpus: int | None = Field(
        None, ge=0, le=1, description="GPUs of a rank; null: 1 where trainer.device is not cpu and any node has GPUs."
    )
    resources: dict[str, float] = Field({}, description="Custom resources of a rank, name: amount, as nodes were started with.")
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK",
        description="Of the placement group: PACK fills node after node, SPREAD takes many, STRICT_PACK one node only, "
        "STRICT_SPREAD one node a rank.",
    )
    spare_cpus: float = Field(
        0.0,
        ge=0,
        description="CPUs of the cluster that ranks leave free, for tasks of curation or encoding that work at the same time.",
    )
    start_timeout: float = Field(
        600.0,
        gt=0,
        description="Seconds to wait until the cluster has room for all ranks; then the error says what is missing.",
    )


class RayNodesConfig(Section):
    """The machines of a cluster that is yet to be made; templates are filled from it, nothing else reads it."""

    name: str = Field(
        "videofm", pattern=r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$", description="Of the cluster; in Kubernetes, of the objects."
    )
    num_nodes: int = Field(ge=1, description="Nodes that compute, besides the head.")
    cpus: int = Field(ge=1, description="CPUs of a node.")
    gpus: int = Field(0, ge=0, description="GPUs of a node.")
    memory_gib: int = Field(ge=1, description="Memory of a node, in GiB.")
    shared: str = Field(
        pattern=r"^/[^\s:]*$", description="Folder with runs and data, at the same path on all nodes; jobs are started in it."
    )
    image: str | None = Field(None, description="Container with videofm and Ray; Kubernetes needs one.")
    claim: str | None = Field(None, description="Kubernetes: name of the volume claim (ReadWriteMany) that holds `shared`.")
    head: str | None = Field(None, description="`ray up`: address of the head.")
    workers: list[str] = Field([], description="`ray up`: addresses of the nodes, `num_nodes` of them.")
    ssh_user: str | None = Field(None, description="`ray up`: user on these machines.")
    ssh_key: str | None = Field(
        None, description="`ray up`: file with the private key; null: the one that ssh takes by itself."
    )

    @model_validator(mode="after")
    def _all_named(self) -> RayNodesConfig:
        if self.workers and len(self.workers) != self.num_nodes:
            raise ValueError(
                f"`workers` names {len(self.workers)} machines and `num_nodes` is {self.num_nodes}; they must agree"
            )
        return self


class RayConfig(Section):
    """A Ray cluster that runs, for jobs."""

    kind: Literal["ray"]
    dashboard: str = Field(
        "http://127.0.0.1:8265",
        description="URL of the head's job server. The default is that of this machine, or the end of a tunnel "
        "(`ssh -L 8265:127.0.0.1:8265 HEAD`).",
    )
    token_file: str | None = Field(
        None,
        description="File with the token of the cluster, readable by you alone; null: RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN "
        "where RAY_AUTH_MODE is token, else none, which only a dashboard on loopback may have.",
    )
    folder: str | None = Field(
        None,
        pattern=r"^/",
        description="Folder that the job starts in, where relative paths of its config begin; on all nodes, and shared. "
        "null: the current one.",
    )
    job_cpus: float = Field(
        0.0, ge=0, description="CPUs that the verb itself holds, for stages without ranks; 0 lets it run on a head without any."
    )
    job_gpus: int = Field(
        0, ge=0, description="GPUs that the verb itself holds, where stages sample or evaluate; ranks get the others."
    )
    python: str = Field("python", min_length=1, description="Python on the nodes that has videofm.")
    environment: dict[str, str] = Field(
        {}, description="Variables of the job. No secrets: whoever may look at the cluster sees them."
    )
    stop_timeout: int = Field(300, ge=1, description="Seconds that a job which is cancelled has to save, before Ray kills it.")
    ranks: RayRanksConfig = Field(RayRanksConfig(), description="Placing the ranks of a training.")
    nodes: RayNodesConfig | None = Field(None, description="For the templates of a cluster that is yet to be made.")

    @field_validator("environment")
    @classmethod
    def _not_ours(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            check_name(name, {"VIDEOFM_": "videofm"})
            if name.startswith("RAY_AUTH_"):
                raise ValueError(f"{name} would show the token to everybody; give `token_file`, or set it on the nodes")
            check_value(name, text, "whoever may look at the cluster sees the variables of its jobs", "set it on the nodes")
        return value


def rank_settings(environment: Mapping[str, str]) -> RayRanksConfig:
    """The section `ranks` of the job that this process belongs to; the defaults outside of one.

    Raises:
        ConfigError: `VIDEOFM_RAY` does not hold such a section.
    """
    text = environment.get(SETTINGS)
    if not text:
        return RayRanksConfig()
    try:
        return RayRanksConfig.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{SETTINGS} does not hold the section `ranks` of a Ray cluster as JSON: {where + ': ' if where else ''}"
            f"{first['msg']}. `videofm launch --on ray` sets it; unset it for the defaults."
        ) from None


def authentication(config: RayConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """What tells Ray, in so many words, whether there is a token and where: left to itself it takes whatever it finds.

    Raises:
        ConfigError: the dashboard can be reached by others and there is no token, the token would travel in the clear through
            a public network, or its file is missing or can be read by others.
    """
    found = _token(config, environment)
    check_dashboard(config.dashboard, bool(found))
    return {"RAY_AUTH_MODE": "token", **found} if found else {"RAY_AUTH_MODE": "disabled"}


def check_dashboard(url: str, has_token: bool) -> None:
    """Refuse a job server that strangers could use: whoever reaches one without a token runs code on the cluster.

    Raises:
        ConfigError: see `authentication`.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(f"dashboard {url!r} is no URL of a job server; write http://HOST:8265 or https://HOST")
    if parts.username or parts.password:
        raise ConfigError("dashboard holds a user or a password; leave it out and give the token in `token_file`")
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        ip = None
    if ip is not None and ip.is_unspecified:
        raise ConfigError(f"dashboard {url} stands for all interfaces of a machine; name the one address of the head")
    if host == "localhost" or (ip is not None and ip.is_loopback):
        return
    if not has_token:
        raise ConfigError(
            f"dashboard {url} is not on loopback and there is no token: whoever reaches it can run code on the cluster. Start "
            "the cluster with RAY_AUTH_MODE=token and name its `token_file`; or keep the dashboard on 127.0.0.1 and reach it "
            "through `ssh -L 8265:127.0.0.1:8265 HEAD`"
        )
    if parts.scheme == "http" and (ip is None or not ip.is_private):
        raise ConfigError(
            f"dashboard {url} is not known to be private, and http would send the token in the clear; use https, a private "
            "address, or a tunnel: `ssh -L 8265:127.0.0.1:8265 HEAD`"
        )


def _token(config: RayConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """The variable that holds the token, or the path of its file; nothing where there is none."""
    if config.token_file is not None:
        return {"RAY_AUTH_TOKEN_PATH": str(_checked(Path(config.token_file).expanduser()))}
    if environment.get("RAY_AUTH_MODE") != "token":
        return {}
    path = environment.get("RAY_AUTH_TOKEN_PATH")
    if path:
        return {"RAY_AUTH_TOKEN_PATH": str(_checked(Path(path)))}
    token = environment.get("RAY_AUTH_TOKEN")
    if token:
        return {"RAY_AUTH_TOKEN": token}
    raise ConfigError(
        "RAY_AUTH_MODE is token, but neither RAY_AUTH_TOKEN_PATH nor RAY_AUTH_TOKEN is set, so Ray would take whatever token "
        "lies in your home; name the `token_file` of the cluster"
    )


def _checked(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"token_file {path} is missing; copy the token of the cluster there (`chmod 600`)")
    if os.stat(path).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"token_file {path} can be read by other users of this machine: `chmod 600 {path}`")
    if not path.read_text(encoding="utf-8").strip():
        raise ConfigError(f"token_file {path} is empty; copy the token of the cluster there")
    return path.absolute()
