"""Outlines of the sprites, their distance fields, and the patterns on them. Unit: the sprite's radius."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

LIGHT = (-0.48, -0.62, 0.62)  # from the upper left, towards the viewer; of unit length up to rounding
HALFWAY = tuple(v / np.hypot(np.hypot(*LIGHT[:2]), LIGHT[2] + 1) for v in (LIGHT[0], LIGHT[1], LIGHT[2] + 1))
DIFFUSE, GLOSS = 0.5, 0.34
FLAT_GLOSS = HALFWAY[2] ** 24  # of a surface that faces the viewer
REACH = 1.12  # half side of a sprite's square canvas: a margin for the soft edge


def _polar(radius: Callable[[np.ndarray], np.ndarray], points: int = 72) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], -1) * radius(angle)[:, None]


def _regular(corners: int, radius: float = 1.0, inner: float | None = None) -> np.ndarray:
    """A regular polygon with a corner at the top, or a star with ``inner`` radius between."""
    count = corners if inner is None else 2 * corners
    angle = np.arange(count) * 2 * np.pi / count - np.pi / 2
    reach = np.full(count, radius)
    if inner is not None:
        reach[1::2] = inner
    return np.stack([np.cos(angle), np.sin(angle)], -1) * reach[:, None]


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y + 2.2], -1) / 16.5


def _moon() -> np.ndarray:
    """A crescent: an outer arc and the arc that is bitten out of it."""
    out = np.linspace(0.92, 2 * np.pi - 0.92, 48)
    tip = np.array([np.cos(0.92), np.sin(0.92)])
    centre = 0.55
    radius = np.hypot(tip[0] - centre, tip[1])
    start = np.arctan2(tip[1], tip[0] - centre)
    back = np.linspace(2 * np.pi - start, start, 32)[1:-1]
    inner = np.stack([centre + radius * np.cos(back), radius * np.sin(back)], -1)
    return np.concatenate([np.stack([np.cos(out), np.sin(out)], -1), inner]) + np.array([0.15, 0])


def _drop() -> np.ndarray:
    arc = np.linspace(-0.55, np.pi + 0.55, 40)
    belly = np.stack([0.66 * np.cos(arc), 0.34 + 0.66 * np.sin(arc)], -1)
    return np.concatenate([belly, [[0.0, -1.0]]])


def _fish() -> np.ndarray:
    arc = np.linspace(-2.62, 2.62, 40)
    body = np.stack([0.2 + 0.8 * np.cos(arc), 0.56 * np.sin(arc)], -1)
    return np.concatenate([body, [[-1.0, 0.6], [-0.82, 0.0], [-1.0, -0.6]]])


OUTLINES: dict[str, np.ndarray] = {
    "square": np.array([[-0.8, -0.8], [0.8, -0.8], [0.8, 0.8], [-0.8, 0.8]]),
    "triangle": _regular(3, 1.05) + np.array([0, 0.2]),
    "star": _regular(5, 1.04, 0.46),
    "heart": _heart(),
    "cross": np.array([
        [-0.33, -0.95], [0.33, -0.95], [0.33, -0.33], [0.95, -0.33], [0.95, 0.33], [0.33, 0.33],
        [0.33, 0.95], [-0.33, 0.95], [-0.33, 0.33], [-0.95, 0.33], [-0.95, -0.33], [-0.33, -0.33],
    ]),
    "moon": _moon(),
    "flower": _polar(lambda a: 0.78 + 0.22 * np.cos(5 * a + np.pi / 2)),
    "hexagon": _regular(6, 0.98),
    "drop": _drop(),
    "arrow": np.array([
        [1.0, 0.0], [0.2, -0.78], [0.2, -0.32], [-0.95, -0.32], [-0.95, 0.32], [0.2, 0.32], [0.2, 0.78],
    ]),
    "house": np.array([
        [0, -1.0], [0.95, -0.12], [0.72, -0.12], [0.72, 0.85], [-0.72, 0.85], [-0.72, -0.12], [-0.95, -0.12],
    ]),
    "fish": _fish(),
    # Not a thing of its own: what a person wears, as the reference for trying it on.
    "shirt": np.array([
        [-0.3, -0.72], [-0.14, -0.62], [0.14, -0.62], [0.3, -0.72], [0.98, -0.36], [0.8, 0.06], [0.55, -0.06],
        [0.55, 0.82], [-0.55, 0.82], [-0.55, -0.06], [-0.8, 0.06], [-0.98, -0.36],
    ]),
}  # fmt: skip
LARGEST_KEPT = 160  # texels; a sprite of a 128x128 picture
RING = (0.98, 0.5)  # outer and inner radius


def area(shape: str) -> float:
    """Closed form, in radii squared (the shoelace formula for polygons)."""
    if shape == "ball":
        return float(np.pi)
    if shape == "ring":
        return float(np.pi * (RING[0] ** 2 - RING[1] ** 2))
    x, y = OUTLINES[shape].T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline, negative inside; of any two arrays of one shape."""
    if shape == "ball":
        return np.hypot(x, y) - 1
    if shape == "ring":
        middle, half = (RING[0] + RING[1]) / 2, (RING[0] - RING[1]) / 2
        return np.abs(np.hypot(x, y) - middle) - half
    points = OUTLINES[shape]
    nearest = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, 0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
        if ay != by:  # even-odd rule: edges crossed by a ray to the right
            inside ^= ((ay > y) != (by > y)) & (x < ax + ex * (y - ay) / ey)
    return np.where(inside, -1, 1) * np.sqrt(nearest)


@dataclass(frozen=True)
class Form:
    """A shape on a square of ``n x n`` texels. ``normal [n, n, 3]`` towards the viewer, ``height [n, n]`` in 0..1."""

    x: np.ndarray
    y: np.ndarray
    coverage: np.ndarray
    normal: np.ndarray
    height: np.ndarray


def form(shape: str, n: int, softness: float) -> Form:
    """``softness`` is the width of the edge in texels: one pixel of the final picture. Small ones are kept."""
    return (_form if n <= LARGEST_KEPT else _form.__wrapped__)(shape, n, softness)


@lru_cache(maxsize=512)  # at most 370 MB, and 40 MB in practice at 64x64
def _form(shape: str, n: int, softness: float) -> Form:
    texel = 2 * REACH / n
    axis = ((np.arange(n) + 0.5) * texel - REACH).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    field = distance(shape, x, y).astype(np.float32)
    coverage = np.clip(0.5 - field / (softness * texel), 0, 1).astype(np.float32)
    bevel = 1.0 if shape == "ball" else 0.34  # how far from its edge a sprite is still round
    depth = np.clip(-field / bevel, 0.02, 1)
    height = np.sqrt(1 - (1 - depth) ** 2)
    slope_y, slope_x = np.gradient(height * bevel, texel)
    normal = np.stack([-slope_x, -slope_y, np.ones_like(height)], -1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    made = Form(x, y, coverage, normal.astype(np.float32), (height * coverage).astype(np.float32))
    for array in vars(made).values():
        array.setflags(write=False)  # shared by every sprite of this shape and size
    return made


def brightness(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Factor of the colour for a normal: 1 where it faces the viewer, so that a flat part keeps its own colour."""
    return 1 + DIFFUSE * (LIGHT[0] * x + LIGHT[1] * y + LIGHT[2] * (z - 1))


def lit(normal: np.ndarray, angle: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Factor of the colour and added gloss, each ``[...]``, for a sprite turned by ``angle``: the light stays put."""
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    x, y, z = normal[..., 0], normal[..., 1], normal[..., 2]
    x, y = cos * x - sin * y, sin * x + cos * y
    gloss = np.maximum(HALFWAY[0] * x + HALFWAY[1] * y + HALFWAY[2] * z, 0)
    for _ in range(3):
        gloss = gloss * gloss
    return brightness(x, y, z), GLOSS * np.maximum(gloss**3 - FLAT_GLOSS, 0)


def pattern(kind: str, x: np.ndarray, y: np.ndarray, texel: float) -> np.ndarray:
    """Share of the second colour, 0..1, at ``x, y`` in radii; ``texel`` is the width of its soft edges."""
    if kind == "striped":
        wave, slope = np.sin((0.8 * x + 0.6 * y) * 8.2), 8.2
    elif kind == "checked":
        wave, slope = np.sin(x * 5.4) * np.sin(y * 5.4), 5.4
    else:  # spotted: discs on a grid with every other row shifted
        pitch = 0.64
        row = np.floor(y / pitch + 0.5)
        dx = (x / pitch + 0.5 * (row % 2)) % 1 - 0.5
        dy = y / pitch - row
        wave, slope = (0.3 - np.hypot(dx, dy)), 1 / pitch
    return np.clip(0.5 + wave / (slope * texel), 0, 1)
