"""Latents to clouds of points, and gradients on points back to gradients on latents.

A latent frame ``[16, H, W]`` is a cloud of ``(H / k) (W / k)`` points with 16 coordinates after k x k average pooling.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vdot.errors import ConfigError, InputError


def latents_to_clouds(latents: Tensor, *, pooling: int = 2, clouds: str = "frame") -> Tensor:
    """``[B,T,C,H,W]`` -> ``[B*T, hw, C]`` (``clouds="frame"``) or ``[B, T*hw, C]`` (``"clip"``), with h = H // pooling.

    For channels-first latents ``[B,C,T,H,W]`` pass ``latents.transpose(1, 2)``. Pixels that do not fill a pool are left
    out, as average pooling does. Raises InputError for a wrong shape, ConfigError for an unknown ``clouds``.
    """
    if latents.ndim != 5:
        raise InputError(f"latents must be [B,T,C,H,W], got {tuple(latents.shape)}")
    if pooling < 1 or min(latents.shape[-2:]) < pooling:
        raise InputError(f"pooling must lie between 1 and the latent size {tuple(latents.shape[-2:])}, got {pooling}")
    if clouds not in ("frame", "clip"):
        raise ConfigError(f"clouds must be 'frame' or 'clip', got {clouds!r}")
    batch, frames = latents.shape[:2]
    if latents.dtype in (torch.bfloat16, torch.float16):
        latents = latents.float()  # averages of rounded numbers, but not rounded averages
    points = F.avg_pool2d(latents.flatten(0, 1), pooling).flatten(2).mT  # [B*T, hw, C]
    return points if clouds == "frame" else points.unflatten(0, (batch, frames)).flatten(1, 2)


def clouds_to_latents(points: Tensor, shape: torch.Size | tuple[int, ...], *, pooling: int = 2) -> Tensor:
    """Adjoint of :func:`latents_to_clouds`: a gradient on points becomes one on latents of ``shape [B,T,C,H,W]``."""
    batch, frames, channels, height, width = shape
    h, w = height // pooling, width // pooling
    pooled = points.reshape(batch * frames, h * w, channels).mT.reshape(batch * frames, channels, h, w)
    full = pooled.repeat_interleave(pooling, 2).repeat_interleave(pooling, 3) / pooling**2
    return F.pad(full, (0, width - w * pooling, 0, height - h * pooling)).reshape(
        batch, frames, channels, height, width
    )
