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

from vdot.errors import ConfigError, MissingDependencyError
from vdot.models.vace import VaceDiT
from vdot.training.config import LoraConfig

ADAPTERS = ("generator", "fake")
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


def save_peft(folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], alpha: float) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors`` as ``peft`` and diffusers read them."""
    rank = len(next(iter(factors.values()))[0])
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(factors),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_comfy(path: Path, factors: Mapping[str, tuple[Tensor, Tensor]], alpha: float) -> None:
    """One file with the keys that ComfyUI and most Wan tools use: ``diffusion_model.<layer>.lora_down.weight``."""
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"diffusion_model.{name}.lora_down.weight"] = a.contiguous()
        tensors[f"diffusion_model.{name}.lora_up.weight"] = b.contiguous()
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, path, metadata={"format": "pt"})
