"""What the engine refuses, and how stages become steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from data_pipelines import actors, engine
from data_pipelines.address import check_address
from data_pipelines.chunks import Chunking, cut
from data_pipelines.plan import config_hash, plan_steps, spans
from data_pipelines.reports import Summary, read_rows
from data_pipelines.rows import Row, SourceInfo
from data_pipelines.session import Session
from tests.unit.data_pipelines.tiny_groups import job
from videofm.config import CurateConfig
from videofm.config.curate import EngineConfig
from videofm.errors import ConfigError, DataError, TransientError
from videofm.run_dir import RunDirectory

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}
TRANSCODE = {"kind": "transcode", "height": 32, "width": 32, "fps": 25.0}


def config(*kinds, **engine):
    stages = [kind if isinstance(kind, dict) else {"kind": kind} for kind in kinds]
    return CurateConfig.model_validate({"kind": "curate", "source": "x", "stages": [*stages, TRANSCODE], "engine": engine})


@pytest.mark.parametrize("address", ["0.0.0.0:6379", "ray://0.0.0.0:10001", "[::]:6379"])
def test_an_address_of_all_interfaces_is_refused_even_with_a_token(address):
    with pytest.raises(ConfigError, match="stands for all interfaces of a machine; name the one address of the head"):
        check_address(address, TOKEN)


@pytest.mark.parametrize("address", ["8.8.8.8:6379", "ray://[2606:4700::1111]:10001", "head.example.com:6379"])
def test_a_public_address_needs_a_token(address, tmp_path):
    half = [{}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_TOKEN": "x"}]
    half.append({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "absent")})
    for environment in half:
        with pytest.raises(ConfigError, match="is not known to be private.*RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"):
            check_address(address, environment)
    check_address(address, TOKEN)
    (tmp_path / "token").write_text("x")
    check_address(address, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")})


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:6379", "10.1.2.3:6379", "ray://192.168.0.9:10001", "localhost:6379"])
def test_a_private_address_needs_none(address):
    check_address(address, {})


def test_local_is_no_address():
    with pytest.raises(ConfigError, match="engine.address local names no cluster; leave engine.address null"):
        check_address("local", TOKEN)


def test_a_local_node_is_not_the_cluster_of_the_environment(monkeypatch):
    """Without an address Ray would join the one in RAY_ADDRESS."""
    given = {}
    for name, value in {"is_initialized": lambda: False, "shutdown": lambda: None}.items():
        monkeypatch.setattr(engine.ray, name, value)
    monkeypatch.setattr(engine.ray, "init", lambda **options: given.update(options))
    monkeypatch.setenv("RAY_ADDRESS", "10.9.8.7:6379")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with engine.cluster(EngineConfig(num_workers=1)):
        assert (given["address"], given["_node_ip_address"], given["include_dashboard"]) == ("local", engine.LOOPBACK, False)


def test_auto_is_what_the_environment_says():
    with pytest.raises(ConfigError, match="8.8.4.4:6379 is not known to be private"):
        check_address("auto", {"RAY_ADDRESS": "8.8.4.4:6379"})


def test_stages_become_steps():
    found = plan_steps(config("probe", "dedup", "split", "scores", "near_dup", "caption"))
    assert [(step.kind, step.label, step.pack) for step in found] == [
        ("child", "probe", False), ("barrier", "dedup", False), ("child", "split+scores", False),
        ("barrier", "near_dup", False), ("child", "caption+transcode", True),
    ]  # fmt: skip


def test_long_sources_are_cut_once_they_are_measured_and_deduplicated():
    found = plan_steps(config("probe", "dedup", "split", chunk_seconds=60.0))
    assert [step.label for step in found] == ["probe", "dedup", "chunk", "split+transcode"]
    assert [step.label for step in plan_steps(config("probe", "split", chunk_seconds=60.0))] == [
        "probe",
        "chunk",
        "split+transcode",
    ]


def test_orders_that_cannot_work():
    with pytest.raises(ConfigError, match="'dedup' needs 'probe' before it; the order is dedup, transcode"):
        plan_steps(config("dedup"))
    with pytest.raises(ConfigError, match="'split' is named twice"):
        plan_steps(config("split", "split"))
    with pytest.raises(ConfigError, match="chunk_seconds needs the stage 'probe', which measures sources"):
        plan_steps(config("split", chunk_seconds=60.0))
    with pytest.raises(ConfigError, match="the last must be 'transcode'"):
        plan_steps(config("probe").model_copy(update={"stages": config("probe").stages[:1]}))


def test_what_decides_the_content_decides_the_config_hash():
    """Workers, limits and retries do not; stages, grouping, splits and chunks do."""
    same = config("probe")
    assert config_hash(same) == config_hash(config("probe", num_workers=7, task_timeout=1.0, batch_mib=3))
    others = [config("probe", "split"), config("probe", group_size=9), config("probe", chunk_seconds=9.0)]
    others.append(same.model_copy(update={"held_out": 0.3}))
    assert len({config_hash(other) for other in (same, *others)}) == 5


def test_spans_cover_a_source_once():
    assert spans(60.0, 60.0) == [None]
    found = spans(150.0, 60.0)
    assert [start for start, _ in found] == [0.0, 50.0, 100.0] and found[0][1] == 50.0 and found[1][1] == 100.0
    assert found[2][1] > 150.0  # a header may tell a little less than there is


def test_long_sources_become_groups_of_their_own(tmp_path):
    """Of a short, a long and a longer source: the first spans stay, the later ones are parts; keys ascend and are unique."""
    seconds = {"a": 10.0, "b": 100.0, "c": 130.0}
    rows = []
    for number, (name, duration) in enumerate(seconds.items()):
        info = SourceInfo("s", "p", "mp4", "h264", 1, 25.0, 32, 32, duration)
        rows.append(Row(f"{number:024d}", name, f"/videos/{name}", 1, info=info))
    job(tmp_path, rows)  # writes the sources
    cut(Chunking(str(tmp_path / "out"), 0, "c", 50.0, ["00000"], ["i"]))
    summary = Summary.load(tmp_path / "out", 0, "00000")
    assert [(part.group, part.num_rows) for part in summary.parts] == [("00000", 3), ("00000-0001", 2), ("00000-0002", 1)]
    found = [row for part in summary.parts for row in read_rows(tmp_path / "out", 1, part.group)]
    assert {row.name: sum(other.name == row.name for other in found) for row in found} == {"a": 1, "b": 2, "c": 3}
    assert {row.path for row in found} == {"/videos/a", "/videos/b", "/videos/c"}
    keys = [row.key for row in sorted(found, key=lambda row: (row.name, row.span or (0.0, 0.0)))]
    assert keys == sorted(set(keys)) and len(keys) == 6


def test_a_task_that_fits_on_no_node_is_refused(monkeypatch):
    """Ray would wait for ever."""
    nodes = [{"Alive": True, "Resources": {"memory": 2.0**30}}, {"Alive": False, "Resources": {"memory": 2.0**40}}]
    monkeypatch.setattr(engine.ray, "nodes", lambda: nodes)
    assert engine._task_memory(EngineConfig(task_memory_mib=1024)) == 2**30
    with pytest.raises(ConfigError, match="task_memory_mib is 1025, no node of the cluster has more than 1024 MiB for tasks"):
        engine._task_memory(EngineConfig(task_memory_mib=1025))


@pytest.mark.parametrize(
    ("has", "num_gpus", "warns"), [({"GPU": 8.0}, 0.0, True), ({"GPU": 8.0}, 0.5, False), ({}, 0.0, False)]
)
def test_gpus_that_actors_leave_idle_are_told(has, num_gpus, warns, monkeypatch, caplog):
    monkeypatch.setattr(engine.ray, "cluster_resources", lambda: {"CPU": 2.0, **has})
    monkeypatch.setattr(engine.LOG, "propagate", True)
    engine.check_actors("engine", 1, 1, num_gpus)
    assert ("engine: num_gpus is 0, so actors compute on CPUs, and the 8 GPUs" in caplog.text) == warns


def test_a_pool_that_the_cluster_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setattr(actors.ray, "cluster_resources", lambda: {"CPU": 2.0})
    section = {"num_actors": 3, "num_cpus": 1.0, "num_gpus": 0.0}
    with pytest.raises(
        ConfigError, match="stage x: 3 actors with 1 CPU each need 3, the cluster has 2; lower num_actors or num_cpu"
    ):
        actors.Pool(section, "x")
    with pytest.raises(ConfigError, match="1 actors with 1 GPU each need 1, the cluster has 0; lower num_actors or num_gpus"):
        actors.Pool({"num_actors": 1, "num_cpus": 1.0, "num_gpus": 1.0}, "x")


class FakeRay:
    """Runs a task when it is asked for; counts how many wait at once."""

    def __init__(self):
        self.most = 0

    def remote(self, **options):
        return lambda function: type("Task", (), {"remote": staticmethod(lambda *arguments: (function, arguments))})

    def cluster_resources(self):
        return {"CPU": 2.0}

    def nodes(self):
        return [{"Alive": True, "Resources": {"memory": 2.0**40}}]

    def wait(self, references, num_returns, timeout):
        self.most = max(self.most, len(references))
        return references[:1], references[1:]

    def get(self, reference):
        function, arguments = reference
        return function(*arguments)


def test_tasks_are_drawn_as_workers_become_free_and_transient_faults_are_told_last(monkeypatch):
    fake = FakeRay()
    for name in ("remote", "cluster_resources", "nodes", "wait", "get"):
        monkeypatch.setattr(engine.ray, name, getattr(fake, name))
    drawn = []

    def tasks():
        for number in range(9):
            drawn.append(number)
            yield number, (number,)

    def work(number):
        if number in (2, 5):
            raise TransientError(f"no answer for {number}")
        return number * number

    found = []

    def consume():
        for number, result in engine.run_tasks(work, tasks(), EngineConfig(), lambda: False):
            assert result == number * number and len(drawn) <= len(found) + 6
            found.append(number)

    with pytest.raises(TransientError, match="2 groups could not read their sources; the first: no answer for 2"):
        consume()
    assert sorted(found) == [0, 1, 3, 4, 6, 7, 8] and fake.most == 3
    stopped = engine.run_tasks(work, tasks(), EngineConfig(), lambda: len(found) > 6)
    assert list(stopped) == []


@pytest.mark.parametrize(("error", "kind"), [(DataError("a full disk"), DataError), (TypeError("a full disk"), TypeError)])
def test_a_task_that_fails_waits_for_those_that_run(monkeypatch, error, kind):
    """Killed ones would look as if their sources had killed them. Nothing more is begun, and the first failure is told."""
    fake = FakeRay()
    for name in ("remote", "cluster_resources", "nodes", "wait", "get"):
        monkeypatch.setattr(engine.ray, name, getattr(fake, name))
    worked, told = [], []

    def work(number):
        worked.append(number)
        if number in (1, 2):
            raise error if number == 1 else DataError("a later one")
        return number

    found = []

    def consume():
        tasks = ((number, (number,)) for number in range(9))
        for number, _ in engine.run_tasks(work, tasks, EngineConfig(), lambda: False, failed=lambda: told.append([*worked])):
            found.append(number)

    with pytest.raises(kind, match="a full disk"):
        consume()
    assert found == [0, 3] and worked == [0, 1, 2, 3] and told == [[0, 1]]


def test_a_failure_asks_the_other_groups_to_end_early(tmp_path, monkeypatch):
    """Also where the request cannot be written: the failure may be a full disk."""
    run = RunDirectory(tmp_path)
    section = config("probe")
    session = Session(section, run, plan_steps(section), "hash")
    monkeypatch.setattr(session, "_start", lambda: None)

    def fails(*arguments, failed, **options):
        failed()
        raise DataError("a full disk")

    monkeypatch.setattr(engine, "run_tasks", fails)
    with pytest.raises(DataError, match="a full disk"):
        session._map(fails, [])
    assert run.stop_requested
    run.start_attempt()
    assert not run.stop_requested
    monkeypatch.setattr(RunDirectory, "request_stop", lambda self: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(DataError, match="a full disk"):
        session._map(fails, [])


@pytest.mark.parametrize("path", ["data/local.yaml", "real_clips.yaml"])
def test_no_limit_of_the_recipes_depends_on_the_length_of_a_video(path):
    """A stage has twice the length of what it works on, whatever a source lasts."""
    value = yaml.safe_load((Path(__file__).parents[3] / "configs" / path).read_text())
    section = value["stages"]["curate"] if "name" in value else value
    found = CurateConfig.model_validate({**section, "source": "videos"})
    assert [step.kind for step in plan_steps(found)][:3] == ["child", "barrier", "chunk"]
    assert found.engine.chunk_seconds is not None and found.engine.task_timeout >= 2 * found.engine.chunk_seconds
    assert EngineConfig().task_timeout == 600.0
