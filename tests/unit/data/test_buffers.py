"""Memory that is used again: never by two at a time, and never more of it than was needed at once."""

from __future__ import annotations

import gc
import threading

import numpy as np
import torch

from videofm.data.buffers import Buffers


def test_memory_comes_back_when_nothing_refers_to_it():
    buffers = Buffers()
    first = buffers.take((2, 3), np.float32)
    assert first.shape == (2, 3) and first.dtype == np.float32 and first.flags.writeable
    address = first.ctypes.data
    view = torch.from_numpy(first)[1:].numpy().reshape(-1).view(np.uint8)
    del first
    assert buffers.take((2, 3), np.float32).ctypes.data != address  # the view of the view still holds it
    assert buffers.num_made == 2
    del view
    taken = [buffers.take((6,), np.float32) for _ in range(2)]
    assert buffers.num_made == 2 and address in [array.ctypes.data for array in taken]


def test_two_users_never_share():
    """Many arrays live at once, each holding its own number, and are dropped in any order and by any thread."""
    buffers, rng = Buffers(), np.random.default_rng(0)
    live: dict[int, torch.Tensor] = {}
    for number in range(400):
        tensor = torch.from_numpy(buffers.take((int(rng.integers(1, 50)), 3), np.int64))
        live[number] = tensor.fill_(number)
        del tensor
        if len(live) > 7:
            dropped = [live.pop(key) for key in rng.choice(list(live), 3, replace=False).tolist()]
            thread = threading.Thread(target=dropped.clear)
            thread.start()
            thread.join()
        assert all((tensor == key).all() for key, tensor in live.items())
    assert buffers.num_made < 400


def test_it_holds_what_was_in_use_at_once():
    """Three arrays of 100 bytes at once, then one after the other of other sizes: 300 bytes are never passed."""
    buffers = Buffers()
    three = [buffers.take((100,), np.uint8) for _ in range(3)]
    assert buffers.num_bytes == 300
    three.clear()
    assert buffers.num_bytes == 300  # free, and kept
    for size in (10, 90, 260, 300, 1, 150):
        array = buffers.take((size,), np.uint8)
        assert array.nbytes == size and buffers.num_bytes <= 300
        del array
    gc.collect()
    assert buffers.num_bytes <= 300
