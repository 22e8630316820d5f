"""How far a set of videos is from a set of real ones, as distributions of features.

Features are ``[n, D]``; which ones decides what is seen. The handcrafted ones below know colours, gradients and motion
at a coarse grid; those of :mod:`vdot.evaluate.classifier` know what it was trained to tell apart. Both distances are 0
between equal sets and grow with the difference; both are biased upwards for few samples, so compare sets of one size,
and against the distance between two halves of the real ones.
"""

import numpy as np

from vdot.errors import InputError
from vdot.evaluate.fields import check_clip, optical_flow
from vdot.evaluate.identity import colour_planes, gradient_planes

GRID = 2  # cells along each side that gradients and flow are pooled in
TIMES = 3  # thirds of the clip
FLOW_BINS = 8


def handcrafted(frames: np.ndarray) -> np.ndarray:
    """Features of one clip, float32 ``[186]``: colours, gradients by cell, flow by cell and third of the clip, drift.

    They do not see identity or fine detail.
    """
    check_clip(frames)
    sample = frames[:: max(1, len(frames) // 4)]
    colours = np.mean([colour_planes(frame).mean((0, 1)) for frame in sample], axis=0)  # [64]
    gradients = np.mean([_cells(gradient_planes(frame)) for frame in sample], axis=0) / 255  # [32]
    flow = (
        optical_flow(frames) / min(frames.shape[1:3]) if len(frames) > 1 else np.zeros((TIMES, *frames.shape[1:3], 2))
    )
    angle = (np.arctan2(flow[..., 1], flow[..., 0]) / (2 * np.pi) % 1 * FLOW_BINS).astype(int) % FLOW_BINS
    spread = np.eye(FLOW_BINS, dtype=np.float32)[angle] * np.linalg.norm(flow, axis=-1)[..., None]
    thirds = [part.mean(0) if len(part) else spread.mean(0) for part in np.array_split(spread, TIMES)]
    moves = np.concatenate([_cells(third) for third in thirds]) * 20  # [96]; a short side in 20 frames is 1
    drift = (frames[-1].astype(np.float32).mean((0, 1)) - frames[0].mean((0, 1))) / 64  # [3]
    return np.concatenate([np.sqrt(colours), gradients, moves, drift]).astype(np.float32)


def _cells(planes: np.ndarray) -> np.ndarray:
    """Means over a grid of cells, ``[H, W, K] -> [GRID * GRID * K]``."""
    rows = np.array_split(planes, GRID, 0)
    return np.concatenate([cell.mean((0, 1)) for row in rows for cell in np.array_split(row, GRID, 1)])


def sliced_wasserstein(x: np.ndarray, y: np.ndarray, directions: int = 256, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance (Rabin et al. 2011) between samples ``[n, D]`` and ``[m, D]``, in their unit.

    Root of the mean, over fixed random directions, of the squared distance between sorted projections. Of a shift by
    v it is ``|v| / sqrt(D)``.
    """
    _check(x, y)
    way = np.random.default_rng(seed).standard_normal((directions, x.shape[1]))
    way /= np.linalg.norm(way, axis=1, keepdims=True)
    a, b = np.sort(x @ way.T, axis=0), np.sort(y @ way.T, axis=0)
    if len(a) != len(b):  # quantiles of both at the midpoints of a common grid
        at = (np.arange(max(len(a), len(b))) + 0.5) / max(len(a), len(b))
        a, b = (np.quantile(s, at, axis=0, method="hazen") for s in (a, b))
    return float(np.sqrt(((a - b) ** 2).mean()))


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Frechet distance between Gaussians fitted to samples ``[n, D]`` and ``[m, D]`` (Dowson and Landau 1982; FID).

    ``|mean difference|^2 + tr(A + B - 2 (A B)^(1/2))``, in squared units. It needs more samples than dimensions to
    mean much.
    """
    _check(x, y)
    if min(len(x), len(y)) < 2:
        raise InputError(f"a Frechet distance needs two samples of each, got {len(x)} and {len(y)}")
    a, b = (np.atleast_2d(np.cov(s, rowvar=False)) for s in (x, y))
    return frechet_gaussians(x.mean(0), a, y.mean(0), b)


def frechet_gaussians(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Of two Gaussians with means ``[D]`` and covariances ``[D, D]``; never below 0 by rounding."""
    values, vectors = np.linalg.eigh(np.asarray(cov_a, np.float64))
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    # tr (AB)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2), and that one is symmetric.
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    gap = np.asarray(mean_a, np.float64) - mean_b
    return max(0.0, float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * shared))


def _check(x: np.ndarray, y: np.ndarray) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not len(x) or not len(y):
        raise InputError(f"features must be [n, D] and [m, D], got {list(x.shape)} and {list(y.shape)}")


def project(features: np.ndarray, dimensions: int, seed: int = 0) -> np.ndarray:
    """Features through a fixed random projection, ``[n, D] -> [n, dimensions]``, lengths kept on average."""
    matrix = np.random.default_rng(seed).standard_normal((features.shape[1], dimensions)) / np.sqrt(dimensions)
    return features @ matrix.astype(features.dtype)
