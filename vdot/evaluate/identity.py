"""Whether what a reference picture shows is in the video: by its colours and by the directions of its edges."""

import cv2
import numpy as np

from vdot.errors import InputError
from vdot.evaluate.fields import check_clip

LEVELS = 4  # of each channel in a colour histogram
DIRECTIONS = 8  # of gradients, opposite ones alike
WINDOWS = (0.25, 0.4, 0.6)  # sides of the places looked at, in short sides
LOOKED_AT = 96  # pixels of the short side that places are told apart by: larger frames are averaged in blocks first
WHITE = 240  # a reference is cut out on white


def subject_of(reference: np.ndarray) -> np.ndarray:
    """Bool ``[H, W]``: what of a picture on white is not the white around it (white inside the outline stays)."""
    solid = (reference.min(-1) < WHITE).astype(np.uint8)
    outlines, _ = cv2.findContours(solid, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros_like(solid)
    cv2.drawContours(filled, outlines, -1, 1, -1)
    return filled > 0


def colour_planes(frame: np.ndarray) -> np.ndarray:
    """Each pixel's share in each colour bin, trilinear: a slight shift moves little; ``[H, W, LEVELS ** 3]``."""
    place = frame.astype(np.float32) * ((LEVELS - 1) / 255)
    out = np.ones((*frame.shape[:2], 1), np.float32)
    for channel in range(3):
        share = np.maximum(0, 1 - np.abs(place[..., channel, None] - np.arange(LEVELS, dtype=np.float32)))
        out = (out[..., None] * share[..., None, :]).reshape(*frame.shape[:2], -1)
    return out


def gradient_planes(frame: np.ndarray) -> np.ndarray:
    """Gradient length in each direction bin, linear between bins: ``[H, W, DIRECTIONS]`` (Dalal and Triggs 2005)."""
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)
    x, y = cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)
    place = (np.arctan2(y, x) / np.pi % 1)[..., None] * DIRECTIONS - np.arange(DIRECTIONS)
    away = np.minimum(np.abs(place), DIRECTIONS - np.abs(place))
    return (np.hypot(x, y)[..., None] * np.maximum(0, 1 - away)).astype(np.float32)


def _histogram(planes: np.ndarray, where: np.ndarray) -> np.ndarray:
    total = planes[where].sum(0)
    return total / max(float(total.sum()), 1e-6)


def reference_similarity(
    reference: np.ndarray, frames: np.ndarray, mask: np.ndarray | None = None, every: int = 4
) -> tuple[float | None, float | None]:
    """Colour and gradient likeness of a reference, uint8 ``[H, W, 3]`` on white, to a video.

    Each is a histogram intersection (Swain and Ballard 1991), 0..1, higher is better, mean over every so-many-th
    frame. With ``mask``, bool ``[T, H, W]``, of what lies in it (frames where it is empty count 0); without, the best
    window of three sizes, where background is always part of the picture: compare with what the truth gets, not with
    1. Colours do not see arrangement; gradients, upright or tilted, do not see colour. ``None``: an empty reference,
    or for gradients a flat one.
    """
    check_clip(frames)
    if reference.dtype != np.uint8 or reference.ndim != 3 or reference.shape[-1] != 3:
        raise InputError(f"a reference must be uint8 [H, W, 3], got {reference.dtype} {list(reference.shape)}")
    subject = subject_of(reference)
    if not subject.any():
        return None, None
    scores: list[float | None] = []
    for planes_of in (colour_planes, gradient_planes):
        wanted = _histogram(planes_of(reference), subject)
        if not wanted.any():
            scores.append(None)
            continue
        picked = range(0, len(frames), every)
        if mask is None:
            values = [_best_window(planes_of(frames[t]), wanted) for t in picked]
        else:
            values = [float(np.minimum(wanted, _histogram(planes_of(frames[t]), mask[t])).sum()) for t in picked]
        scores.append(float(np.mean(values)))
    return scores[0], scores[1]


def _best_window(planes: np.ndarray, wanted: np.ndarray) -> float:
    planes = _block_means(planes, max(1, min(planes.shape[:2]) // LOOKED_AT))
    height, width = planes.shape[:2]
    best = 0.0
    for part in WINDOWS:
        side = max(3, round(part * min(height, width)))
        sums = np.dstack([cv2.boxFilter(plane, -1, (side, side)) for plane in np.moveaxis(planes, -1, 0)])
        sums /= np.maximum(sums.sum(-1, keepdims=True), 1e-6)
        best = max(best, float(np.minimum(sums, wanted).sum(-1).max()))
    return best


def _block_means(planes: np.ndarray, side: int) -> np.ndarray:
    """``[H, W, K]`` -> ``[H // side, W // side, K]``; what is left over at the right and below is dropped."""
    if side == 1:
        return planes
    height, width = (length // side * side for length in planes.shape[:2])
    blocks = planes[:height, :width].reshape(height // side, side, width // side, side, -1)
    return np.ascontiguousarray(blocks.mean((1, 3)))
