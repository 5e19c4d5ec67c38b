"""Captions from a vision-language model: the stage around `models/captioner.py`, and the rules for what is no caption."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.models.captioner import Captioner, Written
from data_pipelines.rows import FrameRequest, Placement, Rejected, Row
from videofm.config.curation_models import CaptionModelConfig

_RUN = 4
"""Words of a run, for finding loops."""
# Scripts without spaces: every character counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


class CaptionModelStage:
    """See `CaptionModelConfig`. A clip whose answer to any prompt is no caption is dropped, with the reason.

    `Row.caption` becomes the answer to the main prompt, `Row.captions` holds all; score `caption_cut` counts the answers that
    were stopped at the limit of tokens. Building it checks the model's files; `load` reads the weights.
    """

    name, requires = "caption_model", ()
    placement: Placement = "model"

    def __init__(self, config: CaptionModelConfig) -> None:
        self.config = config
        self.model = Captioner(config.weights, config.dtype, config.batch_size, config.max_new_tokens, config.temperature)
        self.frames = FrameRequest(config.num_frames, config.height, config.width)
        self._hash: str | None = None

    def weights_hash(self) -> str:
        """SHA-256 over the model's files; they are read once."""
        if self._hash is None:
            self._hash = self.model.weights_hash()
        return self._hash

    def load(self, device: str) -> None:
        """Read the weights onto `device`."""
        self.model.load(device)

    def process_batch(self, rows: Sequence[Row], frames: Sequence[np.ndarray[Any, Any]]) -> list[Row | Rejected]:
        """The rows with captions; those that have one pass unseen, unless `overwrite`."""
        todo = [i for i, row in enumerate(rows) if self.config.overwrite or not row.caption]
        answers: list[Row | Rejected] = list(rows)
        written: dict[str, list[Written]] = {}
        for name, prompt in self.config.prompts.items():
            seeds = [f"{self.config.seed}:{rows[i].key}:{name}" for i in todo]
            written[name] = self.model.write([frames[i] for i in todo], prompt, seeds)
        for place, i in enumerate(todo):
            answers[i] = self._captioned(rows[i], {name: texts[place] for name, texts in written.items()})
        return answers

    def _captioned(self, row: Row, texts: dict[str, Written]) -> Row | Rejected:
        for name, written in texts.items():
            refusal = why_no_caption(written.text, self.config.refusals, self.config.max_repetition)
            if refusal is not None:
                reason, detail = refusal
                return Rejected(reason, f"prompt {name}: {detail}", row.scores)
        return row.with_(
            caption=texts[self.config.main].text,
            captions={**row.captions, **{name: written.text for name, written in texts.items()}},
            scores={**row.scores, "caption_cut": float(sum(written.cut for written in texts.values()))},
            scored_by={**row.scored_by, "caption": self.weights_hash()},
        )


def why_no_caption(text: str, refusals: Sequence[str], max_repetition: float) -> tuple[str, str] | None:
    """Reason and detail if `text` is empty, begins like a refusal, or says the same thing again and again."""
    if not _WORD.search(text):
        return "caption_empty", f"the model wrote {text[:60]!r}"
    plain = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").casefold()
    if any(plain.startswith(start.casefold()) for start in refusals):
        return "caption_refused", f"the model wrote {text[:120]!r}"
    share = repetition(text)
    if share > max_repetition:
        return (
            "caption_loop",
            f"{share:.2f} of its runs of {_RUN} words occurred before, at most {max_repetition}: {text[:80]!r}",
        )
    return None


def repetition(text: str) -> float:
    """The share of the runs of 4 words of `text` that occurred before in it, in [0, 1); 0 for fewer than 4 words."""
    words = _WORD.findall(text.casefold())
    runs = [tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
