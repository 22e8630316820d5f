"""The objectives, as pure functions of tensors.

DMD and OT give a *gradient on the generated latents* rather than a loss (Yin et al. 2024, 2311.18828, eq. 7; VDOT,
2512.06802): the caller starts the generator's backward pass with it. Throughout, ``sigma [B]`` is a noise level in
[0, 1] and x0 estimates are ``[B, 16, F, H, W]``.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

DMD_NORMALIZERS = ("time", "mean_abs", "none")
BALANCES = ("rms", "release")


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def dmd_gradient(
    fake_x0: Tensor, real_x0: Tensor, sigma: Tensor, *, normalizer: str = "time", made_x0: Tensor | None = None
) -> Tensor:
    """Where the fake score thinks the sample came from, minus where the teacher does.

    ``time``: times sigma, the release's. ``mean_abs``: over the mean of ``|made_x0 - real_x0|`` of each sample, DMD's
    own (eq. 8). ``none``: as it is.
    """
    grad = fake_x0 - real_x0
    if normalizer == "time":
        return grad * _per_sample(sigma, grad)
    if normalizer == "mean_abs":
        if made_x0 is None:
            raise ValueError("normalizer 'mean_abs' needs made_x0")
        return grad / _per_sample((made_x0 - real_x0).abs().flatten(1).mean(1).clamp_min(1e-6), grad)
    return grad


def unit_frames(grad: Tensor) -> Tensor:
    """Each frame's gradient over its Frobenius norm, as the release scales its OT term. ``[B, 16, F, H, W]``."""
    return grad / (torch.linalg.vector_norm(grad, dim=(1, 3, 4), keepdim=True) + 1e-8)


def unit_rms(grad: Tensor) -> Tensor:
    """Each sample's gradient with a root mean square of 1, so that a weight means what it says."""
    rms = grad.flatten(1).square().mean(1).sqrt().clamp_min(1e-12)
    return grad / _per_sample(rms, grad)


def combine(terms: Mapping[str, Tensor], weights: Mapping[str, float], balance: str, ot_scale: float) -> Tensor:
    """The gradient on the latents that the generator's backward pass starts with.

    ``rms``: ``sum_k w_k g_k / rms(g_k)``, averaged over all elements as a mean loss would be. ``release``: DMD is the
    gradient of ``mean(g^2) / 2``, OT the *sum* of frames of norm ``ot_scale``, GAN the plain gradient, each times its
    weight: on a full-size latent OT then outweighs DMD some ten thousand times.

    Args:
        terms: ``dmd``, ``ot`` and ``gan``, those that are in use, each ``[B, 16, F, H, W]``; ``gan`` is the gradient
            of a loss averaged over the batch.
    """
    total = torch.zeros_like(next(iter(terms.values())))
    for name, grad in terms.items():
        if balance == "rms":
            part = unit_rms(grad) / grad.numel()
        elif name == "dmd":
            part = grad / grad.numel()
        elif name == "ot":
            part = ot_scale * unit_frames(grad) / len(grad)
        else:
            part = grad
        total += weights[name] * part
    return total


def denoising_loss(velocity: Tensor, noise: Tensor, x0: Tensor) -> Tensor:
    """Flow matching: mean of ``(v - (noise - x0))^2``."""
    return F.mse_loss(velocity.float(), noise - x0)


def generator_gan_loss(fake: Tensor, real: Tensor, relativistic: bool = True) -> Tensor:
    """Of logits ``[B]``: ``softplus(-(f - r))`` (Jolicoeur-Martineau 2018; Huang et al. 2024, R3GAN), or plain."""
    return F.softplus(-(fake - real) if relativistic else -fake).mean()


def discriminator_gan_loss(fake: Tensor, real: Tensor, relativistic: bool = True) -> Tensor:
    """Of logits ``[B]``: ``softplus(-(r - f))``, or plain ``softplus(-r) + softplus(f)``."""
    if relativistic:
        return F.softplus(-(real - fake)).mean()
    return (F.softplus(-real) + F.softplus(fake)).mean()


def smoothness_penalty(perturbed: Tensor, logits: Tensor) -> Tensor:
    """Finite-difference R1 (on real) or R2 (on fake): mean squared change of the logit under a small perturbation."""
    return (perturbed - logits).square().mean()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of two gradients, each taken whole: 1 agree, 0 independent, -1 opposed."""
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0)
