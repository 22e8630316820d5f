"""AutoencoderKLWan on whole clips, for training: the function that :class:`vdot.models.vae.WanVAE` computes in pieces.

The causal memories of inference hold what the layers saw earlier; a layer that sees the whole clip at once needs none.
Two things remain of the pieces: the first frame makes a latent frame of its own, so the layers that halve or double the
frame rate leave it alone; and doubling starts with zeros before the second latent frame, not with the first.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, WanRMS_norm
from torch import Tensor, nn

# Added to norms. The library bounds them by 1e-12 instead: the gradient of an activation that is zero would be huge.
TINIEST = 1e-6
SILU_GAIN = 1.7  # of a convolution after SiLU, so that unit variance stays
BRANCH = 0.3  # share of a residual branch in the sum, at first
FIRST_LOG_VARIANCE = -6.0  # of the posterior, at first


class _CausalConv3d(WanCausalConv3d):
    """Rows and columns are padded by the kernel; only time needs a copy."""

    def forward(self, x: Tensor, cache_x: None = None) -> Tensor:
        columns, _, rows, _, past, _ = cast(tuple[int, ...], self._padding)
        if past and x.shape[2] == 1:  # a picture has no past: a third of the work
            return F.conv3d(x, self.weight[:, :, -1:], self.bias, 1, (0, rows, columns))
        if past:
            x = F.pad(x, (0, 0, 0, 0, past, 0))
        return F.conv3d(x, self.weight, self.bias, self.stride, (0, rows, columns))


class _RMSNorm(WanRMS_norm):
    """Over channels: norms in float32, everything of the picture's size in the input's own type."""

    compiled = False  # forward and backward in one pass over the pixels each

    def forward(self, x: Tensor) -> Tensor:
        return (_compiled() if self.compiled else normalise)(x, self.gamma, self.scale)


def normalise(x: Tensor, gamma: Tensor, scale: float) -> Tensor:
    """``x`` over its norm over channels, times ``gamma scale``."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    return x * (scale / (norm + TINIEST)).to(x.dtype) * gamma.to(x.dtype)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Tensor]:
    # A program for every shape, and an autoencoder has many; the default limit falls back to eager in silence.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(normalise, dynamic=False)


class _Resample(WanResample):
    """Half or double size, and on request frame rate."""

    def forward(self, x: Tensor, feat_cache: None = None, feat_idx: None = None) -> Tensor:
        """``x [B, C, T, H, W]``."""
        first, rest = x[:, :, :1], x[:, :, 1:]
        if self.mode == "upsample3d" and rest.shape[2]:
            x = torch.cat([first, self.time_conv(rest).unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)], dim=2)
        batch, frames = x.shape[0], x.shape[2]
        pictures = x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        if self.mode.startswith("upsample"):
            pictures = self.resample[1](F.interpolate(pictures, scale_factor=2.0, mode="nearest"))
        else:
            pictures = self.resample(pictures)
        x = pictures.unflatten(0, (batch, frames)).transpose(1, 2)
        if self.mode == "downsample3d" and frames > 1:
            x = torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)
        return x


WHOLE: dict[type, type] = {WanCausalConv3d: _CausalConv3d, WanRMS_norm: _RMSNorm, WanResample: _Resample}


class WholeClipVAE(nn.Module):
    """``encode`` and ``decode`` between pixels in [-1, 1] and latents that are not normalised, with gradients.

    ``model`` is changed in place: the same parameters under the same names. ``compile`` puts the norms, and nothing
    else, through torch.compile: compiling around the convolutions as well was slower (benchmarks/RESULTS.md).
    """

    def __init__(self, model: AutoencoderKLWan, compile: bool = False) -> None:
        super().__init__()
        self.model = cast(Any, model)  # the library's modules carry no type hints
        for module in self.model.modules():
            module.__class__ = WHOLE.get(type(module), type(module))
            if isinstance(module, nn.Conv3d):
                module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
            if compile and isinstance(module, _RMSNorm):
                module.compiled = True

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """``video [B, 3, 4k+1, H, W]`` -> the posterior's mean and log variance, each ``[B, z, k+1, H/8, W/8]``."""
        video = video.contiguous(memory_format=torch.channels_last_3d)
        mean, log_variance = self.model.quant_conv(self.model.encoder(video)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)  # the library's bounds

    def decode(self, latents: Tensor) -> Tensor:
        """``latents [B, z, k+1, h, w]`` -> video ``[B, 3, 4k+1, 8h, 8w]``, not clamped."""
        return self.model.decoder(self.model.post_quant_conv(latents))


@torch.no_grad()
def start(model: AutoencoderKLWan, seed: int) -> None:
    """Weights to train from, in place.

    As the library makes it, a signal fades on the way: every convolution on the path shrinks it to a third of its
    variance beside a bias that stays, and the posterior's noise is ten times its mean. Training then begins with a long
    plateau, at which the decoder ignores the latents. Here variances are kept from pixels to pixels, residual branches
    begin small, time is looked at one frame at a time, so that clips begin as well as pictures do, and the posterior
    begins narrow.
    """
    network = cast(Any, model)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            _start_convolution(name, layer, generator)
    # Mid-grey pixels are zeros, and zeros have no direction to be normalised to.
    network.encoder.conv_in.bias.normal_(0, 0.3, generator=generator)
    z = network.config.z_dim
    network.quant_conv.weight[z:] = 0
    network.quant_conv.bias[z:] = FIRST_LOG_VARIANCE


def _start_convolution(name: str, layer: nn.Conv2d | nn.Conv3d, generator: torch.Generator) -> None:
    weight = layer.weight.zero_()
    assert layer.bias is not None
    layer.bias.zero_()
    now = weight[:, :, -1] if weight.ndim == 5 else weight  # [out, in, h, w]: what acts on the newest frame
    if "time_conv" in name:
        copies = weight.shape[0] // weight.shape[1]  # 2 where the frame rate doubles
        now[:, :, 0, 0] = torch.eye(weight.shape[1]).repeat(copies, 1)
        return
    last = name.rpartition(".")[2]
    gain = {"conv1": SILU_GAIN, "conv2": SILU_GAIN * BRANCH, "conv_out": SILU_GAIN, "proj": BRANCH}.get(last, 1.0)
    now.normal_(0, gain * now[0].numel() ** -0.5, generator=generator)
