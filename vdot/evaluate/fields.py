"""What several measurements start from: luminance, colour as it is perceived, edges, optical flow, warping.

Clips are uint8 ``[T, H, W, 3]``; flow is float32 ``[..., H, W, 2]``, x then y, in pixels a frame.
"""

from typing import Literal

import cv2
import numpy as np

from vdot.annotate.flow import dense_flow
from vdot.annotate.lines import luminance
from vdot.annotate.material import check_frames
from vdot.errors import InputError

FLAT = 3.0  # levels a pixel, root mean square: gradients below are noise, and flow found there as well
Method = Literal["dis", "farneback"]


def check_clip(frames: np.ndarray, name: str = "frames") -> None:
    """``InputError`` unless uint8 ``[T, H, W, 3]`` with something in it."""
    check_frames(frames, name)


def check_pair(frames: np.ndarray, other: np.ndarray) -> None:
    """``InputError`` unless both are clips of one shape."""
    check_clip(frames)
    check_clip(other, "the clip compared with")
    if frames.shape != other.shape:
        raise InputError(f"the clips differ in shape: {list(frames.shape)} and {list(other.shape)}")


def lab(pixels: np.ndarray) -> np.ndarray:
    """uint8 ``[n, 3]`` -> CIE L*a*b* (D65), float32 ``[n, 3]``: a distance of 2.3 is just noticeable."""
    return cv2.cvtColor(pixels.reshape(1, -1, 3).astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]


def edges(frames: np.ndarray, low: int = 130, high: int = 320) -> np.ndarray:
    """Canny edges of the luminance, bool ``[T, H, W]``; the thresholds are the scribble annotator's."""
    return np.stack([cv2.Canny(frame, low, high) for frame in luminance(frames)]) > 0


def optical_flow(frames: np.ndarray, method: Method = "dis") -> np.ndarray:
    """From each frame to the next, ``[T - 1, H, W, 2]``: dense inverse search (Kroeger et al. 2016) or Farneback's.

    Where the picture is flat there is nothing to see moving, and matchers follow the noise: there it fades to 0.
    """
    grey = luminance(frames)
    out = dense_flow(grey, None if method == "dis" else _farneback)
    for frame, field in zip(grey, out, strict=False):
        field *= _textured(frame)[..., None]
    return out


def _farneback(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return cv2.calcOpticalFlowFarneback(first, second, None, 0.5, 4, 15, 3, 5, 1.2, 0)  # type: ignore[call-overload]


def _textured(grey: np.ndarray) -> np.ndarray:
    """uint8 ``[H, W]`` -> 0 where it is flat, 1 where gradients are twice what noise makes."""
    smooth = cv2.GaussianBlur(grey.astype(np.float32), (0, 0), 1.0)
    x, y = (cv2.Sobel(smooth, cv2.CV_32F, *way, scale=1 / 8) for way in ((1, 0), (0, 1)))
    energy = cv2.GaussianBlur(x * x + y * y, (0, 0), 1.5)
    return np.clip((energy - FLAT**2) / (3 * FLAT**2), 0, 1)


def warp(frame: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """``frame [H, W, ...]`` looked up where ``flow [H, W, 2]`` leads, float32; the border's pixels go on outside."""
    rows, cols = np.mgrid[: frame.shape[0], : frame.shape[1]].astype(np.float32)
    x, y = cols + flow[..., 0], rows + flow[..., 1]
    return cv2.remap(frame.astype(np.float32), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
