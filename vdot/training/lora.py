"""One frozen base in three roles: bare it is the teacher, with one adapter the generator, with another the fake score.

Adapters are peft's (Hu et al. 2021, 2106.09685); this file switches between them and knows how published tools name
them.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vdot.checkpoints.saving import share
from vdot.errors import CheckpointError, ConfigError, MissingDependencyError
from vdot.models.vace import VaceDiT
from vdot.training.config import LoraConfig
from vdot.video import atomic_path

ADAPTERS = ("generator", "fake")
EXACT = 2048  # width up to which all singular values are computed
INFIX = ".base_layer"  # what peft puts into the names of the weights that it wraps


def add_adapters(dit: VaceDiT, config: LoraConfig, seed: int) -> "Adapters":
    """Freeze ``dit`` and give it a trainable float32 adapter per role; both begin without effect.

    Raises:
        ConfigError: no layer has a name that ends in one of the targets.
        MissingDependencyError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError("LoRA needs peft: pip install -e '.[train]'") from error
    names = [
        name
        for name, m in dit.named_modules()
        if isinstance(m, nn.Linear) and name.endswith(tuple(f".{target}" for target in config.targets))
    ]
    if not names:
        raise ConfigError(
            f"lora.targets {config.targets} name no linear layer of the transformer: use q, k, v, o, ffn.0"
        )
    dit.requires_grad_(False)
    options: dict[str, Any] = {"r": config.rank, "lora_alpha": config.alpha or config.rank, "target_modules": names}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)  # equal on all ranks
        for adapter in ADAPTERS:
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what we mean
            peft.inject_adapter_in_model(peft.LoraConfig(**options), dit, adapter_name=adapter)
    for name, parameter in dit.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return Adapters(dit, config)


class Adapters:
    """The adapters of ``dit`` and the switch between them."""

    def __init__(self, dit: VaceDiT, config: LoraConfig) -> None:
        from peft.tuners.lora import LoraLayer

        self.dit, self.config = dit, config
        self.layers: dict[str, Any] = {name: m for name, m in dit.named_modules() if isinstance(m, LoraLayer)}
        self._active: str | None = None
        self._switch(None)

    def parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """By name in ``dit``."""
        return {name: p for name, p in self.dit.named_parameters() if f".{adapter}." in name}

    @contextmanager
    def role(self, adapter: str | None) -> Iterator[None]:
        """Within the block the network has this adapter's weights, or none."""
        before = self._active
        self._switch(adapter)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, adapter: str | None) -> None:
        self._active = adapter
        for layer in self.layers.values():
            layer.enable_adapters(adapter is not None)
            if adapter is not None:
                layer.set_adapter(adapter)
            # peft freezes what is not active; a gradient may still be on its way to it
            layer.set_requires_grad(list(ADAPTERS))

    # --- out

    @torch.no_grad()
    def merged(self, adapter: str) -> dict[str, Tensor]:
        """``dit``'s weights under their own names, this adapter added to them in float32; the rest shares memory."""
        weights = {}
        for name, parameter in self.dit.named_parameters():
            if "lora_" in name:
                continue
            owner = self.layers.get(name.rpartition(".")[0].removesuffix(INFIX))
            value = _whole(parameter)
            if owner is not None and name.endswith(f"{INFIX}.weight"):
                value = (value.float() + owner.get_delta_weight(adapter).to(value.device).float()).to(value.dtype)
            weights[name.replace(INFIX, "")] = value
        return weights

    def factors(self, adapter: str) -> dict[str, tuple[Tensor, Tensor]]:
        """``{layer: (A [r, in], B [out, r])}``, copies; the weight changes by ``alpha / r * B A``."""
        sides = {name: (layer.lora_A[adapter], layer.lora_B[adapter]) for name, layer in self.layers.items()}
        return {
            name: (a.weight.detach().to("cpu", copy=True), b.weight.detach().to("cpu", copy=True))
            for name, (a, b) in sides.items()
        }


def _whole(parameter: Tensor) -> Tensor:
    parameter = parameter.detach()
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def extract(
    base: VaceDiT, tuned: VaceDiT, rank: int, device: torch.device
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Rank-``rank`` factors of ``tuned - base`` per linear layer, and the share of its squared norm that they hold.

    With ``B A`` the truncated singular value decomposition, the closest of that rank (Eckart & Young 1936); alpha is
    the rank.

    Raises:
        CheckpointError: the two are not of one size. ConfigError: a rank below 1, or nothing differs.
    """
    if base.config != tuned.config:
        raise CheckpointError(f"the checkpoints are of two sizes, {base.config.dim} and {tuned.config.dim} wide")
    if rank < 1:
        raise ConfigError(f"the rank must be at least 1, got {rank}")
    factors, total, kept = {}, 0.0, 0.0
    others = dict(tuned.named_modules())
    for name, layer in base.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        other = others[name]
        assert isinstance(other, nn.Linear)
        change = other.weight.detach().to(device).float() - layer.weight.detach().to(device).float()
        if not change.any():
            continue
        u, s, v = _largest(change, min(rank, *change.shape))
        total, kept = total + change.square().sum().item(), kept + s.square().sum().item()
        root = s.sqrt()
        pad = (0, 0, 0, rank - len(s))  # small layers have fewer singular values than the file's one rank
        a, b = (root[:, None] * v.T), (root[:, None] * u.T)
        factors[name] = (nn.functional.pad(a, pad).cpu(), nn.functional.pad(b, pad).T.contiguous().cpu())
    if not factors:
        raise ConfigError("the checkpoints do not differ in any linear layer: there is nothing to extract")
    return factors, kept / total


def _largest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """``u [m, k], s [k], v [n, k]``: exact where that is quick, else by subspace iteration (Halko et al. 2011)."""
    if min(matrix.shape) <= EXACT:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :count], s[:count], vh[:count].T
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, q=min(*matrix.shape, count + 16), niter=4)
    return u[:, :count], s[:count], v[:, :count]


def save_adapters(folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], alpha: float) -> None:
    """Both published forms of an adapter: peft's folder, and ``comfyui.safetensors`` in it.

    Raises:
        OutputError: not writable; nothing half-written is left.
    """
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    config = {
        "peft_type": "LORA",
        "r": len(next(iter(factors.values()))[0]),
        "lora_alpha": alpha,
        "target_modules": sorted(factors),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    for file, content in (("adapter_model.safetensors", tensors), ("comfyui.safetensors", comfy_keys(factors, alpha))):
        with atomic_path(folder / file) as temporary:
            save_file(content, temporary, metadata={"format": "pt"})
            share(Path(temporary))
    with atomic_path(folder / "adapter_config.json") as temporary:
        Path(temporary).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def comfy_keys(factors: Mapping[str, tuple[Tensor, Tensor]], alpha: float) -> dict[str, Tensor]:
    """Names that ComfyUI and most Wan tools use: ``diffusion_model.<layer>.lora_down.weight``."""
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"diffusion_model.{name}.lora_down.weight"] = a.contiguous()
        tensors[f"diffusion_model.{name}.lora_up.weight"] = b.contiguous()
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(float(alpha))
    return tensors
