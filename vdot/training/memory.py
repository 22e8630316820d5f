"""Memory of a training run per GPU, counted before anything is allocated.

What stays (weights, moments, averages) follows from the parameters and from how they are split. What comes and goes in
a step is counted by running the real steps, with the real recomputation and the real split of tokens, on the meta
device; of deep networks a few blocks are run, and the line through them continued.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from vdot.conditioning import Condition
from vdot.data.batch import Batch
from vdot.distillation.draws import Draws
from vdot.distillation.losses import denoising_loss
from vdot.distillation.networks import Cast, Network
from vdot.distillation.steps import critic_step, generator_step, judges
from vdot.errors import ConfigError
from vdot.memory import LiveBytes, bytes_of, count_decode, count_encode, plain
from vdot.models.attention import Attend
from vdot.models.discriminator import Discriminator
from vdot.models.presets import DitConfig
from vdot.models.vace import VaceDiT
from vdot.models.vae import WanVAE
from vdot.parallel.mesh import Group, Mesh
from vdot.parallel.shard import blocks_of, wholes
from vdot.parallel.ulysses import parallelize
from vdot.runtime import DTYPES
from vdot.sampling import Draw
from vdot.training.config import OptimizerConfig, TrainConfig
from vdot.training.lora import add_adapters
from vdot.training.networks import head_sizes, taps_of
from vdot.training.recompute import recompute

GB = 1e9  # memory is sold by it
RESERVE, NCCL = 1.5e9, 1.5e9  # assumed: CUDA's context and what the allocator cannot use; buffers of several ranks
TEXT_ROWS = 96  # of a typical prompt
Shape4 = tuple[int, ...]  # of a latent, (16, R + F, H, W)


# --- how it is split -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """What of a run lies on one of ``world`` ranks, as :mod:`vdot.training.networks` lays it out."""

    world: int
    sequence: int  # ranks that share the tokens of a video
    samples: int  # of one micro batch on one rank
    trained: int  # ranks that share one copy of what is trained
    frozen: int  # and of what is not
    fsdp: bool  # trained networks gather their blocks

    @classmethod
    def of(cls, config: TrainConfig, world: int) -> "Split":
        """``ConfigError`` when the numbers do not divide each other."""
        parallel = config.parallel
        sequence = parallel.ulysses_size * parallel.ring_size
        if sequence < 1 or world % sequence:
            raise ConfigError(
                f"parallel.ulysses_size {parallel.ulysses_size} x ring_size {parallel.ring_size} must divide the "
                f"number of processes, {world}"
            )
        if parallel.replicas < 1 or world % parallel.replicas:
            raise ConfigError(f"parallel.replicas {parallel.replicas} must divide the number of processes, {world}")
        groups = world // sequence
        if config.batch_size % groups:
            raise ConfigError(f"batch_size {config.batch_size} must be a multiple of the {groups} data-parallel groups")
        one_copy = world // parallel.replicas
        split = world > 1 and parallel.shard
        half = parallel.compute != "float32"
        if parallel.autocast and (split or config.lora.rank or not half):
            raise ConfigError(
                "parallel.autocast is for whole networks in half precision that are not split over processes: set "
                "parallel.shard=false for several processes, or leave it out"
            )
        fsdp = split or (not config.lora.rank and half and not parallel.autocast)
        return cls(
            world=world,
            sequence=sequence,
            samples=config.batch_size // groups,
            trained=one_copy if fsdp and not config.lora.rank else 1,
            frozen=one_copy if split else 1,
            fsdp=fsdp,
        )


# --- what stays ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Bytes of one network on one GPU, and of what its optimizer keeps beside it."""

    name: str
    weights: float
    moments: float = 0.0
    average: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.moments + self.average


@dataclass(frozen=True)
class Phase:
    """Bytes on one GPU, beside what stays, at the highest point of one kind of work."""

    name: str
    activations: float
    gradients: float = 0.0  # of what the phase trains; nothing else has any then
    gathered: float = 0.0  # whole blocks, and whole gradients on their way to their shards

    @property
    def total(self) -> float:
        return self.activations + self.gradients + self.gathered


@dataclass(frozen=True)
class TrainingMemory:
    """Of one GPU."""

    parts: tuple[Part, ...]
    phases: tuple[Phase, ...]
    reserve: float = RESERVE
    host: float = 0.0  # bytes in host memory of each rank with parallel.offload
    advice: str = ""  # what would make it less

    @property
    def resident(self) -> float:
        return sum(part.total for part in self.parts)

    @property
    def peak(self) -> float:
        return self.resident + max(phase.total for phase in self.phases) + self.reserve

    def check_fit(self, total: float) -> None:
        """``ConfigError`` when a GPU with ``total`` bytes can never hold this."""
        if self.peak > total:
            raise ConfigError(
                f"this takes {self.peak / GB:.1f} GB of memory on each GPU and there are {total / GB:.1f}: "
                f"{self.advice}"
            )

    def describe(self) -> list[str]:
        lines = [f"memory per GPU, GB {'weights':>28} {'moments':>12} {'average':>12}"]
        for part in self.parts:
            lines.append(f"  {part.name:<32}" + _columns(part.weights, part.moments, part.average))
        lines.append(f"{'':<31}{'activations':>16} {'gradients':>12} {'gathered':>12}")
        for phase in self.phases:
            lines.append(f"  {phase.name:<32}" + _columns(phase.activations, phase.gradients, phase.gathered))
        worst = max(self.phases, key=lambda phase: phase.total)
        lines.append(f"  {'assumed for CUDA, NCCL, allocator':<32}" + _columns(self.reserve)[1:])
        lines.append(f"  peak {self.peak / GB:.1f} GB, in the {worst.name}")
        if self.host:
            lines.append(f"  host memory of each process {self.host / GB:.1f} GB")
        return lines


def _columns(*values: float) -> str:
    return " ".join(f"{value / GB:12.2f}" if value else f"{'':12}" for value in values)


# --- what comes and goes in a step -----------------------------------------------------------------------------------


def count_activations(
    config: TrainConfig, dit: DitConfig, latent: Shape4, samples: int = 1, sequence: int = 1
) -> dict[str, float]:
    """Peak bytes of each kind of step on one of ``sequence`` ranks, beside weights and their gradients.

    The steps are run with three blocks. Each further block or hint adds what a graph keeps of it, as often as there are
    graphs at the highest point.
    """
    taps = taps_of(dit, config.distill.gan)
    few = max(3, len(taps))
    if dit.num_layers <= few + 1 or len(dit.vace_layers) < 2:
        return count_step(config, dit, taps, latent, samples, sequence)

    def shallow(layers: int, hints: int) -> DitConfig:
        return replace(dit, num_layers=layers, vace_layers=tuple(range(hints)))

    def graph(layers: int, hints: int) -> int:
        return count_graph(config, shallow(layers, hints), latent, samples, sequence)

    base = count_step(config, shallow(few, 1), tuple(range(few - len(taps), few)), latent, samples, sequence)
    block, hint = graph(few + 1, 1) - graph(few, 1), graph(few + 1, 2) - graph(few + 1, 1)
    more = (dit.num_layers - few) * block + (len(dit.vace_layers) - 1) * hint
    return {name: peak + graphs_of(name, config) * more for name, peak in base.items()}


def graphs_of(step: str, config: TrainConfig) -> int:
    """Forwards of one network whose backward pass is still to come, at the highest point of a step."""
    distill = config.distill
    if step == "sample grid":
        return 0
    if step == "generator step" and distill.gan.weight:
        return 1 if distill.one_graph else 2  # the generator's, and the fake score's that judges
    if step == "critic step" and judges(1, distill):
        return 1 if distill.one_graph else 2 + (distill.gan.r1 > 0) + (distill.gan.r2 > 0)
    return 1


def count_graph(config: TrainConfig, dit: DitConfig, latent: Shape4, samples: int, sequence: int) -> int:
    """Bytes that one forward keeps for its backward pass."""
    cast, modules = _cast_on_meta(config, dit, (), sequence)
    batch, draws = _batch_on_meta(dit, latent, samples), _NoDraws(0, 0, "", range(samples), latent, META)
    with LiveBytes(modules) as live:
        _velocity = cast.generator(draws.noise("noise"), draws.sigma("sigma", 1.0, (), ()), batch)
        return live.alive


def count_step(
    config: TrainConfig, dit: DitConfig, taps: tuple[int, ...], latent: Shape4, samples: int, sequence: int
) -> dict[str, float]:
    """As :func:`count_activations`, by running all of the network."""
    cast, modules = _cast_on_meta(config, dit, taps, sequence)
    batch, draws = _batch_on_meta(dit, latent, samples), _NoDraws(0, 0, "", range(samples), latent, META)
    distill = config.distill
    terms = {"gan"} if distill.gan.weight else {"dmd"}  # optimal transport needs less than any backward pass
    judge = judges(1, distill)
    schedule = distill.schedule.build()

    def section(name: str) -> Any:
        return nullcontext()

    def flow() -> None:
        velocity = cast.generator(draws.noise("noise"), draws.sigma("sigma", 1.0, (), ()), batch)
        cast.generator.backward(denoising_loss(velocity, draws.noise("noise"), draws.noise("real")))

    def sample() -> None:
        with torch.no_grad():
            cast.generator(draws.noise("noise"), draws.sigma("sigma", 1.0, (), ()), batch)

    steps: dict[str, Callable[[], object]] = {"sample grid": sample}
    if config.objective == "flow":
        steps["step"] = flow
    else:
        rest = (schedule, distill)
        steps["generator step"] = lambda: generator_step(cast, batch, draws, *rest, terms, section)
        steps["critic step"] = lambda: critic_step(cast, batch, draws, *rest, judge, section)
    peaks = {}
    for name, step in steps.items():
        with LiveBytes(modules) as live:
            step()
        peaks[name] = float(live.peak)
    return peaks


META = torch.device("meta")


class _NoDraws(Draws):
    """Tensors without numbers; the rollout ends at once, since steps before its last leave nothing behind."""

    def noise(self, purpose: str) -> Tensor:
        return torch.empty(len(self.numbers), *self.shape, device=META)

    def sequence(self, purpose: str) -> Draw:
        return lambda shape: torch.empty(shape, device=META)

    def sigma(self, purpose: str, shift: float, raw: Sequence[float], clamp: Sequence[float]) -> Tensor:
        return torch.empty(len(self.numbers), device=META)

    def choice(self, purpose: str, count: int, among: int | str = "all") -> int:
        return 0


class _Paper(Group):
    """Ranks that are not there: what they send has a shape and nothing else."""

    def all_to_all(self, flat: Tensor, sent: list[int], sizes: list[int]) -> Tensor:
        return flat.new_empty(sum(sizes))


def fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """The kernels that a GPU picks, which never hold an L x L matrix; on meta tensors SDPA would count one."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if bias is None:
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    else:
        bias = bias.expand(*q.shape[:3], k.shape[2])
        out = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]
    return out.transpose(1, 2)


def _cast_on_meta(config: TrainConfig, dit: DitConfig, taps: tuple[int, ...], sequence: int) -> tuple[Cast, nn.Module]:
    """One transformer plays all roles, which changes no activation; gradients of weights vanish as they arrive."""
    network = dit_on_meta(dit, config)
    roles: list[Callable] = [nullcontext] * 3
    if config.lora.rank:
        with META:
            adapters = add_adapters(network, config.lora, seed=0)
        roles = [partial(adapters.role, name) for name in ("generator", None, "fake")]
    heads = None
    if taps and (config.distill.gan.weight or config.distill.gan.critic_weight):
        heads = discriminator_on_meta(config, dit, len(taps))
    modules = nn.ModuleList([network] if heads is None else [network, heads])
    for seam in (m for m in modules.modules() if isinstance(m, Attend)):
        seam.fn = fused_attention
    group = _Paper(sequence, 0, "paper") if sequence > 1 else Group()
    parallelize(network, Mesh(ulysses=group, sequence=group))
    recompute(network, config.parallel.recompute)
    for parameter in modules.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_forget_gradient)
    generator, real, fake = (Network(network, role) for role in roles)
    negative = torch.empty(min(TEXT_ROWS, dit.text_len), dit.text_dim, device=META)
    return Cast(generator, real, fake, negative, heads, taps), modules


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _batch_on_meta(dit: DitConfig, latent: Shape4, samples: int) -> Batch:
    rows = min(TEXT_ROWS, dit.text_len)
    text = torch.empty(samples, rows, dit.text_dim, device=META)
    context = torch.empty(samples, dit.vace_in_dim, *latent[1:], device=META)
    real = torch.empty(samples, *latent, device=META)
    names, numbers = ("",) * samples, tuple(range(samples))
    return Batch(text, (rows,) * samples, context, real, 0, names, names, numbers, numbers)


def dit_on_meta(dit: DitConfig, config: TrainConfig) -> VaceDiT:
    """With weights in the type that products are computed in."""
    with META:
        network = VaceDiT(dit)
    for name, parameter in network.named_parameters():
        if not any(island in name for island in VaceDiT.FLOAT32_ISLANDS):
            parameter.data = parameter.data.to(DTYPES[config.parallel.compute])
    return network


def discriminator_on_meta(config: TrainConfig, dit: DitConfig, taps: int) -> Discriminator:
    gan = config.distill.gan
    with META:
        return Discriminator(dit.dim, taps=taps, time=gan.time, **head_sizes(dit, gan))


# --- all together ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoders:
    """Libraries' configurations of the text encoder and the autoencoder, as their checkpoint's headers give them."""

    text: Any
    vae: Any


def plan_memory(
    config: TrainConfig, dit: DitConfig, latent: Shape4, world: int, encoders: Encoders | None = None
) -> TrainingMemory:
    """Of distillation or flow matching on ``world`` GPUs with clips of that size.

    ``encoders``: those that the gallery, and encoding on the fly, bring to the GPU; None leaves them out.

    Raises:
        ConfigError: sizes of groups that do not divide each other.
    """
    split = Split.of(config, world)
    network = dit_on_meta(dit, config)
    sizes = _Sizes.of(network, config)
    taps = taps_of(dit, config.distill.gan)
    gan = config.objective == "distill" and bool(config.distill.gan.weight or config.distill.gan.critic_weight)
    heads = _numbers(discriminator_on_meta(config, dit, len(taps)).parameters()) if gan else 0
    learn = _adapters_plan(config, network, sizes, split, heads) if config.lora.rank else None
    learn = learn or _whole_plan(config, sizes, split, heads)
    activations = count_activations(config, dit, latent, split.samples, split.sequence)
    resident, phases = list(learn.parts), []
    for name, gradients, buffers in learn.steps:
        phases.append(Phase(name, activations[name], gradients, buffers))
    grid = activations["sample grid"]
    if encoders is not None:
        vae = _autoencoder(encoders.vae, torch.float32)
        if config.sample_every:
            resident.append(Part("autoencoder of the gallery", bytes_of(vae)))
            grid = max(grid, count_decode(vae, _clip(latent)).activations)
        if config.data.encoded is None:
            part, busy = _encoding(encoders, latent)
            resident.append(part)
            phases = [replace(phase, activations=phase.activations + busy) for phase in phases]
    if config.sample_every:
        copies = learn.swapped if config.ema_decay else 0.0
        phases.append(Phase("sample grid", grid + copies, 0.0, sizes.gathered(split.fsdp)))
    reserve = RESERVE + (NCCL if world > 1 else 0.0)
    return TrainingMemory(tuple(resident), tuple(phases), reserve, learn.host, _advice(config, split))


@dataclass(frozen=True)
class _Learning:
    parts: tuple[Part, ...]
    steps: tuple[tuple[str, float, float], ...]  # name, gradients, what is gathered
    swapped: float  # a copy of the generator's weights, while the gallery is made of the averages
    host: float = 0.0


@dataclass(frozen=True)
class _Sizes:
    """Numbers of parameters of a transformer, and bytes of what FSDP brings together."""

    sharded: int
    whole: int  # held by every rank
    frozen_sharded: int  # bytes
    frozen_whole: int
    block: int  # parameters of the largest block
    width: int  # bytes of a number that products are computed in
    root: int  # bytes of the embeddings, which stay together once gathered

    @classmethod
    def of(cls, network: VaceDiT, config: TrainConfig) -> "_Sizes":
        whole = {id(p) for p in wholes(network).values()}
        kept = [p for p in network.parameters() if id(p) in whole]
        split = [p for p in network.parameters() if id(p) not in whole]
        blocks = blocks_of(network)
        inside = {id(p) for block in blocks for p in block.parameters()}
        return cls(
            sharded=_numbers(split),
            whole=_numbers(kept),
            frozen_sharded=_bytes(split),
            frozen_whole=_bytes(kept),
            block=max(_numbers(p for p in block.parameters() if id(p) not in whole) for block in blocks),
            width=DTYPES[config.parallel.compute].itemsize,
            root=_bytes(p for p in split if id(p) not in inside),
        )

    def gathered(self, fsdp: bool, trained: bool = False, networks: int = 1) -> float:
        """A block that runs, the next one, and the buffer it came through; of trained ones the gradients as well.

        Of gradients: one block's in the type they are computed in, and float32 buffers of it and of the block before.
        """
        if not fsdp:
            return 0.0
        gradients = self.block * (self.width + 2 * 4) if trained else 0
        return 3 * self.block * self.width + gradients + networks * self.root


def _numbers(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _moments(config: OptimizerConfig) -> int:
    """Bytes for each parameter; no first moment where its decay is 0."""
    return 8 if config.betas[0] else 4


def _whole_plan(config: TrainConfig, sizes: _Sizes, split: Split, heads: int) -> _Learning:
    """Whole networks: float32 masters of what learns, split over ranks; the teacher in the type it computes in."""
    own = sizes.sharded / split.trained
    on_device = 0.0 if config.parallel.offload and split.fsdp else own
    frozen = sizes.frozen_sharded / split.frozen
    distill = config.objective == "distill"
    average = 4 if config.ema_decay else 0

    def part(name: str, how: OptimizerConfig, average: int) -> Part:
        count = on_device + sizes.whole
        return Part(name, 4 * count, _moments(how) * count, average * count)

    parts = [part("generator", config.generator, average)]
    if distill:
        parts.append(part("fake score", config.critic, 0))
        parts.append(_discriminator(heads, config.critic))
        waits = config.parallel.offload and split.frozen > 1
        parts.append(Part("teacher", sizes.frozen_whole + (0.0 if waits else frozen)))
    networks = 3 if distill else 1
    gathered = sizes.gathered(split.fsdp, trained=True, networks=networks)
    if config.parallel.autocast:
        gathered += sizes.width * sizes.sharded  # copies that the backward pass reads
    if split.fsdp and config.accumulation > 1 and not config.parallel.sync_each:
        gathered += 4 * sizes.sharded  # whole float32 gradients wait for the last micro batch
    gradients = 4 * (on_device + sizes.whole)
    steps = [("generator step" if distill else "step", gradients, gathered)]
    if distill:
        steps.append(("critic step", gradients + 4 * heads, gathered))
    states = 4 + _moments(config.generator) + average + 4  # the last are gradients, of one network at a time
    states += 4 + _moments(config.critic) if distill else 0
    host = (own - on_device) * states + (frozen if distill and config.parallel.offload and split.frozen > 1 else 0.0)
    return _Learning(tuple(p for p in parts if p.total), tuple(steps), 4 * (on_device + sizes.whole), host)


def _adapters_plan(config: TrainConfig, network: VaceDiT, sizes: _Sizes, split: Split, heads: int) -> _Learning:
    """One frozen base, split or not; on every rank the same float32 adapters."""
    with META:
        adapters = add_adapters(network, config.lora, seed=0)
    count = _numbers(adapters.parameters("generator").values())
    distill = config.objective == "distill"
    average = 4 * count if config.ema_decay else 0
    waits = config.parallel.offload and split.frozen > 1
    base = sizes.frozen_sharded / split.frozen
    parts = [
        Part("base", sizes.frozen_whole + (0.0 if waits else base)),
        Part("generator's adapter", 4 * count, _moments(config.generator) * count, average),
        # Flow matching has the second adapter as well, and leaves it alone.
        Part("fake score's adapter", 4 * count, _moments(config.critic) * count if distill else 0),
    ]
    if distill:
        parts.append(_discriminator(heads, config.critic))
    gathered = sizes.gathered(split.frozen > 1)
    steps = [("generator step" if distill else "step", 4.0 * count, gathered)]
    if distill:
        steps.append(("critic step", 4.0 * (count + heads), gathered))
    return _Learning(tuple(p for p in parts if p.total), tuple(steps), 4.0 * count, base if waits else 0.0)


def _discriminator(heads: int, how: OptimizerConfig) -> Part:
    return Part("discriminator", 4 * heads, _moments(how) * heads)


def _autoencoder(config: Any, dtype: torch.dtype) -> WanVAE:
    with META:
        vae = WanVAE(AutoencoderKLWan.from_config(plain(config)))
    vae.counts_for = "cuda"
    return vae.to(dtype)


def _clip(latent: Shape4) -> Condition:
    """Of the latent's size, references counted as frames; its pixels take no memory."""
    frames, height, width = 4 * latent[1] - 3, 8 * latent[2], 8 * latent[3]
    grey = torch.zeros(1).expand(3, frames, height, width)
    return Condition(frames, height, width, source=grey, mask=grey[0])


def _encoding(encoders: Encoders, latent: Shape4) -> tuple[Part, float]:
    """What encoding rows on the fly keeps on the GPU, and the activations it has beside those of a step."""
    with META:
        text: nn.Module = UMT5EncoderModel(UMT5Config(**plain(encoders.text)))
    vae = _autoencoder(encoders.vae, torch.bfloat16)
    part = Part("text encoder and autoencoder", bytes_of(text.bfloat16()) + bytes_of(vae))
    return part, count_encode(vae, _clip(latent)).activations


def _advice(config: TrainConfig, split: Split) -> str:
    """What makes it less, the cheapest first."""
    parallel, ways = config.parallel, []
    if config.data.encoded is None and not config.world.clips:
        ways.append("data.encoded (made by training/encode.py)")
    if parallel.recompute != "full":
        ways.append("parallel.recompute=full")
    if config.accumulation > 1 and not parallel.sync_each and split.fsdp and not config.lora.rank:
        ways.append("parallel.sync_each=true")
    if config.objective == "distill" and not config.distill.one_graph:
        ways.append("distill.one_graph=true")
    if split.sequence < split.world:
        ways.append(f"parallel.ulysses_size={split.world // parallel.ring_size}")
    if not config.lora.rank:
        ways.append("lora.rank=32")
    if not parallel.offload and split.fsdp:
        ways.append("parallel.offload=true")
    return f"use {', '.join([*ways, 'more GPUs'])} or smaller clips"
