"""Captions from a tiny random Llava: those of a direct call of transformers, the same in any company; what is no caption."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers
from PIL import Image

from data_pipelines.models.captioner import Written
from data_pipelines.rows import FrameRequest, Rejected, Row
from data_pipelines.stages.caption_model import CaptionModelStage, repetition, why_no_caption
from tests.unit.data_pipelines import tiny_models as tiny
from videofm.config.curation_models import CaptionModelConfig
from videofm.errors import CheckpointError

PROMPTS = {"short": "Describe shortly", "dense": "Describe this video slowly"}
REFUSALS = CaptionModelConfig.model_fields["refusals"].default
TOKENS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("vlm")
    tiny.save_vlm(made)
    return made


def stage(folder, load=True, **changes):
    section = {
        "kind": "caption_model", "weights": str(folder), "prompts": PROMPTS, "num_frames": 3, "height": 32, "width": 32,
        "max_new_tokens": TOKENS, "max_repetition": 1.0, "refusals": [], **changes,
    }  # fmt: skip
    made = CaptionModelStage(CaptionModelConfig.model_validate(section))
    if load:
        made.load("cpu")
    return made


def direct(folder, frames, prompt):
    """What transformers writes when it is called by hand on one clip, and whether it ended by itself."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    text = f"USER: {'<image> ' * len(frames)}{prompt} ASSISTANT: "
    inputs = processor(text=text, images=[Image.fromarray(frame) for frame in frames], return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return " ".join(processor.tokenizer.decode(output, skip_special_tokens=True).split()), 2 in output.tolist()


def test_captions_are_those_of_the_model(folder):
    made = stage(folder)
    assert made.frames == FrameRequest(3, 32, 32) and made.placement == "model"
    clips = tiny.clips(3, 3, 2)
    answers = made.process_batch(tiny.rows(3, scores={"motion": 0.5}), clips)
    for answer, frames in zip(answers, clips, strict=True):
        by_hand = {name: direct(folder, frames, prompt) for name, prompt in PROMPTS.items()}
        assert answer.captions == {name: text for name, (text, _) in by_hand.items()}
        assert answer.caption == by_hand["dense"][0]
        assert answer.scores == {"motion": 0.5, "caption_cut": float(sum(not ended for _, ended in by_hand.values()))}
        assert answer.scored_by == {"caption": made.weights_hash()}
    texts = [text for answer in answers for text in answer.captions.values()]
    assert len(set(texts)) > 3, "a model that always says the same proves nothing"


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_does_not_depend_on_its_company(folder, temperature):
    made = stage(folder, temperature=temperature, batch_size=3)
    rows, clips = tiny.rows(5), tiny.clips(3, 2, 3, 3, 3)
    together = made.process_batch(rows, clips)
    assert made.process_batch(rows[::-1], clips[::-1])[::-1] == together
    assert [made.process_batch([row], [frames])[0] for row, frames in zip(rows, clips, strict=True)] == together
    one_by_one = stage(folder, temperature=temperature, batch_size=1)
    assert one_by_one.process_batch(rows, clips) == together


def test_every_forward_pass_is_full_and_of_one_length(folder, monkeypatch):
    """So that prompts of one pass are of one length and passes of one shape, whatever came along."""
    made = stage(folder, batch_size=3)
    seen = []

    def record(clips, prompt):
        seen.append([len(clip) for clip in clips])
        return [Written(f"text {clip.sum()}", False) for clip in clips]

    monkeypatch.setattr(made.model, "_pass", record)
    clips = tiny.clips(3, 2, 3, 3, 3)
    answers = made.process_batch(tiny.rows(5), clips)
    assert [answer.caption for answer in answers] == [f"text {clip.sum()}" for clip in clips]
    assert sorted(seen) == [[2] * 3] * 2 + [[3] * 3] * 4  # two prompts; 4 clips of 3 frames fill two passes, 1 of 2 frames one


def text_of(answer):
    """What was written, also where it is no caption."""
    return answer.detail if isinstance(answer, Rejected) else answer.caption


def test_draws_follow_the_seed_and_leave_the_generator_alone(folder):
    rows, clips = tiny.rows(3), tiny.clips(3, 3, 3)
    before = torch.random.get_rng_state()
    first, again, other = (
        list(map(text_of, stage(folder, temperature=1.5, seed=seed).process_batch(rows, clips))) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(before, torch.random.get_rng_state())
    same = map(text_of, stage(folder, temperature=1.5).process_batch(rows, clips[:1] * 3))
    assert len(set(same)) > 1, "clips with equal frames draw for themselves"


def test_captions_that_are_there_stay_unless_overwritten(folder):
    rows = [Row("0" * 24, "a.mp4", "a.mp4", 1, caption="from a sidecar"), *tiny.rows(1)]
    clips = tiny.clips(3, 3)
    kept, new = stage(folder).process_batch(rows, clips)
    assert kept == rows[0] and new.caption
    assert stage(folder).process_batch(rows[:1], clips[:1]) == rows[:1]
    replaced, _ = stage(folder, overwrite=True).process_batch(rows, clips)
    assert replaced.caption not in ("", "from a sidecar") and set(replaced.captions) == {"short", "dense"}


def test_one_bad_answer_drops_the_clip(folder):
    made = stage(folder, load=False, refusals=REFUSALS, max_repetition=0.5)
    answers = {
        "Describe shortly": ["a dog runs", "a dog", " .", "ok then"],
        "Describe this video slowly": ["I\u2019m sorry, no", "a long dog"] + ["x y"] * 2,
    }
    made.model.write = lambda clips, prompt, seeds: [Written(text, cut=text == "a long dog") for text in answers[prompt]]
    refused, kept, empty, _ = made.process_batch(tiny.rows(4), tiny.clips(1, 1, 1, 1))
    assert isinstance(refused, Rejected) and (refused.reason, refused.kind) == ("caption_refused", "dropped")
    assert refused.detail == "prompt dense: the model wrote 'I\u2019m sorry, no'"
    assert isinstance(empty, Rejected) and empty.reason == "caption_empty" and empty.detail.startswith("prompt short")
    assert kept.captions == {"short": "a dog", "dense": "a long dog"} and kept.scores == {"caption_cut": 1.0}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A red circle moves slowly to the left across a dark background.", None),
        ("A man says: I cannot do this.", None),
        ("", "caption_empty"),
        (" ...!? ", "caption_empty"),
        ("I cannot help with that.", "caption_refused"),
        ("i CAN\u2019T see a video", "caption_refused"),
        ("As an AI language model, I", "caption_refused"),
        ("a dog runs and " * 10, "caption_loop"),
        ("\u4e00\u53ea\u72d7\u5728\u8dd1" * 6, "caption_loop"),
        ("\u4e00\u53ea\u72d7\u5728\u8349\u5730\u4e0a\u8dd1", None),
    ],
)
def test_what_is_no_caption(text, reason):
    found = why_no_caption(text, REFUSALS, 0.5)
    assert (found and found[0]) == reason


def test_repetition_counts_runs():
    """`a b` 5 times has 10 words and 7 runs of 4, of two kinds: 5 of 7 occurred before. 3 words have no run."""
    assert repetition("a b " * 5) == pytest.approx(5 / 7)
    assert repetition("a b c d e f g h") == 0.0
    assert repetition("no no no") == 0.0


def test_the_default_number_format_is_that_of_the_device(folder):
    assert next(stage(folder).model.model.parameters()).dtype == torch.float32
    assert next(stage(folder, dtype="bfloat16").model.model.parameters()).dtype == torch.bfloat16


def test_a_model_that_cannot_caption_is_refused(folder, tmp_path):
    tiny.save_clip(tmp_path / "clip")
    with pytest.raises(
        CheckpointError, match="holds a model of type 'clip', wanted is a vision-language model .one of .* of transf"
    ):
        stage(tmp_path / "clip", load=False)
    tiny.save_vlm(tmp_path / "base", chat=None)
    with pytest.raises(CheckpointError, match="has no chat template .chat_template.jinja.; take the `instruct` form"):
        stage(tmp_path / "base", load=False)
    shutil.copytree(folder, tmp_path / "cut")
    (tmp_path / "cut" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the processor of .*cut cannot be used"):
        stage(tmp_path / "cut", load=False)
    transformers.BlipConfig().save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="holds no model.safetensors"):
        stage(tmp_path / "other", load=False)


def test_a_config_must_ask_something():
    base = {"kind": "caption_model", "weights": "w"}
    with pytest.raises(ValueError, match="main 'long' is none of the prompts dense, short; name one of them"):
        CaptionModelConfig.model_validate({**base, "main": "long"})
    with pytest.raises(ValueError, match="the prompt 'dense' is empty; say what the model is to write"):
        CaptionModelConfig.model_validate({**base, "prompts": {"dense": " "}})
