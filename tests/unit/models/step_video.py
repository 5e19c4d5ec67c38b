"""A small Step-Video VAE, clips for it, and the authors' network written over the names of their state dict."""

import torch
from torch.nn.functional import conv2d, conv3d, group_norm, interpolate, pad, silu

from videofm import models

GROUPS = 4
SMALL = {"latent_channels": 2, "stem_width": 4, "widths": (8, 8, 16, 16), "num_groups": GROUPS, "num_res_blocks": 1}


def small(**overrides):
    """A model of the real structure with a few thousand parameters, none of which is zero or one."""
    torch.manual_seed(0)
    model = models.build("vae/step_video", "tiny", **SMALL | overrides).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("conv2.weight"):
                parameter.normal_(std=0.1)
    return model


def clip(num_frames, size=16, batch=1):
    torch.manual_seed(1)
    return torch.rand(batch, 3, num_frames, size, size) * 2 - 1


class Reference:
    """One chunk through the authors' encoder or decoder."""

    def __init__(self, state, version):
        self.state, self.version = state, version

    def conv(self, name, x, stride=1):
        weight = self.state[f"{name}.weight"]
        time, side = weight.shape[2] - 1, weight.shape[3] // 2
        return conv3d(pad(x, (side, side, side, side, time, 0)), weight, self.state[f"{name}.bias"], stride)

    def frame_conv(self, name, x, **options):
        frames = [conv2d(frame, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options) for frame in x.unbind(2)]
        return torch.stack(frames, dim=2)

    def norm(self, name, x):
        def apply(y):
            return group_norm(y, GROUPS, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-5)

        return apply(x) if self.version == 1 else torch.stack([apply(frame) for frame in x.unbind(2)], dim=2)

    def block(self, name, x):
        h = self.conv(f"{name}.conv1.conv", silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2.conv", silu(self.norm(f"{name}.norm2", h)))
        return h + (self.conv(f"{name}.nin_shortcut.conv", x) if f"{name}.nin_shortcut.conv.weight" in self.state else x)

    def middle(self, name, x):
        x = self.block(f"{name}.block_1", x)
        h = self.norm(f"{name}.attn_1.norm", x)
        q, k, v = (self.conv(f"{name}.attn_1.{letter}.conv", h).flatten(2).transpose(1, 2) for letter in "qkv")
        logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf)
        h = (logits.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        return self.block(f"{name}.block_2", x + self.conv(f"{name}.attn_1.proj_out.conv", h))

    def unshuffled(self, x):
        x = torch.cat([torch.zeros_like(x[:, :, :1]), x], dim=2)
        cells = [x[:, :, t::2, h::2, w::2] for t in (0, 1) for h in (0, 1) for w in (0, 1)]
        return torch.stack(cells, dim=2).flatten(1, 2)  # each channel's eight pixels are neighbours

    def shuffled(self, x):
        cells = x.unflatten(1, (-1, 8))
        out = x.new_zeros(x.shape[0], cells.shape[1], *(2 * size for size in x.shape[2:]))
        for n in range(8):
            out[:, :, n // 4 :: 2, n // 2 % 2 :: 2, n % 2 :: 2] = cells[:, :, n]
        return out[:, :, 1:]

    def encode(self, x):
        x = self.conv("encoder.conv_in.conv", x)
        for level in range(4):
            x = self.block(f"encoder.down.{level}.block.0", x)
            if level == 0:
                x = self.frame_conv("encoder.down.0.downsample.conv", pad(x, (0, 1, 0, 1)), stride=2)
            elif level < 3:
                x = self.conv(f"encoder.down.{level}.downsample.conv.conv", x, stride=2)
        x = silu(self.norm("encoder.norm_out", self.middle("encoder.mid", x)))
        if self.version == 2:
            wide = self.unshuffled(self.conv("encoder.conv_patchify.conv.conv", x))
            x = wide + self.unshuffled(x).unflatten(1, (wide.shape[1], -1)).mean(2)
        out = self.conv("encoder.conv_out.conv", x)
        if self.version == 2:
            out = out + x.unflatten(1, (out.shape[1], -1)).mean(2)
        return out.chunk(2, dim=1)

    def decode(self, z):
        x = self.conv("decoder.conv_in.conv", z)
        if self.version == 2:
            x = x + z.repeat_interleave(x.shape[1] // z.shape[1], dim=1)
            wide = self.conv("decoder.conv_unpatchify.conv.conv", x)
            x = self.shuffled(wide) + self.shuffled(x.repeat_interleave(wide.shape[1] // x.shape[1], dim=1))
        x = self.middle("decoder.mid", x)
        for level in (3, 2, 1, 0):
            for block in (0, 1):
                x = self.block(f"decoder.up.{level}.block.{block}", x)
            if level >= 2:
                name, x = f"decoder.up.{level}.upsample.conv3d", interpolate(x, scale_factor=2)
                h = silu(self.norm(f"{name}.norm1", self.conv(f"{name}.conv1.conv", x)))
                h = self.norm(f"{name}.norm2", self.conv(f"{name}.conv2.conv", h))
                x = x + silu(h + x)
            elif level == 1:
                x = interpolate(x, scale_factor=(1, 2, 2))
                x = self.frame_conv("decoder.up.1.upsample.conv", x, padding=1)
        return self.conv("decoder.conv_out.conv", silu(self.norm("decoder.norm_out", x)))[:, :, 3:]
