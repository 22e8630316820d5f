"""Which shape a mask has: its overlap with every shape of the world, wherever it is, however large, however turned."""

from functools import lru_cache

import cv2
import numpy as np

from vdot.data.sprites.figure import PARTS, joints
from vdot.data.sprites.scene import PERSON_MOTIONS, SHAPES, Motion
from vdot.data.sprites.shapes import REACH, distance

GRID = 32  # cells along the side of a normalised mask
HALF_SIDE = 1.3  # of that square, in square roots of the mask's area: a star's tips and a person's feet are within
TURNS = 36  # rotations of a shape, ten degrees apart
POSES = 8  # of each motion of a person
WEAR = (0.04, 0.08)  # radii, standard deviation: up to a pixel at a radius of twelve
TEXELS = 96  # of a template before it is normalised


def normalised(mask: np.ndarray, turn: float = 0.0) -> np.ndarray:
    """Bool ``[H, W]`` -> bool ``[GRID * GRID]``: centroid in the middle, of one area, turned by ``turn`` radians."""
    soft = mask.astype(np.float32)
    moments = cv2.moments(soft)
    area = max(moments["m00"], 1.0)
    x, y = moments["m10"] / area, moments["m01"] / area
    step = 2 * HALF_SIDE * np.sqrt(area) / GRID  # pixels of the mask per cell
    cos, sin = np.cos(turn) * step, np.sin(turn) * step
    linear = np.array([[cos, -sin], [sin, cos]])
    matrix = np.column_stack([linear, np.array([x, y]) - linear @ np.full(2, GRID / 2 - 0.5)])
    if step > 1:  # several pixels a cell: blur, or thin parts fall between the cells
        soft = cv2.GaussianBlur(soft, (0, 0), 0.4 * step).astype(np.float32)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return (cv2.warpAffine(soft, matrix, (GRID, GRID), flags=flags) >= 0.5).ravel()


@lru_cache(maxsize=1)
def templates() -> tuple[np.ndarray, np.ndarray]:
    """Normalised masks of all shapes, turned or posed, float32 ``[M, GRID ** 2]``, and the shape of each ``[M]``."""
    masks, owners = [], []
    for number, shape in enumerate(SHAPES):
        views = _poses() if shape == "person" else _rotations(shape)
        masks += views
        owners += [number] * len(views)
    return np.stack(masks).astype(np.float32), np.array(owners)


def _rotations(shape: str) -> list[np.ndarray]:
    axis = (np.arange(TEXELS) + 0.5) * 2 * REACH / TEXELS - REACH
    field = distance(shape, *np.meshgrid(axis, axis))
    turns = np.arange(TURNS) * 2 * np.pi / TURNS
    return [normalised(mask, turn) for mask in _worn(field < 0, 2 * REACH / TEXELS) for turn in turns]


def _poses() -> list[np.ndarray]:
    axis = (np.arange(TEXELS) + 0.5) * 2.8 / TEXELS - 1.4
    x, y = np.meshgrid(axis, axis)
    ways = [Motion(kind, way, cycles=1) for kind in PERSON_MOTIONS for way in ("left", "right")[: 1 + (kind == "walk")]]
    points = np.concatenate([joints(motion, np.arange(POSES) / POSES) for motion in ways])
    return [normalised(mask) for pose in points for mask in _worn(_body(pose, x, y), 2.8 / TEXELS)]


def _worn(mask: np.ndarray, texel: float) -> list[np.ndarray]:
    """A mask, and with its corners and gaps lost as blur loses them in a small picture."""
    soft = mask.astype(np.float32)
    return [mask, *(cv2.GaussianBlur(soft, (0, 0), wear / texel) >= 0.5 for wear in WEAR)]


def _body(pose: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Capsules around the limbs of ``pose [11, 2]``, bool like ``x``."""
    inside = np.zeros(x.shape, bool)
    for start, end, width, _ in PARTS:
        (ax, ay), (bx, by) = pose[start], pose[end]
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / max(ex * ex + ey * ey, 1e-9), 0, 1)
        inside |= np.hypot(x - ax - along * ex, y - ay - along * ey) < width
    return inside


def shape_overlaps(masks: np.ndarray) -> np.ndarray:
    """Bool ``[n, H, W]``, none empty -> intersection over union with each shape in its best rotation, ``[n, shapes]``.

    In 0..1; the right shape gets about 0.93 in pictures of 64x64. Ball and hexagon differ by little.
    """
    bank, owners = templates()
    flat = np.stack([normalised(mask) for mask in masks]).astype(np.float32)
    common = flat @ bank.T
    overlap = common / np.maximum(flat.sum(1)[:, None] + bank.sum(1) - common, 1)
    return np.maximum.reduceat(overlap, np.searchsorted(owners, np.arange(len(SHAPES))), axis=1)
