"""Grey pictures and drawn lines: what needs no model."""

from collections.abc import Callable

import cv2
import numpy as np

Picture = Callable[[np.ndarray], np.ndarray]
# Of the scribble: edges stronger than HIGH begin a line, those above LOW continue one.
LOW, HIGH = 130, 320


def luminance(frames: np.ndarray) -> np.ndarray:
    """Rec. 601 luma, uint8 ``[T, H, W]``."""
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])


def as_pictures(grey: np.ndarray) -> np.ndarray:
    """uint8 ``[T, H, W]`` -> ``[T, H, W, 3]``."""
    return np.repeat(grey[..., None], 3, axis=-1)


def gray() -> Picture:
    return lambda frames: as_pictures(luminance(frames))


def scribble() -> Picture:
    """White lines on black along the edges of the picture (Canny), as thick as a two-hundredth of the short side.

    VACE's own tool draws lines with a network; edges follow the same outlines with more detail inside textures.
    """
    return _edges


def _edges(frames: np.ndarray) -> np.ndarray:
    thick = max(1, min(frames.shape[1:3]) // 200)
    kernel = np.ones((thick, thick), np.uint8)
    drawn = []
    for frame in luminance(frames):
        smooth = frame if thick == 1 else cv2.GaussianBlur(frame, (0, 0), 0.5 * thick)
        drawn.append(cv2.dilate(cv2.Canny(smooth, LOW, HIGH), kernel))
    return as_pictures(np.stack(drawn))
