"""What training the small models of the procedural world costs on a CPU, each choice beside the one it replaced.

    python benchmarks/small_training.py                   # two minutes; both cores of a laptop are enough
    python benchmarks/small_training.py --only attention  # or norms, cache

attention: a training step of the tiny transformer, 32 clips of 80 tokens, compiled blocks; PyTorch's fused attention
against plain products. norms: a training step of the tiny autoencoder, 4 clips of 17x64x64; eager against compiled
norms. cache: 32 such clips encoded, all together against eight at a time. Matrix products in bfloat16. The two
contestants of a line run in turn, warmed up; times are medians, the ratio is of neighbours.
"""

import argparse
from collections.abc import Callable

import torch
from common import interleave, medians, ratio, table
from diffusers import AutoencoderKLWan

import vdot.models.attention as attention
from vdot.data.encoding import TOGETHER, TOGETHER_ON_CPU
from vdot.models.presets import PRESETS
from vdot.models.vace import VaceDiT
from vdot.models.vae import WanVAE
from vdot.models.vae_whole import WholeClipVAE, start

CLIPS, FRAMES, SIDE = 32, 17, 64
Run = Callable[[], None]


def attention_runs() -> dict[str, Run]:
    dit = VaceDiT(PRESETS["tiny"].dit)
    x, context = torch.randn(CLIPS, 16, 5, 8, 8), torch.randn(CLIPS, 96, 5, 8, 8)
    text, t = torch.randn(CLIPS, 24, 128), 1000 * torch.rand(CLIPS)

    def step(few_scores: int) -> None:
        attention.FEW_SCORES = few_scores
        with torch.autocast("cpu", torch.bfloat16):
            velocity = dit(x, t, text, context, lengths=(text.shape[1],) * CLIPS)
        velocity.float().square().mean().backward()
        dit.zero_grad()

    kept = attention.FEW_SCORES
    torch._dynamo.config.recompile_limit = 64
    for block in (*dit.blocks, *dit.vace_blocks):
        block.compile()
    return {"fused": lambda: step(0), "products": lambda: step(kept)}


def norm_runs() -> dict[str, Run]:
    clips = 2 * torch.rand(4, 3, FRAMES, SIDE, SIDE) - 1

    def step(network: WholeClipVAE) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            made = network.decode(network.encode(clips)[0])
        (made.float() - clips).abs().mean().backward()
        network.zero_grad()

    def network(compiled: bool) -> WholeClipVAE:
        model = AutoencoderKLWan(base_dim=PRESETS["tiny"].vae_base_dim)
        start(model, 0)
        return WholeClipVAE(model, compiled).train()

    eager, compiled = network(False), network(True)
    return {"eager norms": lambda: step(eager), "compiled norms": lambda: step(compiled)}


def cache_runs() -> dict[str, Run]:
    model = AutoencoderKLWan(base_dim=PRESETS["tiny"].vae_base_dim)
    vae = WanVAE(model.to(torch.bfloat16)).requires_grad_(False).channels_last()
    clips = 2 * torch.rand(CLIPS, 3, FRAMES, SIDE, SIDE) - 1

    def encode(together: int) -> None:
        for part in clips.split(together):
            vae.encode(part)

    return {f"{n} together": lambda n=n: encode(n) for n in (TOGETHER, TOGETHER_ON_CPU)}  # type: ignore[misc]


CASES = {"attention": attention_runs, "norms": norm_runs, "cache": cache_runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--seconds", type=float, default=15, help="of each line")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name in [args.only] if args.only else CASES:
        taken = interleave(CASES[name](), args.seconds)
        before, now = ([f"{kind} {seconds:.3f} s"] for kind, seconds in medians(taken).items())
        slow, quick = taken.values()
        rows.append([name, *before, *now, f"{ratio(quick, slow):.2f}"])
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(table(["what", "before", "now", "ratio"], rows))


if __name__ == "__main__":
    main()
