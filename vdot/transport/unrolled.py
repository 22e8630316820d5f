"""What autograd through the Sinkhorn iterations gives, without autograd.

Let ``S = -C / eps`` (in nats) and ``f_k = log a - d LSE_j(S + g_{k-1})``, ``g_k = log b - d LSE_i(S + f_k)`` for
k = 1..K, and ``V = sum_ij P_ij C_ij`` with ``P = exp(f_K + S + g_K)``. The adjoints of the potentials start from
``fbar = (P o C) 1``, ``gbar = (P o C)^T 1`` and run backwards through the softmaxes ``Q^k_ij = exp(S + f_k - LSE_i)``,
``R^k_ij = exp(S + g_{k-1} - LSE_j)``, which are recomputed from the stored potentials:

    fbar <- fbar - d Q^k gbar,      gbar <- -d (R^k)^T fbar,      fbar <- 0,

while S collects ``Sbar = P o C - sum_k (d Q^k diag(gbar_k) + d diag(fbar_k) R^k)``. Q^k and R^k are P with rows and
columns rescaled, so Sbar = P o (C - A B^T) with A, B of rank 2K, and one pass over the plan suffices:

    dV/dC = P - Sbar / eps,         dV/dx_i = sum_j (dV/dC)_ij grad C(x_i - y_j).

Memory is 2 K (N + M) numbers for potentials and at most 128 (N + M) for A and B, instead of the 4 K N M of autograd.
Where early potentials lie too far from the last for one common P, the product is summed in groups, each around its own.
"""

import torch
from torch import Tensor

from vdot.transport.engines import NEAR, Streamed
from vdot.transport.iterate import Trace
from vdot.transport.problem import LN2

MAX_RANK = 128  # products are summed at latest here: bounds A and B for any number of iterations


class _Terms:
    """``sum_r P(f_r, g_r) o (u_r v_r^T)`` gathered around base potentials and turned into moments in groups."""

    def __init__(self, engine: Streamed, f: Tensor, g: Tensor, affine: tuple[float, float]) -> None:
        self.engine, self.base, self.affine = engine, (f, g), affine
        self.us: list[Tensor] = []
        self.vs: list[Tensor] = []
        self.moments: Tensor | None = None

    def add(self, f: Tensor, g: Tensor, u: Tensor, v: Tensor) -> None:
        df, dg = f - self.base[0], g - self.base[1]
        if len(self.us) >= MAX_RANK or not bool(torch.maximum(df.abs().amax(), dg.abs().amax()) <= NEAR):
            self.flush()
            self.base = (f, g)
            df, dg = torch.zeros_like(f), torch.zeros_like(g)
        self.us.append(df.exp2() * u)
        self.vs.append(dg.exp2() * v)

    def flush(self) -> Tensor:
        low_rank = (torch.stack(self.us, -1), torch.stack(self.vs, -1)) if self.us else None
        power = -1 if self.engine.problem.p == 1 else 0
        part = self.engine.weigh(*self.base, affine=self.affine, low_rank=low_rank, power=power)
        self.moments = part if self.moments is None else self.moments + part
        self.us, self.vs, self.affine = [], [], (0.0, 0.0)
        return self.moments


def unrolled_moments(engine: Streamed, trace: Trace) -> Tensor:
    """``sum_j W_ij [1, q'_j, t_j] -> [B,N,2+D]`` with W = dV/dC (p = 2) or dV/dC over distance (p = 1)."""
    problem = engine.problem
    damp = problem.damp[:, None]
    f, g = trace[-1][0], problem.log_b - damp * trace[-1][3] - (1 - damp) * problem.q_t
    # In units of eps: costs c ln2 = C / eps, so dV/dC = P (1 - c ln2) + sum of terms.
    f_bar = LN2 * engine.weigh(f, g, power=1)[..., 0]
    g_bar = LN2 * engine.weigh(f, g, power=1, swap=True)[..., 0]
    terms = _Terms(engine, f, g, (1.0, -LN2))
    a_inv, b_inv = (-problem.log_a).exp2(), (-problem.log_b).exp2()
    for f_k, g_before, row_lse, col_lse in reversed(trace):
        g_k, f_now = problem.log_b - col_lse, problem.log_a - row_lse  # without damping: softmaxes up to the weights
        v = damp * g_bar * b_inv
        terms.add(f_k, g_k, torch.ones_like(f_k), v)
        f_bar = f_bar - engine.apply_rows(f_k, g_k, v)
        u = damp * f_bar * a_inv
        terms.add(f_now, g_before, u, torch.ones_like(v))
        g_bar = -engine.apply_cols(f_now, g_before, u)
        f_bar = torch.zeros_like(f_bar)
    return terms.flush()
