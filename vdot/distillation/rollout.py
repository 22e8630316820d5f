"""What the generator makes, at a random step of its own sampler.

The rollout is :func:`vdot.sampling.trajectory` itself, stopped early: labels, noise levels and solver are those of the
schedule that the checkpoint is exported with, there is no second definition.
"""

from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from vdot.flow import velocity_to_x0
from vdot.sampling import Draw, FewStepSchedule, Velocity, trajectory


class Rollout(NamedTuple):
    """``x0 [B, 16, F, H, W]`` as predicted at the exit step, differentiable; ``x`` what that step was given."""

    x0: Tensor
    x: Tensor
    t: Tensor
    sigma: float


def rollout(velocity: Velocity, noise: Tensor, schedule: FewStepSchedule, exit_step: int, draw: Draw) -> Rollout:
    """Sample ``exit_step`` steps without gradient, then predict x0 with one more forward, with gradient.

    Args:
        noise: ``[B, 16, F, H, W]``, the start.
        exit_step: 0 to ``schedule.steps - 1``.
        draw: fresh noise of ``renoise``.
    """
    x = noise
    with torch.no_grad():
        for latents in islice(trajectory(velocity, noise, schedule, draw), exit_step):
            x = latents
    t, sigma = schedule.timesteps()[exit_step], schedule.sigmas()[exit_step].item()
    t = t.to(x.device).expand(x.shape[0])
    return predict(velocity, x, t, sigma)


def predict(velocity: Velocity, x: Tensor, t: Tensor, sigma: float) -> Rollout:
    """x0 from ``x`` at noise level ``sigma``, which the network is told as ``t [B]``."""
    return Rollout(velocity_to_x0(x, velocity(x, t).float(), sigma), x, t, sigma)
