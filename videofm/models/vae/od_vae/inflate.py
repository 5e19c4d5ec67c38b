"""OD-VAE from Stable Diffusion's image VAE: the paper's tail initialisation (arXiv 2409.01199; spec D.1)."""

from __future__ import annotations

from pathlib import Path

from videofm.errors import CheckpointError
from videofm.models.vae.inflation import fill, image_tensors, our_names, with_quant_convs
from videofm.models.vae.od_vae.model import ODVideoVAE


def inflate(model: ODVideoVAE, folder: str | Path) -> None:
    """Fill `model` in place from a local folder of diffusers' `AutoencoderKL`: each kernel looks at the present frame only.

    The moments of an image are then those of the image VAE; with norms per frame, the moments of a clip are those of its frames
    0, 4, 8, and so on. Decoding equals the image VAE's only with `space_interpolation` "nearest", which is how that VAE
    doubles; the released trilinear one differs from the start. With `time_interpolation` "nearest" and norms per frame as well,
    a decoded clip is the image VAE's frames, each after the first held 4 times.

    Raises:
        CheckpointError: no such folder, or an image VAE of another shape.
    """
    image = image_tensors(folder)
    groups = image.config.get("norm_num_groups", 32)
    if groups != model.config.num_groups:
        raise CheckpointError(
            f"the image VAE of {folder} has norms of {groups} groups, this {model.spec_name} of {model.config.num_groups}: "
            f"build it with num_groups={groups}."
        )
    fill(model, with_quant_convs(our_names(image)), folder)
