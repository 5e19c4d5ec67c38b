"""A run is the same run when what decides its result is the same: config without execution fields, and what it reads."""

from dataclasses import replace

import pytest

from tests.unit.data.preferred import candidates, neighbours
from videofm.config import CurateConfig, EvaluateConfig, SampleConfig, TrainConfig
from videofm.config.data import DataConfig
from videofm.data.preferences import write_preferences
from videofm.errors import ConfigError
from videofm.lineage import digest, outside_inputs
from videofm.run_dir import RunDirectory, fingerprint

TRAIN = {
    "kind": "train",
    "models": {"vae": {"name": "vae/ltx"}},
    "objective": {"kind": "autoencoder"},
    "data": {"manifest": "m", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 2, "num_micro_batches": 4},
    "optimizer": {"lr": 1e-3},
    "trainer": {"max_steps": 3},
}


def train(**sections) -> TrainConfig:
    merged = {key: {**value, **sections.get(key, {})} if isinstance(value, dict) else value for key, value in TRAIN.items()}
    extra = {key: value for key, value in sections.items() if key not in TRAIN}
    return TrainConfig.model_validate({**merged, **extra})


@pytest.mark.parametrize(
    "change",
    [
        {"parallel": {"data_degree": 2, "zero_stage": 3}},
        {"data": {"num_workers": 2, "cache_mib": 64}},
        {"trainer": {"log_every": 1, "checkpoint_every": 7, "num_threads": 1}},
        {"wandb": {"mode": "disabled"}},
    ],
)
def test_how_work_is_done_does_not_make_another_run(tmp_path, change):
    assert fingerprint(train(**change), {}) == fingerprint(train(), {})
    RunDirectory.create(tmp_path / "run", train())
    taken_up = RunDirectory.create(tmp_path / "run", train(**change))
    section, values = next(iter(change.items()))
    assert {key: taken_up.config[section][key] for key in values} == values, "the worker must see the new value"


@pytest.mark.parametrize(
    "change", [{"trainer": {"max_steps": 4}}, {"optimizer": {"lr": 2e-3}}, {"data": {"micro_batch_size": 4}}]
)
def test_what_decides_the_result_makes_another_run(tmp_path, change):
    assert fingerprint(train(**change), {}) != fingerprint(train(), {})
    RunDirectory.create(tmp_path / "run", train())
    section, values = next(iter(change.items()))
    with pytest.raises(ConfigError, match=rf"changed: {section}\.{next(iter(values))}\. "):
        RunDirectory.create(tmp_path / "run", train(**change))


def test_a_vote_the_other_way_is_another_input(tmp_path):
    """Preferences with one pair turned round: files of the same names and sizes."""
    pairs = neighbours(candidates(3))
    turned = [replace(pairs[0], winner=pairs[0].loser, loser=pairs[0].winner), *pairs[1:]]
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    for folder, written in ((one, pairs), (same, pairs), (other, turned)):
        write_preferences(folder, written, "clips")
    sizes = [[(file.name, file.stat().st_size) for file in sorted(folder.rglob("*.json*"))] for folder in (one, other)]
    assert sizes[0] == sizes[1]
    assert digest(one) == digest(same) != digest(other)


def test_a_file_more_in_the_source_is_another_input(tmp_path):
    source = tmp_path / "videos"
    source.mkdir()
    (source / "a.mp4").write_bytes(b"1")
    config = CurateConfig.model_validate({"kind": "curate", "source": str(source), "stages": [{"kind": "probe"}]})
    before = outside_inputs(config)
    assert list(before) == [f"source: {source}"] and outside_inputs(config) == before
    (source / "b.mp4").write_bytes(b"2")
    assert outside_inputs(config) != before
    assert outside_inputs(config, inside=tmp_path) == {}, "what a recipe made itself is covered by its stages' fingerprints"


def test_prompts_and_checkpoints_count_by_content(tmp_path):
    prompts, run = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("a cat\n")
    (run / "checkpoints" / "step_00000002").mkdir(parents=True)
    committed = run / "checkpoints" / "step_00000002" / "COMMITTED.json"
    committed.write_text("{}")
    size = {"num_frames": 9, "height": 32, "width": 32, "fps": 8.0}
    config = SampleConfig.model_validate({"kind": "sample", "run": str(run), "prompts_file": str(prompts), **size})
    before = outside_inputs(config)
    assert len(before) == 2 and digest(run) == digest(committed)
    (run / "log.txt").write_text("a log line is no other model")
    assert outside_inputs(config) == before
    prompts.write_text("a dog\n")
    assert [key for key, value in outside_inputs(config).items() if value != before[key]] == [f"prompts_file: {prompts}"]


def test_an_edited_view_is_another_input(tmp_path):
    """So are the files that it extends, and the views of datasets in a mix; a comment says nothing."""
    base, view = tmp_path / "base.yaml", tmp_path / "view.yaml"
    base.write_text("rules: {long: {field: num_frames, min: 9}}")
    view.write_text("extends: base.yaml\nrules: {fast: {score: motion, min: 0.5}}")
    mix = [{"name": "a", "manifest": "m", "weight": 1, "view": str(view)}]
    for config, field in (
        (train(data={"view": str(view)}), "data.view"),
        (train(data={"manifest": None, "mix": mix}), "data.mix.0.view"),
    ):
        before = outside_inputs(config)
        assert list(before) == [f"{field}: {view}"]
        for path in (view, base):
            text = path.read_text()
            path.write_text(text + "  # kept for its motion\n")
            assert outside_inputs(config) == before
            path.write_text(text.replace("min: ", "min: 1"))
            assert outside_inputs(config) != before
            path.write_text(text)
        assert outside_inputs(config) == before
    base.unlink()
    with pytest.raises(ConfigError, match=r"no such file.*\s+\(extended by .*view\.yaml:1\)"):
        outside_inputs(config)


def test_every_cache_of_a_mix_is_an_input(tmp_path):
    entry = tmp_path / "cache/manifest/shard-00000.latents.json"
    entry.parent.mkdir(parents=True)
    entry.write_text("{}")
    mix = [{"name": "a", "manifest": "m", "weight": 1}]
    cache = {"mix": {"a": str(tmp_path / "cache")}}
    values = {**TRAIN["data"], "manifest": None, "mix": mix, "start": "first", "cache": cache}
    config = DataConfig.model_validate(values)
    before = outside_inputs(config)
    assert list(before) == [f"cache.mix.a: {tmp_path / 'cache'}"]
    entry.write_text("{ }")
    assert outside_inputs(config) != before


def test_tokens_that_an_evaluation_reads_are_an_input(tmp_path, monkeypatch):
    """Once they are encoded anew, what was measured on them is of other clips. A section `cache` is no path itself."""
    entry = tmp_path / "tokens/manifest/shard-00000.tokens.json"
    entry.parent.mkdir(parents=True)
    entry.write_text("{}")
    metrics = [{"kind": "next_token", "run": str(tmp_path / "nowhere"), "cache": str(tmp_path / "tokens")}]
    config = EvaluateConfig.model_validate({"kind": "evaluate", "metrics": metrics})
    before = outside_inputs(config)
    assert list(before) == [f"metrics.0.cache: {tmp_path / 'tokens'}"]
    entry.write_text("{ }")
    assert outside_inputs(config) != before
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()  # the word in `mode`, which must not be taken for this folder
    values = {**TRAIN["data"], "start": "first", "cache": {"path": str(tmp_path / "tokens"), "mode": "full"}}
    assert list(outside_inputs(DataConfig.model_validate(values))) == [f"cache.path: {tmp_path / 'tokens'}"]
