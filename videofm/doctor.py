"""What this machine can do: every part is run once on something tiny; a missing one says what it gives and how to get it.

What is looked at in the machine itself is in `doctor_machine`, and where ranks meet in `doctor_ranks`.

A check that crashes is a check that failed; it does not stop the others. Decoders and attention kernels are native code
that can take a process down, so each is tried in a process of its own (`python -m videofm.doctor GROUP NAME`).
"""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from videofm import doctor_machine, doctor_ranks, registry
from videofm.doctor_machine import MIN_DISK_GIB, Absent
from videofm.errors import VideofmError
from videofm.run_dir import code_version

OK, ABSENT, FAILED = "ok", "absent", "failed"
MARKS = {OK: "ok    ", ABSENT: "absent", FAILED: "FAILED"}
SEVERITIES = {OK: "ok", ABSENT: "note", FAILED: "warning"}
"""State of an optional part -> how bad that is. Of a required part all but ok is an error."""
APART, PATIENCE = ("decoders", "attention", "ranks"), 180.0


@dataclass(frozen=True)
class Check:
    """What one check found. `state` is ok, absent (optional and not there) or failed; `fix` says what to do about it."""

    group: str
    name: str
    state: str
    detail: str
    fix: str = ""
    required: bool = False

    @property
    def severity(self) -> str:
        """`ok`, `note` (an optional part is not there), `warning` (it is there and does not work) or `error` (a required part
        does not work)."""
        return "error" if self.required and self.state != OK else SEVERITIES[self.state]


@dataclass(frozen=True)
class _Spec:
    """A check to make: `probe` returns a detail, raises `Absent`, or raises anything else to fail."""

    group: str
    name: str
    probe: Callable[[], str]
    fix: str = ""
    required: bool = False


def examine(folder: Path = Path(".")) -> list[Check]:
    """Run every check; `folder` is where runs will be written."""
    specs = _specs(folder)
    with ThreadPoolExecutor(max_workers=2) as pool:
        apart = {spec: pool.submit(_run_apart, spec) for spec in specs if spec.group in APART}
        with _quiet():
            here = {spec: _run(spec) for spec in specs if spec not in apart}
    return [here[spec] if spec in here else apart[spec].result() for spec in specs]


def exit_code(checks: list[Check]) -> int:
    """1 when anything is an error: a required part does not work."""
    return int(any(check.severity == "error" for check in checks))


def as_json(checks: list[Check]) -> str:
    """The checks as JSON."""
    found = [asdict(check) | {"severity": check.severity} for check in checks]
    return json.dumps({"videofm": code_version(), "exit_code": exit_code(checks), "checks": found}, indent=2)


def as_text(checks: list[Check]) -> str:
    """The checks as lines by group, with what to do about each that is not fine."""
    width = max(len(check.name) for check in checks)
    lines: list[str] = [f"videofm {code_version()}"]
    group = ""
    for check in checks:
        if check.group != group:
            group = check.group
            lines += ["", group]
        lines.append(f"  {MARKS[check.state]}  {check.name.ljust(width)}  {check.detail}")
        if check.state != OK and check.fix:
            lines.append(f"  {' ' * (width + 8)}  -> {check.fix}")
    bad = [check.name for check in checks if check.required and check.state != OK]
    verdict = f"required parts that do not work: {', '.join(bad)}" if bad else "every required part works"
    return "\n".join([*lines, "", verdict])


def _run(spec: _Spec) -> Check:
    try:
        state, detail, fix = OK, spec.probe(), ""
    except Absent as error:
        state, detail, fix = ABSENT, str(error), spec.fix
    except VideofmError as error:
        state, detail, fix = FAILED, str(error), spec.fix
    except ImportError as error:
        state, detail, fix = (FAILED if spec.required else ABSENT), f"cannot be imported: {error}", spec.fix
    except Exception as error:
        state, detail, fix = FAILED, f"{type(error).__name__}: {error}".splitlines()[0], spec.fix
    return Check(spec.group, spec.name, state, detail, fix, spec.required)


def _run_apart(spec: _Spec) -> Check:
    """The check in a fresh process: a crash or a hang there is its result."""
    command = [sys.executable, "-m", "videofm.doctor", spec.group, spec.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return Check(spec.group, spec.name, FAILED, f"not done after {PATIENCE:.0f} s", spec.fix, spec.required)
    if done.returncode != 0:
        how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
        return Check(spec.group, spec.name, FAILED, f"the process that tried it ended with {how}", spec.fix, spec.required)
    return Check(**json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what libraries print while they are imported out of our output."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _machine_specs(folder: Path, core: str) -> list[_Spec]:
    machine, group = doctor_machine, "machine"
    return [
        _Spec(group, "python", machine.python, "use Python 3.11 or 3.12", required=True),
        _Spec(group, "cpu", machine.cpu, "run on Linux: cores and memory cannot be counted here"),
        _Spec(group, "limits", machine.limits, "raise them: ulimit -n 65536 (systemd and Slurm have limits of their own)"),
        _Spec(group, "torch", machine.torch, core, required=True),
        _Spec(
            group,
            "gpu",
            machine.gpu,
            "training on GPUs is 10 to 1000 times faster; needs an NVIDIA driver and a CUDA build of torch. One that computes "
            "wrong or has memory errors must be reset or replaced",
        ),
        _Spec(group, "bf16 matmul", machine.bf16, "train with trainer.precision=fp32"),
        _Spec(
            group,
            "compiler",
            machine.compiler,
            "parallel.offload_optimizer and trainer.compile build code on first use: apt-get install g++ ninja-build",
        ),
        _Spec(
            group,
            "disk",
            lambda: machine.disk(folder),
            f"keep {MIN_DISK_GIB:.0f} GiB free for checkpoints and shards; look at another folder with --folder DIR",
            required=True,
        ),
        _Spec(
            group,
            "shared memory",
            machine.shared_memory,
            "mount a larger /dev/shm (containers: --shm-size=2g); Ray and NCCL use it",
        ),
        _Spec(
            group, "ffmpeg", machine.ffmpeg, "not needed (PyAV brings its own); handy to look at files: apt-get install ffmpeg"
        ),
    ]


def _rank_specs() -> list[_Spec]:
    group, ranks = "ranks", doctor_ranks
    free = "set MASTER_ADDR and MASTER_PORT to an address of this machine and a free port, or mend /etc/hosts"
    loopback = "let processes connect to 127.0.0.1: bring the loopback interface up, and look at firewalls"
    return [
        _Spec(group, "place", ranks.place, "unset RANK and WORLD_SIZE, or set all that belongs to them"),
        _Spec(group, "port", ranks.port, free),
        _Spec(group, "two processes", ranks.two_processes, loopback, required=True),
        _Spec(group, "two GPUs", ranks.two_gpus, "for training on several GPUs; NCCL_DEBUG=INFO tells what it tries"),
    ]


def _specs(folder: Path) -> list[_Spec]:
    core = f'reinstall the pinned versions: {_INSTALL} "."'
    specs = [
        *_machine_specs(folder, core),
        *_rank_specs(),
        _Spec("training", "gloo", _gloo, "check that the loopback interface is up", required=True),
        _Spec("training", "nccl", _nccl, "collectives between GPUs; comes with a CUDA build of torch"),
    ]
    for name, module, group, required, gives in _LIBRARIES:
        fix = core if required else gives
        specs.append(_Spec(group, name, _importer(name, module), fix, required))
    for name in registry.DECODERS:
        gives = "reads frames; one decoder is enough, " + ("pip install av" if name == "pyav" else f'{_INSTALL} ".[decoders]"')
        specs.append(_Spec("decoders", name, _decoder(name), gives, required=name == "pyav"))
    for name in registry.ATTENTION_BACKENDS:
        gives = "attention with block masks on NVIDIA GPUs; comes with torch"
        if name != "flex":
            gives = f'faster attention on NVIDIA GPUs: {_INSTALL} ".[gpu]"'
        specs.append(_Spec("attention", name, _attention(name), gives, required=name in ("math", "sdpa")))
    return specs


_INSTALL = "pip install -c constraints.txt -e"

_LIBRARIES = [
    ("deepspeed", "deepspeed", "training", True, ""),
    ("megatron-core", "megatron.core.parallel_state", "training", True, ""),
    ("transformers", "transformers", "training", True, ""),
    ("wandb", "wandb", "training", False, "a copy of the metrics to Weights & Biases: pip install wandb"),
    ("ray", "ray", "curation", True, ""),
    ("scenedetect-headless", "scenedetect", "curation", True, ""),
    ("pyarrow", "pyarrow", "curation", True, ""),
    ("diffusers", "diffusers", "export", False, f'checks an exported folder by loading it: {_INSTALL} ".[export]"'),
    ("starlette", "starlette", "annotation", False, f'the page of dpo annotate: {_INSTALL} ".[annotate]"'),
]
"""Distribution, module to import, group, whether it is required, and what it gives."""


def _gloo() -> str:
    return _all_reduce("gloo", "cpu")


def _nccl() -> str:
    torch, dist = import_module("torch"), import_module("torch.distributed")
    if not torch.cuda.is_available():
        raise Absent("no CUDA device")
    if not dist.is_nccl_available():
        raise Absent("this build of torch has no NCCL")
    return _all_reduce("nccl", "cuda")


def _all_reduce(backend: str, device: str) -> str:
    """One all-reduce in a group of one process."""
    torch, dist = import_module("torch"), import_module("torch.distributed")
    if dist.is_initialized():
        raise Absent("a process group exists already in this process")
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            value = torch.full((4,), 2.0, device=device)
            dist.all_reduce(value)
            assert value.tolist() == [2.0] * 4, f"the sum over one process is {value.tolist()}"
        finally:
            dist.destroy_process_group()
    return "an all-reduce works"


def _importer(name: str, module: str) -> Callable[[], str]:
    def probe() -> str:
        import_module(module)
        return metadata.version(name)

    return probe


def _decoder(name: str) -> Callable[[], str]:
    def probe() -> str:
        decode = import_module("videofm.data.decode")
        reason = decode.get(name).unavailable()
        if reason is not None:
            raise Absent(reason)
        started = time.perf_counter()
        problem = decode.conformance(name)
        if problem is not None:
            raise VideofmError(f"fails its self-test: {problem}")
        return f"{_version(name)} returns the right frames of a test clip ({1000 * (time.perf_counter() - started):.0f} ms)"

    return probe


def _attention(name: str) -> Callable[[], str]:
    def probe() -> str:
        torch, api = import_module("torch"), import_module("videofm.attention.api")
        backend: Any = registry.lookup(registry.ATTENTION_BACKENDS, name, "attention backend")
        works, reasons = [], []
        for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
            for dtype in (torch.float32, torch.bfloat16):
                reason = backend.supports(api.AttentionSpec(num_heads=2, head_width=64, dtype=dtype, device_type=device))
                if reason is not None:
                    reasons.append(reason)
                    continue
                q, k, v = (torch.randn(1, 16, 2, 64, device=device).to(dtype) for _ in range(3))  # (B, L, N, K)
                exact = torch.nn.functional.scaled_dot_product_attention(*(x.float().transpose(1, 2) for x in (q, k, v)))
                error = float((backend(q, k, v, None).float().transpose(1, 2) - exact).abs().max())
                assert error < (1e-4 if dtype == torch.float32 else 5e-2), f"{device} {dtype}: off by {error:.2g}"
                works.append(f"{device} {str(dtype).removeprefix('torch.')}")
        if not works:
            raise Absent(reasons[0])
        return f"right on {', '.join(works)}"

    return probe


def _version(decoder: str) -> str:
    return metadata.version({"pyav": "av"}.get(decoder, decoder))


def _main(group: str, name: str) -> None:
    """One check, for `_run_apart`: its result is the last line."""
    spec = next(spec for spec in _specs(Path(".")) if (spec.group, spec.name) == (group, name))
    print(json.dumps(asdict(_run(spec))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
