"""The release's own numbers: 60 unrolled iterations at eps 0.1 on pooled latents (float64 gradients)."""

import pytest
import torch

from vdot.transport import OTConfig, latents_to_clouds, ot_gradient, sinkhorn, transport_latents

RELEASE = OTConfig(eps=0.1, max_iters=60, tol=0, gradient="unrolled")


@pytest.mark.parametrize("engine", ["cached", "streamed"])
@pytest.mark.parametrize("case", ["independent", "close", "smooth"])
def test_cost_and_gradient_of_the_release(golden, case, engine):
    """float32 in: cost 1e-5 relative, per-frame normalised gradient 2e-5 absolute (entries are about 0.016)."""
    data = golden("train/ot")
    config = OTConfig(**{**vars(RELEASE), "engine": engine})
    grad, transport = transport_latents(data[f"ot.{case}.fake"], data[f"ot.{case}.real"], config)
    normalised = grad / (grad.flatten(2).norm(dim=2)[..., None, None, None] + 1e-8)
    assert transport.cost.sum().item() == pytest.approx(data[f"ot.{case}.debias_false.cost_f64"].item(), rel=1e-5)
    torch.testing.assert_close(normalised, data[f"ot.{case}.grad_normalised"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", ["independent", "close", "smooth"])
def test_float64_reproduces_the_float64_golden(golden, case):
    """In float64 nothing is left but the golden's own rounding to float32 (6e-8 relative) and its log(w + 1e-12)."""
    data = golden("train/ot")
    fake, real = data[f"ot.{case}.fake"].double(), data[f"ot.{case}.real"].double()
    grad, transport = transport_latents(fake, real, RELEASE)
    assert transport.cost.sum().item() == pytest.approx(data[f"ot.{case}.debias_false.cost_f64"].item(), rel=1e-9)
    torch.testing.assert_close(grad.float(), data[f"ot.{case}.grad"], rtol=2e-7, atol=1e-9)


def test_contract_call_on_clouds(golden):
    data = golden("train/ot")
    x, y = (latents_to_clouds(data[f"ot.smooth.{side}"]) for side in ("fake", "real"))
    grad = ot_gradient(x, y, eps=0.1, max_iters=60, tol=0, gradient="unrolled")
    assert grad.shape == x.shape and grad.dtype == torch.float32
    expected, _ = transport_latents(data["ot.smooth.fake"], data["ot.smooth.real"], RELEASE)
    torch.testing.assert_close(
        grad.mT.unflatten(2, (6, 10)), 4 * expected[0, :, :, ::2, ::2]
    )  # pooling spreads a gradient over 4


@pytest.mark.parametrize("case", [0, 1, 2])
def test_small_problems(golden, golden_json, case):
    """N != M, other eps, iteration counts and powers, float64: cost 1e-9 relative, gradient 1e-8 absolute."""
    data, facts = golden("train/ot"), golden_json("train/ot")["sinkhorn_small"][str(case)]
    x, y = data[f"sinkhorn.{case}.x"][None], data[f"sinkhorn.{case}.y"][None]
    options = {"eps": facts["eps"], "p": facts["p"], "max_iters": facts["iters"], "tol": 0}
    assert sinkhorn(x, y, **options).cost.item() == pytest.approx(facts["cost"], rel=1e-9)
    grad = ot_gradient(x, y, gradient="unrolled", **options)
    torch.testing.assert_close(grad[0], data[f"sinkhorn.{case}.grad_x"], rtol=0, atol=1e-8)
