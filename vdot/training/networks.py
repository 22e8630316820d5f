"""From a checkpoint to the networks of a run: loaded, split over ranks, in their roles, and what of them learns."""

import atexit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule

from vdot.checkpoints import load_dit
from vdot.distillation.config import GanConfig
from vdot.distillation.networks import Cast, Network
from vdot.errors import ConfigError
from vdot.models.discriminator import Discriminator
from vdot.models.presets import PRESETS, DitConfig
from vdot.models.vace import Run, VaceDiT
from vdot.parallel.mesh import Group
from vdot.parallel.shard import Fsdp, wholes
from vdot.parallel.state import Ranks
from vdot.parallel.ulysses import average_gradients, parallelize
from vdot.runtime import DTYPES
from vdot.training.config import ParallelConfig, TrainConfig
from vdot.training.lora import Adapters, add_adapters
from vdot.training.recompute import recompute


@dataclass
class Trained:
    """Parameters that one optimizer updates, by name, and how their gradients come together over ranks."""

    parameters: dict[str, nn.Parameter]
    sharded: Sequence[nn.Module] = ()  # roots whose gradients FSDP reduces
    replicated: list[nn.Parameter] = field(default_factory=list)  # whose gradients we average
    everyone: Group = field(default_factory=Group)

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    @contextmanager
    def micro_batch(self, last: bool, sync_each: bool) -> Iterator[None]:
        """Gradients are reduced over ranks in the last micro batch of an update, or in each."""
        for module in self.sharded:
            assert isinstance(module, FSDPModule)
            module.set_requires_gradient_sync(last or sync_each)
        yield

    def reduce(self) -> None:
        """Average what FSDP does not look after; once per update."""
        average_gradients(self.replicated, self.everyone)


@dataclass
class Networks:
    """All networks of a run. ``dits`` by role; with adapters all roles are one module."""

    config: DitConfig
    dits: dict[str, VaceDiT]
    adapters: Adapters | None
    heads: Discriminator | None
    taps: tuple[int, ...]
    generator: Trained
    critic: Trained | None
    everyone: Group
    sequence: Group

    def role(self, name: str) -> Network:
        """``generator``, ``real`` or ``fake``."""
        if self.adapters is None:
            return Network(self.dits[name])
        adapter = None if name == "real" else name
        return Network(self.dits["base"], partial(self.adapters.role, adapter))

    def cast(self, negative: Tensor) -> Cast:
        generator, real, fake = (self.role(name) for name in ("generator", "real", "fake"))
        return Cast(generator, real, fake, negative, self.heads, self.taps, partial(_average, group=self.sequence))

    @property
    def modules(self) -> list[VaceDiT]:
        return list(self.dits.values())


def build(config: TrainConfig, ranks: Ranks, device: torch.device) -> Networks:
    """Load and arrange everything. Collective; ``CheckpointError`` and ``ConfigError`` name what does not fit."""
    assert config.ckpt_dir is not None
    everyone = Group(ranks.world, ranks.rank, dist.group.WORLD if ranks.world > 1 else None)
    builder = _Builder(config, ranks, device, everyone)
    if config.objective == "flow":
        return builder.flow()
    return builder.adapters() if config.lora.rank else builder.whole()


class Autocast(Run):
    """Runs a block with its matrix products in half precision; weights, norms and what lies around it stay float32."""

    def __init__(self, inner: Run, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.device, self.dtype = inner, device, dtype

    def forward(self, block: nn.Module, *args: Any) -> Any:
        with torch.autocast(self.device, self.dtype):
            return self.inner(block, *args)


@dataclass
class _Builder:
    config: TrainConfig
    ranks: Ranks
    device: torch.device
    everyone: Group

    def __post_init__(self) -> None:
        parallel = self.config.parallel
        self.compute = DTYPES[parallel.compute]
        # Half precision beside float32 masters is FSDP's, also on one process, unless autocast is asked for.
        self.split = self.everyone.size > 1 and parallel.shard
        self.mesh = _shard_mesh(self.device, parallel, self.everyone) if self._needs_mesh() else None

    def _needs_mesh(self) -> bool:
        masters = not self.config.lora.rank and self.compute != torch.float32
        return self.split or (masters and not self.config.parallel.autocast)

    def whole(self) -> Networks:
        dits = {
            "generator": self._trained(self.config.generator_init),
            "real": self._frozen(),
            "fake": self._trained(),
        }
        taps, heads = self._discriminator(dits["fake"].config)
        generator = self._collect({"": dits["generator"]})
        critic = self._collect({"": dits["fake"]} | ({"heads.": heads} if heads is not None else {}))
        return self._networks(dits, None, heads, taps, generator, critic)

    def adapters(self) -> Networks:
        if self.config.generator_init is not None:
            raise ConfigError("generator_init needs whole networks: with lora.rank the generator starts as the teacher")
        base = self._frozen()
        adapters = add_adapters(base, self.config.lora, self.config.seed)
        taps, heads = self._discriminator(base.config)
        names = {f"heads.{name}": p for name, p in heads.named_parameters()} if heads is not None else {}
        generator = self._replicated(adapters.parameters("generator"))
        critic = self._replicated(adapters.parameters("fake") | names)
        return self._networks({"base": base}, adapters, heads, taps, generator, critic)

    def flow(self) -> Networks:
        if self.config.lora.rank:
            base = self._frozen()
            adapters = add_adapters(base, self.config.lora, self.config.seed)
            trained = self._replicated(adapters.parameters("generator"))
            return self._networks({"base": base}, adapters, None, (), trained, None)
        dit = self._trained(self.config.generator_init)
        return self._networks({"generator": dit}, None, None, (), self._collect({"": dit}), None)

    # --- parts

    def _load(self, path: str | None, dtype: torch.dtype, compute: torch.dtype | None) -> VaceDiT:
        sharder = None
        if self.mesh is not None and (self.split or compute is not None):
            sharder = Fsdp(self.mesh, self.config.parallel.offload, compute)
        with self.ranks.agree():
            dit = load_dit(path or self.config.ckpt_dir or "", dtype, self.device, sharder=sharder)
        parallelize(dit, self.ranks.mesh)
        recompute(dit, self.config.parallel.recompute)
        if self.config.parallel.compile:
            # With and without gradient, with and without a first hint, per shape: more variants than eight.
            torch._dynamo.config.recompile_limit = 64
            for block in (*dit.blocks, *dit.vace_blocks):
                block.compile()
        return dit

    def _trained(self, path: str | None = None) -> VaceDiT:
        autocast = self.config.parallel.autocast
        compute = None if self.compute == torch.float32 or autocast else self.compute
        dit = self._load(path, torch.float32, compute).train().requires_grad_(True)
        if autocast:
            dit.run = Autocast(dit.run, self.device.type, self.compute)
        return dit

    def _frozen(self) -> VaceDiT:
        return self._load(None, self.compute, None).requires_grad_(False)

    def _discriminator(self, dit: DitConfig) -> tuple[tuple[int, ...], Discriminator | None]:
        gan = self.config.distill.gan
        if not gan.weight and not gan.critic_weight:
            return (), None
        taps = taps_of(dit, gan)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)  # equal on all ranks
            heads = Discriminator(dit.dim, taps=len(taps), time=gan.time, **head_sizes(dit, gan))
        return taps, heads.to(self.device)

    def _collect(self, modules: dict[str, nn.Module]) -> Trained:
        parameters = {f"{prefix}{name}": p for prefix, m in modules.items() for name, p in m.named_parameters()}
        sharded = [m for m in modules.values() if isinstance(m, FSDPModule)]
        kept_whole = {id(p) for m in sharded for p in wholes(m).values()}
        inside = {id(p) for m in sharded for p in m.parameters()} - kept_whole
        replicated = [p for p in parameters.values() if id(p) not in inside]
        return Trained(parameters, sharded, replicated, self.everyone)

    def _replicated(self, parameters: dict[str, nn.Parameter]) -> Trained:
        return Trained(parameters, [], list(parameters.values()), self.everyone)

    def _networks(
        self,
        dits: dict[str, VaceDiT],
        adapters: Adapters | None,
        heads: Discriminator | None,
        taps: tuple[int, ...],
        generator: Trained,
        critic: Trained | None,
    ) -> Networks:
        config = next(iter(dits.values())).config
        sequence = self.ranks.mesh.sequence
        return Networks(config, dits, adapters, heads, taps, generator, critic, self.everyone, sequence)


def taps_of(dit: DitConfig, gan: GanConfig) -> tuple[int, ...]:
    """Blocks that the discriminator looks at. ``ConfigError`` when there are none such."""
    preset = next((p for p in PRESETS.values() if (p.dit.dim, p.dit.num_layers) == (dit.dim, dit.num_layers)), None)
    last = dit.num_layers
    spread = tuple(sorted({last // 2, (3 * last) // 4, last - 1}))  # where the presets have theirs
    taps = tuple(gan.taps) if gan.taps is not None else preset.taps if preset is not None else spread
    if not taps or list(taps) != sorted(set(taps)) or taps[0] < 0 or taps[-1] >= last:
        raise ConfigError(f"distill.gan.taps must be increasing block numbers below {last}, got {list(taps)}")
    return taps


def head_sizes(dit: DitConfig, gan: GanConfig) -> dict[str, int]:
    """Widths of the discriminator: the release's for its networks, in proportion for small ones."""
    small = dit.dim < PRESETS["1.3B"].dit.dim
    inner = gan.inner or (dit.dim // 2 if small else 512)
    return {
        "inner": inner,
        "num_heads": gan.num_heads or (4 if small else 8),
        "ffn_dim": gan.ffn_dim or (2 * dit.dim if small else 13824),
    }


def _average(gradient: Tensor, group: Group) -> Tensor:
    if group.process_group is not None:
        dist.all_reduce(gradient, group=group.process_group)
        gradient /= group.size
    return gradient


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _shard_mesh(device: torch.device, parallel: ParallelConfig, everyone: Group) -> DeviceMesh:
    """All ranks; with ``replicas``, (replicas, ranks that share one copy)."""
    if everyone.process_group is None and not dist.is_initialized():
        # FSDP needs a process group even for itself alone; this one is nobody else's.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(_leave)
    size = everyone.size
    if parallel.replicas < 1 or size % parallel.replicas:
        raise ConfigError(f"parallel.replicas {parallel.replicas} must divide the number of processes, {size}")
    if parallel.replicas == 1:
        return init_device_mesh(device.type, (size,))
    return init_device_mesh(
        device.type, (parallel.replicas, size // parallel.replicas), mesh_dim_names=("replicate", "shard")
    )
