"""FSDP2 for the transformer and the text encoder, filled from the files without any process holding a whole network.

Each block is a group of its own: gathered before it runs, freed after. Parameters of a transformer that stay float32
while the rest is bfloat16 (modulations and norms: four million numbers of 17 billion) are left whole on every rank,
so that each group has one type; the large time embeddings are float32 groups of their own.
"""

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from vdot.errors import MissingDependencyError
from vdot.models.vace import VaceDiT

# A block's result may be a view (of a matrix product); nothing here adds to one in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

WHOLE = ("modulation", "norm", "head.")  # the small ones of VaceDiT.FLOAT32_ISLANDS


class Fsdp:
    """A :class:`vdot.checkpoints.loading.Sharder` over ``mesh``: one dimension, or (replicate, shard).

    Args:
        offload: shards wait in host memory and come to the device block by block.
        compute: for training, the type that float32 shards are gathered in; gradients are averaged in float32.
    """

    def __init__(self, mesh: DeviceMesh, offload: bool = False, compute: torch.dtype | None = None) -> None:
        self.mesh, self.offload = mesh, offload
        # The networks choose the type of each activation themselves: the residual stream is float32.
        self.policy = MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=None if compute is None else torch.float32, cast_forward_inputs=False
        )

    def shard(self, module: nn.Module, device: torch.device) -> None:
        """Wrap a network that is on the meta device, and allocate this rank's shards (filled by nobody yet)."""
        whole = wholes(module)
        options: dict[str, Any] = {
            "mesh": self.mesh,
            "offload_policy": CPUOffloadPolicy() if self.offload and device.type != "cpu" else OffloadPolicy(),
        }
        if whole:
            if "ignored_params" not in inspect.signature(fully_shard).parameters:
                raise MissingDependencyError("--dit_fsdp needs a newer PyTorch: pip install 'torch>=2.8'")
            options["ignored_params"] = set(whole.values())
        for block in blocks_of(module):
            fully_shard(block, mp_policy=self.policy, **options)
        for group in _float32_groups(module):
            fully_shard(group, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **options)
        fully_shard(module, mp_policy=self.policy, **options)
        module.to_empty(device="cpu" if self.offload else device)
        if self.offload:
            for name, parameter in whole.items():  # not FSDP's to move
                _set(module, name, torch.empty_like(parameter, device=device))

    def local(self, parameter: Tensor) -> tuple[Tensor, int]:
        """This rank's rows of a parameter, and the first one's number: those of ``torch.chunk``."""
        if not isinstance(parameter, DTensor):
            return parameter, 0
        dim = self.mesh.ndim - 1
        step = -(-parameter.shape[0] // self.mesh.size(dim))
        return parameter.to_local(), min(parameter.shape[0], self.mesh.get_local_rank(dim) * step)


def wholes(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name that every rank holds. In training their gradients are averaged by the caller."""
    if not isinstance(module, VaceDiT):
        return {}
    return {name: p for name, p in module.named_parameters() if any(fragment in name for fragment in WHOLE)}


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(m, FSDPModule) for m in module.modules())


def blocks_of(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, VaceDiT):
        return [*module.blocks, *module.vace_blocks]
    return list(module.encoder.block)  # type: ignore[union-attr, arg-type]


def _float32_groups(module: nn.Module) -> list[nn.Module]:
    return [module.time_embedding, module.time_projection] if isinstance(module, VaceDiT) else []


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(value, requires_grad=module.get_parameter(name).requires_grad)
    setattr(module.get_submodule(owner), leaf, parameter)
