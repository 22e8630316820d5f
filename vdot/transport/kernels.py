"""Triton kernels: costs, log-sum-exp and plan moments online, nothing of size N x M in memory.

``_half_step`` streams blocks of y past a block of x: logits by a tensor-core dot product (by differences for p = 1), a
running maximum and sum in float32 base 2 (as in FlashAttention; Milakov and Gimelshein 2018), then the relaxed update
of the potential, all in one launch. ``_moments`` accumulates ``sum_j P_ij c_ij^power v_j`` for a few columns v alike:
cost, marginal, barycentre and gradient in one launch. A column half-step is a row half-step of the swapped problem.

Importing this module needs Triton. Kernels run on CUDA, and on a CPU under ``TRITON_INTERPRET=1``.
"""

from dataclasses import replace

import torch
from torch import Tensor

from vdot.errors import InputError, MissingDependencyError
from vdot.transport.engines import Streamed
from vdot.transport.problem import Problem

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise MissingDependencyError(
        "the Triton engine needs triton: pip install triton, or choose engine='streamed'"
    ) from error

BLOCK_N, BLOCK_M = 64, 64
# Log-sums may differ from those of full float32 products by this many bits (a relative 7e-4 in the plan).
DOT_TOLERANCE = 1e-3
PRECISIONS = ("tf32", "tf32x3", "ieee")  # fastest first


@triton.jit
def _block(s_ptr, rows, n, dim: tl.constexpr, wide: tl.constexpr):  # type: ignore[no-untyped-def]
    d = tl.arange(0, wide)
    return tl.load(s_ptr + rows[:, None] * dim + d[None, :], (rows[:, None] < n) & (d[None, :] < dim), 0.0)


@triton.jit
def _logits(  # type: ignore[no-untyped-def]
    s, s_ptr, t_ptr, rows, cols, n, m, dim: tl.constexpr, wide: tl.constexpr, power: tl.constexpr, dot: tl.constexpr
):
    """``[BN,BM]`` block of Z. p = 1 sums squared differences: the expansion would lose near-duplicates."""
    if power == 2:
        z = tl.dot(s, tl.trans(_block(t_ptr, cols, m, dim, wide)), input_precision=dot)
    else:
        z = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
        for k in tl.static_range(dim):
            x, y = tl.load(s_ptr + rows * dim + k, rows < n, 0.0), tl.load(t_ptr + cols * dim + k, cols < m, 0.0)
            z += (x[:, None] - y[None, :]) * (x[:, None] - y[None, :])
        z = -tl.sqrt(z)
    return z


@triton.jit
def _half_step(  # type: ignore[no-untyped-def]
    s_ptr, t_ptr, g_ptr, old_ptr, target_ptr, damp_ptr, omega_ptr, new_ptr, lse_ptr, n, m,
    dim: tl.constexpr, wide: tl.constexpr, power: tl.constexpr, dot: tl.constexpr, bn: tl.constexpr, bm: tl.constexpr,
):  # fmt: skip
    """``L_i = log2 sum_j 2^(Z_ij + g_j)`` and ``f_i + omega (target_i - damp L_i - f_i)`` for one block of rows."""
    b = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * bn + tl.arange(0, bn)
    s_ptr += b * n * dim
    t_ptr += b * m * dim
    s = _block(s_ptr, rows, n, dim, wide)
    top = tl.full((bn,), -3.0e38, tl.float32)
    total = tl.zeros((bn,), tl.float32)
    for start in range(0, m, bm):
        cols = start + tl.arange(0, bm)
        z = _logits(s, s_ptr, t_ptr, rows, cols, n, m, dim, wide, power, dot)
        z += tl.load(g_ptr + b * m + cols, cols < m, -3.0e38)[None, :]
        higher = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(z - higher[:, None]), 1)
        top = higher
    lse = top + tl.log2(total)
    keep = rows < n
    old = tl.load(old_ptr + b * n + rows, keep, 0.0)
    new = tl.load(target_ptr + b * n + rows, keep, 0.0) - tl.load(damp_ptr + b) * lse
    tl.store(lse_ptr + b * n + rows, lse, keep)
    tl.store(new_ptr + b * n + rows, old + tl.load(omega_ptr + b) * (new - old), keep)


@triton.jit
def _moments(  # type: ignore[no-untyped-def]
    s_ptr, t_ptr, f_ptr, g_ptr, v_ptr, out_ptr, n, m, columns,
    dim: tl.constexpr, wide: tl.constexpr, power: tl.constexpr, dot: tl.constexpr, bn: tl.constexpr, bm: tl.constexpr,
    vn: tl.constexpr, cost_power: tl.constexpr,
):  # fmt: skip
    """``sum_j 2^(f_i + Z_ij + g_j) c_ij^cost_power V_jk`` -> out ``[N,columns]`` for one block of rows."""
    b = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * bn + tl.arange(0, bn)
    k = tl.arange(0, vn)
    s_ptr += b * n * dim
    t_ptr += b * m * dim
    s = _block(s_ptr, rows, n, dim, wide)
    f = tl.load(f_ptr + b * n + rows, rows < n, -200.0)
    acc = tl.zeros((bn, vn), tl.float32)
    for start in range(0, m, bm):
        cols = start + tl.arange(0, bm)
        z = _logits(s, s_ptr, t_ptr, rows, cols, n, m, dim, wide, power, dot)
        exponent = f[:, None] + z + tl.load(g_ptr + b * m + cols, cols < m, -3.0e38)[None, :]
        plan = tl.exp2(tl.minimum(exponent, 60.0))
        if cost_power == 1:
            plan *= -z
        if cost_power == -1:
            plan = tl.where(z < 0, plan / tl.where(z < 0, -z, 1.0), 0.0)
        v = tl.load(
            v_ptr + (b * m + cols[:, None]) * columns + k[None, :], (cols[:, None] < m) & (k[None, :] < columns), 0.0
        )
        acc += tl.dot(plan, v, input_precision=dot)
    tl.store(
        out_ptr + (b * n + rows[:, None]) * columns + k[None, :], acc, (rows[:, None] < n) & (k[None, :] < columns)
    )


class TritonEngine(Streamed):
    """float32 problems on CUDA; what has no kernel (the rank-2K pass of the unrolled gradient) streams as elsewhere."""

    def __init__(self, problem: Problem, tile_bytes: int, precision: str | None = None) -> None:
        if problem.s.dtype != torch.float32:
            raise InputError(
                "the Triton engine works in float32: pass float32 clouds that do not need more (wide, or a tiny eps), "
                "or engine='streamed'"
            )
        super().__init__(problem, tile_bytes)
        self.targets = update_target(self.problem), update_target(self.swapped)
        self.precision = precision or pick_precision(problem)

    def rows(self, g: Tensor) -> Tensor:
        return half_step(self.problem, self.targets[0], None, g, None, self.precision)[1]

    def cols(self, f: Tensor) -> Tensor:
        return half_step(self.swapped, self.targets[1], None, f, None, self.precision)[1]

    def sweep(self, f: Tensor | None, g: Tensor, omega: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        new_f, row_lse = half_step(self.problem, self.targets[0], f, g, omega, self.precision)
        new_g, col_lse = half_step(self.swapped, self.targets[1], g, new_f, omega, self.precision)
        return new_f, new_g, row_lse, col_lse

    def _apply(self, problem: Problem, f: Tensor, g: Tensor, v: Tensor) -> Tensor:
        return moments(problem, f, g, v[..., None], 0, self.precision)[..., 0]

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
        if affine != (1.0, 0.0) or low_rank is not None or (power == 1 and self.problem.p == 2):
            return super().weigh(f, g, affine=affine, low_rank=low_rank, power=power, swap=swap)
        problem = self.swapped if swap else self.problem
        f, g = (g, f) if swap else (f, g)
        values = torch.cat([torch.ones_like(problem.q_t)[..., None], problem.q_t[..., None], problem.t], 2)
        return moments(problem, f, g, values, power, self.precision)


def update_target(problem: Problem) -> Tensor:
    """What f would be if its log-sums were zero, ``[B,N]``: the constant part of the update."""
    return (problem.log_a - (1 - problem.damp[:, None]) * problem.q_s).contiguous()


def half_step(
    problem: Problem, target: Tensor, old: Tensor | None, g: Tensor, omega: Tensor | None, precision: str
) -> tuple[Tensor, Tensor]:
    """New f ``[B,N]`` and its log-sums ``[B,N]`` from g ``[B,M]``: one launch. Without ``old`` the update is plain."""
    batch, n, m = problem.shape
    if old is None or omega is None:
        old, omega = torch.zeros_like(target), torch.ones_like(problem.unit)
    new, lse = torch.empty_like(target), torch.empty_like(target)
    _half_step[(triton.cdiv(n, BLOCK_N), batch)](
        *(z.contiguous() for z in (problem.s, problem.t, g, old, target, problem.damp, omega)), new, lse, n, m,
        dim=problem.s.shape[2], wide=_wide(problem.s.shape[2]), power=problem.p, dot=precision, bn=BLOCK_N, bm=BLOCK_M,
    )  # fmt: skip
    return new, lse


def moments(problem: Problem, f: Tensor, g: Tensor, values: Tensor, cost_power: int, precision: str) -> Tensor:
    """``sum_j P_ij c_ij^cost_power values_j``: values ``[B,M,V]`` -> ``[B,N,V]``; a cost power needs p = 1."""
    batch, n, m = problem.shape
    columns = values.shape[2]
    out = problem.s.new_empty(batch, n, columns)
    _moments[(triton.cdiv(n, BLOCK_N), batch)](
        *(z.contiguous() for z in (problem.s, problem.t, f, g, values)), out, n, m, columns,
        dim=problem.s.shape[2], wide=_wide(problem.s.shape[2]), power=problem.p, dot=precision, bn=BLOCK_N, bm=BLOCK_M,
        vn=_wide(columns), cost_power=cost_power,
    )  # fmt: skip
    return out


def pick_precision(problem: Problem) -> str:
    """The fastest dot product whose log-sums agree with full float32 on a sample of rows, within DOT_TOLERANCE bits.

    TF32 keeps 11 bits of each factor: enough for logits of a few bits (large eps), not for the hundreds of a small one.
    """
    sample = _first_rows(problem, 2 * BLOCK_N)
    target, g = update_target(sample), problem.log_b - problem.q_t
    exact = half_step(sample, target, None, g, None, "ieee")[1]
    for precision in PRECISIONS[:-1]:
        if bool((half_step(sample, target, None, g, None, precision)[1] - exact).abs().amax() <= DOT_TOLERANCE):
            return precision
    return PRECISIONS[-1]


def _first_rows(problem: Problem, count: int) -> Problem:
    return replace(problem, s=problem.s[:, :count], log_a=problem.log_a[:, :count], q_s=problem.q_s[:, :count])


def _wide(columns: int) -> int:
    return max(16, triton.next_power_of_2(columns))  # the smallest tensor-core tile
