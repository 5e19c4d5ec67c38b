"""A local model folder in the layout of transformers: checked without reading weights, hashed, loaded with nothing left out.

```
config.json  preprocessor_config.json or processor_config.json  tokenizer*  model.safetensors or model-*.safetensors + index
```
Nothing is fetched, no pickle is read, no code of the folder runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipelines.models.contract import Array
from videofm.errors import CheckpointError
from videofm.files import sha256_of

INDEX = "model.safetensors.index.json"
_READ_SUFFIXES = frozenset([".safetensors", ".json", ".txt", ".model", ".jinja"])
"""Of the files that can change what a model answers: weights, config, preprocessing, tokenizer, chat template."""
_HARMLESS_EXTRAS = ("position_ids", "num_batches_tracked")
"""Buffers that old folders hold and that are computed now."""
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


class ModelFolder:
    """A folder whose architecture is one of `architectures` (model type -> class, a table of transformers).

    Raises:
        CheckpointError: it is missing, incomplete, has no safetensors, or is of another architecture.
    """

    def __init__(self, place: str, architectures: Mapping[str, Any], what: str) -> None:
        self.path, self.what = Path(place), what
        if not self.path.is_dir():
            raise CheckpointError(f"weights: {place} is no folder; name a local folder with {what} (nothing is downloaded)")
        self.values = self._json("config.json")
        self._check_architecture(architectures)
        self.weights = self._weight_files()
        for file in self.weights:
            check_safetensors(file)

    def _check_architecture(self, architectures: Mapping[str, Any]) -> None:
        found = str(self.values.get("model_type"))
        if found not in architectures:
            known = (
                ", ".join(sorted(architectures)) if len(architectures) <= 12 else f"one of {len(architectures)} of transformers"
            )
            raise CheckpointError(f"{self.path} holds a model of type {found!r}, wanted is {self.what} ({known})")
        allowed = architectures[found]
        allowed = [allowed] if isinstance(allowed, str) else list(allowed)
        named = self.values.get("architectures") or []
        if named and named[0] not in allowed:
            raise CheckpointError(
                f"{self.path} was saved as {named[0]}, wanted is {' or '.join(allowed)}: it is not the whole of {self.what}"
            )

    def _weight_files(self) -> list[Path]:
        names = sorted(path.name for path in self.path.glob("*.safetensors"))
        if (self.path / INDEX).exists():
            wanted = sorted(set(self._json(INDEX).get("weight_map", {}).values()))
            missing = [name for name in wanted if name not in names]
            if missing:
                raise CheckpointError(f"{self.path} lacks {missing[0]} of its {len(wanted)} weight files; copy it whole")
            names = wanted
        elif "model.safetensors" in names:
            names = ["model.safetensors"]
        else:
            pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.path.glob(pattern))
            hint = f"; {pickles[0]} is a pickle, which is never read: convert it" if pickles else ""
            raise CheckpointError(f"{self.path} holds no model.safetensors{hint}")
        return [self.path / name for name in names]

    def _json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{self.path} has no {name}; name a folder in the layout of transformers") from None
        except ValueError as error:
            raise CheckpointError(f"{self.path / name} is no JSON: {error}") from None
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.path / name} holds no JSON object")
        return value

    def files(self) -> list[Path]:
        """All files that determine what the model answers."""
        others = (p for p in self.path.iterdir() if p.is_file() and p.suffix in _READ_SUFFIXES and p.suffix != ".safetensors")
        return sorted([*self.weights, *others])

    def config(self) -> Any:
        """The config as an object of transformers, defaults filled in."""
        with self._explained("config.json"):
            return transformers.AutoConfig.from_pretrained(self.path, **_LOCAL)

    def tokenizer(self) -> Any:
        """The tokenizer of the folder."""
        with self._explained("tokenizer"):
            return transformers.AutoTokenizer.from_pretrained(self.path, **_LOCAL)

    def processor(self) -> Any:
        """The processor of the folder: images, text and chat template."""
        with self._explained("processor"):
            return transformers.AutoProcessor.from_pretrained(self.path, **_LOCAL)

    def image_settings(self) -> dict[str, Any]:
        """How images are prepared for the model, as the folder says."""
        if (self.path / "preprocessor_config.json").exists():
            return self._json("preprocessor_config.json")
        if (self.path / "processor_config.json").exists():
            settings: dict[str, Any] = self._json("processor_config.json").get("image_processor", {})
            return settings
        raise CheckpointError(
            f"{self.path} has neither preprocessor_config.json nor processor_config.json: how pixels are scaled?"
        )

    def model(self, cls: Any, device: str, dtype: torch.dtype) -> Any:
        """The model on `device`, for inference.

        Raises:
            CheckpointError: weights are missing, left over, damaged or of other sizes.
        """
        with self._explained("weights"), _quiet():
            model, info = cls.from_pretrained(self.path, use_safetensors=True, output_loading_info=True, dtype=dtype, **_LOCAL)
        extra = [name for name in info["unexpected_keys"] if not name.endswith(_HARMLESS_EXTRAS)]
        for names, problem in ((info["missing_keys"], "lacks"), (extra, "has more than the model takes:")):
            if names:
                raise CheckpointError(
                    f"{self.path} {problem} {len(names)} weights ({', '.join(sorted(names)[:3])}); copy it whole"
                )
        return model.eval().requires_grad_(False).to(device)

    @contextmanager
    def _explained(self, part: str) -> Iterator[None]:
        try:
            yield
        except ImportError as error:
            raise CheckpointError(
                f"the {part} of {self.path} needs a package that is not installed: {first_line(error)}"
            ) from None
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:
            raise CheckpointError(f"the {part} of {self.path} cannot be used: {first_line(error)}") from None


class Pixels:
    """Frames to what a model reads, as the folder says: `(x * rescale_factor - mean) / std`, RGB."""

    def __init__(self, folder: ModelFolder) -> None:
        settings = folder.image_settings()
        scale = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
        mean, std = settings.get("image_mean"), settings.get("image_std")
        if not settings.get("do_normalize", True):
            mean, std = [0.0] * 3, [1.0] * 3
        if not all(isinstance(values, list) and len(values) == 3 for values in (mean, std)) or settings.get(
            "do_flip_channel_order"
        ):
            raise CheckpointError(
                f"{folder.path}: image_mean and image_std of its preprocessing must be 3 numbers each, for RGB"
            )
        self.scale = float(scale)
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    def __call__(self, frames: Array, device: str, dtype: torch.dtype) -> Tensor:
        """`(N, H, W, 3)` uint8 -> `(N, 3, H, W)`."""
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).to(device).permute(0, 3, 1, 2).float()
        shape = (1, 3, 1, 1)
        return ((pixels * self.scale - self.mean.to(device).view(shape)) / self.std.to(device).view(shape)).to(dtype)


def frame_size(folder: ModelFolder, config: Any) -> tuple[int, int]:
    """Height and width of the frames that a vision model wants: what its preprocessing ends with, else its own size."""
    settings = folder.image_settings()
    wanted = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    if isinstance(wanted, dict):
        sides = (wanted.get("height"), wanted.get("width"))
        if all(isinstance(side, int) for side in sides):
            return int(wanted["height"]), int(wanted["width"])
        wanted = wanted.get("shortest_edge")
    if wanted is None:
        wanted = getattr(config, "image_size", None)
    if isinstance(wanted, list | tuple) and len(wanted) == 2:
        return int(wanted[0]), int(wanted[1])
    if not isinstance(wanted, int):
        raise CheckpointError(f"{folder.path} does not say how large its frames are (`size` of its preprocessing)")
    return wanted, wanted


def combined_hash(files: Iterable[Path]) -> str:
    """SHA-256 over names and contents of files; where they lie does not matter."""
    whole = hashlib.sha256()
    for name, digest in sorted((path.name, sha256_of(path)) for path in files):
        whole.update(f"{digest}  {name}\n".encode())
    return whole.hexdigest()


def check_safetensors(path: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors in a file, whose size must be what its header says.

    Raises:
        CheckpointError: it is missing, cut, or no safetensors file.
    """
    if not path.is_file():
        raise CheckpointError(f"the weights {path} are missing; name a local safetensors file (nothing is downloaded)")
    try:
        with safe_open(path, framework="np") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and reports of transformers; what they tell is raised here."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
