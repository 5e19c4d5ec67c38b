"""The configuration: each mistake has its message, with its place, the rule and the nearest name; all are told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from videofm.config import CurateConfig, RecipeConfig, TrainConfig
from videofm.config.describe import describe, json_schema, schema_of, schemas
from videofm.config.load import interpolate, load
from videofm.config.source import parse
from videofm.errors import ConfigError

TRAIN = """\
kind: train
models:
  vae: {name: vae/ltx}
objective: {kind: autoencoder, kl: {weight: 2e-4}}
data: {manifest: shards, num_frames: 9, height: 32, width: 32, micro_batch_size: 4}
optimizer:
  lr: 3e-4
trainer: {max_steps: 10}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Write a file into an empty current directory and return its name."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str, name: str = "config.yaml") -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return name

    return write_file


def test_values_are_yaml_1_2(write) -> None:  # type: ignore[no-untyped-def]
    config = load(write(TRAIN), schema=TrainConfig)
    assert config.objective.kl.weight == 2e-4  # PyYAML reads `2e-4` as text
    assert config.optimizer.lr == 3e-4
    assert config.parallel.data_degree == 1


def test_all_mistakes_are_told_at_once_with_their_lines(write) -> None:  # type: ignore[no-untyped-def]
    text = (
        TRAIN.replace("max_steps: 10", "max_stpes: 10")
        .replace("lr: 3e-4", "lr: -1.0")
        .replace("num_frames: 9", "num_frames: nine")
    )
    with pytest.raises(ConfigError) as caught:
        load(write(text), ["wandb.mod=offline", "seed=-3"], TrainConfig)
    message = str(caught.value)
    assert "config.yaml is not a valid train config: 6 problems" in message
    for line in (
        "config.yaml:5: data.num_frames = 'nine'\n      must be an integer",
        "config.yaml:7: optimizer.lr = -1.0\n      must be greater than 0",
        "config.yaml:8: trainer.max_steps is missing\n      required: Optimizer steps.",
        "config.yaml:8: trainer.max_stpes = 10\n      unknown key, did you mean 'max_steps'?",
        "override wandb.mod=offline\n      unknown key, did you mean 'mode'?",
        "override seed=-3\n      must be greater than or equal to 0",
    ):
        assert line in message


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (
            "kind: autoencoder",
            "kind: autoencodr",
            "no kind is called 'autoencodr', did you mean 'autoencoder'.*Kinds: autoencoder, flow_m",
        ),
        ("kind: autoencoder,", "", "config.yaml:4: objective\n.*`kind` is missing. Kinds: autoencoder, flow_matching"),
        ("name: vae/ltx", "size: tiny", "models.vae\n.*give either `name`"),
        ("lr: 3e-4", "lr: '3e-4'", "optimizer.lr = '3e-4'\n.*a number without quotes"),
        ("height: 32", "height: 32.5", "data.height = 32.5\n.*a whole number, not 32.5"),
        ("kind: train", "kind: sample", "kind = 'sample'\n.*must be 'train'"),
        ("trainer: {", "trainer: {precision: bf16_autocst, ", "must be 'fp32' or 'bf16_autocast', did you mean"),
        ("micro_batch_size: 4", "micro_batch_size: 4, verify_checksums: yes", "write `true` or `false`"),
        ("name: vae/ltx", "name: 3", "put it in quotes, '3'"),
        (
            "name: vae/ltx",
            "name: vae/lxt",
            "models.vae.name = 'vae/lxt'\n.*no model is called 'vae/lxt', did you mean 'vae/ltx'",
        ),
        ("name: vae/ltx", "name: vae/ltx, attention: sdp", "no attention backend is called 'sdp', did you mean 'sdpa'"),
        ("lr: 3e-4", "lr: 3e-4\n  lr: 1e-4", "config.yaml:8: duplicate key 'optimizer.lr', first given on line 7"),
        ("lr: 3e-4", "lr: [3e-4", "config.yaml:8: not valid YAML"),
        ("lr: 3e-4", "lr: !!python/object:os.system 3", "config.yaml:7: the tag .* is not allowed"),
        ("optimizer:", "1: 2\noptimizer:", "config.yaml:6: 1 = 2\n.*unknown key"),
    ],
)
def test_message_of_each_mistake(write, old: str, new: str, match: str) -> None:  # type: ignore[no-untyped-def]
    assert old in TRAIN
    with pytest.raises(ConfigError, match=f"(?s){match}"):
        load(write(TRAIN.replace(old, new)), schema=TrainConfig)


def test_a_mistake_in_a_list_of_stages_is_told_in_its_place(write) -> None:  # type: ignore[no-untyped-def]
    text = "source: s\nstages:\n  - {kind: probe}\n  - {kind: splitt}\n  - {kind: split, min_framse: 9}\n"
    with pytest.raises(ConfigError) as caught:
        load(write("kind: curate\n" + text), schema=CurateConfig)
    for line in (
        "config.yaml:5: stages.1\n      no kind is called 'splitt', did you mean 'split'? Kinds: probe,",
        "config.yaml:6: stages.2.min_framse = 9\n      unknown key, did you mean 'min_frames'? Split config has:",
    ):
        assert line in str(caught.value)


def test_a_rule_over_two_fields_is_told(write) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=r"data_degree 2 does not divide data.num_micro_batches 1"):
        load(write(TRAIN), ["parallel.data_degree=2"], TrainConfig)


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("trainer", "an override is `key.path=value`"),
        ("optimizer.betas.2=0.5", "optimizer.betas is a list of 2; take an index from 0 to 1, not '2'"),
        ("optimizer.lr.x=1", r"optimizer.lr is a number \(0.0003\), it has no key 'x'"),
        ("optimizer.lr=[1", "override optimizer.lr=\\[1:1: not valid YAML"),
    ],
)
def test_wrong_overrides(write, override: str, match: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=match):
        load(write(TRAIN), ["optimizer.betas=[0.9, 0.95]", override], TrainConfig)


def test_overrides_reach_defaults_lists_and_whole_sections(write) -> None:  # type: ignore[no-untyped-def]
    section = "data={manifest: other, num_frames: 17, height: 64, width: 64, micro_batch_size: 1}"
    overrides = ["wandb.mode=disabled", "optimizer.betas=[0.8, 0.9]", "optimizer.betas.1=0.95", section]
    config = load(write(TRAIN), overrides, TrainConfig)
    assert config.wandb.mode == "disabled"
    assert config.optimizer.betas == [0.8, 0.95]
    assert (config.data.manifest, config.data.num_frames) == ("other", 17)


def test_extends_merges_and_a_new_kind_replaces(write) -> None:  # type: ignore[no-untyped-def]
    write(TRAIN, "base/base.yaml")
    child = "extends: base/base.yaml\noptimizer: {weight_decay: 0.0}\nobjective: {kind: flow_matching}\n"
    config = load(write(child), schema=TrainConfig)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (3e-4, 0.0)
    assert config.objective.kind == "flow_matching"


def test_mistakes_keep_the_file_they_are_in(write) -> None:  # type: ignore[no-untyped-def]
    write(TRAIN.replace("max_steps: 10", "max_steps: 0"), "base.yaml")
    with pytest.raises(ConfigError) as caught:
        load(write("extends: base.yaml\noptimizer: {lr: 0.0}\n"), schema=TrainConfig)
    assert "base.yaml:8: trainer.max_steps = 0" in str(caught.value)
    assert "config.yaml:2: optimizer.lr = 0.0" in str(caught.value)


def test_extends_in_a_circle(write) -> None:  # type: ignore[no-untyped-def]
    write("extends: a.yaml\n", "b.yaml")
    with pytest.raises(ConfigError, match=r"goes in a circle: a.yaml -> b.yaml -> a.yaml"):
        load(write("extends: b.yaml\n", "a.yaml"), schema=TrainConfig)


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("confg.yaml", "no such file, did you mean config.yaml"),
        ("zzz.yaml", "no such file; . has config.yaml"),
        ("nowhere/config.yaml", "there is no folder nowhere"),
        (".", "this is a folder"),
    ],
)
def test_missing_file(write, path: str, match: str) -> None:  # type: ignore[no-untyped-def]
    write(TRAIN)
    with pytest.raises(ConfigError, match=match):
        load(path, schema=TrainConfig)


def test_a_file_that_is_no_mapping(write) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="a config is a mapping"):
        load(write("- 1\n- 2\n"), schema=TrainConfig)


def test_aliases_cannot_grow_without_bound(write) -> None:  # type: ignore[no-untyped-def]
    """Nine levels of ten aliases each would be a billion values."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 10)]
    with pytest.raises(ConfigError, match="too large"):
        load(write("\n".join(lines)), schema=TrainConfig)


def test_a_merge_key_fills_in_what_a_mapping_does_not_say() -> None:
    """YAML's own rule: a key that is given replaces the whole of the other's; the other may have a `<<` too."""
    source = parse(
        """base: &base
  a: {x: 1, y: 2}
  b: [1, 2]
middle: &middle
  <<: *base
  c: 3
top:
  b: 4
  <<: *middle
  a: {y: 5}
""",
        "file",
    )
    assert source.values["middle"] == {"a": {"x": 1, "y": 2}, "b": [1, 2], "c": 3}
    assert source.values["top"] == {"a": {"y": 5}, "b": 4, "c": 3}
    assert source.origin(("top", "a", "y")) == "file:10" and source.origin(("top", "b")) == "file:8"
    assert source.origin(("top", "c")) == "file:6" and source.origin(("middle", "b", 1)) == "file:3"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: &a {x: 1}\nb: {<<: [*a]}", "file:2: `<<` takes one mapping"),
        ("a: &a {x: 1}\nb:\n  <<: *a\n  <<: *a", "file:4: `<<` twice"),
        ("a: &a {x: 1, x: 2}\nb: {<<: *a}", "duplicate key 'a.x'"),
        ("a: &a {<<: *a}", "not valid YAML"),
    ],
)
def test_merge_keys_that_are_refused(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse(text, "file")


def test_defaults_fill_what_nobody_said(write) -> None:  # type: ignore[no-untyped-def]
    config = load(write(TRAIN.replace("kind: train\n", "")), schema=TrainConfig, defaults={"kind": "train", "seed": 7})
    assert config.seed == 7


def test_interpolate() -> None:
    assert interpolate({"a": ["${run}/x", "$${run}", 3]}, {"run": "r"}) == {"a": ["r/x", "${run}", 3]}
    with pytest.raises(ConfigError, match=r"no \$\{rum\}, did you mean \$\{run\}\?"):
        interpolate("${rum}", {"run": "r"})
    with pytest.raises(ConfigError, match="without its"):
        interpolate("${run", {"run": "r"})


@pytest.mark.parametrize("name", list(schemas()))
def test_every_field_is_described_and_has_a_json_schema(name: str) -> None:
    text = describe(schema_of(name))
    for field, info in schema_of(name).model_fields.items():
        if field != "kind":
            assert info.description, f"{name}.{field} has no description"
            assert f"{field}: " in text
    assert "extends" in json_schema(name)["properties"]


def test_a_kind_that_chooses_no_section_is_a_field_like_others() -> None:
    lines = describe(TrainConfig).splitlines()
    assert "    kind: text = adaptive_norm" in lines
    assert not any(line.strip().startswith("kind: train") for line in lines)


@pytest.mark.parametrize(
    "line",
    [
        "l1: section = {weight: 1.0}",  # where `l1` is not given; where it is, its weight must be
        "kl: section = {weight: 1e-06}",
        "decoder: section = {weight: 1.0}",
        "weight: number  (required)",
        "base: uniform | logit_normal | shifted_logit_normal | mode | u_shaped = uniform",
        "reading: section",  # every field of it has this default already
        "targets: list of text = ['*attention.*']",
        "rollouts: number = 0.0",
        "enabled: true|false = true",
    ],
)
def test_a_section_is_described_with_what_stands_where_it_is_not_given(line: str) -> None:
    assert line in [shown.strip() for shown in describe(TrainConfig).splitlines()]


def test_a_kind_is_described_by_the_whole_first_paragraph() -> None:
    text = " ".join(describe(schema_of("dpo_import")).split())
    assert "the prompt of all in `NAME.txt` or `NAME/prompt.txt`, or of each in `NAME/w/STEM.txt`)" in text


def test_unknown_schema() -> None:
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        schema_of("trian")


def test_errors_inside_recipes_have_their_full_path(write) -> None:  # type: ignore[no-untyped-def]
    stage = "\n".join(f"    {line}" for line in TRAIN.replace("max_steps: 10", "max_steps: 0").splitlines())
    with pytest.raises(ConfigError, match="stages.vae.trainer.max_steps = 0"):
        load(write(f"name: a\nrun: r\nstages:\n  vae:\n{stage}\n"), schema=RecipeConfig)


def test_a_wrong_kind_in_a_list(write) -> None:  # type: ignore[no-untyped-def]
    text = "kind: curate\nsource: s\nstages:\n  - {kind: probe}\n  - {kind: flter}\n"
    with pytest.raises(ConfigError, match="config.yaml:5: stages.1\n.*did you mean 'filter'"):
        load(write(text), schema=CurateConfig)
