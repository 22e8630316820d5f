"""Triton kernels: costs, log-sum-exp and plan moments online, nothing of size N x M in memory.

``_half_step`` streams blocks of y past a block of x: logits by tensor-core dot products (by differences for p = 1),
their sum in float32 base 2 around the log-sum of the step before, so that no running maximum is needed (where that
guess is too far off, it is found as in FlashAttention; Milakov and Gimelshein 2018), then the relaxed update of the
potential, all in one launch. ``_moments`` accumulates ``sum_j P_ij c_ij^power v_j`` for a few columns v alike: cost,
marginal, barycentre and gradient in one launch. A column half-step is a row half-step of the swapped problem.

Tensor cores multiply half precision. A coordinate goes in as two halves, ``s = s_hi + s_lo`` to 22 bits, and four
products of halves make one of coordinates (Markidis et al. 2018), in one dot product over four times the width; sums of
float32 products lose more (tests/transport/test_kernels.py). Problems too wide for float32 are not solved here.

Importing this module needs Triton. Kernels run on CUDA, and on a CPU under ``TRITON_INTERPRET=1``.
"""

import threading
import weakref
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from vdot.errors import InputError, MissingDependencyError
from vdot.transport.engines import Streamed, Sweep
from vdot.transport.problem import Problem

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise MissingDependencyError(
        "the Triton engine needs triton: pip install triton, or choose engine='streamed'"
    ) from error

BLOCK_N, BLOCK_M, WARPS, STAGES = 64, 64, 4, 3
NOTHING = -3.0e38  # potential of a point that is not there
TOGETHER = 5  # iterations in one CUDA graph: one by one, launching a kernel takes longer than running it
WORKSPACES = 8


@triton.jit
def _points(s_ptr, rows, wide: tl.constexpr, power: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block's high halves twice side by side, and its low halves twice."""
    if power == 2:
        k = tl.arange(0, 2 * wide) % wide
        at = s_ptr + rows[:, None] * (2 * wide) + k[None, :]
        return tl.load(at), tl.load(at + wide)
    else:
        return 0.0, 0.0  # p = 1 reads one coordinate at a time


@triton.jit
def _logits(  # type: ignore[no-untyped-def]
    high, low, base, s_ptr, t_ptr, rows, cols, wide: tl.constexpr, power: tl.constexpr
):
    """Block ``[BN,BM]`` of base + Z. p = 1 sums squared differences: the expansion would lose near-duplicates."""
    if power == 2:
        t = tl.load(t_ptr + cols[None, :] * (2 * wide) + tl.arange(0, 2 * wide)[:, None])
        z = tl.dot(high, t, tl.dot(low, t, base))
    else:
        z = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
        for k in tl.static_range(wide):
            x, y = tl.load(s_ptr + rows * wide + k), tl.load(t_ptr + cols * wide + k)
            z += (x[:, None] - y[None, :]) * (x[:, None] - y[None, :])
        z = base - tl.sqrt(z)
    return z


@triton.jit
def _prepare(  # type: ignore[no-untyped-def]
    s_ptr, log_a_ptr, q_ptr, damp_ptr, points_ptr, target_ptr, lse_ptr, n, n_pad,
    dim: tl.constexpr, wide: tl.constexpr, power: tl.constexpr, bn: tl.constexpr,
):  # fmt: skip
    """Points as halves, ``[high, low]``; what a potential would be if its log-sums were zero; no guess of those."""
    b = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * bn + tl.arange(0, bn)
    keep = rows < n
    k = tl.arange(0, wide)
    s = tl.load(s_ptr + (b * n + rows[:, None]) * dim + k[None, :], keep[:, None] & (k[None, :] < dim), 0.0)
    if power == 2:
        high = s.to(tl.float16)
        at = points_ptr + (b * n_pad + rows[:, None]) * (2 * wide) + k[None, :]
        tl.store(at, high)
        tl.store(at + wide, (s - high.to(tl.float32)).to(tl.float16))
    else:
        tl.store(points_ptr + (b * n_pad + rows[:, None]) * dim + k[None, :], s, k[None, :] < dim)
    target = tl.load(log_a_ptr + b * n + rows, keep, 0.0)
    target -= (1 - tl.load(damp_ptr + b)) * tl.load(q_ptr + b * n + rows, keep, 0.0)
    tl.store(target_ptr + b * n_pad + rows, target)
    tl.store(lse_ptr + b * n_pad + rows, tl.full((bn,), float("nan"), tl.float32))


@triton.jit
def _half_step(  # type: ignore[no-untyped-def]
    s_ptr, t_ptr, g_ptr, f_ptr, target_ptr, damp_ptr, omega_ptr, before_ptr, lse_ptr, n, n_pad, m_pad,
    wide: tl.constexpr, power: tl.constexpr, bn: tl.constexpr, bm: tl.constexpr,
):  # fmt: skip
    """``L_i = log2 sum_j 2^(Z_ij + g_j)``, f to before, ``f_i + omega (target_i - damp L_i - f_i)`` to f, in a block.

    ``lse`` holds the last L, the guess of this one. Rows are padded to ``n_pad``, columns to ``m_pad``.
    """
    b = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * bn + tl.arange(0, bn)
    cols = tl.arange(0, bm)
    width: tl.constexpr = 2 * wide if power == 2 else wide
    s_ptr += b * n_pad * width
    t_ptr += b * m_pad * width
    g_ptr += b * m_pad
    at = b * n_pad + rows
    high, low = _points(s_ptr, rows, wide, power)
    middle = tl.load(lse_ptr + at)
    total = tl.zeros((bn,), tl.float32)
    g = tl.load(g_ptr + cols)
    for start in range(0, m_pad, bm):
        base = g[None, :] - middle[:, None]
        g = tl.load(g_ptr + start + bm + cols)  # a block ahead: nothing waits for it
        total += tl.sum(tl.exp2(_logits(high, low, base, s_ptr, t_ptr, rows, start + cols, wide, power)), 1)
    keep = rows < n
    if tl.sum((((total > 2.0**-60) & (total < 2.0**60)) | (rows >= n)).to(tl.int32)) < bn:  # NaN compares false
        middle = tl.full((bn,), -3.0e38, tl.float32)
        total = tl.zeros((bn,), tl.float32)
        for start in range(0, m_pad, bm):
            base = tl.zeros((bn, bm), tl.float32) + tl.load(g_ptr + start + cols)[None, :]
            z = _logits(high, low, base, s_ptr, t_ptr, rows, start + cols, wide, power)
            higher = tl.maximum(middle, tl.max(z, 1))
            total = total * tl.exp2(middle - higher) + tl.sum(tl.exp2(z - higher[:, None]), 1)
            middle = higher
    lse = middle + tl.log2(total)
    old = tl.load(f_ptr + at)
    new = tl.load(target_ptr + at) - tl.load(damp_ptr + b) * lse
    tl.store(before_ptr + at, old, keep)
    tl.store(lse_ptr + at, lse, keep)
    tl.store(f_ptr + at, old + tl.load(omega_ptr + b) * (new - old), keep)


@triton.jit
def _moments(  # type: ignore[no-untyped-def]
    s_ptr, t_ptr, f_ptr, g_ptr, v_ptr, out_ptr, n, n_pad, m_pad, columns,
    wide: tl.constexpr, power: tl.constexpr, bn: tl.constexpr, bm: tl.constexpr, vn: tl.constexpr,
    cost_power: tl.constexpr,
):  # fmt: skip
    """``sum_j 2^(f_i + Z_ij + g_j) c_ij^cost_power V_kj`` -> out ``[N,columns]`` for one block of rows."""
    b = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * bn + tl.arange(0, bn)
    k = tl.arange(0, vn)
    width: tl.constexpr = 2 * wide if power == 2 else wide
    s_ptr += b * n_pad * width
    t_ptr += b * m_pad * width
    v_ptr += b * m_pad * vn
    high, low = _points(s_ptr, rows, wide, power)
    f = tl.load(f_ptr + b * n_pad + rows)
    acc = tl.zeros((bn, vn), tl.float32)
    for start in range(0, m_pad, bm):
        cols = start + tl.arange(0, bm)
        z = _logits(high, low, tl.zeros((bn, bm), tl.float32), s_ptr, t_ptr, rows, cols, wide, power)
        plan = tl.exp2(tl.minimum(f[:, None] + z + tl.load(g_ptr + b * m_pad + cols)[None, :], 60.0))
        if cost_power == 1:
            plan *= -z
        if cost_power == -1:
            plan = tl.where(z < 0, plan / tl.where(z < 0, -z, 1.0), 0.0)
        # Along j first: what tensor cores want of float32, and what is copied in wide pieces.
        acc += tl.dot(plan, tl.load(v_ptr + k[None, :] * m_pad + cols[:, None]), input_precision="tf32x3")
    tl.store(
        out_ptr + (b * n + rows[:, None]) * columns + k[None, :], acc, (rows[:, None] < n) & (k[None, :] < columns)
    )


class TritonEngine(Streamed):
    """float32 problems on CUDA; what has no kernel (the rank-2K pass of the unrolled gradient) streams as elsewhere."""

    def __init__(self, problem: Problem, tile_bytes: int) -> None:
        if problem.s.dtype != torch.float32:
            raise InputError(
                "the Triton engine works in float32: pass float32 clouds that do not need more (wide, or a tiny eps), "
                "or engine='streamed'"
            )
        super().__init__(problem, tile_bytes)
        device = problem.s.device
        # What runs at the same time, in another thread or stream, must not share memory.
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (*problem.shape, problem.s.shape[2], problem.p, device, stream, threading.get_ident())
        self._space = _workspace(*key)

    @property
    def space(self) -> "Workspace":
        if self._space.holds() is not self.problem:  # another solve of this size was here
            self._space.load(self.problem)
        return self._space

    def rows(self, g: Tensor) -> Tensor:
        return self.space.log_sums(0, g)

    def cols(self, f: Tensor) -> Tensor:
        return self.space.log_sums(1, f)

    def sweep(self, f: Tensor | None, g: Tensor, omega: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.sweeps(f, g, omega, 1)[1:]

    def sweeps(self, f: Tensor | None, g: Tensor, omega: Tensor, count: int) -> Sweep:
        return self.space.sweeps(f, g, omega, count)

    def _apply(self, problem: Problem, f: Tensor, g: Tensor, v: Tensor) -> Tensor:
        return self.space.moments(int(problem is self.swapped), f, g, v[:, None], 0)[..., 0]

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
        values = torch.cat([torch.ones_like(problem.q_t)[:, None], problem.q_t[:, None], problem.t.mT], 1)
        return self.space.moments(int(swap), f, g, values, power)


class Workspace:
    """Memory of one size of problem, padded to whole blocks, and the CUDA graphs of its iterations.

    Everything is a pair: of x and of y. Graphs want fixed addresses, hence copies in and out, of vectors alone.
    """

    def __init__(self, batch: int, n: int, m: int, dim: int, p: int, device: torch.device) -> None:
        self.batch, self.sizes, self.p, self.dim = batch, (n, m), p, dim
        pad = max(BLOCK_N, BLOCK_M)  # powers of two: both divide it
        self.padded = tuple(triton.cdiv(size, pad) * pad for size in self.sizes)
        self.wide, dtype, halves = (dim, torch.float32, 1) if p == 1 else (_wide(dim), torch.float16, 2)
        self.points = [torch.zeros(batch, size, halves * self.wide, dtype=dtype, device=device) for size in self.padded]
        self.target = [torch.zeros(batch, size, device=device) for size in self.padded]
        self.damp, self.omega = (torch.ones(batch, device=device) for _ in range(2))
        # Potentials, those before the last half-step and log-sums in one piece: one copy takes them all out, and what a
        # half-step reads ahead of the last potential is still memory.
        self.state = torch.full((3 * batch * sum(self.padded),), NOTHING, device=device)
        self.potential, self.before, self.lse = self._parts(self.state)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.holds: Callable[[], Problem | None] = lambda: None
        self.known: tuple[Tensor | None, ...] = (None, None)  # the potentials last handed out, still in place

    def _parts(self, state: Tensor) -> list[list[Tensor]]:
        sizes = [self.batch * size for size in self.padded]
        parts = iter(state.split(3 * sizes))
        return [[next(parts).view(self.batch, size) for size in self.padded] for _ in range(3)]

    def load(self, problem: Problem) -> None:
        self.damp.copy_(problem.damp)
        for i, side in enumerate((problem, problem.swap())):
            _prepare[(triton.cdiv(self.padded[i], BLOCK_N), self.batch)](
                side.s.contiguous(), side.log_a.contiguous(), side.q_s.contiguous(), self.damp, self.points[i],
                self.target[i], self.lse[i], self.sizes[i], self.padded[i],
                dim=self.dim, wide=_wide(self.dim), power=self.p, bn=BLOCK_N,
            )  # fmt: skip
        self.holds, self.known = weakref.ref(problem), (None, None)

    def _own(self, pair: list[Tensor], side: int) -> Tensor:
        return pair[side][:, : self.sizes[side]]

    def log_sums(self, side: int, other: Tensor) -> Tensor:
        """``L`` of one side from the potential of the other."""
        self.known = (None, None)
        self._own(self.potential, 1 - side).copy_(other)
        self._step(side)
        return self._own(self.lse, side).clone()

    def sweeps(self, f: Tensor | None, g: Tensor, omega: Tensor, count: int) -> Sweep:
        mine, others = (self._own(self.potential, side) for side in (0, 1))
        if f is None:
            mine.zero_()
        elif f is not self.known[0]:
            mine.copy_(f)
        if g is not self.known[1]:
            others.copy_(g)
        left = count
        if f is None:  # nothing to relax towards
            self.omega.fill_(1)
            self._step(0)
        self.omega.copy_(omega)
        if f is None:
            self._step(1)
            left -= 1
        for together in (TOGETHER, 1):
            while left >= together:
                self._run(together)
                left -= together
        potential, before, lse = (
            [self._own(pair, side) for side in (0, 1)] for pair in self._parts(self.state.clone())
        )
        self.known = tuple(potential)
        return Sweep(None if f is None and count == 1 else before[0], *potential, *lse)

    def _run(self, iterations: int) -> None:
        if iterations in self.graphs:
            self.graphs[iterations].replay()
            return

        def work() -> None:
            for _ in range(iterations):
                self._step(0)
                self._step(1)

        work()  # also compiles and loads the kernel, which no graph may do
        if self.damp.is_cuda:
            self.graphs[iterations] = _capture(work)

    def _step(self, side: int) -> None:
        """One half-step in place."""
        other, n, padded = 1 - side, self.sizes[side], self.padded[side]
        _half_step[(triton.cdiv(n, BLOCK_N), self.batch)](
            self.points[side], self.points[other], self.potential[other], self.potential[side], self.target[side],
            self.damp, self.omega, self.before[side], self.lse[side], n, padded, self.padded[other],
            wide=self.wide, power=self.p, bn=BLOCK_N, bm=BLOCK_M, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip

    def moments(self, side: int, f: Tensor, g: Tensor, values: Tensor, cost_power: int) -> Tensor:
        """``sum_j P_ij c_ij^cost_power values_kj``: values ``[B,V,M]`` -> ``[B,N,V]``; a cost power needs p = 1."""
        self.known = (None, None)
        other, columns = 1 - side, values.shape[1]
        self._own(self.potential, side).copy_(f)
        self._own(self.potential, other).copy_(g)
        padded = values.new_zeros(self.batch, _wide(columns), self.padded[other])
        padded[:, :columns, : self.sizes[other]] = values
        out = values.new_empty(self.batch, self.sizes[side], columns)
        _moments[(triton.cdiv(self.sizes[side], BLOCK_N), self.batch)](
            self.points[side], self.points[other], self.potential[side], self.potential[other], padded, out,
            self.sizes[side], self.padded[side], self.padded[other], columns,
            wide=self.wide, power=self.p, bn=BLOCK_N, bm=BLOCK_M, vn=_wide(columns), cost_power=cost_power,
        )  # fmt: skip
        return out


@lru_cache(maxsize=WORKSPACES)
def _workspace(
    batch: int, n: int, m: int, dim: int, p: int, device: torch.device, stream: int, thread: int
) -> Workspace:
    return Workspace(batch, n, m, dim, p, device)


def _capture(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Without the pause and the emptied cache of ``torch.cuda.graph``: nothing is allocated here, others may train."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def _wide(columns: int) -> int:
    return max(16, triton.next_power_of_2(columns))  # the smallest tensor-core tile
