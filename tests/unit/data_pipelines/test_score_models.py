"""Score models: equal to direct calls of transformers, the same in any company, and clear about what does not fit."""

from __future__ import annotations

import hashlib
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from data_pipelines.models import text_area
from data_pipelines.models.folder import ModelFolder, Pixels
from data_pipelines.models.head import Head
from data_pipelines.rows import FrameRequest, unpack_array
from data_pipelines.stages.score_model import ScoreModelStage
from tests.unit.data_pipelines import tiny_models as tiny
from videofm import registry
from videofm.config.curate import CurateConfig
from videofm.config.curation_models import ScoreModelConfig
from videofm.errors import CheckpointError, ConfigError, DataError

LENGTHS = (4, 4, 3, 1)


def stage(model, load=True, **changes):
    section = {"kind": "score_model", "name": "under_test", "model": model, **changes}
    made = ScoreModelStage(ScoreModelConfig.model_validate(section))
    if load:
        made.load("cpu")
    return made


def features(model, processor, clip):
    """Image features as transformers makes them, of length 1, from its own preprocessing."""
    pixels = processor(images=list(clip), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = model.get_image_features(pixel_values=pixels).pooler_output
    return found / found.norm(dim=-1, keepdim=True)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tiny.save_clip(folder)
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder):
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    return model, transformers.CLIPImageProcessorPil.from_pretrained(clip_folder)


@pytest.fixture(scope="module")
def laion(tmp_path_factory):
    """LAION's aesthetic head, as its authors lay it out, with its file."""
    torch.manual_seed(1)
    drop = nn.Dropout(0.2)
    layers = [nn.Linear(24, 20), drop, nn.Linear(20, 16), drop, nn.Linear(16, 8), drop, nn.Linear(8, 4), nn.Linear(4, 1)]
    head = nn.Module()
    head.layers = nn.Sequential(*layers)
    path = tmp_path_factory.mktemp("head") / "aesthetic.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in head.state_dict().items()}, path)
    return head.layers.eval(), path


@pytest.mark.parametrize("reduce", ["mean", "min", "max"])
def test_aesthetic_is_clip_and_the_head(clip_folder, clip, laion, reduce):
    made = stage({"kind": "clip_aesthetic", "weights": str(clip_folder), "head": str(laion[1])}, reduce=reduce, num_frames=4)
    assert made.frames == FrameRequest(4, 32, 32) and made.placement == "model"
    clips = tiny.clips(*LENGTHS)
    answers = made.process_batch(tiny.rows(4), clips)
    assert made.config.score_names() == ("aesthetic",)
    for answer, frames in zip(answers, clips, strict=True):
        with torch.no_grad():
            values = laion[0](features(*clip, frames)).squeeze(-1)
        assert answer.scores["aesthetic"] == pytest.approx(float(getattr(torch, reduce)(values)), abs=2e-5)
        assert answer.scored_by == {"aesthetic": made.weights_hash()} and answer.features == {}
    assert len({answer.scores["aesthetic"] for answer in answers}) == 4


def test_nsfw_normalises_as_keras_does(clip_folder, clip, tmp_path):
    generator = torch.Generator().manual_seed(2)
    tensors = {
        "mean": torch.randn(24, generator=generator) * 0.1, "variance": torch.rand(24, generator=generator) * 0.05,
        "1.weight": torch.randn(8, 24, generator=generator), "1.bias": torch.randn(8, generator=generator),
        "2.weight": torch.randn(1, 8, generator=generator), "2.bias": torch.randn(1, generator=generator),
    }  # fmt: skip
    tensors["variance"][3] = 0.0  # a constant input: divided by the least deviation, not by 0
    tensors["1.weight"][:, 3] = 0.0
    save_file(tensors, tmp_path / "nsfw.safetensors")
    made = stage({"kind": "clip_nsfw", "weights": str(clip_folder), "head": str(tmp_path / "nsfw.safetensors")}, reduce="max")
    (frames,) = tiny.clips(5)
    (answer,) = made.process_batch(tiny.rows(1), [frames])
    x = features(*clip, frames).numpy().astype(np.float64)
    t = {name: tensor.numpy().astype(np.float64) for name, tensor in tensors.items()}
    x = (x - t["mean"]) / np.maximum(np.sqrt(t["variance"]), 1e-7)
    x = np.maximum(x @ t["1.weight"].T + t["1.bias"], 0) @ t["2.weight"].T + t["2.bias"]
    assert answer.scores["nsfw"] == pytest.approx(float((1 / (1 + np.exp(-x))).max()), abs=2e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_text_match_is_the_cosine_of_the_model_itself(kind, tmp_path):
    model = tiny.save_clip(tmp_path, kind)
    made = stage({"kind": "clip_text_match", "weights": str(tmp_path)}, batch_size=3)
    captions = ["red circle moves left", "", "blue square " * 10, "green"]
    clips = tiny.clips(*LENGTHS)
    given = [row.with_(caption=text) for row, text in zip(tiny.rows(4), captions, strict=True)]
    answers = made.process_batch(given, clips)
    assert answers[1].scores == {} and answers[1].scored_by == {}
    assert made.config.score_names() == tuple(answers[0].scores)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    scale = model.logit_scale.detach().exp()
    bias = 0.0 if kind == "clip" else model.logit_bias.detach()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    for i in (0, 2, 3):
        inputs = words(captions[i], padding="max_length", truncation=True, max_length=tiny.MAX_TOKENS, return_tensors="pt")
        pixels = processor(images=list(clips[i]), return_tensors="pt")["pixel_values"]
        mask = {"attention_mask": inputs["attention_mask"]} if kind == "clip" else {}
        with torch.no_grad():
            logits = model(input_ids=inputs["input_ids"], pixel_values=pixels, **mask).logits_per_image
        assert answers[i].scores["text_match"] == pytest.approx(float(((logits - bias) / scale).mean()), abs=2e-5)
    # 20 words and two marks of 12 tokens that fit; 4 words and 1 word fit.
    assert [answers[i].scores["text_match_cut_tokens"] for i in (0, 2, 3)] == [0, 22 - tiny.MAX_TOKENS, 0]


def test_embedding_is_the_direction_of_the_mean(clip_folder, clip):
    made = stage({"kind": "embedding", "weights": str(clip_folder)})
    clips = tiny.clips(*LENGTHS)
    for answer, frames in zip(made.process_batch(tiny.rows(4), clips), clips, strict=True):
        vector = unpack_array(answer.features["embedding"], np.float16)
        mean = features(*clip, frames).mean(0).numpy()
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-3)
        assert answer.scores == {} and answer.scored_by == {"embedding": made.weights_hash()}


@pytest.mark.parametrize(
    ("problem", "squash"), [(None, lambda x: x.softmax(-1)), ("multi_label_classification", torch.sigmoid)]
)
def test_image_classifier_gives_the_probability_of_the_label(problem, squash, tmp_path):
    model = tiny.save_classifier(tmp_path, problem_type=problem)
    section = {"kind": "image_classifier", "weights": str(tmp_path), "label": "watermark", "score": "mark"}
    made = stage(section, batch_size=2)
    clips = tiny.clips(*LENGTHS)
    processor = transformers.ViTImageProcessorPil.from_pretrained(tmp_path)
    for answer, frames in zip(made.process_batch(tiny.rows(4), clips), clips, strict=True):
        with torch.no_grad():
            logits = model(**processor(images=list(frames), return_tensors="pt")).logits
        assert answer.scores["mark"] == pytest.approx(float(squash(logits)[:, 1].mean()), abs=2e-5)
    with pytest.raises(
        ConfigError, match=r"label 'watermarks' is no class of .*, did you mean 'watermark'\?; there are clean, logo"
    ):
        stage({**section, "label": "watermarks"}, load=False)


def test_text_boxes_are_those_of_the_detector(tmp_path):
    """The union of the boxes that transformers' own reading of the answer keeps, drawn on a fine grid."""
    model = tiny.save_yolos(tmp_path)
    section = {
        "kind": "ocr_text",
        "weights": str(tmp_path),
        "labels": ["text"],
        "height": 32,
        "width": 32,
        "min_confidence": 0.2,
    }
    made = stage(section, batch_size=4)
    (frames,) = tiny.clips(6)
    (answer,) = made.process_batch(tiny.rows(1), [frames])
    processor = transformers.YolosImageProcessorPil.from_pretrained(tmp_path)
    pixels = processor(images=list(frames), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(pixel_values=pixels)
    probability = output.logits.softmax(-1)[..., 1]
    areas, boxes = [], 0
    for sure, found in zip(probability >= 0.2, output.pred_boxes, strict=True):
        grid = np.zeros((1024, 1024), bool)
        for x, y, w, h in found[sure].numpy():
            edges = (np.clip([y - h / 2, y + h / 2, x - w / 2, x + w / 2], 0, 1) * 1024).round().astype(int)
            grid[edges[0] : edges[1], edges[2] : edges[3]] = True
            boxes += 1
        areas.append(grid.mean())
    assert 0 < boxes < probability.numel(), "the threshold must part the boxes, or the test proves nothing"
    assert answer.scores["text_area_model"] == pytest.approx(np.mean(areas), abs=0.01)
    with pytest.raises(ConfigError, match="label 'texts' is no class of .*, did you mean 'text'"):
        stage({**section, "labels": ["texts"]}, load=False)


def test_a_text_map_is_read_as_the_model_wants_it(tmp_path, monkeypatch):
    """PP-OCR: scaled with mean and deviation in the order of RGB, then turned to BGR; each map becomes boxes, and an area."""
    model = tiny.save_text_map_detector(tmp_path)
    (frames,) = tiny.clips(3)
    scaled = (frames / 255 - np.array([0.406, 0.456, 0.485])) / np.array([0.225, 0.224, 0.229])
    rgb = torch.from_numpy(scaled.transpose(0, 3, 1, 2).copy()).float()
    with torch.no_grad():
        expected, turned = (model(pixel_values=x).last_hidden_state[:, 0].numpy() for x in (rgb.flip(1), rgb))
    assert np.abs(expected - turned).max() > 0.5, "the order of colours must matter, or the test proves nothing"
    seen = []
    monkeypatch.setattr(
        text_area, "boxes_of_map", lambda text, sure: seen.append(text) or np.array([[0, 0, len(seen) / 4, sure]])
    )
    section = {"kind": "ocr_text", "weights": str(tmp_path), "height": 32, "width": 32, "min_confidence": 0.5}
    (answer,) = stage(section, batch_size=2).process_batch(tiny.rows(1), [frames])
    np.testing.assert_allclose(seen, expected, atol=1e-3)
    assert answer.scores["text_area_model"] == pytest.approx((1 + 2 + 3) / 3 / 4 * 0.5)


def test_boxes_of_a_text_map():
    """A core of 20 x 60 of 100 x 200 grows by 1.5 * 1200 / 160 = 11.25 a side: 42.5 x 82.5 pixels."""
    text = np.zeros((100, 200), np.float32)
    text[40:60, 50:110] = 0.9
    text[5, 5] = 0.4  # not sure enough
    boxes = text_area.boxes_of_map(text, 0.5)
    np.testing.assert_allclose(boxes, [[(50 - 11.25) / 200, (40 - 11.25) / 100, (110 + 11.25) / 200, (60 + 11.25) / 100]])
    assert text_area.area_of(boxes) == pytest.approx(42.5 * 82.5 / 20000, abs=0.005)
    assert text_area.area_of(text_area.boxes_of_map(text * 0, 0.5)) == 0.0


def test_area_counts_overlap_once_and_the_frame_only():
    boxes = np.array([[0.0, 0.0, 0.5, 1.0], [0.25, 0.0, 0.75, 1.0], [0.9, -1.0, 3.0, 2.0]])
    assert text_area.area_of(boxes) == pytest.approx(0.75 + 0.1, abs=0.005)


@pytest.mark.parametrize("kind", ["clip_text_match", "embedding"])
def test_an_answer_does_not_depend_on_its_company(clip_folder, kind):
    """Bit for bit: all clips at once, in another order, or one at a time."""
    made = stage({"kind": kind, "weights": str(clip_folder)}, batch_size=5)
    given = [row.with_(caption=f"red w{i}") for i, row in enumerate(tiny.rows(6))]
    clips = tiny.clips(3, 4, 1, 2, 4, 4)
    together = made.process_batch(given, clips)
    assert made.process_batch(given[::-1], clips[::-1])[::-1] == together
    assert [made.process_batch([row], [frames])[0] for row, frames in zip(given, clips, strict=True)] == together


@pytest.mark.parametrize("kind", ["clip_text_match", "image_classifier", "ocr_text"])
def test_every_forward_pass_has_one_shape(kind, clip_folder, tmp_path):
    """Kernels are chosen by shape: on a GPU another number of frames changes last bits, though on a CPU it may not."""
    extra = {"image_classifier": {"label": "logo", "score": "logo"}, "ocr_text": {"height": 32, "width": 32}}.get(kind, {})
    if kind != "clip_text_match":
        {"image_classifier": tiny.save_classifier, "ocr_text": tiny.save_yolos}[kind](tmp_path)
    folder = clip_folder if kind == "clip_text_match" else tmp_path
    made = stage({"kind": kind, "weights": str(folder), **extra}, batch_size=5)
    shapes = set()

    def watch(module, args, given):
        shapes.update(tuple(value.shape) for value in (*args, *given.values()) if torch.is_tensor(value))

    model = made.model.tower.model if kind == "clip_text_match" else made.model.model
    watched = (model.vision_model, model.text_model) if kind == "clip_text_match" else (model,)
    for part in watched:
        part.register_forward_pre_hook(watch, with_kwargs=True)
    for lengths in ((3, 4, 1, 2), (1,), (5, 5)):
        made.process_batch(tiny.rows(len(lengths), caption="red"), tiny.clips(*lengths))
    texts = {(5, tiny.MAX_TOKENS)} if kind == "clip_text_match" else set()
    assert shapes == {(5, 3, 32, 32)} | texts


def test_the_size_of_a_pass_changes_no_more_than_rounding(clip_folder, laion):
    model = {"kind": "clip_aesthetic", "weights": str(clip_folder), "head": str(laion[1])}
    clips = tiny.clips(3, 4, 1, 2)
    whole, small = (stage(model, batch_size=size).process_batch(tiny.rows(4), clips) for size in (64, 3))
    for a, b in zip(whole, small, strict=True):
        assert a.scores["aesthetic"] == pytest.approx(b.scores["aesthetic"], abs=1e-5)


def test_half_precision_is_used_and_close(clip_folder, laion):
    model = {"kind": "clip_aesthetic", "weights": str(clip_folder), "head": str(laion[1])}
    full, half = stage(model), stage(model, dtype="bfloat16")
    assert next(half.model.tower.model.parameters()).dtype == torch.bfloat16
    clips = tiny.clips(4)
    a, b = (made.process_batch(tiny.rows(1), clips)[0].scores["aesthetic"] for made in (full, half))
    assert a != b and a == pytest.approx(b, abs=0.1)


def test_pixels_are_those_of_the_processor(clip_folder, clip):
    (frames,) = tiny.clips(3)
    ours = Pixels(ModelFolder(str(clip_folder), {"clip": "CLIPModel"}, "a CLIP"))(frames, "cpu", torch.float32)
    np.testing.assert_allclose(ours, clip[1](images=list(frames), return_tensors="np")["pixel_values"], atol=1e-6)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(registry.SCORE_MODELS, "embedding", "tests.unit.data_pipelines.tiny_models:FakeScoreModel")
    return {"kind": "embedding", "weights": "nowhere"}


def test_the_stage_around_a_model(fake):
    made = stage(fake, num_frames=3, reduce="min", dtype="float16", batch_size=7)
    assert made.model.made == ("embedding", "float16", 7) and made.frames == FrameRequest(3, 4, 6)
    frames = np.zeros((3, 4, 6, 3), np.uint8)
    frames[..., 0] = np.array([5, 3, 7])[:, None, None]
    (row,) = made.process_batch(tiny.rows(1, scores={"motion": 0.5}), [frames])
    assert row.scores == {"motion": 0.5, "fake": 3.0, "num": 3.0}
    assert unpack_array(row.features["shape"], np.int32).tolist() == [3, 4, 6, 3]
    assert row.scored_by == dict.fromkeys(("fake", "num", "shape"), "f" * 64)
    with pytest.raises(ConfigError, match="stage under_test: an earlier stage already made 'fake'; leave one of them out"):
        made.process_batch([row], [frames])


def test_a_number_that_is_none_is_an_error(fake):
    made = stage(fake)
    made.model.score = lambda clips, captions: [tiny.Scored({"fake": np.array([1.0, np.nan])})]
    with pytest.raises(DataError, match="stage under_test: fake of a.mp4 frame 0 is nan; wrong weights or dtype"):
        made.process_batch(tiny.rows(1), [np.zeros((2, 4, 6, 3), np.uint8)])


def test_the_hash_follows_the_content_and_not_the_place(clip_folder, laion, tmp_path):
    """Sums of SHA-256 as `sha256sum` prints them, hashed; one changed weight, the config or the head changes it."""

    def hash_of(folder, head=laion[1]):  # fmt: skip
        return stage({"kind": "clip_aesthetic", "weights": str(folder), "head": str(head)}, load=False).weights_hash()

    copy = tmp_path / "elsewhere"
    shutil.copytree(clip_folder, copy)
    (copy / "README.md").write_text("not part of the model")
    files = [*(p for p in clip_folder.iterdir() if p.suffix in (".json", ".safetensors", ".txt")), laion[1]]
    lines = sorted((p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files)
    expected = hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in lines).encode()).hexdigest()
    assert hash_of(clip_folder) == hash_of(copy) == expected
    (copy / "preprocessor_config.json").write_text((copy / "preprocessor_config.json").read_text() + "\n")
    assert (second := hash_of(copy)) != expected
    tiny.edit_weights(copy, logit_scale=torch.tensor(1.0))
    assert hash_of(copy) not in (expected, second)
    save_file({"weight": torch.ones(1, 24)}, tmp_path / "other.safetensors")
    assert hash_of(clip_folder, tmp_path / "other.safetensors") != expected


def broken(folder, how):
    """Spoil a copy of a model; what the error says, and whether it is seen before weights are read."""
    if how == "missing folder":
        shutil.rmtree(folder)
        return "is no folder; name a local folder with a CLIP or SigLIP model .nothing is downloaded.", True
    if how == "no config":
        (folder / "config.json").unlink()
        return "has no config.json", True
    if how == "bad config":
        (folder / "config.json").write_text("{")
        return "config.json is no JSON", True
    if how == "other model":
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace('"model_type": "clip"', '"model_type": "vit"'))
        return "holds a model of type 'vit', wanted is a CLIP or SigLIP model .clip, siglip.", True
    if how == "half of it":
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace('"CLIPModel"', '"CLIPVisionModel"'))
        return "was saved as CLIPVisionModel, wanted is CLIPModel", True
    if how == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        return "holds no model.safetensors; pytorch_model.bin is a pickle, which is never read: convert it", True
    if how == "cut":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
        return "model.safetensors is no whole safetensors file", True
    if how == "a shard less":
        (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}}'
        )
        return "lacks model-1.safetensors of its 2 weight files; copy it whole", True
    if how == "no preprocessing":
        (folder / "preprocessor_config.json").unlink()
        return "has neither preprocessor_config.json nor processor_config.json", True
    if how == "other size":
        text = (folder / "preprocessor_config.json").read_text()
        (folder / "preprocessor_config.json").write_text(text.replace("32", "48"))
        return "its preprocessing makes frames of 48x48, its vision model takes 32x32", True
    if how == "two channels":
        text = (folder / "preprocessor_config.json").read_text()
        (folder / "preprocessor_config.json").write_text(text.replace('"image_mean": [', '"image_mean": [0.5,'))
        return "image_mean and image_std of its preprocessing must be 3 numbers each, for RGB", True
    if how == "missing weight":
        tiny.edit_weights(folder, visual_projection__weight=None)
        return "lacks 1 weights .visual_projection.weight.; copy it whole", False
    if how == "a weight more":
        tiny.edit_weights(folder, visual_projection__lora=torch.zeros(3))
        return "has more than the model takes: 1 weights .visual_projection.lora.", False
    assert how == "wrong shape"
    tiny.edit_weights(folder, visual_projection__weight=torch.zeros(3, 4))
    return "the weights of .* cannot be used: You set `ignore_mismatched_sizes`", False


@pytest.mark.parametrize(
    "how",
    [
        "missing folder", "no config", "bad config", "other model", "half of it", "pickle", "cut", "a shard less",
        "no preprocessing", "other size", "two channels", "missing weight", "a weight more", "wrong shape",
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_folder_is_said(how, clip_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(clip_folder, folder)
    message, at_once = broken(folder, how)
    section = {"kind": "embedding", "weights": str(folder)}
    with pytest.raises(CheckpointError, match=message):
        stage(section, load=not at_once)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"weight": (1, 16)}, "takes embeddings of width 16, the model makes 24: it is of another one"),
        ({"0.weight": (8, 24), "1.weight": (1, 9)}, "a layer of 8 outputs is followed by one of 9 inputs"),
        ({"weight": (2, 24)}, "ends with 2 outputs; a score is one number"),
        ({"0.weight": (1, 24), "0.bias": (3,)}, r"0.bias is \[3\], 0.weight is \[1, 24\]"),
        ({"weight": (1, 24), "mean": (24,)}, "has mean without its partner"),
        ({"weight": (1, 24), "mean": (23,), "variance": (23,)}, r"mean is \[23\], wanted is \[24\]|variance is \[23\]"),
        ({"0.weight": (24,)}, r"0.weight \[24\] is no part of a linear layer"),
        ({"0.weight": (1, 24), "1.running_mean": (1,)}, "1.running_mean .* is no part of a linear layer"),
        ({"a.0.weight": (1, 24), "b.0.weight": (1, 24)}, "both are layer 0"),
        ({"0.weight": (1, 24), "1.bias": (1,)}, "holds no stack of linear layers: 1.bias"),
    ],
)
def test_what_is_wrong_with_a_head_is_said(shapes, message, tmp_path):
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "head.safetensors")
    with pytest.raises(CheckpointError, match=message):
        Head(tmp_path / "head.safetensors", 24, "none", "none")


def test_a_missing_head_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="the weights .*head.safetensors are missing; name a local safetensors file"):
        Head(tmp_path / "head.safetensors", 24, "none", "none")


@pytest.mark.parametrize(
    ("activation", "output", "expected"),
    [("none", "none", -4.0), ("relu", "none", 2.0), ("tanh", "none", None), ("gelu", "none", None), ("relu", "sigmoid", None)],
)
def test_heads_apply_what_the_config_names(activation, output, expected, tmp_path):
    """x = (1, 0): layer 0 gives (2, -3), layer 1 adds with weights (1, 2): 2 - 6 = -4, and with relu 2."""
    save_file({"0.weight": torch.tensor([[2.0, 0], [-3, 0]]), "1.weight": torch.tensor([[1.0, 2]])}, tmp_path / "h.safetensors")
    head = Head(tmp_path / "h.safetensors", 2, activation, output)
    head.load("cpu")
    found = float(head(torch.tensor([[1.0, 0.0]]))[0])
    if expected is None:
        hidden = {"tanh": np.tanh([2, -3]), "gelu": nn.GELU()(torch.tensor([2.0, -3])).numpy(), "relu": np.array([2.0, 0])}[
            activation
        ]
        expected = hidden @ [1, 2]
        expected = 1 / (1 + np.exp(-expected)) if output == "sigmoid" else expected
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_config_names_a_kind_and_no_module():
    section = {"kind": "score_model", "name": "x", "model": {"kind": "os:system", "weights": "w"}}
    with pytest.raises(ValueError, match="os:system"):
        CurateConfig.model_validate({"kind": "curate", "source": "s", "stages": [section]})
    assert set(registry.SCORE_MODELS) == {
        section.model_fields["kind"].annotation.__args__[0]
        for section in ScoreModelConfig.model_fields["model"].annotation.__args__
    }
