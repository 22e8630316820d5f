"""Entropic optimal transport between batched point clouds: solve, differentiate, compare.

    OT_eps(x, y) = min_P <P, C> + eps KL(P | a b^T)  [+ rho KL(P 1 | a) + rho KL(P^T 1 | b)],    C_ij = |x_i - y_j|^p

with ``P 1 = a, P^T 1 = b`` unless ``reach`` relaxes them (``rho = reach^p``: the ``reg_m`` of POT's unbalanced solvers,
whose ``reg`` is eps; geomloss counts the same rho but halves squared costs). The plan has the form
``P_ij = a_i b_j exp((phi_i + psi_j - C_ij) / eps)`` (Cuturi 2013; Peyre and Cuturi 2019, "Computational OT").

Clouds may have any float type. Sums and potentials are float32 (float64 for float64 input), whatever autocast says;
problems whose logits would lose their digits in float32 are solved in float64 and returned in float32.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from vdot.errors import ConfigError, InputError
from vdot.transport.clouds import clouds_to_latents, latents_to_clouds
from vdot.transport.config import OTConfig
from vdot.transport.engines import Cached, Streamed
from vdot.transport.iterate import Trace, iterate, iterate_symmetric, start
from vdot.transport.problem import LN2, PROBLEM_TENSORS, Problem, build, mean_cost, working_clouds
from vdot.transport.result import Transport, join, measure, to_gradient
from vdot.transport.unrolled import unrolled_moments

RELAXATION = 1.6
TILE_BYTES = 2**20  # on a CPU; half to twice as much is as fast, 8 times as much a third slower
EngineFactory = Callable[[Problem], Streamed]
ENGINES = ("auto", "cached", "streamed", "compiled", "triton")
Weights = tuple[Tensor | None, Tensor | None]


@torch.no_grad()
def sinkhorn(
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor = 0.1,
    eps_mode: str = "absolute",
    p: int = 2,
    max_iters: int = 500,
    tol: float = 1e-3,
    weights: Weights | None = None,
    reach: float | None = None,
    warm_start: "Transport | tuple[Tensor, Tensor] | None" = None,
    relaxation: float | None = None,
    eps_scaling: float | None = None,
    engine: str = "auto",
    memory_mb: int | None = None,
) -> Transport:
    """Solve ``B`` transports between ``x [B,N,D]`` and ``y [B,M,D]`` in memory linear in N + M (plus ``memory_mb``).

    A cloud to itself (``y is x``, the same weights, tol above 0) is solved by the symmetric iteration, in a few steps.

    Args:
        eps: entropic strength, a number or ``[B]``; with ``eps_mode="relative"`` a fraction of the mean cost.
        tol: stop at this marginal error. 0 runs exactly ``max_iters`` plain iterations, as the release does with 60.
        weights: masses ``(a [B,N], b [B,M])``, either may be None for uniform. Normalised unless ``reach`` is given.
        warm_start: an earlier Transport or its ``(f, g)``; worth most of the iterations when clouds move little.
        relaxation: first over-relaxation, then adapted; 1 is plain. None: 1.6, or 1 where ``tol`` is 0.
        eps_scaling: with q in (0, 1), one iteration at each of mean cost, q mean cost, ... down to eps first.
        engine: "auto" takes Triton on CUDA where installed, else keeps kernels that fit ``memory_mb``, else streams.

    Raises:
        InputError: shapes, weights or numbers that cannot be used. ConfigError: an unknown mode or engine.
        MissingDependencyError: ``engine="triton"`` without Triton.
    """
    options = _Options(
        eps, eps_mode, p, max_iters, tol, weights, reach, warm_start, relaxation, eps_scaling, engine, memory_mb
    )
    return _solve(x, y, options)[0]


def ot_gradient(
    x: Tensor,
    y: Tensor,
    eps: float | Tensor = 0.1,
    max_iters: int = 60,
    tol: float = 0.0,
    gradient: str = "unrolled",
    *,
    debias: bool = False,
    **options: object,
) -> Tensor:
    """Gradient ``[B,N,D]`` of the transport of x to y with respect to x; further options as :func:`sinkhorn`.

    The defaults are the release's; ``gradient="closed", tol=1e-2`` (as in :class:`OTConfig`) is the better target.

    ``"closed"``: at the optimum, OT_eps(x) = max_phi,psi D(phi, psi; x) and the potentials are stationary, hence
    ``dOT/dx_i = sum_j P_ij dC_ij/dx_i``: for p = 2 this is ``2 (a_i x_i - (P y)_i)``, the way to the barycentre (the
    envelope theorem; Feydy et al. 2019). Equally the gradient of <P, C> with the plan held fixed.

    ``"unrolled"``: the derivative of <P, C> through every iteration (:mod:`vdot.transport.unrolled`), what the release
    computes by autograd with ``eps=0.1, max_iters=60, tol=0``. Iterations are then plain.

    ``debias`` subtracts the self-transport, ``sum_j P^xx_ij dC(x_i, x_j)/dx_i``: the gradient of the Sinkhorn
    divergence, zero where x and y are the same cloud.
    """
    return _gradient(x, y, gradient, debias, eps=eps, max_iters=max_iters, tol=tol, **options)[0]


@torch.no_grad()
def _gradient(x: Tensor, y: Tensor, kind: str, debias: bool, **options: object) -> tuple[Tensor, Transport]:
    if kind == "closed":
        transport = sinkhorn(x, y, **options)  # type: ignore[arg-type]
        grad = transport.gradient
        if debias:
            grad = grad - sinkhorn(x, x, **_self_options(options, 0)).gradient  # type: ignore[arg-type]
        return grad, transport
    if kind != "unrolled":
        raise ConfigError(f"gradient must be 'closed' or 'unrolled', got {kind!r}")
    if debias:
        raise ConfigError("debias has no unrolled gradient: the release subtracts constants; use gradient='closed'")
    if options.get("relaxation") not in (None, 1):
        raise ConfigError("the unrolled gradient differentiates plain iterations: leave relaxation out, or set it to 1")
    plain = _Options(**{**options, "relaxation": 1.0})  # type: ignore[arg-type]
    transport, unrolled = _solve(x, y, plain, unrolled=True)
    assert unrolled is not None
    return unrolled, transport


def sinkhorn_divergence(x: Tensor, y: Tensor, *, weights: Weights | None = None, **options: object) -> Tensor:
    """``S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2`` per problem, ``[B]`` (Genevay 2018; Feydy et al. 2019).

    Zero for equal clouds, and positive otherwise, up to the solver's tolerance; options as :func:`sinkhorn`.
    Differentiable in x and y by the closed-form gradients. With ``reach`` the masses must be equal.
    """
    return _Divergence.apply(x, y, weights or (None, None), options)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, weights: Weights, options: dict) -> Tensor:  # type: ignore[no-untyped-def]
        a, b = weights
        xy = sinkhorn(x, y, weights=(a, b), **options)
        xx = sinkhorn(x, x, weights=(a, a), **_self_options(options, 0))
        yy = sinkhorn(y, y, weights=(b, b), **_self_options(options, 1))
        grads = [xy.gradient - xx.gradient, None]
        if ctx.needs_input_grad[1]:
            flipped = {**options, "warm_start": (xy.g, xy.f)}
            grads[1] = sinkhorn(y, x, weights=(b, a), **flipped).gradient - yy.gradient
        ctx.save_for_backward(*grads)
        return xy.objective - (xx.objective + yy.objective) / 2

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        return *((None if g is None else grad[:, None, None] * g) for g in ctx.saved_tensors), None, None


def _self_options(options: dict, side: int) -> dict:
    """Options of a self-transport: of what belongs to the pair, only the own side's weights carry over."""
    weights = options.get("weights")
    own = None if weights is None else weights[side]
    rest = {k: v for k, v in options.items() if k not in ("weights", "warm_start")}
    return rest if own is None else {**rest, "weights": (own, own)}


@torch.no_grad()
def transport_latents(fake: Tensor, real: Tensor, config: OTConfig) -> tuple[Tensor, Transport]:
    """The distillation term on latents ``[B,T,C,H,W]``: gradient with respect to ``fake`` (same shape), Transport.

    One problem per frame (``B*T`` of them) or per clip, as ``config.clouds`` says. The gradient is that of the sum over
    problems, not normalised.
    """
    if fake.shape != real.shape:
        raise InputError(f"fake and real latents must have one shape, got {tuple(fake.shape)} and {tuple(real.shape)}")
    options = {k.name: getattr(config, k.name) for k in fields(config)}
    pooling, clouds, kind, debias = (options.pop(k) for k in ("pooling", "clouds", "gradient", "debias"))
    x, y = (latents_to_clouds(z, pooling=pooling, clouds=clouds) for z in (fake, real))
    grad, transport = _gradient(x, y, kind, debias, **options)
    return clouds_to_latents(grad, fake.shape, pooling=pooling), transport


@dataclass(frozen=True)
class _Options:
    """The keyword arguments of :func:`sinkhorn`, checked."""

    eps: float | Tensor = 0.1
    eps_mode: str = "absolute"
    p: int = 2
    max_iters: int = 500
    tol: float = 1e-3
    weights: Weights | None = None
    reach: float | None = None
    warm_start: "Transport | tuple[Tensor, Tensor] | None" = None
    relaxation: float | None = None
    eps_scaling: float | None = None
    engine: str = "auto"
    memory_mb: int | None = None

    def __post_init__(self) -> None:
        if self.max_iters < 1 or not self.tol >= 0:
            raise InputError(f"max_iters must be at least 1 and tol at least 0, got {self.max_iters} and {self.tol}")
        if self.relaxation is not None and not 1 <= self.relaxation < 2:
            raise InputError(f"relaxation must lie in [1, 2), got {self.relaxation}")
        if self.eps_scaling is not None and not 0 < self.eps_scaling < 1:
            raise InputError(f"eps_scaling must lie in (0, 1), got {self.eps_scaling}")
        if self.eps_mode not in ("absolute", "relative"):
            raise ConfigError(f"eps_mode must be 'absolute' or 'relative', got {self.eps_mode!r}")
        if self.engine not in ENGINES:
            raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, got {self.engine!r}")

    @property
    def omega(self) -> float:
        return self.relaxation or (RELAXATION if self.tol > 0 else 1.0)


def _solve(x: Tensor, y: Tensor, options: _Options, unrolled: bool = False) -> tuple[Transport, Tensor | None]:
    """Cut the batch into groups whose kernels fit the memory budget, solve each, join."""
    a, b = options.weights or (None, None)
    itself = x is y and a is b and options.tol > 0 and not unrolled
    with _full_precision(x.device.type):
        problem, dtype = _pose(x, y, options)
        psi = _psi(options.warm_start, problem)
        engine, size = choose_engine(problem, options.engine, options.memory_mb)
        solved = []
        for i in range(0, problem.shape[0], size):
            part, group = slice(i, i + size), problem
            if size < problem.shape[0]:
                group = replace(problem, **{k: getattr(problem, k)[part] for k in PROBLEM_TENSORS})
            start_psi = None if psi is None else psi[part]
            if options.eps_scaling is not None:
                start_psi = _scaled_start(group, start_psi, options.eps_scaling, engine)
            solved.append(_solve_group(engine(group), start_psi, options, unrolled, itself))
    transports, grads = zip(*solved, strict=True)
    return join(transports, problem, dtype), torch.cat(grads).to(dtype) if unrolled else None


def _pose(x: Tensor, y: Tensor, options: _Options) -> tuple[Problem, torch.dtype]:
    """The problem in working precision, and the precision of its results."""
    x, y, centre = working_clouds(x, y)
    if isinstance(options.eps, Tensor):
        eps = options.eps.to(x).expand(x.shape[0])
    else:
        eps = x.new_full(x.shape[:1], options.eps)  # made on the device: copying a number there waits for it
    if options.eps_mode == "relative":
        eps = eps * mean_cost(x, y, options.p).clamp_min(1e-6)
    rest = (options.p, options.weights or (None, None), options.reach)
    problem = build(x, y, centre, eps, *rest)
    if problem.too_wide_for_float32():  # a tiny eps or far outliers: rare, and worth the slower arithmetic
        return build(x.double(), y.double(), centre.double(), eps.double(), *rest), x.dtype
    return problem, x.dtype


def _solve_group(
    engine: Streamed, psi: Tensor | None, options: _Options, unrolled: bool, itself: bool
) -> tuple[Transport, Tensor | None]:
    """Iterate, measure, and iterate on while the measured error exceeds ``tol`` and the budget lasts."""
    trace: Trace | None = [] if unrolled else None
    state, target = start(engine.problem, psi), options.tol
    while True:
        if itself:
            state = iterate_symmetric(engine, state, options.max_iters, target)
        else:
            state = iterate(engine, state, options.max_iters, target, options.omega, trace)
        transport = measure(engine, state, options.tol)
        if state.iterations >= options.max_iters or bool(transport.converged.all()):
            break
        target /= 2  # the estimate while relaxing was a little too kind
    grad = to_gradient(engine.problem, unrolled_moments(engine, trace)) if trace is not None else None
    return transport, grad


def _psi(warm_start: "Transport | tuple[Tensor, Tensor] | None", problem: Problem) -> Tensor | None:
    if warm_start is None:
        return None
    psi = warm_start.g if isinstance(warm_start, Transport) else warm_start[1]
    if psi.shape != problem.log_b.shape or not bool(torch.isfinite(psi).all()):
        raise InputError(f"warm_start needs finite potentials g {tuple(problem.log_b.shape)}, got {tuple(psi.shape)}")
    return psi.detach().to(problem.s)


def _scaled_start(problem: Problem, psi: Tensor | None, factor: float, engine: EngineFactory) -> Tensor | None:
    """Psi after one iteration at each eps of the schedule (Kosowsky and Yuille 1994), largest first."""
    bits = mean_cost(problem.s, problem.t, problem.p) / problem.p  # bits are |s - t|^2 / 2, or |s - t|
    level = LN2 * bits * problem.unit
    while bool((level > problem.unit).any()):
        stage = problem.at(torch.maximum(level, problem.unit))
        state = iterate(engine(stage), start(stage, psi), 1, 0.0, 1.0)
        psi = (state.g + stage.q_t - stage.log_b) * stage.unit[:, None]
        level = level * factor
    return psi


def choose_engine(problem: Problem, name: str, memory_mb: int | None) -> tuple[EngineFactory, int]:
    """What builds the engine of a group, and how many problems of the batch make a group."""
    batch, n, m = problem.shape
    on_cpu, compiling = problem.s.device.type == "cpu", torch.compiler.is_compiling()
    budget = (memory_mb or (16 if on_cpu else 256)) * 2**20
    matrix = n * m * problem.s.element_size()
    if name == "auto":
        fits = problem.s.dtype == torch.float32 and problem.s.shape[2] <= 64  # wider blocks outgrow shared memory
        if problem.s.is_cuda and fits and _has_triton() and not compiling:
            name = "triton"
        else:
            name = "cached" if matrix <= budget and not compiling else "streamed"
    # A CPU wants its blocks in the cache, an accelerator wants them large.
    tile_bytes = min(budget, TILE_BYTES) if on_cpu else budget
    if name == "triton":
        from vdot.transport.kernels import TritonEngine  # optional dependency

        return partial(TritonEngine, tile_bytes=tile_bytes), batch
    size = max(1, min(batch, budget // matrix))
    if name == "cached":
        return partial(Cached, tile_bytes=tile_bytes), size
    return partial(Streamed, tile_bytes=tile_bytes, compiled=name == "compiled"), size


def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None


@contextlib.contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Autocast would round the logits, hence the potentials, to bf16: their gradient is then noise."""
    with torch.autocast(device_type, enabled=False):
        yield
