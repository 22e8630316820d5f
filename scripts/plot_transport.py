"""The transport figure of the README: matches, gradient field, convergence.

    python scripts/plot_transport.py docs/transport.png

Left, the plan between two clouds in the plane (its strongest matches). Middle, the descent direction of every point,
by the closed-form gradient: to its barycentre under the plan. Right, marginal error against iterations on 1560 points
with 16 coordinates, two unrelated smooth latent frames pooled as in training, at the release's eps. Half a minute.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from sinkhorn import anderson, clouds  # noqa: E402

from vdot.transport import Transport, sinkhorn  # noqa: E402

FAKE, REAL, INK, QUIET = "#2a6f97", "#e07a3f", "#22313f", "#9aa5b1"
WAYS = {
    "plain": (QUIET, "-", {"relaxation": 1.0}),
    "plain, eps scaling": (QUIET, ":", {"relaxation": 1.0, "eps_scaling": 0.5}),
    "over-relaxed, adapted (ours)": (REAL, "-", {}),
}
# Curves are named where they run, not in a legend: iteration, error, words, colour.
NOTES = (
    (6, 2.3e-5, "over-relaxed,\nadapted (ours)", REAL),
    (35.5, 5.5e-4, "Anderson(5)", FAKE),
    (62, 7e-3, "plain", "#6b7885"),
    (60.8, 1.1, "the release stops here", "#6b7885"),
    (61, 5e-4, "with eps\nscaling", "#6b7885"),
)


def flower(count: int) -> tuple[Tensor, Tensor]:
    """A sunflower disc and, around it, a band of points along five petals: ``[1,N,2]`` each."""
    g = torch.Generator().manual_seed(1)
    k = torch.arange(count)
    radius, angle = 0.95 * ((k + 0.5) / count).sqrt(), k * torch.pi * (3 - 5**0.5)
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    theta = 2 * torch.pi * (k + 0.5) / count
    petal = 1.72 + 0.36 * (5 * theta + 0.6).cos() + 0.07 * torch.randn(count, generator=g)
    y = torch.stack([1.18 * petal * theta.cos(), 0.86 * petal * theta.sin()], 1)
    return x[None] + torch.tensor([0.25, -0.08]), y[None]


def scatter(ax: Axes, x: Tensor, y: Tensor) -> None:
    for points, colour, label in ((x[0], FAKE, "fake  x"), (y[0], REAL, "real  y")):
        ax.scatter(*points.T, s=17, color=colour, edgecolor="white", linewidth=0.5, zorder=3, label=label)
    ax.set_aspect("equal")
    ax.set_xlim(-2.6, 2.6)
    ax.set_ylim(-1.95, 1.85)
    ax.axis("off")


def draw_matches(ax: Axes, x: Tensor, y: Tensor, out: Transport, count: int = 520) -> None:
    plan = out.plan()[0]
    mass, where = plan.flatten().topk(count)
    i, j = where // plan.shape[1], where % plan.shape[1]
    opacity = (mass / mass.max()).sqrt().tolist()
    lines = torch.stack([x[0, i], y[0, j]], 1).numpy()
    ax.add_collection(
        LineCollection(list(lines), colors=[(0.13, 0.19, 0.25, 0.5 * o) for o in opacity], linewidths=0.7)
    )
    scatter(ax, x, y)
    ax.legend(loc="lower right", frameon=False, fontsize=9, handletextpad=0.1, borderaxespad=0)
    ax.set_title("the plan's strongest matches", fontsize=11, color=INK)
    text = f"cost {out.cost.item():.2f}   {out.effective_matches.item():.1f} matches per point   "
    ax.text(0.5, -0.02, text + f"marginal error {out.marginal_error.item():.0e}", transform=ax.transAxes,
            ha="center", va="top", fontsize=8.5, color=INK)  # fmt: skip


def draw_field(ax: Axes, x: Tensor, y: Tensor, out: Transport) -> None:
    step = -0.5 * len(x[0]) * out.gradient[0]  # to the barycentre: gradient = 2 (x - barycentre) / N
    scatter(ax, x, y)
    ax.quiver(*x[0].T, *(0.6 * step).T, step.norm(dim=1), cmap="viridis", clim=(0.2, 1.9), zorder=4,
              angles="xy", scale_units="xy", scale=1, width=0.0038, headwidth=4, headlength=4.5)  # fmt: skip
    ax.scatter(*out.barycentre[0].T, s=6, color=INK, zorder=4, linewidth=0)
    ax.set_title("where each point moves", fontsize=11, color=INK)
    ax.text(0.5, -0.02, "arrows: $-\\nabla_x$ OT, 60% of the way    dots: barycentres $P y$", transform=ax.transAxes,
            ha="center", va="top", fontsize=8.5, color=INK)  # fmt: skip


def draw_convergence(ax: Axes, budget: int = 100) -> None:
    x, y = clouds("frames", 1)
    counts = [*range(1, 30), *range(30, budget + 1, 3)]
    for label, (colour, style, options) in WAYS.items():
        errors = [sinkhorn(x, y, tol=1e-9, max_iters=k, **options).marginal_error.item() for k in counts]
        extra = 9 if "eps_scaling" in options else 0  # its stages are iterations too
        width = 2.4 if "ours" in label else 1.5
        ax.plot([k + extra for k in counts], errors, style, color=colour, linewidth=width, zorder=3)
    ax.plot(range(1, budget), anderson(x, y, 5, budget), "--", color=FAKE, linewidth=1.4, zorder=2)
    ax.axvline(60, color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)))
    ax.set(yscale="log", xlim=(0, budget), ylim=(1e-5, 2))
    ax.set_xlabel("iterations", fontsize=9, color=INK)
    ax.set_title("marginal error, 1560 points x 16 channels, eps 0.1", fontsize=11, color=INK)
    ax.tick_params(labelsize=8.5, colors=INK, length=3)
    ax.grid(axis="y", color="#e4e8ec", linewidth=0.7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(QUIET)
    for k, height, text, colour in NOTES:
        ax.text(k, height, text, fontsize=9, color=colour, ha="left", va="center")


def main() -> None:
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs" / "transport.png")
    torch.set_num_threads(1)
    x, y = flower(150)
    out = sinkhorn(x, y, eps=0.03, tol=1e-4, max_iters=2000)
    figure, axes = plt.subplots(1, 3, figsize=(13.6, 4.0), width_ratios=(1.12, 1.12, 1), facecolor="white")
    draw_matches(axes[0], x, y, out)
    draw_field(axes[1], x, y, out)
    draw_convergence(axes[2])
    figure.tight_layout(w_pad=1.5)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
