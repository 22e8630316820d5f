"""What a solve says: potentials, costs, how far it is from done, where points go, which way they should move."""

import math
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from vdot.transport.engines import MAX_EXPONENT, Streamed
from vdot.transport.iterate import State, marginal_gap
from vdot.transport.problem import LN2, Problem


@dataclass(frozen=True)
class Transport:
    """A solved (or honestly unsolved) transport; per problem ``[B]`` unless a shape is given. All without autograd."""

    f: Tensor  # [B,N] dual potential phi, in units of the cost
    g: Tensor  # [B,M] dual potential psi
    cost: Tensor  # <P, C>
    objective: Tensor  # dual value of OT_eps; equals the primal one at convergence and never exceeds it
    marginal_error: Tensor  # relative L1 violation of both marginals (of their optimality conditions with reach)
    iterations: Tensor  # int64
    converged: Tensor  # bool: marginal_error <= tol; always False with tol = 0, a fixed budget
    mass: Tensor  # total mass of P; 1 when balanced and converged
    entropy: Tensor  # -sum P log P, nats
    effective_matches: Tensor  # exp(mean entropy of a row of P): 1 is an assignment, M is no information
    barycentre: Tensor  # [B,N,D] P y / P 1, where each x_i is sent
    gradient: Tensor  # [B,N,D] of cost and of OT_eps with respect to x, the plan held fixed
    _problem: Problem = field(repr=False)
    _reduced: tuple[Tensor, Tensor] = field(repr=False)  # f and g in bits and working precision

    def plan(self) -> Tensor:
        """The matrix ``P [B,N,M]``. For looking at small problems: nothing else here needs N x M numbers."""
        f, g = self._reduced
        plan = (self._problem.logits(slice(None), g) + f[..., None]).clamp_(max=MAX_EXPONENT).exp2_()
        return plan.to(self.cost.dtype)


_TENSORS = tuple(k.name for k in fields(Transport) if not k.name.startswith("_"))


def measure(engine: Streamed, state: State, tol: float) -> Transport:
    """Everything the potentials say, from one pass over the plan (two for p = 1)."""
    problem, f, g = engine.problem, state.f, state.g
    assert f is not None and state.col_lse is not None
    moments = engine.weigh(f, g)  # P 1, P q', P t
    mass_x, mass_y = moments[..., 0], (g + state.col_lse).clamp(max=MAX_EXPONENT).exp2()
    wide = moments.double() if f.device.type != "mps" else moments  # MPS has no float64
    inner = (problem.s.to(wide) * wide[..., 2:]).sum((1, 2))  # sum P s.t
    if problem.p == 2:
        bits = (problem.q_s.to(wide) * wide[..., 0] + wide[..., 1]).sum(1) - inner
        plan_logits, directions = inner, moments
    else:
        bits = engine.weigh(f, g, power=1)[..., 0].to(wide).sum(1)
        plan_logits, directions = -bits, engine.weigh(f, g, power=-1)
    mass = wide[..., 0].sum(1)
    nats = -LN2 * (plan_logits + (wide[..., 0] * f).sum(1) + (mass_y.to(wide) * g).sum(1))
    # H(P / m) - H(P 1 / m), within the bounds that rounding may leave; an unbalanced plan may have lost all its mass.
    safe = mass.clamp_min(1e-30)
    share = (wide[..., 0] / safe[:, None]).clamp_min(1e-30)
    row_entropy = nats / safe + safe.log() + (share * share.log()).sum(1)
    row_entropy = row_entropy.clamp(0, math.log(g.shape[1]))
    error = marginal_gap(problem, f, mass_x) + marginal_gap(problem.swap(), g, mass_y)
    phi = (f + problem.q_s - problem.log_a) * problem.unit[:, None]
    psi = (g + problem.q_t - problem.log_b) * problem.unit[:, None]
    out = f.dtype
    return Transport(
        f=phi,
        g=psi,
        cost=(bits.clamp_min(0) * problem.unit).to(out),
        objective=_dual(problem, phi, psi, mass).to(out),
        marginal_error=error,
        iterations=torch.full_like(problem.unit, state.iterations, dtype=torch.int64),
        converged=error <= tol if tol > 0 else torch.zeros_like(error, dtype=torch.bool),
        mass=mass.to(out),
        entropy=nats.to(out),
        effective_matches=row_entropy.exp().to(out),
        barycentre=problem.centre
        + moments[..., 2:] / mass_x.clamp_min(1e-30)[..., None] / problem.scale[:, None, None],
        gradient=to_gradient(problem, directions),
        _problem=problem,
        _reduced=(f, g),
    )


def _dual(problem: Problem, phi: Tensor, psi: Tensor, mass: Tensor) -> Tensor:
    """``<a, phi> + <b, psi> - eps (mass - 1)``; with reach, ``<a, rho (1 - exp(-phi / rho))>`` replaces <a, phi>."""
    eps, damp = problem.unit.to(mass) / LN2, problem.damp.to(mass)
    a, b = problem.log_a.to(mass).exp2(), problem.log_b.to(mass).exp2()
    phi, psi = phi.to(mass), psi.to(mass)
    if not problem.hard:
        rho = (eps * damp / (1 - damp).clamp_min(1e-12))[:, None]  # rounded to 1, damping is none
        phi, psi = (-rho * torch.expm1((-h / rho).clamp(max=80)) for h in (phi, psi))
    return (a * phi).sum(1) + (b * psi).sum(1) - eps * (mass - a.sum(1) * b.sum(1))


def to_gradient(problem: Problem, moments: Tensor) -> Tensor:
    """Moments with weights W -> ``sum_j W_ij dC_ij/dx_i``; p = 1 weights are already divided by the distance."""
    grad = problem.s * moments[..., :1] - moments[..., 2:]
    return grad * (2 / problem.scale)[:, None, None] if problem.p == 2 else grad


def join(parts: tuple[Transport, ...], problem: Problem, dtype: torch.dtype) -> Transport:
    """Groups of a batch into one Transport, floating results in ``dtype``."""
    joined = {k: _cat([getattr(part, k) for part in parts]) for k in _TENSORS}
    rounded = {k: v.to(dtype) if v.is_floating_point() else v for k, v in joined.items()}
    f, g = (_cat([part._reduced[side] for part in parts]) for side in (0, 1))
    return Transport(**rounded, _problem=problem, _reduced=(f, g))


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
