"""Norm and rotation of queries and keys: the operation on the CPU, and its kernels in Triton's interpreter and compiler."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.ops.qk_norm_rope_cases import BF16, CASES, EPS, NAMES, Case, errors, expected, gradients, inputs
from tests.unit.sources import ROOT
from videofm.ops import qk_norm_rope as op
from videofm.ops.norm import RMSNorm
from videofm.ops.rope import RotaryTable

TOLERANCES = {"q": 1e-6, "k": 1e-6, "dq": 1e-5, "dk": 1e-5, "dw of q": 1e-5, "dw of k": 1e-5}
"""Of float32, relative to the largest element."""

ONE_ROUNDING = 2**-7
"""Of bfloat16, which has 8 significant bits; Triton's interpreter cuts the others off where a GPU rounds to nearest."""

IDS = [case.name for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_on_the_cpu_it_is_a_rotation_of_complex_numbers_after_the_norm(case: Case):
    """In bfloat16 it rounds twice, also in the gradients."""
    made = inputs(case)
    found = op.qk_norm_rope(made.q, made.k, made.q_norm, made.k_norm, made.table, case.pairs)
    assert (found.q.dtype, found.k.dtype) == (case.dtype, case.dtype)
    for name, error in errors(gradients(made, found), expected(case)).items():
        assert error <= (2 * ONE_ROUNDING if case.dtype == BF16 else TOLERANCES[name]), (name, error)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    """Case -> tensor -> error of the kernels; one process for all of them."""
    pytest.importorskip("triton", reason="triton, whose interpreter runs the kernels, is not installed")
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.ops.qk_norm_rope_cases"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_interpreted_kernels_give_outputs_and_gradients(case: Case, interpreted: dict[str, dict[str, float]]):
    """The gradients of the weights are float32 sums, whatever the dtype of the inputs."""
    for name in NAMES:
        rounded = case.dtype == BF16 and not name.startswith("dw")
        error = interpreted[case.name][name]
        assert error <= (ONE_ROUNDING if rounded else TOLERANCES[name]), (name, error)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_besides_its_inputs_the_kernel_keeps_one_number_a_row(case: Case, interpreted: dict[str, dict[str, float]]):
    """A row is a token, or a head of one; q and k have one number each."""
    batch, length, *rest = case.shape
    num_heads = rest[0] if case.pairs == "halves" else 1
    assert interpreted[case.name]["kept"] == 2 * batch * length * num_heads


class _Operators(TorchDispatchMode):
    """The operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class _NormOfAnotherKind(RMSNorm):
    """What tensor parallelism would put in place of the norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def _called_on_cuda(norm_class: type[RMSNorm], pairs: op.Pairs, shape: tuple[int, ...]) -> list[str]:
    """The operators of a call with tensors that claim to be on a GPU, and hold nothing."""
    with FakeTensorMode(), _Operators() as operators, torch.no_grad():
        q, k, weight = (torch.empty(size, device="cuda") for size in (shape, shape, shape[-1:]))
        angles = torch.empty((*shape[:2], 1, shape[-1]) if pairs == "halves" else shape, device="cuda")
        q_norm, k_norm = RMSNorm(shape[-1], eps=EPS), norm_class(shape[-1], eps=EPS)
        for norm in (q_norm, k_norm):
            norm.weight = torch.nn.Parameter(weight, requires_grad=False)
        found = op.qk_norm_rope(q, k, q_norm, k_norm, RotaryTable(angles, angles), pairs)
    assert (found.q.shape, found.k.shape) == (shape, shape)
    return operators.names


@pytest.mark.parametrize(("pairs", "shape"), [("adjacent", (2, 7, 96)), ("halves", (2, 7, 3, 48))])
def test_on_a_gpu_it_is_the_kernel_unless_a_norm_is_of_another_kind(pairs: op.Pairs, shape: tuple[int, ...], monkeypatch):
    pytest.importorskip("triton")
    for name in ("rotate", "rotate_halves"):
        monkeypatch.setattr(op, name, lambda x, table: x)  # without CUDA, torch has no complex numbers that claim to be on it
    operator = "videofm.qk_norm_rope.default"
    assert operator in _called_on_cuda(RMSNorm, pairs, shape)
    assert operator not in _called_on_cuda(_NormOfAnotherKind, pairs, shape)
    monkeypatch.setattr(op, "_HAS_TRITON", False)
    assert operator not in _called_on_cuda(RMSNorm, pairs, shape)


def test_on_the_cpu_compilation_sees_through_it():
    """The graph holds no operator of ours, and gives the same numbers."""
    case = CASES[0]
    made = inputs(case)
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    def call(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        found = op.qk_norm_rope(q, k, made.q_norm, made.k_norm, made.table, case.pairs)
        return found.q, found.k

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=backend, fullgraph=True)(made.q, made.k)
    for ours, theirs in zip(compiled, call(made.q, made.k), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    assert names
    assert not any("videofm" in name for name in names), names


class _NoDriver:
    """Answers what tracing asks of a GPU's driver."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def no_driver() -> Iterator[None]:
    """Triton believes in an H100 while a test runs."""
    pytest.importorskip("triton")
    from triton.runtime import driver

    driver.set_active(_NoDriver())
    yield
    driver.set_active(None)  # where it asks for a real one again


def test_compilation_takes_both_kernels_into_its_graphs(no_driver: None):
    """Forward and backward are one kernel each, and nothing but what a kernel writes is taken to change. Neither runs."""
    made = inputs(Case("", (2, 7, 5, 48)))
    changed: list[list[str]] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        for node in graph.graph.nodes:
            if "triton_kernel_wrapper" in str(node.target):
                changed.append(sorted(node.kwargs["tensors_to_clone"]))
        values = [node if node is None else node.meta["val"] for node in graph.graph.output_node().args[0]]
        return make_boxed_func(lambda *_: [x if x is None else torch.zeros(x.shape, dtype=x.dtype) for x in values])

    @torch.compile(backend=aot_autograd(fw_compiler=record), fullgraph=True)
    def call(q: Tensor, k: Tensor) -> op.QueriesAndKeys:
        return op.fused(q, k, made.q_norm, made.k_norm, made.table, "halves")

    torch._dynamo.reset()
    gradients(made, call(made.q, made.k))
    assert changed == [["k_out", "k_rstd", "q_out", "q_rstd"], ["dk", "dq", "k_partial", "q_partial"]]


@pytest.mark.parametrize("name", ["_forward_kernel", "_backward_kernel"])
@pytest.mark.parametrize(("width", "halves"), [(2048, False), (96, False), (128, True), (96, True)])
def test_the_kernels_compile_for_a_gpu_and_move_whole_vectors(name: str, width: int, halves: bool, no_driver: None):
    """For sm_80, without one: every tensor as wide as the inputs goes by 8 or 16 bytes a thread.

    Only the r of the rows, and the sums of the backward pass, which are stored once, may go by 4 bytes.
    """
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from videofm.ops.kernels import qk_norm_rope as kernels

    kernel, blocks = getattr(kernels, name), kernels._blocks(width, halves)
    options = {"num_warps": blocks.pop("num_warps")}
    if not halves:
        blocks["num_heads"] = 1  # what a launch makes of an argument that is 1
    signature = {argument: _triton_type(argument) for argument in kernel.arg_names} | dict.fromkeys(blocks, "constexpr")
    aligned = [
        (place,)
        for place, argument in enumerate(kernel.arg_names)
        if argument not in ("eps", "num_rows", "length", "num_heads", *blocks)
    ]
    constants = {(kernel.arg_names.index(argument),): value for argument, value in blocks.items()}
    source = ASTSource(kernel, signature, constants, {place: [["tt.divisibility", 16]] for place in aligned})
    ptx = compile_kernel(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]
    moves = Counter(re.findall(r"\b(ld|st)\.global\.(\S+)", ptx))
    narrow = {move: count for move, count in moves.items() if not move[1].startswith(("v2.b32", "v4.b32"))}
    wide = {move: count for move, count in moves.items() if move not in narrow}
    assert sum(wide.values()) >= 8, moves
    assert set(narrow) <= {("ld", "b32"), ("st", "b32")}, moves
    assert sum(narrow.values()) <= (2 if name == "_forward_kernel" else 6), moves


def _triton_type(argument: str) -> str:
    """Of an argument of the kernels, for bfloat16 inputs."""
    if argument in ("q", "k", "q_out", "k_out", "dq", "dk", "dq_out", "dk_out"):
        return "*bf16"
    if argument in ("cos", "sin") or argument.endswith(("weight", "rstd", "partial")):
        return "*fp32"
    return "fp32" if argument == "eps" else "i32"
