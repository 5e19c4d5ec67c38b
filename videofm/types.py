"""The legend of the project, and the small frozen records that its layers exchange.

Letters, in shapes and in names: `B` batch, `C` channels, `T` frames, `H` height, `W` width, `L` tokens, `D` model width,
`N` heads, `K` head width, `V` vocabulary or codebook size.

- Videos and latents are `(B, C, T, H, W)`; pixels lie in [-1, 1]. Tokens are `(B, L, D)`; queries, keys, values `(B, L, N, K)`.
- `sigma` is the noise level in [0, 1]: 1 is noise, 0 is data. `noisy = (1 - sigma) * clean + sigma * noise`;
  `velocity = noise - clean`. Nothing here is called x_0 or x_1.
- `clean noise noisy sigma velocity latents indices codes num_frames fps` are the words; counts begin with `num_`;
  a mesh has axes (`pipe data context tensor`), a tensor has dims; degrees end in `_degree`. "Which samples do I read" is the
  `data` group, "with whom do I average gradients" is the `data x context` group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from videofm.pixels import scaled

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Generator, Tensor, nn

    AttentionFn = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    """q `(B, L, N, K)`, k and v `(B, L, G, K)`, mask -> `(B, L, N, K)`.

    The mask is None, a tensor (bool, True = may attend, broadcasts to `(B, N, Lq, Lk)`) or an `attention.MaskSpec`, a rule over
    positions; the last has the type Any because nothing below `attention` may import it.
    """


@dataclass(frozen=True)
class Compression:
    """Pixels for one latent cell along each axis. `num_frames = 1 + time * n` pixel frames give `1 + n` latent frames."""

    time: int
    height: int
    width: int

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a clip of `num_frames` pixel frames (frame rule `1 + time * n`)."""
        return 1 + (num_frames - 1) // self.time


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents; both fields are `(B, C, T, H, W)`."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Latents `mean + exp(logvar / 2) * noise`; the caller brings unit Gaussian `noise` of the shape of `mean`."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def mode(self) -> Tensor:
        """The most likely latents."""
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence to the unit Gaussian for each element, in nats, shape of `mean`."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)


@dataclass(frozen=True)
class Conditioning:
    """Encoded text. `embeddings` is `(B, L, D)`, `mask` is `(B, L)` bool, True where a token is real.

    `clip_embeddings` `(B, M, E)` is what a second encoder makes of the same text, all of it valid (Step-Video), or None.
    `longest` counts the columns of `mask` up to the last real token of any text, None where nobody has counted: the host knows
    it from the tokenizer, and need not wait for the device to read it from the mask.
    """

    embeddings: Tensor
    mask: Tensor
    clip_embeddings: Tensor | None = None
    longest: int | None = None

    def rows(self, index: Tensor | slice) -> Conditioning:
        """The texts with the numbers `index` `(B',)`, or a slice of them."""
        clip = None if self.clip_embeddings is None else self.clip_embeddings[index]
        return Conditioning(self.embeddings[index], self.mask[index], clip, self.longest)

    def trimmed(self, length: int) -> Conditioning:
        """The first `length` tokens of each text; `clip_embeddings` stay whole."""
        longest = None if self.longest is None else min(self.longest, length)
        return Conditioning(self.embeddings[:, :length], self.mask[:, :length], self.clip_embeddings, longest)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of clips of one bucket, or a pack of clips of several.

    `video` is `(B, 3, T, H, W)` in [-1, 1]; as it comes from a loader it is still uint8, a view of the decoded frames, and `to`
    scales it. `fps` is `(B,)` frames a second. `sample_ids` key every random draw that concerns a sample, so that a run does
    not depend on which rank reads it. `step` is the optimizer step, and `num_step_samples` the number of samples of that step
    over all ranks and micro-batches (the loss divides by it).

    What was encoded before (`videofm encode`, or by a pool beside the training), float32, else None: `latents`
    `(B, C, T, H, W)`, raw, are the means of posteriors with `logvar` of the same shape, or samples of them where `logvar` is
    None; then no pixels are read, and `video` is empty, `(B, 3, 0, 0, 0)`. `text` is `(B + 1, L, D)`: the embeddings of the
    captions and, last, of the empty caption, whose first `text_lengths[i]` tokens are real; `clip_text` `(B + 1, M, E)` are
    those of a second encoder where there is one. Integers, int64, else None: `indices` `(B, T', H', W')` are the tokens of the
    clips by a latent tokenizer, and `rollouts` of the same shape what an autoregressive model made of the first token frames of
    `indices` and of the captions; with either no pixels are read.

    Of P pairs (`data.pairs`) a batch has 2P clips, winners first and losers behind them in the same order. `sample_ids` then
    has the id of the pair for both of its clips, so that keyed draws are the same for winner and loser, and `num_step_samples`
    counts pairs. `pair_weights` `(P,)` float32 multiply the loss of a pair, 0 for a tie; `pair_ties` `(P,)` bool says which
    pairs are ties; `frame_labels` `(P, T)` float32 are 1, 0 or -1 where the winner, neither or the loser is better at a pixel
    frame, None where no pair of the data has such labels; `rewards` `(2P,)` float32 are the overall scores of the clips, None
    unless every clip of the data has one. `pair_axes` has a dict for each of the P pairs, axis -> which side is better on it,
    `winner`, `loser` or `tie`; None where no pair of the data has axes.

    A pack (`data.packing.pack`) has `parts`, each the clips of one size as a batch of their own. The pack itself then holds
    `captions`, `fps` and `sample_ids` of all of them, in their order, and no pixels or encodings.
    """

    video: Tensor
    captions: list[str]
    fps: Tensor
    sample_ids: list[str]
    step: int
    num_step_samples: int
    latents: Tensor | None = None
    logvar: Tensor | None = None
    text: Tensor | None = None
    text_lengths: list[int] | None = None
    clip_text: Tensor | None = None
    indices: Tensor | None = None
    rollouts: Tensor | None = None
    pair_weights: Tensor | None = None
    pair_ties: Tensor | None = None
    frame_labels: Tensor | None = None
    rewards: Tensor | None = None
    pair_axes: list[dict[str, str]] | None = None
    parts: tuple[Batch, ...] = ()

    def to(self, device: Any) -> Batch:
        """This batch with its tensors on `device`, and its pixels as float32 in [-1, 1]: models take no other."""
        names = (
            "video", "fps", "latents", "logvar", "text", "clip_text", "indices", "rollouts", "pair_weights", "pair_ties",
            "frame_labels", "rewards",
        )  # fmt: skip
        held = {name: value for name in names if (value := getattr(self, name)) is not None}
        moved = {name: value.to(device, non_blocking=True) for name, value in held.items()}
        if not moved["video"].dtype.is_floating_point:
            moved["video"] = scaled(moved["video"])  # there, so that a quarter of the bytes travel
        return replace(self, **moved, parts=tuple(part.to(device) for part in self.parts))

    @property
    def posterior(self) -> Posterior | None:
        """What `latents` and `logvar` say, or None where pixels have to be encoded or `latents` are samples already."""
        return None if self.latents is None or self.logvar is None else Posterior(self.latents, self.logvar)


@dataclass(frozen=True)
class Loss:
    """What an objective returns for the samples of one rank.

    `total` is the *sum* over the local samples of each sample's mean loss: the engine divides it by the number of samples
    of the whole step, so that the gradient does not depend on how samples are spread over ranks and micro-batches.
    `metrics` are detached scalars of the same form (sums over local samples), averaged the same way for the log. Two of them
    say what a sample costs, where an objective counts it, and become rates in the log: `tokens`, latent tokens that the trained
    model sees, and `flops`, operations forward and backward.
    """

    total: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class SampleRng(Protocol):
    """Random draws for the samples of one micro-batch, keyed by (seed, step, sample id, name) and by nothing else.

    `device` is that of the batch; a draw has the same numbers on any.
    """

    device: Any

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Unit Gaussian `(B, *shape)`, float32, on the device of the batch."""
        ...

    def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Uniform in [0, 1), `(B, *shape)`, float32, on the device of the batch."""
        ...

    def generator(self, name: str) -> Generator:
        """A CPU generator for draws that the samples of the micro-batch share; keyed by its first sample."""
        ...

    def rows(self, first: int, end: int) -> SampleRng:
        """The draws of the samples from number `first` to before `end` alone."""
        ...

    def fixed(self, number: int) -> SampleRng:
        """Draws number `number` of each sample, the same in every step and epoch: keyed by seed, number, `lasting_id`, name."""
        ...


def lasting_id(sample_id: str) -> str:
    """What a sample id (`data.draws.Draw.sample_id`) names in every epoch: without `@epoch` and what it stands in for."""
    return re.sub(r"@\d+(~.*)?$", "", sample_id, count=1, flags=re.DOTALL)


class Ranks(Protocol):
    """The ranks that read different samples, for statistics that all of them must agree on: a `Mesh`, or `ALONE`."""

    @property
    def data_degree(self) -> int:
        """How many they are."""
        ...

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over them; `value` itself may be written to. Every one of them calls it."""
        ...

    def gather(self, value: Tensor) -> Tensor:
        """Theirs one behind the other along dim 0, in the order of ranks; lengths along it may differ. Every one calls it."""
        ...


class OneRank:
    """`Ranks` of a process that is alone: what it has is all there is."""

    data_degree = 1

    def sum(self, value: Tensor) -> Tensor:
        """`value` itself."""
        return value

    def gather(self, value: Tensor) -> Tensor:
        """`value` itself."""
        return value


ALONE: Ranks = OneRank()


class Precomputed(Protocol):
    """Numbers of each sample that an objective wants of the models as a run starts with them, at a few fixed draws.

    The trainer has them measured before the first step, keeps them in the run directory as `name`.safetensors, and hands them
    over in every process that goes on with the run.
    """

    name: str
    num_draws: int

    def measure(self, models: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> Tensor:
        """The numbers of the first R samples of `batch` at one draw, `(R, ...)` float32; the same on ranks that share them."""
        ...

    def take(self, table: Mapping[str, Tensor]) -> None:
        """`lasting_id` of each sample -> its numbers at draws 0, 1, ..., `(num_draws, ...)`, on the CPU."""
        ...


class Objective(Protocol):
    """A loss over roles. `roles` names the models it needs, `phases` maps a phase to the roles that it trains.

    An objective may also have any of these, which the trainer looks for:

    - `own_models`: role -> fields of a `ModelConfig`, for models that the objective's own section asks for;
    - `extend(models)`: add to models that were just built, in place, what only this training needs; before a checkpoint fills
      them;
    - `check(models)`: refuse models that do not fit, before anything runs;
    - `precomputed`: a `Precomputed`, or None where nothing has to be known before the first step;
    - `active_phases(step)`: the phases of optimizer step `step`, in order, where not all run in each;
    - `prepare(models, batches, rngs, phase, all_sum)`: what has to be known about the whole step, over all ranks, before the
      first loss of it; `loss` gets what it returns as a fifth argument. `all_sum(gradient)` adds over the ranks, each of which
      has a part;
    - `after_step(models, phase, skipped, ranks)`: called on every rank after each optimizer step of `phase`, for state that no
      gradient moves (codebooks); returns more metrics of the step, the same on all ranks. `skipped`: the step moved nothing,
      and what was gathered for it is to be dropped as well. `ranks` are the `Ranks` that read different samples;
    - `after_training(models, batches)`: numbers for the log, once the last step is done.
    """

    roles: tuple[str, ...]
    phases: Mapping[str, tuple[str, ...]]

    def loss(self, models: Mapping[str, nn.Module], batch: Batch, rng: SampleRng, phase: str) -> Loss:
        """The loss of this rank's samples in `phase`; see `Loss` for how it is normalised."""
        ...


class StateDictAdapter(Protocol):
    """Names and layouts of tensors, ours against the public ones (diffusers' where diffusers has the model)."""

    def to_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict in the public layout."""
        ...

    def from_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A public state dict in our layout."""
        ...

    def public_config(self, config: Any) -> dict[str, Any]:
        """The `config.json` that the public implementation needs for a model of `config`."""
        ...

    def config_from_public(self, config: Mapping[str, Any]) -> Any:
        """Our model config for a public `config.json`; the inverse of `public_config`."""
        ...


@dataclass(frozen=True)
class ModelSpec:
    """A model, by parts: no data, no loss, no optimizer.

    `config` is its dataclass, `sizes` the named instances, `build(config)` makes the module for one device, `parallelize(model,
    mesh, options)` binds attention and splits what is split, `adapter` translates to the public layout, and `inflate(model,
    folder)`, where a video VAE has it, fills a fresh model in place with the weights of an image VAE. `check_context(model,
    context_degree)`, where a model has a limit of its own, refuses what `parallelize` would, before there are any ranks.
    """

    name: str
    config: type
    sizes: Mapping[str, Any]
    build: Callable[[Any], nn.Module]
    parallelize: Callable[..., nn.Module]
    adapter: StateDictAdapter
    inflate: Callable[[nn.Module, str | Path], None] | None = None
    check_context: Callable[[Any, int], None] | None = None
