"""Degenerate and hostile input: never NaN or Inf, and a solve that did not converge says so."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transport_oracle import cost_matrix

from vdot.errors import ConfigError, InputError
from vdot.transport import Transport, ot_gradient, sinkhorn, sinkhorn_divergence

# What a result says, read or not by whoever solves.
NUMBERS = (
    "marginal_error",
    *(k for k, v in vars(Transport).items() if isinstance(v, property) and not k.startswith("_")),
)


def assert_sane(out: Transport) -> None:
    for name in NUMBERS:
        assert bool(torch.isfinite(getattr(out, name)).all()), name
    assert bool((out.cost >= 0).all()) and bool((out.marginal_error >= 0).all())
    assert out.converged.tolist() == (out.marginal_error <= 1e-3).tolist()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outlier(x: Tensor, distance: float) -> Tensor:
    x = x.clone()
    x[:, 0] += distance
    return x


CASES = {
    "duplicates": (noise(1, 8, 4).repeat(1, 5, 1), noise(1, 8, 4, seed=1).repeat(1, 4, 1)),
    "all equal": (torch.ones(1, 20, 3), torch.ones(1, 30, 3)),
    "equal clouds": (noise(1, 40, 16), noise(1, 40, 16)),
    "one point each": (noise(1, 1, 4), noise(1, 1, 4, seed=1)),
    "one point to many": (noise(1, 1, 4), noise(1, 50, 4, seed=1)),
    "many to one": (noise(1, 50, 4), noise(1, 1, 4, seed=1)),
    "one coordinate": (noise(1, 30, 1), noise(1, 20, 1, seed=1)),
    "outlier of x": (outlier(noise(1, 40, 8), 1e4), noise(1, 40, 8, seed=1)),
    "outlier of y": (noise(1, 40, 8), outlier(noise(1, 40, 8, seed=1), 1e4)),
    "outliers": (outlier(noise(1, 40, 8), 1e5), outlier(noise(1, 40, 8, seed=1), -1e5)),
    "far apart": (noise(1, 30, 4), noise(1, 30, 4, seed=1) + 500),
    "wide": (noise(1, 64, 4) * 1000, noise(1, 64, 4, seed=1) * 1000),
    "N far from M": (noise(1, 3, 4), noise(1, 200, 4, seed=1)),
}


@pytest.mark.parametrize("engine", ["cached", "streamed"])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_no_nan_anywhere(case, p, engine):
    x, y = CASES[case]
    for eps in (1e-4, 0.1, 1e4):
        for reach in (None, 1.0):
            out = sinkhorn(x, y, eps=eps, p=p, reach=reach, max_iters=40, engine=engine)
            assert_sane(out)
    for kind in ("closed", "unrolled"):
        assert bool(torch.isfinite(ot_gradient(x, y, eps=0.1, p=p, gradient=kind, tol=0, engine=engine)).all())
    assert bool(torch.isfinite(sinkhorn_divergence(x, y, p=p, max_iters=40, engine=engine)).all())


@pytest.mark.parametrize("distance", [1e2, 1e4])
def test_an_outlier_keeps_its_mass(distance):
    """A point far away is matched like any other: plan rows sum to 1/N, cost right to 5e-4."""
    x, y = outlier(noise(1, 40, 8), distance), noise(1, 40, 8, seed=1)
    out = sinkhorn(x, y, eps=5.0, tol=1e-5, max_iters=5000)
    assert bool(out.converged)
    torch.testing.assert_close(out.plan().sum(2), torch.full((1, 40), 1 / 40), rtol=0.05, atol=0)
    exact = sinkhorn(x.double(), y.double(), eps=5.0, tol=1e-7, max_iters=5000)
    assert out.cost.item() == pytest.approx(exact.cost.item(), rel=5e-4)


def test_one_point_to_many_is_the_mean():
    x, y = CASES["one point to many"]
    out = sinkhorn(x, y, eps=0.1)
    assert out.cost.item() == pytest.approx(cost_matrix(x, y).mean().item(), rel=1e-5)
    torch.testing.assert_close(out.barycentre[0, 0], y.mean(1)[0], rtol=1e-4, atol=1e-5)


def test_huge_eps_is_the_product_plan():
    """eps -> infinity: P = a b^T, cost the mean cost, every point matched with all."""
    x, y = noise(1, 40, 8), noise(1, 30, 8, seed=1)
    out = sinkhorn(x, y, eps=1e6)
    assert out.cost.item() == pytest.approx(cost_matrix(x, y).mean().item(), rel=1e-4)
    assert out.effective_matches.item() == pytest.approx(30, rel=1e-3) and bool(out.converged)


def test_tiny_eps_without_enough_iterations_says_so():
    x, y = noise(1, 60, 8), noise(1, 60, 8, seed=1)
    out = sinkhorn(x, y, eps=1e-3, max_iters=20)
    assert_sane(out)
    assert not out.converged.any() and out.iterations.item() == 20


def test_zero_weights_carry_no_mass():
    x, y = noise(1, 20, 4), noise(1, 20, 4, seed=1)
    a = torch.ones(1, 20)
    a[:, 10:] = 0
    out = sinkhorn(x, y, eps=0.5, weights=(a, None))
    half = sinkhorn(x[:, :10], y, eps=0.5)
    assert_sane(out)
    assert out.cost.item() == pytest.approx(half.cost.item(), rel=2e-3)
    assert out.gradient[:, 10:].abs().max().item() < 1e-20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_float32_potentials(dtype):
    """bf16 clouds are solved as their exact float32 values: same numbers, float32 results."""
    x, y = noise(1, 100, 16).to(dtype), noise(1, 100, 16, seed=1).to(dtype)
    out, exact = sinkhorn(x, y, eps=0.5), sinkhorn(x.float(), y.float(), eps=0.5)
    assert out.gradient.dtype == out.f.dtype == torch.float32
    assert torch.equal(out.gradient, exact.gradient)


def test_autocast_does_not_reach_inside():
    x, y = noise(1, 100, 16), noise(1, 100, 16, seed=1)
    expected = sinkhorn(x, y, eps=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        out = sinkhorn(x, y, eps=0.1)
        found = {name: getattr(out, name) for name in NUMBERS} | {"plan": out.plan()}
    for name, value in found.items():
        assert torch.equal(value, expected.plan() if name == "plan" else getattr(expected, name)), name


def test_results_carry_no_autograd_graph():
    x = noise(1, 10, 4).requires_grad_()
    assert not ot_gradient(x, noise(1, 10, 4, seed=1)).requires_grad
    assert not ot_gradient(x, noise(1, 10, 4, seed=1), gradient="unrolled", tol=0).requires_grad


@given(
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    d=st.integers(1, 5),
    seed=st.integers(0, 1000),
    eps=st.floats(1e-5, 1e5),
    scale=st.floats(1e-4, 1e4),
    p=st.sampled_from([1, 2]),
    reach=st.sampled_from([None, 0.1, 10.0]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_problem_gives_finite_numbers(n, m, d, seed, eps, scale, p, reach):
    x, y = scale * noise(1, n, d, seed=seed), scale * noise(1, m, d, seed=seed + 1)
    for engine in ("cached", "streamed"):
        assert_sane(sinkhorn(x, y, eps=eps, p=p, reach=reach, max_iters=30, engine=engine))


BAD = [
    ({"x": torch.zeros(3, 4)}, InputError, "clouds must be"),
    ({"x": torch.zeros(2, 3, 4)}, InputError, "clouds must be"),
    ({"x": torch.zeros(1, 0, 4)}, InputError, "empty"),
    ({"x": torch.full((1, 3, 4), float("nan"))}, InputError, "NaN"),
    ({"eps": 0.0}, InputError, "eps must be positive"),
    ({"eps": -1.0}, InputError, "eps must be positive"),
    ({"x": torch.full((1, 3, 4), 1e25)}, InputError, "overflows"),
    ({"p": 3}, InputError, "p = 1 and p = 2"),
    ({"reach": -1.0}, InputError, "reach"),
    ({"max_iters": 0}, InputError, "max_iters"),
    ({"tol": -1.0}, InputError, "tol"),
    ({"relaxation": 2.5}, InputError, "relaxation"),
    ({"eps_scaling": 1.5}, InputError, "eps_scaling"),
    ({"engine": "keops"}, ConfigError, "streamed"),
    ({"eps_mode": "auto"}, ConfigError, "relative"),
    ({"weights": (torch.ones(1, 5), None)}, InputError, "shape"),
    ({"weights": (-torch.ones(1, 3), None)}, InputError, "negative"),
    ({"warm_start": (torch.zeros(1, 3), torch.zeros(1, 9))}, InputError, "warm_start"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_errors_name_what_is_wrong(change, error, words):
    options = {"x": torch.zeros(1, 3, 4), "y": torch.ones(1, 3, 4), **change}
    with pytest.raises(error, match=words):
        sinkhorn(options.pop("x"), options.pop("y"), **options)
