"""What a run will take, counted before anything is allocated: work, memory and data."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, log10, prod

from vdot.checkpoints import inspect_checkpoint
from vdot.checkpoints.networks import network_configs
from vdot.data.batch import Shape
from vdot.data.dataset import JointSource, Sampler, open_encoded, stills_sampler
from vdot.data.manifest import check_table
from vdot.data.world import world_rows
from vdot.distillation.steps import judges, terms_of
from vdot.errors import ConfigError
from vdot.models.presets import DitConfig
from vdot.models.vace import PADDING_ROWS, TEXT_BUCKET
from vdot.parallel.state import Ranks
from vdot.request import Defaults
from vdot.training.config import TrainConfig
from vdot.training.memory import GB, TEXT_ROWS, Encoders, Split, TrainingMemory, plan_memory
from vdot.training.metrics import PEAK_TFLOPS
from vdot.training.networks import head_sizes, taps_of

SHARE = (
    0.4  # of the data sheet's peak that hours are told for: assumed, what well-run training of such networks reaches
)
CARDS = (("B200", 180), ("H200", 141), ("H100", 80), ("A100", 80), ("L40S", 48), ("RTX 4090", 24))  # GB of memory
Latent = tuple[int, ...]  # of one sample, (16, R + F, H, W)


# --- work ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one forward of one sample; attention apart, as it may be kept in recomputation."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        return self.linear + self.attention


def forward_flops(dit: DitConfig, latent: Latent, text_rows: int = TEXT_ROWS) -> Flops:
    """Of the transformer: two operations for each product of a linear layer and of attention.

    ``text_rows`` of the prompt; the padding rows that the network adds to them are counted.
    """
    length, dim = dit.tokens(latent), dit.dim
    text = min(dit.text_len, TEXT_BUCKET * ceil((text_rows + PADDING_ROWS) / TEXT_BUCKET))
    patch, hints = prod(dit.patch_size), len(dit.vace_layers)
    block = length * (6 * dim**2 + 2 * dim * dit.ffn_dim) + text * 2 * dim**2
    hint = hints * block + (hints + 1) * length * dim**2  # after_proj each, before_proj once
    embed = length * patch * dim * (dit.in_dim + dit.vace_in_dim) + text * (dit.text_dim + dim) * dim
    time = dit.freq_dim * dim + 7 * dim**2
    head = length * dim * dit.out_dim * patch
    linear = dit.num_layers * block + hint + embed + time + head
    attention = (dit.num_layers + hints) * 2 * length * (length + text) * dim
    return Flops(2.0 * linear, 2.0 * attention)


def judge_flops(dit: DitConfig, latent: Latent, taps: int, inner: int, ffn_dim: int, time: bool) -> float:
    """Of the discriminator's heads on the features of one sample."""
    length, dim = dit.tokens(latent), dit.dim
    head = length * (dim**2 + dim * inner + 2 * inner**2 + 2 * inner)
    head += 2 * inner**2 + 2 * inner * ffn_dim + inner**2 + inner * dim
    return 2.0 * (taps * head + (taps + time) * dim**2 + dim)


def flop(count: float) -> str:
    """In the unit that leaves one to three digits before the point."""
    power = min(6, max(1, int(log10(max(count, 1)) // 3)))
    return f"{count / 10 ** (3 * power):.4g} {'kMGTPE'[power - 1]}FLOP"


class StepCost:
    """Floating-point operations of a training step, the mean over exit steps.

    A backward pass costs two forwards (one, where only the input's gradient is wanted), recomputation up to one more.
    """

    def __init__(self, config: TrainConfig, dit: DitConfig) -> None:
        self.config, self.dit = config, dit

    def tokens(self, latent: Latent) -> int:
        return self.dit.tokens(latent)

    def flops(self, step: int, latent: Latent) -> float:
        """Of one sample in training step ``step``."""
        each = forward_flops(self.dit, latent)
        forwards, again, judged = self.forwards(step)
        repeated = {"none": 0.0, "selective": each.linear, "full": each.total}[self.config.parallel.recompute]
        return forwards * each.total + again * repeated + judged * self._judge(latent)

    def forwards(self, step: int) -> tuple[float, float, float]:
        """Forwards of the transformer for one sample, further ones by recomputation, forwards of the discriminator."""
        if self.config.objective == "flow":
            return 3, 1, 0
        d = self.config.distill
        rollout = (d.schedule.steps + 1) / 2
        total, again, judged = rollout + 3, 1.0, 0.0
        if judges(step, d):  # both halves, to all weights
            inputs = 2 + (d.gan.r1 > 0) + (d.gan.r2 > 0)
            twice = inputs - 1 if d.one_graph else 0
            total, again, judged = total + 3 * inputs + twice, again + inputs, 3 * inputs + twice
        if step % d.generator_every:
            return total, again, judged
        terms = terms_of(step, d)
        total, again = total + rollout + 2, again + 1
        if terms & {"dmd", "ot"}:
            draws = 2 if d.draws == "separate" and terms >= {"dmd", "ot"} else 1
            total += draws * (2 + (d.dmd.guidance != 1))
        if "gan" in terms:  # the real half is only looked at; the other one gives its input's gradient
            total, again, judged = total + 3 + d.one_graph, again + 1, judged + 3
        return total, again, judged

    def cycle(self, latent: Latent) -> float:
        """Of one sample in ``generator_every`` steps, the mean over the turns that terms take."""
        every = self.config.distill.generator_every if self.config.objective == "distill" else 1
        return sum(self.flops(step, latent) for step in range(4 * every)) / 4

    def _judge(self, latent: Latent) -> float:
        gan = self.config.distill.gan
        sizes = head_sizes(self.dit, gan)
        return judge_flops(
            self.dit, latent, len(taps_of(self.dit, gan)), sizes["inner"], sizes["ffn_dim"], time=gan.time
        )


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """What is known of a run's examples without loading one."""

    tasks: Sequence[str]
    shapes: Sequence[Shape]
    paired: Sequence[bool]
    stills: "Rows | None" = None  # of ``data.stills``; memory is counted for the clips, which fill no less of it

    def describe(self, config: TrainConfig, dit: DitConfig) -> list[str]:
        """``ConfigError`` for weights of tasks that are not there."""
        data, batches = config.data, config.steps * config.accumulation
        clips = Sampler(self.shapes, self.tasks, data.task_weights, config.batch_size, paired=self.paired)
        if self.stills is None:
            return self._describe("data", clips, batches, dit)
        stills = stills_sampler(self.shapes, self.stills, data, config.batch_size)
        return [
            *self._describe("clips", clips, batches * (1 - data.stills.share), dit),
            *self.stills._describe("stills", stills, batches * data.stills.share, dit),
        ]

    def _describe(self, name: str, sampler: Sampler, batches: float, dit: DitConfig) -> list[str]:
        weights, drawn = sampler.weights, round(batches * sampler.mean_size)
        shares = {task: 0.0 for task in dict.fromkeys(self.tasks)}
        for task, weight in zip(self.tasks, weights / weights.sum(), strict=True):
            shares[task] += float(weight)
        rows = Counter(self.tasks)
        real = Counter(task for task, paired in zip(self.tasks, self.paired, strict=True) if paired)
        epochs = drawn / len(self.tasks)
        lines = [f"{name}  {len(self.tasks)} rows; {drawn} samples in {batches:g} batches: {epochs:.2f} epochs"]
        for task in rows:
            lines.append(
                f"  {task:<24} {rows[task]:7d} rows {shares[task]:6.1%} of samples, "
                f"{shares[task] * drawn / rows[task]:.2f} times each; {real[task]} with a real clip"
            )
        for shape, count in Counter(self.shapes).most_common():
            lines.append(
                f"  {count:7d} rows of {4 * shape.frames - 3} frames, {8 * shape.width} x {8 * shape.height}, "
                f"{shape.references} references: {dit.tokens(shape.latent)} tokens"
            )
        return lines


def largest(shapes: Sequence[Shape]) -> Latent:
    """Of the clips with most latents: memory is counted for them."""
    return max((shape.latent for shape in shapes), key=lambda latent: prod(latent[1:]))


def read_rows(config: TrainConfig, ranks: Ranks) -> Rows:
    """Of whatever the configuration names, from tables and headers alone; every bad row is logged.

    Raises:
        ConfigError, InputError, CheckpointError: as when training opens the same data.
    """
    assert config.ckpt_dir is not None
    if config.world.clips:
        tasks, shapes = world_rows(config.world)
        return Rows(tasks, shapes, [True] * len(tasks))
    if config.data.encoded is not None:
        with ranks.agree():
            source = open_encoded(config.data, config.ckpt_dir)
        parts = source.parts if isinstance(source, JointSource) else (source,)
        first, *more = [Rows(part.tasks, part.shapes, part.paired) for part in parts]
        return replace(first, stills=more[0] if more else None)
    with ranks.agree():
        notes = inspect_checkpoint(config.ckpt_dir).defaults
        defaults = Defaults.from_dict(notes or {}, f"{config.ckpt_dir}/defaults.json")
    entries, _ = check_table(config.data, defaults, ranks)
    return Rows([e.row.task for e in entries], [e.shape for e in entries], [e.paired for e in entries])


# --- all together ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingPlan:
    config: TrainConfig
    dit: DitConfig
    latent: Latent  # of the largest clips
    world: int
    memory: TrainingMemory

    def describe(self) -> list[str]:
        split = Split.of(self.config, self.world)
        _, frames, height, width = self.latent
        each = forward_flops(self.dit, self.latent).total
        return [
            f"{self.config.objective}  width {self.dit.dim}, {self.dit.num_layers} + {len(self.dit.vace_layers)} "
            f"blocks; latents {frames} x {height} x {width} = {self.dit.tokens(self.latent)} tokens",
            f"{self.world} GPUs: {split.world // split.sequence} groups of {split.sequence}, "
            f"{split.samples} samples each in a micro batch, {self.config.accumulation} micro batches",
            *self.memory.describe(),
            *self._cards(),
            f"work  forward {flop(each)} a sample",
            *self._work(),
        ]

    def _cards(self) -> list[str]:
        fit = [f"{name} ({gb} GB)" for name, gb in CARDS if self.memory.peak <= gb * GB]
        return [f"  fits {', '.join(fit)}" if fit else f"  fits no card: {self.memory.advice}"]

    def _work(self) -> list[str]:
        config, cost = self.config, StepCost(self.config, self.dit)
        every = config.distill.generator_every if config.objective == "distill" else 1
        cycle, samples = cost.cycle(self.latent), config.batch_size * config.accumulation
        total = cycle * samples * config.steps / every
        lines = [
            f"  {every}-step cycle {flop(cycle)} a sample, {flop(cycle * samples)} in all; "
            f"{config.steps} steps {flop(total)}"
        ]
        peaks: Mapping[str, float] = dict(PEAK_TFLOPS)
        hours = [
            f"{name} {total / (self.world * SHARE * peaks[name] * 1e12) / 3600:.3g}"
            for name, gb in CARDS
            if self.memory.peak <= gb * GB
        ]
        if hours:
            lines.append(f"  hours on {self.world} GPUs at an assumed {SHARE:.0%} of peak: {', '.join(hours)}")
        return lines


def plan_training(config: TrainConfig, latent: Latent, world: int) -> TrainingPlan:
    """From the headers of ``ckpt_dir``. Some seconds, alike for any size.

    Raises:
        ConfigError: sizes that do not divide each other. CheckpointError: a network is missing or of another model.
    """
    if config.ckpt_dir is None:
        raise ConfigError("ckpt_dir is missing: give the checkpoint folder of the teacher, ckpt_dir=models/...")
    dit, text, vae = network_configs(config.ckpt_dir)
    return TrainingPlan(config, dit, latent, world, plan_memory(config, dit, latent, world, Encoders(text, vae)))
