"""Optical flow, and its picture on the colour wheel of Baker et al. (2007), as VACE's models were trained on it."""

from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np

from vdot.annotate.lines import luminance

MATCH_SIDE = 128  # pixels of the short side that frames are matched at, at least: the matcher's patches are 8 wide
# Steps of the wheel between red, yellow, green, cyan, blue, magenta and red again: more where the eye sees more.
WHEEL_STEPS = (15, 6, 4, 11, 13, 6)
FULLEST = 0.999  # quantile of a frame's lengths that has the fullest colour: a few false vectors do not pale the rest

Flow = Callable[[np.ndarray], np.ndarray]
Match = Callable[[np.ndarray, np.ndarray], np.ndarray]


def dis() -> Flow:
    """Dense inverse search (Kroeger et al. 2016): uint8 ``[T, H, W, 3]`` -> pixels a frame ``[T - 1, H, W, 2]``."""
    return lambda frames: dense_flow(luminance(frames))


def dense_flow(grey: np.ndarray, match: Match | None = None) -> np.ndarray:
    """Flow from each frame of uint8 ``[T, H, W]`` to the next, x then y, float32 ``[T - 1, H, W, 2]`` in pixels.

    Small frames are matched enlarged. ``match`` of two grey pictures; dense inverse search by default.
    """
    height, width = grey.shape[1:]
    scale = max(1, -(-MATCH_SIDE // min(height, width)))
    size = (width * scale, height * scale)
    large = [cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC) for frame in grey] if scale > 1 else list(grey)
    match = match or _dense_inverse_search()
    out = np.empty((len(grey) - 1, height, width, 2), np.float32)
    for t, field in enumerate(out):
        found = match(large[t], large[t + 1])
        field[:] = cv2.resize(found, (width, height), interpolation=cv2.INTER_AREA) / scale
    return out


def _dense_inverse_search() -> Match:
    matcher = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return lambda first, second: matcher.calc(first, second, None)  # type: ignore[call-overload]


@lru_cache(maxsize=1)
def colour_wheel() -> np.ndarray:
    """The wheel's colours in order, float64 ``[55, 3]`` in 0..255."""
    corners = np.array([(255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255)], float)
    after = np.roll(corners, -1, axis=0)
    parts = []
    for here, there, steps in zip(corners, after, WHEEL_STEPS, strict=True):
        share = np.floor(255 * np.arange(steps) / steps)[:, None] / 255
        parts.append(here + (there - here) * share)
    return np.concatenate(parts)


def draw_flow(flow: np.ndarray) -> np.ndarray:
    """``[T, H, W, 2]`` pixels -> uint8 ``[T, H, W, 3]``: hue is direction, white is still.

    Each frame's longest vectors have the fullest colour, as in VACE's preparation: the picture shows relative speed.
    """
    wheel = colour_wheel()
    out = np.empty((*flow.shape[:3], 3), np.uint8)
    for field, picture in zip(flow.astype(np.float64), out, strict=True):
        length = np.hypot(field[..., 0], field[..., 1])
        longest = np.quantile(length, FULLEST, method="higher")
        share = np.minimum(length / (longest + 1e-5), 1)
        turn = (np.arctan2(-field[..., 1], -field[..., 0]) / np.pi + 1) / 2 * (len(wheel) - 1)
        low = np.floor(turn).astype(int)
        rest = (turn - low)[..., None]
        colour = wheel[low] * (1 - rest) + wheel[(low + 1) % len(wheel)] * rest
        picture[:] = np.floor(255 - share[..., None] * (255 - colour))
    return out


def flow_picture(frames: np.ndarray, flow: Flow) -> np.ndarray:
    """One picture for each frame: of the motion that led to it; the first frame shows that of the second."""
    out = np.full_like(frames, 255)
    for t in range(1, len(frames)):  # one by one: the vectors of a long clip take more memory than its pictures
        out[t] = draw_flow(flow(frames[t - 1 : t + 1]))[0]
    if len(frames) > 1:
        out[0] = out[1]
    return out
