"""Grey pictures and drawn lines: what needs no model."""

from collections.abc import Callable

import cv2
import numpy as np

Picture = Callable[[np.ndarray], np.ndarray]
STRONGEST = 0.08  # share of a clip's pixels whose gradients are strong enough to begin a line
FAINT, CLEAR = 60.0, 320.0  # gradients below never begin one, those above always do
FOLLOW = 0.4  # of that strength, with which a line goes on


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
    grey = luminance(frames)
    if thick > 1:
        grey = np.stack([cv2.GaussianBlur(frame, (0, 0), 0.5 * thick) for frame in grey])
    # One threshold for the whole clip, so that lines do not flicker.
    shown = grey[np.unique(np.linspace(0, len(grey) - 1, 8).astype(int))]
    high = float(np.clip(np.quantile([_gradient(frame) for frame in shown], 1 - STRONGEST), FAINT, CLEAR))
    kernel = np.ones((thick, thick), np.uint8)
    return as_pictures(np.stack([cv2.dilate(cv2.Canny(frame, FOLLOW * high, high), kernel) for frame in grey]))


def _gradient(frame: np.ndarray) -> np.ndarray:
    """As Canny measures it: the sum of both derivatives' absolute values."""
    x, y = (cv2.Sobel(frame, cv2.CV_32F, *way) for way in ((1, 0), (0, 1)))
    return np.abs(x) + np.abs(y)
