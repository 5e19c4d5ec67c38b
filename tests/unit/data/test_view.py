"""Views: what stays follows from counting, thresholds are stored once, and a missing score never passes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from videofm.config.load import load
from videofm.config.view import ViewConfig
from videofm.data import quantiles, storage, view_report
from videofm.data import view as views
from videofm.data.manifest import Manifest
from videofm.data.quantiles import RowSample, lower_bound, upper_bound
from videofm.data.shards import ShardWriter
from videofm.data.view import FACT_COLUMNS, View, number
from videofm.errors import ConfigError, DataError

NUM_CLIPS = 40


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """40 clips in 4 shards: motion i / 40 in an order that is not the keys', blur only in shards 0 to 2, 8 clips held out."""
    folder = tmp_path_factory.mktemp("dataset")
    for shard in range(4):
        with ShardWriter(folder, f"{shard:05d}", "c" * 64) as writer:
            for index in range(shard, NUM_CLIPS, 4):
                scores = {"motion": (index * 7 % NUM_CLIPS) / NUM_CLIPS} | ({"blur": float(index)} if shard < 3 else {})
                writer.add(
                    f"k-{index:03d}", b"v" * index, num_frames=10 + index, fps=10.0, height=32, width=32 + index % 3 * 16,
                    caption="w" * index, source_id=f"s{index}", split="held_out" if index % 5 == 0 else "train", scores=scores,
                )  # fmt: skip
            writer.commit()
    return folder


def view(tmp_path: Path, text: str, name: str = "wide") -> View:
    path = tmp_path / f"{name}.yaml"
    path.write_text(text)
    return View.load(path)


def kept(found: View, dataset: Path) -> set[str]:
    manifest = Manifest.load(dataset)
    resolved = found.resolve(manifest)
    result = set()
    for table in views.tables(manifest, ["key", *resolved.columns]):
        result |= set(table["key"].filter(pyarrow.array(resolved.keep(table))).to_pylist())
    return result


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("{score: motion, min: 0.5}", lambda r: r.scores["motion"] >= 0.5),
        ("{score: motion, min: 0.25, max: 0.75}", lambda r: 0.25 <= r.scores["motion"] <= 0.75),
        ("{field: duration, max: 2.5}", lambda r: r.num_frames / r.fps <= 2.5),
        ("{field: aspect, min: 1.5}", lambda r: r.width / r.height >= 1.5),
        ("{field: pixels, max: 1024}", lambda r: r.height * r.width <= 1024),
        ("{field: caption_length, min: 12}", lambda r: len(r.caption) >= 12),
        ("{field: bytes, max: 20}", lambda r: r.size <= 20),
        ("{score: blur, min: 3, missing: drop}", lambda r: r.scores.get("blur", -1.0) >= 3),
        ("{score: blur, min: 3, missing: keep}", lambda r: r.scores.get("blur", 99.0) >= 3),
    ],
)
def test_absolute_rules_keep_what_a_loop_over_records_keeps(tmp_path, dataset, rule, expected):
    found = kept(view(tmp_path, f"rules: {{r: {rule}}}"), dataset)
    assert found == {record.key for record in Manifest.load(dataset).records() if expected(record)} and found


def test_every_fact_is_a_number(dataset):
    table = Manifest.load(dataset).read_shard(0)
    for name, columns in FACT_COLUMNS.items():
        assert set(columns) <= set(table.column_names)
        assert np.isfinite(number(table, None, name)).all()


@pytest.mark.parametrize("quantile", [0.0, 0.05, 0.1, 0.33, 0.5, 0.7, 0.975])
def test_quantiles_drop_and_keep_exactly_their_share(tmp_path, dataset, quantile):
    """The motions of the 40 clips differ, so a lower quantile q drops floor(40 q) and an upper one keeps ceil(40 q)."""
    share = round(quantile * 1000) * NUM_CLIPS
    assert (
        len(kept(view(tmp_path, f"rules: {{r: {{score: motion, min_quantile: {quantile}}}}}"), dataset)) == 40 - share // 1000
    )
    if quantile:
        many = len(kept(view(tmp_path, f"rules: {{r: {{score: motion, max_quantile: {quantile}}}}}"), dataset))
        assert many == -(-share // 1000)


def test_quantiles_are_of_the_splits_and_do_not_depend_on_other_rules(tmp_path, dataset):
    alone = view(tmp_path, "{splits: [train], rules: {m: {score: motion, min_quantile: 0.5}}}")
    text = "{splits: [train], rules: {d: {field: duration, max: 2.5}, m: {score: motion, min_quantile: 0.5}}}"
    manifest = Manifest.load(dataset)
    train = sorted(record.scores["motion"] for record in manifest.records("train"))
    assert alone.resolve(manifest).rules[0].min == train[16]  # of 32, 16 are smaller
    assert view(tmp_path, text, "other").resolve(manifest).rules[1].min == train[16]
    assert kept(alone, dataset) == {r.key for r in manifest.records("train") if r.scores["motion"] >= train[16]}


def test_thresholds_are_stored_and_then_nothing_is_scanned(tmp_path, dataset, monkeypatch):
    found, manifest = view(tmp_path, "rules: {m: {score: motion, min_quantile: 0.25}}", "stored"), Manifest.load(dataset)
    first = found.resolve(manifest, scan=True)
    stored = list((dataset / "views").glob("stored-*.json"))
    assert len(stored) == 1 and json.loads(stored[0].read_text())["manifest"] == manifest.hash
    monkeypatch.setattr(views, "tables", lambda *_: pytest.fail("the index is read again"))
    assert found.resolve(Manifest.load(dataset), scan=False) == first
    stored[0].write_text("{}")
    with pytest.raises(DataError, match=r"stored-[0-9a-f]{16}.json is damaged; delete it"):
        found.resolve(manifest)
    stored[0].unlink()


def test_a_trainer_computes_thresholds_that_cannot_be_stored(tmp_path, dataset, monkeypatch):
    """On a file system that is mounted to be read, or is full; who asked for them to be stored is told."""
    found, manifest = view(tmp_path, "rules: {m: {score: motion, min_quantile: 0.25}}", "unwritable"), Manifest.load(dataset)

    def create(path: Path, content: bytes) -> bool:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(storage, "_create_local", create)
    motion = sorted(record.scores["motion"] for record in manifest.records())
    assert found.resolve(manifest).rules[0].min == motion[10]
    with pytest.raises(DataError, match=r"view 'unwritable' cannot be stored in .*: Read-only file system; make the dataset"):
        found.resolve(manifest, scan=True)
    assert not list((dataset / "views").glob("unwritable-*"))


def test_a_large_dataset_is_not_scanned_by_a_trainer(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(views, "SCAN_LIMIT", NUM_CLIPS - 1)
    found = view(tmp_path, "rules: {m: {score: motion, min_quantile: 0.2}}", "large")
    with pytest.raises(
        DataError, match=r"\(40 clips\) are not stored yet; compute them once with `videofm data view large.yaml"
    ):
        found.resolve(Manifest.load(dataset))


def test_the_hash_is_of_what_decides(tmp_path, dataset):
    def of(text: str, name: str) -> str:
        return view(tmp_path, text, name).resolve(Manifest.load(dataset)).hash

    same = {of("rules: {a: {score: motion, min: 0.2}, b: {field: fps, max: 30}}", "a"),
            of("rules: {y: {field: fps, max: 30.0}, x: {score: motion, min: 0.2}}", "b")}  # fmt: skip
    assert len(same) == 1
    others = {
        of(f"{{{extra} rules: {{a: {{score: motion, min: {low}}}}}}}", "c")
        for extra in ("", "splits: [train],")
        for low in (0.2, 0.3)
    }
    assert len(others | same) == 5
    # Quantile or number, the same threshold is the same view.
    assert of("rules: {m: {score: motion, min_quantile: 0.5}}", "d") == of("rules: {m: {score: motion, min: 0.5}}", "e")


def test_a_missing_score_is_an_error_with_count_and_fix(tmp_path, dataset):
    manifest = Manifest.load(dataset)
    message = r"rule 'sharp' of the view: 10 of 40 clips have no score 'blur'.*`missing: drop` or `missing: keep`"
    found = view(tmp_path, "rules: {sharp: {score: blur, min: 3}}").resolve(manifest)
    with pytest.raises(DataError, match=message):
        view_report.report(found, manifest)
    with pytest.raises(DataError, match="10 of 10 clips have no score 'blur'"):
        found.keep(manifest.read_shard(3))
    with pytest.raises(DataError, match=message):
        view(tmp_path, "rules: {sharp: {score: blur, min_quantile: 0.5}}").resolve(manifest)
    with pytest.raises(DataError, match="no clip of the splits train, held_out has that score"):
        view(tmp_path, "rules: {sharp: {score: taste, min_quantile: 0.5, missing: keep}}").resolve(manifest)


def test_nan_is_missing(tmp_path):
    with ShardWriter(tmp_path, "0", "c") as writer:
        facts = {"num_frames": 1, "fps": 1.0, "height": 2, "width": 2, "caption": "", "source_id": "s", "split": "train"}
        writer.add("a", b"", scores={"motion": float("nan")}, **facts)
        writer.add("b", b"", scores={"motion": 1.0}, **facts)
        writer.commit()
    assert kept(view(tmp_path, "rules: {m: {score: motion, min: 0.5, missing: drop}}"), tmp_path) == {"b"}
    with pytest.raises(DataError, match="1 of 2 clips have no score 'motion'"):
        kept(view(tmp_path, "rules: {m: {score: motion, min: 0.5}}"), tmp_path)


def test_the_report_counts_alone_in_order_and_uniquely(tmp_path, dataset):
    found = view(tmp_path, "{splits: [train], rules: {m: {score: motion, min: 0.5}, d: {field: duration, max: 2.5}}}")
    manifest = Manifest.load(dataset)
    report = view_report.report(found.resolve(manifest), manifest)
    still = {r.key for r in manifest.records("train") if r.scores["motion"] < 0.5}
    long = {r.key for r in manifest.records("train") if r.num_frames > 25}
    m, d = report.rules
    assert (m.alone, m.in_order, m.uniquely) == (len(still), len(still), len(still - long))
    assert (d.alone, d.in_order, d.uniquely) == (len(long), len(long - still), len(long - still))
    stay = [r for r in manifest.records("train") if r.key not in still | long]
    assert report.num_kept == len(stay) == 32 - m.in_order - d.in_order and report.clips["train"] == len(stay)
    assert report.seconds["train"] == pytest.approx(sum(r.num_frames / r.fps for r in stay))
    assert report.other_splits == 8
    assert f"{len(stay)} clips stay ({len(stay) / 32:.1%})" in view_report.as_text(report)


def test_extends_replaces_rules_by_name_and_null_removes_one(tmp_path):
    (tmp_path / "base.yaml").write_text("rules: {a: {score: motion, min: 0.1}, b: {field: fps, max: 30}}")
    found = view(tmp_path, "extends: base.yaml\nrules: {a: {score: motion, min: 0.4}, b: null, c: {field: height, min: 9}}")
    assert {name: rule.min for name, rule in found.rules.items()} == {"a": 0.4, "c": 9}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("rules: {r: {score: motion}}", "a rule without a bound drops nothing"),
        ("rules: {r: {min: 1}}", "give either `score` or `field`"),
        ("rules: {r: {score: m, field: fps, min: 1}}", "give either `score` or `field`"),
        ("rules: {r: {field: fsp, min: 1}}", "did you mean 'fps'"),
        ("rules: {r: {score: motion, min: 1, min_quantile: 0.1}}", "min 1 and min_quantile 0.1 both bound it"),
        ("rules: {r: {score: motion, min: 1, max: 1}}", "lower bound 1 is not below the upper bound 1"),
        ("rules: {r: {score: motion, min_quantile: 1.0}}", "less than 1"),
        ("rules: {r: {field: fps, min: 1, missing: drop}}", "missing: drop has no effect"),
        ("rules: {r: {score: Motion, min: 1}}", "pattern"),
        ("rules: {r: {score: motion, minimum: 1}}", "unknown key, did you mean"),
        ("rules: {r: null}", "every rule is null"),
        ("rules: {}", "at least 1"),
        ("{splits: [train, train], rules: {r: {field: fps, min: 1}}}", "names one twice"),
    ],
)
def test_mistakes_are_told(tmp_path, text, match):
    path = tmp_path / "v.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=match):
        load(path, [], ViewConfig)


def test_a_sample_is_a_function_of_the_rows_and_within_its_error():
    """10,000 values are their own ranks, so a quantile of a sample of 2,000 is off by |value / 10,000 - q|, at most 3.7%."""
    rng = np.random.default_rng(0)
    rows = rng.permutation(10_000)
    samples = []
    for order, size in ((rows, 1), (np.sort(rows), 977), (rows[::-1], 10_000)):
        sample = RowSample(["x"], size=2_000)
        for part in np.array_split(order, -(-len(order) // size) if size > 1 else 37):
            sample.add([f"key-{value}" for value in part], {"x": part.astype(float)})
        samples.append(sample)
    first, *others = samples
    assert not first.exact and len(first.values("x")) == 2_000
    assert all(np.array_equal(first.values("x"), other.values("x")) for other in others)
    assert first.rank_error == pytest.approx((np.log(200) / 4000) ** 0.5)
    for q in np.linspace(0.05, 0.95, 19).round(2).tolist():
        assert abs(lower_bound(first.values("x"), q) / 10_000 - q) <= first.rank_error
        assert abs(upper_bound(first.values("x"), q) / 10_000 - q) <= first.rank_error


def test_up_to_its_size_a_sample_is_exact(monkeypatch):
    sample = RowSample(["x"], size=100)
    sample.add(map(str, range(100)), {"x": np.arange(100.0)})
    assert sample.exact and sample.rank_error == 0 and quantiles.NUM_EXACT == 1_000_000
    assert np.array_equal(sample.values("x"), np.arange(100.0))
