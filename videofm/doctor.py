"""What this machine can do: every part is run once on something tiny; a missing one says what it gives and how to get it.

A check that crashes is a check that failed; it does not stop the others. Decoders and attention kernels are native code
that can take a process down, so each is tried in a process of its own (`python -m videofm.doctor GROUP NAME`).
"""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
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

from videofm import registry
from videofm.errors import ConfigError, VideofmError
from videofm.run_dir import code_version

OK, ABSENT, FAILED = "ok", "absent", "failed"
MARKS = {OK: "ok    ", ABSENT: "absent", FAILED: "FAILED"}
MIN_DISK_GIB, MIN_SHM_MIB = 5.0, 256.0
APART, PATIENCE = ("decoders", "attention"), 180.0


@dataclass(frozen=True)
class Check:
    """What one check found. `state` is ok, absent (optional and not there) or failed; `fix` says what to do about it."""

    group: str
    name: str
    state: str
    detail: str
    fix: str = ""
    required: bool = False


class Absent(Exception):
    """An optional part is not there; the first argument says why."""


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
    """1 when a required part does not work."""
    return int(any(check.required and check.state != OK for check in checks))


def as_json(checks: list[Check]) -> str:
    """The checks as JSON."""
    return json.dumps({"videofm": code_version(), "checks": [asdict(check) for check in checks]}, indent=2)


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


def _specs(folder: Path) -> list[_Spec]:
    core = 'reinstall the pinned versions: pip install -c constraints.txt -e "."'
    machine = "machine"
    specs = [
        _Spec(machine, "python", _python, "use Python 3.11 or 3.12", required=True),
        _Spec(machine, "cpu", _cpu),
        _Spec(machine, "torch", _torch, core, required=True),
        _Spec(
            machine,
            "gpu",
            _gpu,
            "training on GPUs is 10 to 1000 times faster; needs an NVIDIA driver and a CUDA build of torch",
        ),
        _Spec(machine, "bf16 matmul", _bf16, "train with trainer.precision=fp32", required=False),
        _Spec(
            machine, "disk", lambda: _disk(folder), f"keep {MIN_DISK_GIB:.0f} GiB free: checkpoints and shards", required=True
        ),
        _Spec(
            machine,
            "shared memory",
            _shm,
            "mount a larger /dev/shm (containers: --shm-size=2g); Ray and decoding workers use it",
        ),
        _Spec(machine, "ffmpeg", _ffmpeg, "not needed (PyAV brings its own); handy to look at files: apt-get install ffmpeg"),
        _Spec("training", "gloo", _gloo, "check that the loopback interface is up", required=True),
        _Spec("training", "nccl", _nccl, "collectives between GPUs; comes with a CUDA build of torch"),
    ]
    for name, module, group, required, gives in _LIBRARIES:
        fix = core if required else gives
        specs.append(_Spec(group, name, _importer(name, module), fix, required))
    for name in registry.DECODERS:
        gives = "reads frames; one decoder is enough, " + (
            "pip install av" if name == "pyav" else 'pip install "videofm[decoders]"'
        )
        specs.append(_Spec("decoders", name, _decoder(name), gives, required=name == "pyav"))
    for name in registry.ATTENTION_BACKENDS:
        gives = "attention with block masks on NVIDIA GPUs; comes with torch"
        if name != "flex":
            gives = 'faster attention on NVIDIA GPUs: pip install "videofm[gpu]"'
        specs.append(_Spec("attention", name, _attention(name), gives, required=name in ("math", "sdpa")))
    return specs


_LIBRARIES = [
    ("deepspeed", "deepspeed", "training", True, ""),
    ("megatron-core", "megatron.core.parallel_state", "training", True, ""),
    ("transformers", "transformers", "training", True, ""),
    ("wandb", "wandb", "training", False, "a copy of the metrics to Weights & Biases: pip install wandb"),
    ("ray", "ray", "curation", True, ""),
    ("scenedetect-headless", "scenedetect", "curation", True, ""),
    ("pyarrow", "pyarrow", "curation", True, ""),
    ("diffusers", "diffusers", "export", False, 'checks an exported folder by loading it: pip install "videofm[export]"'),
    ("starlette", "starlette", "annotation", False, 'the page of dpo annotate: pip install "videofm[annotate]"'),
]
"""Distribution, module to import, group, whether it is required, and what it gives."""


def _python() -> str:
    if sys.version_info >= (3, 13):
        raise ConfigError(f"Python {platform.python_version()} is newer than what the pinned packages support")
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def _cpu() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{usable} cores usable of {os.cpu_count()}, {pages:.1f} GiB of memory"


def _torch() -> str:
    torch = import_module("torch")
    left = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(left @ left.T, torch.tensor([[5.0, 14.0], [14.0, 50.0]])), "a matrix product is wrong"
    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def _gpu() -> str:
    torch = import_module("torch")
    if not torch.cuda.is_available():
        raise Absent("no CUDA device: everything runs on the CPU")
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        ones = torch.ones(8, 8, device=f"cuda:{index}")
        assert float((ones @ ones).sum()) == 512.0, f"a matrix product on device {index} is wrong"
        names.append(f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)")
    return f"{len(names)}: {', '.join(names)}; CUDA {torch.version.cuda}"


def _bf16() -> str:
    torch = import_module("torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 512
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.eye(size, device=device, dtype=dtype)
        assert torch.equal(matrix @ matrix, matrix), f"{dtype}: the product of identities is wrong"
        started = time.perf_counter()
        for _ in range(5):
            matrix = matrix @ matrix
        float(matrix.sum())
        times[dtype] = time.perf_counter() - started
    return f"works on {device}, {times[torch.float32] / times[torch.bfloat16]:.1f} times the speed of fp32 at {size}x{size}"


def _disk(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    started = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".videofm-doctor-") as file:
        file.write(b"0" * (8 << 20))
        file.flush()
        os.fsync(file.fileno())
    rate = 8 / (time.perf_counter() - started)
    if free < MIN_DISK_GIB:
        raise ConfigError(f"only {free:.1f} GiB free in {folder.resolve()}, at least {MIN_DISK_GIB:.0f} GiB are needed")
    return f"{free:.1f} GiB free, writes and syncs 8 MiB at {rate:.0f} MiB/s"


def _shm() -> str:
    if not Path("/dev/shm").is_dir():
        raise Absent("this system has no /dev/shm")
    free = shutil.disk_usage("/dev/shm").free / 2**20
    if free < MIN_SHM_MIB:
        raise ConfigError(f"{free:.0f} MiB free, at least {MIN_SHM_MIB:.0f} MiB are needed")
    return f"{free:.0f} MiB free in /dev/shm"


def _ffmpeg() -> str:
    path = shutil.which("ffmpeg")
    if path is None:
        raise Absent("not installed")
    done = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=20, check=True)
    return " ".join(done.stdout.splitlines()[0].split()[:3])


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
