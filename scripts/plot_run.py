"""Draw what training runs logged: one figure, a panel for each kind of number that metrics.jsonl has."""

import argparse
import fnmatch
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vdot.errors import InputError, VdotError
from vdot.training.metrics import FILE, read_metrics
from vdot.video.output import atomic_path

INK, QUIET, GRID = "#22313f", "#6b7885", "#e6e9ec"
COLOURS = ("#2a6f97", "#e07a3f", "#3a9e7e", "#8e5ea2", "#c9a227", "#c2506c", "#6b7885", "#5fb0c9", "#7a4b2a", "#a3b18a")
STYLES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (1, 3)), (0, (7, 2)), (0, (3, 1, 1, 1, 1, 1)))

HELP = """
examples
  python scripts/plot_run.py results/train/tiny                      writes results/train/tiny/metrics.png
  python scripts/plot_run.py runs/a runs/b runs/c -o compare.pdf     one colour per run
  python scripts/plot_run.py runs/a --only losses transport time     some panels
  python scripts/plot_run.py runs/a --smooth 1 --steps 500:          nothing smoothed, from step 500

panels, each drawn if the run has its numbers
{panels}
Strong lines are means over a window of steps (geometric ones on logarithmic axes), pale ones what was logged.
Ticks at the top of the losses mark steps whose update was skipped because a number was not finite.
Healthy: the marginal error of transport stays below 1e-2, logits of real and fake part slowly and do not run
away, the cosine of the terms is not near -1, gradient norms stay under the clip most of the time.
"""


@dataclass(frozen=True)
class Panel:
    """One pair of axes: which keys, how they are called, on what scale."""

    name: str
    title: str
    keys: tuple[str, ...]  # patterns of metrics.jsonl's keys
    prefix: str = ""  # taken off a key for its label
    unit: str = ""
    scale: str = "auto"  # auto: logarithmic when positive and over more than a decade; log; linear; unit: -1 to 1
    draw: Callable[..., None] | None = None
    smooth: bool = True


@dataclass(frozen=True)
class Run:
    """A run's numbers by key: the steps that have it, and its values (not a number where it was not finite)."""

    name: str
    series: dict[str, tuple[np.ndarray, np.ndarray]]

    def matching(self, patterns: Iterable[str]) -> list[str]:
        """Keys in the order of the patterns, then of the file; those without a finite value are left out."""
        found: dict[str, None] = {}
        for pattern in patterns:
            for key in fnmatch.filter(self.series, pattern):
                if np.isfinite(self.series[key][1]).any():
                    found.setdefault(key)
        return list(found)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_run(path: Path, span: tuple[float, float]) -> Run:
    """A run folder, or its metrics.jsonl."""
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file} does not exist: give the folder that a training run writes to (its output_dir)")
    points: dict[str, dict[int, float]] = {}
    for record in read_metrics(file):
        step = record["step"]
        for key, value in record.items():
            if span[0] <= step <= span[1] and key not in ("step", "time") and isinstance(value, int | float | None):
                points.setdefault(key, {})[step] = math.nan if value is None else float(value)
    if not points:
        raise InputError(f"{file} has no metrics yet (in these steps): let the run log a step first")
    folder = path if path.is_dir() else path.parent
    return Run(folder.resolve().name, {key: as_arrays(values) for key, values in points.items()})


def as_arrays(values: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    steps = np.array(sorted(values))
    return steps, np.array([values[step] for step in steps])


def distinct(runs: Sequence[Run]) -> list[Run]:
    """Names that tell the runs apart."""
    seen: dict[str, int] = {}
    named = []
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        named.append(Run(f"{run.name} ({seen[run.name]})" if seen[run.name] > 1 else run.name, run.series))
    return named


# --- drawing ---------------------------------------------------------------------------------------------------------


def smooth(values: np.ndarray, window: int, geometric: bool) -> np.ndarray:
    """Centred mean over ``window`` points, fewer at the ends; what is not finite is left out."""
    x = np.log(np.where(values > 0, values, np.nan)) if geometric else values.astype(float)
    good = np.isfinite(x)
    kernel = np.ones(min(window, len(x)))
    total = np.convolve(np.where(good, x, 0.0), kernel, "same")
    count = np.convolve(good.astype(float), kernel, "same")
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return np.exp(mean) if geometric else mean


def window_for(count: int, asked: int | None) -> int:
    """A fortieth of the run, odd so that it is centred."""
    return asked if asked is not None else max(1, count // 40 // 2 * 2 + 1)


def is_log(panel: Panel, values: list[np.ndarray]) -> bool:
    if panel.scale != "auto":
        return panel.scale == "log"
    flat = np.concatenate([v[np.isfinite(v)] for v in values])
    return bool((flat > 0).all() and np.percentile(flat, 99) > 10 * np.percentile(flat, 1))


def draw_lines(ax: Axes, panel: Panel, runs: Sequence[Run], window: int | None) -> None:
    keys = list(dict.fromkeys(key for run in runs for key in run.matching(panel.keys)))
    alone = len(runs) == 1
    log = is_log(panel, [run.series[key][1] for run in runs for key in run.matching(panel.keys)])
    for i, run in enumerate(runs):
        for j, key in enumerate(keys):
            if key not in run.series:
                continue
            steps, values = run.series[key]
            colour, style = (
                (COLOURS[j % len(COLOURS)], "-") if alone else (COLOURS[i % len(COLOURS)], STYLES[j % len(STYLES)])
            )
            width = window_for(len(steps), window) if panel.smooth else 1
            if width > 1:
                ax.plot(steps, values, color=colour, alpha=0.18 if alone else 0.08, linewidth=0.7)
            marker = "o" if len(steps) < 25 else None
            line = smooth(values, width, log)
            ax.plot(steps, line, linestyle=style, color=colour, linewidth=1.4, marker=marker, markersize=2.5)
    if panel.scale == "unit":
        ax.set_ylim(-1.05, 1.05)
        ax.axhline(0, color=QUIET, linewidth=0.6)
    elif log:
        logarithmic(ax)
    else:
        ax.margins(y=0.12)
    label(ax, panel, keys, alone)


def logarithmic(ax: Axes) -> None:
    ax.set_yscale("log", nonpositive="mask")
    low, high = np.log10(ax.get_ylim())
    if high - low < 1.5:  # powers of ten alone would leave one tick or none
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(short))
    ax.yaxis.set_minor_formatter(NullFormatter())


def label(ax: Axes, panel: Panel, keys: Sequence[str], alone: bool) -> None:
    """Names of the lines: none for a single one, whose panel is called so."""
    if len(keys) < 2:
        return
    handles = []
    for j, key in enumerate(keys):
        colour, style = (COLOURS[j % len(COLOURS)], "-") if alone else (INK, STYLES[j % len(STYLES)])
        text = key.removeprefix(panel.prefix).replace("_", " ")
        handles.append(Line2D([], [], color=colour, linestyle=style, linewidth=1.6, label=text))
    ax.legend(handles=handles, ncols=2 if len(keys) > 3 else 1)


def draw_losses(ax: Axes, panel: Panel, runs: Sequence[Run], window: int | None) -> None:
    draw_lines(ax, panel, runs, window)
    for i, run in enumerate(runs):
        steps, skipped = run.series.get("bad_steps", (np.array([]), np.array([])))
        at = steps[1:][np.diff(skipped) > 0]
        if len(at):
            colour = "#b3261e" if len(runs) == 1 else COLOURS[i % len(COLOURS)]
            ax.plot(at, np.full(len(at), 0.98), "|", color=colour, markersize=7, transform=ax.get_xaxis_transform())


def draw_time(ax: Axes, panel: Panel, runs: Sequence[Run], window: int | None) -> None:
    """One run: seconds over steps, stacked. Several: each one's mean step as a bar."""
    keys = list(dict.fromkeys(key for run in runs for key in run.matching(panel.keys)))
    means = {key: np.mean([np.nansum(r.series[key][1]) for r in runs if key in r.series]) for key in keys}
    keys.sort(key=lambda key: (key.endswith("other"), -means[key]))
    colours = [GRID if key.endswith("other") else COLOURS[i % len(COLOURS)] for i, key in enumerate(keys)]
    names = [key.removeprefix(panel.prefix).replace("_", " ") for key in keys]
    rows = -(-len(keys) // 3)  # of the legend, for which there must be room
    if len(runs) == 1:
        steps, stack = aligned(runs[0], keys)
        width = window_for(len(steps), window)
        smoothed = [smooth(row, width, False) for row in stack]
        ax.stackplot(steps, smoothed, colors=colours, labels=names, linewidth=0)
        usual = np.percentile(np.sum(smoothed, axis=0), 90)  # the first steps compile
        ax.set_ylim(0, usual * (1.08 + 0.12 * rows))
    else:
        draw_bars(ax, runs, keys, colours, names)
        ax.set_ylim(len(runs) - 0.4, -0.75 - 0.13 * rows * len(runs))
    ax.legend(
        loc="upper left", ncols=3, columnspacing=1.0, facecolor="white", framealpha=0.8, frameon=True, edgecolor="none"
    )


def draw_bars(ax: Axes, runs: Sequence[Run], keys: Sequence[str], colours: Sequence[str], names: Sequence[str]) -> None:
    left = np.zeros(len(runs))
    for key, colour, name in zip(keys, colours, names, strict=True):
        seconds = np.array([np.nansum(r.series[key][1]) / steps_of(r) if key in r.series else 0.0 for r in runs])
        ax.barh(np.arange(len(runs)), seconds, left=left, color=colour, label=name, height=0.42)
        left += seconds
    for i, run in enumerate(runs):
        ax.text(0, i - 0.25, f" {run.name}", fontsize=7, color=COLOURS[i % len(COLOURS)], va="bottom")
    ax.set_yticks([])
    ax.set_ylabel("")
    ax.set_xlabel("seconds per step")


def steps_of(run: Run) -> int:
    """How many steps logged a time."""
    return max((len(steps) for key, (steps, _) in run.series.items() if key.startswith("time_")), default=1)


def aligned(run: Run, keys: Sequence[str]) -> tuple[np.ndarray, list[np.ndarray]]:
    """All of ``keys`` on the union of their steps; a part that a step does not have took no time."""
    steps = np.unique(np.concatenate([run.series[key][0] for key in keys]))
    rows = []
    for key in keys:
        row = np.zeros(len(steps))
        row[np.searchsorted(steps, run.series[key][0])] = np.nan_to_num(run.series[key][1])
        rows.append(row)
    return steps, rows


PANELS = (
    Panel("losses", "Losses", ("loss", "loss_*"), "loss_", draw=draw_losses),
    Panel("terms", "Size of the generator's terms", ("grad_*",), "grad_", "root mean square, before weights", "log"),
    Panel("cosine", "Agreement of the terms", ("cosine_*",), "cosine_", "cosine", "unit"),
    Panel("norms", "Gradient norms", ("norm_*", "grad_norm*"), "norm_", scale="log"),
    Panel("transport", "Transport: marginal error", ("ot_marginal_error*",), "ot_", scale="log"),
    Panel("iterations", "Transport: iterations", ("ot_iterations*",), "ot_", scale="linear"),
    Panel("matches", "Transport: effective matches", ("ot_matches*",), "ot_", "points of R per point of F"),
    Panel("cost", "Transport: cost", ("ot_cost*",), "ot_"),
    Panel("logits", "Discriminator logits", ("logit_real*", "logit_fake*", "logit_gap*"), "logit_", scale="linear"),
    Panel("heldout", "Held out", ("heldout_*", "val_*", "eval_*", "psnr*", "ssim*", "clip_*"), "heldout_"),
    Panel("lr", "Learning rate", ("lr", "lr_*"), "lr_", scale="linear", smooth=False),
    Panel("time", "Where the time goes", ("time_*",), "time_", "seconds per step", draw=draw_time),
    Panel("speed", "Throughput", ("tokens_per_second",), unit="tokens per second", scale="linear"),
    Panel("memory", "Memory", ("memory_gb",), unit="GB", scale="linear", smooth=False),
)


def figure(runs: Sequence[Run], only: Sequence[str], window: int | None, title: str | None) -> plt.Figure:
    """All panels that have something to show."""
    plt.rcParams.update(STYLE)
    panels = [p for p in PANELS if (not only or p.name in only) and any(run.matching(p.keys) for run in runs)]
    if not panels:
        have = sorted({key for run in runs for key in run.series})
        raise InputError(f"none of the panels has numbers in these runs, which logged: {', '.join(have)}")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(3.7 * columns, 2.45 * rows + 0.45), squeeze=False)
    for ax, panel in zip(axes.flat, panels, strict=False):
        ax.set_title(panel.title)
        ax.set_ylabel(panel.unit)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=panel.draw is not draw_time or len(runs) == 1))
        ax.margins(x=0.01)
        (panel.draw or draw_lines)(ax, panel, runs, window)
        if ax.get_yscale() == "linear" and (panel.draw is not draw_time or len(runs) == 1):
            ax.yaxis.set_major_formatter(FuncFormatter(short))
    for i, ax in enumerate(axes.flat):
        ax.set_visible(i < len(panels))
        if i < len(panels) and i + columns >= len(panels) and not ax.get_xlabel():
            ax.set_xlabel("step")
    head(fig, runs, title)
    return fig


def head(fig: plt.Figure, runs: Sequence[Run], title: str | None) -> None:
    top = 1 - 0.34 / fig.get_figheight()
    if len(runs) > 1:
        handles = [
            Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=3, label=r.name) for i, r in enumerate(runs)
        ]
        fig.legend(handles=handles, loc="upper right", ncols=len(runs), fontsize=9, borderaxespad=0.4)
    else:
        title = title or runs[0].name
    if title:
        fig.text(0.012, 1 - 0.08 / fig.get_figheight(), title, ha="left", va="top", fontsize=11, color=INK)
    fig.tight_layout(rect=(0, 0, 1, top), h_pad=1.1, w_pad=1.2)


def short(value: float, _: object = None) -> str:
    """A tick in few characters: 1.2M, 65k, 0.25, 2e-06."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


STYLE: dict[str, Any] = {
    "font.size": 8,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.handlelength": 1.4,
    "legend.borderaxespad": 0.2,
    "legend.labelspacing": 0.25,
    "savefig.dpi": 200,
    "svg.hashsalt": "vdot",
}


# --- command line ----------------------------------------------------------------------------------------------------


def steps_span(text: str) -> tuple[float, float]:
    first, colon, last = text.partition(":")
    try:
        return (float(first) if first else -math.inf), (float(last) if last else math.inf if colon else float(first))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST:LAST, where either may be left out") from None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    panels = "".join(f"  {p.name:<11} {p.title} ({', '.join(p.keys)})\n" for p in PANELS)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=HELP.format(panels=panels), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="+", type=Path, help="folder of a training run, or its metrics.jsonl")
    parser.add_argument(
        "-o", "--output", type=Path, help="png, pdf or svg; default: metrics.png in the first run's folder"
    )
    parser.add_argument(
        "--only", nargs="+", choices=[p.name for p in PANELS], default=[], metavar="PANEL", help="panels to draw"
    )
    parser.add_argument("--smooth", type=int, metavar="N", help="window of the strong lines, in logged steps; 1: none")
    parser.add_argument(
        "--steps", type=steps_span, default=(-math.inf, math.inf), metavar="A:B", help="only these steps"
    )
    parser.add_argument("--title", help="above the figure; default: the run's name")
    parsed = parser.parse_args(arguments)
    if parsed.smooth is not None and parsed.smooth < 1:
        parser.error("--smooth must be at least 1")
    return parsed


def write(fig: plt.Figure, path: Path) -> None:
    """Whole or not at all."""
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise InputError(f"{path} is neither .png nor .pdf nor .svg")
    kind = path.suffix[1:].lower()
    with atomic_path(path) as temporary:
        fig.savefig(temporary, format=kind, metadata={"CreationDate": None} if kind == "pdf" else None)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        runs = distinct([read_run(path, options.steps) for path in options.run])
        first = options.run[0]
        output = options.output or (first if first.is_dir() else first.parent) / "metrics.png"
        write(figure(runs, options.only, options.smooth, options.title), output)
    except VdotError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
