"""What the benchmarks of quantizers and of autoregressive decoding say of given numbers: each aim is missed by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from tools.bench import ar_decode, quantizers


def test_each_aim_of_a_quantizer_is_seen() -> None:
    """Half the time, a twentieth of the bytes, 1 of 20,000 indices another: met. Twice the time, an eighth of the bytes, or as
    many indices in another order (their sum is the same): missed."""
    other = quantizers.Measured(2.0, 1000, np.arange(20_000))
    one_off = np.arange(20_000)
    one_off[7] = 3
    own = quantizers.Measured(1.0, 50, one_off)
    told, met = quantizers.verdict(own, other)
    assert met and "ratio 0.50; peak" in told and "ratio 0.050; 99.9950% of the indices equal; aims met" in told
    for changed, name in (
        (replace(own, seconds=4.0), "time"),
        (replace(own, peak=125), "peak"),
        (replace(own, indices=other.indices[::-1]), "indices"),
        (replace(own, indices=other.indices[:-1]), "indices"),
    ):
        told, met = quantizers.verdict(changed, other)
        assert not met and told.endswith(f"missed: {name}"), told


def test_each_aim_of_decoding_is_seen() -> None:
    """Six times faster and apart by half of 1e-5 of the largest logit. Fewer tokens than 1,024 have no aim in time."""
    logits = torch.tensor([[[1.0, -10.0]]])
    tokens = torch.tensor([[0, 1]])
    whole = ar_decode.Rollout(tokens, logits, 6.0)
    cached = ar_decode.Rollout(tokens, logits + 5e-5, 1.0)
    lines, met = ar_decode.verdict(cached, whole, 1024)
    assert met and lines[0] == "6.0 times faster (aim: at least 5, met)" and lines[1].endswith("(aim: at most 1e-05, met)")
    slow = replace(cached, seconds=2.0)
    for changed, line in ((slow, 0), (replace(cached, logits=logits + 2e-4), 1), (replace(cached, tokens=1 - tokens), 2)):
        lines, met = ar_decode.verdict(changed, whole, 1024)
        assert not met and ["MISSED" in told for told in lines] == [number == line for number in range(3)]
    lines, met = ar_decode.verdict(slow, whole, 512)
    assert met and lines[0] == "3.0 times faster (no aim)"
