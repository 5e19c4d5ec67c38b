"""Metrics add up: of groups, of latencies, of one stage to the next; and on disk while the work goes on."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from data_pipelines.live import LiveMetrics
from data_pipelines.metrics import StageMetrics, latency_bin, quantile
from data_pipelines.rows import Loss
from videofm.run_dir import read_jsonl


def test_quantiles_of_a_merged_histogram_are_those_of_all_values():
    """A bin is a quarter of a doubling wide: the answer lies at most 2 ** 0.25 above the value itself."""
    rng = random.Random(0)
    values = [10 ** rng.uniform(-4, 2) for _ in range(2000)]
    merged: Counter[str] = Counter()
    for part in (values[:700], values[700:]):
        merged.update(Counter(map(latency_bin, part)))
    for share in (0.5, 0.95, 1.0):
        exact = sorted(values)[int(share * len(values)) - 1]
        found = quantile(merged, share)
        assert found is not None and exact * 0.999 <= found <= exact * 2**0.25 * 1.001
    assert quantile({}, 0.5) is None and quantile({latency_bin(0.0): 1}, 0.5) == pytest.approx(1e-6 * 2**0.25)


def test_stages_add_and_survive_json():
    one = StageMetrics("s", num_in=3, num_out=1, num_made=4, retries=2, bytes_in=5, wall_seconds=0.5)
    one.lose(Loss("dropped", "s", "x", "static"))
    one.lose(Loss("quarantined", "s", "y", "crash"))
    one.latency.update(["3", "3", "9"])
    two = StageMetrics.from_json(one.to_json())
    assert two == one
    two.add(one)
    two.check()
    assert (two.num_in, two.num_made, two.retries, two.bytes_in, two.wall_seconds) == (6, 8, 4, 10, 1.0)
    assert two.dropped == {"static": 2} and two.latency == {"3": 4, "9": 2}
    assert "latency" not in two.summary() and two.summary()["latency_p50"] < two.summary()["latency_p95"]


def test_live_lines_come_when_enough_time_has_passed(tmp_path):
    quiet = LiveMetrics(tmp_path / "quiet.jsonl", ["s"], every=3600.0)
    often = LiveMetrics(tmp_path / "often.jsonl", ["s"], every=0.0)
    for live in (quiet, often):
        live.begin("s", 1, 9)
        live.group_done([StageMetrics("s", num_in=2, num_out=2, num_made=2).to_json()])
        live.tell(5)
    assert list(read_jsonl(tmp_path / "quiet.jsonl")) == []
    (line,) = read_jsonl(tmp_path / "often.jsonl")
    assert (line["work"], line["groups_done"], line["groups_total"], line["groups_running"]) == ("s", 2, 9, 5)
    assert line["groups_waiting"] == 2
    assert line["stages"][0]["num_in"] == 2
    quiet.tell(0, force=True)
    assert len(list(read_jsonl(tmp_path / "quiet.jsonl"))) == 1
