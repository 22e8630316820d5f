"""What several measurements start from: luminance, colour as it is perceived, edges, optical flow, warping.

Clips are uint8 ``[T, H, W, 3]``; flow is float32 ``[..., H, W, 2]``, x then y, in pixels a frame.
"""

from typing import Literal

import cv2
import numpy as np

from vdot.errors import InputError

FLOW_SIDE = 128  # pixels of the short side that flow is computed at, at least: the matcher's patches are 8 wide
FLAT = 3.0  # levels a pixel, root mean square: gradients below are noise, and flow found there as well
Method = Literal["dis", "farneback"]


def check_clip(frames: np.ndarray, name: str = "frames") -> None:
    """``InputError`` unless uint8 ``[T, H, W, 3]`` with something in it."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise InputError(f"{name} must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")


def check_pair(frames: np.ndarray, other: np.ndarray) -> None:
    """``InputError`` unless both are clips of one shape."""
    check_clip(frames)
    check_clip(other, "the clip compared with")
    if frames.shape != other.shape:
        raise InputError(f"the clips differ in shape: {list(frames.shape)} and {list(other.shape)}")


def luminance(frames: np.ndarray) -> np.ndarray:
    """Rec. 601 luma, uint8 ``[T, H, W]``."""
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])


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
    height, width = grey.shape[1:]
    scale = max(1, -(-FLOW_SIDE // min(height, width)))
    size = (width * scale, height * scale)
    large = [cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC) for frame in grey] if scale > 1 else list(grey)
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    out = np.empty((len(grey) - 1, height, width, 2), np.float32)
    for t, field in enumerate(out):
        pair = large[t], large[t + 1]
        if method == "dis":
            found = dis.calc(*pair, None)  # type: ignore[call-overload]
        else:
            found = cv2.calcOpticalFlowFarneback(*pair, None, 0.5, 4, 15, 3, 5, 1.2, 0)  # type: ignore[call-overload]
        field[:] = cv2.resize(found, (width, height), interpolation=cv2.INTER_AREA) / scale
        field *= _textured(grey[t])[..., None]
    return out


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
