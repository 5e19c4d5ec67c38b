"""The backends that run on CUDA only: their limits in words, and the calls that they make, on stand-ins for the packages.

A stand-in has the signatures of the real functions (as released) and computes by the definition, so these tests prove what lies
between: arguments, what is returned in which order, rows that see nothing, heads that share keys, documents packed end to end.
"""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from videofm.attention import AttentionSpec, MaskSpec, choose
from videofm.attention.backends import flash_attn, shared, xformers
from videofm.attention.backends.math import BACKEND as MATH
from videofm.attention.merge import BlockOutput
from videofm.errors import ConfigError, ParallelError

SPEC = AttentionSpec(num_heads=3, head_width=8)
HALF = {"dtype": torch.bfloat16, "device_type": "cuda"}
SCALE = 0.3
FLASH, XFORMERS = flash_attn.BACKEND, xformers.BACKEND

COMMON = """
import torch
from videofm.attention import MaskSpec
from videofm.attention.backends.math import BACKEND as MATH

def whole(q, k, v, causal):
    return MATH(q, k, v, MaskSpec.causal() if causal else None)

def packed(q, k, v, starts, longest, causal):
    assert starts.dtype == torch.int32
    lengths = starts.diff().tolist()
    assert longest == max(lengths) and min(lengths) > 0
    return MATH(q[None], k[None], v[None], MaskSpec.documents(lengths, causal))[0]

def as_kernel(lse):
    return lse.masked_fill(lse == -torch.inf, torch.inf)

def gradients(dout, q, k, v, out, lse, scale):
    assert lse.is_contiguous() and not (lse == -torch.inf).any()
    return MATH.backward(dout, q, k, v, out, lse, None, scale)
"""
VERSION_2 = (
    COMMON
    + """
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    return whole(q, k, v, causal)

def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, causal=False):
    return packed(q, k, v, cu_seqlens_q, max_seqlen_q, causal)

def _flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
                        return_softmax):
    assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
    result = MATH.forward(q, k, v, None, softmax_scale)
    return result.out, as_kernel(result.lse), None, None

def _flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
                         window_size_right, softcap, alibi_slopes, deterministic, rng_state=None):
    assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
    for target, gradient in zip((dq, dk, dv), gradients(dout, q, k, v, out, softmax_lse, softmax_scale)):
        target.copy_(gradient)
"""
)
VERSION_3 = (
    COMMON
    + """
def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
    return whole(q, k, v, causal)

def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, causal=False):
    return packed(q, k, v, cu_seqlens_q, max_seqlen_q, causal)

def _flash_attn_forward(q, k, v, k_new=None, v_new=None, qv=None, out_=None, softmax_scale=None, causal=False):
    result = MATH.forward(q, k, v, None, softmax_scale)
    return result.out, as_kernel(result.lse), None, None

def _flash_attn_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, dq=None, dk=None, dv=None,
                         softmax_scale=None, is_causal=False):
    for target, gradient in zip((dq, dk, dv), gradients(dout, q, k, v, out, softmax_lse, softmax_scale)):
        target.copy_(gradient)
"""
)
VERSION_4 = (
    COMMON
    + """
def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
    return whole(q, k, v, causal), None

def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, causal=False):
    return packed(q, k, v, cu_seqlens_q, max_seqlen_q, causal), None

def _flash_attn_fwd(q, k, v, cu_seqlens_q=None, softmax_scale=None, causal=False, return_lse=False):
    result = MATH.forward(q, k, v, None, softmax_scale)
    return result.out, as_kernel(result.lse) if return_lse else None

def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False):
    return gradients(dout, q, k, v, out, lse, softmax_scale)
"""
)
FILES = {2: "flash_attn/flash_attn_interface.py", 3: "flash_attn_interface.py", 4: "flash_attn/cute/interface.py"}
SOURCES = {2: VERSION_2, 3: VERSION_3, 4: VERSION_4}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts stand-ins for some versions of FlashAttention where Python finds them, and takes them away again."""
    kept = {name: module for name, module in sys.modules.items() if name.startswith("flash_attn")}

    def forget():
        for name in [name for name in sys.modules if name.startswith("flash_attn")]:
            del sys.modules[name]
        flash_attn._api.cache_clear()
        importlib.invalidate_caches()

    def place(*versions):
        for version in versions:
            path = tmp_path / FILES[version]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(SOURCES[version])
        monkeypatch.syspath_prepend(tmp_path)
        forget()

    yield place
    forget()
    sys.modules.update(kept)


def tensors(num_queries=5, num_keys=7, heads=(6, 2), batch_size=2):
    generator = torch.Generator().manual_seed(0)
    sizes = [(num_queries, heads[0]), (num_keys, heads[1]), (num_keys, heads[1]), (num_queries, heads[0])]
    return [torch.randn(batch_size, length, n, 8, generator=generator, dtype=torch.float64) for length, n in sizes]


def check_against_math(backend, mask):
    """Foreign out and lse, one row of which sees nothing in the whole softmax."""
    q, k, v, dout = tensors()
    got, expected = (x.forward(q, k, v, mask, SCALE) for x in (backend, MATH))
    torch.testing.assert_close((got.out, got.lse), (expected.out, expected.lse))
    lse = expected.lse + 0.7  # as if there were other blocks
    if mask is not None:
        lse[0, 0, 1] = -torch.inf
    out = (expected.out * 0.5).transpose(0, 1).contiguous().transpose(0, 1)
    strided = lse.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    results = [x.backward(dout, q, k, v, out, strided, mask, SCALE) for x in (backend, MATH)]
    torch.testing.assert_close(*results)
    q, k, v, dout = tensors(0, 7)
    nothing = backend.forward(q, k, v, None, SCALE)
    assert nothing.lse.shape == (2, 6, 0)
    assert not any(x.any() for x in backend.backward(dout, q, k, v, nothing.out, nothing.lse, None, SCALE))


# --- FlashAttention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", FILES)
def test_flash_blocks(install, version):
    install(version)
    if not torch.cuda.is_available() and version in flash_attn.ORDER[9]:
        assert flash_attn.installed_version() == version
    check_against_math(FLASH, None)
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[1] = False
    check_against_math(FLASH, mask)  # goes to PyTorch's kernel


def test_flash_is_told_of_dead_rows_in_its_own_way(install):
    """A row whose lse is -inf adds nothing: the kernel computes `exp(logit - lse)`, which is 0 for +inf."""
    install(2)
    q, k, v, dout = tensors()
    result = MATH.forward(q, k, v, None, SCALE)
    lse = result.lse.clone()
    lse[:, :, 1] = -torch.inf
    dq, dk, _ = FLASH.backward(dout, q, k, v, result.out, lse, None, SCALE)
    assert not dq[:, 1].any()
    live = [0, 2, 3, 4]
    _, expected, _ = MATH.backward(dout[:, live], q[:, live], k, v, result.out[:, live], lse[..., live], None, SCALE)
    torch.testing.assert_close(dk, expected)


@pytest.mark.parametrize("version", FILES)
def test_flash_calls(install, version):
    install(version)
    q, k, v, _ = tensors(9, 9)
    rules = [
        None,
        MaskSpec.full(),
        MaskSpec.causal(),
        MaskSpec.block_causal(4, 9),
        MaskSpec.block_causal(4, 9, window=5, num_sink=2),
        MaskSpec.documents([2, 0, 4, 3]),
        MaskSpec.documents([2, 0, 4, 3], causal=True),
    ]
    for mask in rules:
        torch.testing.assert_close(FLASH(q, k, v, mask), MATH(q, k, v, mask), msg=lambda text, mask=mask: f"{mask}: {text}")
    for mask in (MaskSpec.causal(window=3), MaskSpec.key_padding([3, 9]), torch.ones(9, 9, dtype=torch.bool)):
        with pytest.raises(ConfigError, match=r"flash_attn takes no dense mask \(padding, windows\): choose sdpa or flex"):
            FLASH(q, k, v, mask)
    with pytest.raises(ParallelError, match="lengths of documents add up to 8, but the sequence has 9"):
        FLASH(q, k, v, MaskSpec.documents([8]))


def test_the_best_version_for_the_gpu(install, monkeypatch):
    install(2, 3, 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for major, version in {8: 2, 9: 3, 10: 4, 12: 2}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda major=major: (major, 0))
        assert flash_attn.installed_version() == version


def test_looking_for_a_version_imports_nothing(install):
    install(2, 4)
    assert flash_attn.installed_version() is not None
    assert not [name for name in sys.modules if name.startswith("flash_attn")]


def test_flash_names_its_limits(install):
    install(2, 3)
    assert "cuda only" in FLASH.supports(SPEC)
    assert "float16 or bfloat16" in FLASH.supports(AttentionSpec(3, 8, device_type="cuda"))
    assert "multiple of 8" in FLASH.supports(AttentionSpec(3, 12, **HALF))
    assert "multiple of 8 up to 256" in FLASH.supports(AttentionSpec(3, 264, **HALF))
    assert "no mask" in FLASH.supports(AttentionSpec(3, 8, **HALF, has_mask=True))
    assert FLASH.supports(AttentionSpec(3, 8, **HALF, needs_lse=True)) is None


@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
def test_a_backend_that_is_not_installed_says_how_to_get_it(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    calls = r"3 heads of width 8, torch\.float32, on cpu, with no mask"
    with pytest.raises(
        ConfigError, match=rf"{calls}\. {name}: the package is not installed \(pip install -c constraints\.txt -e '\.\[gpu\]'\)"
    ):
        choose(name, SPEC)


# --- xFormers -----------------------------------------------------------------------------------------------------------


class LowerTriangular:
    """What `xformers.ops.LowerTriangularMask` says, by name."""


def xformers_ops():
    """The three functions: heads must match, a bias must be full in all but its strides, rows of lse are padded to 32."""

    def attend(q, k, v, attn_bias=None, scale=None):
        assert k.shape[2] == q.shape[2]
        if isinstance(attn_bias, LowerTriangular):
            return MATH.forward(q, k, v, torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(), q.shape[-1] ** -0.5)
        if attn_bias is not None:
            assert attn_bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
            assert attn_bias.stride(-2) % 8 == 0
        return MATH.forward(q, k, v, attn_bias, scale or q.shape[-1] ** -0.5)

    def forward(q, k, v, attn_bias=None, p=0.0, scale=None):
        result = attend(q, k, v, attn_bias, scale)
        lse = result.lse.masked_fill(result.lse == -torch.inf, 0.0)
        return result.out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)

    def backward(grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None):
        assert lse.is_contiguous()
        assert lse.isfinite().all()
        return MATH.backward(grad, query, key, value, output, lse, attn_bias, scale)

    return SimpleNamespace(
        memory_efficient_attention=lambda *args, **options: attend(*args, **options).out,
        memory_efficient_attention_forward_requires_grad=forward,
        memory_efficient_attention_backward=backward,
        LowerTriangularMask=LowerTriangular,
    )


def test_xformers_blocks(monkeypatch):
    monkeypatch.setattr(xformers, "_ops", xformers_ops)
    check_against_math(XFORMERS, None)
    mask = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[0, 0, 1] = False
    check_against_math(XFORMERS, mask)


def test_xformers_calls(monkeypatch):
    monkeypatch.setattr(xformers, "_ops", xformers_ops)
    q, k, v, _ = tensors(9, 9)
    rules = [
        MaskSpec.causal(),
        MaskSpec.causal(window=3),
        MaskSpec.key_padding([3, 9]),
        MaskSpec.documents([4, 5], causal=True),
    ]
    for mask in [None, torch.rand(2, 1, 1, 9) < 0.8, torch.randn(9, 9), *rules]:
        torch.testing.assert_close(XFORMERS(q, k, v, mask), MATH(q, k, v, mask))


def test_xformers_names_its_limits(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "cuda only" in XFORMERS.supports(SPEC)
    assert "no float64" in XFORMERS.supports(AttentionSpec(3, 8, torch.float64, "cuda"))
    assert "multiple of 8" in XFORMERS.supports(AttentionSpec(3, 12, **HALF))
    assert XFORMERS.supports(AttentionSpec(3, 8, **HALF, has_mask=True, needs_lse=True)) is None


# --- what kernels need to be told ---------------------------------------------------------------------------------------


def test_lse_for_a_kernel_is_contiguous_and_without_minus_infinity():
    lse = torch.tensor([[[0.5, -torch.inf, 2.0]]]).transpose(1, 2).expand(1, 3, 2).transpose(1, 2)
    told = shared.finite_lse(lse, torch.inf)
    assert told.is_contiguous()
    assert torch.equal(told, lse.masked_fill(lse == -torch.inf, torch.inf))


def test_a_bias_starts_its_rows_at_aligned_places_and_stays_expanded():
    mask, (q, *_) = torch.rand(2, 1, 1, 7) < 0.5, tensors()
    bias = shared.aligned_bias(mask, q, 7, 16)
    assert torch.equal(bias, shared.additive(mask, q.dtype).expand(2, 6, 5, 7))
    assert shared.aligned_bias(torch.ones(5, 7, dtype=torch.bool), q, 7, 16).stride() == (0, 0, 16, 1)


def test_dead_rows_are_marked_whatever_the_kernel_said():
    wrong = BlockOutput(torch.ones(1, 2, 1, 3), torch.full((1, 1, 2), torch.inf))
    marked = shared.mark_dead(wrong, shared.dead_rows(torch.tensor([[False, False], [True, False]])))
    assert marked.out[0, :, 0, 0].tolist() == [0.0, 1.0]
    assert marked.lse[0, 0].tolist() == [-torch.inf, torch.inf]
