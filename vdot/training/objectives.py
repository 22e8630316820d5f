"""What one step of a run does: whose gradients, whose update, what is worth telling."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from vdot.checkpoints import inspect_checkpoint, load_vae
from vdot.conditioning import Condition, encode_context
from vdot.data.batch import Batch
from vdot.data.dataset import Feeder, Source, make_sampler
from vdot.distillation.draws import Draws, keyed_generator
from vdot.distillation.losses import denoising_loss
from vdot.distillation.networks import Network
from vdot.distillation.steps import Log, critic_step, generator_step, judges, terms_of
from vdot.errors import InputError
from vdot.flow import add_noise, sigma_to_t
from vdot.parallel.state import Ranks
from vdot.pipeline import checkpoint_defaults
from vdot.runtime import DTYPES
from vdot.sampling import FewStepSchedule
from vdot.training.config import OptimizerConfig, TrainConfig
from vdot.training.export import export
from vdot.training.muon import Muon
from vdot.training.networks import Trained, build
from vdot.training.optim import Ema, Guard, clip_gradients, grad_norm, lr_at, make_optimizer, optimizer_state, set_lr
from vdot.training.plan import StepCost
from vdot.training.samples import Gallery

Section = Callable[[str], AbstractContextManager]
State = dict[str, dict[str, Tensor]]


class Updater:
    """One optimizer, what it trains, and the care around a step: reduction, clipping, skipping, averaging."""

    def __init__(self, name: str, trained: Trained, config: OptimizerConfig, run: TrainConfig, guard: Guard) -> None:
        self.name, self.trained, self.config, self.run, self.guard = name, trained, config, run, guard
        betas = (config.betas[0], config.betas[1])
        make = partial(Muon, compute=DTYPES[run.parallel.compute]) if config.kind == "muon" else make_optimizer
        self.optimizer = make(trained.parameters, config.lr, betas, config.weight_decay, config.eps)

    def update(self, step: int, batches: Sequence[Any], differentiate: Callable, section: Section) -> dict[str, float]:
        """``differentiate(batch, share)`` leaves gradients behind and returns its log, for each micro batch.

        Returns the means of the logs over micro batches and ranks, and the gradient's norm.
        """
        self.trained.zero_grad()
        logs = []
        for i, batch in enumerate(batches):
            with self.trained.micro_batch(i == len(batches) - 1, self.run.parallel.sync_each):
                logs.append(differentiate(batch, 1 / len(batches)))
        with section("communication"):
            self.trained.reduce()
            values = mean_log(logs, self.trained.everyone.process_group)
        with section("optimizer"):
            values[f"norm_{self.name}"] = grad_norm(self.trained.parameters.values()).item()
            losses = {k: v for k, v in values.items() if k.startswith(("loss", "norm"))}
            if not self.guard.check(step, losses):
                self._apply(step)
        self.trained.zero_grad()
        values[f"lr_{self.name}"] = self.rate(step)
        return values

    def rate(self, step: int) -> float:
        c = self.config
        return lr_at(step, c.lr, c.warmup, self.run.steps, c.decay)

    def _apply(self, step: int) -> None:
        clip_gradients(self.trained.parameters.values(), self.config.clip)
        set_lr(self.optimizer, self.rate(step))
        self.optimizer.step()

    def state(self) -> State:
        parameters = {name: p.detach() for name, p in self.trained.parameters.items()}
        return {
            self.name: parameters,
            f"optimizer_{self.name}": optimizer_state(self.optimizer, self.trained.parameters),
        }


def mean_log(logs: Sequence[Log], group: object) -> dict[str, float]:
    """Means over micro batches and ranks, in one reduction and one wait. All ranks have the same keys."""
    keys = list(dict.fromkeys(key for log in logs for key in log))
    parts = [torch.stack([log[key].float() for log in logs if key in log]).mean() for key in keys]
    if not parts:
        return {}
    device = next((part.device for part in parts if part.device.type != "cpu"), parts[0].device)
    values = torch.stack([part.to(device) for part in parts])
    if group is not None:
        dist.all_reduce(values, group=group)  # type: ignore[arg-type]
        values /= dist.get_world_size(group)  # type: ignore[arg-type]
    return dict(zip(keys, values.tolist(), strict=True))


class Objective(Protocol):
    """What the loop needs to know of what is learned."""

    guard: Guard

    def batches(self, start: int) -> AbstractContextManager[Iterator[Any]]:
        """This rank's batches from number ``start`` on."""
        ...

    def step(self, step: int, batches: Sequence[Any], section: Section) -> dict[str, float]:
        """One step of training on the micro batches of this rank; means over all ranks."""
        ...

    def work(self, step: int, batch: Any) -> tuple[float, float]:
        """(tokens, floating-point operations) of one sample of the batch."""
        ...

    def state(self) -> State:
        """Everything that a checkpoint holds, as tensors to be read or filled in place."""
        ...

    def notes(self) -> dict[str, Any]:
        """JSON for the checkpoint: what a resumed run should find unchanged."""
        ...

    def sample(self, step: int) -> dict[str, Path]:
        """Show what has been learned, as files by name. Collective."""
        ...

    def export(self) -> Path:
        """Write what has been learned as a checkpoint of its own. Collective."""
        ...


class Together:
    """A feeder of ranks that share each video, which makes sure that they got the same one."""

    def __init__(self, feeder: Feeder, ranks: Ranks) -> None:
        self.feeder, self.ranks = feeder, ranks

    @property
    def failures(self) -> int:
        return self.feeder.failures

    def __iter__(self) -> "Together":
        return self

    def __next__(self) -> Batch:
        batch = next(self.feeder)
        rows = self.ranks.gather(batch.rows)
        if any(other != rows[0] for other in rows):
            raise InputError(
                f"ranks that share a video have read different rows, {sorted(set(rows))}: some can read a file "
                "that others cannot; put the data where all machines see them"
            )
        return batch


class DitObjective:
    """What distillation and flow matching share: rows of a source, a student transformer, its gallery and export."""

    schedule: FewStepSchedule
    student: Network
    updaters: tuple[Updater, ...]

    def __init__(self, config: TrainConfig, ranks: Ranks, device: torch.device, source: Source) -> None:
        self.config, self.ranks, self.device, self.source = config, ranks, device, source
        self.guard = Guard(config.max_bad_steps)
        self.networks = build(config, ranks, device)
        self.negative = source.negative().float().to(device)
        self.cost = StepCost(config, self.networks.config)
        parameters = self.networks.generator.parameters
        self.ema = Ema(parameters, config.ema_decay, config.ema_start) if config.ema_decay else None
        self._gallery: Gallery | None = None

    @contextmanager
    def batches(self, start: int) -> Iterator[Feeder | Together]:
        config, source, groups = self.config, self.source, self.ranks.mesh.videos
        data = config.data
        sampler = make_sampler(source, data, config.batch_size, config.seed, groups.size)
        with Feeder(source, sampler, groups.rank, groups.size, data.workers, start, data.prefetch) as feeder:
            yield feeder if self.ranks.mesh.sequence.size == 1 else Together(feeder, self.ranks)

    def work(self, step: int, batch: Batch) -> tuple[float, float]:
        latent = batch.shape.latent
        scale = len(batch.rows) * self.ranks.mesh.videos.size / self.config.batch_size  # the loop counts batch_size
        return scale * self.cost.tokens(latent), scale * self.cost.flops(step, latent)

    def state(self) -> State:
        state: State = {"ema": self.ema.state()} if self.ema is not None else {}
        for updater in self.updaters:
            state |= updater.state()
        return state

    def notes(self) -> dict[str, Any]:
        return {"schedule": self.schedule.to_dict(), "data": self.source.identity}

    def sample(self, step: int) -> dict[str, Path]:
        """A gallery of the student as it would be exported."""
        config = self.config
        assert config.ckpt_dir is not None and config.output_dir is not None
        if self._gallery is None:
            vae = load_vae(config.ckpt_dir, "float32", self.device)
            fps = checkpoint_defaults(inspect_checkpoint(config.ckpt_dir)).fps
            folder = Path(config.output_dir, "samples")
            self._gallery = Gallery(self.source, vae, folder, config.seed, fps, config.sample_tasks, self.ranks)
        with self.ema.swapped(self.student.dit) if self.ema is not None else nullcontext():
            return self._gallery.make(step, self.student, self.schedule, self.negative, self.device)

    def export(self) -> Path:
        assert self.config.output_dir is not None
        folder = Path(self.config.output_dir, "export")
        return export(self.config, self.networks, self.ema, self.schedule, folder, self.ranks)


class Distill(DitObjective):
    """VDOT: the critic learns in every step, the generator in every ``generator_every``-th."""

    def __init__(self, config: TrainConfig, ranks: Ranks, device: torch.device, source: Source) -> None:
        super().__init__(config, ranks, device, source)
        networks = self.networks
        assert networks.critic is not None
        self.schedule = config.distill.schedule.build()
        self.cast = networks.cast(self.negative)
        self.student = self.cast.generator
        self.generator = Updater("generator", networks.generator, config.generator, config, self.guard)
        self.critic = Updater("critic", networks.critic, config.critic, config, self.guard)
        self.updaters = (self.generator, self.critic)

    def step(self, step: int, batches: Sequence[Batch], section: Section) -> dict[str, float]:
        every = self.config.distill.generator_every
        values: dict[str, float] = {}
        if step % every == 0:
            values |= self.generator.update(step, batches, partial(self._generator, step, section), section)
            if self.ema is not None:
                self.ema.update(step // every)
        return values | self.critic.update(step, batches, partial(self._critic, step, section), section)

    def _generator(self, step: int, section: Section, batch: Batch, share: float) -> Log:
        draws = self._draws(step, "generator", batch)
        terms = self._terms(step, batch)
        return generator_step(self.cast, batch, draws, self.schedule, self.config.distill, terms, section, share)

    def _critic(self, step: int, section: Section, batch: Batch, share: float) -> Log:
        draws, config = self._draws(step, "critic", batch), self.config.distill
        judge = batch.real is not None and judges(step, config)
        return critic_step(self.cast, batch, draws, self.schedule, config, judge, section, share)

    def _draws(self, step: int, role: str, batch: Batch) -> Draws:
        return Draws(self.config.seed, step, role, batch.numbers, batch.shape.latent, self.device)

    def _terms(self, step: int, batch: Batch) -> frozenset[str]:
        """Without a real clip there is nothing to judge against: such batches, alike on all ranks, train the rest."""
        terms = terms_of(step, self.config.distill)
        if batch.real is not None or "gan" not in terms:
            return terms
        weights = self.config.distill.weights()
        rest = frozenset(name for name in ("dmd", "ot") if weights[name])
        if not rest:
            raise InputError(
                f"rows of the task {batch.tasks[0]} have no real clip, which the GAN term, the only one in use, needs: "
                "add the column video_path, or give distill.dmd.weight or distill.ot_weight"
            )
        return rest


class Flow(DitObjective):
    """Flow matching on real clips, with some prompts replaced by the negative one, for guidance."""

    def __init__(self, config: TrainConfig, ranks: Ranks, device: torch.device, source: Source) -> None:
        super().__init__(config, ranks, device, source)
        note = config.schedule
        self.schedule = FewStepSchedule(note.steps, note.shift, note.solver, note.guide_scale)
        self.student = self.networks.role("generator")
        self.updater = Updater("generator", self.networks.generator, config.generator, config, self.guard)
        self.updaters = (self.updater,)
        # What the networks see without a source, by the grid of a clip's latents; made before the first step, so that a
        # checkpoint without an autoencoder is refused at once.
        self.nothing: dict[tuple[int, int, int], Tensor] = {}
        if config.flow.drop_source:
            assert config.ckpt_dir is not None
            with ranks.agree():
                grids = {(shape.frames, shape.height, shape.width) for shape in source.shapes}
                self.nothing = without_source(config.ckpt_dir, grids, device)

    def step(self, step: int, batches: Sequence[Batch], section: Section) -> dict[str, float]:
        values = self.updater.update(step, batches, partial(self._differentiate, step, section), section)
        if self.ema is not None:
            self.ema.update(step)
        return values

    def _differentiate(self, step: int, section: Section, batch: Batch, share: float) -> Log:
        real = batch.real
        if real is None:
            raise InputError(f"rows of the task {batch.tasks[0]} have no real clip to learn from: add video_path")
        noise_config = self.config.flow.noise
        draws = Draws(self.config.seed, step, "flow", batch.numbers, batch.shape.latent, self.device)
        sigma = draws.sigma("sigma", noise_config.shift, noise_config.raw, noise_config.clamp)
        noise = draws.noise("noise")
        key = (self.config.seed, step)
        batch = drop_text(batch, self.negative, self.config.flow.drop_text, key)
        batch = drop_source(batch, self.nothing, self.config.flow.drop_source, key)
        with section("forward"):
            velocity = self.student(add_noise(real, noise, sigma), sigma_to_t(sigma), batch)
            loss = denoising_loss(velocity, noise, real)
        with section("backward"):
            self.student.backward(share * loss)
        return {"loss": loss.detach()}


def drop_text(batch: Batch, negative: Tensor, probability: float, key: tuple[int, int]) -> Batch:
    """``batch`` with the prompts of some samples, chosen by their numbers, replaced by ``negative [L, C]``."""
    dropped = _chosen(batch, probability, key, "drop_text")
    if not any(dropped):
        return batch
    longest = max(batch.text.shape[1], len(negative))
    text = torch.nn.functional.pad(batch.text, (0, 0, 0, longest - batch.text.shape[1])).clone()
    for i, drop in enumerate(dropped):
        if drop:
            text[i] = torch.nn.functional.pad(negative, (0, 0, 0, longest - len(negative)))
    lengths = tuple(len(negative) if drop else n for drop, n in zip(dropped, batch.lengths, strict=True))
    return replace(batch, text=text, lengths=lengths)


def drop_source(
    batch: Batch, nothing: Mapping[tuple[int, int, int], Tensor], probability: float, key: tuple[int, int]
) -> Batch:
    """``batch`` with source and mask of some samples, chosen by their numbers, taken away; references stay.

    ``nothing``: what is left of a context then, ``[96, F, H, W]`` by (F, H, W).
    """
    dropped = _chosen(batch, probability, key, "drop_source")
    if not any(dropped):
        return batch
    shape, context = batch.shape, batch.context.clone()
    context[torch.tensor(dropped), :, shape.references :] = nothing[shape.frames, shape.height, shape.width]
    return replace(batch, context=context)


def without_source(
    checkpoint: str | Path, grids: Iterable[tuple[int, int, int]], device: torch.device
) -> dict[tuple[int, int, int], Tensor]:
    """Contexts ``[96, F, H, W]`` of clips of which nothing is given, by grids (F, H, W) of their latents.

    ``CheckpointError`` when the checkpoint has no autoencoder.
    """
    vae = load_vae(checkpoint, "float32", device)
    return {(f, h, w): encode_context(vae, Condition(4 * f - 3, 8 * h, 8 * w), device)[0] for f, h, w in grids}


def _chosen(batch: Batch, probability: float, key: tuple[int, int], purpose: str) -> list[bool]:
    """Of each sample, whether a draw that depends on ``key``, ``purpose`` and its number is below ``probability``."""
    generators = [keyed_generator(*key, purpose, number) for number in batch.numbers]
    return [torch.rand((), generator=generator).item() < probability for generator in generators]
