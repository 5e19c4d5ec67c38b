"""The shape of an LTX video VAE, rich enough for releases 0.9.0, 0.9.1 and 0.9.5 (spec B.3)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from videofm.errors import ConfigError
from videofm.types import Compression

DOWNSAMPLE_STRIDES = {
    "none": (1, 1, 1),
    "conv": (2, 2, 2),
    "spatial": (1, 2, 2),
    "temporal": (2, 1, 1),
    "spatiotemporal": (2, 2, 2),
}
"""Kinds of downsampler and their stride (time, height, width). `conv` is a strided convolution that keeps the width (0.9.0,
0.9.1); the next three are space-to-depth with a residual that also changes the width (0.9.5)."""

UPSAMPLE_STRIDE = (2, 2, 2)


@dataclass(frozen=True)
class LTXVAEConfig:
    """Stages are listed in the order of computation: the encoder from fine to coarse, the decoder from coarse to fine.

    Attributes:
        latent_channels: C of the latents.
        patch_size: pixels of a patch, along height and width, that space-to-depth moves to channels at the input.
        encoder_widths: channels of each stage; with residual downsamplers one more, the width of the middle.
        encoder_depths: ResBlocks of each stage, then of the middle.
        encoder_downsample: a key of `DOWNSAMPLE_STRIDES` for each stage.
        decoder_widths: channels that enter the upsampler of each stage.
        decoder_depths: ResBlocks of the middle, then of each stage.
        decoder_upsample: whether a stage doubles time, height and width.
        upsample_factor: what an upsampler divides the width by, for each stage.
        upsample_residual: whether an upsampler has a residual around it, for each stage.
        inject_noise: whether ResBlocks add a learned amount of noise: of the middle, then of each stage of the decoder.
        timestep_conditioning: whether the decoder is told the noise level of the latents, so that it can take the last step.
        encoder_causal, decoder_causal: whether convolutions look at past frames only.
        norm_eps: epsilon of the LayerNorm in ResBlocks that change the width.
        scaling_factor: multiplies normalised latents.
    """

    latent_channels: int = 128
    in_channels: int = 3
    patch_size: int = 4
    encoder_widths: tuple[int, ...] = (128, 256, 512, 512)
    encoder_depths: tuple[int, ...] = (4, 3, 3, 3, 4)
    encoder_downsample: tuple[str, ...] = ("conv", "conv", "conv", "none")
    decoder_widths: tuple[int, ...] = (512, 512, 256, 128)
    decoder_depths: tuple[int, ...] = (4, 3, 3, 3, 4)
    decoder_upsample: tuple[bool, ...] = (False, True, True, True)
    upsample_factor: tuple[int, ...] = (1, 1, 1, 1)
    upsample_residual: tuple[bool, ...] = (False, False, False, False)
    inject_noise: tuple[bool, ...] = (False, False, False, False, False)
    timestep_conditioning: bool = False
    encoder_causal: bool = True
    decoder_causal: bool = False
    norm_eps: float = 1e-6
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        self._check_lengths()
        self._check_widths()
        down, up = self._encoder_compression(), self._decoder_compression()
        if down != up:
            raise ConfigError(
                f"the encoder compresses by {down} but the decoder expands by {up}: the products of strides must be equal."
            )

    @property
    def residual_downsample(self) -> bool:
        """Whether downsamplers are of the residual kind (0.9.5), which change the width themselves."""
        return len(self.encoder_widths) == len(self.encoder_downsample) + 1

    @property
    def compression(self) -> Compression:
        """Pixels for one latent cell."""
        return self._encoder_compression()

    def _encoder_compression(self) -> Compression:
        return self._compression([DOWNSAMPLE_STRIDES[kind] for kind in self.encoder_downsample])

    def _decoder_compression(self) -> Compression:
        return self._compression([UPSAMPLE_STRIDE for doubled in self.decoder_upsample if doubled])

    def _compression(self, strides: list[tuple[int, int, int]]) -> Compression:
        time, height, width = (prod(stride[axis] for stride in strides) for axis in range(3))
        return Compression(time, height * self.patch_size, width * self.patch_size)

    def _check_lengths(self) -> None:
        kinds = set(self.encoder_downsample) - {"none"}
        if unknown := kinds - set(DOWNSAMPLE_STRIDES):
            raise ConfigError(f"encoder_downsample has {sorted(unknown)}; there are: {', '.join(DOWNSAMPLE_STRIDES)}.")
        if "conv" in kinds and len(kinds) > 1:
            raise ConfigError(
                f"encoder_downsample mixes 'conv' with {sorted(kinds - {'conv'})}: a VAE has one family or the other."
            )
        num_down, num_up = len(self.encoder_downsample), len(self.decoder_upsample)
        expected = {
            "encoder_widths": num_down + (0 if kinds <= {"conv"} else 1),
            "encoder_depths": num_down + 1,
            "decoder_widths": num_up,
            "decoder_depths": num_up + 1,
            "upsample_factor": num_up,
            "upsample_residual": num_up,
            "inject_noise": num_up + 1,
        }
        for name, length in expected.items():
            value = getattr(self, name)
            if len(value) != length:
                raise ConfigError(
                    f"{name} has {len(value)} entries {value}; with {num_down} encoder and {num_up} decoder stages it "
                    f"needs {length}."
                )

    def _check_widths(self) -> None:
        if self.residual_downsample:
            for kind, entering, leaving in zip(
                self.encoder_downsample, self.encoder_widths, self.encoder_widths[1:], strict=False
            ):
                cells = prod(DOWNSAMPLE_STRIDES[kind])
                if leaving % cells or (entering * cells) % leaving or (kind == "none" and entering != leaving):
                    raise ConfigError(
                        f"a {kind!r} downsampler cannot go from {entering} to {leaving} channels: {leaving} must be a "
                        f"multiple of {cells} and divide {entering * cells}."
                    )
        width = self.decoder_widths[0]
        for stage, entering in enumerate(self.decoder_widths):
            conditioned = self.timestep_conditioning or self.inject_noise[stage + 1] or self.upsample_factor[stage] > 1
            if width != entering and conditioned:
                raise ConfigError(
                    f"decoder stage {stage} starts with {width} channels but decoder_widths asks for {entering}: with "
                    f"timestep_conditioning, inject_noise or upsample_factor > 1 the width must follow, so give {width}."
                )
            if entering % self.upsample_factor[stage]:
                raise ConfigError(
                    f"decoder_widths {entering} is not a multiple of its upsample_factor {self.upsample_factor[stage]}."
                )
            width = entering // self.upsample_factor[stage]


SIZES = {
    "tiny": LTXVAEConfig(
        latent_channels=16,
        patch_size=2,
        encoder_widths=(16, 32, 64),
        encoder_depths=(1, 1, 2),
        encoder_downsample=("spatiotemporal", "spatiotemporal"),
        decoder_widths=(64, 32),
        decoder_depths=(2, 1, 1),
        decoder_upsample=(True, True),
        upsample_factor=(2, 2),
        upsample_residual=(True, True),
        inject_noise=(False, False, False),
    ),
    "0.9.0": LTXVAEConfig(),
    "0.9.1": LTXVAEConfig(
        decoder_widths=(1024, 512, 256),
        decoder_depths=(8, 7, 6, 5),
        decoder_upsample=(True, True, True),
        upsample_factor=(2, 2, 2),
        upsample_residual=(True, True, True),
        inject_noise=(False, True, True, True),
        timestep_conditioning=True,
    ),
    "0.9.5": LTXVAEConfig(
        encoder_widths=(128, 256, 512, 1024, 2048),
        encoder_depths=(4, 6, 6, 2, 2),
        encoder_downsample=("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        decoder_widths=(1024, 512, 256),
        decoder_depths=(5, 5, 5, 5),
        decoder_upsample=(True, True, True),
        upsample_factor=(2, 2, 2),
        upsample_residual=(True, True, True),
        inject_noise=(False, False, False, False),
        timestep_conditioning=True,
    ),
}
