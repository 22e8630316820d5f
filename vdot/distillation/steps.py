"""Who is sampled, scored and differentiated in one step.

Each function handles one micro batch and leaves gradients behind; it knows no optimizer, rank or file. Reference
frames are leading frames of every latent here: noised, scored and judged like the others, dropped only in pixels.
"""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vdot.data.batch import Batch
from vdot.distillation import losses
from vdot.distillation.config import DistillConfig, GanConfig, NoiseConfig
from vdot.distillation.draws import Draws
from vdot.distillation.networks import Cast
from vdot.distillation.rollout import Rollout, predict, rollout
from vdot.flow import add_noise, sigma_to_t, velocity_to_x0
from vdot.sampling import FewStepSchedule
from vdot.transport import transport_latents

Log = dict[str, Tensor]  # scalars, on the device: reading them would make the host wait
Section = Callable[[str], AbstractContextManager]  # times a part of a step


def terms_of(step: int, config: DistillConfig) -> frozenset[str]:
    """Terms of the generator's objective when it is updated in training step ``step``: by turns, or all."""
    used = frozenset(name for name, weight in config.weights().items() if weight)
    scores = used - {"gan"}
    if not (config.alternate and scores and "gan" in used):
        return used
    return used & {"gan"} if (step // config.generator_every) % 2 else scores


def judges(step: int, config: DistillConfig) -> bool:
    """Whether the critic's step ``step`` trains the discriminator too: every second one where terms take turns."""
    return bool(config.gan.critic_weight) and (step % 2 == 1 or not config.alternate)


def generator_step(
    cast: Cast,
    batch: Batch,
    draws: Draws,
    schedule: FewStepSchedule,
    config: DistillConfig,
    terms: Collection[str],
    section: Section,
    share: float = 1.0,
) -> Log:
    """G makes a video; F, R and the discriminator say where its latents should move; G's weights get the gradient.

    ``share`` of the whole update that this micro batch is.
    """
    twice = config.one_graph and "gan" in terms
    with section("rollout"), torch.set_grad_enabled(not twice):
        made = _make(cast, batch, draws, schedule)
    log: Log = {"exit_step": torch.tensor(float(draws.choice("exit", schedule.steps)))}
    gradients: dict[str, Tensor] = {}
    x = made.x0.detach()
    if "dmd" in terms or "ot" in terms:
        with section("scores"):
            scores = _score(cast, x, batch, draws, "score", config)
            again = config.draws == "separate" and "dmd" in terms and "ot" in terms
            for_ot = _score(cast, x, batch, draws, "score_ot", config) if again else scores
        if "dmd" in terms:
            norm = config.dmd.normalizer
            grad = losses.dmd_gradient(scores.fake, scores.real, scores.sigma, normalizer=norm, made_x0=x)
            gradients["dmd"] = grad
            log["loss_dmd"] = grad.square().mean() / 2
        if "ot" in terms:
            with section("ot"):
                gradients["ot"] = _transport(for_ot, config, log)
    if "gan" in terms:
        with section("gan"):
            gradients["gan"] = _adversarial(cast, x, batch, draws, config, log)
    _compare(gradients, log)
    total = losses.combine(gradients, config.weights(), config.balance, config.ot_scale)
    if twice:
        with section("rollout"):
            made = predict(partial(cast.generator, batch=batch), made.x, made.t, made.sigma)
    with section("backward"):
        cast.generator.backward(made.x0, share * total)
    return log


def critic_step(
    cast: Cast,
    batch: Batch,
    draws: Draws,
    schedule: FewStepSchedule,
    config: DistillConfig,
    judge: bool,
    section: Section,
    share: float = 1.0,
) -> Log:
    """F learns to denoise what G makes; to ``judge``, it and the heads learn to tell it from real clips."""
    with section("rollout"), torch.no_grad():
        x = _make(cast, batch, draws, schedule).x0
    sigma, noise, noisy = _noised(x, draws, "denoise", config.noise)
    with section("critic"):
        loss = losses.denoising_loss(cast.fake(noisy, sigma_to_t(sigma), batch), noise, x)
    with section("backward"):
        cast.fake.backward(share * loss)
    log = {"loss_fake": loss.detach()}
    if judge:
        log |= _judge(cast, x, batch, draws, config, section, share)
    return log


class Scores(NamedTuple):
    """Clean estimates ``[B, 16, F, H, W]`` from one noisy latent: F's, and the guided teacher's."""

    sigma: Tensor
    fake: Tensor
    real: Tensor


def _make(cast: Cast, batch: Batch, draws: Draws, schedule: FewStepSchedule) -> Rollout:
    exit_step = draws.choice("exit", schedule.steps)
    generator = partial(cast.generator, batch=batch)
    return rollout(generator, draws.noise("start"), schedule, exit_step, draws.sequence("renoise"))


def _noised(x: Tensor, draws: Draws, purpose: str, config: NoiseConfig) -> tuple[Tensor, Tensor, Tensor]:
    """-> sigma ``[B]``, the noise, and ``x`` under it."""
    sigma = draws.sigma(f"{purpose}_sigma", config.shift, config.raw, config.clamp)
    noise = draws.noise(purpose)
    return sigma, noise, add_noise(x, noise, sigma)


@torch.no_grad()
def _score(cast: Cast, x: Tensor, batch: Batch, draws: Draws, purpose: str, config: DistillConfig) -> Scores:
    sigma, _, noisy = _noised(x, draws, purpose, config.noise)
    t = sigma_to_t(sigma)
    fake = velocity_to_x0(noisy, cast.fake(noisy, t, batch), sigma)
    real = velocity_to_x0(noisy, cast.real.guided(noisy, t, batch, cast.negative, config.dmd.guidance), sigma)
    return Scores(sigma, fake, real)


def _transport(scores: Scores, config: DistillConfig, log: Log) -> Tensor:
    """d OT(F's x0, R's x0) / d F's x0, every frame a cloud of 16-d points."""
    if not bool(scores.fake.isfinite().all() & scores.real.isfinite().all()):
        log["ot_cost"] = torch.full((), torch.nan)  # the step will be skipped; there is nothing to transport
        return torch.full_like(scores.fake, torch.nan)
    grad, transport = transport_latents(scores.fake.transpose(1, 2), scores.real.transpose(1, 2), config.ot)
    log["ot_cost"] = transport.cost.mean()
    log["ot_marginal_error"] = transport.marginal_error.mean()
    log["ot_iterations"] = transport.iterations.float().mean()
    log["ot_matches"] = transport.effective_matches.mean()
    return grad.transpose(1, 2)


def _adversarial(cast: Cast, x: Tensor, batch: Batch, draws: Draws, config: DistillConfig, log: Log) -> Tensor:
    """Gradient of the generator's GAN loss on its latents; no weight gets one, and the real half is only looked at."""
    assert batch.real is not None
    leaf = x.detach().requires_grad_()
    sigma, noise, noisy = _noised(leaf, draws, "gan", config.gan.noise)
    t = sigma_to_t(sigma)
    with torch.no_grad():
        real = cast.logits(add_noise(batch.real, noise, sigma), t, batch)
    fake = cast.logits(noisy, t, batch)
    loss = losses.generator_gan_loss(fake, real, config.gan.relativistic)
    with cast.fake.role():
        (grad,) = torch.autograd.grad(loss, leaf)
    log["loss_gan"] = loss.detach()
    log["logit_gap"] = (real - fake).detach().mean()
    return cast.average(grad)


def _judge(
    cast: Cast, x: Tensor, batch: Batch, draws: Draws, config: DistillConfig, section: Section, share: float
) -> Log:
    """The discriminator's weighted loss, one noise for both halves, and its gradients.

    Each forward has a backward pass of its own. In one pass through several, autograd would hold the gradients of all
    weights, gathered, from the first to the last of them: 35 GB on every GPU at 14B.
    """
    assert batch.real is not None
    gan = config.gan
    with section("gan"):
        sigma, noise, noisy = _noised(x, draws, "gan", gan.noise)
        t, inputs = sigma_to_t(sigma), {"fake": noisy, "real": add_noise(batch.real, noise, sigma)}
        for name, half, weight in (("r1", "real", gan.r1), ("r2", "fake", gan.r2)):
            if weight:
                inputs[name] = inputs[half] + gan.perturbation * draws.noise(name)
        seen: dict[str, Tensor] = {}
        for name, each in inputs.items():
            with torch.set_grad_enabled(not config.one_graph or len(seen) == len(inputs) - 1):
                seen[name] = cast.logits(each, t, batch)
        logits = {name: value.detach().requires_grad_() for name, value in seen.items()}
        loss, log = _discriminator_loss(logits, gan)
        gradients = torch.autograd.grad(share * loss, list(logits.values()))
    for name, gradient in reversed(list(zip(inputs, gradients, strict=True))):
        last = seen.pop(name)
        if not last.requires_grad:
            with section("gan"):
                last = cast.logits(inputs[name], t, batch)
        with section("backward"):
            cast.fake.backward(last, gradient)
    return log


def _discriminator_loss(logits: dict[str, Tensor], gan: GanConfig) -> tuple[Tensor, Log]:
    fake, real = logits["fake"], logits["real"]
    loss = losses.discriminator_gan_loss(fake, real, gan.relativistic)
    log = {"loss_discriminator": loss.detach(), "logit_fake": fake.detach().mean(), "logit_real": real.detach().mean()}
    loss = gan.critic_weight * loss
    for name, weight, half in (("r1", gan.r1, real), ("r2", gan.r2, fake)):
        if weight:
            penalty = losses.smoothness_penalty(logits[name], half)
            loss = loss + weight / 2 * penalty
            log[f"loss_{name}"] = penalty.detach()
    return loss, log


def _compare(gradients: dict[str, Tensor], log: Log) -> None:
    """Sizes of the terms before their weights, and how far they agree."""
    for name, grad in gradients.items():
        log[f"grad_{name}"] = grad.float().square().mean().sqrt()
    names = sorted(gradients)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            log[f"cosine_{a}_{b}"] = losses.cosine(gradients[a], gradients[b]).float()
