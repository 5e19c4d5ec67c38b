"""Building by name, and models on disk."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo
from safetensors.torch import load_file, save_file

from videofm import models
from videofm.errors import CheckpointError, ConfigError

TINY = {"num_layers": 1, "num_heads": 2, "head_width": 8, "caption_channels": 4}


def tiny():
    return models.build("dit/ltx", "tiny", **TINY)


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def checkpoint(run, step, roles, ema=None, complete=True):
    folder = run / "checkpoints" / f"step_{step:08d}"
    for role, model in roles.items():
        models.save(model, folder / "models" / role)
    for role, model in (ema or {}).items():
        (folder / "ema" / role).mkdir(parents=True)
        save_file(models.weights(model), folder / "ema" / role / "model.safetensors")
    if complete:
        (folder / "COMMITTED.json").write_text("{}")
    return folder


def test_public_surface():
    assert {"vae/ltx", "dit/ltx", "text/t5"} <= set(models.names())
    assert models.sizes("dit/ltx") == ["tiny", "2b", "13b"]
    assert models.adapter("dit/ltx") is models.model_spec("dit/ltx").adapter
    assert models.build("dit/ltx", "2b", device="meta").proj_in.weight.is_meta


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.build("dit/ltxx", "tiny"), "no model is called 'dit/ltxx', did you mean 'dit/ltx'"),
        (lambda: models.build("dit/ltx", "3b"), "dit/ltx has no size '3b'.* There are: tiny, 2b, 13b"),
        (lambda: models.build("dit/ltx", "tiny", num_layer=3), "no option 'num_layer', did you mean 'num_layers'"),
    ],
)
def test_wrong_requests(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize("name", ["vae/ltx", "dit/ltx", "text/t5"])
def test_save_and_load(name, tmp_path):
    model = models.build(name, "tiny")
    loaded = models.load(models.save(model, tmp_path))
    assert same(model, loaded)
    assert loaded.config == model.config
    assert not loaded.training
    assert json.loads((tmp_path / "model.json").read_text()) == json.loads(json.dumps(models.describe(model)))
    assert not any(p.is_meta for p in [*loaded.parameters(), *loaded.buffers()])


def test_a_folder_of_diffusers_whole_or_in_shards(tmp_path):
    model = models.build("vae/ltx", "tiny")
    adapter = models.adapter("vae/ltx")
    theirs = AutoencoderKLLTXVideo.from_config(adapter.public_config(model.config))
    theirs.load_state_dict(adapter.to_public(model.state_dict()))
    for folder, limit in (("whole", "1GB"), ("shards", "1MB")):
        theirs.save_pretrained(tmp_path / folder, max_shard_size=limit)
        assert same(models.load(tmp_path / folder), model)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1


def test_a_pipeline_folder_needs_a_component(tmp_path):
    adapter, model = models.adapter("dit/ltx"), tiny()
    for name in ("transformer", "transformer_2"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(adapter.public_config(model.config)))
        save_file(adapter.to_public(model.state_dict()), folder / "diffusion_pytorch_model.safetensors")
    (tmp_path / "model_index.json").write_text("{}")
    assert same(models.load(tmp_path, component="transformer"), model)
    with pytest.raises(ConfigError, match="holds 2 models; say which component: transformer, transformer_2"):
        models.load(tmp_path)
    with pytest.raises(ConfigError, match=r"has no component 'vae'\. There are: transformer"):
        models.load(tmp_path, component="vae")


def test_a_run_gives_its_newest_complete_checkpoint(tmp_path):
    old, new, averaged, torn = tiny(), tiny(), tiny(), tiny()
    checkpoint(tmp_path, 9, {"dit": old})
    newest = checkpoint(tmp_path, 10, {"dit": new}, ema={"dit": averaged})
    checkpoint(tmp_path, 11, {"dit": torn}, complete=False)
    assert same(models.load(tmp_path), averaged)
    assert same(models.load(tmp_path, ema=False), new)
    assert same(models.load(newest, role="dit", ema=False), new)
    assert same(models.load(tmp_path / "checkpoints" / "step_00000009"), old)


def test_roles(tmp_path):
    checkpoint(tmp_path, 1, {"policy": tiny(), "reference": tiny()})
    with pytest.raises(ConfigError, match="holds 2 models; say which role: policy, reference"):
        models.load(tmp_path)
    with pytest.raises(ConfigError, match=r"has no role 'critic'\. There are: policy, reference"):
        models.load(tmp_path, role="critic")


def test_a_role_that_the_run_only_used_is_found(tmp_path):
    trained, frozen = tiny(), tiny()
    newest = checkpoint(tmp_path, 1, {"dit": trained})
    models.save(frozen, tmp_path / "frozen" / "vae")
    assert same(models.load(tmp_path, role="vae"), frozen)
    assert same(models.load(newest, role="vae"), frozen)
    assert same(models.load(tmp_path, role="dit"), trained) and same(models.load(tmp_path), trained)


def test_nothing_to_load(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        models.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no model: expected model\.json"):
        models.load(tmp_path)
    checkpoint(tmp_path, 1, {"dit": tiny()}, complete=False)
    with pytest.raises(CheckpointError, match=r"has no complete checkpoint \(1 incomplete\)"):
        models.load(tmp_path)


def test_tensors_that_do_not_fit(tmp_path):
    folder = models.save(tiny(), tmp_path / "model")
    file = folder / "model.safetensors"
    good = load_file(file)
    less = dict(list(good.items())[6:])
    save_file(less | {"extra": torch.zeros(1), "proj_out.bias": torch.zeros(3)}, file)
    listed = r"6 missing: (\S+, ){5}\S+; 1 unexpected: extra; 1 of another shape: proj_out.bias \(3,\) for \(16,\)"
    with pytest.raises(CheckpointError, match=listed):
        models.load(folder)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is damaged"):
        models.load(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        models.load(folder)
    (folder / "model.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"model\.json is damaged"):
        models.load(folder)


def test_a_damaged_file_says_how(tmp_path):
    """The file by its own account: 8 bytes of length, a header, 400 bytes of tensor."""
    file = tmp_path / "original.safetensors"
    save_file({"decoder.up_blocks.0.res_blocks.0.conv1.conv.bias": torch.zeros(100)}, file)
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    assert len(whole) == 8 + header + 400
    for cut, announced in ((8 + header + 40, 8 + header + 400), (20, 8 + header)):
        file.write_bytes(whole[:cut])
        message = (
            rf"original\.safetensors is damaged\. It has {cut} bytes; its header announces {announced}: it was cut off; copy"
        )
        with pytest.raises(CheckpointError, match=message):
            models.load(file)
    for content in (b"", b"<html>not found</html>", whole[:8] + b"x" * header + whole[8 + header :]):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"It has {len(content)} bytes; safetensors says: .* download it again"):
            models.load(file)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="it is a pointer of git-lfs in the place of the weights"):
        models.load(file)


def test_files_that_no_model_reads(tmp_path):
    pickled = tmp_path / "vae.ckpt"
    pickled.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"vae\.ckpt is no \.safetensors file\. Nothing else is read"):
        models.load(pickled)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({"lora.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"no original single file of a model here; its first tensors: lora\.weight\.$"):
        models.load(file)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"lies beside a config\.json: pass the folder"):
        models.load(file)
    with pytest.raises(CheckpointError, match=r"lies beside a model\.json: pass the folder"):
        models.load(models.save(tiny(), tmp_path / "ours") / "model.safetensors")


def test_a_class_that_no_model_reads(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(CheckpointError, match="class 'UNet2DModel', which no model here reads"):
        models.load(tmp_path)


def test_damage_in_a_public_folder_names_the_folder(tmp_path):
    adapter, model = models.adapter("dit/ltx"), tiny()
    (tmp_path / "config.json").write_text(json.dumps(adapter.public_config(model.config)))
    with pytest.raises(CheckpointError, match="has no diffusion_pytorch_model"):
        models.load(tmp_path)
    save_file({"lora.weight": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: lora.weight is not in the public layout"):
        models.load(tmp_path)
    shutil.rmtree(tmp_path)
