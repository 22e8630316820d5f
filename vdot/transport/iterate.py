"""The Sinkhorn fixed point, over-relaxed: from potentials to potentials that satisfy the marginals.

One iteration updates both sides (Sinkhorn 1967; Cuturi 2013; unbalanced: Chizat et al. 2018). In reduced bits
(:mod:`vdot.transport.problem`), with ``L_i = log2 sum_j 2^(Z_ij + g_j)`` and damping ``d = rho / (rho + eps)``:

    f_i <- f_i + w (log2 a_i - d L_i - (1 - d) q_i - f_i),          g likewise from the new f.

``w = 1`` is plain Sinkhorn. ``w > 1`` is successive over-relaxation (Thibault et al. 2017; Lehmann et al. 2021): 2 to 4
times fewer iterations on latents, more at small eps. The best ``w`` follows from the rate ``r`` that is observed while
running with some w (Young 1954): ``mu^2 = (r + w - 1)^2 / (w^2 r)`` and ``w* = 2 / (1 + sqrt(1 - mu^2))``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vdot.transport.engines import MAX_EXPONENT, Streamed
from vdot.transport.problem import Problem

PLAIN = 5  # first iterations without relaxation: far from the solution it overshoots
WINDOW = 6  # iterations over which the convergence rate is observed
CEILING = 1.85  # 1.9 and more was slower or diverged on smooth latents (benchmarks/RESULTS.md)
GROWTH = 6.0  # an error that grew by this over a window halves the relaxation


# What the iterations passed through, for the unrolled gradient: (f_k, g_{k-1}, row L_k, column L_k) of each.
Trace = list[tuple[Tensor, Tensor, Tensor, Tensor]]


@dataclass
class State:
    """Reduced potentials ``f [B,N]`` (None before the first iteration), ``g [B,M]``, and the iterations spent."""

    f: Tensor | None
    g: Tensor
    col_lse: Tensor | None = None
    iterations: int = 0


def start(problem: Problem, psi: Tensor | None = None) -> State:
    """Potential g for ``psi [B,M]`` in units of the cost; zero, the release's start, without it."""
    g = problem.log_b - problem.q_t
    return State(None, g if psi is None else g + psi.to(g) / problem.unit[:, None])


def marginal_gap(problem: Problem, potential: Tensor, mass: Tensor) -> Tensor:
    """L1 distance ``[B]`` of the plan's row mass from its optimum, relative to the mass of a.

    Hard marginals: the optimum is a. With KL-relaxed ones it is ``a exp(-phi / rho)``, the stationarity condition, so
    that the same number measures convergence. For the other side pass ``problem.swap()``.
    """
    weight = problem.log_a.exp2()
    if problem.hard:
        return (mass - weight).abs().sum(1)
    damp = problem.damp[:, None]
    soft = ((1 - damp) / damp * (potential + problem.q_s - problem.log_a)).clamp(-100, 100)
    return (mass - weight * (-soft).exp2()).abs().sum(1) / weight.sum(1)


def iterate(
    engine: Streamed, state: State, max_iters: int, target: float, relaxation: float, trace: Trace | None = None
) -> State:
    """Run until every problem's row error is at most ``target`` (0: never) or ``max_iters`` in all have been spent.

    The last update of g is plain, so the columns of the returned plan are exact.
    """
    problem, swapped = engine.problem, engine.problem.swap()
    plain = torch.ones_like(problem.unit)
    omega = plain * relaxation
    known = omega.cpu()  # what is decided about a few numbers is decided on the host: launching for each takes longer
    errors: dict[int, Tensor] = {}
    f, g, col_lse, k, done = state.f, state.g, state.col_lse, state.iterations, False
    every = 1 if g.device.type == "cpu" else WINDOW  # looking at an error waits for the device
    while k < max_iters and not done:
        relaxed = relaxation != 1 and k >= PLAIN
        count = 1 if trace is not None else min(_next_look(k, every, target > 0, relaxation != 1), max_iters) - k
        step, g_before = engine.sweeps(f, g, omega if relaxed else plain, count), g
        f, g, col_lse, k = step.f, step.g, step.col_lse, k + count
        if step.f_before is not None and (target > 0 or relaxation != 1):
            mass = (step.f_before + step.row_lse).clamp(max=MAX_EXPONENT).exp2()
            errors[k] = marginal_gap(problem, step.f_before, mass)
            if k % every == 0:
                errors[k] = errors[k].cpu()
                # Overshoot is most of a relaxed error; the plain last update leaves about (2 - w) of it (linear SOR).
                rest = errors[k] * (2 - known) if relaxed else errors[k]
                done = target > 0 and bool((rest <= target).all())
        if trace is not None:
            trace.append((f, g_before, step.row_lse, col_lse))
        if relaxation != 1 and k % WINDOW == 0 and k - WINDOW in errors:
            known = adapt(known, errors[k], errors[k - WINDOW + 1].cpu())
            omega = known.to(omega.device)
    assert col_lse is not None
    return State(f, swapped.relaxed(None, col_lse), col_lse, k)


def _next_look(k: int, every: int, stopping: bool, adapting: bool) -> int:
    """The iteration after k at which an error is wanted, or the relaxation changes."""
    if every == 1:
        return k + 1
    looks = [every * (k // every + 1)] if stopping or adapting else []
    if adapting:
        looks += [PLAIN] if k < PLAIN else []
        looks += [k + 1] if k % WINDOW == 0 else []  # where a window begins
    return min(looks, default=2**62)


def iterate_symmetric(engine: Streamed, state: State, max_iters: int, target: float) -> State:
    """A cloud to itself, one potential: ``f <- (f + log2 a - d L(f) - (1 - d) q) / 2`` (Knight et al. 2014).

    The average damps the oscillation that slows alternating updates here: a handful of iterations instead of hundreds.
    """
    problem, f = engine.problem, state.g
    for k in range(state.iterations, max_iters):
        lse = engine.rows(f)
        error = marginal_gap(problem, f, (f + lse).clamp(max=MAX_EXPONENT).exp2())
        if k > state.iterations and bool((2 * error <= target).all()):  # both marginals are this far off
            return State(f, f, lse, k)
        f = (f + problem.relaxed(None, lse)) / 2
    return State(f, f, engine.rows(f), max_iters)


def adapt(omega: Tensor, now: Tensor, before: Tensor) -> Tensor:
    """Next relaxation ``[B]`` from errors ``WINDOW - 1`` iterations apart: Young's formula up, halving on growth."""
    rate = (now / before.clamp_min(1e-30)).clamp(1e-3, 0.9999 ** (WINDOW - 1)) ** (1 / (WINDOW - 1))
    mu2 = ((rate + omega - 1) ** 2 / (omega**2 * rate)).clamp(max=1 - 1e-5)
    best = torch.maximum(omega, (2 / (1 + (1 - mu2).sqrt())).clamp(max=CEILING))
    # Faster than omega - 1 means still in the transient: no rate to learn from.
    faster = torch.where(rate > omega - 1, best, omega)
    return torch.where(now > GROWTH * before, 1 + (omega - 1) / 2, faster)
