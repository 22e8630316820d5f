"""One forward of VaceDiT against diffusers' WanVACETransformer3DModel holding the same weights, in turn in one run.

    python benchmarks/dit.py                  # every row; half an hour on 2 cores: compilation, and width 5120
    python benchmarks/dit.py --quick          # tiny size only, a minute
    python benchmarks/dit.py --threads 1      # CPU time instead of wall clock: for a machine that others use too
    python benchmarks/dit.py --device cuda    # 14B width, 480p and 720p x 81 frames (32760 and 75600 tokens)

``ratio`` is ours / diffusers' for equal work: both attend to 512 text rows. ``dropped`` is the ratio when we are told
the length of the prompt and leave its padding out, as our pipeline does; ``cudnn`` is that with ``--attention cudnn``
(CUDA, eager, half precision). ``share`` is counted FLOPs over time over the best matrix product of the same run, of
ours and of cudnn (with the work that dropping leaves out counted as done). The difference in bfloat16 is that of each
(ours / diffusers') from the float32 result, on CUDA on a smaller grid: diffusers keeps the residual stream in bfloat16,
we keep it in float32 as the original does.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from common import (
    DTYPES,
    count_flops,
    difference,
    interleave,
    library_dit,
    matmul_peak,
    medians,
    milliseconds,
    random_dit,
    ratio,
    table,
)
from torch import Tensor

from vdot.models.attention import set_attention_backend
from vdot.models.presets import PRESETS, DitConfig
from vdot.models.vace import VaceDiT

PROMPT_ROWS = 40  # tokens of a typical prompt, of 512
HEAD = ("case", "tokens", "dtype", "mode", "ours", "diffusers", "ratio", "dropped", "cudnn", "share", "difference")


@dataclass(frozen=True)
class Case:
    """A network and the latents ``[16, F, H, W]`` it works on."""

    name: str
    config: DitConfig
    latents: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        frames, height, width = self.latents
        return frames * (height // 2) * (width // 2)

    @property
    def small(self) -> "Case":
        """The same network on a grid that float32 attention can afford."""
        frames, height, width = self.latents
        return replace(self, latents=(min(frames, 5), min(height, 30), min(width, 52)))


def few_layers(dim: int, ffn_dim: int, heads: int, layers: int) -> DitConfig:
    """Real widths; every second block gets a hint."""
    return DitConfig(dim, ffn_dim, heads, layers, vace_layers=tuple(range(0, layers, 2)))


TINY = PRESETS["tiny"].dit
CASES = (
    Case("tiny 17x128x128", TINY, (5, 16, 16)),
    Case("tiny 17x288x128", TINY, (5, 36, 16)),
    Case("tiny 33x256x256", TINY, (9, 32, 32)),
    Case("dim 1536, 2+1 blocks", few_layers(1536, 8960, 12, 2), (8, 32, 32)),
    Case("dim 1536, 2+1 blocks", few_layers(1536, 8960, 12, 2), (16, 32, 32)),
    Case("dim 5120, 1+1 blocks", few_layers(5120, 13824, 40, 1), (8, 32, 32)),
)
CUDA_CASES = (
    Case("14B width, 2+1 blocks, 81x480x832", few_layers(5120, 13824, 40, 2), (21, 60, 104)),
    Case("14B width, 2+1 blocks, 81x720x1280", few_layers(5120, 13824, 40, 2), (21, 90, 160)),
)


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    t: Tensor
    text: Tensor
    context: Tensor

    @classmethod
    def draw(cls, case: Case, device: str) -> "Inputs":
        g = torch.Generator().manual_seed(1)
        text = torch.zeros(1, case.config.text_len, case.config.text_dim)
        text[:, :PROMPT_ROWS] = torch.randn(1, PROMPT_ROWS, case.config.text_dim, generator=g)
        drawn = (
            torch.randn(1, 16, *case.latents, generator=g),
            torch.tensor([751]),
            text,
            torch.randn(1, 96, *case.latents, generator=g),
        )
        return cls(*(value.to(device) for value in drawn))


def contestants(dit: VaceDiT, inputs: Inputs, dtype: torch.dtype, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """The three calls that are timed; each takes inputs in the dtype that its own pipeline would pass."""
    library = library_dit(dit, dtype)
    low = [value.to(dtype) for value in (inputs.x, inputs.text, inputs.context)]
    scale = low[2].new_ones(len(dit.config.vace_layers))
    if compiled:
        torch._dynamo.reset()
        for block in (*dit.blocks, *dit.vace_blocks):
            block.compile(fullgraph=True)
        library.compile_repeated_blocks(fullgraph=True)
    calls: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: dit(inputs.x, inputs.t, inputs.text, inputs.context),
        "dropped": lambda: dit(inputs.x, inputs.t, inputs.text, inputs.context, lengths=[PROMPT_ROWS]),
        "diffusers": lambda: library(
            hidden_states=low[0],
            timestep=inputs.t,
            encoder_hidden_states=low[1],
            control_hidden_states=low[2],
            control_hidden_states_scale=scale,
            return_dict=False,
        )[0],
    }
    if inputs.x.is_cuda and dtype != torch.float32 and not compiled:

        def cudnn() -> Tensor:
            set_attention_backend(dit, "cudnn")
            try:
                return calls["dropped"]()
            finally:
                set_attention_backend(dit, "sdpa")

        calls["cudnn"] = cudnn
    return calls


def usable(calls: dict[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
    """Calls each once, which warms it up or compiles it; cuDNN's attention may have no kernel here."""
    for name in list(calls):
        try:
            calls[name]()
        except RuntimeError as error:
            if name != "cudnn":
                raise
            print(f"cudnn: {str(error).splitlines()[0][:100]}", flush=True)
            del calls[name]
    return calls


def agreement(calls: dict[str, Callable[[], Tensor]], exact: Tensor, dtype: torch.dtype) -> str:
    """Stops the benchmark if they do not compute the same thing. Calls each once, which warms it up or compiles it."""
    limit = 1e-4 if dtype == torch.float32 else 0.05
    found = {name: difference(call(), exact) for name, call in calls.items()}
    for name, (_, relative) in found.items():
        if relative > limit:
            raise SystemExit(f"{name} is {relative:.2%} off: not the same network, nothing to compare")
    if dtype == torch.float32:
        return f"max {found['ours'][0]:.1e}"
    return f"{found['ours'][1]:.2%} / {found['diffusers'][1]:.2%}"


@lru_cache(maxsize=1)
def reference(case: Case, device: str) -> Tensor:
    """diffusers' eager float32 result."""
    return contestants(random_dit(case.config, device=device), Inputs.draw(case, device), torch.float32, False)[
        "diffusers"
    ]()


def measure(case: Case, dtype_name: str, compiled: bool, device: str, seconds: float) -> list[str]:
    """One row of the table."""
    dtype = DTYPES[dtype_name]
    inputs = Inputs.draw(case, device)
    exact = reference(case.small if device.startswith("cuda") else case, device)
    with torch.device("meta"):  # counted, not computed
        shapes = VaceDiT(case.config)
    flops = count_flops(lambda: shapes(*(v.to("meta") for v in (inputs.x, inputs.t, inputs.text, inputs.context))))
    dit = random_dit(case.config, dtype, device)
    if device.startswith("cuda"):
        agree = agreement(usable(contestants(dit, Inputs.draw(case.small, device), dtype, False)), exact, dtype)
        calls = usable(contestants(dit, inputs, dtype, compiled))
    else:
        calls = contestants(dit, inputs, dtype, compiled)
        agree = agreement(calls, exact, dtype)
    peak = matmul_peak(dtype, device)
    taken = interleave(calls, seconds, device, rounds=(2, 60))
    peak = max(peak, matmul_peak(dtype, device))
    median = medians(taken)
    shares = ", ".join(f"{flops / median[name] / peak:.0%}" for name in ("ours", "cudnn") if name in median)
    return [
        case.name,
        str(case.tokens),
        dtype_name,
        "compiled" if compiled else "eager",
        milliseconds(median["ours"]),
        milliseconds(median["diffusers"]),
        f"{ratio(taken['ours'], taken['diffusers']):.2f}",
        f"{ratio(taken['dropped'], taken['diffusers']):.2f}",
        f"{ratio(taken['cudnn'], taken['diffusers']):.2f}" if "cudnn" in taken else "-",
        f"{flops / 1e9:.0f} GFLOP, {shares} of {peak / 1e9:.0f} GFLOP/s",
        agree,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny size, eager, a second per row")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; cuda measures 14B widths in bfloat16")
    parser.add_argument("--dtype", choices=DTYPES, help="only this one")
    parser.add_argument("--threads", type=int, help="of torch; with 1, CPU time is measured (default: all, wall clock)")
    parser.add_argument("--mode", choices=("eager", "compiled"), help="only this one")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=12.0, help="time to measure each row for (default 12)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    cuda = args.device.startswith("cuda")
    cases = [case for case in (CUDA_CASES if cuda else CASES) if args.case in case.name]
    dtypes = [args.dtype] if args.dtype else ["bfloat16"] if cuda else list(DTYPES)
    modes = [args.mode] if args.mode else ["eager"] if args.quick else ["eager", "compiled"]
    if args.quick:
        cases, args.seconds = [case for case in cases if cuda or case.config is TINY][:2], 1.0
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, device {args.device}", flush=True)
    rows = []
    with torch.no_grad():
        for case in cases:
            for dtype in dtypes:
                for mode in modes:
                    rows.append(measure(case, dtype, mode == "compiled", args.device, args.seconds))
                    print("  ".join(rows[-1]), flush=True)
    print("\n" + table(HEAD, rows))


if __name__ == "__main__":
    main()
