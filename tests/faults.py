"""Faults for tests: a process of a training kills itself with SIGKILL at a chosen moment. The product has no hook for this.

`VIDEOFM_TEST_FAULTS` is a JSON list of faults, `{"rank": 1, "moment": "commit", "number": 2}`, of which one at a time is armed:
the first whose mark is not in the folder `VIDEOFM_TEST_MARKS`. The mark is a file, `0.json` for the first, that the process
writes before it dies: a test asserts that the fault fired, and the process that takes its place does not die of it again.
`VIDEOFM_TEST_CENSUS` is a folder where each rank leaves how often it passed each moment (`rank_0.json`), so that one can be
drawn at random.

A real process installs this through `tests/faults_site/sitecustomize.py` on PYTHONPATH. A forked one, which has made its
imports already, is started as `python -m tests.faults MODULE ARGUMENTS`.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import re
import runpy
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial, wraps
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

FAULTS, MARKS, CENSUS = "VIDEOFM_TEST_FAULTS", "VIDEOFM_TEST_MARKS", "VIDEOFM_TEST_CENSUS"
SITE = Path(__file__).parent / "faults_site"

MOMENTS = {
    "start": "the rank begins; a real one imports a module of videofm",
    "forward": "a module is called in a forward pass of the training",
    "backward": "half of the graph of a backward pass is done",
    "collective": "a collective begins, in which the others then wait",
    "collected": "this rank has what a collective gave; the others may not",
    "vote": "in the thread that writes a checkpoint, the rank tells the others how its share went",
    "sampling": "a module is called while videos are sampled during training",
    "decode": "the rank decodes a clip",
    "data_worker": "a decoding process of the rank gets a clip; the process dies and not the rank",
    "mkdir": "a folder of a checkpoint is made",
    "open": "a file of a checkpoint is opened for writing",
    "write": "a file of tensors is written up to here; what came before may lie on the disk, or not",
    "fsync": "a file or folder of a checkpoint is flushed",
    "rename": "something in `checkpoints` is renamed, but for the commit",
    "commit": "the folder of a checkpoint is about to get its name",
    "committed": "it has its name, and nothing after that has happened: neither the flush of the names nor retention",
    "remove": "a file or folder in `checkpoints` is removed",
}
"""What can be chosen, each with what happens next where a process dies. `number` counts from 1."""

COLLECTIVES = (
    *("allreduce", "allreduce_coalesced", "allgather", "allgather_coalesced", "allgather_into_tensor_coalesced"),
    *("_allgather_base", "broadcast", "reduce", "gather", "scatter", "reduce_scatter", "_reduce_scatter_base"),
    *("reduce_scatter_tensor_coalesced", "alltoall", "alltoall_base", "barrier", "monitored_barrier", "send", "recv"),
)
"""Methods of torch's ProcessGroup, through which every collective goes, whatever name it was called by."""

_SCOPES = {
    "forward": ("videofm.train.engine", "PhaseModule", "forward"),
    "sampling": ("videofm.sampling.pipeline", "Pipeline", "generate"),
}
"""Moments that are calls of a torch module inside of a method."""

_FILE_EVENTS = {"os.mkdir": "mkdir", "os.remove": "remove", "os.rmdir": "remove"}


@dataclass(frozen=True)
class Fault:
    """Process `rank` gets `signal` the `number`-th time that it comes to `moment`."""

    rank: int
    moment: str
    number: int = 1
    signal: str = "SIGKILL"

    def __post_init__(self) -> None:
        assert self.moment in MOMENTS, f"{self.moment!r} is none of {', '.join(MOMENTS)}"
        assert self.number >= 1 and self.rank >= 0 and hasattr(signal, self.signal), self

    def __str__(self) -> str:
        return f"{self.moment} {self.number} of rank {self.rank}"


def environment(faults: Sequence[Fault], marks: Path, census: Path | None = None) -> dict[str, str]:
    """What a launcher's environment needs for `faults` to happen in what it starts.

    Args:
        faults: one after the other.
        marks: an empty folder for their marks.
        census: a folder for the counts of moments.
    """
    search = [str(SITE), str(SITE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {FAULTS: json.dumps([asdict(fault) for fault in faults]), MARKS: str(marks), "PYTHONPATH": os.pathsep.join(search)}
    return found if census is None else found | {CENSUS: str(census)}


def fired(marks: Path) -> list[dict[str, Any]]:
    """What the faults that happened wrote: `rank`, `moment`, `number`, `what` (as the file), `pid`."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(marks.glob("[0-9]*.json"))]


class Watch:
    """Counts moments in this process, and ends it at the one that is armed.

    Attributes:
        counts: how often each moment came.
    """

    def __init__(self, armed: Fault | None = None, mark: Path | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self._armed, self._mark, self._lock = armed, mark, threading.RLock()

    def comes(self, moment: str) -> bool:
        """Count `moment`; whether this is the time to die."""
        with self._lock:
            self.counts[moment] += 1
            armed = self._armed
            return armed is not None and armed.moment == moment and armed.number == self.counts[moment]

    def at(self, moment: str, what: str = "") -> None:
        """Count `moment`, and die where it is the one."""
        if self.comes(moment):
            self.die(what)

    def die(self, what: str = "") -> None:
        """Leave the mark and send the signal; nothing where the fault has happened in another process before."""
        assert self._armed is not None and self._mark is not None
        told = {**asdict(self._armed), "what": what, "pid": os.getpid()}
        try:
            descriptor = os.open(self._mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return
        os.write(descriptor, json.dumps(told).encode())
        os.fsync(descriptor)
        os.kill(os.getpid(), getattr(signal, self._armed.signal))


def install(role: str | None = None) -> Watch | None:
    """Watch this process, if it is a rank or the parent of decoding processes and the environment asks for it.

    Args:
        role: `rank` or `nursery`; told by the command line of a real process.
    """
    role = role or _role(sys.orig_argv)
    if role is None or "RANK" not in os.environ or not {FAULTS, CENSUS} & os.environ.keys():
        return None
    rank, armed, mark = int(os.environ["RANK"]), None, None
    for index, values in enumerate(json.loads(os.environ.get(FAULTS, "[]"))):
        mark = Path(os.environ[MARKS]) / f"{index}.json"
        if not mark.exists():
            armed = Fault(**values) if values["rank"] == rank else None
            break
    watch = Watch(armed, mark)
    if role == "nursery":
        after_imports({"videofm.data.reader": partial(_watch_reader, watch, "data_worker")})
        return watch
    _watch_files(watch)
    after_imports(
        {
            "torch.nn.modules.module": partial(_watch_modules, watch),
            "torch.autograd": partial(_watch_backward, watch),
            "torch.distributed.distributed_c10d": partial(_watch_collectives, watch),
            "videofm.data.reader": partial(_watch_reader, watch, "decode"),
            "videofm.checkpoint.writer": partial(_watch_writes, watch),
            "videofm.config.train": lambda module: watch.at("start", module.__name__),
            **{scope[0]: partial(_mark_scope, name) for name, scope in _SCOPES.items()},
        }
    )
    if CENSUS in os.environ:
        _leave_census(watch, Path(os.environ[CENSUS]) / f"rank_{rank}.json")
    return watch


def _role(command: Sequence[str]) -> str | None:
    """What a process is by its command line; None for any other, such as the verb."""
    roles = {"videofm.train.worker": "rank", "videofm.data.nursery": "nursery"}
    return next((role for module, role in roles.items() if module in command), None)


# -- patches


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module once it is imported."""

    def __init__(self, patches: Mapping[str, Callable[[Any], None]]) -> None:
        self._waiting = dict(patches)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        patch = self._waiting.pop(name, None)
        spec = None if patch is None else importlib.util.find_spec(name)
        if patch is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def after_imports(patches: Mapping[str, Callable[[Any], None]]) -> None:
    """Call each function with its module: now, where it is imported already, else when it is."""
    loaded = [name for name in patches if name in sys.modules]
    sys.meta_path.insert(0, _AfterImport({name: patch for name, patch in patches.items() if name not in loaded}))
    for name in loaded:
        patches[name](sys.modules[name])


_scope: list[str] = []
"""The moments whose methods are running, the innermost last."""


def _mark_scope(moment: str, module: Any) -> None:
    _, owner, method = _SCOPES[moment]
    real = getattr(getattr(module, owner), method)

    @wraps(real)
    def inside(*args: Any, **named: Any) -> Any:
        _scope.append(moment)
        try:
            return real(*args, **named)
        finally:
            _scope.pop()

    setattr(getattr(module, owner), method, inside)


def _watch_modules(watch: Watch, module: Any) -> None:
    def called(layer: Any, _: Any) -> None:
        if _scope:
            watch.at(_scope[-1], type(layer).__name__)

    module.register_module_forward_pre_hook(called)


def _watch_backward(watch: Watch, module: Any) -> None:
    real = module.backward

    @wraps(real)
    def backward(tensors: Any, *args: Any, **named: Any) -> Any:
        if not watch.comes("backward"):
            return real(tensors, *args, **named)
        nodes = _graph(tensors.grad_fn if hasattr(tensors, "grad_fn") else tensors[0].grad_fn)
        middle = nodes[len(nodes) // 2]
        middle.register_prehook(lambda *_: watch.die(f"{middle.name()}, {len(nodes)} nodes"))
        real(tensors, *args, **named)
        return watch.die("the end: its middle was not needed")

    module.backward = backward


def _graph(root: Any) -> list[Any]:
    """The nodes of an autograd graph, breadth first."""
    found, seen = [root], {root}
    for node in found:
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                found.append(following)
    return found


def _watch_collectives(watch: Watch, module: Any) -> None:
    for name in COLLECTIVES:
        if (real := getattr(module.ProcessGroup, name, None)) is not None:
            setattr(module.ProcessGroup, name, _watched(watch, name, real))


def _watched(watch: Watch, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(real)
    def collective(group: Any, *args: Any, **named: Any) -> Any:
        what = f"{name} of group {group.group_desc}"
        if threading.current_thread() is not threading.main_thread():
            watch.at("vote", what)
            return real(group, *args, **named)
        watch.at("collective", what)
        work = real(group, *args, **named)
        if watch.comes("collected"):
            if work is not None:
                work.wait()
            watch.die(what)
        return work

    return collective


def _watch_reader(watch: Watch, moment: str, module: Any) -> None:
    real = module.ClipReader.read

    @wraps(real)
    def read(reader: Any, request: Any, *args: Any, **named: Any) -> Any:
        watch.at(moment, request.key)
        return real(reader, request, *args, **named)

    module.ClipReader.read = read


def _watch_writes(watch: Watch, module: Any) -> None:
    real = module.write_durably

    @wraps(real)
    def write_durably(path: Path, pieces: Iterable[Any]) -> Any:
        def watched() -> Iterator[Any]:
            for piece in pieces:
                _at_file(watch, "write", str(path))
                yield piece

        return real(path, watched())

    module.write_durably = write_durably


class _Operation(Protocol):
    def __call__(self, *args: Any, **named: Any) -> Any: ...


def _watch_files(watch: Watch) -> None:
    """Watch operations on files below `checkpoints`. An audit hook sees all that Python does, whoever does it, before it is
    done; it cannot be taken away again. Only fsync has no audit event."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in _FILE_EVENTS:
            _at_file(watch, _FILE_EVENTS[event], _place(args[0], args[-1]))
        elif event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            _at_file(watch, "open", _place(args[0]))
        elif event == "os.rename":
            target = _place(args[1], args[3])
            _at_file(watch, "commit" if _is_commit(target) else "rename", target)

    def flush(real: _Operation, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        _at_file(watch, "fsync", _place(number))
        real(descriptor)

    def replace(real: _Operation, source: Any, target: Any, **named: Any) -> None:
        real(source, target, **named)
        if _is_commit(_place(target)):
            _at_file(watch, "committed", _place(target))

    sys.addaudithook(hook)
    os.fsync = partial(flush, os.fsync)
    os.fdatasync = partial(flush, os.fdatasync)
    os.replace = partial(replace, os.replace)
    os.rename = partial(replace, os.rename)


def _at_file(watch: Watch, moment: str, place: str) -> None:
    if "checkpoints" in place.split(os.sep):
        watch.at(moment, place[place.rindex("checkpoints") :])


def _place(path: Any, folder: Any = -1) -> str:
    """A path, or what an open descriptor is of; `folder` is the descriptor of the folder that a name is relative to."""
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    beside = _place(folder) if isinstance(folder, int) and folder >= 0 else ""
    return os.path.join(beside, os.fsdecode(path))


def _is_commit(target: str) -> bool:
    return re.search(r"(^|/)checkpoints/step_\d+$", target) is not None


def _leave_census(watch: Watch, path: Path) -> None:
    """Write the counts when the process ends, which a rank does by `os._exit`."""
    leave = os._exit

    def end(code: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(watch.counts), encoding="utf-8")
        leave(code)

    os._exit = end  # type: ignore[assignment]


def main(arguments: list[str]) -> None:
    """Run the module `arguments[0]` as `python -m` does, watched."""
    install(_role(arguments))
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
