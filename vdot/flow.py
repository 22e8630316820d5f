"""Rectified-flow time: the only file that knows the number 1000.

A noisy latent is ``x_s = (1 - s) x0 + s n`` with noise level ``s`` in [0, 1]; the network is told ``t = 1000 s`` and
predicts the velocity ``v = n - x0`` (Wan2.1; Liu et al. 2023, "Flow Straight and Fast"; Lipman et al. 2023). All
functions broadcast a per-sample ``sigma [B]`` over latents ``[B, ...]`` and compute in at least float32.
"""

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Warp noise levels: ``k s / (1 + (k - 1) s)`` (Esser et al. 2024, eq. 23). ``shift=1`` is the identity."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigma_to_t(sigma: Tensor) -> Tensor:
    """Noise level in [0, 1] -> the continuous timestep in [0, 1000] that the network is told."""
    return sigma * NUM_TIMESTEPS


def t_to_sigma(t: Tensor) -> Tensor:
    """Timestep in [0, 1000] -> noise level in [0, 1]."""
    return t / NUM_TIMESTEPS


def _like(sigma: Tensor | float, x: Tensor) -> Tensor:
    sigma = torch.as_tensor(sigma, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """``(1 - s) x0 + s n`` for ``x0, noise [B, ...]`` and ``sigma [B]`` or a number."""
    s = _like(sigma, x0)
    return ((1 - s) * x0 + s * noise).to(x0.dtype)


def velocity_to_x0(x: Tensor, v: Tensor, sigma: Tensor | float) -> Tensor:
    """Clean estimate ``x - s v``."""
    return (x - _like(sigma, x) * v).to(x.dtype)


def x0_to_velocity(x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
    """Velocity ``(x - x0) / s``; ``sigma`` must be positive."""
    return ((x - x0) / _like(sigma, x)).to(x.dtype)
