"""What the benchmarks share: fair timing, the machine's own peak, and diffusers' networks with our weights."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import WanVACETransformer3DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vdot.checkpoints.keymaps import DIT
from vdot.models.presets import DitConfig
from vdot.models.vace import VaceDiT

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def clock(device: str = "cpu") -> float:
    """Wall-clock seconds; on a single thread CPU seconds, which what else runs on the machine does not disturb."""
    synchronize(device)
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def interleave(
    calls: Mapping[str, Callable[[], Any]], seconds: float, device: str = "cpu", rounds: tuple[int, int] = (3, 60)
) -> dict[str, list[float]]:
    """Time ``calls``, warmed up, in turn, forwards and backwards alternately, so that drift hits all alike.

    Rounds until ``seconds`` have passed, at least and at most ``rounds`` of them.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order, start = list(calls), time.perf_counter()
    for i in range(rounds[1]):
        if i >= rounds[0] and time.perf_counter() - start > seconds:
            break
        for name in order if i % 2 == 0 else reversed(order):
            begin = clock(device)
            calls[name]()
            taken[name].append(clock(device) - begin)
    return taken


def medians(taken: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in taken.items()}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios of calls made next to each other: steadier than the ratio of medians on a shared machine."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def matmul_peak(dtype: torch.dtype, device: str = "cpu", size: int | None = None) -> float:
    """FLOP/s of the best of a few square matrix products: what this machine reaches now, not its data sheet."""
    n = size or (8192 if device.startswith("cuda") else 2048)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    _ = a @ b
    taken = interleave({"matmul": lambda: a @ b}, 0.5, device, rounds=(5, 20))
    return 2 * n**3 / min(taken["matmul"])


def count_flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in one eager ``call``."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Weights like those of a trained network in scale; nothing is zero, so every branch counts in a comparison.

    Drawn where they are: on a GPU a billion numbers take no time. Each kind of device has its own numbers.
    """
    generator = torch.Generator(next(module.parameters()).device).manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator, device=generator.device)
        if p.ndim >= 2 and not name.endswith(("modulation", "gamma")):
            p.data = noise / math.sqrt(p[0].numel())
        else:
            p.data = 1 + 0.1 * noise if "norm" in name or name.endswith("gamma") else 0.1 * noise


def cast(module: nn.Module, dtype: torch.dtype, islands: Sequence[str]) -> nn.Module:
    """Parameters in ``dtype`` but for those whose names contain one of ``islands``."""
    for name, p in module.named_parameters():
        if not any(island in name for island in islands):
            p.data = p.data.to(dtype)
    return module


def random_dit(config: DitConfig, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> VaceDiT:
    with torch.device("meta"):
        dit = VaceDiT(config)
    dit.to_empty(device=device)
    randomise(dit, seed)
    cast(dit, dtype, VaceDiT.FLOAT32_ISLANDS)
    return dit.eval().requires_grad_(False)


def library_dit(dit: VaceDiT, dtype: torch.dtype = torch.float32) -> WanVACETransformer3DModel:
    """diffusers' network holding the same tensors; in bfloat16 with the float32 islands it loads with."""
    c = dit.config
    arguments: dict[str, Any] = {
        "num_attention_heads": c.num_heads,
        "attention_head_dim": c.head_dim,
        "text_dim": c.text_dim,
        "freq_dim": c.freq_dim,
        "ffn_dim": c.ffn_dim,
        "num_layers": c.num_layers,
        "eps": c.eps,
        "vace_layers": list(c.vace_layers),
    }
    with torch.device("meta"):
        library = WanVACETransformer3DModel(**arguments)
    weights = {}
    for name, tensor in dit.state_dict().items():
        key = DIT.to_library(name)
        assert key is not None, name
        weights[key] = tensor
    library.load_state_dict(weights, strict=True, assign=True)
    # The rotary buffers are not part of a state dict, and were made on the meta device.
    library.rope = type(library.rope)(c.head_dim, c.patch_size, 1024).to(dit.patch_embedding.weight.device)
    cast(library, dtype, library._keep_in_fp32_modules)
    return library.eval().requires_grad_(False)


def difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Largest absolute difference, and the relative one in the 2-norm."""
    a, b = a.double(), b.double()
    return (a - b).abs().max().item(), ((a - b).norm() / b.norm()).item()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
