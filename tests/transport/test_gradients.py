"""Gradients against finite differences and against autograd through the iterations."""

import pytest
import torch
from test_sinkhorn import clouds, weights
from torch import Tensor
from transport_oracle import unrolled_gradient

from vdot.errors import ConfigError
from vdot.transport import ot_gradient, sinkhorn, sinkhorn_divergence

SOLVED = {"tol": 1e-11, "max_iters": 20000}


def difference(value, x: Tensor, direction: Tensor, step: float = 1e-4) -> float:
    """Central difference of the summed value along a direction: error of order step^2."""
    return ((value(x + step * direction) - value(x - step * direction)).sum() / (2 * step)).item()


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reach", [None, 1.0])
def test_closed_form_is_the_derivative_of_the_objective(p, reach):
    """Envelope theorem, converged float64: agrees with central differences to 1e-6 relative."""
    x, y = clouds(20, 17, 3)
    ab = weights(x, y)
    options = {"eps": 0.3, "p": p, "reach": reach, "weights": ab, **SOLVED}
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = difference(lambda z: sinkhorn(z, y, **options).objective, x, direction)
    assert (ot_gradient(x, y, gradient="closed", **options) * direction).sum().item() == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("engine", ["cached", "streamed"])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("rho", [None, 0.8])
@pytest.mark.parametrize("iters", [1, 4, 25])
def test_unrolled_equals_autograd(engine, p, rho, iters):
    """Float64, with weights and N != M: the adjoint recursion is autograd's, to 1e-9 of the largest entry."""
    x, y = clouds(23, 19, 3)
    a, b = weights(x, y)
    cost, expected, _ = unrolled_gradient(x, y, eps=0.2, iters=iters, p=p, a=a, b=b, rho=rho)
    options = {"eps": 0.2, "p": p, "max_iters": iters, "tol": 0, "weights": (a, b), "engine": engine}
    options["reach"] = None if rho is None else rho ** (1 / p)
    grad = ot_gradient(x, y, gradient="unrolled", **options)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-9 * expected.abs().max().item())
    torch.testing.assert_close(sinkhorn(x, y, **options).cost, cost, rtol=1e-10, atol=0)


def test_unrolled_in_groups_of_potentials():
    """Early potentials hundreds of bits from the last (eps small), and more terms than one group holds."""
    x, y = clouds(30, 30, 8, batch=1)
    _, expected, _ = unrolled_gradient(x, y, eps=0.02, iters=90)
    for engine in ("cached", "streamed"):
        grad = ot_gradient(x, y, eps=0.02, max_iters=90, tol=0, gradient="unrolled", engine=engine)
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-8 * expected.abs().max().item())


def test_unrolled_float32_keeps_autograd_accuracy():
    """On 16-channel clouds at the release's eps: cosine 0.99999 with the float64 oracle, relative error 1e-3."""
    x, y = clouds(200, 200, 16, batch=1)
    x, y = 0.5 * x, 0.5 * y
    _, expected, _ = unrolled_gradient(x, y)
    grad = ot_gradient(x.float(), y.float(), max_iters=60, tol=0, gradient="unrolled").double()
    assert torch.cosine_similarity(grad.flatten(), expected.flatten(), 0).item() > 0.99999
    assert ((grad - expected).norm() / expected.norm()).item() < 1e-3


def test_unrolled_and_closed_form_agree_for_matched_clouds():
    """Where y is x slightly moved the plan is an assignment and both gradients coincide; for independent ones not."""
    x, _ = clouds(150, 150, 16, batch=1)
    moved = x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    options = {"eps": 0.1, "max_iters": 60, "tol": 0}
    closed, unrolled = (ot_gradient(x, moved, gradient=kind, **options) for kind in ("closed", "unrolled"))
    assert torch.cosine_similarity(closed.flatten(), unrolled.flatten(), 0).item() > 0.9999


def test_unrolled_refuses_what_it_does_not_mean():
    x, y = clouds(5, 5, 2)
    with pytest.raises(ConfigError, match="debias"):
        ot_gradient(x, y, gradient="unrolled", debias=True)
    with pytest.raises(ConfigError, match="plain"):
        ot_gradient(x, y, gradient="unrolled", relaxation=1.5)
    with pytest.raises(ConfigError, match="closed"):
        ot_gradient(x, y, gradient="implicit")


# --- the divergence


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reach", [None, 1.0])
def test_divergence_is_a_divergence(p, reach):
    """S(x, x) = 0, S(x, y) = S(y, x) > 0, unmoved by a common translation, all to 1e-8 in float64."""
    x, y = clouds(30, 25, 3)
    options = {"eps": 0.5, "p": p, "reach": reach, **SOLVED}
    value = sinkhorn_divergence(x, y, **options)
    assert bool((value > 1e-3).all())
    torch.testing.assert_close(sinkhorn_divergence(x, x, **options), torch.zeros(2).double(), rtol=0, atol=1e-8)
    torch.testing.assert_close(sinkhorn_divergence(y, x, **options), value, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(sinkhorn_divergence(x + 3, y + 3, **options), value, rtol=1e-7, atol=1e-9)


def test_divergence_between_translates():
    """S(x, x + t) = |t|^2 for squared costs at any eps: the entropic bias cancels exactly."""
    x, _ = clouds(40, 40, 3)
    shift = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    value = sinkhorn_divergence(x, x + shift, eps=2.0, **SOLVED)
    torch.testing.assert_close(value, shift.square().sum().expand(2), rtol=1e-6, atol=0)


def test_divergence_is_differentiable_in_both_clouds():
    """Backward equals central differences, 1e-5, weights included; its x part is the debiased ot_gradient."""
    x, y = clouds(16, 13, 3)
    a, b = weights(x, y)
    options = {"eps": 0.5, **SOLVED}
    xs, ys = x.clone().requires_grad_(), y.clone().requires_grad_()
    sinkhorn_divergence(xs, ys, weights=(a, b), **options).sum().backward()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = difference(lambda z: sinkhorn_divergence(z, y, weights=(a, b), **options), x, direction)
    assert (xs.grad * direction).sum().item() == pytest.approx(expected, rel=1e-5)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = difference(lambda z: sinkhorn_divergence(x, z, weights=(a, b), **options), y, direction)
    assert (ys.grad * direction).sum().item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(
        ot_gradient(x, y, gradient="closed", debias=True, weights=(a, b), **options), xs.grad, rtol=1e-7, atol=1e-9
    )


def test_float32_divergence_of_equal_clouds_is_small():
    x = clouds(100, 100, 16, batch=1)[0].float()
    value = sinkhorn_divergence(x, x.clone(), eps=1.0, tol=1e-4)
    assert (
        abs(value.item()) < 1e-4
        and ot_gradient(x, x, tol=1e-2, gradient="closed", debias=True).abs().max().item() < 1e-6
    )
