"""What a job of Ray is asked to run, what its states mean, and manifests against the schemas of those who read them."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.job_submission import JobStatus

from launch import ray_jobs
from launch.config import load_cluster
from launch.ray_config import SETTINGS, RayConfig, RayRanksConfig
from launch.ray_jobs import RayLauncher, joining
from launch.submission import Job, Launch, Work, work_of
from videofm import cli
from videofm.errors import ConfigError, VideofmError

RECIPE = """
name: chain
run: RUN
source: clips
stages:
  curate: {kind: curate, source: '${source}', stages: [{kind: probe}, {kind: split}]}
  vae:
    kind: train
    models: {vae: {name: vae/ltx, size: tiny}}
    objective: {kind: autoencoder}
    optimizer: {lr: 1e-3}
    data: {manifest: '${stage.curate}', num_frames: 9, height: 32, width: 32, micro_batch_size: 2}
    trainer: {max_steps: 2}
"""
NODES = """
kind: ray
token_file: TOKEN
folder: /shared/my runs
nodes:
  name: movies
  num_nodes: 2
  cpus: 16
  gpus: 8
  memory_gib: 200
  shared: /shared/a$b
  image: registry.example.org/videofm:1
  claim: videos
  head: 10.0.0.1
  workers: [10.0.0.2, 10.0.0.3]
  ssh_user: me
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Work:
    path = tmp_path / "chain of stages.yaml"
    path.write_text(RECIPE.replace("RUN", str(tmp_path / "run")))
    return work_of(str(path), ["source=my 'c'; $(x)"])


@pytest.fixture
def launcher(tmp_path: Path) -> RayLauncher:
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("abc")
    path = tmp_path / "cluster.yaml"
    path.write_text(NODES.replace("TOKEN", str(token)))
    config = load_cluster(str(path), None, ["ranks.gpus=1", "ranks.cpus=2", "environment={A: 'x y'}", "stop_timeout=77"])
    assert isinstance(config, RayConfig)
    return RayLauncher(config)


def test_a_job_runs_the_verb_of_a_laptop(launcher: RayLauncher, recipe: Work) -> None:
    """In the shared folder; stages that would start a Ray node of their own join the cluster."""
    request = json.loads(launcher.render(recipe))
    command = shlex.split(request["entrypoint"])
    assert command[:8] == ["env", "-C", "/shared/my runs", "python", "-P", "-m", "videofm", "run"]
    assert command[8:10] == [recipe.verb[1], "source=my 'c'; $(x)"]
    assert command[10:] == ["stages.curate.engine.address=auto"]
    variables = request["runtime_env"]["env_vars"]
    assert {name: variables[name] for name in ("A", "VIDEOFM_RANKS", "RAY_JOB_STOP_WAIT_TIME_S")} == {
        "A": "x y", "VIDEOFM_RANKS": "ray", "RAY_JOB_STOP_WAIT_TIME_S": "77",
    }  # fmt: skip
    assert RayRanksConfig.model_validate_json(variables[SETTINGS]) == launcher.config.ranks
    assert "abc" not in json.dumps(request), "the token is nobody's business"


def test_a_shell_reads_the_command_as_it_was_meant(launcher: RayLauncher, recipe: Work, tmp_path: Path) -> None:
    """Ray hands it to a shell. What is odd in a value stays in the value."""
    echo = tmp_path / "echo args"
    echo.write_text('#!/bin/sh\nfor word in "$@"; do echo "[$word]"; done; echo "$PWD"')
    echo.chmod(0o755)
    config = launcher.config.model_copy(update={"python": str(echo), "folder": str(tmp_path)})
    command = json.loads(RayLauncher(config).render(recipe))["entrypoint"]
    found = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout.splitlines()
    words = ["-P", "-m", "videofm", *recipe.verb, "stages.curate.engine.address=auto"]
    assert found == [*(f"[{word}]" for word in words), str(tmp_path)]


def test_the_overrides_that_join_a_cluster_are_right(recipe: Work) -> None:
    """With them no stage is another one: none of these fields decides what comes out."""
    assert joining(recipe) == ["stages.curate.engine.address=auto"]
    joined = work_of(recipe.verb[1], [*recipe.verb[2:], *joining(recipe)])
    assert joining(joined) == []
    assert [stage.path for stage in joined.stages] == [stage.path for stage in recipe.stages]


class Server:
    """A job server that answers from a table."""

    def __init__(self, **jobs: Any) -> None:
        self.jobs, self.stopped = jobs, []

    def get_job_info(self, id: str) -> Any:
        if id not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {id} does not exist")
        status, code, message = self.jobs[id]
        return mock.Mock(status=JobStatus(status), driver_exit_code=code, message=message)

    def stop_job(self, id: str) -> None:
        self.stopped.append(id)


STATES = {
    "waits": ("PENDING", None, "no node has room"),
    "runs": ("RUNNING", None, ""),
    "done": ("SUCCEEDED", 0, ""),
    "stopped": ("STOPPED", None, ""),
    "saved": ("FAILED", 75, "exit code 75"),
    "wrong": ("FAILED", 2, "exit code 2"),
}


def launch_of(tmp_path: Path, *jobs: str) -> Launch:
    return Launch(tmp_path, "ray", tuple(Job(job, None) for job in jobs), ("run", "x.yaml"), "/")


def test_states_of_jobs(launcher: RayLauncher, tmp_path: Path) -> None:
    with mock.patch.object(ray_jobs, "JobSubmissionClient", return_value=Server(**STATES)):
        states = launcher.states(launch_of(tmp_path, *STATES, "unknown"))
    assert {state.job.id: (state.state, state.detail) for state in states} == {
        "waits": ("pending", "no node has room"),
        "runs": ("running", ""),
        "done": ("finished", ""),
        "stopped": ("cancelled", ""),
        "saved": ("interrupted", "exit code 75"),
        "wrong": ("failed", "exit code 2"),
        "unknown": ("failed", "the cluster does not know it; it was started anew since, or is another one"),
    }


def test_a_run_directory_has_one_job(launcher: RayLauncher, recipe: Work) -> None:
    """A second one would wait for the first one's lock, and then do its work again."""
    recipe.run.mkdir()
    for job, message in (
        ("runs", r"job runs \(running\) works for .* already: wait for it, or"),
        ("done", ""),
    ):
        launch_of(recipe.run, job).write()
        server = Server(**STATES)
        server.submit_job = mock.Mock(return_value="new")  # type: ignore[attr-defined]
        with mock.patch.object(ray_jobs, "JobSubmissionClient", return_value=server):
            if message:
                with pytest.raises(ConfigError, match=message):
                    launcher.submit(recipe)
            else:
                launcher.submit(recipe)
    launch = Launch.read(recipe.run)
    assert (launch.launcher, [job.id for job in launch.jobs], launch.folder) == ("ray", ["new"], "/shared/my runs")
    assert "environment" not in launch.cluster
    with pytest.raises(ConfigError, match="is finished with this config already; there is nothing to launch"):
        launcher.submit(dataclasses.replace(recipe, stages=()))


def test_stages_without_ranks_may_have_a_gpu(launcher: RayLauncher, recipe: Work) -> None:
    config = launcher.config.model_copy(update={"job_gpus": 1, "job_cpus": 3.0})
    request = json.loads(RayLauncher(config).render(recipe))
    assert (request["entrypoint_num_gpus"], request["entrypoint_num_cpus"]) == (1, 3.0)
    values = yaml.safe_load(RayLauncher(config).manifest("rayjob", recipe))
    jsonschema.validate(values, KUBERAY)
    assert (values["spec"]["entrypointNumGpus"], values["spec"]["entrypointNumCpus"]) == (1, 3.0)


def test_only_what_runs_is_cancelled(launcher: RayLauncher, tmp_path: Path) -> None:
    server = Server(**STATES)
    launch = launch_of(tmp_path, *STATES)
    with mock.patch.object(ray_jobs, "JobSubmissionClient", return_value=server):
        assert launcher.cancel(launch, now=False) == "waits, runs: saving, then stopping; killed after 77 s"
        assert server.stopped == ["waits", "runs"]
        with pytest.raises(ConfigError, match=r"no way to end a job without letting it save; .* it has .* 77 s"):
            launcher.cancel(launch, now=True)


def test_a_server_that_does_not_answer(launcher: RayLauncher, tmp_path: Path) -> None:
    url = "http://127.0.0.1:9"  # the port of `discard`, which nobody serves
    launcher.config = launcher.config.model_copy(update={"dashboard": url})
    with pytest.raises(VideofmError, match="no job server answers at http://127.0.0.1:9. .* a tunnel leads there: `ssh -L"):
        launcher.states(launch_of(tmp_path, "x"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Request failed with status code 401: Unauthorized", "it asks for a token and got none"),
        ("Request failed with status code 403: Forbidden", "the token is not that of the cluster (/token)"),
        ("Request failed with status code 500: No available agent to submit job", "another Ray of that machine may have the"),
        ("something else\nmore of it", "something else"),
    ],
)
def test_why_a_server_refuses(text: str, told: str) -> None:
    assert told in ray_jobs._reason(RuntimeError(text), {"RAY_AUTH_TOKEN_PATH": "/token"})


def test_where_no_token_is_meant_none_is_sent() -> None:
    """Else Ray, in a process that once had a cluster with a token, would send that one's to this server."""
    assert ray_jobs._headers({"RAY_AUTH_MODE": "disabled"}) == {"Authorization": ""}


def test_the_environment_of_ray_does_not_lead_elsewhere(launcher: RayLauncher, tmp_path: Path, monkeypatch) -> None:
    """RAY_ADDRESS would win over the URL that is given, and a token that lies about over the file of the cluster."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another cluster")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    seen: list[dict[str, str]] = []

    def client(url: str, headers: dict[str, str]) -> Server:
        seen.append({"url": url, **headers, **{name: value for name, value in os.environ.items() if name.startswith("RAY_A")}})
        return Server()

    with mock.patch.object(ray_jobs, "JobSubmissionClient", side_effect=client):
        launcher.states(launch_of(tmp_path))
    path = launcher.config.token_file
    expected = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": path, "Authorization": "Bearer abc"}
    assert seen == [{"url": "http://127.0.0.1:8265", **expected}]
    assert (os.environ["RAY_ADDRESS"], os.environ["RAY_AUTH_TOKEN"]) == ("http://127.0.0.1:1", "of another cluster")
    assert "RAY_AUTH_MODE" not in os.environ


# -- manifests

KUBERAY = json.loads((Path(__file__).parent / "kuberay_schema.json").read_text())
RAY_UP = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())


def changed(launcher: RayLauncher, **nodes: Any) -> RayLauncher:
    assert launcher.config.nodes is not None
    return RayLauncher(launcher.config.model_copy(update={"nodes": launcher.config.nodes.model_copy(update=nodes)}))


@pytest.mark.parametrize("nodes", [{}, {"image": None, "gpus": 0, "ssh_key": "~/.ssh/id"}])
def test_the_file_for_ray_up(launcher: RayLauncher, nodes: dict[str, Any]) -> None:
    """Valid for Ray's own schema, and for what Ray itself does with it before it starts machines."""
    text = changed(launcher, **nodes).manifest("ray_cluster")
    values = yaml.safe_load(text)
    jsonschema.validate(values, RAY_UP)
    validate_config(prepare_config(json.loads(json.dumps(values))))
    assert values["provider"] == {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}
    assert ("docker" in values, values["auth"].get("ssh_private_key")) == ((False, "~/.ssh/id") if nodes else (True, None))
    (head,), (worker,) = values["head_start_ray_commands"], values["worker_start_ray_commands"]
    for command in (head, worker):
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
        assert "RAY_AUTH_MODE=token" in command and "ray stop" not in command and "cd '/shared/a$b' &&" in command
    assert "--dashboard-host=127.0.0.1" in head and "--num-cpus=0" in head
    assert f"--num-cpus=16 --num-gpus={0 if nodes else 8}" in worker and "--address=$RAY_HEAD_IP:6379" in worker


@pytest.mark.parametrize("gpus", [0, 8])
def test_the_cluster_for_kubernetes(launcher: RayLauncher, gpus: int) -> None:
    values = yaml.safe_load(changed(launcher, gpus=gpus).manifest("raycluster"))
    jsonschema.validate(values, KUBERAY)
    spec = values["spec"]
    assert (values["kind"], spec["authOptions"], spec["rayVersion"]) == ("RayCluster", {"mode": "token"}, ray.__version__)
    (group,) = spec["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 2
    (container,) = group["template"]["spec"]["containers"]
    limits = {"cpu": "16", "memory": "200Gi", **({"nvidia.com/gpu": "8"} if gpus else {})}
    assert container["resources"] == {"requests": limits, "limits": limits}
    for part in (spec["headGroupSpec"]["template"]["spec"], group["template"]["spec"]):
        mounts = {mount["name"]: mount["mountPath"] for mount in part["containers"][0]["volumeMounts"]}
        assert mounts["shared"] == "/shared/a$b"
        assert mounts.keys() == {volume["name"] for volume in part["volumes"]}


def test_the_job_for_kubernetes(launcher: RayLauncher, recipe: Work) -> None:
    """The cluster of `raycluster`, and the very command of a submission, in the folder that nodes share."""
    values = yaml.safe_load(launcher.manifest("rayjob", recipe))
    jsonschema.validate(values, KUBERAY)
    cluster = yaml.safe_load(launcher.manifest("raycluster"))
    assert values["spec"]["rayClusterSpec"] == cluster["spec"] and values["kind"] == "RayJob"
    request = json.loads(launcher.render(recipe))
    command = values["spec"]["entrypoint"]
    assert command == request["entrypoint"].replace("'/shared/my runs'", "'/shared/a$b'")
    assert yaml.safe_load(values["spec"]["runtimeEnvYAML"]) == request["runtime_env"]


@pytest.mark.parametrize(
    ("part", "wrong"),
    [(("kind",), "RayService"), (("metadata", "name"), "A_b"), (("spec", "authOptions", "mode"), "none"), (("spec", "x"), 1)],
)
def test_the_schema_refuses_what_kuberay_does(launcher: RayLauncher, part: tuple[str, ...], wrong: Any) -> None:
    values = yaml.safe_load(launcher.manifest("raycluster"))
    inner = values
    for key in part[:-1]:
        inner = inner[key]
    inner[part[-1]] = wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, KUBERAY)


def test_a_manifest_that_says_too_little(launcher: RayLauncher) -> None:
    with pytest.raises(ConfigError, match="no manifest is called 'helm'; there are: ray_cluster, raycluster, rayjob"):
        launcher.manifest("helm")
    with pytest.raises(ConfigError, match="rayjob runs a config; name it: --config FILE"):
        launcher.manifest("rayjob")
    with pytest.raises(ConfigError, match="needs nodes.head, nodes.workers, nodes.ssh_user and token_file"):
        changed(launcher, head=None).manifest("ray_cluster")
    with pytest.raises(ConfigError, match=r"need nodes.image .* and nodes.claim .* holds /shared/a\$b"):
        changed(launcher, claim=None).manifest("raycluster")
    with pytest.raises(ConfigError, match="the cluster's file has no section `nodes`"):
        RayLauncher(RayConfig(kind="ray")).manifest("raycluster")


def test_the_verb_prints_manifests_and_requests(tmp_path: Path, recipe: Work, launcher: RayLauncher, capsys) -> None:
    cluster = str(tmp_path / "cluster.yaml")
    assert cli.main(["launch", "manifest", "rayjob", "--cluster", cluster, "--config", recipe.verb[1], "source=clips"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["kind"] == "RayJob"
    assert cli.main(["launch", "--cluster", cluster, recipe.verb[1], "source=clips", "cluster.ranks.cpus=4", "--dry-run"]) == 0
    request = json.loads(capsys.readouterr().out)
    assert json.loads(request["runtime_env"]["env_vars"][SETTINGS])["cpus"] == 4.0
    assert not (tmp_path / "run").exists(), "nothing was submitted"
