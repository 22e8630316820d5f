"""What each part of the objective does: students of the procedural world against their teacher, on held-out tasks.

    python benchmarks/ablation.py                       # everything: students, videos, measurements, table and figure
    python benchmarks/ablation.py train --jobs 8        # only the students; a run that was stopped goes on
    python benchmarks/ablation.py sample --device cuda  # only their latents
    python benchmarks/ablation.py measure --jobs 2      # only pixels and numbers: table.md, tables/, figure.png

All in ``results/ablation`` (``--out``); what is there is not made again. The encoded clips of training are those of
``configs/train/tiny_vdot.yaml``. Students differ in what VARIANTS says and in nothing else: same steps, batches, noise.
Videos are what the networks make, without the source's own pixels put back. Tasks, metrics and the score are
``vdot.evaluate``'s: 512 held-out tasks, no combination of colour, shape and motion of which is in training.
``less DMD`` and ``less teacher``: differences of scores on the same clips and noise, over the seeds that both ran with.
A second table has, alike, what is followed and what is kept, each in percent of what the teacher gets.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vdot.checkpoints import inspect_checkpoint, load_dit, load_vae  # noqa: E402
from vdot.data.batch import collate  # noqa: E402
from vdot.data.dataset import EncodedSource  # noqa: E402
from vdot.data.encoding import EncodeConfig, encode_table  # noqa: E402
from vdot.data.sprites.scene import SHIPPED, VIEWS  # noqa: E402
from vdot.data.world import WorldConfig  # noqa: E402
from vdot.distillation.draws import Draws  # noqa: E402
from vdot.distillation.networks import Network  # noqa: E402
from vdot.errors import InputError, VdotError  # noqa: E402
from vdot.evaluate import Table, benchmark_tasks, compare_scores, evaluate, reference_points  # noqa: E402
from vdot.evaluate.benchmark import FIRST_SEED  # noqa: E402
from vdot.evaluate.classifier import classify, load_classifier  # noqa: E402
from vdot.evaluate.distribution import frechet, sliced_wasserstein  # noqa: E402
from vdot.evaluate.measure import METRICS  # noqa: E402
from vdot.evaluate.report import ALL, Difference, tabulate  # noqa: E402
from vdot.evaluate.report import Row as Measured  # noqa: E402
from vdot.parallel.state import Ranks  # noqa: E402
from vdot.pipeline import checkpoint_schedule  # noqa: E402
from vdot.runtime import pick_device  # noqa: E402
from vdot.sampling import RELEASE_NOISE_LEVELS, FewStepSchedule, sample  # noqa: E402
from vdot.training.metrics import read_metrics  # noqa: E402
from vdot.video import from_model  # noqa: E402
from vdot.video.output import atomic_path  # noqa: E402

NO_GAN = ("distill.gan.weight=0", "distill.gan.critic_weight=0")
# The optimizer sees ratios of weights: with 0.2 for DMD instead of 1 for DMD and OT together, 0.5 becomes 0.1.
GAN_BESIDE_DMD = "distill.gan.weight=0.1"
RELEASE_WEIGHTS = ("distill.balance=release", "distill.gan.weight=0.1")
# The release tells the network shift 8 and noises with shift 16.
MISMATCH = ("distill.schedule.shift=8", f"distill.schedule.noise_levels={[round(x, 6) for x in RELEASE_NOISE_LEVELS]}")
VARIANTS: dict[str, tuple[str, ...]] = {
    "DMD": ("distill.ot_weight=0", *NO_GAN),
    "DMD + GAN": ("distill.ot_weight=0", GAN_BESIDE_DMD),
    "DMD + OT": NO_GAN,
    "OT": ("distill.dmd.weight=0", *NO_GAN),
    "DMD + OT + GAN": (),
    "unbalanced OT": ("distill.ot.reach=1.0",),
    "release weights": RELEASE_WEIGHTS,
    "release schedule": MISMATCH,
}
BASE, WHOLE = "DMD", "DMD + OT + GAN"
TEACHER_FEW = "teacher, 4 steps"
OTHER_STEPS = (1, 2, 8)  # at which the whole objective's student is sampled as well
BATCH = 64


@dataclass(frozen=True)
class Row:
    """One line of the table: a checkpoint under a schedule."""

    name: str
    seed: int
    checkpoint: Path
    schedule: FewStepSchedule

    @property
    def key(self) -> str:
        return f"{slug(self.name)}-{self.seed}"


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name).replace("___", "_").lower()


def student(out: Path, name: str, seed: int) -> Path:
    return out / "students" / f"{slug(name)}-{seed}"


# --- train -----------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    """Every student that has no export yet, ``args.jobs`` at a time."""
    todo = [(name, seed) for seed in range(args.seeds) for name in args.variants]
    todo = [(name, seed) for name, seed in todo if not (student(args.out, name, seed) / "export").is_dir()]
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))

    def run(name: str, seed: int) -> None:
        folder = student(args.out, name, seed)
        folder.mkdir(parents=True, exist_ok=True)
        # What a variant is comes last: --view far is run with another shift, which must not undo MISMATCH.
        options = [f"output_dir={folder}", f"seed={seed}", *args.overrides, *VARIANTS[name]]
        command = [sys.executable, str(ROOT / "training" / "train.py"), "--config", args.config, *options]
        with (folder / "log.txt").open("a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": threads}
            code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
        print(f"{name}, seed {seed}: " + ("trained" if code == 0 else f"exit code {code}, see {folder}/log.txt"))

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, *zip(*todo, strict=True))) if todo else None


# --- sample ----------------------------------------------------------------------------------------------------------


def rows_of(args: argparse.Namespace) -> list[Row]:
    """Teacher, then the students that are trained; seeds of a checkpoint that was not trained here are noises."""
    teacher = checkpoint_schedule(inspect_checkpoint(args.teacher))
    few = replace(teacher, steps=4)
    seeds = range(args.seeds)
    rows = [Row(f"teacher, {teacher.steps} steps", seed, args.teacher, teacher) for seed in seeds]
    rows += [Row(TEACHER_FEW, seed, args.teacher, few) for seed in seeds]
    for name in args.variants:
        for seed in seeds:
            export = student(args.out, name, seed) / "export"
            if not export.is_dir():
                continue
            own = checkpoint_schedule(inspect_checkpoint(export))
            rows.append(Row(name, seed, export, own))
            if name == WHOLE and seed == 0:
                rows += [Row(f"{name}, {n} step{'s' * (n > 1)}", 0, export, own.override(steps=n)) for n in OTHER_STEPS]
    if args.model is not None:
        own = checkpoint_schedule(inspect_checkpoint(args.model))
        rows += [Row("shipped", seed, args.model, own) for seed in seeds]
    return rows


def open_tasks(args: argparse.Namespace, device: torch.device) -> EncodedSource:
    """The benchmark's tasks, encoded once."""
    folder = args.out / "tasks"
    world = WorldConfig(clips=args.count, seed=FIRST_SEED, split="test", view=args.view)
    config = EncodeConfig(world=world, ckpt_dir=str(args.teacher), out=str(folder), store="float32", workers=args.jobs)
    encode_table(config, device, Ranks())
    return EncodedSource(folder, keep=args.count)


@torch.no_grad()
def make_latents(row: Row, source: EncodedSource, device: torch.device) -> Tensor:
    """``[n, 16, F, H, W]`` without references, float16; every task has noise of its own, the same for all rows."""
    network = Network(load_dit(row.checkpoint, "float32", device).eval())
    negative = source.negative().float().to(device)
    made: dict[int, Tensor] = {}
    groups: dict[object, list[int]] = {}
    for index, shape in enumerate(source.shapes):
        groups.setdefault(shape, []).append(index)
    for indices in groups.values():
        for first in range(0, len(indices), BATCH):
            part = indices[first : first + BATCH]
            batch = collate([source.load(i) for i in part], part).to(device)
            draws = Draws(row.seed, 0, "ablation", part, batch.shape.latent, device)
            generator = torch.Generator("cpu").manual_seed(row.seed)

            def velocity(x: Tensor, t: Tensor, batch=batch) -> Tensor:
                return network.guided(x, t, batch, negative, row.schedule.guide_scale)

            x = sample(velocity, draws.noise("start"), row.schedule, generator)
            made |= dict(zip(part, x[:, :, batch.references :].cpu().half(), strict=True))
    return torch.stack([made[i] for i in range(len(source))])


def sample_rows(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    source = open_tasks(args, device)
    (args.out / "latents").mkdir(parents=True, exist_ok=True)
    for row in rows_of(args):
        path = args.out / "latents" / f"{row.key}.safetensors"
        if not path.is_file():
            latents = make_latents(row, source, device)
            with atomic_path(path) as temporary:
                save_file({"latents": latents}, temporary)
            print(f"{row.key}: {len(latents)} videos, {row.schedule.evaluations} evaluations each", flush=True)


# --- measure ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode(latents: Tensor, checkpoint: Path, device: torch.device) -> list[np.ndarray]:
    """uint8 ``[T, H, W, 3]`` each."""
    vae = load_vae(checkpoint, "float32", device)
    return [from_model(video.cpu()) for part in latents.split(16) for video in vae.decode(part.float().to(device))]


def known_points(args: argparse.Namespace) -> dict:
    """What the truth and what deserves nothing get, made once."""
    path = args.out / "points.json"
    if not path.is_file():
        points = reference_points(benchmark_tasks(args.count, view=args.view))
        with atomic_path(path) as temporary:
            Path(temporary).write_text(json.dumps(points))
    return json.loads(path.read_text())


def measure_row(args: argparse.Namespace, key: str, count: int) -> None:
    """``tables/KEY.json``: the first ``count`` tasks in every metric, and the distance to the real clips."""
    torch.set_num_threads(1)
    latents = load_file(args.out / "latents" / f"{key}.safetensors")["latents"][:count]
    tasks = list(benchmark_tasks(args.count, view=args.view))[:count]
    videos = decode(latents, args.teacher, torch.device("cpu"))
    distances = {}
    if args.classifier.is_file():
        model = load_classifier(args.classifier)
        made, real = (classify(model, clips).features for clips in (videos, [task.video for task in tasks]))
        distances = {"frechet": frechet(made, real), "sliced_wasserstein": sliced_wasserstein(made, real)}
    pairs = list(zip(tasks, videos, strict=True))
    evaluate(pairs, points=known_points(args), distances=distances).save(args.out / "tables" / f"{key}.json")
    print(f"measured {key}", flush=True)


def measure(args: argparse.Namespace) -> None:
    rows = rows_of(args)
    known_points(args)
    (args.out / "tables").mkdir(parents=True, exist_ok=True)
    todo = [row for row in rows if not (args.out / "tables" / f"{row.key}.json").is_file()]
    todo = [row for row in todo if (args.out / "latents" / f"{row.key}.safetensors").is_file()]
    with ProcessPoolExecutor(args.jobs) as pool:
        for future in [pool.submit(measure_row, args, row.key, args.count) for row in todo]:
            future.result()
    report(args, rows)


# --- report ----------------------------------------------------------------------------------------------------------


SHOWN = ("things_right", "scribble_f1", "depth_edges", "flow_control_error", "gray_error", "skeleton_overlap",
         "box_overlap", "kept_psnr", "seam", "reference_colour", "flicker")  # fmt: skip
FOLLOWED = [name for name, metric in METRICS.items() if metric.group in ("control", "kept")]


def load_table(path: Path) -> Table:
    """As measured. Tabulated anew: the file does not keep resamples, and differences are taken of those."""
    saved = json.loads(path.read_text())
    return tabulate([Measured(**clip) for clip in saved["clips"]], distances=saved["distances"])


def report(args: argparse.Namespace, rows: list[Row]) -> None:
    """``table.md`` and ``figure.png`` of what is measured."""
    tables: dict[str, dict[int, Table]] = {}
    evaluations = {row.name: row.schedule.evaluations for row in rows}
    for row in rows:
        path = args.out / "tables" / f"{row.key}.json"
        if path.is_file():
            tables.setdefault(row.name, {})[row.seed] = load_table(path)
    if not tables:
        raise InputError(f"nothing in {args.out} is sampled yet: run the phase `sample` first")
    teacher = rows[0].name
    head = ["", "evaluations", "runs", "collapsed", "score", f"less {BASE}", "less teacher", "Frechet", "sliced W."]
    head += SHOWN
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for name, found in tables.items():
        cells = [name, str(evaluations[name]), str(len(found)), collapsed(args, name, found, tables), interval(found)]
        cells += ["" if other == name else gap(less(found, tables.get(other, {}))) for other in (BASE, teacher)]
        cells += [mean(found, lambda t, d=d: t.distances.get(d)) for d in ("frechet", "sliced_wasserstein")]
        cells += [mean(found, lambda t, m=m: t.cells[ALL][m].mean if m in t.cells[ALL] else None) for m in SHOWN]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| % better than the teacher, same clips and noise | " + " | ".join(FOLLOWED) + " |"]
    lines.append("|---|" + "--:|" * len(FOLLOWED))
    for name, found in tables.items():
        if name != teacher:
            cells = [percent(found, tables.get(teacher, {}), metric) for metric in FOLLOWED]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    (args.out / "table.md").write_text(text)
    print(text)
    draw(args, tables)


def less(found: dict[int, Table], others: dict[int, Table]) -> Difference | None:
    """Score less another row's on the same clips and noise, over the seeds that both ran with."""
    seeds = sorted(found.keys() & others.keys())
    return compare_scores([found[seed] for seed in seeds], [others[seed] for seed in seeds]) if seeds else None


def gap(difference: Difference | None) -> str:
    return "not measured" if difference is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*astuple(difference)[:3])


def percent(found: dict[int, Table], others: dict[int, Table], name: str) -> str:
    """How much better the mean of a metric is than another row's, over the seeds that both ran with."""
    both = [(found[seed].cells[ALL], others[seed].cells[ALL]) for seed in sorted(found.keys() & others.keys())]
    values = [(ours[name].mean, theirs[name].mean) for ours, theirs in both if name in ours and name in theirs]
    if not values:
        return "not measured"
    ours, theirs = np.mean(values, axis=0)
    return f"{100 * (ours - theirs) / abs(theirs) * (1 if METRICS[name].better == 'higher' else -1):+.1f}"


def collapsed(args: argparse.Namespace, name: str, found: dict[int, Table], tables: dict[str, dict[int, Table]]) -> str:
    """How many of a variant's students lost their way.

    One did if a step of it was not finite, if its gradient ended ten times as long as it began, or if its videos are
    twice as far from real ones (Frechet) as those of the teacher at as many steps, where it started.
    """
    if name not in args.variants:
        return ""
    start = next((table.distances.get("frechet", np.inf) for table in tables.get(TEACHER_FEW, {}).values()), np.inf)
    count = 0
    for seed, table in found.items():
        lines = metrics(student(args.out, name, seed))
        norms = [line["norm_generator"] for line in lines if line.get("norm_generator")]
        quarter = max(1, len(norms) // 4)
        grown = bool(norms) and np.median(norms[-quarter:]) > 10 * np.median(norms[:quarter])
        far = table.distances.get("frechet", 0.0) > 2 * start
        count += grown or far or any(line["bad_steps"] for line in lines[-1:])
    return str(count)


def metrics(run: Path) -> list[dict]:
    """The lines of a run's ``metrics.jsonl``, none where there is none."""
    path = run / "metrics.jsonl"
    return read_metrics(path) if path.is_file() else []


def interval(found: dict[int, Table]) -> str:
    """Mean over seeds, and its half width: over seeds where there are several, else over clips."""
    scores = [table.scores[ALL] for table in found.values()]
    if len(scores) == 1:
        return "{:.1f} ({:.1f} to {:.1f})".format(*scores[0])
    return f"{np.mean([s[0] for s in scores]):.1f} ± {np.std([s[0] for s in scores], ddof=1):.1f}"


def mean(found: dict[int, Table], value: Callable[[Table], float | None]) -> str:
    known = [v for v in map(value, found.values()) if v is not None]
    return f"{np.mean(known):.3g}" if known else "not measured"


def draw(args: argparse.Namespace, tables: dict[str, dict[int, Table]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (gaps, curves) = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    base = tables.get(BASE, next(iter(tables.values())))
    for place, (name, found) in enumerate(tables.items()):
        colour = "0.4" if name.startswith("teacher") else "tab:blue"
        difference = less(found, base)
        if difference is not None and found is not base:
            gaps.plot([difference.low, difference.high], [place, place], color=colour, linewidth=6, alpha=0.4)
            gaps.plot(difference.mean, place, "D", color=colour)
        points = [found[s].scores[ALL][0] - base[s].scores[ALL][0] for s in sorted(found.keys() & base.keys())]
        gaps.plot(points, [place] * len(points), "k.", markersize=5)
    gaps.axvline(0, color="k", linewidth=0.8)
    gaps.set_yticks(range(len(tables)), list(tables))
    gaps.invert_yaxis()
    gaps.set_xlabel(f"score less that of {BASE if BASE in tables else 'the teacher'}, same clips and noise")
    gaps.set_title("mean, 95% interval, and seeds (points)", fontsize=10)
    for name in args.variants:
        lines = metrics(student(args.out, name, 0))
        points = [(line["step"], line["norm_generator"]) for line in lines if line.get("norm_generator")]
        if points:
            steps, norms = np.array(points).T
            width = min(15, len(norms))
            smooth = np.convolve(np.log(norms), np.ones(width) / width, "valid")
            curves.semilogy(steps[len(steps) - len(smooth) :], np.exp(smooth), label=name)
    curves.set_xlabel("step")
    curves.set_ylabel("norm of the generator's gradient, seed 0")
    if curves.lines:
        curves.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(args.out / "figure.png", dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", nargs="?", choices=("all", "train", "sample", "measure"), default="all")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the configuration of all students")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "ablation")
    parser.add_argument("--config", default="tiny_vdot")
    parser.add_argument("--teacher", type=Path, default=ROOT / "models" / "vace-tiny")
    parser.add_argument("--model", type=Path, help="one checkpoint more, as the row `shipped`")
    parser.add_argument("--classifier", type=Path, default=ROOT / "models" / "tiny-classifier.safetensors")
    parser.add_argument("--variants", type=lambda text: text.split(","), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=512, help="held-out tasks")
    parser.add_argument("--view", choices=tuple(VIEWS), default=SHIPPED, help="of the held-out tasks; an --out has one")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--device", help="for sampling")
    args = parser.parse_intermixed_args()
    phases = {"train": train, "sample": sample_rows, "measure": measure}
    try:
        for name, phase in phases.items():
            if args.phase in ("all", name):
                phase(args)
    except VdotError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
