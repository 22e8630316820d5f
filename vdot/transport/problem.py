"""One optimal-transport problem in the units in which it is solved: bits.

With cost ``C_ij = |x_i - y_j|^p`` and strength ``eps``, the entropic plan is ``P_ij = exp((phi_i + psi_j - C_ij) / eps)
a_i b_j``. Everything inside this package works with base-2 exponents (``exp2`` is three times faster than ``exp`` on a
CPU and is what a GPU has) and with *reduced* potentials, in which the squared norms are folded away:

    P_ij = 2^(f_i + Z_ij + g_j),                      Z_ij = s_i . t_j            for p = 2
                                                      Z_ij = -|s_i - t_j|         for p = 1

where ``s, t`` are the centred clouds times a scale that absorbs eps and ln 2. For p = 2, ``C_ij / (eps ln 2) =
q_i + q'_j - Z_ij`` with ``q = |s|^2 / 2``, so a point far away costs no precision: its large norm never meets a float32
sum. Potentials convert by ``phi = eps ln2 (f + q - log2 a)``.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from vdot.errors import InputError

LN2 = math.log(2.0)
# A weight of zero is carried as 2^-100: its point keeps a finite potential and no mass that float32 could show.
MIN_WEIGHT = 2.0**-100


@dataclass(frozen=True)
class Problem:
    """Scaled clouds ``s [B,N,D]``, ``t [B,M,D]``; log2-weights and norms ``[B,N]``, ``[B,M]``; numbers ``[B]``."""

    s: Tensor
    t: Tensor
    log_a: Tensor
    log_b: Tensor
    q_s: Tensor
    q_t: Tensor
    unit: Tensor  # eps ln 2, what one bit costs
    scale: Tensor  # coordinates times this are s and t
    damp: Tensor  # rho / (rho + eps): 1 when the marginals are hard
    centre: Tensor  # [B,1,D], what was subtracted from both clouds
    p: int
    hard: bool  # no mass may be lost: damp is 1
    width: float  # largest norm (p = 1: coordinate) in bits; 0 inside torch.compile, where nothing looks at numbers

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.s.shape[0], self.s.shape[1], self.t.shape[1]

    def logits(self, rows: slice, g: Tensor) -> Tensor:
        """``Z_ij + g_j`` for a block of rows and every j: ``[B,R,M]``."""
        s = self.s[:, rows]
        if self.p == 2:
            return torch.baddbmm(g[:, None], s, self.t.mT)
        return g[:, None] - _distance(s, self.t)

    def bits(self, rows: slice) -> Tensor:
        """``C_ij / (eps ln 2)`` for a block of rows: ``[B,R,M]``, never negative."""
        if self.p == 1:
            return _distance(self.s[:, rows], self.t)
        return (self.q_s[:, rows, None] - self.logits(rows, -self.q_t)).clamp_min_(0)

    def relaxed(
        self, old: Tensor | None, lse: Tensor, omega: Tensor | None = None, rows: slice = slice(None)
    ) -> Tensor:
        """Half-step for a block of f: ``f + omega (log2 a - d lse - (1 - d) q - f)``, with omega ``[B]`` (None: 1)."""
        damp = self.damp[:, None]
        new = self.log_a[:, rows] - damp * lse - (1 - damp) * self.q_s[:, rows]
        return new if old is None or omega is None else old + omega[:, None] * (new - old)

    def at(self, unit: Tensor) -> "Problem":
        """The same clouds at another strength, ``unit [B]`` = eps ln 2."""
        ratio = self.unit / unit
        factor = ratio.sqrt() if self.p == 2 else ratio
        s, t = self.s * factor[:, None, None], self.t * factor[:, None, None]
        q_s, q_t = self.q_s * ratio[:, None], self.q_t * ratio[:, None]
        damp = 1 / (1 + (1 - self.damp) / self.damp / ratio)  # rho stays
        return replace(self, s=s, t=t, q_s=q_s, q_t=q_t, unit=unit, scale=self.scale * factor, damp=damp)

    def swap(self) -> "Problem":
        """The same transport seen from y."""
        return replace(
            self, s=self.t, t=self.s, log_a=self.log_b, log_b=self.log_a, q_s=self.q_t, q_t=self.q_s
        )  # unit, scale and damping belong to both sides

    def too_wide_for_float32(self) -> bool:
        """Whether logits are so many bits that float32 rounds them by more than 2^-8, 0.3% of a plan entry."""
        return self.s.dtype != torch.float64 and self.s.device.type != "mps" and self.width > 2**15


PROBLEM_TENSORS = tuple(k.name for k in fields(Problem) if k.type is Tensor)


def _distance(s: Tensor, t: Tensor) -> Tensor:
    # Differences, not the matmul expansion: near-duplicates would lose half of their digits under the root.
    return torch.cdist(s, t, compute_mode="donot_use_mm_for_euclid_dist")


def working_clouds(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check ``x [B,N,D]``, ``y [B,M,D]``; make them float32 (float64 stays), centred; also what was subtracted.

    Raises:
        InputError: wrong rank, empty clouds, sizes that do not match.
    """
    if (
        x.ndim != 3
        or y.ndim != 3
        or x.shape[0] != y.shape[0]
        or x.shape[2] != y.shape[2]
        or not (x.numel() and y.numel())
    ):
        raise InputError(
            f"clouds must be x [B,N,D] and y [B,M,D] with the same B and D and no empty side, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    x, y = x.detach().to(dtype), y.detach().to(dtype)
    # Both costs ignore a common translation, and float32 does not: without this, clouds around 1000 lose all digits.
    centre = 0.5 * (x.mean(1, keepdim=True) + y.mean(1, keepdim=True))
    return x - centre, y - centre, centre


def mean_cost(x: Tensor, y: Tensor, p: int) -> Tensor:
    """Average of ``|x_i - y_j|^p`` over all pairs, ``[B]``: from moments for p = 2, in row blocks for p = 1."""
    if p == 2:
        x_mean, y_mean = x.mean(1), y.mean(1)
        return x.square().sum(2).mean(1) + y.square().sum(2).mean(1) - 2 * (x_mean * y_mean).sum(1)
    return (
        torch.stack([_distance(block, y).mean((1, 2)) * block.shape[1] for block in x.split(256, 1)]).sum(0)
        / x.shape[1]
    )


def _log_weights(weights: Tensor | None, like: Tensor, normalise: bool) -> Tensor:
    if weights is None:
        return torch.full(like.shape[:2], -math.log2(like.shape[1]), dtype=like.dtype, device=like.device)
    if tuple(weights.shape) != tuple(like.shape[:2]):
        raise InputError(f"weights must have shape {tuple(like.shape[:2])}, one per point, got {tuple(weights.shape)}")
    w = weights.detach().to(like.dtype)
    if not bool((w >= 0).all() & torch.isfinite(w).all() & (w.sum(1) > 0).all()):
        raise InputError("weights must be finite, not negative and not all zero")
    return ((w / w.sum(1, keepdim=True)) if normalise else w).clamp_min(MIN_WEIGHT).log2()


def build(
    x: Tensor,
    y: Tensor,
    centre: Tensor,
    eps: Tensor,
    p: int,
    weights: tuple[Tensor | None, Tensor | None],
    reach: float | None,
) -> Problem:
    """Scale centred clouds ``x [B,N,D]``, ``y [B,M,D]`` by ``eps [B]``. Balanced weights are normalised to mass one.

    Raises:
        InputError: clouds that are not finite, a power other than 1 or 2, strengths that are not positive, or clouds
            too wide for their eps.
    """
    if p not in (1, 2):
        raise InputError(f"the cost |x - y|^p is implemented for p = 1 and p = 2, got {p}")
    if reach is not None and not reach > 0:
        raise InputError(f"reach must be positive, or None for hard marginals, got {reach}")
    eps = eps.to(x)
    unit = eps * LN2
    scale = (2 / unit).sqrt() if p == 2 else 1 / unit
    s, t = x * scale[:, None, None], y * scale[:, None, None]
    q_s, q_t = (
        (s.square().sum(2) / 2, t.square().sum(2) / 2)
        if p == 2
        else (s.new_zeros(s.shape[:2]), t.new_zeros(t.shape[:2]))
    )
    width = 0.0
    if not torch.compiler.is_compiling():  # one look for all: each waits for the device
        extents = (q_s, q_t) if p == 2 else (s.abs(), t.abs())
        weakest, *widths = torch.stack([eps.amin(), *(z.amax() for z in extents)]).tolist()
        width = max(widths)
        if not all(map(math.isfinite, widths)) and not bool(torch.isfinite(x).all() & torch.isfinite(y).all()):
            raise InputError("the clouds hold NaN or Inf: fix the latents before transporting them")
        if not (weakest > 0 and math.isfinite(sum(widths))):
            raise InputError(
                "eps must be positive and not so small that cost / eps overflows: raise eps or shrink the clouds"
            )
    damp = torch.ones_like(eps) if reach is None else reach**p / (reach**p + eps)
    log_a, log_b = (_log_weights(w, c, reach is None) for w, c in zip(weights, (x, y), strict=True))
    return Problem(s, t, log_a, log_b, q_s, q_t, unit, scale, damp, centre, p, reach is None, width)
