"""What a solve says: potentials, costs, how far it is from done, where points go, which way they should move."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vdot.transport.engines import MAX_EXPONENT, Streamed
from vdot.transport.iterate import State, marginal_gap
from vdot.transport.problem import LN2, Problem


class Sums(NamedTuple):
    """Reduced potentials and what passes over their plan gave, in bits and working precision."""

    f: Tensor  # [B,N]
    g: Tensor  # [B,M]
    mass_y: Tensor  # [B,M] P^T 1
    moments: Tensor  # [B,N,2+D] sum_j P_ij [1, q'_j, t_j]
    # For p = 1 alone; for p = 2 moments say both.
    directions: Tensor | None = None  # moments with each P_ij divided by its distance
    costs: Tensor | None = None  # [B,N] sum_j P_ij C_ij


@dataclass(frozen=True)
class Transport:
    """A solved (or honestly unsolved) transport; per problem ``[B]`` unless a shape is given. All without autograd.

    Besides its fields it has properties, each computed when it is read: a training reads few of them.
    """

    marginal_error: Tensor  # relative L1 violation of both marginals (of their optimality conditions with reach)
    iterations: Tensor  # int64
    converged: Tensor  # bool: marginal_error <= tol; always False with tol = 0, a fixed budget
    _problem: Problem = field(repr=False)
    _sums: Sums = field(repr=False)
    _dtype: torch.dtype = field(repr=False)  # of results

    @property
    def f(self) -> Tensor:
        """Dual potential phi ``[B,N]``, in units of the cost."""
        return self._phi.to(self._dtype)

    @property
    def g(self) -> Tensor:
        """Dual potential psi ``[B,M]``, in units of the cost."""
        return self._psi.to(self._dtype)

    @property
    def cost(self) -> Tensor:
        """``<P, C>``."""
        return (self._bits.clamp_min(0) * self._problem.unit).to(self._dtype)

    @property
    def objective(self) -> Tensor:
        """Dual value of OT_eps, ``<a, phi> + <b, psi> - eps (mass - 1)``; equals the primal one at convergence and
        never exceeds it. With reach, ``<a, rho (1 - exp(-phi / rho))>`` replaces ``<a, phi>``, for b likewise.
        """
        problem, mass = self._problem, self._mass_x.sum(1)
        eps, damp = problem.unit.to(mass) / LN2, problem.damp.to(mass)
        a, b = problem.log_a.to(mass).exp2(), problem.log_b.to(mass).exp2()
        phi, psi = self._phi.to(mass), self._psi.to(mass)
        if not problem.hard:
            rho = (eps * damp / (1 - damp).clamp_min(1e-12))[:, None]  # rounded to 1, damping is none
            phi, psi = (-rho * torch.expm1((-h / rho).clamp(max=80)) for h in (phi, psi))
        dual = (a * phi).sum(1) + (b * psi).sum(1) - eps * (mass - a.sum(1) * b.sum(1))
        return dual.to(self._dtype)

    @property
    def mass(self) -> Tensor:
        """Total mass of P; 1 when balanced and converged."""
        return self._mass_x.sum(1).to(self._dtype)

    @property
    def entropy(self) -> Tensor:
        """``-sum P log P``, nats."""
        return self._nats.to(self._dtype)

    @property
    def effective_matches(self) -> Tensor:
        """exp of the mean entropy of a row of P: 1 is an assignment, M is no information."""
        # H(P / m) - H(P 1 / m), within the bounds that rounding may leave; an unbalanced plan may have lost its mass.
        rows = self._mass_x
        safe = rows.sum(1).clamp_min(1e-30)
        share = (rows / safe[:, None]).clamp_min(1e-30)
        row_entropy = self._nats / safe + safe.log() + (share * share.log()).sum(1)
        return row_entropy.clamp(0, math.log(self._sums.g.shape[1])).exp().to(self._dtype)

    @property
    def barycentre(self) -> Tensor:
        """``P y / P 1`` ``[B,N,D]``, where each x_i is sent."""
        problem, moments = self._problem, self._sums.moments
        sent = moments[..., 2:] / moments[..., :1].clamp_min(1e-30) / problem.scale[:, None, None]
        return (problem.centre + sent).to(self._dtype)

    @property
    def gradient(self) -> Tensor:
        """``[B,N,D]`` of cost and of OT_eps with respect to x, the plan held fixed."""
        directions = self._sums.moments if self._sums.directions is None else self._sums.directions
        return to_gradient(self._problem, directions).to(self._dtype)

    def plan(self) -> Tensor:
        """The matrix ``P [B,N,M]``. For looking at small problems: nothing else here needs N x M numbers."""
        with torch.no_grad(), torch.autocast(self._sums.f.device.type, enabled=False):
            logits = self._problem.logits(slice(None), self._sums.g) + self._sums.f[..., None]
            return logits.clamp_(max=MAX_EXPONENT).exp2_().to(self._dtype)

    # --- in working precision

    @property
    def _phi(self) -> Tensor:
        problem = self._problem
        return (self._sums.f + problem.q_s - problem.log_a) * problem.unit[:, None]

    @property
    def _psi(self) -> Tensor:
        problem = self._problem
        return (self._sums.g + problem.q_t - problem.log_b) * problem.unit[:, None]

    # --- in float64: sums over all points

    @property
    def _mass_x(self) -> Tensor:
        """P 1 ``[B,N]``."""
        return _widen(self._sums.moments[..., 0])

    @property
    def _inner(self) -> Tensor:
        """``sum P s.t``."""
        return (_widen(self._problem.s) * self._sums.moments[..., 2:]).sum((1, 2))

    @property
    def _bits(self) -> Tensor:
        """``<P, C>`` in bits."""
        if self._sums.costs is not None:
            return _widen(self._sums.costs).sum(1)
        return (self._mass_x * self._problem.q_s + self._sums.moments[..., 1]).sum(1) - self._inner

    @property
    def _nats(self) -> Tensor:
        logits = self._inner if self._problem.p == 2 else -self._bits
        rows, columns = self._mass_x * self._sums.f, _widen(self._sums.mass_y) * self._sums.g
        return -LN2 * (logits + rows.sum(1) + columns.sum(1))


def measure(engine: Streamed, state: State, tol: float) -> Transport:
    """Everything the potentials say, from one pass over the plan (three for p = 1)."""
    problem, f, g = engine.problem, state.f, state.g
    assert f is not None and state.col_lse is not None
    moments = engine.weigh(f, g)
    mass_y = (g + state.col_lse).clamp(max=MAX_EXPONENT).exp2()
    directions = engine.weigh(f, g, power=-1) if problem.p == 1 else None
    costs = engine.weigh(f, g, power=1)[..., 0] if problem.p == 1 else None
    error = marginal_gap(problem, f, moments[..., 0]) + marginal_gap(problem.swap(), g, mass_y)
    return Transport(
        marginal_error=error,
        iterations=torch.full_like(problem.unit, state.iterations, dtype=torch.int64),
        converged=error <= tol if tol > 0 else torch.zeros_like(error, dtype=torch.bool),
        _problem=problem,
        _sums=Sums(f, g, mass_y, moments, directions, costs),
        _dtype=f.dtype,
    )


def to_gradient(problem: Problem, moments: Tensor) -> Tensor:
    """Moments with weights W -> ``sum_j W_ij dC_ij/dx_i``; p = 1 weights are already divided by the distance."""
    grad = problem.s * moments[..., :1] - moments[..., 2:]
    return grad * (2 / problem.scale)[:, None, None] if problem.p == 2 else grad


def join(parts: tuple[Transport, ...], problem: Problem, dtype: torch.dtype) -> Transport:
    """Groups of a batch into one Transport, floating results in ``dtype``."""
    error, iterations, converged = (
        _cat([getattr(part, name) for part in parts]) for name in ("marginal_error", "iterations", "converged")
    )
    groups = [part._sums for part in parts]
    known = [name for name, value in groups[0]._asdict().items() if value is not None]
    sums = Sums(**{name: _cat([getattr(group, name) for group in groups]) for name in known})
    return Transport(error.to(dtype), iterations, converged, problem, sums, dtype)


def _widen(z: Tensor) -> Tensor:
    return z if z.device.type == "mps" else z.double()  # MPS has no float64


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
