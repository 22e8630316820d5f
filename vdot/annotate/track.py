"""A thing followed through a clip from its mask in the first frame, without a model: flow carries the outline on,
GrabCut puts it back onto the edge."""

from collections.abc import Callable

import cv2
import numpy as np

from vdot.annotate.flow import dense_flow
from vdot.annotate.lines import luminance

Track = Callable[[np.ndarray, np.ndarray], np.ndarray]


def by_flow() -> Track:
    """uint8 ``[T, H, W, 3]`` and the first frame's bool ``[H, W]`` -> bool ``[T, H, W]``."""
    return follow


def follow(frames: np.ndarray, mask: np.ndarray) -> np.ndarray:
    out = np.zeros(frames.shape[:3], bool)
    out[0] = mask
    grey = luminance(frames)
    soft = mask.astype(np.float32)
    for t in range(1, len(frames)):
        back = dense_flow(grey[[t, t - 1]])[0]
        rows, cols = np.mgrid[: mask.shape[0], : mask.shape[1]].astype(np.float32)
        soft = cv2.remap(soft, cols + back[..., 0], rows + back[..., 1], cv2.INTER_LINEAR)
        out[t] = soft >= 0.5
    return out
