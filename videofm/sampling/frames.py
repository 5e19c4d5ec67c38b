"""Which lengths and sizes of videos a VAE makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from videofm.errors import ConfigError, DataError
from videofm.sampling.conditioning import FrameGrid
from videofm.sampling.windows import Window, spans


@dataclass(frozen=True)
class FrameRule:
    """The frame rule of `vae`: `1 + time * n` frames, or one frame and whole chunks (Step-Video)."""

    vae: Any

    def whole(self, num_frames: int) -> bool:
        """Whether a clip may have `num_frames`."""
        try:
            return num_frames >= 1 and self.vae.pixel_frames(self.vae.latent_frames(num_frames)) == num_frames
        except DataError:  # of a VAE that takes whole chunks
            return False

    @property
    def text(self) -> str:
        """The rule, for messages."""
        chunk = self.grid.chunk
        return f"1 + {self.vae.chunk_frames} * n" if chunk is None else f"1 or {chunk} * n"

    @property
    def grid(self) -> FrameGrid:
        """How pixel frames lie on latent frames."""
        chunk = self.vae.chunk_frames
        return FrameGrid(self.vae.compression.time, None if self.whole(1 + chunk) else chunk)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T, H, W) of the latents of a video.

        Raises:
            ConfigError: the VAE makes no such video.
        """
        c = self.vae.compression
        if not self.whole(num_frames) or height < 1 or height % c.height or width < 1 or width % c.width:
            raise ConfigError(
                f"cannot make {num_frames} frames of {height}x{width} pixels: this VAE makes {self.text} frames, "
                f"with a height in multiples of {c.height} and a width in multiples of {c.width}."
            )
        return self.vae.latent_frames(num_frames), height // c.height, width // c.width

    def check_windows(self, num_frames: int, height: int, width: int, window: Window | None) -> None:
        """Refuse a video of which a window, or what windows share, is no length for the VAE.

        Raises:
            ConfigError: so it is; for a last window that is what is left over, with the nearest lengths that fit.
        """
        lengths = [len(frames) for frames in spans(num_frames, window)]
        self.latent_shape(lengths[0], height, width)
        if window is None:
            return
        self.latent_shape(window.overlap_frames, height, width)
        if not self.whole(lengths[-1]):
            near = " or ".join(map(str, self._near(num_frames, window)))
            raise ConfigError(
                f"{num_frames} frames in windows of {window.num_frames} that share {window.overlap_frames} leave {lengths[-1]} "
                f"frames for the last window, and this VAE makes {self.text}: make a video of {near} frames."
            )

    def _near(self, num_frames: int, window: Window) -> list[int]:
        """The nearest lengths below and above `num_frames` of which all windows are whole."""

        def fits(length: int) -> bool:
            return all(self.whole(len(frames)) for frames in spans(length, window))

        # One more whole window fits always, and the first alone does.
        below = next(length for length in range(num_frames, 0, -1) if fits(length))
        above = next(length for length in range(num_frames, num_frames + window.num_frames) if fits(length))
        return [below, above]
