"""WanVAE against diffusers' AutoencoderKLWan holding the same weights: encode and decode, in one run.

    python benchmarks/vae.py                  # base_dim 16, 9 frames of 160x96, float32: a check of everything
    python benchmarks/vae.py --device cuda    # base_dim 96, 81 frames of 832x480, bfloat16

First ways of driving it are tried on a short clip (--variants; all by default), one after another and each warmed
up, until --seconds have passed. Then the whole clip, in turn: diffusers, ours as it is, and the quickest variant of
encoding and of decoding. "share" is operations counted on the meta device, over time, over the best matrix product of
the same run. "memory" is the peak beside the weights and the clip that goes in. "difference" is the relative one, in
the 2-norm, from diffusers' float32 result on a small clip: latents / pixels.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from common import (
    DTYPES,
    clock,
    count_flops,
    difference,
    matmul_peak,
    milliseconds,
    randomise,
    table,
)
from diffusers import AutoencoderKLWan
from torch import Tensor

from vdot.models.vae import WanVAE

# --- contestants ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """How the network is driven. ``step``: latent frames at a time; None is WanVAE's own choice."""

    name: str
    step: int | None = None
    benchmark: bool = False  # cuDNN tries its kernels instead of guessing


VARIANTS = (
    Variant("ours"),
    Variant("step 2", 2),
    Variant("step 4", 4),
    Variant("tried", benchmark=True),
    Variant("step 2, tried", 2, True),
)


class Contestant:
    """A WanVAE with the weights of ``library``, laid out as ``load_vae`` does, driven as ``variant`` says."""

    def __init__(self, library: AutoencoderKLWan, variant: Variant) -> None:
        self.variant = variant
        with torch.device("meta"):
            model = AutoencoderKLWan.from_config(library.config)
        model.load_state_dict(library.state_dict(), strict=True, assign=True)  # shares memory until laid out anew
        self.vae = WanVAE(model).requires_grad_(False).channels_last()
        if variant.step is not None:
            self.vae._step_frames = lambda batch, height, width: variant.step

    @contextmanager
    def ready(self) -> Iterator[None]:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = self.variant.benchmark
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before

    def encode(self, video: Tensor) -> Tensor:
        with self.ready():
            return self.vae.encode(video)

    def decode(self, latents: Tensor) -> Tensor:
        with self.ready():
            return self.vae.decode(latents)


class Library:
    """diffusers' own loop, with its normalisation of latents outside, as its pipelines have it."""

    def __init__(self, model: AutoencoderKLWan) -> None:
        self.model = model
        mean, std = (
            torch.tensor(values, device=model.device).view(1, -1, 1, 1, 1)
            for values in (model.config.latents_mean, model.config.latents_std)
        )
        self.mean, self.std = mean, std

    def encode(self, video: Tensor) -> Tensor:
        return (self.model.encode(video.to(self.model.dtype)).latent_dist.mode().float() - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode((latents * self.std + self.mean).to(self.model.dtype)).sample.float()


# --- measuring -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    base_dim: int
    frames: int
    height: int
    width: int
    dtype: torch.dtype
    device: str

    def network(self, dtype: torch.dtype) -> AutoencoderKLWan:
        """The same weights in every type."""
        with torch.device("meta"):
            model = AutoencoderKLWan(base_dim=self.base_dim)
        model.to_empty(device=self.device)
        randomise(model)
        return model.to(dtype).eval().requires_grad_(False)

    def clip(self, frames: int, height: int | None = None, width: int | None = None) -> Tensor:
        """Smooth in space and time, [-1, 1]."""
        g = torch.Generator().manual_seed(frames)
        nodes = torch.randn(1, 3, max(2, frames // 8), 8, 13, generator=g)
        size = (frames, height or self.height, width or self.width)
        return F.interpolate(nodes.to(self.device), size, mode="trilinear").clamp_(-1, 1)

    def latents(self, frames: int, height: int | None = None, width: int | None = None) -> Tensor:
        g = torch.Generator().manual_seed(frames)
        rows, columns = (height or self.height) // 8, (width or self.width) // 8
        return torch.randn(1, 16, (frames + 3) // 4, rows, columns, generator=g).to(self.device)

    def flops(self, stage: str) -> float:
        """Of the whole clip: from the third latent frame on each costs the same."""
        with torch.device("meta"):
            vae = WanVAE(AutoencoderKLWan(base_dim=self.base_dim)).requires_grad_(False)

        def count(frames: int) -> int:
            if stage == "encode":
                video = torch.empty(1, 3, frames, self.height, self.width, device="meta")
                return count_flops(lambda: vae.encode(video))
            latents = torch.empty(1, 16, (frames + 3) // 4, self.height // 8, self.width // 8, device="meta")
            return count_flops(lambda: vae.decode(latents))

        near, far = count(9), count(13)
        return near + (self.frames - 9) / 4 * (far - near)


def measured(call: Callable[[], Tensor], device: str) -> tuple[float, float]:
    """Seconds, and peak bytes above the state before (0 where nothing counts them)."""
    cuda, before = device.startswith("cuda"), 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = clock(device)
    call()
    seconds = clock(device) - start
    return seconds, float(torch.cuda.max_memory_allocated() - before) if cuda else 0.0


def repeated(call: Callable[[], Tensor], device: str, rounds: int) -> tuple[float, float]:
    """Best time and highest peak."""
    taken, peaks = zip(*(measured(call, device) for _ in range(rounds)), strict=True)
    return min(taken), max(peaks)


Exact = tuple[Tensor, Tensor, Tensor, Tensor]  # video, its latents, latents, their pixels


def exact_results(case: Case) -> Exact:
    """diffusers' float32 result on a small clip."""
    reference = Library(case.network(torch.float32))
    frames, height, width = 17, min(case.height, 128), min(case.width, 160)
    video, latents = case.clip(frames, height, width), case.latents(frames, height, width)
    return video, reference.encode(video), latents, reference.decode(latents)


def differences(contestant: Contestant | Library, exact: Exact) -> tuple[float, float]:
    video, encoded, latents, decoded = exact
    return difference(contestant.encode(video), encoded)[1], difference(contestant.decode(latents), decoded)[1]


def agreement(contestant: Contestant, exact: Exact, theirs: tuple[float, float]) -> str:
    """``RuntimeError`` if this is not the same network; rounding may differ by as much again as ``theirs``."""
    found = differences(contestant, exact)
    if not all(ours <= 2 * other + 1e-4 for ours, other in zip(found, theirs, strict=True)):
        raise RuntimeError(f"{found[0]:.1e} / {found[1]:.1e} off: not the same network")
    return f"{found[0]:.1e} / {found[1]:.1e}"


def screen(
    case: Case, library: AutoencoderKLWan, args: argparse.Namespace, exact: Exact, theirs: tuple[float, float]
) -> dict[str, Variant]:
    """Times of each variant on a short clip, and the quickest for encoding and for decoding."""
    given = {"encode": case.clip(args.screen_frames), "decode": case.latents(args.screen_frames)}
    best: dict[str, tuple[float, Variant]] = {}
    rows, start = [], time.perf_counter()
    for variant in (v for v in VARIANTS if not args.variants or v.name in args.variants.split(";")):
        if rows and time.perf_counter() - start > args.seconds:
            print(f"no time for {variant.name!r}", flush=True)
            continue
        row = [variant.name]
        try:
            contestant = Contestant(library, variant)
            agree = "" if variant.benchmark else agreement(contestant, exact, theirs)  # new shapes take time to try
            for stage, tensor in given.items():
                call = partial(getattr(contestant, stage), tensor)
                call()  # warms up
                seconds, memory = repeated(call, case.device, args.rounds)
                if stage not in best or seconds < best[stage][0]:
                    best[stage] = seconds, variant
                row += [milliseconds(seconds), f"{memory / 1e9:.2f} GB"]
            row.append(agree)
        except RuntimeError as error:  # one way that fails must not hide the others
            row = [variant.name, f"failed: {str(error).splitlines()[0][:80]}", "", "", "", ""]
        rows.append(row)
        print("  ".join(row), flush=True)
    head = ("variant", "encode", "memory", "decode", "memory", "difference")
    print(f"\n{args.screen_frames} frames:\n\n{table(head, rows)}\n", flush=True)
    return {stage: variant for stage, (_, variant) in best.items()}


def whole(case: Case, library: AutoencoderKLWan, args: argparse.Namespace, best: dict[str, Variant]) -> None:
    """The whole clip: diffusers, ours as it is, the quickest."""
    rows = []
    for stage in ("decode", "encode"):
        make = case.clip if stage == "encode" else case.latents
        contestants: dict[str, Contestant | Library] = {
            "diffusers": Library(library),
            "ours": Contestant(library, VARIANTS[0]),
        }
        if stage in best and best[stage] != VARIANTS[0]:
            contestants[best[stage].name] = Contestant(library, best[stage])
        tensor, short = make(case.frames), make(min(case.frames, args.screen_frames))
        for name, contestant in contestants.items():
            if name == "diffusers":  # the others have been warmed up with just these shapes
                getattr(contestant, stage)(make(9))
            elif name != "ours" or args.variants:
                getattr(contestant, stage)(short)
        flops, peak = case.flops(stage), matmul_peak(case.dtype, case.device)
        results = {
            name: repeated(partial(getattr(c, stage), tensor), case.device, args.rounds)
            for name, c in contestants.items()
        }
        peak = max(peak, matmul_peak(case.dtype, case.device))
        for name, (seconds, memory) in results.items():
            share = f"{flops / seconds / 1e12:.3g} of {peak / 1e12:.3g} TFLOP/s: {flops / seconds / peak:.0%}"
            ratio = f"{seconds / results['diffusers'][0]:.2f}"
            rows.append([stage, name, milliseconds(seconds), ratio, share, f"{memory / 1e9:.2f} GB"])
            print("  ".join(rows[-1]), flush=True)
        print(f"{stage}: {flops / 1e12:.4g} TFLOP", flush=True)
    print(f"\n{case.frames} frames:\n\n{table(('stage', 'way', 'time', 'of diffusers', 'share', 'memory'), rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 elsewhere")
    parser.add_argument("--base_dim", type=int, help="default: 16 on the CPU, else 96, the published width")
    parser.add_argument("--size", help="width*height (default: 160*96 on the CPU, else 832*480)")
    parser.add_argument("--frames", type=int, help="of the whole clip (default: 9 on the CPU, else 81)")
    parser.add_argument("--screen_frames", type=int, help="of the short clip (default: 9 on the CPU, else 33)")
    parser.add_argument("--variants", default="", help="names, separated by semicolons; default all")
    parser.add_argument("--seconds", type=float, default=40, help="no variant is begun after these (default 40)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--no_whole", action="store_true", help="the short clip only")
    args = parser.parse_args()
    cpu = args.device == "cpu"
    width, height = (int(n) for n in (args.size or ("160*96" if cpu else "832*480")).split("*"))
    dtype = DTYPES[args.dtype or ("float32" if cpu else "bfloat16")]
    frames = args.frames or (9 if cpu else 81)
    args.screen_frames = args.screen_frames or (9 if cpu else 33)
    case = Case(args.base_dim or (16 if cpu else 96), frames, height, width, dtype, args.device)
    where = args.device if cpu else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {where}, {dtype}, base_dim {case.base_dim}, {width}x{height}", flush=True)
    torch.backends.cudnn.allow_tf32 = False  # the float32 result is what the others are held against
    with torch.no_grad():
        exact = exact_results(case)
        library = case.network(dtype)
        theirs = differences(Library(library), exact)
        print(f"diffusers is {theirs[0]:.1e} / {theirs[1]:.1e} from its float32 result", flush=True)
        best = screen(case, library, args, exact, theirs)
        if not args.no_whole:
            whole(case, library, args, best)


if __name__ == "__main__":
    main()
