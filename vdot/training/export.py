"""The student as a checkpoint that the pipeline, the release's tools or diffusers load."""

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from vdot.checkpoints import inspect_checkpoint, load_text_encoder, load_vae, save_checkpoint
from vdot.models.vace import VaceDiT
from vdot.parallel.state import Ranks
from vdot.request import Defaults
from vdot.runtime import log
from vdot.sampling import FewStepSchedule
from vdot.training.config import TrainConfig
from vdot.training.lora import save_adapters
from vdot.training.networks import Networks
from vdot.training.optim import Ema


def export(
    config: TrainConfig, networks: Networks, ema: Ema | None, schedule: FewStepSchedule, folder: Path, ranks: Ranks
) -> Path:
    """Write the generator (its moving average, where there is one) into ``folder``; returns that.

    ``native`` goes into ``folder`` itself, other layouts into folders beside it, adapters into ``folder-lora``.
    Collective: the weights are brought together on the first rank, which writes.

    Raises:
        OutputError: not writable; nothing half-written is left.
    """
    if not config.export_layouts:
        return folder
    dit = next(iter(networks.dits.values()))
    with ema.swapped(dit) if ema is not None else nullcontext():
        weights = gather(networks, ranks)
    targets = {
        layout: folder if layout == "native" else folder.with_name(f"{folder.name}-{layout}")
        for layout in config.export_layouts
    }
    with ranks.agree():
        if ranks.rank == 0:
            _write(config, networks, weights, schedule, targets, folder.with_name(f"{folder.name}-lora"), ema)
    return folder


@torch.no_grad()
def gather(networks: Networks, ranks: Ranks) -> dict[str, Tensor]:
    """The generator's whole weights by name, on the CPU of the first rank; empty on the others. Collective."""
    if networks.adapters is not None:
        merged = networks.adapters.merged("generator")
        return {name: value.cpu() for name, value in merged.items()} if ranks.rank == 0 else {}
    weights = {}
    for name, parameter in networks.dits["generator"].named_parameters():
        value = parameter.detach()
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        if ranks.rank == 0:
            weights[name] = value.to("cpu", copy=True)  # the average is about to be swapped out again
    return weights


def _write(
    config: TrainConfig,
    networks: Networks,
    weights: dict[str, Tensor],
    schedule: FewStepSchedule,
    targets: dict[str, Path],
    lora: Path,
    ema: Ema | None,
) -> None:
    assert config.ckpt_dir is not None
    with torch.device("meta"):
        dit = VaceDiT(networks.config)
    dit.load_state_dict(weights, strict=True, assign=True)
    info = inspect_checkpoint(config.ckpt_dir)
    # The encoders are copied as they are, so that the export is complete by itself.
    text_encoder = load_text_encoder(config.ckpt_dir, info.parts["text_encoder"].stored_dtype, mmap=True)
    vae = load_vae(config.ckpt_dir, "float32")
    defaults = info.defaults or Defaults()
    for layout, target in targets.items():
        options = {"layout": layout, "schedule": schedule.to_dict(), "defaults": defaults, "dtype": config.export_dtype}
        save_checkpoint(target, dit, text_encoder, vae, overwrite=True, **options)  # type: ignore[arg-type]
        log.info("exported %s", target)
        if layout == "diffusers" and schedule.solver == "renoise":
            log.info("note  diffusers has no solver that adds fresh noise: its folder samples with UniPC")
    if networks.adapters is not None:
        _write_lora(networks, lora, ema)
        log.info("exported %s: adapter_model.safetensors (peft) and comfyui.safetensors", lora)


def _write_lora(networks: Networks, folder: Path, ema: Ema | None) -> None:
    assert networks.adapters is not None
    settings = networks.adapters.config
    with ema.swapped(networks.dits["base"]) if ema is not None else nullcontext():
        factors = networks.adapters.factors("generator")
    save_adapters(folder, factors, settings.alpha or settings.rank)
