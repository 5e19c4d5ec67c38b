"""What `videofm doctor` looks at in a machine: cores, limits, compilers, disks, shared memory, GPUs.

Each function is a check: it returns what it found, raises `Absent` where an optional part is not there, and anything else where
something does not work.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from videofm.config.curate import EngineConfig
from videofm.errors import ConfigError, VideofmError

MIN_DISK_GIB = 5.0
MIN_SHM_MIB = 2.0 * EngineConfig().object_store_mib
"""Ray's object store, and as much again for NCCL. Frames of decoding workers are in anonymous files, which /dev/shm does not
limit."""
MIN_FILES, MIN_PROCESSES = 4096, 1024
"""Open files and processes of this user: a rank with its workers, shards and connections takes some hundred of each."""

_NUM_COMMITS = 5
_MAX_COMMIT_SECONDS = 2.0
_MAX_CLOCK_SECONDS = 10.0
"""How far the clock of a file system may be off this machine's: marks of time in a run directory come from both."""


class Absent(Exception):
    """An optional part is not there; the first argument says why."""


def python() -> str:
    """A version that the pinned packages support."""
    if sys.version_info >= (3, 13):
        raise ConfigError(f"Python {platform.python_version()} is newer than what the pinned packages support")
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def cpu() -> str:
    """Cores and memory."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{usable} cores usable of {os.cpu_count()}, {pages:.1f} GiB of memory"


def limits() -> str:
    """What a process of this user may hold (`ulimit`)."""
    files, processes = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    few = [
        f"{number} {name}, at least {least} are needed"
        for name, number, least in (("open files", files, MIN_FILES), ("processes", processes, MIN_PROCESSES))
        if number != resource.RLIM_INFINITY and number < least
    ]
    if Path("/dev/infiniband").exists() and locked != resource.RLIM_INFINITY:
        few.append(f"{locked >> 20} MiB of locked memory, and InfiniBand needs it without limit (ulimit -l unlimited)")
    if few:
        raise ConfigError("; ".join(few))
    told = {"open files": files, "processes": processes}
    return ", ".join(f"{'any number of' if n == resource.RLIM_INFINITY else n} {name}" for name, n in told.items())


def compiler() -> str:
    """A C++ compiler that makes a library, and ninja: they build DeepSpeed's CPU Adam and what torch.compile writes."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if not found:
        raise Absent("no g++, c++ or clang++ on PATH")
    with tempfile.TemporaryDirectory(prefix="videofm-doctor-") as folder:
        source = Path(folder) / "one.cpp"
        source.write_text("#include <cmath>\ndouble twice(double x) { return std::fma(x, 2.0, 0.0); }\n")
        command = [found, "-O1", "-fPIC", "-shared", str(source), "-o", str(source.with_suffix(".so"))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise VideofmError(f"{found} cannot compile a line of C++: {said}")
    if shutil.which("ninja") is None:
        beside = Path(sys.executable).with_name("ninja")
        where = f"it is at {beside}, which is not on PATH: activate the environment" if beside.exists() else "none on PATH"
        raise VideofmError(f"{Path(found).name} compiles, but there is no ninja ({where})")
    return f"{Path(found).name} compiles, ninja is there"


def disk(folder: Path) -> str:
    """Free space where runs will be, and how fast a large file and the commit of a small one reach the disk.

    A commit is what every checkpoint ends with: write, sync, rename, sync of the folder.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    with tempfile.TemporaryDirectory(dir=folder, prefix=".videofm-doctor-") as own:
        started = time.perf_counter()
        _write(Path(own) / "large", b"0" * (8 << 20))
        rate = 8 / (time.perf_counter() - started)
        _check_clock(Path(own) / "large")
        started = time.perf_counter()
        for number in range(_NUM_COMMITS):
            _commit(Path(own), f"commit {number}")
        seconds = (time.perf_counter() - started) / _NUM_COMMITS
    if free < MIN_DISK_GIB:
        raise ConfigError(f"only {free:.1f} GiB free in {folder.resolve()}, at least {MIN_DISK_GIB:.0f} GiB are needed")
    if seconds > _MAX_COMMIT_SECONDS:
        raise VideofmError(f"a commit (write, sync, rename) takes {seconds:.1f} s in {folder.resolve()}")
    return f"{free:.1f} GiB free, writes and syncs 8 MiB at {rate:.0f} MiB/s, a commit takes {1000 * seconds:.1f} ms"


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _commit(folder: Path, content: str) -> None:
    _write(folder / ".new", content.encode())
    os.replace(folder / ".new", folder / "committed")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if (folder / "committed").read_text() != content:
        raise VideofmError("a file that was renamed into place does not have its new content")


def _check_clock(path: Path) -> None:
    off = path.stat().st_mtime - time.time()
    if abs(off) > _MAX_CLOCK_SECONDS:
        raise VideofmError(
            f"the clock of the file system is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} this machine's"
        )


def shared_memory() -> str:
    """Room in /dev/shm."""
    if not Path("/dev/shm").is_dir():
        raise Absent("this system has no /dev/shm")
    free = shutil.disk_usage("/dev/shm").free / 2**20
    if free < MIN_SHM_MIB:
        raise ConfigError(f"{free:.0f} MiB free, at least {MIN_SHM_MIB:.0f} MiB are needed (engine.object_store_mib, and NCCL)")
    return f"{free:.0f} MiB free in /dev/shm"


def ffmpeg() -> str:
    """The program, which nothing of ours needs."""
    path = shutil.which("ffmpeg")
    if path is None:
        raise Absent("not installed")
    done = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=20, check=True)
    return " ".join(done.stdout.splitlines()[0].split()[:3])


def torch() -> str:
    """A matrix product by torch."""
    torch, health = import_module("torch"), import_module("videofm.parallel.health")
    wrong = health.wrong_products(torch.device("cpu"))
    if wrong:
        raise VideofmError(f"{wrong} elements of a matrix product on the CPU are wrong")
    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def gpu() -> str:
    """Each GPU computes right, and its memory has no errors that could not be corrected."""
    torch, health = import_module("torch"), import_module("videofm.parallel.health")
    if not torch.cuda.is_available():
        raise Absent("no CUDA device: everything runs on the CPU")
    names = []
    for index in range(torch.cuda.device_count()):
        found = health.measure_device(torch.device("cuda", index))
        if found.wrong_products or found.uncorrected_errors:
            raise VideofmError(
                f"device {index} ({found.name}): {found.wrong_products} wrong elements in a matrix product, "
                f"{found.uncorrected_errors or 0} uncorrected memory errors"
            )
        errors = "ECC not told" if found.uncorrected_errors is None else "no ECC errors"
        free, total = found.free_memory / 2**30, found.total_memory / 2**30
        names.append(f"{found.name} ({free:.0f} of {total:.0f} GiB free, {errors})")
    return f"{len(names)}: {', '.join(names)}; CUDA {torch.version.cuda}"


def bf16() -> str:
    """A matrix product in bf16, and how much faster it is."""
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
