"""Whole steps against parameter gradients of the original, and what our own order of work must keep."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from tests.conftest import recipe_tensor
from vdot.data.batch import Batch
from vdot.distillation.config import DistillConfig, GanConfig, NoiseConfig, ScheduleConfig
from vdot.distillation.draws import Draws
from vdot.distillation.networks import Cast, Network
from vdot.distillation.rollout import rollout
from vdot.distillation.steps import critic_step, generator_step, judges, terms_of
from vdot.flow import shift_sigma
from vdot.models.discriminator import Discriminator
from vdot.models.presets import DitConfig
from vdot.models.vace import VaceDiT
from vdot.sampling import RELEASE_NOISE_LEVELS, FewStepSchedule, sample
from vdot.transport import OTConfig

TOLERANCE = 1e-3  # relative to a parameter's gradient norm (reference README, section 10)
SCHEDULE = FewStepSchedule(4, 8.0, "renoise")  # told 1000, 960, 888.9, 727.3, and noised accordingly


def section(name: str):
    return nullcontext()


def network(config: DitConfig, seed: int) -> VaceDiT:
    dit = VaceDiT(config)
    dit.load_state_dict({k: recipe_tensor(seed, k, tuple(v.shape)) for k, v in dit.state_dict().items()})
    return dit


def release_config(**changes) -> DistillConfig:
    gan = GanConfig(noise=NoiseConfig(12.0, [0.0, 1.0]))
    ot = OTConfig(gradient="unrolled", tol=0.0, max_iters=60)
    return DistillConfig(**({"gan": gan, "ot": ot, "balance": "release", "draws": "separate"} | changes))


class Recorded:
    """The original's random numbers, in the order in which it drew them, under our names."""

    def __init__(self, exit_step: int, noise: dict, fresh: list, sigma: dict) -> None:
        self.exit_step, self._noise, self.fresh, self._sigma = exit_step, noise, fresh, sigma

    def noise(self, purpose: str) -> torch.Tensor:
        return self._noise[purpose]

    def sequence(self, purpose: str):
        fresh = iter(self.fresh)
        return lambda shape: next(fresh)

    def sigma(self, purpose: str, shift: float, raw, clamp) -> torch.Tensor:
        return shift_sigma(self._sigma[purpose], shift).clamp(*clamp)

    def choice(self, purpose: str, count: int) -> int:
        return self.exit_step


@pytest.fixture(scope="module")
def original(golden, golden_json):
    """-> function(step name): cast, batch, its draws as a list, golden gradients and the JSON record."""
    meta, tensors = golden_json("train/full_steps"), golden("train/full_steps")
    sizes, config = golden_json("train/classify_tiny"), DitConfig(**golden_json("dit/cases")["tiny"]["config"])
    nets = {name: network(config, meta["seeds"][name]) for name in ("generator", "real_score", "fake_score")}
    heads = Discriminator(96, inner=sizes["small_dim"], num_heads=sizes["gan_heads"], ffn_dim=sizes["gan_ffn"])
    heads.load_state_dict({k: recipe_tensor(meta["seeds"]["heads"], k, v.shape) for k, v in heads.state_dict().items()})
    real = tensors["clean_latent"]
    real = torch.cat([real, *[real[:, -1:]] * (21 - real.shape[1])], dim=1).transpose(1, 2).float()
    context = tensors["vace_context.0"].float()[None]
    batch = Batch(tensors["context"], (32,), context, real, 0, ("t2v",), ("",), (0,), (0,))
    cast = Cast(
        Network(nets["generator"]),
        Network(nets["real_score"]),
        Network(nets["fake_score"]),
        tensors["negative_context"][0],
        heads,
        tuple(meta["taps_after_blocks"]),
    )

    def step(name: str):
        for module in (*nets.values(), heads):
            module.zero_grad(set_to_none=True)
        drawn = [v for k, v in sorted(tensors.items()) if k.startswith(f"{name}.draw.")]
        drawn = [v if v.ndim < 4 else v.reshape(1, *v.shape[-4:]).transpose(1, 2) for v in drawn]
        grads = {k.removeprefix(f"{name}.grad."): v for k, v in tensors.items() if k.startswith(f"{name}.grad.")}
        return cast, batch, drawn, grads, meta[name]

    return step


def level(raw: torch.Tensor) -> torch.Tensor:
    return raw.flatten().float() / 1000


def check(module: torch.nn.Module, grads: dict, norms: dict) -> None:
    mine = {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
    compared = [k for k in grads if k in mine]
    assert compared
    for k in compared:
        assert (mine[k] - grads[k]).norm() <= TOLERANCE * grads[k].norm() + 1e-9, k
    for k in norms.keys() & mine.keys():
        assert mine[k].norm().item() == pytest.approx(norms[k], rel=TOLERANCE, abs=1e-9), k


def test_generator_step_with_dmd_and_ot(original):
    cast, batch, d, grads, record = original("gen_even")
    draws = Recorded(
        record["exit_flag"],
        {"start": d[0], "score": d[4], "score_ot": d[6]},
        d[1:3],
        {"score_sigma": level(d[3]), "score_ot_sigma": level(d[5])},
    )
    config = release_config()
    assert terms_of(record["step"], config) == {"dmd", "ot"}
    generator_step(cast, batch, draws, SCHEDULE, config, {"dmd", "ot"}, section)
    check(cast.generator.dit, grads, record["grad_norms"])
    assert not any(p.grad is not None for m in (cast.real.dit, cast.fake.dit, cast.heads) for p in m.parameters())


def test_generator_step_against_the_discriminator(original):
    """The original draws a second noise for the real half; a real clip shifted by the difference gives its input."""
    cast, batch, d, grads, record = original("gen_odd")
    sigma = shift_sigma(level(d[2]), 12.0).clamp(0.02, 0.98)
    shifted = batch.real + sigma / (1 - sigma) * (d[4] - d[3])
    batch = Batch(**{**vars(batch), "real": shifted})
    draws = Recorded(record["exit_flag"], {"start": d[0], "gan": d[3]}, d[1:2], {"gan_sigma": level(d[2])})
    config = release_config()
    assert terms_of(record["step"], config) == {"gan"}
    log = generator_step(cast, batch, draws, SCHEDULE, config, {"gan"}, section)
    assert 0.1 * log["loss_gan"].item() == pytest.approx(record["loss"], rel=1e-5)
    check(cast.generator.dit, grads, record["grad_norms"])
    assert not any(p.grad is not None for m in (cast.real.dit, cast.fake.dit, cast.heads) for p in m.parameters())


def test_critic_step_denoises(original):
    cast, batch, d, grads, record = original("critic_even")
    draws = Recorded(record["exit_flag"], {"start": d[0], "denoise": d[2]}, [], {"denoise_sigma": level(d[1])})
    log = critic_step(cast, batch, draws, SCHEDULE, release_config(), judges(record["step"], release_config()), section)
    assert log["loss_fake"].item() == pytest.approx(record["denoising"], rel=1e-5)
    check(cast.fake.dit, grads, record["grad_norms"])
    assert not any(p.grad is not None for m in (cast.real.dit, cast.generator.dit, cast.heads) for p in m.parameters())


def test_critic_step_judges(original):
    """The original leaves out denoising in such a step, we do not: the difference of two of our steps is its step."""
    cast, batch, d, grads, record = original("critic_odd")
    noise = {"start": d[0], "gan": d[5], "denoise": torch.zeros_like(d[0])}
    levels = {"gan_sigma": level(d[4]), "denoise_sigma": torch.tensor([0.5])}

    assert judges(record["step"], release_config())

    def step(judge: bool) -> dict[str, torch.Tensor]:
        for module in (cast.fake.dit, cast.heads):
            module.zero_grad(set_to_none=True)
        draws = Recorded(record["exit_flag"], noise, d[1:4], levels)
        log = critic_step(cast, batch, draws, SCHEDULE, release_config(), judge, section)
        if judge:
            assert 0.1 * log["loss_discriminator"].item() == pytest.approx(record["gan_D"], rel=1e-5)
            assert log["logit_fake"].item() == pytest.approx(record["fake_logit"], abs=1e-5)
            assert log["logit_real"].item() == pytest.approx(record["real_logit"], abs=1e-5)
        return {k: p.grad.clone() for k, p in cast.fake.dit.named_parameters() if p.grad is not None}

    before, after = step(False), step(True)
    check(cast.heads, grads, record["grad_norms"])
    compared = [k for k in grads if k in before]
    assert compared
    for k in compared:
        # a difference of two float32 gradients of size |before|: its rounding is added to the tolerance
        rounding = 1e-6 * before[k].norm()
        assert (after[k] - before[k] - grads[k]).norm() <= TOLERANCE * grads[k].norm() + rounding, k


# --- the rollout -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("case", ["linear8", "unipc16"])
def test_rollout_equals_the_original(case, golden, golden_json):
    """``unipc16`` is the release's mismatch between what the network is told and the noise that it gets."""
    tensors = golden("train/backward_simulation")
    dit = VaceDiT(DitConfig(**golden_json("dit/cases")["tiny"]["config"]))
    dit.load_state_dict({k: v.float() for k, v in golden("dit/tiny_weights").items()})
    levels = None if case == "linear8" else RELEASE_NOISE_LEVELS
    schedule = FewStepSchedule(4, 8.0, "renoise", noise_levels=levels)
    text, context = tensors["context"], tensors["vace_context.0"].float()[None]

    def velocity(x, t):
        return dit(x, t, text, context)

    def pick(fresh, shape):
        return next(fresh)

    for exit_step in range(4):
        fresh = iter(tensors[f"renoise.{i}"].transpose(0, 1)[None] for i in range(3))
        noise = tensors["noise"].transpose(1, 2)
        made = rollout(velocity, noise, schedule, exit_step, partial(pick, fresh))
        want = tensors[f"{case}.exit{exit_step}.x0"].transpose(1, 2)
        torch.testing.assert_close(made.x0, want, atol=2e-4, rtol=0)


@pytest.mark.parametrize("solver", ["renoise", "unipc", "euler", "dpm++"])
def test_rollout_is_the_sampler(solver):
    """The last exit of training's rollout is what sampling with the exported schedule gives, number for number."""
    schedule = ScheduleConfig(steps=4, shift=5.0, solver=solver).build()
    told: list[float] = []

    def velocity(x, t):
        told.append(t[0].item())
        return torch.sin(3 * x) + t[0] / 1000

    noise = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    want = sample(velocity, noise, schedule, generators[0])
    sampled, told = told, []
    made = rollout(velocity, noise, schedule, 3, lambda shape: torch.randn(shape, generator=generators[1]))
    assert told == sampled == schedule.timesteps().tolist()
    if solver in ("renoise", "euler"):  # the multistep solvers correct their last prediction by the earlier ones
        torch.testing.assert_close(made.x0, want, atol=1e-6, rtol=0)
    assert made.sigma == schedule.sigmas()[3].item()


# --- our own order of work -------------------------------------------------------------------------------------------


CONFIG = DitConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=4, vace_layers=(0, 2), text_dim=24, text_len=40)


@pytest.fixture(scope="module")
def cast() -> Cast:
    torch.manual_seed(0)
    dits = [network(CONFIG, seed) for seed in (1, 2, 3)]
    heads = Discriminator(48, inner=32, num_heads=4, ffn_dim=48)
    return Cast(*map(Network, dits), torch.randn(5, 24), heads, (1, 2, 3))


def batch_of(size: int = 2, references: int = 0, frames: int = 3, first: int = 0) -> Batch:
    """Samples ``first ...`` of a run: sample n is the same in every batch that holds it."""
    each = []
    for n in range(first, first + size):
        g = torch.Generator().manual_seed(100 + n)
        length = 4 + n % 3
        text = torch.zeros(7, 24)
        text[:length] = torch.randn(length, 24, generator=g)
        total = references + frames
        each.append((text, length, *(torch.randn(c, total, 4, 4, generator=g) for c in (96, 16))))
    text, lengths, context, real = zip(*each, strict=True)
    stacked = [torch.stack(part) for part in (text, context, real)]
    names = tuple(str(n) for n in range(size))
    numbers = tuple(range(first, first + size))
    return Batch(stacked[0], lengths, stacked[1], stacked[2], references, names, names, numbers, numbers)


def draws_of(batch: Batch, step: int = 0) -> Draws:
    return Draws(7, step, "generator", batch.numbers, batch.shape.latent, torch.device("cpu"))


def gradients(cast: Cast, config: DistillConfig, batch: Batch, terms: set[str], share: float = 1.0) -> torch.Tensor:
    generator_step(cast, batch, draws_of(batch), SCHEDULE, config, terms, section, share)
    return torch.cat([p.grad.flatten() for p in cast.generator.dit.parameters()])


@pytest.mark.parametrize("terms", [{"dmd", "ot"}, {"gan"}, {"dmd", "ot", "gan"}])
@pytest.mark.parametrize("references", [0, 2])
def test_micro_batches_add_up_to_the_large_batch(cast, terms, references):
    config = DistillConfig(ot=OTConfig(tol=0.0))  # with a tolerance, the batch decides together when to stop
    cast.generator.dit.zero_grad()
    whole = gradients(cast, config, batch_of(4, references), terms)
    cast.generator.dit.zero_grad()
    for first in (0, 2):
        parts = gradients(cast, config, batch_of(2, references, first=first), terms, share=0.5)
    torch.testing.assert_close(parts, whole, atol=1e-5 * whole.abs().max().item(), rtol=1e-3)


def test_one_graph_at_a_time_gives_the_same_gradients(cast):
    """float32, summed in the same order; adversarial steps of both sides, with penalties on real and on made clips."""
    batch, modules = batch_of(2), (cast.generator.dit, cast.fake.dit, cast.heads)
    found = []
    for one_graph in (False, True):
        config = DistillConfig(one_graph=one_graph, gan=GanConfig(r1=0.5, r2=0.25))
        for module in modules:
            module.zero_grad(set_to_none=True)
        logs = generator_step(cast, batch, draws_of(batch), SCHEDULE, config, {"dmd", "ot", "gan"}, section)
        logs |= critic_step(cast, batch, draws_of(batch), SCHEDULE, config, True, section)
        grads = [p.grad.flatten() for module in modules for p in module.parameters() if p.grad is not None]
        found.append((torch.cat(grads), logs))
    (whole, logs), (part, again) = found
    torch.testing.assert_close(part, whole, atol=1e-6 * whole.abs().max().item(), rtol=1e-4)
    assert logs.keys() == again.keys() and {"loss_r1", "loss_r2", "loss_gan"} <= logs.keys()


def test_shared_draws_ask_for_three_evaluations_and_separate_ones_for_six(cast):
    counts = {"shared": 0, "separate": 0}
    for mode in counts:
        watched = [
            net.dit.register_forward_hook(lambda *_, m=mode: counts.update({m: counts[m] + 1}))
            for net in (cast.real, cast.fake)
        ]
        generator_step(
            cast, batch_of(1), draws_of(batch_of(1)), SCHEDULE, DistillConfig(draws=mode), {"dmd", "ot"}, section
        )
        for hook in watched:
            hook.remove()
    assert counts == {"shared": 3, "separate": 6}


def test_shared_and_separate_draws_have_one_expectation():
    """DMD and OT gradients on one latent, averaged over many noises: sharing the draw changes nothing but variance.

    The two means of 400 differ by less than four standard errors in each of eight random directions.
    """
    from vdot.distillation.steps import _score, _transport

    torch.manual_seed(0)
    small = DitConfig(dim=24, ffn_dim=24, num_heads=2, num_layers=1, vace_layers=(0,), text_dim=8, text_len=8)
    duo = Cast(*(Network(network(small, s)) for s in (1, 2, 3)), torch.randn(2, 8))
    n, g = 400, torch.Generator().manual_seed(3)
    one = torch.randn(1, 16, 1, 4, 4, generator=g)
    text, context = torch.randn(1, 4, 8, generator=g), torch.randn(1, 96, 1, 4, 4, generator=g)
    names, numbers = ("",) * n, tuple(range(n))
    batch = Batch(
        text.expand(n, -1, -1), (4,) * n, context.expand(n, -1, -1, -1, -1), None, 0, names, names, numbers, numbers
    )
    x = one.expand(n, -1, -1, -1, -1)
    draws = Draws(0, 0, "generator", numbers, (16, 1, 4, 4), torch.device("cpu"))
    config = DistillConfig()
    shared, other = (_score(duo, x, batch, draws, purpose, config) for purpose in ("score", "score_ot"))
    directions = torch.randn(8, one.numel(), generator=g)
    a, b = (_transport(s, config, {}).flatten(1) @ directions.T for s in (shared, other))
    error = (a.var(0) / n + b.var(0) / n).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() < 4 * error).all()
    assert not torch.allclose(a, b)


def test_only_intended_weights_get_gradients(cast):
    modules = {"generator": cast.generator.dit, "real": cast.real.dit, "fake": cast.fake.dit, "heads": cast.heads}
    for step, terms, expected in (
        (generator_step, {"dmd", "ot", "gan"}, {"generator"}),
        (critic_step, False, {"fake"}),
        (critic_step, True, {"fake", "heads"}),
    ):
        for module in modules.values():
            module.zero_grad(set_to_none=True)
        batch = batch_of(2)
        step(cast, batch, draws_of(batch), SCHEDULE, DistillConfig(), terms, section)
        touched = {k for k, m in modules.items() if any(p.grad is not None for p in m.parameters())}
        assert touched == expected


def test_reference_frames_are_part_of_every_latent(cast):
    """Noised, scored and judged with the others: each network sees R + F frames, none is cut off or left clean."""
    seen = []
    hooks = [
        net.dit.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
        for net in (cast.generator, cast.real, cast.fake)
    ]
    batch = batch_of(1, references=2, frames=3)
    generator_step(cast, batch, draws_of(batch), SCHEDULE, DistillConfig(), {"dmd", "ot", "gan"}, section)
    critic_step(cast, batch, draws_of(batch), SCHEDULE, DistillConfig(), True, section)
    for hook in hooks:
        hook.remove()
    assert set(seen) == {5}


def test_terms_take_turns_as_in_the_release():
    config = DistillConfig()
    updates = [step for step in range(40) if step % config.generator_every == 0]
    assert [sorted(terms_of(step, config)) for step in updates[:4]] == [["dmd", "ot"], ["gan"]] * 2
    assert [judges(step, config) for step in range(4)] == [False, True, False, True]
    assert terms_of(0, DistillConfig(alternate=False)) == {"dmd", "ot", "gan"}
    assert terms_of(5, DistillConfig(gan=GanConfig(weight=0.0))) == {"dmd", "ot"}


def test_draws_belong_to_the_sample_and_not_to_its_batch():
    cpu = torch.device("cpu")
    both = Draws(1, 5, "generator", (8, 9), (16, 2, 4, 4), cpu)
    alone = Draws(1, 5, "generator", (9,), (16, 2, 4, 4), cpu)
    assert torch.equal(both.noise("start")[1:], alone.noise("start"))
    assert torch.equal(both.sigma("x", 5, (0, 1), (0.02, 0.98))[1:], alone.sigma("x", 5, (0, 1), (0.02, 0.98)))
    assert torch.equal(
        both.sequence("r")(torch.Size((2, 16, 2, 4, 4)))[1:], alone.sequence("r")(torch.Size((1, 16, 2, 4, 4)))
    )
    assert both.choice("exit", 4) == alone.choice("exit", 4)
    others = [Draws(1, 5, "critic", (9,), (16, 2, 4, 4), cpu), Draws(1, 6, "generator", (9,), (16, 2, 4, 4), cpu)]
    assert not any(torch.equal(alone.noise("start"), other.noise("start")) for other in others)


def test_levels_are_per_sample_and_exits_per_batch():
    """A batch's noise levels and exits: levels per sample, one exit for all (sharded ranks run in step)."""
    draws = Draws(0, 0, "critic", range(64), (1,), torch.device("cpu"))
    sigma = draws.sigma("s", 5.0, (0.02, 0.98), (0.02, 0.98))
    assert sigma.unique().numel() > 50 and sigma.min() >= 0.02 and sigma.max() <= 0.98
    exits = [Draws(0, step, "critic", (0,), (1,), torch.device("cpu")).choice("exit", 4) for step in range(400)]
    assert all(80 <= exits.count(k) <= 120 for k in range(4))  # 100 +- 2.3 standard deviations
