"""Verbs as jobs of a Ray cluster: submitted through the job server of its head, and the manifests of a cluster yet to be made.

A job runs on the head what runs on a laptop. What it needs of the cluster it asks for itself: ranks through `launch.ray_ranks`,
curation and encoders through `data_pipelines.engine`, all on the same cluster.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any

import ray
from pydantic import BaseModel
from ray.job_submission import JobSubmissionClient

from launch.ray_config import SETTINGS, RayConfig, RayNodesConfig, authentication
from launch.submission import Job, JobState, Launch, Work, check_idle, mark_cancelled
from videofm.errors import ConfigError, Interrupted, VideofmError
from videofm.progress import LOG
from videofm.run_dir import now

TEMPLATES = Path(__file__).parent / "templates"
MANIFESTS = ("ray_cluster", "raycluster", "rayjob")
"""What can be rendered: for `ray up`, and the two of KubeRay."""
TOKEN_ON_NODES = ".videofm-ray-token"
"""Where `ray up` puts the token on every node, in the home of its user."""
_STATES = {"PENDING": "pending", "RUNNING": "running", "SUCCEEDED": "finished", "STOPPED": "cancelled", "FAILED": "failed"}


class RayLauncher:
    """Jobs on the cluster that `config` describes; see `launch.submission.Launcher`."""

    def __init__(self, config: RayConfig) -> None:
        self.config = config

    def render(self, work: Work) -> str:
        """What `submit` would hand over, as JSON."""
        return json.dumps({"dashboard": self.config.dashboard, **self._request(work)}, indent=2)

    def submit(self, work: Work) -> Launch:
        """Hand `work` over and write `launch.json`.

        Raises:
            ConfigError: the job server may not be used, see `ray_config.authentication`; a job works there already, or there is
                nothing to do.
            VideofmError: it does not answer, or refuses.
        """
        if not work.stages:
            raise ConfigError(f"{work.run} is finished with this config already; there is nothing to launch")
        self._check_alone(work.run)
        on_gpus = [stage.name or stage.config.kind for stage in work.stages if stage.wants_gpu and not stage.trains]
        if on_gpus and not self.config.job_gpus:
            LOG.warning("%s: computed on CPUs, where the job runs; cluster.job_gpus=1 gives it a GPU", ", ".join(on_gpus))
        request = self._request(work)
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", work.name)[:80]
        with self._client() as client:
            id = client.submit_job(submission_id=f"videofm-{name}-{secrets.token_hex(4)}", **request)
        launch = Launch(
            run=work.run,
            launcher="ray",
            jobs=(Job(id, None),),
            verb=work.verb,
            folder=self._folder(),
            cluster=self.config.model_dump(mode="json", exclude={"environment"}),
            time=now(),
        )
        launch.write()
        return launch

    def states(self, launch: Launch) -> list[JobState]:
        """How its jobs are."""
        with self._client() as client:
            return [_state(client, job) for job in launch.jobs]

    def logs(self, launch: Launch, follow: bool = False) -> Iterator[str]:
        """What its jobs printed, piece by piece; with `follow` until they end."""
        with self._client() as client:
            for job in launch.jobs:
                if follow:
                    yield from _tail(client, job.id)
                else:
                    yield client.get_job_logs(job.id)

    def printed(self, launch: Launch, num_lines: int) -> Iterator[str]:
        """The last lines of what each of its jobs printed."""
        with self._client() as client:
            for job in launch.jobs:
                lines = client.get_job_logs(job.id).splitlines()
                yield "\n".join([f"==> Ray job {job.id} <==", *lines[-num_lines:]])

    def cancel(self, launch: Launch, now: bool) -> str:
        """End its jobs; they save first.

        Raises:
            ConfigError: it is to be `now`, which a job server cannot do.
        """
        if now:
            raise ConfigError(
                "Ray has no way to end a job without letting it save; cancel without --now: it has cluster.stop_timeout = "
                f"{self.config.stop_timeout} s (as launched), and is killed then"
            )
        mark_cancelled(launch)
        with self._client() as client:
            alive = [job.id for job in launch.jobs if _state(client, job).alive]
            for id in alive:
                client.stop_job(id)
        if not alive:
            return "no job of it runs"
        return f"{', '.join(alive)}: saving, then stopping; killed after {self.config.stop_timeout} s"

    def manifest(self, kind: str, work: Work | None = None) -> str:
        """A manifest of `MANIFESTS` for the cluster in `nodes`; `rayjob` runs `work` on it.

        Raises:
            ConfigError: there is no such manifest, or the cluster's file does not say enough.
        """
        if kind not in MANIFESTS:
            raise ConfigError(f"no manifest is called {kind!r}; there are: {', '.join(MANIFESTS)}")
        nodes = self.config.nodes
        if nodes is None:
            raise ConfigError(f"the manifest {kind} describes machines, and the cluster's file has no section `nodes`")
        if kind == "ray_cluster":
            return _fill(kind, _for_ray_up(self.config, nodes))
        if kind == "raycluster":
            return _fill(kind, _for_kubernetes(nodes))
        if work is None:
            raise ConfigError("the manifest rayjob runs a config; name it: --config FILE")
        request = self._request(work, nodes.shared)
        spec = _fill("raycluster", _for_kubernetes(nodes)).partition("\nspec:\n")[2]
        return _fill(
            kind,
            {
                "plain_name": nodes.name,
                "name": json.dumps(nodes.name),
                "entrypoint": json.dumps(request["entrypoint"]),
                "num_cpus": json.dumps(request["entrypoint_num_cpus"]),
                "num_gpus": json.dumps(request["entrypoint_num_gpus"]),
                "runtime_env": json.dumps(json.dumps(request["runtime_env"])),
                "cluster_spec": textwrap.indent(spec.rstrip("\n"), "  "),
            },
        )

    def _request(self, work: Work, folder: str | None = None) -> dict[str, Any]:
        """What a job is: its command, as one line for a shell, and its variables."""
        config = self.config
        verb = [*work.verb, *joining(work)]
        command = ["env", "-C", folder or self._folder(), config.python, "-P", "-m", "videofm", *verb]
        ours = {
            "VIDEOFM_RANKS": "ray",
            SETTINGS: config.ranks.model_dump_json(exclude_defaults=True),
            # Of the actor that watches over the job: how long it waits after SIGTERM.
            "RAY_JOB_STOP_WAIT_TIME_S": str(config.stop_timeout),
            "PYTHONUNBUFFERED": "1",
        }
        return {
            "entrypoint": shlex.join(command),
            "entrypoint_num_cpus": config.job_cpus,
            "entrypoint_num_gpus": config.job_gpus,
            "runtime_env": {"env_vars": {**config.environment, **ours}},
        }

    def _check_alone(self, run: Path) -> None:
        """Two verbs in one run directory would wait for each other."""
        if not (run / "launch.json").is_file():
            return
        launch = Launch.read(run)
        check_idle(launch, self.states(launch) if launch.launcher == "ray" else [])

    def _folder(self) -> str:
        return self.config.folder or os.getcwd()

    @contextmanager
    def _client(self) -> Iterator[JobSubmissionClient]:
        """A client of the job server, with what Ray reads of the environment set for as long.

        Raises:
            ConfigError: see `ray_config.authentication`.
            VideofmError: it does not answer, or refuses.
        """
        url, access = self.config.dashboard, authentication(self.config, os.environ)
        # These would win over the address that is given.
        with _environment(access, without=("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
            try:
                yield JobSubmissionClient(url, headers=_headers(access))
            except ConnectionError:
                raise VideofmError(
                    f"no job server answers at {url}. See that the head runs with its dashboard (pip install 'ray[default]'), "
                    "and where it is on the head's loopback, that a tunnel leads there: `ssh -L 8265:127.0.0.1:8265 HEAD`"
                ) from None
            except (RuntimeError, ray.exceptions.AuthenticationError) as error:
                raise VideofmError(f"the job server at {url} refused: {_reason(error, access)}") from None


def joining(work: Work) -> list[str]:
    """Overrides with which stages that would start a Ray node of their own join the cluster of the job."""
    found = []
    for stage in work.stages:
        prefix = "" if stage.name is None else f"stages.{stage.name}."
        found += [f"{prefix}{key}=auto" for key in _addresses(stage.config)]
    return found


def _addresses(value: Any, key: str = "") -> Iterator[str]:
    """Dotted keys of the fields `address` below `value` that say null."""
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            inner = getattr(value, name)
            if name == "address" and inner is None:
                yield f"{key}address"
            yield from _addresses(inner, f"{key}{name}.")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _addresses(inner, f"{key}{index}.")
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _addresses(inner, f"{key}{name}.")


def _state(client: JobSubmissionClient, job: Job) -> JobState:
    try:
        found = client.get_job_info(job.id)
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        return JobState(job, "failed", "the cluster does not know it; it was started anew since, or is another one")
    state, code = _STATES[str(found.status.value)], found.driver_exit_code
    if code == Interrupted.exit_code:
        state = "interrupted"
    said = [f"exit code {code}"] if code else []
    if state == "pending" and found.message:
        said.append(found.message.splitlines()[0])
    return JobState(job, state, ", ".join(said))


def _tail(client: JobSubmissionClient, id: str) -> Iterator[str]:
    """`tail_job_logs`, for callers that are not asynchronous."""
    loop = asyncio.new_event_loop()
    pieces = client.tail_job_logs(id)
    try:
        while True:
            try:
                yield loop.run_until_complete(anext(pieces))
            except StopAsyncIteration:
                return
    finally:
        loop.run_until_complete(pieces.aclose())  # type: ignore[attr-defined]
        loop.close()


@contextmanager
def _environment(values: Mapping[str, str], without: tuple[str, ...]) -> Iterator[None]:
    """Variables of this process, for a while."""
    names = {*values, *without}
    before = {name: os.environ.get(name) for name in names}
    try:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(values)
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _headers(access: Mapping[str, str]) -> dict[str, str]:
    """The token, where there is one; an empty header where none is meant. By itself Ray would ask its environment only once a
    process, when it is imported, and would send the token of any other cluster that this process had."""
    if access["RAY_AUTH_MODE"] != "token":
        return {"Authorization": ""}
    path = access.get("RAY_AUTH_TOKEN_PATH")
    token = Path(path).read_text(encoding="utf-8").strip() if path is not None else access["RAY_AUTH_TOKEN"]
    return {"Authorization": f"Bearer {token}"}


def _reason(error: Exception, access: Mapping[str, str]) -> str:
    text = str(error).strip()
    if "Authentication required" in text or "401" in text[:60]:
        return "it asks for a token and got none; name its file in cluster.token_file"
    if "Authentication failed" in text or "403" in text[:60]:
        return f"the token is not that of the cluster ({access.get('RAY_AUTH_TOKEN_PATH', 'RAY_AUTH_TOKEN')})"
    if "No available agent" in text:
        return (
            "no agent of its nodes takes jobs. A head that has just started needs some seconds; where it stays so, another Ray "
            "of that machine may have the agent's port (see dashboard_agent.log of its session, and `ray start "
            "--dashboard-agent-listen-port`)"
        )
    return (text.splitlines() or [type(error).__name__])[0]


# -- manifests


def _fill(kind: str, values: Mapping[str, str]) -> str:
    return Template((TEMPLATES / f"{kind}.yaml").read_text(encoding="utf-8")).substitute(values)


def _for_ray_up(config: RayConfig, nodes: RayNodesConfig) -> dict[str, str]:
    """Values of `ray_cluster.yaml`: JSON, which is YAML too."""
    if nodes.head is None or not nodes.workers or nodes.ssh_user is None or config.token_file is None:
        raise ConfigError(
            "the manifest ray_cluster needs nodes.head, nodes.workers, nodes.ssh_user and token_file (a new token: `python -c "
            "'import secrets; print(secrets.token_hex(32))' > FILE; chmod 600 FILE`)"
        )
    before = (
        f'export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/{TOKEN_ON_NODES}" RAY_USAGE_STATS_ENABLED=0; '
        f"ulimit -c 0; cd {shlex.quote(nodes.shared)}"
    )
    head = "ray start --head --port=6379 --dashboard-host=127.0.0.1 --num-cpus=0"
    worker = f"ray start --address=$RAY_HEAD_IP:6379 --num-cpus={nodes.cpus} --num-gpus={nodes.gpus}"
    auth = {"ssh_user": nodes.ssh_user, **({"ssh_private_key": nodes.ssh_key} if nodes.ssh_key else {})}
    docker = {"image": nodes.image, "container_name": nodes.name, "run_options": [f"--volume={nodes.shared}:{nodes.shared}"]}
    return {
        "name": json.dumps(nodes.name),
        "head": json.dumps(nodes.head),
        "workers": json.dumps(nodes.workers),
        "auth": json.dumps(auth),
        "file_mounts": json.dumps({f"~/{TOKEN_ON_NODES}": config.token_file}),
        "docker": f"docker: {json.dumps(docker)}\n" if nodes.image else "",
        "head_start": json.dumps(f"{before} && {head} --autoscaling-config=~/ray_bootstrap_config.yaml"),
        "worker_start": json.dumps(f"{before} && {worker}"),
    }


def _for_kubernetes(nodes: RayNodesConfig) -> dict[str, str]:
    """Values of `raycluster.yaml`: JSON, which is YAML too."""
    if nodes.image is None or nodes.claim is None:
        raise ConfigError(
            "manifests for Kubernetes need nodes.image (a container with videofm and Ray) and nodes.claim (the volume claim "
            f"that holds {nodes.shared})"
        )
    gpus = {"nvidia.com/gpu": str(nodes.gpus)} if nodes.gpus else {}
    memory = f"{nodes.memory_gib}Gi"
    return {
        "plain_name": nodes.name,
        "name": json.dumps(nodes.name),
        "ray_version": json.dumps(ray.__version__),
        "image": json.dumps(nodes.image),
        "shared": json.dumps(nodes.shared),
        "claim": json.dumps(nodes.claim),
        "num_nodes": str(nodes.num_nodes),
        "requests": json.dumps({"cpu": str(nodes.cpus), "memory": memory, **gpus}),
        "limits": json.dumps({"cpu": str(nodes.cpus), "memory": memory, **gpus}),
        "shm": f"{max(1, nodes.memory_gib // 2)}Gi",
    }
