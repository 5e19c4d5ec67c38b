"""Features that guide a transformer: nothing changes at step 0, and then just what the formulas say (spec B5, F-B 1 and 7)."""

import copy
import json

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.models.block_cases import NAMES, TOKENS, build, gradients, inputs, treat
from videofm import models
from videofm.attention import Documents
from videofm.errors import CheckpointError, ConfigError, DataError
from videofm.export.diffusers_folder import write_model
from videofm.models import recompute
from videofm.models.bind import table_with_copies
from videofm.models.flops import flops_per_sample
from videofm.models.injection import injection_layers
from videofm.parallel.tensor import matches
from videofm.registry import resolve
from videofm.types import Conditioning

KINDS = ("adaptive_norm", "mlp", "controlnet")
CASES = [(name, kind) for name in NAMES for kind in KINDS]
LENGTHS = (30, 18)


def guided(name, kind="adaptive_norm", blocks="first_half", is_open=True, **fields):
    """A tiny transformer of 4 blocks with an injection, whose last layers are not zero if it is open."""
    model = build(name)
    torch.manual_seed(3)
    models.inject_features(model, models.InjectionSpec(kind, blocks, **fields))
    if is_open:
        with torch.no_grad():
            for parameter in model.injection.parameters():
                parameter.normal_(std=0.1)
    return model


def features_of(batch=2, tokens=TOKENS, channels=16, seed=5):
    return torch.randn(batch, tokens, channels, generator=torch.Generator().manual_seed(seed))


def packed(model):
    """The arguments of two clips as documents of one sequence, with a noise level a token."""
    tokens, _, text, coordinates = inputs(model)
    sigma = torch.rand(1, TOKENS, generator=torch.Generator().manual_seed(7))
    return tokens[:1], sigma, text, coordinates[:, :, :TOKENS][:1], Documents.of(LENGTHS)


# -- nothing changes at first, and then it learns


@pytest.mark.parametrize(("name", "kind"), CASES)
@torch.no_grad()
def test_step_zero_is_the_base_bit_for_bit(name, kind):
    model = build(name)
    cases = {
        "plain": inputs(model),
        "a level a token": (*inputs(model)[:1], torch.rand(2, TOKENS), *inputs(model)[2:]),
        "documents": packed(model),
    }
    before = {case: model(*made) for case, made in cases.items()}
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(*cases["plain"])
    models.inject_features(model, models.InjectionSpec(kind, "all"))
    for case, made in cases.items():
        features = 100 * features_of(len(made[0]))
        kept = torch.rand(len(made[0]), TOKENS) < 0.5
        assert torch.equal(model(*made), before[case]), case
        assert torch.equal(model(*made, features=features), before[case]), case
        assert torch.equal(model(*made, features=features, features_kept=kept), before[case]), case
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(*cases["plain"], features=features_of()), autocast)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_one_step_of_the_injection_alone_makes_features_matter(name, kind):
    """At step 0 the last layers have a gradient (of adaptive norm the gate's rows, as shift and scale are behind it), and what
    stands before them has none; at step 1 everything that the features pass has one."""
    model, made = guided(name, kind, is_open=False), inputs(build(name))
    models.freeze_base(model)
    base, optimizer = model(*made).detach(), torch.optim.SGD(model.injection.parameters(), lr=1.0)

    def backward():
        optimizer.zero_grad()
        model(*made, features=features_of()).square().mean().backward()

    backward()
    assert all(parameter.grad is None for key, parameter in model.named_parameters() if not key.startswith("injection."))
    for layer in injection_layers(model):
        last = layer.linear.weight if kind == "controlnet" else layer.mlp.linear2.weight
        rows = last.grad.chunk(3)[2] if kind == "adaptive_norm" else last.grad
        assert rows.abs().amax(dim=1).gt(0).all()
    assert model.injection.way_in.linear.weight.grad.abs().max() == 0
    optimizer.step()
    backward()
    assert model.injection.way_in.linear.weight.grad.abs().max() > 0
    with torch.no_grad():
        out, other = (model(*made, features=features_of(seed=seed)) for seed in (5, 6))
    assert not torch.equal(out, base) and not torch.equal(out, other)


# -- what it computes


def by_hand(model, made, features):
    """The same model without its injection, and the formulas of spec B5 in hooks before its blocks."""
    injection, state = model.injection, model.injection.state_dict()
    spec, base = injection.spec, copy.deepcopy(model)
    base.injection, side = None, {}

    def mlp(place, f):
        w = {
            key: state[f"layers.{place}.mlp.{key}"]
            for key in ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")
        }
        hidden = gelu(linear(f, w["linear1.weight"], w["linear1.bias"]), approximate="tanh")
        return linear(hidden, w["linear2.weight"], w["linear2.bias"])

    def before(number):
        def hook(block, call):
            x, place = call[0], spec.blocks.index(number) if number in spec.blocks else None
            if number == 0:
                side["f"] = linear(features, state["way_in.linear.weight"], state["way_in.linear.bias"])
                side["c"] = x + side["f"]
            if place is None:
                return None
            if spec.kind == "controlnet":
                side["c"] = injection.blocks[place](side["c"], *call[1:])
                x = x + linear(side["c"], state[f"layers.{place}.linear.weight"], state[f"layers.{place}.linear.bias"])
            elif spec.kind == "mlp":
                x = x + mlp(place, side["f"])
            else:
                shift, scale, gate = mlp(place, side["f"]).chunk(3, dim=-1)
                x = x + gate * (layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
            return (x, *call[1:])

        return hook

    for number, block in enumerate(base.blocks):
        block.register_forward_pre_hook(before(number))
    return base(*made)


@pytest.mark.parametrize(("name", "kind"), CASES)
@torch.no_grad()
def test_the_formulas(name, kind):
    model = guided(name, kind, (1, 3))
    for made in (inputs(model), packed(model)):
        features = features_of(len(made[0]))
        expected = by_hand(model, made, features)
        torch.testing.assert_close(model(*made, features=features), expected, rtol=0, atol=1e-5)
        assert (model(*made) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_controlnet_copies_the_first_blocks_whatever_it_guides(name):
    model = guided(name, "controlnet", "last_half", is_open=False)
    for first, made in zip(model.blocks, model.injection.blocks, strict=False):
        assert all(torch.equal(value, made.state_dict()[key]) for key, value in first.state_dict().items())
    assert len(model.injection.blocks) == 2
    own = {id(parameter) for parameter in model.injection.parameters()}
    assert not own & {id(parameter) for parameter in model.blocks.parameters()}


@pytest.mark.parametrize(("name", "kind"), CASES)
@torch.no_grad()
def test_packed_clips_are_guided_each_by_its_own_features(name, kind):
    model = guided(name, kind)
    tokens, sigma, text, coordinates, documents = packed(model)
    features, kept = features_of(1), torch.tensor([[True] * 20 + [False] * 28])
    whole = model(tokens, sigma, text, coordinates, documents, features, kept)
    first = 0
    for number, length in enumerate(LENGTHS):
        at = slice(first, first + length)
        alone = model(
            tokens[:, at], sigma[:, at], text.rows(slice(number, number + 1)), coordinates[:, :, at],
            features=features[:, at], features_kept=kept[:, at],
        )  # fmt: skip
        torch.testing.assert_close(whole[:, at], alone, rtol=0, atol=1e-5)
        first += length


@pytest.mark.parametrize(("name", "kind"), CASES)
@torch.no_grad()
def test_the_null_feature(name, kind):
    """Nothing kept is no features; each sample has its own answer; the null feature is another than any feature."""
    model = guided(name, kind)
    made, features = inputs(model), features_of()
    null, full = model(*made), model(*made, features=features)
    none, some = torch.zeros(2, TOKENS, dtype=torch.bool), torch.tensor([[True] * TOKENS, [False] * TOKENS])
    assert torch.equal(model(*made, features=features, features_kept=none), null)
    assert torch.equal(model(*made, features=features, features_kept=~none), full)
    mixed = model(*made, features=features, features_kept=some)
    torch.testing.assert_close(mixed, torch.stack([full[0], null[1]]), rtol=0, atol=1e-6)
    assert (full - null).abs().amax(dim=(1, 2)).min() > 1e-2
    model.injection.way_in.null.add_(1.0)
    moved = model(*made, features=features, features_kept=some)
    assert torch.equal(moved[0], mixed[0]) and not torch.equal(moved[1], mixed[1])


@torch.no_grad()
def test_features_of_other_channels_and_another_inner_width():
    """As the tokens of a semantic model would be: 5 channels, 24 inside. Parameters by hand, D 32: 5*24+24, null 24, and for
    each of 2 blocks 24*24+24 + 24*96+96."""
    model = guided("dit/ltx", feature_channels=5, hidden_width=24)
    assert sum(parameter.numel() for parameter in model.injection.parameters()) == 168 + 2 * (600 + 2400)
    made = inputs(model)
    assert not torch.equal(model(*made, features=features_of(channels=5)), model(*made))


# -- which blocks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("blocks", "numbers"), [("first_half", [0, 1]), ("last_half", [2, 3]), ("all", [0, 1, 2, 3]), ((3, 1), [1, 3])]
)
@torch.no_grad()
def test_the_list_of_blocks_is_honoured(kind, blocks, numbers):
    """What a block gets is what the one before gave, but in front of those that are named; a layer runs once for each."""
    model = guided("dit/ltx", kind, blocks)
    given, got, calls = [], [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: got.append(args[0]))
        block.register_forward_hook(lambda module, args, out: given.append(out))
    for layer in injection_layers(model):
        layer.register_forward_hook(lambda module, args, out: calls.append(module))
    made = inputs(model)
    model(*made, features=features_of())
    entered = [model.proj_in(made[0]), *given[:-1]]
    changed = [number for number in range(4) if not torch.equal(entered[number], got[number])]
    assert changed == numbers and calls == list(injection_layers(model)) and len(calls) == len(numbers)


@pytest.mark.parametrize("name", NAMES)
def test_halves_have_other_gradients(name):
    """The same injection before other blocks: its gradients differ, and so do those of the base."""
    found = {}
    for blocks in ("first_half", "last_half"):
        model = guided(name, blocks=blocks)
        model(*inputs(model), features=features_of()).square().mean().backward()
        found[blocks] = {key: parameter.grad for key, parameter in model.named_parameters()}
    first, last = found.values()
    assert all(not torch.allclose(first[key], last[key], rtol=1e-3, atol=0) for key in first if key.endswith("linear2.weight"))
    assert not torch.allclose(
        first["blocks.3.self_attention.out.weight"], last["blocks.3.self_attention.out.weight"], rtol=1e-3
    )


def test_either_half_of_an_odd_number_has_the_middle():
    model = build("dit/ltx", num_layers=3)
    assert models.InjectionSpec(blocks="first_half").resolved(model).blocks == (0, 1)
    assert models.InjectionSpec(blocks="last_half").resolved(model).blocks == (1, 2)


# -- what is refused


@pytest.mark.parametrize("name", NAMES)
def test_features_that_do_not_fit(name):
    model, base = guided(name), build(name)
    made, fine = inputs(model), features_of()
    with pytest.raises(DataError, match=r"features have shape \(2, 48, 15\); this injection expects \(2, 48, 16\)"):
        model(*made, features=features_of(channels=15))
    with pytest.raises(
        DataError, match=r"features have shape \(2, 47, 16\); this injection expects \(2, 48, 16\): one feature"
    ):
        model(*made, features=features_of(tokens=47))
    with pytest.raises(DataError, match=r"features_kept is torch.float32 of shape \(2, 48\); .* torch.bool of \(2, 48\)"):
        model(*made, features=fine, features_kept=torch.ones(2, TOKENS))
    with pytest.raises(DataError, match=r"features_kept is torch.bool of shape \(2,\)"):
        model(*made, features=fine, features_kept=torch.ones(2, dtype=torch.bool))
    with pytest.raises(DataError, match="features_kept without features: bring both"):
        model(*made, features_kept=torch.ones(2, TOKENS, dtype=torch.bool))
    for wrong in ({"features": fine}, {"features_kept": torch.ones(2, TOKENS, dtype=torch.bool)}):
        with pytest.raises(DataError, match=r"takes none: build it with models.ROLE.injection"):
            base(*made, **wrong)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "adaptive_nrom"}, "no injection is called 'adaptive_nrom', did you mean 'adaptive_norm'"),
        ({"blocks": (0, 4)}, r"injection.blocks is \[0, 4\]: this model has 4 blocks, numbered 0 to 3"),
        ({"blocks": (-1,)}, r"injection.blocks is \[-1\]: this model has 4 blocks"),
        ({"blocks": (1, 1)}, "each once"),
        ({"blocks": ()}, "at least one of them"),
        ({"blocks": "middle"}, "injection.blocks is 'middle': name first_half, last_half, all"),
        ({"hidden_width": 0}, "injection.hidden_width 0 must be at least 1"),
        ({"feature_channels": 0}, "injection.feature_channels 0 and"),
        ({"kind": "controlnet", "hidden_width": 24}, "hidden_width is 24: a controlnet runs copies of blocks of width 32"),
    ],
)
def test_specs_that_cannot_be(fields, message):
    model = build("dit/ltx")
    with pytest.raises(ConfigError, match=message):
        models.inject_features(model, models.InjectionSpec(**fields))
    assert models.injection_spec(model) is None and model.injection is None


def test_models_that_take_none():
    with pytest.raises(ConfigError, match="vae/ltx takes no features: an injection is for dit/ltx and dit/step_video"):
        models.inject_features(models.build("vae/ltx", device="meta"), models.InjectionSpec())
    adapted = build("dit/ltx")
    models.inject_lora(adapted, 2)
    with pytest.raises(ConfigError, match="has low-rank adapters, beside which no injection is trained: leave lora out"):
        models.inject_features(adapted, models.InjectionSpec())
    with pytest.raises(ConfigError, match=r"freeze_base trains the injection alone, and dit/ltx has none"):
        models.freeze_base(build("dit/ltx"))


def test_a_second_injection_is_kept_if_it_is_the_same():
    model = guided("dit/ltx")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    models.inject_features(model, models.InjectionSpec(blocks=(0, 1), hidden_width=32))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(
        ConfigError, match=r"another injection already: kind 'adaptive_norm' there, 'mlp' asked for; blocks \(0, 1"
    ):
        models.inject_features(model, models.InjectionSpec("mlp", "all"))


# -- on disk


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_save_and_load(name, kind, tmp_path):
    base, model = build(name), guided(name, kind)
    models.save(model, tmp_path)
    described = json.loads((tmp_path / "model.json").read_text())
    assert described["injection"] == {"kind": kind, "blocks": [0, 1], "feature_channels": 16, "hidden_width": 32}
    loaded, made = models.load(tmp_path), inputs(model)
    assert models.injection_spec(loaded) == models.injection_spec(model)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(*made, features=features_of()), model.eval()(*made, features=features_of()))
    assert {key for key in model.state_dict() if not key.startswith("injection.")} == set(base.state_dict())
    assert "injection" not in models.describe(base)


def test_a_model_starts_from_a_base_or_from_a_guided_one(tmp_path):
    base, model = build("dit/ltx"), guided("dit/ltx", "controlnet")
    models.save(base, tmp_path / "base")
    models.save(model, tmp_path / "guided")
    fresh = models.initial("dit/ltx", tmp_path / "base").model
    assert models.injection_spec(fresh) is None
    filled = models.initial("dit/ltx", tmp_path / "guided")
    assert models.injection_spec(filled.model) == models.injection_spec(model)
    assert all(torch.equal(value, filled.model.state_dict()[key]) for key, value in model.state_dict().items())


def test_damaged_descriptions(tmp_path):
    models.save(guided("dit/ltx"), tmp_path)
    described = json.loads((tmp_path / "model.json").read_text())
    for field, wrong in (("blocks", None), ("blocks", ["a"]), ("feature_channels", "x"), ("kind", 3)):
        damaged = described["injection"] | {field: wrong}
        with pytest.raises(CheckpointError, match="describes an injection by .*: kind is a word, blocks a word or a list"):
            models.InjectionSpec.from_json(damaged, "model.json")
    for wrong in (None, 3, [1]):
        with pytest.raises(CheckpointError, match="must describe an injection by kind, .*, not by"):
            models.InjectionSpec.from_json(wrong, "model.json")
    del described["injection"]["blocks"]
    (tmp_path / "model.json").write_text(json.dumps(described))
    with pytest.raises(
        CheckpointError, match=r"model.json must describe an injection by kind, blocks, feature_channels, hidden"
    ):
        models.load(tmp_path)
    del described["injection"]
    (tmp_path / "model.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"unexpected: injection\."):
        models.load(tmp_path)


def test_adapters_on_a_guided_model(tmp_path):
    """They are added to the run's base, which has the injection; exported alone they would be of no use."""
    model = guided("dit/ltx")
    made = inputs(model)
    models.inject_lora(model, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    models.save_base(model, tmp_path / "base" / "dit")
    models.save(model, tmp_path / "checkpoints" / "step_00000001" / "models" / "dit")
    (tmp_path / "checkpoints" / "step_00000001" / "COMMITTED.json").write_text("{}")
    loaded = models.load(tmp_path, "dit")
    with torch.no_grad():
        expected = models.merge_lora(model)(*made, features=features_of())
        torch.testing.assert_close(loaded(*made, features=features_of()), expected, rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="for which diffusers has no place"):
        models.save_adapter(tmp_path, tmp_path / "adapter", "dit")


@pytest.mark.parametrize("name", NAMES)
def test_public_layouts_have_no_place_for_it(name, tmp_path):
    message = r"guided by features \(it has an injection\), for which .* has no place, .* sample from the run itself"
    with pytest.raises(ConfigError, match=message):
        models.save_public(guided(name), tmp_path / "public")
    with pytest.raises(ConfigError, match=message):
        write_model(tmp_path / "transformer", guided(name), "fp32")
    assert not (tmp_path / "public").exists() and not (tmp_path / "transformer").exists()


# -- blocks that recompute, compile and offload


@pytest.mark.parametrize("policy", ["selective", "full"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_checkpointing_changes_no_gradient(name, kind, policy):
    model = guided(name, kind)
    made = (*inputs(model), None, features_of())
    expected = gradients(model, made)
    treat(model, activation_checkpointing=policy)
    treated = [*model.blocks, *model.injection.blocks, *injection_layers(model)]
    assert all("forward" in vars(block) for block in treated)
    found = gradients(model, made)
    assert [key for key, value in expected.items() if value is not None and not torch.equal(found[key], value)] == []


def test_copies_are_compiled_as_blocks_are(monkeypatch):
    compiled = []
    monkeypatch.setattr(recompute, "compiled", lambda forward: compiled.append(forward.__self__) or forward)
    model = treat(guided("dit/ltx", "controlnet"), compile=True)
    assert compiled == [*model.blocks, *model.injection.blocks, *injection_layers(model)]
    attends = {block.self_attention.attend for block in (*model.blocks, *model.injection.blocks)}
    assert len(attends) == 1


@pytest.mark.parametrize("name", NAMES)
def test_tensor_ranks_split_copies_as_they_split_blocks(name):
    """And nothing else of an injection; that the split is right is proven on ranks (tests/distributed/test_injection.py)."""
    table = resolve(f"videofm.models.{name.replace('/', '.')}.parallelize:TENSOR_TABLE")
    base = matches(build(name), table)
    of_blocks = {key: line.kind for key, line in base.items() if key.startswith(("blocks.0.", "blocks.1."))}
    model = guided(name, "controlnet")
    found = {key: line.kind for key, line in matches(model, table_with_copies(table, model)).items() if key not in base}
    assert found == {f"injection.{key}": kind for key, kind in of_blocks.items()}
    assert matches(guided(name), table_with_copies(table, guided(name))) == base


def test_a_copy_of_a_guided_model_uses_its_own_weights():
    """As a moving average would: nothing of a pass stays in the model."""
    model = treat(guided("dit/ltx", "controlnet"), activation_checkpointing="full")
    made = (*inputs(model), None, features_of())
    with torch.no_grad():
        twin, before = copy.deepcopy(model), model(*made)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(*made), before) and model(*made).abs().max() == 0


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_flops_are_what_pytorch_counts(name, kind):
    """Those of the guided model less those of the base are the formula; besides the way in, 48 x 16 x 32 forward and again for
    its weight."""

    def counted(model):
        treat(model, attention="math", cross_attention="math")
        with FlopCounterMode(display=False) as counter:
            tokens, sigma, text, coordinates = inputs(model, batch=1)
            features = None if model.injection is None else features_of(1)
            model(tokens, sigma, text, coordinates, features=features).sum().backward()
        return counter.get_total_flops()

    model, base = guided(name, kind, blocks=(0, 1, 3)), build(name)
    num_text = 9 if name == "dit/step_video" else 6
    extra = flops_per_sample(model, TOKENS, num_text) - flops_per_sample(base, TOKENS, num_text)
    assert counted(model) - counted(base) == extra + 2 * 2 * TOKENS * 16 * 32


def test_texts_of_a_pack_are_counted():
    """The documents of a guided call are checked as those of any."""
    model = guided("dit/ltx")
    tokens, sigma, text, coordinates, documents = packed(model)
    one = Conditioning(text.embeddings[:1], text.mask[:1])
    with pytest.raises(DataError, match="2 packed documents come with 1 texts"):
        model(tokens, sigma, one, coordinates, documents, features_of(1))
