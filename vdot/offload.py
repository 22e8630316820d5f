"""Where weights wait: resident, whole networks coming and going, or block by block with prefetch.

Block-wise offloading is diffusers' group offloading, with a copy stream on CUDA. On a CPU all modes are the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from vdot.errors import ConfigError
from vdot.memory import OFFLOAD_MODES
from vdot.parallel.shard import is_sharded

HOST = torch.device("cpu")


def offload_mode(value: str | bool) -> str:
    """``false``, ``true`` or ``block``, also from the release's ``--offload_model True``."""
    mode = str(value).lower()
    if mode not in OFFLOAD_MODES:
        raise ConfigError(f"offload_model must be one of {', '.join(OFFLOAD_MODES)}, got {value!r}")
    return mode


class Placement:
    """Moves networks to ``device`` for as long as they are used."""

    def __init__(self, device: torch.device, mode: str) -> None:
        self.device = device
        self.mode = "false" if device.type == "cpu" else offload_mode(mode)

    def install(self, module: nn.Module, by_blocks: bool = True) -> None:
        """Called once per network after loading into host memory. Shards are moved by FSDP itself."""
        if is_sharded(module):
            return
        if self.mode == "false":
            module.to(self.device)
        elif self.mode == "block" and by_blocks:
            offload_by_blocks(module, self.device)

    @contextmanager
    def use(self, module: nn.Module) -> Iterator[None]:
        """Have ``module`` on the device inside the block; a no-op when it is resident or comes block by block."""
        whole = self.mode != "false" and not getattr(module, "_vdot_by_blocks", False) and not is_sharded(module)
        if whole:
            module.to(self.device)
        try:
            yield
        finally:
            if whole:
                module.to(HOST)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()


def offload_by_blocks(module: nn.Module, device: torch.device) -> None:
    """Keep one block and the prefetched next one on ``device``; the rest waits in host memory."""
    stream = device.type == "cuda"
    apply_group_offloading(
        module,
        onload_device=device,
        offload_device=HOST,
        offload_type="block_level",
        num_blocks_per_group=1,
        non_blocking=stream,
        use_stream=stream,
    )
    module._vdot_by_blocks = True  # type: ignore[assignment]
