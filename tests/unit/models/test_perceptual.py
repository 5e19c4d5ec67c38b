"""LPIPS and I3D from their public files, against computations written out from those files (Zhang et al. 2018; Carreira and
Zisserman 2017). The files are made here: random weights in the public layouts.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from tools import convert_perceptual
from videofm import models
from videofm.errors import CheckpointError, ConfigError, DataError
from videofm.models.perceptual.i3d import I3DConfig
from videofm.models.perceptual.lpips import LPIPSConfig

WIDTHS = (4, 8, 8, 16, 16)
VGG_CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def videos(num_frames=2, size=(20, 18), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(2, 3, num_frames, *size, generator=generator) * 2 - 1 for _ in range(2))


@pytest.fixture(scope="module")
def public_lpips(tmp_path_factory):
    """The two public files of the tiny network: torchvision's (with a classifier) and the heads. Paths and tensors."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lpips")
    widths = [width for width, depth in zip(WIDTHS, (2, 2, 3, 3, 3), strict=True) for _ in range(depth)]
    vgg = {"classifier.0.weight": torch.zeros(3, 3), "classifier.0.bias": torch.zeros(3)}
    for index, entering, width in zip(VGG_CONVS, [3, *widths], widths, strict=False):
        vgg[f"features.{index}.weight"] = torch.randn(width, entering, 3, 3) / (4.5 * entering) ** 0.5
        vgg[f"features.{index}.bias"] = torch.randn(width) * 0.1
    heads = {f"lin{k}.model.1.weight": torch.rand(1, width, 1, 1) for k, width in enumerate(WIDTHS)}
    torch.save(vgg, folder / "vgg16.pth")
    torch.save(heads, folder / "vgg.pth")
    return SimpleNamespace(vgg_file=folder / "vgg16.pth", heads_file=folder / "vgg.pth", vgg=vgg, heads=heads)


@pytest.fixture(scope="module")
def lpips_file(public_lpips, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "lpips.safetensors"
    convert_perceptual.convert_lpips(public_lpips.vgg_file, public_lpips.heads_file, out, size="tiny")
    return out


def reference_lpips(vgg, heads, image_a, image_b):
    """LPIPS of two images (3, H, W), following torchvision's list of layers: 31 entries, of which 4 9 16 23 30 are pools, the
    13 indices above convolutions, the others ReLUs; taps after 3 8 15 22 29.
    """
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def taps(image):
        x, found = ((image - shift[:, None, None]) / scale[:, None, None])[None], []
        for layer in range(30):
            if layer in VGG_CONVS:
                x = F.conv2d(x, vgg[f"features.{layer}.weight"], vgg[f"features.{layer}.bias"], padding=1)
            else:
                x = F.max_pool2d(x, 2, 2) if layer in (4, 9, 16, 23) else x.clamp_min(0)
            if layer in (3, 8, 15, 22, 29):
                found.append(x[0])
        return found

    total = 0.0
    for k, (a, b) in enumerate(zip(taps(image_a), taps(image_b), strict=True)):
        a, b = (x / (x.pow(2).sum(0).sqrt() + 1e-10) for x in (a, b))
        total += torch.einsum("c,chw->hw", heads[f"lin{k}.model.1.weight"].flatten(), (a - b) ** 2).mean().item()
    return total


@torch.no_grad()
def test_lpips_from_public_files_equals_the_reference(public_lpips, lpips_file):
    model = models.build("perceptual/lpips", "tiny", weights=str(lpips_file))
    a, b = videos(num_frames=3)
    distances = model(a, b)
    assert distances.shape == (2, 3)
    expected = [
        [reference_lpips(public_lpips.vgg, public_lpips.heads, a[n, :, t], b[n, :, t]) for t in range(3)] for n in range(2)
    ]
    torch.testing.assert_close(distances, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert distances.min() > 0.01


@torch.no_grad()
def test_lpips_laws(lpips_file):
    model = models.build("perceptual/lpips", "tiny", weights=str(lpips_file))
    a, b = videos()
    assert torch.equal(model(a, a), torch.zeros(2, 2))
    torch.testing.assert_close(model(a, b), model(b, a))
    assert (model(a, b) > model(a, 0.9 * a + 0.1 * b)).all()
    torch.testing.assert_close(model(a, b)[:, 1:], model(a[:, :, 1:], b[:, :, 1:]))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(a, b).dtype == torch.float32


def test_lpips_is_frozen_but_passes_gradients(lpips_file):
    model = models.build("perceptual/lpips", "tiny", weights=str(lpips_file))
    a, b = videos()
    model(a.requires_grad_(), b).sum().backward()
    assert a.grad.abs().sum() > 0
    assert not model.training and not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_lpips_gradients_where_all_features_are_dead():
    """With biases of -100 every ReLU is closed and the norm over channels is 0: no NaN comes back."""
    model = models.build("perceptual/lpips", "tiny")
    for layer in model.features.values():
        layer.bias.data.fill_(-100)
    a, b = videos()
    model(a.requires_grad_(), b).sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_lpips_sizes():
    """VGG16 without its classifier has 14,714,688 parameters; the heads add one for each of the 1,472 channels tapped."""
    model = models.build("perceptual/lpips", "vgg16", device="meta", weights="nowhere.safetensors")
    assert sum(p.numel() for p in model.parameters()) == 14_714_688 + 64 + 128 + 256 + 512 + 512
    assert set(model.state_dict()) == {f"features.{i}.{p}" for i in VGG_CONVS for p in ("weight", "bias")} | {
        f"heads.{k}.weight" for k in range(5)
    }


def test_lpips_files_that_do_not_fit(lpips_file, tmp_path):
    def build(file):
        return models.build("perceptual/lpips", "tiny", weights=str(file))

    with pytest.raises(CheckpointError, match=r"none\.safetensors does not exist.*tools/convert_perceptual\.py"):
        build(tmp_path / "none.safetensors")
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(lpips_file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"truncated\.safetensors is damaged.*LPIPS reads one safetensors file"):
        build(truncated)
    tensors = load_file(lpips_file)
    save_file({key: tensor for key, tensor in tensors.items() if "heads" not in key}, tmp_path / "headless.safetensors")
    with pytest.raises(CheckpointError, match=r"headless\.safetensors does not fit .* 5 missing: heads\.\{0-4\}\.weight"):
        build(tmp_path / "headless.safetensors")
    save_file(tensors | {"heads.1.weight": -tensors["heads.1.weight"]}, tmp_path / "negative.safetensors")
    with pytest.raises(CheckpointError, match=r"negative\.safetensors has negative heads"):
        build(tmp_path / "negative.safetensors")
    with pytest.raises(CheckpointError, match="of another shape"):
        models.build("perceptual/lpips", "vgg16", weights=str(lpips_file))


def test_lpips_refuses_other_videos():
    model = models.build("perceptual/lpips", "tiny")
    with pytest.raises(DataError, match=r"LPIPS compares videos \(B, 3, T, H, W\)"):
        model(torch.zeros(1, 3, 1, 16, 16), torch.zeros(1, 3, 2, 16, 16))
    with pytest.raises(DataError, match="frames of at least 16x16 pixels, not 15x20"):
        model(torch.zeros(1, 3, 1, 15, 20), torch.zeros(1, 3, 1, 15, 20))
    assert model(torch.zeros(1, 3, 1, 16, 16), torch.zeros(1, 3, 1, 16, 16)).item() == 0
    with pytest.raises(ConfigError, match=r"widths has 2 entries \(4, 8\); VGG16 has 5 stages"):
        LPIPSConfig(widths=(4, 8))


def test_a_saved_lpips_needs_no_file(lpips_file, tmp_path):
    """A run keeps its frozen models: the copy loads without the file that its config names, and stays frozen."""
    file = tmp_path / "moved.safetensors"
    file.write_bytes(lpips_file.read_bytes())
    model = models.build("perceptual/lpips", "tiny", weights=str(file))
    models.save(model, tmp_path / "saved")
    file.unlink()
    loaded = models.load(tmp_path / "saved")
    assert torch.equal(loaded(*videos()), model(*videos()))
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.fixture(scope="module")
def public_i3d(tmp_path_factory):
    """A public I3D checkpoint of the tiny network, with the counters of batches that newer files have."""
    torch.manual_seed(0)
    state = copy.deepcopy(models.build("perceptual/i3d", "tiny").state_dict())
    for key, tensor in state.items():
        if key.endswith("conv3d.weight"):
            tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5)
        elif "bn" in key:
            tensor.copy_(torch.rand_like(tensor) * 0.5 + (0.75 if "weight" in key or "var" in key else -0.25))
    state |= {f"{key.removesuffix('weight')}num_batches_tracked": torch.tensor(7) for key in state if key.endswith("bn.weight")}
    file = tmp_path_factory.mktemp("i3d") / "rgb_imagenet.pt"
    torch.save(state, file)
    return SimpleNamespace(file=file, state=state)


def reference_i3d(state, video):
    """I3D in double precision from the public keys; every window is gathered with the TensorFlow rule for SAME."""

    def same(x, kernel, stride):
        for dim, (k, s) in enumerate(zip(kernel, stride, strict=True), start=2):
            size = x.shape[dim]
            missing = max((-(-size // s) - 1) * s + k - size, 0)
            before = x.new_zeros(*x.shape[:dim], missing // 2, *x.shape[dim + 1 :])
            after = x.new_zeros(*x.shape[:dim], missing - missing // 2, *x.shape[dim + 1 :])
            x = torch.cat([before, x, after], dim=dim)
        return x

    def unit(x, key, stride=1):
        weight = state[f"{key}.conv3d.weight"].double()
        x = F.conv3d(same(x, weight.shape[2:], (stride,) * 3), weight, stride=stride)
        mean, var, scale, shift = (
            state[f"{key}.bn.{name}"].double().view(1, -1, 1, 1, 1)
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 1e-3).sqrt() * scale + shift).clamp_min(0)

    def pool(x, kernel, stride):
        return F.max_pool3d(same(x, kernel, stride), kernel, stride)

    def mixed(x, key):
        first = unit(x, f"{key}.b0")
        second, third = (unit(unit(x, f"{key}.b{n}a"), f"{key}.b{n}b") for n in (1, 2))
        return torch.cat([first, second, third, unit(pool(x, (3, 3, 3), (1, 1, 1)), f"{key}.b3b")], dim=1)

    x = pool(unit(video.double(), "Conv3d_1a_7x7", stride=2), (1, 3, 3), (1, 2, 2))
    x = pool(unit(unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3"), (1, 3, 3), (1, 2, 2))
    x = pool(mixed(mixed(x, "Mixed_3b"), "Mixed_3c"), (3, 3, 3), (2, 2, 2))
    for letter in "bcdef":
        x = mixed(x, f"Mixed_4{letter}")
    x = mixed(mixed(pool(x, (2, 2, 2), (2, 2, 2)), "Mixed_5b"), "Mixed_5c")
    pooled = x.unfold(2, 2, 1).mean(dim=(3, 4, 5))  # windows of two positions in time, all of the 7x7 in space
    logits = torch.einsum("bct,kc->bkt", pooled, state["logits.conv3d.weight"].double()[:, :, 0, 0, 0])
    return logits.mean(2) + state["logits.conv3d.bias"].double()


@pytest.mark.parametrize("num_frames", [9, 17])
@torch.no_grad()
def test_i3d_from_a_public_file_equals_the_reference(public_i3d, tmp_path, num_frames):
    out = tmp_path / "i3d.safetensors"
    convert_perceptual.convert_i3d(public_i3d.file, out, size="tiny")
    model = models.build("perceptual/i3d", "tiny", weights=str(out))
    video = torch.rand(1, 3, num_frames, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = model(video)
    assert features.shape == (1, 16)
    torch.testing.assert_close(features.double(), reference_i3d(public_i3d.state, video), rtol=1e-3, atol=1e-4)
    assert features.std() > 1e-2


@torch.no_grad()
def test_i3d_resizes_frames_and_keeps_its_statistics():
    """A frame of 112x112 is resized bilinearly, frame by frame; training mode changes nothing, as statistics are frozen."""
    model = models.build("perceptual/i3d", "tiny")
    video = torch.rand(1, 3, 9, 112, 112)
    frames = [F.interpolate(video[:, :, t], (224, 224), mode="bilinear", align_corners=False) for t in range(9)]
    features = model(video)
    torch.testing.assert_close(features, model(torch.stack(frames, dim=2)), rtol=0, atol=1e-5)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert torch.equal(model.train()(video), features)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_i3d_sizes():
    """A unit from i to o channels with kernel k has k^3 i o weights and 2 o of its norm; logits 1024 * 400 + 400. Each module
    hands on the sum of its branches: 192 -> 256 -> 480 -> 512 -> 512 -> 512 -> 528 -> 832 -> 832 -> 1024.
    """

    def unit(i, o, k=1):
        return k**3 * i * o + 2 * o

    modules = [
        (192, (64, 96, 128, 16, 32, 32)),
        (256, (128, 128, 192, 32, 96, 64)),
        (480, (192, 96, 208, 16, 48, 64)),
        (512, (160, 112, 224, 24, 64, 64)),
        (512, (128, 128, 256, 24, 64, 64)),
        (512, (112, 144, 288, 32, 64, 64)),
        (528, (256, 160, 320, 32, 128, 128)),
        (832, (256, 160, 320, 32, 128, 128)),
        (832, (384, 192, 384, 48, 128, 128)),
    ]
    expected = unit(3, 64, 7) + unit(64, 64) + unit(64, 192, 3) + 1024 * 400 + 400
    for i, (a, b, c, d, e, f) in modules:
        expected += unit(i, a) + unit(i, b) + unit(b, c, 3) + unit(i, d) + unit(d, e, 3) + unit(i, f)
    model = models.build("perceptual/i3d", "kinetics400", device="meta")
    assert sum(p.numel() for p in model.parameters()) == expected == 12_697_264
    adapter = models.adapter("perceptual/i3d")
    public = adapter.to_public(model.state_dict())
    assert {"Conv3d_1a_7x7.conv3d.weight", "Mixed_5c.b3b.bn.running_var", "logits.conv3d.bias"} <= set(public)
    assert set(adapter.from_public(public | {"Mixed_5c.b3b.bn.num_batches_tracked": torch.tensor(0)})) == set(
        model.state_dict()
    )
    assert adapter.config_from_public(adapter.public_config(model.config)) == model.config


def test_i3d_refusals(public_i3d, tmp_path):
    model = models.build("perceptual/i3d", "tiny")
    with pytest.raises(DataError, match="clips of at least 9 frames, not 8"):
        model(torch.zeros(1, 3, 8, 32, 32))
    with pytest.raises(DataError, match=r"I3D takes videos \(B, 3, T, H, W\)"):
        model(torch.zeros(1, 1, 9, 32, 32))
    with pytest.raises(ConfigError, match="width_divisor is 3; .* 1, 2, 4 or 8"):
        I3DConfig(width_divisor=3)
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(CheckpointError, match=r"text\.safetensors is damaged.*I3D reads one safetensors file"):
        models.build("perceptual/i3d", "tiny", weights=str(tmp_path / "text.safetensors"))
    assert sum(p.requires_grad for p in model.parameters()) == 0


def test_conversion_refuses_other_files(public_lpips, public_i3d, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    (tmp_path / "text.pth").write_text("not tensors")
    torch.save([1, 2], tmp_path / "list.pth")
    cases = {
        (tmp_path / "none.pth", public_lpips.heads_file): r"none\.pth does not exist",
        (tmp_path / "text.pth", public_lpips.heads_file): r"text\.pth cannot be read as a file of tensors",
        (tmp_path / "list.pth", public_lpips.heads_file): r"list\.pth is not a state dict",
        (public_i3d.file, public_lpips.heads_file): "is not in the public layout",
        (public_lpips.heads_file, public_lpips.heads_file): r"26 missing: features\.\{0-28\}\.weight",
    }
    for (vgg, heads), message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            convert_perceptual.convert_lpips(vgg, heads, out, size="tiny")
    assert convert_perceptual.main(["i3d", "--checkpoint", str(tmp_path / "text.pth"), "--output", str(out)]) == 1
    assert "text.pth cannot be read" in capsys.readouterr().err
    tiny = ["--vgg", str(public_lpips.vgg_file), "--heads", str(public_lpips.heads_file)]
    assert convert_perceptual.main(["lpips", *tiny, "--output", str(out)]) == 1
    assert "of another shape" in capsys.readouterr().err  # the command line converts real sizes only
    assert not out.exists()


def test_no_code_in_a_file_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"features.0.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(CheckpointError, match=r"trap\.pth cannot be read as a file of tensors"):
        convert_perceptual.convert_i3d(tmp_path / "trap.pth", tmp_path / "out.safetensors")
    assert not (tmp_path / "sprung").exists()


def test_the_command_line_converts_the_real_size(tmp_path, capsys):
    """12,697,264 random parameters in the older container of torch.save, in which rgb_imagenet.pt is kept."""
    state = models.build("perceptual/i3d", "kinetics400").state_dict()
    torch.save(state, tmp_path / "rgb_imagenet.pt", _use_new_zipfile_serialization=False)
    out = tmp_path / "weights" / "i3d.safetensors"
    assert convert_perceptual.main(["i3d", "--checkpoint", str(tmp_path / "rgb_imagenet.pt"), "--output", str(out)]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    loaded = models.build("perceptual/i3d", "kinetics400", weights=str(out)).state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in loaded.items())
