"""Histograms of scores: every value counts once, and a threshold splits all of them."""

from __future__ import annotations

import numpy as np
import pytest

from videofm.report.histogram import NUM_BINS, Histogram, Spread, Threshold, figure


def spread_of(values: np.ndarray) -> Spread:
    spread = Spread()
    for part in np.array_split(values, 3):
        spread.add(part)
    return spread


def filled(values: np.ndarray, lost: np.ndarray, *thresholds: Threshold) -> Histogram:
    histogram = Histogram.over("motion", spread_of(np.concatenate([values, lost])), thresholds)
    for part in np.array_split(values, 4):
        histogram.add(part, kept=True)
    histogram.add(lost, kept=False)
    return histogram


def test_bins_are_those_of_numpy_and_parts_add_up() -> None:
    """Filled in parts, the counts are those that numpy finds over all values at once in the same edges."""
    rng = np.random.default_rng(0)
    kept, lost = rng.normal(5, 1, 400), rng.normal(3, 1, 100)
    histogram = filled(kept, lost)
    assert not histogram.log
    assert histogram.kept.tolist() == np.histogram(kept, histogram.edges)[0].tolist()
    assert histogram.lost.tolist() == np.histogram(lost, histogram.edges)[0].tolist()
    assert (histogram.num_kept, histogram.num_lost) == (400, 100)
    assert histogram.total == pytest.approx(kept.sum() + lost.sum())


def test_a_threshold_refuses_what_lies_beyond_it_and_passes_its_own_value() -> None:
    """A rule keeps its limits themselves: of 1..10, `min 3` refuses 1 and 2, `max 3` refuses 4 to 10."""
    values = np.arange(1.0, 11.0)
    histogram = filled(values, values[:0], Threshold("min", 3.0, "filter"), Threshold("max", 3.0, "late"))
    assert histogram.refused == [2, 7]
    page = figure(histogram)
    assert "filter: min 3</span> 2 below, 8 pass" in page
    assert "late: max 3</span> 7 above, 3 pass" in page
    assert page.count('<line class="limit"') == 2


def test_crowded_values_are_binned_by_their_logarithm_and_lose_nothing() -> None:
    """Of values over six decades with zeros among them, all are counted; zeros stand in the first bin."""
    values = np.concatenate([np.zeros(5), np.geomspace(1e-3, 1e3, 200)])
    histogram = filled(values, values[:0])
    assert histogram.log
    assert histogram.edges[0] == pytest.approx(1e-3)
    assert np.allclose(np.diff(np.log(histogram.edges)), np.log(1e6) / NUM_BINS)
    assert histogram.num_kept == 205
    assert histogram.kept[0] >= 5
    assert not filled(np.array([-1.0, *values]), values[:0]).log  # no logarithm of what is below zero
    assert not filled(np.array([0.001, *np.linspace(0.3, 0.5, 50)]), values[:0]).log  # one outlier does not make it crowded


def test_an_axis_reaches_near_thresholds_and_not_far_ones() -> None:
    values = np.linspace(0.2, 0.4, 50)
    near = filled(values, values[:0], Threshold("max", 0.5, "filter"))
    far = filled(values, values[:0], Threshold("max", 1e6, "filter"))
    assert near.edges[-1] == pytest.approx(0.5)
    assert far.edges[-1] == pytest.approx(0.4)
    assert "off the axis" in figure(far)
    assert '<line class="limit"' not in figure(far)
    assert "off the axis" not in figure(near)


@pytest.mark.parametrize("value", [0.0, 7.5, -2.0])
def test_one_value_and_none(value: float) -> None:
    """Equal values make one bar on an axis that has a width; no value makes an empty axis."""
    histogram = filled(np.full(9, value), np.array([]))
    assert histogram.kept.max() == 9
    assert histogram.edges[0] < value < histogram.edges[-1]
    assert figure(histogram).count('<rect class="kept"') == 1
    empty = filled(np.array([]), np.array([]))
    assert "<rect" not in figure(empty)


def test_texts_are_escaped() -> None:
    histogram = Histogram.over("<b>", Spread(), [Threshold("min", 0.5, "<i>")])
    page = figure(histogram, "<u>")
    assert not any(mark in page for mark in ('of <b>"', "<i>", "<u>"))
    assert "&lt;b&gt;" in page and "&lt;i&gt;" in page and "&lt;u&gt;" in page
