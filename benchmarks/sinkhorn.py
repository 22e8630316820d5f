"""Sinkhorn engines side by side: time, peak memory and marginal error of cost + gradient, in one run.

    python benchmarks/sinkhorn.py frames                 # [21, 1560, 16]: ours, the unrolled formulation, POT, geomloss
    python benchmarks/sinkhorn.py frames --device cuda   # the same on a GPU, with the Triton engine
    python benchmarks/sinkhorn.py large                  # 6240 points (a full-resolution frame), 32,760 (a whole clip)
    python benchmarks/sinkhorn.py variants               # iterations of the accelerations, to three errors
    python benchmarks/sinkhorn.py kernel --device cuda   # parts of a call through Triton; blocks; the GPU's clock

Clouds are two unrelated smooth random latents, pooled as in training. Each measurement runs in a process of its own
(peak memory is that of the process above its state before the run; on CUDA all share one, where the allocator's peak is
told), contenders take turns for ``--rounds`` rounds, and medians are reported. Contenders that hold N x M matrices per
iteration are timed on fewer frames; times are per frame.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "transport")]
from transport_oracle import cost_matrix, unrolled_gradient  # noqa: E402

from vdot.transport import latents_to_clouds, ot_gradient, sinkhorn  # noqa: E402
from vdot.transport.engines import Streamed  # noqa: E402
from vdot.transport.iterate import iterate, start  # noqa: E402
from vdot.transport.problem import LN2, Problem, build, working_clouds  # noqa: E402
from vdot.transport.result import measure as measure_transport  # noqa: E402
from vdot.transport.sinkhorn import choose_engine  # noqa: E402

EPS = 0.1
Result = tuple[float | None, int | None]  # marginal error, iterations


def smooth_latents(seed: int, frames: int, height: int = 60, width: int = 104) -> Tensor:
    """``[1,T,16,H,W]``: a random field of 8 x 13 nodes that drifts over time, and white noise of a seventh of it."""
    g = torch.Generator().manual_seed(seed)
    nodes = F.interpolate(torch.randn(1, 16, 6, 8, 13, generator=g), (frames, 8, 13), mode="trilinear")[0].transpose(
        0, 1
    )
    fine = F.interpolate(nodes, (height, width), mode="bicubic")
    return (fine + 0.15 * torch.randn(frames, 16, height, width, generator=g))[None]


def clouds(kind: str, frames: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    options = {
        "frames": {},
        "full": {"pooling": 1},
        "clip": {"clouds": "clip"},
        "fullclip": {"pooling": 1, "clouds": "clip"},
    }
    x, y = (latents_to_clouds(smooth_latents(s, frames), **options[kind]).to(device) for s in (1, 2))
    return x.contiguous(), y.contiguous()


# --- contenders: (x, y) -> worst marginal error over the batch, iterations; each computes cost and gradient


def ours(x: Tensor, y: Tensor, **options: object) -> Result:
    out = sinkhorn(x, y, eps=EPS, **options)
    _ = out.cost, out.gradient
    return out.marginal_error.max().item(), int(out.iterations.max())


def ours_unrolled(x: Tensor, y: Tensor, **options: object) -> Result:
    ot_gradient(x, y, eps=EPS, max_iters=60, tol=0, gradient="unrolled", **options)
    return None, 60


def plan_error(plan: Tensor) -> float:
    rows, cols = plan.sum(-1) - 1 / plan.shape[-2], plan.sum(-2) - 1 / plan.shape[-1]
    return (rows.abs().sum(-1) + cols.abs().sum(-1)).max().item()


def release_formulation(x: Tensor, y: Tensor) -> Result:
    """Autograd through 60 log-domain iterations, frame by frame, as released (in float32)."""
    errors = [plan_error(unrolled_gradient(x[i : i + 1], y[i : i + 1], eps=EPS)[2]) for i in range(len(x))]
    return max(errors), 60


def pot_per_frame(x: Tensor, y: Tensor, tol: float) -> Result:
    import ot

    errors, iters = [], 0
    for a, b in zip(x, y, strict=True):
        cost = cost_matrix(a[None], b[None])[0]
        w, v = (torch.full((len(z),), 1 / len(z), dtype=z.dtype, device=z.device) for z in (a, b))
        # POT stops on the Euclidean norm of one marginal's error: this bounds the L1 norm by tol.
        plan, log = ot.bregman.sinkhorn_log(w, v, cost, EPS, numItermax=1000, stopThr=tol / math.sqrt(len(a)), log=True)
        _ = 2 * (a * plan.sum(1, keepdim=True) - plan @ b)
        errors.append(plan_error(plan))
        iters = max(iters, int(log["niter"]))
    return max(errors), iters


def pot_batched(x: Tensor, y: Tensor, tol: float) -> Result:
    from ot.batch import solve_batch

    out = solve_batch(cost_matrix(x, y), reg=EPS, max_iter=1000, tol=tol / x.shape[1] ** 0.5, method="log_sinkhorn")
    _ = 2 * (x * out.plan.sum(2, keepdim=True) - out.plan @ y)
    return plan_error(out.plan), int(out.log["n_iter"])


def geomloss(x: Tensor, y: Tensor, scaling: float, backend: str = "tensorized") -> Result:
    """SamplesLoss halves squared distances: blur^2 = eps / 2. The error is its potentials', outside the clock."""
    from geomloss import SamplesLoss

    options = {"p": 2, "blur": (EPS / 2) ** 0.5, "scaling": scaling, "debias": False, "backend": backend}
    z = x.clone().requires_grad_()
    torch.autograd.grad(SamplesLoss("sinkhorn", **options)(z, y).sum(), z)
    mark_end()
    f, g = SamplesLoss("sinkhorn", potentials=True, **options)(x, y)
    logits = 2 * (f.reshape(len(x), -1, 1) + g.reshape(len(x), 1, -1)) - cost_matrix(x, y)
    return plan_error((logits / EPS).exp() / (x.shape[1] * y.shape[1])), None


CONTENDERS: dict[str, Callable[[Tensor, Tensor], Result]] = {
    "release: unrolled autograd, 60 it": release_formulation,
    "ours: exact unrolled gradient, 60 it": ours_unrolled,
    "ours: closed form, 60 plain it": lambda x, y: ours(x, y, max_iters=60, tol=0),
    "ours: closed form, error 1e-2": lambda x, y: ours(x, y, tol=1e-2),
    "ours: closed form, error 1e-3": lambda x, y: ours(x, y, tol=1e-3),
    "ours: streamed (no N x M), error 1e-3": lambda x, y: ours(x, y, tol=1e-3, engine="streamed"),
    "ours: compiled, error 1e-3": lambda x, y: ours(x, y, tol=1e-3, engine="compiled"),
    "ours: Triton, 60 plain it": lambda x, y: ours(x, y, max_iters=60, tol=0, engine="triton"),
    "ours: Triton, error 1e-3": lambda x, y: ours(x, y, tol=1e-3, engine="triton"),
    "POT sinkhorn_log, error 1e-2": lambda x, y: pot_per_frame(x, y, 1e-2),
    "POT sinkhorn_log, error 1e-3": lambda x, y: pot_per_frame(x, y, 1e-3),
    "POT solve_batch, error 1e-3": lambda x, y: pot_batched(x, y, 1e-3),
    "geomloss tensorized, scaling 0.5": lambda x, y: geomloss(x, y, 0.5),
    "geomloss tensorized, scaling 0.9": lambda x, y: geomloss(x, y, 0.9),
    "geomloss tensorized, scaling 0.98": lambda x, y: geomloss(x, y, 0.98),
    "geomloss online, scaling 0.9": lambda x, y: geomloss(x, y, 0.9, "online"),
    "ours: 2 plain it": lambda x, y: ours(x, y, max_iters=2, tol=0),
}
HEAVY = ("release", "POT", "geomloss")  # N x M matrices for every iteration, or for every frame at once


# --- one measurement, in a child process

_end: list[tuple[float, int]] = []  # when, and the CUDA allocator's peak until then


def mark_end() -> None:
    """The part to be timed ends here; what follows is checking."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    _end.append((time.perf_counter(), torch.cuda.max_memory_allocated() if cuda else 0))


def peak_above_now(run: Callable[[], Result], device: str) -> tuple[Result, float, float]:
    """Result, seconds, and peak MB above the state before: the allocator's on CUDA, else the resident set's (1 ms)."""
    process, peak, stop = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not stop.wait(0.001):
            if not _end:
                peak[0] = max(peak[0], process.memory_info().rss - before)

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    watcher = threading.Thread(target=watch, daemon=True)  # a contender that fails must not live on in it
    _end.clear()
    begin = time.perf_counter()
    if device == "cpu":
        watcher.start()
    result = run()
    if not _end:
        mark_end()
    stop.set()
    if device == "cuda":
        peak[0] = _end[0][1] - before
    return result, _end[0][0] - begin, peak[0] / 2**20


def wake(seconds: float = 0.3) -> None:
    """Matrix products, so that a GPU that idled between contenders is at its full clock when the next one starts."""
    x, end = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16), time.perf_counter() + seconds
    while time.perf_counter() < end:
        x @ x
        torch.cuda.synchronize()


def measure(name: str, kind: str, frames: int, threads: int, device: str) -> dict[str, float | None]:
    torch.set_num_threads(threads)
    x, y = clouds(kind, frames, device)
    run = CONTENDERS[name]
    first = sinkhorn(x[:1, :64], y[:1, :64], eps=EPS)  # libraries loaded, threads started
    assert first.cost.isfinite().all()
    if "compiled" in name or device == "cuda":
        run(x, y)  # compilation is not what we measure
    if device == "cuda":
        wake()
    (error, iters), seconds, peak = peak_above_now(lambda: run(x, y), device)
    return {"seconds": seconds / len(x), "peak": peak, "error": error, "iterations": iters, "frames": len(x)}


def child(name: str, kind: str, frames: int, threads: int, device: str) -> dict[str, float | None] | str:
    if device == "cuda":  # the allocator counts exactly, also beside what ran before
        torch.cuda.empty_cache()
        try:
            return measure(name, kind, frames, threads, device)
        except (ImportError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}".splitlines()[0][:90]
    arguments = [name, kind, str(frames), str(threads), device]
    run = subprocess.run([sys.executable, __file__, "child", *arguments], capture_output=True, text=True)
    if run.returncode != 0:
        return (run.stderr.strip().splitlines() or ["killed: out of memory"])[-1][:90]
    return json.loads(run.stdout.splitlines()[-1])


def compare(names: list[str], kind: str, args: argparse.Namespace, frames: Callable[[str], int]) -> None:
    runs: dict[str, list] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            runs[name].append(child(name, kind, frames(name), args.threads, args.device))
    print("| contender | frames | ms per frame | peak MB of the run | marginal error | iterations | speed-up |")
    print("|---|---|---|---|---|---|---|")
    base = next((statistics.median(r["seconds"] for r in runs[n]) for n in names if isinstance(runs[n][0], dict)), 1.0)
    for name in names:
        if isinstance(runs[name][0], str):
            print(f"| {name} | - | {runs[name][0]} | | | | |")
            continue
        seconds, peak = (statistics.median(r[k] for r in runs[name]) for k in ("seconds", "peak"))
        last = runs[name][-1]
        error = "-" if last["error"] is None else f"{last['error']:.1e}"
        print(
            f"| {name} | {last['frames']} | {1000 * seconds:.1f} | {peak:.0f} | {error} | {last['iterations'] or '-'} "
            f"| {base / seconds:.1f} |"
        )


# --- which acceleration


def anderson(x: Tensor, y: Tensor, depth: int, budget: int) -> list[float]:
    """Row error at each iteration with Anderson(depth) mixing of g: tried, and slower than over-relaxation."""
    x, y, centre = working_clouds(x, y)
    problem = build(x, y, centre, x.new_full((1,), EPS), 2, (None, None), None)
    engine = choose_engine(problem, "cached", None)[0](problem)
    g, f, one, errors, steps = start(problem).g, None, torch.ones(1), [], []
    for k in range(budget):
        old = f
        f, new, row_lse, _ = engine.sweep(f, g, one)
        if old is not None:
            errors.append(((old + row_lse).exp2() - problem.log_a.exp2()).abs().sum().item())
        steps = [*steps, (new[0].double(), (new - g)[0].double())][-(depth + 1) :]
        g = new
        if k > 3:
            values, residuals = (torch.stack(z) for z in zip(*steps, strict=True))
            dv, dr = values.diff(dim=0), residuals.diff(dim=0)
            gram = dr @ dr.T
            gram += 1e-8 * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
            g = (values[-1] - torch.linalg.solve(gram, dr @ residuals[-1]) @ dv)[None].to(x)
    return errors


def first_below(errors: list[float], tol: float) -> str:
    return next((str(k + 1) for k, e in enumerate(errors) if e <= tol), "-")


def variants() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = clouds("frames", 1)
    white = [0.5 * torch.randn(1, 1560, 16, generator=g) for _ in range(2)]
    cases = {
        "smooth, unrelated": (x, y),
        "white, independent": tuple(white),
        "shifted and wider": (white[0], 1.3 * white[1] + 0.3),
        "x moved by noise 0.05": (x, x + 0.1 * white[0]),
    }
    tols, budget = [1e-2, 1e-3, 1e-4], 400
    ways = {
        "plain": {"relaxation": 1.0},
        "over-relaxed, adapted (ours)": {},
        "from 1.8, adapted": {"relaxation": 1.8},
        "plain, eps scaling 0.5": {"relaxation": 1.0, "eps_scaling": 0.5},
        "adapted, eps scaling 0.5": {"eps_scaling": 0.5},
    }
    print("Iterations to marginal error 1e-2 / 1e-3 / 1e-4 (eps 0.1, 1560 points; - is more than 400)\n")
    print("| variant | " + " | ".join(cases) + " |\n|---|" + "---|" * len(cases))
    for name, options in ways.items():
        cells = []
        for a, b in cases.values():
            extra = 0
            if "eps_scaling" in options:
                cost = cost_matrix(a, b).mean().item()
                extra = math.ceil(math.log(cost / EPS, 2))
            runs = [sinkhorn(a, b, eps=EPS, tol=t, max_iters=budget, **options) for t in tols]
            cells.append(" / ".join(str(int(r.iterations) + extra) if r.converged else "-" for r in runs))
        print(f"| {name} | " + " | ".join(cells) + " |")
    for depth in (3, 5, 8):
        runs = [anderson(a, b, depth, budget) for a, b in cases.values()]
        cells = [" / ".join(first_below(errors, t) for t in tols) for errors in runs]
        print(f"| Anderson({depth}) | " + " | ".join(cells) + " |")


# --- where a call through Triton spends its time


def milliseconds(run: Callable[[], object], device: str, repeats: int = 20) -> float:
    """Median of calls that are waited for."""
    taken = []
    for _ in range(repeats + 3):
        begin = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(1000 * (time.perf_counter() - begin))
    return statistics.median(taken[3:])


def clock() -> str:
    command = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def half_step_us(engine: Streamed, problem: Problem, sweeps: int = 200) -> float:
    """Of many iterations in one go, launched ahead of the device."""
    g, one = start(problem).g, torch.ones_like(problem.unit)
    f = engine.sweeps(None, g, one, 12).f
    return 1000 * milliseconds(lambda: engine.sweeps(f, g, one, sweeps), problem.s.device.type, 5) / sweeps / 2


def kernel(device: str, frames: int) -> None:
    from vdot.transport import kernels

    x, y = clouds("frames", frames, device)
    exponentials = x.shape[0] * x.shape[1] * y.shape[1]
    if device == "cuda":
        wake(1.0)
        print(f"clock, and most: {clock()}")
    moved, other, centre = working_clouds(x, y)
    problem = build(moved, other, centre, moved.new_full((len(x),), EPS), 2, (None, None), None)
    engine = kernels.TritonEngine(problem, 2**20)
    state = iterate(engine, start(problem), 60, 0.0, 1.0)
    one = torch.ones_like(problem.unit)

    def result() -> tuple[Tensor, Tensor]:
        out = measure_transport(engine, state, 0.0)
        return out.cost, out.gradient

    parts = {
        "whole call, 60 plain iterations": lambda: ours(x, y, max_iters=60, tol=0, engine="triton"),
        "whole call, error 1e-2": lambda: ours(x, y, tol=1e-2, engine="triton"),
        "whole call, error 1e-3": lambda: ours(x, y, tol=1e-3, engine="triton"),
        "checking and scaling": lambda: build(*working_clouds(x, y), problem.unit / LN2, 2, (None, None), None),
        "preparing points": lambda: engine.space.load(problem),
        "60 iterations": lambda: engine.sweeps(state.f, state.g, one, 60),
        "error, cost and gradient": result,
    }
    for name, run in parts.items():
        print(f"{name}: {milliseconds(run, device):.2f} ms")
    shapes = [(64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 3), (64, 128, 8, 3), (64, 32, 4, 3), (128, 64, 8, 3)]
    for shape in shapes if device == "cuda" else ():
        kernels.BLOCK_N, kernels.BLOCK_M, kernels.WARPS, kernels.STAGES = shape
        kernels._workspace.cache_clear()
        us = half_step_us(kernels.TritonEngine(problem, 2**20), problem)
        print(
            f"blocks {shape[0]} x {shape[1]}, {shape[2]} warps, {shape[3]} stages: {us:.1f} us a half-step, "
            f"{exponentials / us / 1e6:.2f} exponentials a ps, clock {clock()}"
        )


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        name, kind, frames, threads, device = sys.argv[2:7]
        print(json.dumps(measure(name, kind, int(frames), int(threads), device)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["frames", "large", "variants", "kernel"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 1 is the fair choice on a shared machine")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--frames", type=int, default=21)
    parser.add_argument("--only", default="", help="contenders whose name holds this, and the first")
    parser.add_argument("--skip", default="", help="no contenders whose name holds one of these, comma-separated")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"{args.what} on {args.device}, torch {torch.__version__}, {args.threads} thread(s), median of {args.rounds}\n"
    )
    names = [n for n in CONTENDERS if n != "ours: 2 plain it" and ("Triton" not in n or args.device == "cuda")]
    if args.skip:
        names = [n for n in names if not any(part in n for part in args.skip.split(","))]
    if args.what == "variants":
        variants()
    elif args.what == "kernel":
        kernel(args.device, args.frames)
    elif args.what == "frames":
        names = [n for n in names if n == names[0] or args.only in n]
        few = args.frames if args.device == "cuda" else 2
        compare(names, "frames", args, lambda n: few if n.startswith(HEAVY) else args.frames)
    else:
        print("One full-resolution frame, 6240 points a side\n")
        wanted = ("ours: closed form, error", "ours: streamed", "geomloss tensorized, scaling 0.9")  # POT: minutes
        chosen = [n for n in names if n.startswith(wanted)]
        compare(chosen, "full", args, lambda n: 1)
        print("\nA whole clip as one cloud: 21 x 1560 = 32,760 points a side (N x M would be 4.3 GB)\n")
        args.rounds = 1
        compare(["ours: closed form, error 1e-2"], "clip", args, lambda n: 21)
        print("\nFull resolution: 21 x 6240 = 131,040 points a side (N x M: 69 GB), two iterations and gradient\n")
        compare(["ours: 2 plain it"], "fullclip", args, lambda n: 21)


if __name__ == "__main__":
    main()
