"""What a generation will take, counted before anything is allocated.

The real networks run once on the meta device, where tensors have shapes and no storage, under a mode that adds up
the bytes alive and the floating-point operations. Only fused kernels, which fall into pieces there, are put in by hand,
and long clips are counted on the autoencoder's first steps and continued in a straight line.
"""

import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import UMT5Config, UMT5EncoderModel

from vdot.conditioning import Condition
from vdot.errors import InputError
from vdot.models.attention import Attend
from vdot.models.presets import DitConfig
from vdot.models.vace import VaceDiT
from vdot.models.vae import WanVAE
from vdot.sampling import FewStepSchedule

GIB = 2**30
OFFLOAD_MODES = ("false", "true", "block")


@dataclass(frozen=True)
class StageCount:
    """One network's part: bytes of its weights, of the largest block of them, of its activations; and its work."""

    name: str
    network: str  # stages of one network share its weights
    weights: int
    largest_block: int  # bytes that block-wise offloading keeps per slot
    outside_blocks: int  # bytes that stay resident when blocks come and go
    activations: int  # peak bytes alive beside the weights
    flops: float

    def device_bytes(self, mode: str) -> int:
        """Peak on the device while this stage runs, when it alone is there."""
        if mode == "block":
            return self.outside_blocks + 2 * self.largest_block + self.activations  # the next block is prefetched
        return self.weights + self.activations


@dataclass(frozen=True)
class MemoryPlan:
    """Counted peaks of a whole generation per offload mode."""

    stages: tuple[StageCount, ...]
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def weights(self) -> int:
        return sum({stage.network: stage.weights for stage in self.stages}.values())

    @property
    def flops(self) -> float:
        return sum(stage.flops for stage in self.stages)

    def shared(self, ranks: int, sharded: Collection[str]) -> "MemoryPlan":
        """What one of ``ranks`` holds when they make a video together; ``sharded`` networks are split by blocks."""

        def part(stage: StageCount) -> StageCount:
            weights = stage.weights
            if stage.network in sharded:  # one block is gathered while the next one arrives
                weights = weights // ranks + 2 * stage.largest_block
            activations = stage.activations if stage.network == "text" else stage.activations // ranks
            return replace(stage, weights=weights, activations=activations, flops=stage.flops / ranks)

        return replace(self, stages=tuple(part(stage) for stage in self.stages))

    def peak(self, mode: str) -> int:
        """Bytes on the device for ``--offload_model mode``."""
        if mode == "false":
            return self.weights + max(stage.activations for stage in self.stages)
        return max(stage.device_bytes(mode) for stage in self.stages)

    def host(self, mode: str) -> int:
        """Bytes of weights that wait in host memory."""
        return 0 if mode == "false" else self.weights

    def smallest_fit(self, available: int) -> str | None:
        """The fastest mode whose peak fits into ``available`` bytes."""
        return next((mode for mode in OFFLOAD_MODES if self.peak(mode) <= available), None)

    def check_fit(self, mode: str, total: int, on_cpu: bool = False) -> None:
        """``InputError`` when ``total`` bytes of memory can never hold a run in this mode."""
        need = self.peak("false" if on_cpu else mode)
        if need <= total:
            return
        other = None if on_cpu else self.smallest_fit(total)
        way_out = "a smaller --size, --frame_num or --chunk_frames"
        if other is not None:
            way_out = f"--offload_model {other}, which takes {self.peak(other) / GIB:.1f}"
        raise InputError(f"this takes {need / GIB:.1f} GiB of memory and there are {total / GIB:.1f}: use {way_out}")

    def describe(self, mode: str, on_cpu: bool = False) -> list[str]:
        lines = [
            f"  {s.name:<14} weights {s.weights / GIB:7.2f} GiB   activations {s.activations / GIB:6.2f} GiB   "
            f"{s.flops / 1e12:9.2f} TFLOP"
            for s in self.stages
        ]
        if on_cpu:
            lines.append(f"  peak in host memory {self.peak('false') / GIB:.2f} GiB (offloading does nothing on a CPU)")
            return [*lines, *self.notes]
        for choice in OFFLOAD_MODES:
            mark = " <- chosen" if choice == mode else ""
            lines.append(
                f"  --offload_model {choice:<6} device {self.peak(choice) / GIB:7.2f} GiB   "
                f"host {self.host(choice) / GIB:7.2f} GiB{mark}"
            )
        return [*lines, *self.notes]


class LiveBytes(TorchDispatchMode):
    """Peak bytes of storages created inside the mode and alive at the same time, the weights of ``module`` excluded."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._weights = [t.untyped_storage() for t in (*module.parameters(), *module.buffers())]
        self._seen: set[int] = {storage._cdata for storage in self._weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(Tensor, self._watch, out)
        return out

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


def is_out_of_memory(error: BaseException) -> bool:
    """On a GPU torch has a type for it; on a CPU it is a bare RuntimeError."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error) or "out of memory" in str(error)


def bytes_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in [*module.parameters(), *module.buffers()])


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated layers that block-wise offloading moves: members of the outermost module lists."""
    found: list[nn.Module] = []
    for child in module.children():
        found.extend(child if isinstance(child, nn.ModuleList) else _blocks(child))
    return found


def count_stage(
    name: str, module: nn.Module, run: Callable[[], Any], repeats: int = 1, whole: bool = False
) -> StageCount:
    """Run ``run`` once on the meta device; ``whole`` says that block-wise offloading treats the network as one."""
    blocks = [] if whole else [bytes_of(block) for block in _blocks(module)]
    weights = bytes_of(module)
    extra: list[float] = []
    restore = _count_attention(module, extra)
    try:
        with torch.no_grad(), _one_kernel_norms(module), FlopCounterMode(display=False) as flops:
            with LiveBytes(module) as live:
                run()
    finally:
        restore()
    outside = weights - sum(blocks)
    total = (flops.get_total_flops() + sum(extra)) * repeats
    return StageCount(name, name.split()[0], weights, max(blocks, default=0), outside, live.peak, total)


def _count_attention(module: nn.Module, flops: list[float]) -> Callable[[], None]:
    """On meta tensors SDPA falls back to the L x L formulation; stand in for the fused kernel that really runs."""
    seams = [m for m in module.modules() if isinstance(m, Attend)]

    def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        flops.append(4.0 * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2] * q.shape[3])
        return torch.empty_like(q)

    before = [seam.fn for seam in seams]
    for seam in seams:
        seam.fn = fused

    def restore() -> None:
        for seam, fn in zip(seams, before, strict=True):
            seam.fn = fn

    return restore


@contextmanager
def _one_kernel_norms(module: nn.Module) -> Iterator[None]:
    """On CUDA the autoencoder's norm is one kernel (torch 2.9 or newer); elsewhere torch writes it out in float32."""
    norms = [m for m in module.modules() if isinstance(m, WanRMS_norm)]
    if getattr(module, "counts_for", None) != "cuda":
        norms = []
    for norm in norms:
        norm.forward = torch.empty_like  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def plan_generation(
    dit_config: DitConfig,
    text_config: Any,
    vae_config: Any,
    condition: Condition,
    schedule: FewStepSchedule,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    device_type: str = "cuda",
) -> MemoryPlan:
    """Count text encoding, condition encoding, sampling and decoding of one request on a device of that type.

    ``text_config`` and ``vae_config`` are the library configs of the checkpoint's own networks (or their dicts).
    """
    dit_dtype, text_dtype, vae_dtype = dtypes
    with torch.device("meta"):
        dit = VaceDiT(dit_config)
        text = UMT5EncoderModel(UMT5Config(**plain(text_config)))
        vae = WanVAE(AutoencoderKLWan.from_config(plain(vae_config)))
    vae.counts_for = device_type
    for module, dtype, islands in ((dit, dit_dtype, dit.FLOAT32_ISLANDS), (text, text_dtype, ()), (vae, vae_dtype, ())):
        for name, parameter in module.named_parameters():
            if not any(island in name for island in islands):
                parameter.data = parameter.data.to(dtype)
    prompts = 2 if schedule.guided else 1
    ids = torch.zeros(prompts, dit_config.text_len, dtype=torch.long, device="meta")
    channels, frames, rows, columns = condition.latent_shape
    latents = torch.empty(1, channels, frames, rows, columns, device="meta")
    told = torch.empty(1, dit_config.text_len, dit_config.text_dim, device="meta")
    context = torch.empty(1, dit_config.vace_in_dim, frames, rows, columns, device="meta")
    stages = (
        count_stage("text encoder", text, lambda: text(input_ids=ids)),
        count_encode(vae, condition),
        count_stage(
            "transformer",
            dit,
            lambda: dit(latents, torch.zeros(1, device="meta"), told, context, lengths=[dit_config.text_len]),
            repeats=schedule.evaluations,
        ),
        count_decode(vae, condition),
    )
    return MemoryPlan(stages)


def count_encode(vae: WanVAE, condition: Condition) -> StageCount:
    clips = 0 if condition.source is None else 1 if condition.mask is None else 2

    def count(frames: int) -> StageCount:
        pixels = torch.empty(1, 3, 4 * frames - 3, condition.height, condition.width, device="meta")
        return count_stage("vae encode", vae, lambda: vae.encode(pixels), whole=True)

    clip, picture = _continued(count, vae, condition) if clips else count(1), count(1)
    needed = [clip] * bool(clips) + [picture] * bool(condition.references)
    flops = clips * clip.flops + len(condition.references) * picture.flops
    return replace(clip, activations=max((part.activations for part in needed), default=0), flops=flops)


def count_decode(vae: WanVAE, condition: Condition) -> StageCount:
    def count(frames: int) -> StageCount:
        latents = torch.empty(1, 16, frames, condition.height // 8, condition.width // 8, device="meta")
        return count_stage("vae decode", vae, lambda: [None for _ in vae.decode_stream(latents)], whole=True)

    return _continued(count, vae, condition)


def _continued(count: Callable[[int], StageCount], vae: WanVAE, condition: Condition) -> StageCount:
    """The autoencoder goes over a clip in equal steps: two short clips are counted, and the line through them drawn."""
    step = vae._step_frames(1, condition.height, condition.width)
    near, far, wanted = 1 + 2 * step, 1 + 3 * step, condition.latent_frames
    if wanted <= far:
        return count(wanted)
    a, b, steps = count(near), count(far), (wanted - near) / step
    flops = a.flops + steps * (b.flops - a.flops)
    return replace(b, flops=flops, activations=round(a.activations + steps * (b.activations - a.activations)))


def plain(config: Any) -> dict[str, Any]:
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {key: value for key, value in values.items() if not key.startswith("_")}
