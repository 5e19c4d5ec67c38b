"""Sections of the curation stages that work with a model. Weights are local files, always named, never downloaded."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from videofm.config.base import Section, execution

NAME = r"^[a-z][a-z0-9_]*$"
"""Names of scores, features, stages and prompts."""

Dtype = Literal["float32", "bfloat16", "float16"]


def _folder(what: str) -> Any:
    return Field(
        min_length=1, description=f"Local folder with {what}, in the layout of transformers, as safetensors; on every node."
    )


def _head(default: str) -> Any:
    return Field(description=f"Local safetensors file with the linear layers that turn an embedding into {default}.")


class ClipAestheticConfig(Section):
    """Score `aesthetic`: how pleasing a frame looks (LAION: 1 to 10, about 5 for an ordinary picture), by a head on CLIP."""

    kind: Literal["clip_aesthetic"]
    weights: str = _folder("a CLIP or SigLIP model")
    head: str = _head("one number")
    activation: Literal["none", "relu", "gelu", "tanh"] = Field("none", description="Between the layers (LAION: none).")
    output: Literal["none", "sigmoid"] = Field("none", description="After the last layer.")

    def score_names(self) -> tuple[str, ...]:
        """Scores that it gives."""
        return ("aesthetic",)


class ClipNsfwConfig(Section):
    """Score `nsfw`: the probability that a frame is not safe for work, in [0, 1], by a head on CLIP."""

    kind: Literal["clip_nsfw"]
    weights: str = _folder("a CLIP or SigLIP model")
    head: str = _head("one number")
    activation: Literal["none", "relu", "gelu", "tanh"] = Field("relu", description="Between the layers (LAION: relu).")
    output: Literal["none", "sigmoid"] = Field("sigmoid", description="After the last layer.")

    def score_names(self) -> tuple[str, ...]:
        """Scores that it gives."""
        return ("nsfw",)


class ClipTextMatchConfig(Section):
    """Score `text_match`: cosine between the caption and a frame in the space of CLIP, in [-1, 1].

    Clips without a caption get no score. `text_match_cut_tokens` counts the tokens of the caption that the model cannot read.
    """

    kind: Literal["clip_text_match"]
    weights: str = _folder("a CLIP or SigLIP model with its tokenizer")

    def score_names(self) -> tuple[str, ...]:
        """Scores that it gives, to clips with a caption."""
        return ("text_match", "text_match_cut_tokens")


class EmbeddingConfig(Section):
    """Feature `embedding`: the mean over frames of the image features of CLIP, of length 1, in half precision."""

    kind: Literal["embedding"]
    weights: str = _folder("a CLIP or SigLIP model")

    def score_names(self) -> tuple[str, ...]:
        """Scores that it gives: none, but a feature."""
        return ()


class ImageClassifierConfig(Section):
    """The probability of one class of an image classifier, in [0, 1]: watermarks, NSFW, screen recordings."""

    kind: Literal["image_classifier"]
    weights: str = _folder("an image classifier")
    label: str = Field(description="Class whose probability is the score; a name in id2label of the folder's config.json.")
    score: str = Field(pattern=NAME, description="Name of the score.")

    def score_names(self) -> tuple[str, ...]:
        """Scores that it gives."""
        return (self.score,)


class OcrTextConfig(Section):
    """Score `text_area_model`: the share of the frame that boxes of a text detector cover, in [0, 1]."""

    kind: Literal["ocr_text"]
    weights: str = _folder("a text detector (PP-OCR or of the DETR family)")
    labels: list[str] | None = Field(None, description="Classes that are text, of a detector with others too; null takes all.")
    height: int = Field(640, ge=32, multiple_of=32, description="Height of the frames that it sees, in pixels.")
    width: int = Field(640, ge=32, multiple_of=32, description="Width of the frames that it sees, in pixels.")
    min_confidence: float = Field(0.5, gt=0, lt=1, description="Smallest probability of a box, or of a pixel of a text map.")

    def score_names(self) -> tuple[str, ...]:
        """Scores that it gives."""
        return ("text_area_model",)


ScoreModelSection = Annotated[
    ClipAestheticConfig | ClipNsfwConfig | ClipTextMatchConfig | EmbeddingConfig | ImageClassifierConfig | OcrTextConfig,
    Field(discriminator="kind"),
]


class ScoreModelConfig(Section):
    """Score clips with a model on a pool of Ray actors. What it finds is stored; `filter` and views decide."""

    kind: Literal["score_model"] = "score_model"
    name: str = Field(pattern=NAME, description="Name of this stage in reports; each stage of this kind has its own.")
    model: ScoreModelSection = Field(description="Which model, with the local place of its weights.")
    num_frames: int = Field(8, ge=1, description="Frames of a clip that the model sees, evenly spaced.")
    reduce: Literal["mean", "min", "max"] = Field("mean", description="How the scores of the frames become that of the clip.")
    dtype: Dtype = Field("float32", description="Number format of weights and activations.")
    batch_size: int = Field(32, ge=1, description="Frames in one forward pass; the last one is filled up.")
    num_actors: int = execution(1, ge=1, description="Ray actors that hold the model.")
    num_gpus: float = Field(0.0, ge=0, description="GPUs of an actor; 0 computes on the CPU, 0.5 lets two share one.")
    num_cpus: float = execution(1.0, ge=0, description="CPUs of an actor.")

    def score_names(self) -> tuple[str, ...]:
        """Scores that it gives."""
        return self.model.score_names()


class CaptionModelConfig(Section):
    """Write captions with a vision-language model of transformers on a pool of Ray actors. It sees the frames as images."""

    kind: Literal["caption_model"] = "caption_model"
    name: str = Field("caption_model", pattern=NAME, description="Name of this stage in reports.")
    weights: str = _folder("a vision-language model with its processor and chat template")
    prompts: dict[Annotated[str, Field(pattern=NAME)], str] = Field(
        {
            "short": "Describe this video in one sentence.",
            "dense": "Describe this video in detail: the subjects, what they do, the surroundings, the style and the camera.",
        },
        min_length=1,
        description="Name of each caption -> what the model is asked.",
    )
    main: str = Field("dense", description="Which of the prompts gives the caption that training reads; all are stored.")
    overwrite: bool = Field(False, description="Also caption clips that have a caption, such as one from a sidecar.")
    num_frames: int = Field(8, ge=1, description="Frames of a clip that the model sees, evenly spaced.")
    height: int = Field(384, ge=16, description="Height of the frames given to the model's processor, in pixels.")
    width: int = Field(384, ge=16, description="Width of the frames given to the model's processor, in pixels.")
    max_new_tokens: int = Field(256, ge=1, description="Longest answer, in tokens; longer ones are cut and counted.")
    temperature: float = Field(
        0.0, ge=0, description="0 takes the likeliest word each time; above, words are drawn, clip by clip."
    )
    seed: int = Field(0, description="Of the draws; they also depend on the clip and the prompt, and on nothing else.")
    max_repetition: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Largest share of runs of 4 words that occurred before in the caption; above, it is a loop.",
    )
    refusals: list[str] = Field(
        ["I cannot", "I can't", "I can not", "I'm sorry", "I am sorry", "I'm unable", "I am unable", "As an AI", "Sorry,"],
        description="Beginnings of answers that are no caption; upper and lower case are the same.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of weights and activations; auto is bfloat16 on a GPU and float32 on a CPU."
    )
    batch_size: int = Field(4, ge=1, description="Clips in one forward pass; the last one is filled up.")
    num_actors: int = execution(1, ge=1, description="Ray actors that hold the model.")
    num_gpus: float = Field(0.0, ge=0, description="GPUs of an actor; 0 computes on the CPU.")
    num_cpus: float = execution(1.0, ge=0, description="CPUs of an actor.")

    def score_names(self) -> tuple[str, ...]:
        """Scores that it gives, to clips that it captions."""
        return ("caption_cut",)

    @model_validator(mode="after")
    def _main_is_asked(self) -> CaptionModelConfig:
        if self.main not in self.prompts:
            raise ValueError(f"main {self.main!r} is none of the prompts {', '.join(sorted(self.prompts))}; name one of them")
        empty = [name for name, text in self.prompts.items() if not text.strip()]
        if empty:
            raise ValueError(f"the prompt {empty[0]!r} is empty; say what the model is to write, or leave it out")
        return self


class BalanceConfig(Section):
    """Cluster clips by embedding (k-means, fitted on a sample); drop near-duplicates, outliers and what is too common."""

    kind: Literal["balance"] = "balance"
    num_clusters: int = Field(ge=1, description="Clusters; every one is worked on by itself and must fit in memory.")
    num_fit_rows: int = Field(30_000, ge=1, description="Clips that the clusters are fitted on, drawn by hash.")
    num_iterations: int = Field(25, ge=1, description="Most rounds of k-means; it ends when no clip changes its cluster.")
    seed: int = Field(0, description="Of the first centres.")
    max_similarity: float | None = Field(
        0.95,
        gt=0,
        lt=1,
        description="Cosine from which, within a cluster, only the clip of highest resolution stays. null: all stay.",
    )
    max_share: float | None = Field(
        None,
        gt=0,
        description="Largest cluster, in multiples of the mean size, by the sample; larger ones are thinned. null: any.",
    )
    outlier_quantile: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Clips further from their centre than this quantile of the sample are dropped. null: none.",
    )
