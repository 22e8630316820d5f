"""The two reductions from which every quantity of entropic transport is made, in plain PyTorch.

An engine answers, for one :class:`~vdot.transport.problem.Problem` with logits ``Z [B,N,M]``:

* ``rows(g)`` = log2 sum_j 2^(Z_ij + g_j), ``cols(f)`` = log2 sum_i 2^(Z_ij + f_i), the half-steps of Sinkhorn;
* ``apply_rows(f, g, v)`` = sum_j P_ij v_j and ``apply_cols(f, g, u)`` = sum_i P_ij u_i, P_ij = 2^(f_i + Z_ij + g_j);
* ``weigh(...)`` = sum_j P_ij W_ij [1, q'_j, t_j], the moments that make cost, barycentre and gradient.

:class:`Streamed` computes logits in blocks of rows and forgets them: memory linear in N + M. :class:`Cached` keeps
``K = 2^(Z + f^ + g^)`` of small problems around base potentials (f^, g^), so that a half-step is one matrix-vector
product (the absorption of Schmitzer 2019, "Stabilized sparse scaling algorithms", with potentials in the log domain).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vdot.transport.problem import Problem

# The cache answers for potentials within 2^16 of its base. Entries are floored at 2^-100, hence what the floor adds or
# loses stays below N 2^-84, and sums under 2^-50 are recomputed with their true maximum.
NEAR, SMALL, FLOOR = 16.0, 2.0**-50, -100.0
# Entries of a plan never exceed its mass. Potentials from elsewhere may ask for more: they get this much, not Inf.
MAX_EXPONENT = 60.0
MIN_ROWS = 16  # of a block, whatever its budget: narrower products waste most of their time


def lse_block(logits: Tensor) -> Tensor:
    """log2 sum 2^logits over the last axis, ``[B,R,M] -> [B,R]``; the maximum is taken out, so nothing overflows."""
    top = logits.amax(-1, keepdim=True)
    return top[..., 0] + (logits - top).exp2().sum(-1).log2()


class Sweep(NamedTuple):
    """What iterations leave: f before the last one, f and g after it, and its log-sums."""

    f_before: Tensor | None
    f: Tensor
    g: Tensor
    row_lse: Tensor
    col_lse: Tensor


class Streamed:
    """Row blocks of at most ``tile_bytes``: exact log-domain reductions, the reference for the other engines."""

    def __init__(self, problem: Problem, tile_bytes: int, *, compiled: bool = False) -> None:
        self.problem, self.swapped = problem, problem.swap()
        self.tile_bytes = tile_bytes
        self._lse = _compiled_lse if compiled else _eager_lse

    def blocks(self, problem: Problem) -> Iterator[slice]:
        batch, n, m = problem.shape
        size = min(n, max(MIN_ROWS, self.tile_bytes // (batch * m * problem.s.element_size())))
        return (slice(i, min(i + size, n)) for i in range(0, n, size))

    def rows(self, g: Tensor) -> Tensor:
        return self._all_rows(self.problem, g)

    def cols(self, f: Tensor) -> Tensor:
        return self._all_rows(self.swapped, f)

    def _all_rows(self, problem: Problem, g: Tensor) -> Tensor:
        # Results go into place block by block: small tensors kept between large ones would fragment the heap.
        out = torch.empty_like(problem.log_a)
        for block in self.blocks(problem):
            out[:, block] = self._lse(problem, block, g)
        return out

    def sweep(self, f: Tensor | None, g: Tensor, omega: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One iteration relaxed by ``omega [B]``: new f, new g, row log-sums at (f, g), column log-sums at the new f.

        With a previous f the exponents ``f + Z + g`` are those of a plan, hence tame: the maximum need not be found and
        one exponential serves both half-steps. Sums that under- or overflow send the iteration the safe way.
        """
        if f is None or torch.compiler.is_compiling():
            return self._two_pass(f, g, omega)
        row_sum, new, col_sum = torch.empty_like(f), torch.empty_like(f), torch.zeros_like(g)
        for block in self.blocks(self.problem):
            old = f[:, block]
            plan = self.problem.logits(block, g).add_(old[..., None]).exp2_()
            row_sum[:, block] = plan.sum(-1)
            new[:, block] = self.problem.relaxed(old, row_sum[:, block].log2() - old, omega, block)
            col_sum += torch.bmm((new[:, block] - old).exp2()[:, None], plan)[:, 0]
        low, high = torch.minimum(row_sum.amin(), col_sum.amin()), torch.maximum(row_sum.amax(), col_sum.amax())
        if not bool((low > SMALL**2) & (high < 1 / SMALL)):  # NaN compares false
            return self._two_pass(f, g, omega)
        col_lse = col_sum.log2() - g
        return new, self.swapped.relaxed(g, col_lse, omega), row_sum.log2() - f, col_lse

    def sweeps(self, f: Tensor | None, g: Tensor, omega: Tensor, count: int) -> Sweep:
        """``count`` iterations in a row, of one relaxation."""
        before, row_lse, col_lse = f, None, None
        for _ in range(count):
            before = f
            f, g, row_lse, col_lse = self.sweep(f, g, omega)
        assert f is not None and row_lse is not None and col_lse is not None
        return Sweep(before, f, g, row_lse, col_lse)

    def _two_pass(self, f: Tensor | None, g: Tensor, omega: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        row_lse = self.rows(g)
        f = self.problem.relaxed(f, row_lse, omega)
        col_lse = self.cols(f)
        return f, self.swapped.relaxed(g, col_lse, omega), row_lse, col_lse

    def apply_rows(self, f: Tensor, g: Tensor, v: Tensor) -> Tensor:
        return self._apply(self.problem, f, g, v)

    def apply_cols(self, f: Tensor, g: Tensor, u: Tensor) -> Tensor:
        return self._apply(self.swapped, g, f, u)

    def _apply(self, problem: Problem, f: Tensor, g: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(f)
        for block in self.blocks(problem):
            out[:, block] = torch.bmm(_plan(problem, block, f, g), v[..., None])[..., 0]
        return out

    def weigh(
        self,
        f: Tensor,
        g: Tensor,
        *,
        affine: tuple[float, float] = (1.0, 0.0),
        low_rank: tuple[Tensor, Tensor] | None = None,
        power: int = 0,
        swap: bool = False,
    ) -> Tensor:
        """``sum_j P_ij W_ij [1, q'_j, t_j]`` -> ``[B,N,2+D]``, with costs c_ij in bits and

            W_ij = (affine_0 + affine_1 c_ij + sum_r U_ir V_jr) c_ij^power,     low_rank = U [B,N,R], V [B,M,R].

        ``power`` -1 turns p = 1 costs into directions; coinciding points have none and weigh nothing. ``swap`` sums
        over i instead (f, g stay in their order).
        """
        problem = self.swapped if swap else self.problem
        if swap:
            f, g = g, f
        values = torch.cat([torch.ones_like(problem.q_t)[..., None], problem.q_t[..., None], problem.t], 2)
        out = values.new_empty(*f.shape, values.shape[2])
        for block in self.blocks(problem):
            plan = _plan(problem, block, f, g)
            weight = plan.new_full((1, 1, 1), affine[0])
            cost = problem.bits(block) if affine[1] or power else None
            if cost is not None and affine[1]:
                weight = affine[0] + affine[1] * cost
            if low_rank is not None:
                weight = torch.baddbmm(weight, low_rank[0][:, block], low_rank[1].mT)
            if low_rank is not None or affine != (1.0, 0.0):
                plan = plan * weight
            if cost is not None and power == 1:
                plan = plan * cost
            elif cost is not None and power == -1:
                plan = torch.where(cost > 0, plan / cost.clamp_min(1e-30), 0)
            out[:, block] = torch.bmm(plan, values)
        return out


def _eager_lse(problem: Problem, block: slice, g: Tensor) -> Tensor:
    logits = problem.logits(block, g)
    if torch.compiler.is_compiling():
        return lse_block(logits)
    top = logits.amax(-1, keepdim=True)
    return top[..., 0] + logits.sub_(top).exp2_().sum(-1).log2()  # in place: the block is ours and still in cache


_fused_block: list[Callable[[Tensor], Tensor]] = []


def _compiled_lse(problem: Problem, block: slice, g: Tensor) -> Tensor:
    if not _fused_block:
        _fused_block.append(torch.compile(lse_block, dynamic=False))
    return _fused_block[0](problem.logits(block, g))


def _plan(problem: Problem, block: slice, f: Tensor, g: Tensor) -> Tensor:
    """A block of ``P [B,R,M]``."""
    return (problem.logits(block, g) + f[:, block, None]).clamp_(max=MAX_EXPONENT).exp2_()


class Cached(Streamed):
    """Keeps ``K [B,N,M]``: for problems small enough to pay N x M once per problem (a latent frame is 10 MB)."""

    def __init__(self, problem: Problem, tile_bytes: int) -> None:
        super().__init__(problem, tile_bytes)
        batch, n, m = problem.shape
        self.kernel = problem.s.new_empty(batch, n, m)
        self.base: tuple[Tensor, Tensor] | None = None

    def rows(self, g: Tensor) -> Tensor:
        return self._reduce(g, 1)

    def cols(self, f: Tensor) -> Tensor:
        return self._reduce(f, 0)

    def sweep(self, f: Tensor | None, g: Tensor, omega: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._two_pass(f, g, omega)

    def _reduce(self, h: Tensor, side: int) -> Tensor:
        """Log-sums over j (side 1, h = g) or over i (side 0, h = f), from the cache where it can answer."""
        if self.base is not None:
            shift = h - self.base[side]
            total = self._product(shift.exp2(), side)
            if bool((shift.abs().amax() <= NEAR) & (total.amin() >= SMALL)):
                return total.log2() - self.base[1 - side]
        return self._rebase(h, side)

    def _product(self, v: Tensor, side: int) -> Tensor:
        if side == 1:
            return torch.bmm(self.kernel, v[..., None])[..., 0]
        return torch.bmm(v[:, None], self.kernel)[:, 0]

    def _rebase(self, h: Tensor, side: int) -> Tensor:
        """Exact log-sums at h; the kernel is left with a maximum of one in each row (side 1) or column (side 0)."""
        axis = 2 if side == 1 else 1
        self._fill(h.new_zeros(self.kernel.shape[0], self.kernel.shape[2]) if side == 0 else h)
        if side == 0:
            self.kernel += h[..., None]
        top = self.kernel.amax(axis, keepdim=True)
        self.kernel.sub_(top).clamp_(min=FLOOR).exp2_()
        top = top.squeeze(axis)
        self.base = (h, -top) if side == 0 else (-top, h)
        return top + self.kernel.sum(axis).log2()

    def _fill(self, g: Tensor) -> None:
        if self.problem.p == 2:
            torch.baddbmm(g[:, None], self.problem.s, self.problem.t.mT, out=self.kernel)
        else:
            torch.sub(g[:, None], self.problem.bits(slice(None)), out=self.kernel)

    def _apply(self, problem: Problem, f: Tensor, g: Tensor, v: Tensor) -> Tensor:
        side = 1 if problem is self.problem else 0
        f, g = (f, g) if side == 1 else (g, f)
        near = self.base is not None and bool(
            torch.maximum((f - self.base[0]).abs().amax(), (g - self.base[1]).abs().amax()) <= NEAR
        )
        if not near:
            self._fill(g)
            self.kernel.add_(f[..., None]).clamp_(FLOOR, MAX_EXPONENT).exp2_()
            self.base = (f, g)
        assert self.base is not None
        inner, outer = (g - self.base[1], f - self.base[0]) if side == 1 else (f - self.base[0], g - self.base[1])
        return outer.exp2() * self._product(inner.exp2() * v, side)
