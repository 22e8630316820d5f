"""Layouts: a box or an outline in black on white that moves as the thing shall move."""

from collections.abc import Sequence

import cv2
import numpy as np

from vdot.annotate.material import check_box

WIDE_BOX, WIDE_OUTLINE = 2, 3  # pixels, at the size that VACE draws them
INK = (0, 0, 0)  # VACE gives some labels colours of their own; black is the colour of every other
FRAME = (720, 1280)  # height, width where nothing says otherwise
FRAMES = 81


def boxes_between(keys: Sequence[Sequence[float]], count: int, height: int, width: int) -> np.ndarray:
    """Boxes at even distances in time -> one for each frame, ``[count, 4]``, the first and the last exactly."""
    given = np.array([check_box(box, height, width) for box in keys], np.float64)
    if len(given) == 1:
        return np.repeat(given, count, axis=0)
    at, places = np.linspace(0, len(given) - 1, count), np.arange(len(given))
    return np.stack([np.interp(at, places, given[:, k]) for k in range(4)], axis=1)


def draw_boxes(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """``[T, 4]`` -> uint8 ``[T, H, W, 3]``."""
    out = np.full((len(boxes), height, width, 3), 255, np.uint8)
    for frame, (left, top, right, bottom) in zip(out, np.rint(boxes).astype(int).tolist(), strict=True):
        cv2.rectangle(frame, (left, top), (right - 1, bottom - 1), INK, WIDE_BOX)
    return out


def draw_outlines(masks: np.ndarray) -> np.ndarray:
    """Bool ``[T, H, W]`` -> the outer contours, uint8 ``[T, H, W, 3]``."""
    out = np.full((*masks.shape, 3), 255, np.uint8)
    for frame, mask in zip(out, masks, strict=True):
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(frame, contours, -1, INK, WIDE_OUTLINE)
    return out
