"""Solutions against POT in float64, exact transport, closed-form Gaussians, and each other."""

import math

import numpy as np
import ot
import pytest
import torch
from torch import Tensor
from transport_oracle import cost_matrix, unrolled_cost

from vdot.transport import sinkhorn

SOLVED = {"tol": 1e-9, "max_iters": 20000}


def clouds(n: int = 40, m: int = 33, d: int = 4, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(batch, n, d, generator=g), torch.randn(batch, m, d, generator=g)
    return x.double(), (0.7 * y + 0.4).double()


def weights(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    a, b = (torch.rand(z.shape[:2], generator=g).double() + 0.05 for z in (x, y))
    return a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("engine", ["cached", "streamed"])
def test_plan_equals_pot(p, engine):
    """Same plan as POT's sinkhorn_log, with weights and N != M: 1e-8 absolute on entries of about 1e-3."""
    x, y = clouds()
    a, b = weights(x, y)
    out = sinkhorn(x, y, eps=0.3, p=p, weights=(a, b), engine=engine, **SOLVED)
    for i in range(2):
        cost = cost_matrix(x, y, p)[i].numpy()
        plan = ot.bregman.sinkhorn_log(a[i].numpy(), b[i].numpy(), cost, 0.3, numItermax=20000, stopThr=1e-12)
        np.testing.assert_allclose(out.plan()[i].numpy(), plan, atol=1e-8)
        assert out.cost[i].item() == pytest.approx((plan * cost).sum(), rel=1e-7)
        entropy = -(plan * np.log(plan)).sum()
        assert out.entropy[i].item() == pytest.approx(entropy, rel=1e-7)
        rows = math.exp(entropy + (a[i] * a[i].log()).sum().item())  # H(P) - H(a): mean entropy of a row
        assert out.effective_matches[i].item() == pytest.approx(rows, rel=1e-6)
        np.testing.assert_allclose(out.barycentre[i].numpy(), plan @ y[i].numpy() / plan.sum(1)[:, None], atol=1e-6)
    assert bool(out.converged.all())


@pytest.mark.parametrize("reach", [0.5, 1.5, 10.0])
@pytest.mark.parametrize("p", [1, 2])
def test_unbalanced_equals_pot(reach, p):
    """reach^p is POT's reg_m (KL on the marginals, KL(P | a b^T) as regulariser); masses need not agree."""
    x, y = clouds(batch=1)
    a, b = weights(x, y)
    b = 1.3 * b
    out = sinkhorn(x, y, eps=0.3, p=p, reach=reach, weights=(a, b), **SOLVED)
    cost = cost_matrix(x, y, p)[0].numpy()
    plan = ot.unbalanced.sinkhorn_unbalanced(
        a[0].numpy(), b[0].numpy(), cost, 0.3, reach**p, method="sinkhorn_stabilized",
        reg_type="kl", numItermax=20000, stopThr=1e-13,
    )  # fmt: skip
    np.testing.assert_allclose(out.plan()[0].numpy(), plan, atol=1e-7)
    assert out.mass.item() == pytest.approx(plan.sum(), rel=1e-6)
    assert bool(out.converged.all())


@pytest.mark.parametrize("reach", [None, 1.0])
def test_objective_is_the_primal_value(reach):
    """At convergence the dual value returned equals <P, C> + eps KL(P | a b^T) + the marginal penalties: 1e-7."""
    x, y = clouds(batch=1)
    a, b = weights(x, y)
    out = sinkhorn(x, y, eps=0.3, reach=reach, weights=(a, b), **SOLVED)
    plan, product = out.plan()[0], a[0, :, None] * b[0]

    def kl(r: Tensor, s: Tensor) -> Tensor:
        return (r * (r / s).log() - r + s).sum()

    primal = (plan * cost_matrix(x, y)[0]).sum() + 0.3 * kl(plan, product)
    if reach is not None:
        primal = primal + reach**2 * (kl(plan.sum(1), a[0]) + kl(plan.sum(0), b[0]))
    assert out.objective.item() == pytest.approx(primal.item(), rel=1e-7)
    coarse = sinkhorn(x, y, eps=0.3, reach=reach, weights=(a, b), tol=0, max_iters=3)
    assert coarse.objective.item() <= out.objective.item()  # a dual value is a lower bound


def test_exact_transport_as_eps_vanishes():
    """<P, C> tends to the linear program's value from above, by less than eps log N (marginals to 1e-4)."""
    x, y = clouds(30, 30, 3, batch=1, seed=3)
    exact = ot.emd2(np.full(30, 1 / 30), np.full(30, 1 / 30), cost_matrix(x, y)[0].numpy())
    gaps = []
    for eps in (1.0, 0.1, 0.02):
        out = sinkhorn(x, y, eps=eps, tol=1e-4, max_iters=5000, eps_scaling=0.5)
        assert bool(out.converged)
        gaps.append(out.cost.item() - exact)
        assert -1e-4 < gaps[-1] < eps * math.log(30)
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 5e-3 * exact


def gaussian_value(m: float, s1: float, s2: float, eps: float) -> tuple[float, float]:
    """OT_eps(N(0, s1^2), N(m, s2^2)) and the correlation rho of its plan, which is Gaussian (Janati et al. 2020).

    Minimise m^2 + s1^2 + s2^2 - 2 s1 s2 rho - eps/2 log(1 - rho^2): rho = (sqrt(1 + 4 k^2) - 1) / 2k with
    k = 2 s1 s2 / eps.
    """
    k = 2 * s1 * s2 / eps
    rho = (math.sqrt(1 + 4 * k * k) - 1) / (2 * k)
    return m * m + s1 * s1 + s2 * s2 - 2 * s1 * s2 * rho - eps / 2 * math.log(1 - rho * rho), rho


@pytest.mark.parametrize("eps", [0.2, 1.0, 10.0])
def test_gaussians_in_closed_form(eps):
    """Densities on a grid (quadrature error below 1e-6): value, cost and the affine barycentric map."""
    grid = torch.linspace(-7, 7, 401, dtype=torch.float64)
    s1, s2, m = 1.0, 0.6, 0.5
    a, b = (-0.5 * (grid / s1) ** 2).exp(), (-0.5 * ((grid - m) / s2) ** 2).exp()
    out = sinkhorn(
        grid[None, :, None], grid[None, :, None], eps=eps, weights=(a[None], b[None]), tol=1e-10, max_iters=3000
    )
    value, rho = gaussian_value(m, s1, s2, eps)
    assert out.objective.item() == pytest.approx(value, abs=1e-6)
    assert out.cost.item() == pytest.approx(m * m + s1 * s1 + s2 * s2 - 2 * s1 * s2 * rho, abs=1e-6)
    middle = grid.abs() < 3
    torch.testing.assert_close(out.barycentre[0, middle, 0], m + rho * s2 / s1 * grid[middle], atol=1e-5, rtol=0)


def test_gaussians_in_the_plane():
    """Independent axes add up: the value in two dimensions is the sum of two one-dimensional ones, 1e-5."""
    line = torch.linspace(-5, 5, 34, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    a = (-0.5 * grid.square().sum(1)).exp()
    b = (-0.5 * ((grid - torch.tensor([0.5, -0.2])) / 0.8).square().sum(1)).exp()
    out = sinkhorn(grid[None], grid[None], eps=1.0, weights=(a[None], b[None]), tol=1e-8, max_iters=2000)
    value = gaussian_value(0.5, 1, 0.8, 1.0)[0] + gaussian_value(0.2, 1, 0.8, 1.0)[0]
    assert out.objective.item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reach", [None, 1.0])
def test_engines_agree(p, reach):
    """Streamed and cached float32: both right (float64 solved further), and the same to rounding."""
    x, y = (z.float() for z in clouds(150, 130, 16))
    options = {"eps": 0.5, "p": p, "reach": reach, "tol": 2e-5, "max_iters": 1000}
    reference = sinkhorn(x.double(), y.double(), engine="streamed", **{**options, "tol": 1e-8, "max_iters": 5000})
    for engine in ("cached", "streamed"):
        out = sinkhorn(x, y, engine=engine, **options)
        assert bool(out.converged.all())
        torch.testing.assert_close(out.cost.double(), reference.cost, rtol=2e-3, atol=0)
        torch.testing.assert_close(out.objective.double(), reference.objective, rtol=1e-4, atol=0)
    tight = {**options, "tol": 0, "max_iters": 50}
    cached, streamed = (sinkhorn(x, y, engine=e, **tight) for e in ("cached", "streamed"))
    torch.testing.assert_close(cached.gradient, streamed.gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(cached.f, streamed.f, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_blocks_agree():
    """The blocks through Inductor (half a minute of C++ compilation): float32 rounding apart, 1e-5."""
    x, y = (z.float() for z in clouds(150, 130, 16))
    options = {"eps": 0.5, "tol": 0, "max_iters": 20}
    compiled, eager = (sinkhorn(x, y, engine=e, **options) for e in ("compiled", "streamed"))
    torch.testing.assert_close(compiled.cost, eager.cost, rtol=1e-5, atol=0)


def test_fixed_budget_is_plain_sinkhorn():
    """tol = 0 spends exactly max_iters unaccelerated iterations and never claims convergence."""
    x, y = clouds()
    out = sinkhorn(x, y, eps=0.2, tol=0, max_iters=7)
    cost, plan = unrolled_cost(x, y, eps=0.2, iters=7)
    torch.testing.assert_close(out.cost, cost, rtol=1e-10, atol=0)
    torch.testing.assert_close(out.plan(), plan, rtol=1e-8, atol=1e-14)
    assert out.iterations.tolist() == [7, 7] and not out.converged.any()
    expected = (plan.sum(2) - 1 / 40).abs().sum(1) + (plan.sum(1) - 1 / 33).abs().sum(1)
    torch.testing.assert_close(out.marginal_error, expected, rtol=1e-6, atol=1e-9)


def test_converged_means_the_true_plan_says_so():
    """The flag follows the marginals of the explicit plan, not the solver's running estimate."""
    x, y = (z.float() for z in clouds(100, 100, 16, batch=3))
    for budget in (3, 10, 30, 100, 1000):
        out = sinkhorn(x, y, eps=0.1, tol=1e-3, max_iters=budget)
        plan = out.plan().double()
        error = (plan.sum(2) - 0.01).abs().sum(1) + (plan.sum(1) - 0.01).abs().sum(1)
        torch.testing.assert_close(out.marginal_error.double(), error, rtol=1e-2, atol=1e-5)
        assert out.converged.tolist() == (out.marginal_error <= 1e-3).tolist()
        assert int(out.iterations.max()) <= budget
    assert bool(out.converged.all())


def test_acceleration_saves_iterations_and_changes_nothing_else():
    x, y = clouds(200, 200, 16, batch=1)
    options = {"eps": 0.5, "tol": 1e-5, "max_iters": 5000}
    plain, fast = sinkhorn(x, y, relaxation=1.0, **options), sinkhorn(x, y, **options)
    assert bool(plain.converged) and bool(fast.converged)
    assert fast.iterations.item() < 0.5 * plain.iterations.item()
    assert fast.objective.item() == pytest.approx(plain.objective.item(), rel=1e-5)


def test_warm_start_takes_few_iterations():
    """A cloud that moved by 1% needs a fraction of the cold start's iterations; its own solution needs almost none."""
    x, y = clouds(200, 180, 16, batch=2)
    options = {"eps": 0.3, "tol": 1e-4, "max_iters": 5000}
    cold = sinkhorn(x, y, **options)
    again = sinkhorn(x, y, warm_start=cold, **options)
    moved = sinkhorn(x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), y,
                     warm_start=(cold.f, cold.g), **options)  # fmt: skip
    assert again.iterations.max() <= 3
    assert moved.iterations.max() < 0.6 * cold.iterations.min()
    assert bool(moved.converged.all())


def test_relative_eps_is_a_fraction_of_the_mean_cost():
    x, y = clouds()
    for p in (1, 2):
        mean = cost_matrix(x, y, p).mean((1, 2))
        relative = sinkhorn(x, y, eps=0.05, eps_mode="relative", p=p, **SOLVED)
        absolute = sinkhorn(x, y, eps=0.05 * mean, p=p, **SOLVED)
        torch.testing.assert_close(relative.cost, absolute.cost, rtol=1e-9, atol=0)


def test_translation_and_permutation():
    """Cost ignores a common shift (float32 clouds around 1000 lose nothing), and follows a permutation of x."""
    x, y = (z.float() for z in clouds(60, 50, 16))
    options = {"eps": 0.3, "tol": 1e-4, "max_iters": 2000}
    base = sinkhorn(x, y, **options)
    shifted = sinkhorn(x + 1000, y + 1000, **options)  # the inputs themselves are rounded to 6e-5 there
    torch.testing.assert_close(shifted.cost, base.cost, rtol=1e-3, atol=0)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    permuted = sinkhorn(x[:, order], y, **options)
    torch.testing.assert_close(permuted.gradient, base.gradient[:, order], rtol=1e-3, atol=1e-6)


def test_problems_of_a_batch_do_not_see_each_other():
    x, y = clouds(batch=3)
    together = sinkhorn(
        x, y, eps=torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64), tol=0, max_iters=20, engine="cached"
    )
    for i, eps in enumerate((0.1, 0.5, 2.0)):
        alone = sinkhorn(x[i : i + 1], y[i : i + 1], eps=eps, tol=0, max_iters=20, engine="streamed")
        torch.testing.assert_close(together.f[i], alone.f[0], rtol=1e-9, atol=1e-9)
