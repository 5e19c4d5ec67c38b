"""Memory for frames that is used again: to touch fresh memory for the first time costs more than what is done with it."""

from __future__ import annotations

import math
import weakref
from collections import deque
from typing import Any

import numpy as np


class Buffers:
    """Gives out arrays of about one size, and takes their memory back when nothing refers to them any more.

    A tensor over an array (`torch.from_numpy`), as a batch has one, and every view refer to it, so memory never has two users.
    What it holds, in use or free, is at most what was in use at one time.

    Attributes:
        num_made: arrays for which fresh memory was taken.
    """

    def __init__(self) -> None:
        self.num_made = 0
        self._free: list[np.ndarray] = []
        self._back: deque[np.ndarray] = deque()  # filled from whichever thread drops an array, emptied here
        self._in_use = self._most = 0

    def take(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array with any content."""
        self._collect()
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        fitting = [memory for memory in self._free if num_bytes <= memory.nbytes <= 2 * num_bytes]
        memory = min(fitting, key=lambda memory: memory.nbytes, default=None)
        if memory is None:
            while self._free and self.num_bytes + num_bytes > self._most:
                self._free.pop(0)
            memory = np.empty(num_bytes, np.uint8)
            self.num_made += 1
        else:
            self._free = [other for other in self._free if other is not memory]
        self._in_use += memory.nbytes
        self._most = max(self._most, self._in_use)
        array = memory[:num_bytes].view(dtype).reshape(shape)
        # Whatever is made of the array refers to it or to `lent`, never to `memory`: numpy looks through to the first array
        # that is not of its own making, so a foreign owner stands in between.
        lent = np.asarray(_Lent(array))
        weakref.finalize(lent.base, self._back.append, memory).atexit = False
        return lent

    @property
    def num_bytes(self) -> int:
        """What it holds, in use or free."""
        self._collect()
        return self._in_use + sum(memory.nbytes for memory in self._free)

    def _collect(self) -> None:
        while self._back:
            memory = self._back.popleft()
            self._in_use -= memory.nbytes
            self._free.append(memory)


class _Lent:
    """The owner of an array, as numpy sees it."""

    def __init__(self, array: np.ndarray) -> None:
        self._array, self.__array_interface__ = array, array.__array_interface__
