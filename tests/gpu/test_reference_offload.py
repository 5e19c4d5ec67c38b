"""A frozen reference in host memory is on the device only while it computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.unit.objectives.paired_batches import pairs
from tests.unit.objectives.test_reference import dit
from videofm.objectives.reference import Frozen


def test_an_offloaded_reference_leaves_the_device() -> None:
    """Its weights are there within the forward pass, bit for bit those it had, and pinned host memory outside of it."""
    device = torch.device("cuda")
    models = {"dit": dit().to(device), "reference": dit().to(device).requires_grad_(False)}
    wanted = {name: tensor.cpu().clone() for name, tensor in models["reference"].state_dict().items()}
    batch, of, seen = pairs().to(device), Frozen(offload=True), []

    def compute(model: nn.Module) -> Tensor:
        held = model.state_dict()
        assert all(tensor.is_cuda and torch.equal(tensor.cpu(), wanted[name]) for name, tensor in held.items())
        seen.append(torch.cuda.memory_allocated())
        return torch.zeros(6, 1, device=device)

    of.errors(models, batch, compute)
    outside = torch.cuda.memory_allocated()
    of.errors(models, batch, compute)
    assert torch.cuda.memory_allocated() == outside < seen[-1], "what the forward pass brought there has gone"
    held = models["reference"].state_dict()
    assert all(not tensor.is_cuda and tensor.is_pinned() and torch.equal(tensor, wanted[name]) for name, tensor in held.items())
