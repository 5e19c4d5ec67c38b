"""What a failed collective is called: the operation, the group and its ranks, in place of the text of a socket.

Where a rank ends or hangs inside a collective, gloo and NCCL tell the others which socket closed or which wait was too long. A
user needs to know who waited for whom, at what.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import torch.distributed as dist
from torch.distributed import distributed_c10d

from videofm.errors import ParallelError

_NAMES = {
    "default_pg": "world",
    "TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "CONTEXT_PARALLEL_GROUP": "context",
    "HIERARCHICAL_CONTEXT_PARALLEL_GROUP_L0": "ulysses",
    "HIERARCHICAL_CONTEXT_PARALLEL_GROUP_L1": "ring",
    "DATA_PARALLEL_GROUP": "data",
    "DATA_PARALLEL_GROUP_WITH_CP": "gradient",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "sample",
}
"""How megatron-core and torch describe a group -> what we call it."""

_under_way: dict[int, list[tuple[str, dist.ProcessGroup | None]]] = {}
"""Of each thread, the `naming` blocks that it is in; for those who ask from another thread why it does not go on."""


class CollectiveError(ParallelError):
    """A collective did not finish: a rank of its group ended, hung, or left the common order."""

    exit_code = 1


@contextmanager
def naming(doing: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Name collectives that fail inside.

    The operation and its group are those of the call that failed. Where no call can be seen, as when an operation that was
    started earlier is waited for, they are `doing` and `group`.

    Args:
        doing: what happens inside, such as `backward pass`.
        group: of the operations inside; None is the group of all ranks.

    Raises:
        CollectiveError: communication failed. Other errors pass as they are.
    """
    started = time.monotonic()
    mine = _under_way.setdefault(threading.get_ident(), [])
    mine.append((doing, group))
    try:
        yield
    except RuntimeError as error:
        if not is_communication(error):
            raise
        seconds = time.monotonic() - started
        found = failed_call(error.__traceback__)
        operation, where = (found[0], found[1]) if found else (doing, group)
        during = f" (in the {doing})" if found else ""
        raise CollectiveError(
            f"{operation} over {group_name(where)} failed after {seconds:.1f} s{during}: {_reason(error)}. A rank of "
            "the group ended or came too late; look at its log. Run the same command again to go on from the last checkpoint, "
            "with a larger parallel.timeout if it was only slow."
        ) from error
    finally:
        mine.pop()


def under_way(thread: int) -> str | None:
    """What the thread with this identity does, by the innermost `naming` that it is in: `backward pass over the gradient group
    (ranks 0, 1)`."""
    blocks = _under_way.get(thread)
    if not blocks:
        return None
    doing, group = blocks[-1]
    return f"{doing} over {group_name(group)}" if dist.is_initialized() else doing


def waits_in(frame: FrameType | None) -> str | None:
    """The collective that a stack waits in, such as `all_reduce over the data group (ranks 0, 1)`; None where it is in none."""
    while frame is not None:
        if frame.f_code.co_filename == distributed_c10d.__file__ and "group" in frame.f_locals:
            return f"{frame.f_code.co_name} over {group_name(frame.f_locals['group'])}"
        frame = frame.f_back
    return None


def is_communication(error: RuntimeError) -> bool:
    """Whether `error` comes from a collective. Gloo raises plain errors, whose text has the path of its source."""
    text = str(error)
    return isinstance(error, dist.DistError) or "/gloo/" in text or "[gloo]" in text.lower() or "ProcessGroup" in text


def failed_call(trace: TracebackType | None) -> tuple[str, dist.ProcessGroup | None] | None:
    """The innermost function of torch.distributed in a traceback, with the group that it was given (None: all ranks)."""
    found = None
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_filename == distributed_c10d.__file__ and "group" in frame.f_locals:
            found = frame.f_code.co_name, frame.f_locals["group"]
        trace = trace.tb_next
    return found


def group_name(group: dist.ProcessGroup | None) -> str:
    """`the gradient group (ranks 0, 2)`."""
    if group is None or group == dist.GroupMember.WORLD:
        return f"the world group (ranks {_listed(list(range(dist.get_world_size())))})"
    name = _NAMES.get(group.group_desc, group.group_desc)
    return f"the {name} group (ranks {_listed(dist.get_process_group_ranks(group))})"


def _listed(ranks: list[int], most: int = 16) -> str:
    more = f", ... {len(ranks)} in all" if len(ranks) > most else ""
    return ", ".join(map(str, ranks[:most])) + more


def _reason(error: BaseException) -> str:
    """The first sentence of an error, without the place in the source of gloo."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+:\d+\]\s*", "", line).split(". ")[0].rstrip(".")
