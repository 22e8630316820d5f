"""What one video costs on 1 to 64 GPUs: a model on paper, from the code that would run, and what can be measured here.

    python benchmarks/scaling.py --out scaling.md                              # the model on paper: no GPU, two minutes
    torchrun --nproc_per_node=2 benchmarks/scaling.py --measure --out m.md     # two gloo processes, one thread each

On paper. The real networks, with the real sequence parallelism and the real shared autoencoder, run on the meta device
as rank 0 of N: floating-point operations and exchanged bytes are counted, not estimated. Times are those counts over
the speeds below, all of them flags. Nothing here was measured on a GPU.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import randomise, table
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vdot.memory import bytes_of
from vdot.models.attention import Attend
from vdot.models.dit import SelfAttention
from vdot.models.presets import PRESETS, DitConfig
from vdot.models.vace import VaceDiT
from vdot.models.vae import WanVAE
from vdot.parallel.mesh import Group, Mesh, choose_sizes, make_mesh
from vdot.parallel.ulysses import parallelize
from vdot.parallel.vae import SharedVAE

SPEEDS: dict[str, tuple[float, str]] = {
    "matmul_tflops": (600, "bfloat16 matrix products of a block on an H100/H200 SXM: 60% of the 989 of its data sheet"),
    "attention_tflops": (600, "FlashAttention-3, head 128, long sequences: its paper's 740 on an H100, less a fifth"),
    "memory_gbs": (4000, "HBM of an H200: 83% of the 4800 of its data sheet, for norms, rotation and modulation"),
    "vae_reference_s": (2.80, "Wan2.1-type decoding of 61 frames of 704x1280 in bfloat16 on an H200 (sglang PR 34125)"),
    "text_s": (0.05, "one prompt through UMT5-XXL: 11 GB of weights read once is 3 ms, the rest is launching kernels"),
    "link_gbs": (350, "all-to-all inside a machine, per GPU and direction: 78% of NVLink's 450"),
    "network_gbs": (45, "between machines, per GPU: 90% of a 400 Gb/s adapter each"),
    "latency_us": (30, "one collective, start to finish, beside its bytes"),
    "host_s": (0.25, "preparing pixels, collecting and writing the file, on one GPU or many"),
    "per_node": (8, "GPUs of a machine"),
}
SIZES = {"480p": (480, 832), "720p": (720, 1280)}
FRAMES = 81
RESIDUAL_PASSES = 38  # float32 reads and writes of [L, C] per block beside the matrix products, counted in dit.py


class Paper(Group):
    """A group whose exchanges move nothing and are counted."""

    def all_to_all(self, flat: Tensor, sent: list[int], sizes: list[int]) -> Tensor:
        log = self.process_group
        log.bytes += (flat.numel() - sent[self.rank]) * flat.element_size()
        log.calls += 1
        return flat.new_empty(sum(sizes))


@dataclass
class Count:
    """One stage on one rank."""

    matmul: float = 0.0  # floating-point operations
    attention: float = 0.0
    bytes: float = 0.0  # sent by this rank
    calls: int = 0
    log: Any = field(default=None, repr=False)


@dataclass
class Log:
    bytes: float = 0.0
    calls: int = 0


def paper_mesh(ulysses: int, ring: int, log: Log) -> Mesh:
    def group(size: int) -> Group:
        return Paper(size, 0, log) if size > 1 else Group()

    return Mesh(ulysses=group(ulysses), ring=group(ring), sequence=group(ulysses * ring))


def flops_of(run: Callable[[], Any]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def count_dit(dit: VaceDiT, latents: tuple[int, int, int], ulysses: int, ring: int) -> Count:
    """One forward of rank 0. Ring exchanges are counted by formula: keys and values of each other block pass once."""
    log, attention, moved = Log(), [0.0], [0.0]
    tokens = latents[0] * latents[1] * latents[2] // 4
    undo = parallelize(dit, paper_mesh(ulysses, ring, log))
    own = {
        id(m.attend.inner if ulysses * ring > 1 else m.attend) for m in dit.modules() if isinstance(m, SelfAttention)
    }

    def kernel(seam: Attend) -> Callable:
        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            attention[0] += (
                4.0 * q.shape[0] * q.shape[1] * (tokens if id(seam) in own else k.shape[1]) * q[0, 0].numel()
            )
            return torch.empty_like(q)

        return run

    import vdot.parallel.ulysses as module

    def on_paper(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], group: Group) -> Tensor:
        attention[0] += 4.0 * q.shape[0] * q.shape[1] * tokens * q[0, 0].numel()
        moved[0] += 2 * (sum(lengths) - lengths[-1]) * k[0, 0].numel() * k.element_size()
        log.calls += group.size - 1
        return torch.empty_like(q)

    seams = [(m, m.fn) for m in dit.modules() if isinstance(m, Attend)]
    original = module.ring_attention
    module.ring_attention = on_paper
    try:
        for seam, _ in seams:
            seam.fn = kernel(seam)
        f, h, w = latents
        x, context = (torch.empty(1, c, f, h, w, device="meta") for c in (16, 96))
        text = torch.empty(1, 512, dit.config.text_dim, device="meta")
        matmul = flops_of(lambda: dit(x, torch.zeros(1, device="meta"), text, context, lengths=[100]))
    finally:
        module.ring_attention = original
        for seam, fn in seams:
            seam.fn = fn
        undo()
    return Count(matmul, attention[0], log.bytes + moved[0], log.calls)


def count_vae(
    vae: WanVAE, height: int, width: int, ranks: int, frames: int = FRAMES, clips: int = 2
) -> dict[str, Count]:
    """Encoding ``clips`` (inactive and reactive are two) and decoding one, by rank 0 of ``ranks``."""
    counts = {}
    clip = torch.empty(3, frames, height, width, device="meta")
    latents = torch.empty(1, 16, (frames + 3) // 4, height // 8, width // 8, device="meta")
    for name in ("encode", "decode"):
        log = Log()
        shared = SharedVAE(vae, Paper(ranks, 0, log) if ranks > 1 else Group())
        if name == "encode":
            flops = flops_of(lambda shared=shared: shared._encode([clip] * clips) if clips else None)
        else:
            flops = flops_of(lambda shared=shared: shared.decode(latents, lambda x: x.to(torch.uint8)))
        counts[name] = Count(flops, 0.0, log.bytes, log.calls)
    return counts


@dataclass
class Row:
    gpus: int
    layout: str
    seconds: dict[str, float]
    moved: dict[str, float]
    held: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def model(
    args: argparse.Namespace, dit: VaceDiT, vae: WanVAE, size: str, gpus: int, rate: float, clips: int = 2
) -> Row:
    height, width = SIZES[size]
    f, h, w = (FRAMES + 3) // 4, height // 8, width // 8
    ulysses, ring = choose_sizes(gpus, heads=dit.config.num_heads, per_node=int(args.per_node))
    forward = count_dit(dit, (f, h, w), ulysses, ring)
    stages = count_vae(vae, height, width, gpus, clips=clips)
    inside = min(gpus, int(args.per_node)) == gpus
    link = 1e9 * (args.link_gbs if inside else args.network_gbs)
    tokens = f * h * w / 4 / gpus
    blocks = len(dit.blocks) + len(dit.vace_blocks)
    passes = RESIDUAL_PASSES * blocks * tokens * dit.config.dim * 4 / (1e9 * args.memory_gbs)
    compute = forward.matmul / (1e12 * args.matmul_tflops) + forward.attention / (1e12 * args.attention_tflops)
    # A ring's exchange hides behind attention; the all-to-all, which stays inside a machine, does not.
    exposed = forward.bytes / (1e9 * args.link_gbs) if inside else 0.0
    if not inside:
        exposed = count_dit(dit, (f, h, w), ulysses, 1).bytes / ring / (1e9 * args.link_gbs)
        hidden = (forward.bytes - exposed * 1e9 * args.link_gbs) / link
        exposed += max(0.0, hidden - forward.attention / (1e12 * args.attention_tflops))
    steps = args.steps
    seconds = {
        "text": args.text_s,
        "encode": _vae_seconds(stages["encode"], rate, link, args),
        "transformer": steps * (compute + passes + exposed + forward.calls * 1e-6 * args.latency_us * (gpus > 1)),
        "decode": _vae_seconds(stages["decode"], rate, link, args),
        "host": args.host_s,
    }
    moved = {"transformer, a step": forward.bytes, **{k: stages[k].bytes for k in ("encode", "decode")}}
    weights = bytes_of(dit)
    held = {"transformer whole": weights, "transformer sharded": weights / gpus, "text sharded": 11.4e9 / gpus}
    held["autoencoder"] = bytes_of(vae)
    return Row(gpus, f"{ulysses} x {ring}", seconds, moved, held)


def _vae_seconds(count: Count, rate: float, link: float, args: argparse.Namespace) -> float:
    return count.matmul / rate + count.bytes / link + count.calls * 1e-6 * args.latency_us


def on_paper(args: argparse.Namespace) -> str:
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        dit, vae = VaceDiT(PRESETS[args.model].dit).eval(), WanVAE(AutoencoderKLWan())
    # The reference's decoding, counted by the same code: operations per second of the whole stage, copies included.
    rate = count_vae(vae, 704, 1280, 1, 61)["decode"].matmul / args.vae_reference_s
    out = [f"# VDOT-{args.model} on paper, {FRAMES} frames, {args.steps} steps without guidance\n", _inputs(args, rate)]
    for size in SIZES:
        rows = [model(args, dit, vae, size, gpus, rate) for gpus in (1, 2, 4, 8, 16, 32, 64)]
        out += [f"\n## {size}, source and mask\n", _times(rows), _bytes(rows), _verdict(rows, size)]
    out += ["\n## 480p on 4 GPUs, by request and by speed\n", _kinds(args, dit, vae, rate)]
    return "\n".join(out) + "\n"


def _kinds(args: argparse.Namespace, dit: VaceDiT, vae: WanVAE, rate: float) -> str:
    """Constant clips cost nothing after the first video of a shape: they are remembered."""
    head = ["request", "transformer kernels", "encode", "transformer", "total s", "outside DiT"]
    slower = argparse.Namespace(**{**vars(args), "matmul_tflops": 380.0, "attention_tflops": 380.0})
    body = []
    for name, clips in (("text, references", 0), ("control clip", 1), ("clip and mask", 2)):
        for speed, given in (("as above", args), ("380 TFLOP/s", slower)):
            row = model(given, dit, vae, "480p", 4, rate, clips)
            s = row.seconds
            outside = f"{1 - s['transformer'] / row.total:.0%}"
            body.append([name, speed, f"{s['encode']:.2f}", f"{s['transformer']:.2f}", f"{row.total:.2f}", outside])
    why = "380: 100 forwards of Wan2.1-14B at 1280x768 in about 2000 s on one H100 (draft-attention issue 10)."
    return table(head, body) + "\n\n" + why


def _inputs(args: argparse.Namespace, rate: float) -> str:
    rows = [[f"`--{name}`", f"{getattr(args, name):g}", origin] for name, (_, origin) in SPEEDS.items()]
    rows.append(
        ["(follows)", f"{rate / 1e12:.0f}", "TFLOP/s of the autoencoder, from the reference's time and our count"]
    )
    return table(["input", "value", "origin"], rows)


def _times(rows: list[Row]) -> str:
    one = rows[0].seconds
    head = ["GPUs", "ulysses x ring", *one, "total s", "outside DiT", "DiT efficiency", "VAE speed-up"]
    body = []
    for row in rows:
        s = row.seconds
        vae = (one["encode"] + one["decode"]) / (s["encode"] + s["decode"])
        efficiency = one["transformer"] / s["transformer"] / row.gpus
        outside = 1 - s["transformer"] / row.total
        cells = [f"{v:.2f}" for v in s.values()]
        body.append(
            [str(row.gpus), row.layout, *cells, f"{row.total:.2f}", f"{outside:.0%}", f"{efficiency:.0%}", f"{vae:.1f}"]
        )
    return table(head, body)


def _bytes(rows: list[Row]) -> str:
    head = ["GPUs", *(f"sent: {k}, GB" for k in rows[0].moved), *(f"held: {k}, GB" for k in rows[0].held)]
    body = [[str(r.gpus), *(f"{v / 1e9:.2f}" for v in (*r.moved.values(), *r.held.values()))] for r in rows]
    return "\n" + table(head, body)


def _verdict(rows: list[Row], size: str) -> str:
    lines = []
    for row in rows:
        if row.gpus in (4, 8, 64):
            slowest = max(row.seconds, key=lambda name: row.seconds[name])
            rest = {k: v for k, v in row.seconds.items() if k != "transformer"}
            lines.append(
                f"- {size}, {row.gpus} GPUs: {slowest} is the limit ({row.seconds[slowest]:.2f} of {row.total:.2f} s); "
                f"of the rest, {max(rest, key=lambda name: rest[name])}."
            )
    return "\n" + "\n".join(lines)


# -- what this machine can measure -----------------------------------------------------------------------------------


def measure(rounds: int = 3) -> str | None:
    """The same work by one process, the others idle, and by all together; rank 0 returns the table."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = make_mesh("cpu", *choose_sizes(world, heads=6))
    dit = VaceDiT(DitConfig(dim=384, ffn_dim=1536, num_heads=6, num_layers=4, vace_layers=(0, 2), text_dim=64)).eval()
    vae = WanVAE(AutoencoderKLWan(base_dim=16))
    for network in (dit, vae):
        randomise(network)
        network.requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 16, 3, 30, 52, generator=g), torch.randn(1, 96, 3, 30, 52, generator=g)
    text, clip = torch.randn(1, 64, 64, generator=g), torch.rand(3, 5, 128, 208, generator=g) * 2 - 1
    latents = torch.randn(1, 16, 2, 16, 26, generator=g)
    together, alone = SharedVAE(vae, mesh.sequence), SharedVAE(vae, Group())

    def forward() -> Tensor:
        with torch.no_grad():
            return dit(x, torch.tensor([500.0]), text, context)

    def parallel() -> Tensor:
        undo = parallelize(dit, mesh)
        try:
            return forward()
        finally:
            undo()

    stages: dict[str, tuple[Callable, Callable]] = {
        "transformer, 1170 tokens": (forward, parallel),
        "encode two clips, 5 x 128 x 208": (
            lambda: alone.encode_clips([clip, clip * 0.5]),
            lambda: together.encode_clips([clip, clip * 0.5]),
        ),
        "encode one clip": (lambda: alone.encode_clips([clip]), lambda: together.encode_clips([clip])),
        "decode": (lambda: alone.decode(latents, lambda p: p), lambda: together.decode(latents, lambda p: p)),
    }
    rows = []
    for name, (one, all_) in stages.items():
        taken: dict[str, list[float]] = {"one": [], "all": []}
        for i in range(rounds + 1):
            for kind, call in (("one", one), ("all", all_)):
                dist.barrier()
                start = time.perf_counter()
                if kind == "all" or rank == 0:
                    call()
                dist.barrier()
                if i:  # the first round warms up
                    taken[kind].append(time.perf_counter() - start)
        a, b = (sorted(taken[kind])[rounds // 2] for kind in ("one", "all"))
        rows.append([name, f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}"])
    dist.destroy_process_group()
    if rank:
        return None
    head = f"# {world} gloo processes of one thread each, against one (median of {rounds}, seconds)\n\n"
    return head + table(["stage", "1 process", f"{world} processes", "speed-up"], rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="14B", choices=sorted(PRESETS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--measure", action="store_true", help="under torchrun: time this machine")
    parser.add_argument("--out", type=Path, help="also write the Markdown here")
    for name, (value, origin) in SPEEDS.items():
        parser.add_argument(f"--{name}", type=float, default=value, help=origin.replace("%", "%%"))
    args = parser.parse_args()
    text = measure() if args.measure else on_paper(args)
    if text is not None and int(os.environ.get("RANK", "0")) == 0:
        print(text)
        if args.out:
            args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
