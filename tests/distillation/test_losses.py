"""The objectives against numbers of the original implementation, and in closed form."""

import math

import pytest
import torch

from vdot.distillation import losses
from vdot.flow import add_noise, shift_sigma, t_to_sigma, velocity_to_x0
from vdot.transport import OTConfig, transport_latents

GUIDANCE = 3.0


def estimates(tensors: dict, noise: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """sigma [B], F's x0 and the guided teacher's, ``[B, 16, F, H, W]``."""
    flow = {k: tensors[f"flow_{k}"].transpose(1, 2) for k in ("fake_cond", "real_cond", "real_uncond")}
    sigma = t_to_sigma(timestep[:, 0])
    noisy = add_noise(tensors["x"].transpose(1, 2), noise.transpose(1, 2), sigma)
    real = flow["real_uncond"] + GUIDANCE * (flow["real_cond"] - flow["real_uncond"])
    return sigma, velocity_to_x0(noisy, flow["fake_cond"], sigma), velocity_to_x0(noisy, real, sigma)


def release_ot(fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The release's OT term: sixty plain iterations, differentiated through all of them."""
    config = OTConfig(gradient="unrolled", tol=0.0, max_iters=60)
    return transport_latents(fake.transpose(1, 2), real.transpose(1, 2), config)[0].transpose(1, 2)


def test_dmd_gradient_and_loss(golden):
    tensors = golden("train/losses")
    sigma, fake, real = estimates(tensors, tensors["dmd.noise"], tensors["dmd.timestep"])
    grad = losses.dmd_gradient(fake, real, sigma)
    torch.testing.assert_close(grad.transpose(1, 2), tensors["dmd.grad"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((grad.square().mean() / 2)[None], tensors["dmd.loss"].float(), atol=0, rtol=1e-5)


def test_noise_level_of_a_draw_is_warped_then_clamped(golden):
    tensors = golden("train/losses")
    raw = tensors["dmd.raw_randint"][0].float()
    sigma = shift_sigma(t_to_sigma(raw), 5.0).clamp(0.02, 0.98)
    torch.testing.assert_close(sigma, t_to_sigma(tensors["dmd.timestep"][:, 0]), atol=1e-6, rtol=0)


def test_release_weights_of_an_even_step(golden):
    """0.2 DMD + 0.8 OT with the release's reductions, two draws."""
    tensors = golden("train/losses")
    sigma, fake, real = estimates(tensors, tensors["even_step.dmd_noise"], tensors["even_step.dmd_timestep"])
    dmd = losses.dmd_gradient(fake, real, sigma)
    _, fake, real = estimates(tensors, tensors["even_step.ot_noise"], tensors["even_step.ot_timestep"])
    ot = release_ot(fake, real)
    total = losses.combine({"dmd": dmd, "ot": ot}, {"dmd": 0.2, "ot": 0.8}, "release", 0.1)
    want = tensors["even_step.dloss_dx"].transpose(1, 2)
    # single numbers of a frame are 1e-3 to 1e-2; float32 Sinkhorn is good to 2e-5 of them after normalising
    torch.testing.assert_close(total, want, atol=5e-6, rtol=1e-3)


def test_ot_gradient_of_the_release(golden):
    tensors = golden("train/losses")
    _, fake, real = estimates(tensors, tensors["ot.noise"], tensors["ot.timestep"])
    grad = 0.1 * losses.unit_frames(release_ot(fake, real))
    torch.testing.assert_close(grad.transpose(1, 2), tensors["ot.dloss_dx"], atol=5e-6, rtol=1e-3)


def test_denoising_loss_and_its_gradient(golden):
    tensors = golden("train/losses")
    flow = tensors["flow_fake_cond"].clone().requires_grad_()
    loss = losses.denoising_loss(flow, tensors["critic.noise"], tensors["x"])
    loss.backward()
    torch.testing.assert_close(loss.detach()[None], tensors["critic.denoising_loss"], atol=0, rtol=1e-6)
    torch.testing.assert_close(flow.grad, tensors["critic.dloss_dflow"], atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize("relativistic", [True, False])
@pytest.mark.parametrize("r", ["0", "0.7"])
def test_adversarial_losses(relativistic, r, golden):
    tensors = golden("train/losses")
    case = f"gan.rel_{str(relativistic).lower()}.r_{r}"
    for loss, name in ((losses.discriminator_gan_loss, "D"), (losses.generator_gan_loss, "G")):
        logits = tensors[f"{case}.logits_fake_then_real"].clone().requires_grad_()
        value = 0.1 * loss(*logits[:, 0], relativistic)
        value.backward()
        torch.testing.assert_close(value.detach()[None], tensors[f"{case}.{name}_loss"], atol=1e-6, rtol=1e-6)
        # G is told nothing through the real half: its gradient there is left out by us
        rows = slice(0, 1) if name == "G" else slice(None)
        torch.testing.assert_close(logits.grad[rows], tensors[f"{case}.d{name}_dlogits"][rows], atol=1e-6, rtol=1e-6)


def test_smoothness_penalty(golden):
    tensors = golden("train/losses")
    fake, real = tensors["gan.rel_true.r_0.7.logits_fake_then_real"]
    for name, logit, weight, key in (("real", real, 0.7, "r1"), ("fake", fake, 0.35, "r2")):
        penalty = weight * losses.smoothness_penalty(tensors[f"gan.perturbed_{name}_logit"][0], logit)
        torch.testing.assert_close(penalty[None], tensors[f"gan.rel_true.r_0.7.{key}"], atol=1e-6, rtol=1e-5)


def test_balanced_weights_mean_what_they_say():
    """With unit-size terms the parts of the sum stand in the ratio of their weights, whatever their scales were."""
    g = torch.Generator().manual_seed(0)
    a, b = 1e-5 * torch.randn(2, 16, 3, 4, 4, generator=g), 1e3 * torch.randn(2, 16, 3, 4, 4, generator=g)
    total = losses.combine({"dmd": a, "ot": b}, {"dmd": 0.2, "ot": 0.8, "gan": 9.0}, "rms", 0.1)
    only = losses.combine({"dmd": a}, {"dmd": 0.2}, "rms", 0.1)
    for part, weight in ((only, 0.2), (total - only, 0.8)):
        rms = (part * a.numel()).flatten(1).square().mean(1).sqrt()
        torch.testing.assert_close(rms, torch.full((2,), weight), atol=1e-5, rtol=0)


def test_mean_absolute_normaliser_makes_dmd_free_of_scale():
    g = torch.Generator().manual_seed(1)
    fake, real, made = (torch.randn(2, 16, 2, 4, 4, generator=g) for _ in range(3))
    sigma = torch.tensor([0.3, 0.9])
    one, ten = (
        losses.dmd_gradient(k * fake, k * real, sigma, normalizer="mean_abs", made_x0=k * made) for k in (1.0, 10.0)
    )
    torch.testing.assert_close(one, ten, atol=1e-5, rtol=1e-5)
    expected = (fake[0] - real[0]) / (made[0] - real[0]).abs().mean()
    torch.testing.assert_close(one[0], expected, atol=1e-6, rtol=1e-6)


def test_relativistic_loss_of_equal_logits_is_log_two():
    zero = torch.zeros(3)
    assert losses.generator_gan_loss(zero, zero).item() == pytest.approx(math.log(2))
    assert losses.discriminator_gan_loss(zero, zero).item() == pytest.approx(math.log(2))
