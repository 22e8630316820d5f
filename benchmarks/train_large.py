"""Training steps at real size on one GPU: seconds, share of the matrix products' peak, memory beside the plan's count.

    python benchmarks/train_large.py --config vace_1_3b_lora                 # all four kinds of step; 24 GB by count
    python benchmarks/train_large.py --config vdot_14b_lora --layers 10      # a quarter of the depth
    python benchmarks/train_large.py --config vace_1_3b --kinds critic
    python benchmarks/train_large.py --quick --device cpu                    # tiny: does it run?

The steps are those of ``training/train.py`` (vdot.training.objectives.Distill, forward, backward and optimizer) with
the settings of ``configs/train/NAME.yaml`` but for one clip of 832x480x81 in a batch, on one process. Weights, latents,
conditions and prompt embeddings are random and made on the device; nothing is read from a disk. Operations are those
of the plan (vdot.training.plan), for the number of sampling steps that were really taken; what the optimizer does is
not counted and is in the time. "counted" memory is the plan's, without what it assumes for CUDA itself.
"""

import argparse
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, clock, matmul_peak, milliseconds, table
from torch import Tensor

import vdot.training.networks as networks
from vdot.config import load_config
from vdot.data.batch import Batch, Example, Shape, collate
from vdot.distillation.steps import judges, terms_of
from vdot.models.presets import PRESETS, DitConfig
from vdot.models.vace import VaceDiT
from vdot.parallel.launch import arrange
from vdot.parallel.state import Ranks
from vdot.training.config import TrainConfig
from vdot.training.memory import Phase, TrainingMemory, plan_memory
from vdot.training.metrics import Timer
from vdot.training.objectives import Distill
from vdot.training.plan import StepCost, forward_flops

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "train"
KINDS = {"scores": "generator, DMD and OT", "gan": "generator, GAN", "critic": "critic", "judge": "critic that judges"}
TEXT_ROWS, NEGATIVE_ROWS = 120, 100  # in the same bucket as the 96 that the plan counts with
TINY = DitConfig(dim=48, ffn_dim=64, num_heads=4, num_layers=4, vace_layers=(0, 2), text_dim=128, text_len=256)


class RandomSource:
    """Encoded rows that nobody encoded: all of one task, each with a real clip. Index 0 is short: it warms up."""

    identity = "random"

    def __init__(self, dit: DitConfig, latent: tuple[int, int, int]) -> None:
        frames, height, width = latent
        self.dit = dit
        self.shapes = [Shape(0, min(2, frames), height, width), Shape(0, frames, height, width)]
        self.tasks, self.paired = ["depth"] * 2, [True] * 2

    def __len__(self) -> int:
        return 2

    def load(self, index: int) -> Example:
        g = torch.Generator().manual_seed(index)
        latent = self.shapes[index].latent
        context = torch.randn(self.dit.vace_in_dim, *latent[1:], generator=g)
        text, real = torch.randn(TEXT_ROWS, self.dit.text_dim, generator=g), torch.randn(latent, generator=g)
        return Example(text, context, real, 0, "depth", f"row {index}", index)

    def negative(self) -> Tensor:
        return torch.randn(NEGATIVE_ROWS, self.dit.text_dim, generator=torch.Generator().manual_seed(2))

    def close(self) -> None:
        pass


@torch.no_grad()
def random_dit(
    path: str, dtype: torch.dtype, device: torch.device, *, sharder: Any = None, config: DitConfig
) -> VaceDiT:
    """In place of ``load_dit``: the same module, split and typed alike, its weights drawn on the device."""
    with torch.device("meta"):
        dit = VaceDiT(config)
    for name, p in dit.named_parameters():
        island = any(fragment in name for fragment in VaceDiT.FLOAT32_ISLANDS)
        p.data = p.data.to(torch.float32 if island else dtype)
    if sharder is None:
        dit.to_empty(device=device)
    else:
        sharder.shard(dit, device)
    torch.manual_seed(0)
    for name, p in dit.named_parameters():
        own = p if sharder is None else sharder.local(p)[0]
        if p.ndim >= 2 and "modulation" not in name:
            own.normal_(0, 1 / math.sqrt(p.shape[1:].numel()))
        elif "norm" in name and name.endswith("weight"):
            own.fill_(1)
        else:
            own.normal_(0, 0.02)
    return dit.eval()


def settings(args: argparse.Namespace) -> TrainConfig:
    overrides = ["batch_size=1", "accumulation=1", "sample_every=0", "data.encoded=random", f"device={args.device}"]
    if args.compute:
        overrides.append(f"parallel.compute={args.compute}")
    return load_config(TrainConfig, CONFIGS / f"{args.config}.yaml", [*overrides, *args.overrides])


def size_of(config: TrainConfig, args: argparse.Namespace) -> DitConfig:
    """The preset that the configuration's checkpoint has, of ``--layers`` blocks."""
    dit = TINY if args.quick else next(p.dit for name, p in PRESETS.items() if name in (config.ckpt_dir or ""))
    layers = args.layers or dit.num_layers
    return replace(dit, num_layers=layers, vace_layers=tuple(i for i in dit.vace_layers if i < layers))


# --- which step is of which kind --------------------------------------------------------------------------------------


def is_of_kind(kind: str, step: int, config: TrainConfig) -> bool:
    d = config.distill
    if kind in ("critic", "judge"):
        return bool(step % d.generator_every) and judges(step, d) == (kind == "judge")
    return step % d.generator_every == 0 and ("gan" in terms_of(step, d)) == (kind == "gan")


def find_step(kind: str, objective: Distill, batch: Batch, exit_step: int) -> int:
    """The first step of this kind that samples ``exit_step + 1`` times."""
    config, role = objective.config, "critic" if kind in ("critic", "judge") else "generator"
    steps = objective.schedule.steps
    for step in range(10_000):
        if is_of_kind(kind, step, config):
            if objective._draws(step, role, batch).choice("exit", steps) == min(exit_step, steps - 1):
                return step
    raise SystemExit(f"with these settings no step is a {kind!r} step: leave it out of --kinds")


def flops_of(kind: str, step: int, objective: Distill, batch: Batch, exit_step: int) -> float:
    """Of the generator's or of the critic's half of a step, with the sampling steps that it took."""
    config, cost, latent = objective.config, objective.cost, batch.shape.latent
    total = cost.flops(step, latent)
    if kind not in ("critic", "judge"):  # such a step also trains the critic: as another one does
        every, judged = config.distill.generator_every, judges(step, config.distill)
        other = next((s for s in range(4 * every) if s % every and judges(s, config.distill) == judged), None)
        total -= cost.flops(other, latent) if other is not None else 0.0
    steps = objective.schedule.steps
    taken = min(exit_step, steps - 1) + 1
    return total + (taken - (steps + 1) / 2) * forward_flops(objective.networks.config, latent).total


def run_kind(kind: str, step: int, objective: Distill, batch: Batch, section: Any) -> dict[str, float]:
    if kind in ("critic", "judge"):
        differentiate: Callable = partial(objective._critic, step, section)
        return objective.critic.update(step, [batch], differentiate, section)
    return objective.generator.update(step, [batch], partial(objective._generator, step, section), section)


# --- measuring --------------------------------------------------------------------------------------------------------


def phase_of(kind: str, memory: TrainingMemory) -> Phase:
    name = "critic step" if kind in ("critic", "judge") else "generator step"
    return next(phase for phase in memory.phases if phase.name == name)


def allocated(device: torch.device, peak: bool = False) -> float:
    if device.type != "cuda":
        return 0.0
    return float(torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device))


def measure(
    kind: str, objective: Distill, batch: Batch, args: argparse.Namespace, memory: TrainingMemory, peak: float
) -> list[str]:
    device = objective.device
    step = find_step(kind, objective, batch, args.exit)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before, start = allocated(device), clock(device.type)
    timer: Callable[[str], AbstractContextManager] = Timer(device)
    values = run_kind(kind, step, objective, batch, timer)
    seconds = clock(device.type) - start
    parts = timer.step()  # type: ignore[attr-defined]
    flops = flops_of(kind, step, objective, batch, args.exit)
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    counted = memory.resident + phase_of(kind, memory).total
    shown = {name: value for name, value in values.items() if name.startswith(("loss", "norm", "ot_"))}
    print(f"{KINDS[kind]} (step {step}): " + ", ".join(f"{k} {v:.3g}" for k, v in shown.items()), flush=True)
    print("  " + ", ".join(f"{name} {milliseconds(value)}" for name, value in parts.items()), flush=True)
    return [
        KINDS[kind],
        milliseconds(seconds),
        f"{flops / 1e12:.4g}",
        f"{flops / seconds / 1e12:.3g}",
        f"{flops / seconds / peak:.0%}",
        f"{allocated(device, peak=True) / 1e9:.2f}",
        f"{counted / 1e9:.2f}",
        f"{before / 1e9:.2f} / {memory.resident / 1e9:.2f}",
        "not finite: " + " ".join(bad) if bad else "yes",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", help="key=value of the configuration, e.g. parallel.recompute=selective"
    )
    parser.add_argument("--config", default="vace_1_3b_lora", help="a name in configs/train")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, help="depth of the transformer (default: all)")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--latent", default="21,60,104", help="frames,rows,columns (default: 832x480, 81 frames)")
    parser.add_argument("--exit", type=int, default=0, help="sampling steps before the one that is trained (default 0)")
    parser.add_argument("--compute", choices=DTYPES, help="default: as the configuration says")
    parser.add_argument("--no_warmup", action="store_true", help="do not first run each kind on two latent frames")
    parser.add_argument("--quick", action="store_true", help="a tiny transformer and 3 x 8 x 8 latents")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        raise SystemExit(f"--kinds knows {', '.join(KINDS)}, not {', '.join(sorted(unknown))}")
    config, began, device = settings(args), time.perf_counter(), torch.device(args.device)
    dit = size_of(config, args)
    frames, height, width = (3, 8, 8) if args.quick else map(int, args.latent.split(","))
    source = RandomSource(dit, (frames, height, width))
    networks.load_dit = partial(random_dit, config=dit)
    memory = plan_memory(config, dit, source.shapes[1].latent, 1)
    print(f"plan in {time.perf_counter() - began:.1f} s", flush=True)
    torch.set_float32_matmul_precision("high" if config.parallel.tf32 else "highest")  # as training/train.py does
    ranks = Ranks()
    arrange(ranks, device, config.parallel.ulysses_size, config.parallel.ring_size)
    objective = Distill(config, ranks, device, source)
    short, batch = (collate([source.load(i)], [i]).to(device) for i in range(2))
    clock(args.device)  # everything is there
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"torch {torch.__version__}, {where}, {args.config}: width {dit.dim}, {dit.num_layers}+{len(dit.vace_layers)} "
        f"blocks, {StepCost(config, dit).tokens(batch.shape.latent)} tokens, recompute {config.parallel.recompute}, "
        f"built in {time.perf_counter() - began:.1f} s",
        flush=True,
    )
    for kind in [] if args.no_warmup else kinds:
        run_kind(kind, find_step(kind, objective, short, 0), objective, short, Timer(device))
    print(f"warm after {time.perf_counter() - began:.1f} s", flush=True)
    peak = matmul_peak(DTYPES[config.parallel.compute], args.device)
    rows = []
    for kind in kinds:
        rows.append(measure(kind, objective, batch, args, memory, peak))
        print("  " + "  ".join(rows[-1]), flush=True)
    print(f"\nbest matrix product {peak / 1e12:.4g} TFLOP/s; the plan's peak {memory.peak / 1e9:.2f} GB\n")
    head = ("step", "time", "TFLOP", "TFLOP/s", "share", "GB", "GB counted", "at rest / counted", "finite")
    print(table(head, rows), flush=True)


if __name__ == "__main__":
    main()
