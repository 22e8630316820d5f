"""What the engine is measured against: the release's formulation, autograd through every log-domain iteration.

Lives in tests and benchmarks only: it keeps some ten N x M matrices per iteration for the backward pass.
"""

import math

import torch
from torch import Tensor


def cost_matrix(x: Tensor, y: Tensor, p: int = 2) -> Tensor:
    """``|x_i - y_j|^p``: x [B,N,D], y [B,M,D] -> [B,N,M]."""
    gap = (x[:, :, None] - y[:, None]).square().sum(-1)
    return gap if p == 2 else gap.clamp_min(1e-30).sqrt()


def unrolled_cost(
    x: Tensor,
    y: Tensor,
    eps: float = 0.1,
    iters: int = 60,
    p: int = 2,
    a: Tensor | None = None,
    b: Tensor | None = None,
    rho: float | None = None,
    cost: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """<P, C> per problem [B] after ``iters`` iterations from f = g = 0, and P [B,N,M]; differentiable."""
    cost = cost_matrix(x, y, p) if cost is None else cost
    log_a = a.log() if a is not None else x.new_full(x.shape[:2], -math.log(x.shape[1]))
    log_b = b.log() if b is not None else y.new_full(y.shape[:2], -math.log(y.shape[1]))
    damp = 1.0 if rho is None else rho / (rho + eps)
    logits = -cost / eps
    g = log_b if rho is not None or b is not None else torch.zeros_like(log_b)
    for _ in range(iters):
        f = log_a - damp * torch.logsumexp(logits + g[:, None], 2)
        g = log_b - damp * torch.logsumexp(logits + f[:, :, None], 1)
    plan = (f[:, :, None] + logits + g[:, None]).exp()
    return (plan * cost).sum((1, 2)), plan


def unrolled_gradient(x: Tensor, y: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """Cost [B], d cost / d x [B,N,D] through the iterations, plan [B,N,M]."""
    x = x.detach().clone().requires_grad_()
    cost, plan = unrolled_cost(x, y, **options)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(cost.sum(), x)
    return cost.detach(), grad, plan.detach()
