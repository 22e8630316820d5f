"""Masks as shapes: boxes, hulls, growing. Bool ``[H, W]``, or ``[T, H, W]`` for clips."""

import cv2
import numpy as np

from vdot.errors import InputError

AUG_MODES = ("original", "original_expand", "hull", "hull_expand", "bbox", "bbox_expand")
AUG_RATIO = 0.3  # of the region's size


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a bool ``[H, W]`` that is not empty, the last two exclusive."""
    rows, cols = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1


def filled_box(box: tuple[int, int, int, int], height: int, width: int) -> np.ndarray:
    """Bool ``[H, W]`` that is true inside the part of the box that lies in the picture."""
    left, top, right, bottom = box
    out = np.zeros((height, width), bool)
    out[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = True
    return out


def grow(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Bool ``[H, W]`` grown by so many pixels in every direction (shrunk by as many if negative)."""
    if not pixels:
        return mask
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * abs(pixels) + 1, 2 * abs(pixels) + 1))
    change = cv2.dilate if pixels > 0 else cv2.erode
    return change(mask.astype(np.uint8), kernel) > 0


def hull_of(mask: np.ndarray) -> np.ndarray:
    """The convex hull of a bool ``[H, W]``, filled."""
    points = cv2.findNonZero(mask.astype(np.uint8))
    out = np.zeros(mask.shape, np.uint8)
    cv2.fillConvexPoly(out, cv2.convexHull(points), 1)
    return out > 0


def augment(masks: np.ndarray, mode: str | None, ratio: float | None = None) -> np.ndarray:
    """Each frame's region as its outline, hull or box, ``..._expand`` larger by ``ratio`` of its size.

    Raises:
        InputError: an unknown mode, or a ratio that is negative or has nothing to apply to.
    """
    mode = mode or "original"
    if mode not in AUG_MODES:
        raise InputError(f"unknown maskaug_mode {mode!r}: use {', '.join(AUG_MODES)}")
    if ratio is not None and not mode.endswith("_expand"):
        raise InputError(f"maskaug_ratio has no effect with maskaug_mode {mode}: use {mode}_expand, or leave it out")
    share = AUG_RATIO if ratio is None else ratio
    if not 0 <= share <= 10:
        raise InputError(f"maskaug_ratio must be a number from 0 to 10, got {ratio!r}")
    return np.stack([_augment_one(mask, mode, share) if mask.any() else mask for mask in masks])


def _augment_one(mask: np.ndarray, mode: str, ratio: float) -> np.ndarray:
    left, top, right, bottom = box_of(mask)
    if mode.startswith("bbox"):
        dx, dy = (0, 0)
        if mode == "bbox_expand":
            dx, dy = round((right - left) * ratio / 2), round((bottom - top) * ratio / 2)
        return filled_box((left - dx, top - dy, right + dx, bottom + dy), *mask.shape)
    shape = hull_of(mask) if mode.startswith("hull") else mask
    size = np.sqrt((right - left) * (bottom - top))
    return grow(shape, round(size * ratio / 2)) if mode.endswith("_expand") else shape
