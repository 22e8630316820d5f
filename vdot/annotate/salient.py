"""Which pixels are the thing: what stands out of a picture, and what fills a box, without a model, by GrabCut."""

from collections.abc import Callable

import cv2
import numpy as np

from vdot.annotate.masks import box_of, filled_box, grow
from vdot.errors import InputError

SIDE = 256  # pixels of the long side that GrabCut works at
ROUNDS = 5
FLAT, CLEAR = (
    6.0,
    12.0,
)  # distances in L*a*b*: within the first a ground is plain, beyond the second it is not the ground

Salient = Callable[[np.ndarray], np.ndarray]
Segment = Callable[[np.ndarray, tuple[int, int, int, int]], np.ndarray]


def salient() -> Salient:
    """uint8 ``[H, W, 3]`` -> bool ``[H, W]``: what differs most from the picture's border, in one piece.

    A plain picture of one thing on a quiet ground is what it is for; a network sees more.
    """
    return stands_out


def segment() -> Segment:
    """uint8 ``[H, W, 3]`` and a box -> bool ``[H, W]``: what in the box differs from what is around it."""
    return fill_of_box


def stands_out(image: np.ndarray) -> np.ndarray:
    small = _small(image)
    lab = cv2.cvtColor(small, cv2.COLOR_RGB2LAB).astype(np.float32)
    height, width = lab.shape[:2]
    rim = max(1, min(height, width) // 20)
    border = ~filled_box((rim, rim, width - rim, height - rim), height, width)
    contrast = _distance(lab, lab[border])
    if np.quantile(contrast[border], 0.95) < FLAT:  # a plain ground, as of cut-outs and goods for sale
        mask = cv2.morphologyEx((contrast > CLEAR).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8)) > 0
        if mask.any():
            return _back(largest(mask), image.shape[:2])
    y, x = np.mgrid[:height, :width]
    centre = np.exp(-(((x / width - 0.5) / 0.45) ** 2 + ((y / height - 0.5) / 0.45) ** 2))
    score = cv2.GaussianBlur((contrast * (0.4 + 0.6 * centre)).astype(np.float32), (0, 0), 0.02 * max(height, width))
    level, _ = cv2.threshold((score / max(score.max(), 1e-6) * 255).astype(np.uint8), 0, 255, cv2.THRESH_OTSU)
    seed = largest(score / max(score.max(), 1e-6) * 255 > level)
    if not seed.any():
        raise InputError("nothing stands out of the picture: give --mask or --bbox")
    trimap = np.full((height, width), cv2.GC_PR_BGD, np.uint8)
    trimap[seed] = cv2.GC_PR_FGD
    trimap[grow(seed, -max(1, round(0.03 * max(height, width))))] = cv2.GC_FGD
    trimap[border & ~seed] = cv2.GC_BGD
    return _back(largest(grab_cut(small, trimap, seed)), image.shape[:2])


def fill_of_box(image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    small = _small(image)
    scale = small.shape[1] / image.shape[1]
    left, top, right, bottom = (round(value * scale) for value in box)
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    inside = filled_box((left, top, right, bottom), *small.shape[:2])
    if inside.all():
        return stands_out(image)
    trimap = np.where(inside, cv2.GC_PR_BGD, cv2.GC_BGD).astype(np.uint8)
    # A thing fills the middle of its box, and seldom the corners.
    axes = (round(0.4 * (right - left)), round(0.4 * (bottom - top)))
    cv2.ellipse(trimap, (round((left + right) / 2), round((top + bottom) / 2)), axes, 0, 0, 360, cv2.GC_PR_FGD, -1)
    found = largest(grab_cut(small, trimap, inside))
    full = _back(found, image.shape[:2]) & filled_box(box, *image.shape[:2])
    return full if full.any() else filled_box(box, *image.shape[:2])


def grab_cut(image: np.ndarray, trimap: np.ndarray, otherwise: np.ndarray, rounds: int = ROUNDS) -> np.ndarray:
    """GrabCut from a trimap; ``otherwise`` where it finds nothing or has too little to learn from."""
    kinds = np.isin(trimap, (cv2.GC_FGD, cv2.GC_PR_FGD))
    if min(kinds.sum(), (~kinds).sum()) < 8:
        return otherwise
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)  # its first clusters are drawn
    cv2.grabCut(  # type: ignore[call-overload]
        np.ascontiguousarray(image[..., ::-1]), trimap, None, *models, rounds, cv2.GC_INIT_WITH_MASK
    )
    found = np.isin(trimap, (cv2.GC_FGD, cv2.GC_PR_FGD))
    return found if found.any() else otherwise


def largest(mask: np.ndarray) -> np.ndarray:
    """The largest piece of a bool ``[H, W]``, its holes filled."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    if count < 2:
        return mask
    piece = (labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())).astype(np.uint8)
    contours, _ = cv2.findContours(piece, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(piece, contours, -1, 1, -1)
    return piece > 0


def thing_in_box(image: np.ndarray, mask: np.ndarray, segment: Segment) -> np.ndarray:
    return segment(image, box_of(mask))


def _distance(lab: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """How far each colour is from the nearest of the border's main colours, ``[H, W]``."""
    cv2.setRNGSeed(0)
    count = min(4, len(np.unique(samples, axis=0)))
    stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 1.0)
    _, _, centres = cv2.kmeans(  # type: ignore[call-overload]
        samples.astype(np.float32), count, None, stop, 1, cv2.KMEANS_PP_CENTERS
    )
    return np.linalg.norm(lab[:, :, None] - centres, axis=-1).min(-1)


def _small(image: np.ndarray) -> np.ndarray:
    scale = SIDE / max(image.shape[:2])
    size = (max(8, round(image.shape[1] * scale)), max(8, round(image.shape[0] * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def _back(mask: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    return cv2.resize(mask.astype(np.float32), (size[1], size[0]), interpolation=cv2.INTER_LINEAR) >= 0.5
