"""Each thing that preflight can find, by reports that are made up; then the check of one process for real. Ranks that differ
for real are in tests/distributed/test_preflight.py."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.nfs import remember_absence
from videofm.config.train import TrainConfig
from videofm.errors import ConfigError, ParallelError
from videofm.parallel.health import ClockReading, DeviceHealth
from videofm.parallel.layout import MeshLayout
from videofm.parallel.mesh import Mesh
from videofm.run_dir import RunDirectory
from videofm.train import preflight as module
from videofm.train import preflight_rules as rules
from videofm.train import worker
from videofm.train.build import build_models, pick_device
from videofm.train.preflight import PreflightError, num_trained, preflight
from videofm.train.preflight_rules import Finding, JointReport, Needs, NodeReport, as_text, judge_nodes, judge_together

GIB = 2**30
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "code": "c0de"}
GPU = DeviceHealth("H100", "", 0, 78 * GIB, 80 * GIB, 0)


def nodes(count: int = 4) -> list[NodeReport]:
    """Two ranks a node, each with its own GPU, and nothing wrong."""
    return [
        NodeReport(rank, f"n{1 + rank // 2}", replace(GPU, identity=f"gpu{rank}"), VERSIONS, "config", "nonce", 100 * GIB)
        for rank in range(count)
    ]


def found(reports: Sequence[NodeReport], needs: Needs | None = None) -> list[Finding]:
    return judge_nodes(reports, "nonce", needs or Needs(disk=10 * GIB, memory=10 * GIB))


def told(findings: Sequence[Finding]) -> list[tuple[str, int, str, str]]:
    return [(one.name, one.rank, one.node, one.severity) for one in findings]


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert found(nodes()) == [] and found(nodes(1)) == []


@pytest.mark.parametrize(
    ("change", "name", "severity", "text"),
    [
        ({"versions": {**VERSIONS, "torch": "2.12.0"}}, "versions", "error", "torch 2.12.0; has to be: torch 2.13.0, as most"),
        ({"versions": {"python": "3.11.7", "torch": "2.13.0"}}, "versions", "error", "code absent; has to be: code c0de"),
        ({"versions": {**VERSIONS, "code": "beef"}}, "versions", "error", "Fix: give all nodes the same sources of videofm"),
        ({"config": "other"}, "config", "error", "digest other; has to be: digest config.*let nothing change config.yaml"),
        ({"nonce": None}, "run directory", "error", "no file; has to be: the file that rank 0 on n1 has just written"),
        ({"nonce": "old"}, "run directory", "error", "another file; .*a file system that all nodes share"),
        ({"device": replace(GPU, wrong_products=3)}, "device", "error", "3 wrong elements in a matrix product on H100"),
        ({"device": replace(GPU, uncorrected_errors=2)}, "device", "error", "2 uncorrected memory errors on H100.*exclude"),
        (
            {"device": replace(GPU, identity="gpu2")},
            "device",
            "error",
            "GPU gpu2, which rank 2 has; has to be: a GPU of its own",
        ),
        ({"device": replace(GPU, free_memory=5 * GIB)}, "memory", "error", "5.0 of 80.0 GiB free.*10.0 GiB for the weights"),
        (
            {"device": replace(GPU, free_memory=60 * GIB)},
            "memory",
            "warning",
            "60.0 of 80.0 GiB free on H100; has to be: 90% fr",
        ),
        ({"free_disk": GIB}, "disk", "error", "1.00 GiB free for the run; has to be: 10.00 GiB .*trainer.spare_checkpoints"),
        (
            {"problems": {"device": "RuntimeError: CUDA"}},
            "device",
            "error",
            "RuntimeError: CUDA; has to be: every check can be",
        ),
    ],
)
def test_each_finding_names_its_rank_and_node(change: dict[str, Any], name: str, severity: str, text: str) -> None:
    reports = nodes()
    reports[3] = replace(reports[3], **change)
    findings = found(reports)
    assert told(findings) == [(name, 3, "n2", severity)]
    assert as_text(findings).startswith(f"{name}: rank 3 (on n2): ")
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(as_text(findings))


def test_gpus_of_two_nodes_may_have_one_name() -> None:
    """Numbers that a virtual machine gives are its own."""
    reports = nodes()
    reports[3] = replace(reports[3], device=replace(GPU, identity="gpu0"))
    assert found(reports) == []


def test_most_ranks_are_right_and_of_two_halves_the_first() -> None:
    other = {**VERSIONS, "torch": "2.12.0"}
    reports = nodes(3)
    odd = [replace(reports[0], versions=other), *reports[1:]]
    assert told(found(odd)) == [("versions", 0, "n1", "error")]
    halves = [*nodes(2), *(replace(one, versions=other) for one in nodes()[2:])]
    assert told(found(halves)) == [("versions", 2, "n2", "error"), ("versions", 3, "n2", "error")]


def test_a_full_disk_is_a_warning_where_there_is_another() -> None:
    reports = [replace(nodes(1)[0], free_disk=GIB)]
    assert told(found(reports, Needs(10 * GIB, 0, spare=True))) == [("disk", 0, "n1", "warning")]


def test_what_could_not_be_measured_is_told_once() -> None:
    """Without versions, a nonce or a disk there is nothing else to say of them."""
    problems = {"versions": "x", "run directory": "y", "disk": "z"}
    broken = replace(nodes()[1], versions={}, nonce=None, free_disk=0, problems=problems)
    assert [one.name for one in found([nodes()[0], broken])] == ["versions", "run directory", "disk"]


def joint(count: int = 4, ahead: float = 0.0) -> list[JointReport]:
    """All within a tenth of a second; the clock of rank 2 is ahead."""
    reports = []
    for rank in range(count):
        start = 1000.0 + (ahead if rank == 2 else 0.0)
        reports.append(JointReport(rank, f"n{1 + rank // 2}", (), 2e9, ClockReading((start,), (start + 0.1,))))
    return reports


def test_nothing_is_found_among_ranks_that_agree() -> None:
    assert judge_together(joint(), 1.9, 0.0) == [] and judge_together(joint(ahead=10.05), None, 10.0) == []


@pytest.mark.parametrize(
    ("ahead", "words"), [(60.0, "at least 59.9 s ahead of that of rank 0 on n1"), (-60.0, "s behind that")]
)
def test_a_wrong_clock(ahead: float, words: str) -> None:
    findings = judge_together(joint(ahead=ahead), None, 10.0)
    assert told(findings) == [("clock", 2, "n2", "error")]
    assert words in as_text(findings) and "10 s at most (faults.preflight.max_clock_skew). Fix: set the clocks" in as_text(
        findings
    )


def test_a_slow_network_is_an_error_where_a_limit_is_set() -> None:
    reports = [replace(one, bandwidth=1e9) if one.rank == 1 else one for one in joint()]
    assert judge_together(reports, None, 10.0) == []
    findings = judge_together(reports, 1.5, 10.0)
    assert told(findings) == [("bandwidth", 1, "n1", "error")]
    assert "1.00 GB/s in an all-reduce; has to be: 1.5 GB/s (faults.preflight.min_bandwidth)" in as_text(findings)


def test_a_sum_that_loses_a_part_names_both_ends() -> None:
    reports = [replace(one, wrong_summands=(3,)) if one.rank == 0 else one for one in joint()]
    findings = judge_together(reports, None, 10.0)
    assert told(findings) == [("all-reduce", 0, "n1", "error")]
    assert "a wrong sum: the part of rank 3 (on n2); has to be: each part as it was given" in as_text(findings)


def test_one_line_for_what_many_ranks_have() -> None:
    findings = [Finding("clock", f"n{rank}", rank, "late", "in time", "be quick") for rank in range(10)]
    text = as_text(findings)
    assert "\n" not in text and text.startswith("clock: rank 0 (on n0), rank 1 (on n1)")
    assert text.endswith("rank 7 (on n7) and 2 more: late; has to be: in time. Fix: be quick.")


def test_reports_come_back_from_json_as_they_were() -> None:
    node, together = nodes()[3], joint()[2]
    assert module.node_report(json.loads(json.dumps(asdict(node)))) == node
    assert module.joint_report(json.loads(json.dumps(asdict(together)))) == together


# -- of one process, for real


def small(**dit: Any) -> TrainConfig:
    """A DiT and its frozen roles, as small as they get; nothing of `data` is read."""
    size = {"num_layers": 2, "num_heads": 2, "head_width": 8, "in_channels": 4}
    vae = {"encoder_widths": [8, 8, 16], "decoder_widths": [16, 8], "latent_channels": 4}
    return TrainConfig.model_validate(
        {
            "kind": "train",
            "models": {
                "dit": {"name": "dit/ltx", "overrides": size, **dit},
                "vae": {"name": "vae/ltx", "overrides": vae},
                "text_encoder": {"name": "text/t5"},
            },
            "objective": {"kind": "flow_matching"},
            "optimizer": {"lr": 1e-3},
            "data": {"manifest": "nowhere", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 1},
            "trainer": {"max_steps": 1, "device": "cpu"},
        }
    )


def num(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


MESH = Mesh(0, MeshLayout(), torch.device("cpu"))


def test_one_process(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    config = small()
    with caplog.at_level(logging.INFO):
        preflight(config, run, MESH, build_models(config), 3)
    assert "GiB for checkpoints" in caplog.text and list(run.path.iterdir()) == []


def test_room_for_two_checkpoints(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, two moments and the moving average in fp32 are 16 bytes a number; without the average 12."""
    config = small()
    built = build_models(config)
    count, every = num(built["dit"]), sum(map(num, built.values()))
    assert module.needs_of(config, MESH, built) == Needs(disk=2 * 16 * count, memory=4 * every)
    plain = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"ema_decay": 0.0})})
    assert module.needs_of(plain, MESH, built).disk == 2 * 12 * count
    for free, refused in ((2 * 16 * count - 1, True), (2 * 16 * count, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if refused:
            with pytest.raises(PreflightError, match="preflight: the ranks cannot train together like this.\ndisk: rank 0 "):
                preflight(config, run, MESH, built, 1)
        else:
            preflight(config, run, MESH, built, 1)


def test_tensor_ranks_and_zero_3_share_weights() -> None:
    config = small()
    built = build_models(config)
    every = sum(map(num, built.values()))
    mesh = Mesh(0, MeshLayout(data_degree=2, context_degree=2, tensor_degree=2), torch.device("cpu"))
    assert module.needs_of(config, mesh, built).memory == 4 * every // 2
    third = config.model_copy(update={"parallel": config.parallel.model_copy(update={"zero_stage": 3})})
    assert module.needs_of(third, mesh, built).memory == 4 * every // 8


def test_it_can_be_switched_off(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small()
    section = config.faults.preflight.model_copy(update={"enabled": False})
    config = config.model_copy(update={"faults": config.faults.model_copy(update={"preflight": section})})
    monkeypatch.setattr(module, "measure_node", None)
    preflight(config, run, MESH, {}, 1)


def test_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    config = small()
    with pytest.raises(PreflightError, match="cannot write to the run directory .*gone: No such file.*Choose another"):
        preflight(config, RunDirectory(tmp_path / "gone"), MESH, build_models(config), 1)


def test_a_measure_that_fails_is_reported(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("CUDA error: an illegal instruction\nand a page of hints")

    monkeypatch.setattr(module, "measure_device", fail)
    config = small()
    with pytest.raises(
        PreflightError, match=r"device: rank 0 \(on .*\): RuntimeError: CUDA error: an illegal instruction; has"
    ):
        preflight(config, run, MESH, build_models(config), 1)


def test_a_file_that_comes_late_or_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks again until it has the content that is awaited; after that what there is."""
    file = tmp_path / "nonce"
    assert module.read_nonce(file, "new", patience=0.0) is None
    file.write_text("old")
    assert module.read_nonce(file, "new", patience=0.0) == "old"
    monkeypatch.setattr("time.sleep", lambda _: file.write_text("new"))
    assert module.read_nonce(file, "new", patience=60.0) == "new"
    absent = remember_absence(monkeypatch)
    absent.add(str(file))  # as NFS has it, where the name was asked for before it was there
    assert module.read_nonce(file, "new", patience=0.0) == "new"


def test_the_digest_of_code_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.py").write_text("x = 1")
    first = module.code_digest(tmp_path)
    (tmp_path / "notes.txt").write_text("no source")
    assert module.code_digest(tmp_path) == first
    (tmp_path / "a" / "one.py").write_text("x = 2")
    second = module.code_digest(tmp_path)
    (tmp_path / "a" / "one.py").rename(tmp_path / "a" / "two.py")
    assert len({first, second, module.code_digest(tmp_path)}) == 3


def test_versions_are_those_that_must_agree() -> None:
    assert set(module.versions()) == {"python", "videofm", "code", "torch", "deepspeed", "megatron-core"}


def test_warnings_are_logged_and_stop_nothing(caplog: pytest.LogCaptureFixture) -> None:
    finding = Finding("memory", "n1", 0, "60 GiB", "72 GiB", "end it", "warning")
    module._act([finding], True)
    assert "preflight: memory: rank 0 (on n1): 60 GiB; has to be: 72 GiB. Fix: end it." in caplog.text


def test_adapters_or_an_injection_alone_are_counted_where_they_alone_train() -> None:
    """They are what carries a gradient once the model is built so."""
    plain = build_models(small())["dit"]
    assert num_trained(plain, False) == num(plain)
    for changes, frozen in (({"lora": {"rank": 2}}, False), ({"injection": {}, "freeze_base": True}, True)):
        dit = build_models(small(**changes))["dit"]
        moving = sum(parameter.numel() for parameter in dit.parameters() if parameter.requires_grad)
        assert 0 < num_trained(dit.requires_grad_(True), frozen) == moving < num(dit)


def test_nobody_is_odd_among_none() -> None:
    assert rules.odd_ones_out([]) == []


@pytest.mark.parametrize(("local_rank", "num_devices", "index"), [(1, 4, 1), (3, 1, 0), (4, 4, None)])
def test_a_rank_takes_a_device_of_its_own(
    monkeypatch: pytest.MonkeyPatch, local_rank: int, num_devices: int, index: int | None
) -> None:
    """By its number on the node, or the only one where the launcher shows each rank its own."""
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    if index is not None:
        assert pick_device("cuda") == torch.device("cuda", index)
    else:
        with pytest.raises(ConfigError, match="rank 4 of this node sees 4 CUDA devices; start at most 4 ranks a node"):
            pick_device("auto")


def test_a_rank_without_a_place_says_why(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before it has a number by which its files could be called."""
    for name in ("_die_with_parent", "setup_logging"):
        monkeypatch.setattr(worker, name, lambda *_: None)
    monkeypatch.delenv("VIDEOFM_RENDEZVOUS", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert worker.main([str(run.path), "1"]) == ParallelError.exit_code
    assert "videofm: RANK is '' and must be a whole number" in capsys.readouterr().err
