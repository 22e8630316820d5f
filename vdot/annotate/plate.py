"""What is behind a thing, from the frames in which it stood elsewhere: the clip's still ground, without a model.

The camera's motion is undone, and of each point of the ground the middle one of its colours is kept. So it can be said
of a pixel whether it shows the ground, which neither the thing nor anything that passes in front of it does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

MATCH_SIDE = 192  # pixels of the short side that points are followed at, at least
CELLS = 8  # parts of a frame along each side
CORNERS = 6  # points followed in each of them
MOTIONS = 4  # that are told apart from one frame to the next
AGREE = 1.0  # pixels by which a point that goes with the camera may be off its course, or come back from where it began
LEAST = 8  # parts of the frame that must agree for the camera to be said to move
STRANGE = 30  # levels: beyond, a pixel shows something else, and no more can be said of it
SEEN = 3  # frames that must show a point of the ground
LARGEST = 4.0  # frames' areas that a canvas may have
MOST_FRAMES = 48  # that the ground is gathered from; of longer clips as many, evenly spaced
STEADY = 12.0  # levels: colours of one point that spread wider are no ground, but leaves, water or a depth unaccounted
OUT = 999  # in the place of a colour that is not of the ground


@dataclass(frozen=True)
class Plate:
    """The ground on a canvas: ``picture`` uint8 ``[h, w, 3]``, ``known`` bool ``[h, w]``; ``places [T, 2, 3]`` are
    the frames' maps onto it."""

    picture: np.ndarray
    known: np.ndarray
    places: np.ndarray

    def behind(self, t: int, size: Sequence[int], scale: float) -> tuple[np.ndarray, np.ndarray]:
        """Behind frame ``t``, of ``size`` (height, width), ``scale`` times as large as those it was gathered from.

        Returns:
            float32 ``[H, W, 3]`` and where it is known, bool ``[H, W]``.
        """
        matrix = self.places[t] @ _from_scaled(scale)
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        shape = (size[1], size[0])
        picture = cv2.warpAffine(self.picture, matrix, shape, flags=flags, borderMode=cv2.BORDER_REPLICATE)
        known = cv2.warpAffine(self.known.astype(np.float32), matrix, shape, flags=flags)
        return picture.astype(np.float32), known > 0.99


def gather(frames: np.ndarray, things: np.ndarray) -> Plate:
    """From uint8 ``[T, H, W, 3]`` and where the thing may be, bool ``[T, H, W]``."""
    places = camera(frames, things)
    height, width = frames.shape[1:3]
    corners = np.array([(0, 0, 1), (width, 0, 1), (0, height, 1), (width, height, 1)], float).T
    reached = (places @ corners).transpose(0, 2, 1).reshape(-1, 2)
    low, high = np.floor(reached.min(0)), np.ceil(reached.max(0))
    size = (int(high[0] - low[0]), int(high[1] - low[1]))
    if size[0] * size[1] > LARGEST * height * width:  # it goes too far, or was misjudged
        places, low, size = np.tile(np.eye(2, 3), (len(frames), 1, 1)), np.zeros(2), (width, height)
    places = places.copy()
    places[:, :, 2] -= low
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), MOST_FRAMES)).round().astype(int))
    layers = np.empty((len(chosen), size[1], size[0], 3), np.int16)
    for layer, t in zip(layers, chosen.tolist(), strict=True):
        free = cv2.warpAffine((~things[t]).astype(np.float32), places[t], size) > 0.99
        layer[:] = cv2.warpAffine(frames[t], places[t], size)
        layer[~free] = OUT
    count = (layers[..., 0] != OUT).sum(0)
    picture = _middle(layers, count)
    off = np.abs(layers - picture).max(-1, keepdims=True)
    off[layers[..., :1] == OUT] = OUT
    known = (count >= min(SEEN, len(chosen))) & (_middle(off, count)[..., 0] <= STEADY)
    filled = cv2.inpaint(picture.clip(0, 255).astype(np.uint8), (~known).astype(np.uint8), 3, cv2.INPAINT_TELEA)
    return Plate(filled, known, places)


def _middle(layers: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The lower median over the first axis of ``[n, h, w, c]``, of the ``count [h, w]`` values that are not OUT."""
    at = np.maximum(count - 1, 0) // 2
    return np.take_along_axis(np.sort(layers, 0), at[None, ..., None], 0)[0]


def camera(frames: np.ndarray, things: np.ndarray) -> np.ndarray:
    """Each frame's map (shift, turn and scale) onto the first, ``[T, 2, 3]``, from points outside of the things."""
    scale = max(1.0, MATCH_SIDE / min(frames.shape[1:3]))
    size = (round(frames.shape[2] * scale), round(frames.shape[1] * scale))
    out, step = np.tile(np.eye(3), (len(frames), 1, 1)), np.eye(3)
    before: list[np.ndarray] = []
    for t, frame in enumerate(frames):
        now = _planes(cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC))
        if t:
            free = cv2.resize((~things[t]).astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
            step[:2] = _step(now, before, free, step[:2])
            out[t] = out[t - 1] @ step
        before = now
    return (np.linalg.inv(_from_scaled(1 / scale)) @ out @ _from_scaled(1 / scale))[:, :2]


def _planes(frame: np.ndarray) -> list[np.ndarray]:
    """Two uint8 pictures ``[H, W]`` that points are looked for in: colours may be alike in one."""
    return [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), np.ascontiguousarray(frame[..., 2])]


def _step(now: Sequence[np.ndarray], before: Sequence[np.ndarray], free: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The map from one frame to the one before it, ``[2, 3]``; as the ``last`` one was if nothing better is known.

    Of the motions that are found the camera's is the one seen in most parts of the frame: a patterned thing may well
    have more points than all the ground.
    """
    size = np.array(now[0].shape[::-1])
    pairs = [_followed(*planes, free) for planes in zip(now, before, strict=True)]
    points, there = (np.concatenate(side) for side in zip(*pairs, strict=True))
    best, most = last.copy(), LEAST - 1
    for _ in range(MOTIONS):
        if len(points) < LEAST:
            break
        matrix, agree = cv2.estimateAffinePartial2D(points, there, ransacReprojThreshold=AGREE)
        if matrix is None:
            break
        inside = agree[:, 0] > 0
        parts = len(np.unique((points[inside] * CELLS / size).astype(int), axis=0))
        if parts > most:
            best, most = matrix, parts
        points, there = points[~inside], there[~inside]
    still = np.eye(2, 3)
    return best if _misfit(now[0], before[0], free, best) < _misfit(now[0], before[0], free, still) else still


def _misfit(now: np.ndarray, before: np.ndarray, free: np.ndarray, matrix: np.ndarray) -> float:
    """Mean difference in levels of what is ``free``, once moved; things that go their own way count little."""
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(before, matrix, now.shape[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return float(np.minimum(cv2.absdiff(moved, now), STRANGE)[free > 0].mean()) if free.any() else 0.0


def _followed(now: np.ndarray, before: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points of all parts of a frame, and where they were in the one before, float32 ``[n, 2]`` each."""
    rows, cols = (np.linspace(0, side, CELLS + 1).round().astype(int) for side in now.shape)
    found = []
    for top, bottom in pairwise(rows.tolist()):
        for left, right in pairwise(cols.tolist()):
            here = np.s_[top:bottom, left:right]
            corners = cv2.goodFeaturesToTrack(now[here], CORNERS, 0.1, 4, mask=free[here])
            if corners is not None:
                found.append(corners + np.array([left, top], np.float32))
    if not found:
        return np.empty((0, 2), np.float32), np.empty((0, 2), np.float32)
    points = np.concatenate(found)
    there, met, _ = cv2.calcOpticalFlowPyrLK(now, before, points, None)  # type: ignore[call-overload]
    back, met_back, _ = cv2.calcOpticalFlowPyrLK(before, now, there, None)  # type: ignore[call-overload]
    good = (met[:, 0] > 0) & (met_back[:, 0] > 0) & (np.abs(back - points).max((1, 2)) < AGREE)
    return points[good, 0], there[good, 0]


def _from_scaled(scale: float) -> np.ndarray:
    """From pixels of a frame scaled by ``scale`` to its own; a pixel's middle is half a pixel from its corner."""
    shift = 0.5 / scale - 0.5
    return np.array([[1 / scale, 0, shift], [0, 1 / scale, shift], [0, 0, 1]])
