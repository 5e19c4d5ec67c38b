"""Every backend that runs here agrees with the definition; the others say why not."""

import importlib.util

import pytest
import torch

from videofm.attention import AttentionSpec, choose
from videofm.attention.backends.flash_attn import BACKEND as FLASH
from videofm.attention.backends.math import BACKEND as MATH
from videofm.errors import ConfigError
from videofm.registry import ATTENTION_BACKENDS, lookup

SPEC = AttentionSpec(num_heads=3, head_width=8)
MASKED = AttentionSpec(num_heads=3, head_width=8, has_mask=True)


def qkv(num_queries=5, num_keys=7):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, 3, 8, generator=generator) for n in (num_queries, num_keys, num_keys)]


def masks():
    keep = torch.tensor([[1, 1, 1, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0, 0]]).bool()[:, None, None]
    return {"none": None, "bool": keep, "float": torch.randn(2, 1, 5, 7)}


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("name", ATTENTION_BACKENDS)
def test_backends_agree_with_the_definition(name, kind):
    spec = MASKED if kind != "none" else SPEC
    if reason := lookup(ATTENTION_BACKENDS, name, "attention backend").supports(spec):
        pytest.skip(reason)
    mask = masks()[kind]
    got = choose(name, spec)(*qkv(), mask)
    assert got.shape == (2, 5, 3, 8)
    torch.testing.assert_close(got, MATH(*qkv(), mask))


def test_the_definition_against_a_loop():
    """softmax(q k / sqrt(8)) v for one query of one head, from plain Python."""
    q, k, v = qkv()
    logits = torch.stack([(q[1, 2, 1] * k[1, s, 1]).sum() / 8**0.5 for s in range(7)])
    expected = (logits.exp() / logits.exp().sum()) @ v[1, :, 1]
    torch.testing.assert_close(MATH(q, k, v)[1, 2, 1], expected)


def test_masked_keys_have_no_influence():
    q, k, v = qkv()
    keep = masks()["bool"]
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[0, 3:5], changed_v[0, 3:5] = 99, 99
    for name in ("math", "sdpa"):
        attend = choose(name, MASKED)
        assert torch.equal(attend(q, k, v, keep), attend(q, changed_k, changed_v, keep))
        assert not torch.allclose(attend(q, k, v), attend(q, changed_k, changed_v))  # the control


def test_auto_takes_the_best_that_works_here():
    assert choose("auto", SPEC).name == "sdpa"


@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
def test_a_backend_that_is_not_installed_says_how_to_get_it(name):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    calls = r"3 heads of width 8, torch\.float32, on cpu, with no mask"
    with pytest.raises(ConfigError, match=rf"{calls}\. {name}: the package is not installed \(pip install videofm\[gpu\]\)"):
        choose(name, SPEC)


def test_flash_names_its_limits(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    half = {"dtype": torch.bfloat16, "device_type": "cuda"}
    assert "cuda only" in FLASH.supports(SPEC)
    assert "float16 or bfloat16" in FLASH.supports(AttentionSpec(3, 8, device_type="cuda"))
    assert "multiple of 8" in FLASH.supports(AttentionSpec(3, 12, **half))
    assert "no mask" in FLASH.supports(AttentionSpec(3, 8, **half, has_mask=True))
    assert FLASH.supports(AttentionSpec(3, 8, **half)) is None


def test_an_unknown_backend():
    with pytest.raises(ConfigError, match="no attention backend is called 'sdap', did you mean 'sdpa'"):
        choose("sdap", SPEC)
