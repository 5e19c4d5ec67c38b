"""`videofm doctor`: one broken part does not hide the others, and only required parts decide the exit code."""

from __future__ import annotations

import json
import resource
import signal
import socket
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest

from videofm import doctor, doctor_machine, doctor_ranks
from videofm.doctor import ABSENT, FAILED, OK, Absent, Check, _run, _run_apart, _Spec
from videofm.errors import ConfigError, DataError, VideofmError
from videofm.parallel.health import DeviceHealth


def absent() -> str:
    raise Absent("not installed")


def crash() -> str:
    raise ZeroDivisionError("by zero")


def unusable() -> str:
    raise DataError("returns wrong frames")


def no_module() -> str:
    raise ImportError("No module named 'x'")


@pytest.mark.parametrize(
    ("probe", "required", "state", "detail"),
    [
        (lambda: "1.0", True, OK, "1.0"),
        (absent, False, ABSENT, "not installed"),
        (crash, False, FAILED, "ZeroDivisionError: by zero"),
        (unusable, False, FAILED, "returns wrong frames"),
        (no_module, False, ABSENT, "cannot be imported: No module named 'x'"),
        (no_module, True, FAILED, "cannot be imported: No module named 'x'"),
    ],
)
def test_each_end_of_a_check(probe, required: bool, state: str, detail: str) -> None:  # type: ignore[no-untyped-def]
    check = _run(_Spec("group", "name", probe, "install it", required))
    assert (check.state, check.detail) == (state, detail)
    assert check.fix == ("" if state == OK else "install it")


def test_only_required_parts_decide_the_exit_code() -> None:
    assert doctor.exit_code([Check("g", "a", OK, "", required=True), Check("g", "b", FAILED, "")]) == 0
    assert doctor.exit_code([Check("g", "a", FAILED, "", required=True)]) == 1
    assert doctor.exit_code([Check("g", "a", ABSENT, "", required=True)]) == 1


def test_text_and_json_tell_the_fix() -> None:
    checks = [Check("decoders", "decord", ABSENT, "not installed", "pip install decord")]
    assert "-> pip install decord" in doctor.as_text(checks)
    assert json.loads(doctor.as_json(checks))["checks"][0]["fix"] == "pip install decord"


def test_a_check_apart_that_dies_is_reported() -> None:
    check = _run_apart(_Spec("decoders", "no such decoder", absent, "fix"))
    assert (check.state, check.detail) == (FAILED, "the process that tried it ended with exit code 1")


def test_a_check_apart_answers() -> None:
    check = _run_apart(_Spec("decoders", "pyav", absent, required=True))
    assert check.state == OK, check.detail
    assert "returns the right frames" in check.detail


def test_everything_that_can_fail_says_what_to_do() -> None:
    specs = doctor._specs(Path("."))
    assert len({(spec.group, spec.name) for spec in specs}) == len(specs)
    assert [spec.name for spec in specs if not spec.fix] == []
    groups = [spec.group for spec in specs]
    assert len([group for group, _ in groupby(groups)]) == len(set(groups)), "each group has one headline"


@pytest.mark.parametrize(
    ("state", "required", "severity"),
    [(OK, True, "ok"), (ABSENT, False, "note"), (FAILED, False, "warning"), (FAILED, True, "error"), (ABSENT, True, "error")],
)
def test_how_bad_it_is(state: str, required: bool, severity: str) -> None:
    check = Check("g", "a", state, "", required=required)
    told = json.loads(doctor.as_json([check]))
    assert check.severity == told["checks"][0]["severity"] == severity
    assert told["exit_code"] == doctor.exit_code([check]) == (severity == "error")


# -- the machine


@pytest.fixture
def good_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room, and whose syncs take no time: what the disk of this machine does meanwhile is not tested."""
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=100 << 30))
    monkeypatch.setattr(doctor_machine.os, "fsync", lambda _: None)


@pytest.mark.usefixtures("good_disk")
def test_disk_is_looked_at_where_runs_will_be(tmp_path: Path) -> None:
    assert "GiB free" in doctor_machine.disk(tmp_path / "not" / "there" / "yet")
    assert "a commit takes" in doctor_machine.disk(tmp_path) and list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("good_disk")
def test_a_disk_that_is_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full; slow (the clock is fifteen seconds on whenever it is read, so five commits take 15); one that renames nothing; one
    with another clock; one that cannot be written."""
    with monkeypatch.context() as patch:
        patch.setattr(doctor_machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
        with pytest.raises(ConfigError, match="only 1.0 GiB free in .*, at least 5 GiB are needed"):
            doctor_machine.disk(tmp_path)
    with monkeypatch.context() as patch:
        ticks = iter(range(0, 1000, 15))
        patch.setattr(doctor_machine.time, "perf_counter", lambda: next(ticks))
        with pytest.raises(VideofmError, match=r"a commit \(write, sync, rename\) takes 3.0 s in "):
            doctor_machine.disk(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(doctor_machine.os, "replace", lambda _, new: new.write_text("stale"))
        with pytest.raises(VideofmError, match="a file that was renamed into place does not have its new content"):
            doctor_machine.disk(tmp_path)
    with monkeypatch.context() as patch:
        early = time.time() - 100
        patch.setattr(doctor_machine.time, "time", lambda: early)
        with pytest.raises(VideofmError, match=r"the clock of the file system is 10\d s ahead of this machine's"):
            doctor_machine.disk(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        doctor_machine.disk(tmp_path / "file")


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of open files and processes; none is best."""
    endless = resource.RLIM_INFINITY
    held = {resource.RLIMIT_NOFILE: 65536, resource.RLIMIT_NPROC: endless, resource.RLIMIT_MEMLOCK: endless}
    monkeypatch.setattr(doctor_machine.resource, "getrlimit", lambda kind: (held[kind], endless))
    assert doctor_machine.limits() == "65536 open files, any number of processes"
    held |= {resource.RLIMIT_NOFILE: 1024, resource.RLIMIT_NPROC: 100}
    with pytest.raises(ConfigError, match="1024 open files, at least 4096 are needed; 100 processes, at least 1024 are needed"):
        doctor_machine.limits()


def test_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the default of Ray's object store, which is 128 MiB."""
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    with pytest.raises(ConfigError, match="64 MiB free, at least 256 MiB are needed"):
        doctor_machine.shared_memory()


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None; one that fails, with its own words; one without ninja; one with a ninja that is not on PATH; both."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor_machine.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(Absent, match=r"no g\+\+, c\+\+ or clang\+\+ on PATH"):
        doctor_machine.compiler()
    program(tmp_path, "g++", "echo 'cc1plus: not found' >&2; exit 1")
    with pytest.raises(VideofmError, match="cannot compile a line of C.*: cc1plus: not found"):
        doctor_machine.compiler()
    program(tmp_path, "g++", "exit 0")
    with pytest.raises(VideofmError, match=r"there is no ninja \(none on PATH\)"):
        doctor_machine.compiler()
    (tmp_path / "elsewhere").mkdir()
    program(tmp_path / "elsewhere", "ninja", "exit 0")
    monkeypatch.setattr(doctor_machine.sys, "executable", str(tmp_path / "elsewhere" / "python"))
    with pytest.raises(VideofmError, match="which is not on PATH: activate the environment"):
        doctor_machine.compiler()
    program(tmp_path, "ninja", "exit 0")
    assert doctor_machine.compiler() == "g++ compiles, ninja is there"


@pytest.mark.parametrize(
    ("wrong", "errors", "told"), [(0, 0, None), (2, None, "2 wrong elements"), (0, 3, "3 uncorrected memory errors")]
)
def test_gpus(monkeypatch: pytest.MonkeyPatch, wrong: int, errors: int | None, told: str | None) -> None:
    """A machine with two, played: what is measured of the second is given."""
    health = [DeviceHealth("H100", "a", 0, 79 << 30, 80 << 30, 0), DeviceHealth("H100", "b", wrong, 1 << 30, 80 << 30, errors)]
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2)
    modules = {
        "torch": SimpleNamespace(cuda=cuda, device=lambda _, index: index, version=SimpleNamespace(cuda="12")),
        "videofm.parallel.health": SimpleNamespace(measure_device=lambda index: health[index]),
    }
    monkeypatch.setattr(doctor_machine, "import_module", modules.__getitem__)
    if told is None:
        both = "H100 (79 of 80 GiB free, no ECC errors), H100 (1 of 80 GiB free, no ECC errors)"
        assert doctor_machine.gpu() == f"2: {both}; CUDA 12"
    else:
        with pytest.raises(VideofmError, match=rf"device 1 \(H100\): .*{told}"):
            doctor_machine.gpu()


# -- where ranks meet


def test_two_processes_meet_and_sum() -> None:
    assert "two processes meet over TCP and sum by gloo at " in doctor_ranks.two_processes()


def test_one_of_two_processes_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error is told at once, though a library had the last word and the other process would wait for ever."""
    fails = "import sys; print('ParallelError: rank 0 cannot host it'); print('W1123 a library'); sys.exit(3)"
    scripts = iter([fails, "import signal; signal.pause()"])
    started: list[subprocess.Popen[bytes]] = []

    def start(backend: str, environment: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
        assert environment["RANK"] == str(len(started)) and backend == "gloo"
        with output.open("wb") as file:
            started.append(subprocess.Popen([sys.executable, "-c", next(scripts)], stdout=file, stderr=file))
        return started[-1]

    monkeypatch.setattr(doctor_ranks, "_start", start)
    with pytest.raises(VideofmError, match="rank 0 of two ended with code 3: ParallelError: rank 0 cannot host it"):
        doctor_ranks.two_processes()
    assert [process.returncode for process in started] == [3, -signal.SIGKILL]


def test_a_port_is_free_and_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is free and reached as " in doctor_ranks.port()

    def unknown(_: str) -> str:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(doctor_ranks.socket, "gethostbyname", unknown)
    with pytest.raises(VideofmError, match="this machine's name, .*, has no address: .*Name or service not known"):
        doctor_ranks.port()


def test_no_port_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(_: object) -> None:
        raise OSError("address in use")

    monkeypatch.setattr(doctor_ranks.socket, "create_server", taken)
    with pytest.raises(VideofmError, match="a hundred were tried and none is free; set MASTER_PORT"):
        doctor_ranks.free_port()


def test_the_place_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "VIDEOFM_RENDEZVOUS"):
        monkeypatch.delenv(name, raising=False)
    assert doctor_ranks.place() == "one process: `videofm train` starts its own ranks"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(VideofmError, match="RANK is '' and must be a whole number"):
        doctor_ranks.place()
