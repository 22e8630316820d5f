"""Colours of a long clip, held to those of its first chunk by optimal transport between Gaussians of pixels.

What a chunk makes of pixels that are known (the overlap, and what the mask keeps) shows its colour error exactly, pixel
for pixel. Beyond them only the first chunk is there to compare with, along the camera's way: places that look nearly
alike in both are taken for the same and their difference for drift; where few are, it is another scene and stays as it
comes.
"""

import itertools
import math
from dataclasses import dataclass

import cv2
import numpy as np

SAMPLED = 2**16  # pixels of a frame that are measured, at most about as many
FLOOR = 25.0  # grey levels squared, added to each variance: flat colours have no direction to stretch
SEAM_GAIN, SEAM_SHIFT = 1.25, 32.0  # largest correction by known pixels: contrast, and grey levels
DRIFT_GAIN, DRIFT_SHIFT = 1.1, 12.0  # and by the first chunk's colours
ALIKE = 24.0  # grey levels in any channel between two colours of what may be the same thing
SMALL, REACH = 64, 16  # longer side of the pictures in which places are compared, and a camera's way in them
OTHER_SCENE, SAME_SCENE = 0.25, 0.5  # share of places that look alike: up to here none of it is drift, from here on all
PICKED = 5  # frames that show what a place looks like, whatever moves through it
RECENT = 2  # last frames of the overlap that say how to go on from it
CLEARLY = 0.7  # of the misfit: from here on a camera that moved explains a picture better than one that stands
ENOUGH_KNOWN = 0.05  # of the later new pixels: then these, not the first chunk, say what the colours should be


@dataclass(frozen=True)
class Moments:
    """Mean ``[3]`` and covariance ``[3, 3]`` of colours, in grey levels of 255."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclass(frozen=True)
class ColourMap:
    """``x -> matrix @ x + offset`` on colours ``[3]`` in grey levels."""

    matrix: np.ndarray
    offset: np.ndarray

    def then(self, other: "ColourMap") -> "ColourMap":
        return ColourMap(other.matrix @ self.matrix, other.matrix @ self.offset + other.offset)

    def towards(self, other: "ColourMap", share: float) -> "ColourMap":
        """On the straight line to ``other``, all the way at 1."""
        mix = [(1 - share) * a + share * b for a, b in ((self.matrix, other.matrix), (self.offset, other.offset))]
        return ColourMap(mix[0], mix[1])

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """uint8 ``[T, H, W, 3]`` -> the same, rounded and clipped."""
        affine = np.column_stack([self.matrix, self.offset])
        return np.stack([cv2.transform(f.astype(np.float32), affine).round().clip(0, 255) for f in frames]).astype("u1")


IDENTITY = ColourMap(np.eye(3), np.zeros(3))


def moments(pixels: np.ndarray) -> Moments:
    """Of colours ``[N, 3]``, at least one."""
    colours = pixels.astype(np.float64)
    mean = colours.mean(0)
    centred = colours - mean
    return Moments(mean, centred.T @ centred / len(colours))


def sampled(frames: np.ndarray) -> np.ndarray:
    """``[T, H, W, ...]`` with the same rows and columns left out of every frame."""
    step = max(1, round((frames.shape[1] * frames.shape[2] / SAMPLED) ** 0.5))
    return frames[:, ::step, ::step]


def transport(found: Moments, wanted: Moments, most_gain: float, most_shift: float) -> ColourMap:
    """The optimal transport map between two Gaussians, ``m2 + A (x - m1)`` with
    ``A = S1^-1/2 (S1^1/2 S2 S1^1/2)^1/2 S1^-1/2``, its gains within ``1 / most_gain .. most_gain`` and its shift of the
    mean at most ``most_shift`` long."""
    floor = FLOOR * np.eye(3)
    root = _power(found.covariance + floor, 0.5)
    inverse = _power(found.covariance + floor, -0.5)
    matrix = inverse @ _power(root @ (wanted.covariance + floor) @ root, 0.5) @ inverse
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    matrix = (vectors * values.clip(1 / most_gain, most_gain)) @ vectors.T
    shift = wanted.mean - found.mean
    shift = shift * min(1.0, most_shift / max(float(np.linalg.norm(shift)), 1e-9))
    return ColourMap(matrix, found.mean + shift - matrix @ found.mean)


def _power(symmetric: np.ndarray, exponent: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(symmetric)
    return (vectors * values.clip(1e-9) ** exponent) @ vectors.T


def _by_pairs(made: np.ndarray, known: np.ndarray, where: np.ndarray) -> ColourMap:
    """From what was made of known pixels, uint8 ``[T, H, W, 3]``, to what they are."""
    chosen = sampled(where)
    return transport(moments(sampled(made)[chosen]), moments(sampled(known)[chosen]), SEAM_GAIN, SEAM_SHIFT)


class ColourAnchor:
    """Remembers the first chunk's colours and holds later ones to them."""

    def __init__(self) -> None:
        self._first: np.ndarray | None = None

    def learn(self, frames: np.ndarray) -> None:
        """``frames`` uint8 ``[T, H, W, 3]``: the first chunk as it is shown."""
        self._first = _evenly(frames, PICKED)

    def hold(self, decoded: np.ndarray, known: np.ndarray, where: np.ndarray, overlap: int) -> np.ndarray:
        """The new frames of a later chunk, those after the first ``overlap``, with corrected colours.

        ``decoded`` and ``known`` are uint8 ``[T, H, W, 3]``, ``where [T, H, W]`` says which pixels are known, among
        them all of the overlap. The correction begins as its last frames say, so that nothing jumps at the seam, and
        ends as what is known of the new frames says, or else at the first chunk's colours: there the next goes on.
        """
        new, half = decoded[overlap:], (overlap + len(decoded)) // 2
        seam = end = _by_pairs(*(a[max(overlap - RECENT, 0) : overlap] for a in (decoded, known, where)))
        if where[half:].mean() < ENOUGH_KNOWN:
            end = seam.then(self._drift(seam, decoded[half:]))
        elif sampled(where[half:]).any():
            end = _by_pairs(decoded[half:], known[half:], where[half:])
        shares = np.arange(1, len(new) + 1) / len(new)
        return np.concatenate([seam.towards(end, s)(new[i : i + 1]) for i, s in enumerate(shares)])

    def _drift(self, seam: ColourMap, frames: np.ndarray) -> ColourMap:
        """From the colours of ``frames``, corrected by ``seam``, to the first chunk's."""
        if self._first is None:
            return IDENTITY
        count = min(PICKED, len(frames))  # as many of both, or what flickers would look fainter in one of them
        first, now = _place(_evenly(self._first, count)), _place(seam(_evenly(frames, count)))
        still, moved = (_back(first, now, way) for way in ((0, 0), camera_way(first, now)))
        # A camera that moves over a mere slope of colours and a tint look alike: then it stands.
        return moved[0] if moved[1] < CLEARLY * still[1] else still[0]


def _back(first: np.ndarray, now: np.ndarray, way: tuple[int, int]) -> tuple[ColourMap, float]:
    """The map from the colours of ``now`` to those of ``first`` where both show the same, and what remains between."""
    first, now = _overlap(first, now, *way)
    alike = (np.abs(now - first) < ALIKE).all(-1)
    trust = float(np.clip((alike.mean() - OTHER_SCENE) / (SAME_SCENE - OTHER_SCENE), 0, 1))
    if not trust:
        return IDENTITY, math.inf
    back = transport(moments(now[alike]), moments(first[alike]), DRIFT_GAIN, DRIFT_SHIFT)
    return IDENTITY.towards(back, trust), _misfit(first, now @ back.matrix.T + back.offset)


def _evenly(frames: np.ndarray, count: int) -> np.ndarray:
    return frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]


def _place(frames: np.ndarray) -> np.ndarray:
    """A small picture ``[h, w, 3]`` of the place that frames show; what moves through it does not count."""
    picture = np.median(sampled(frames), axis=0).astype(np.float32)
    rows, columns = picture.shape[:2]
    scale = min(1.0, SMALL / max(rows, columns))
    size = (max(1, round(columns * scale)), max(1, round(rows * scale)))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def camera_way(first: np.ndarray, now: np.ndarray) -> tuple[int, int]:
    """Rows and columns by which the camera has moved from one picture ``[h, w, 3]`` to another of that size.

    A camera that moves over a sky changes the colours of every place a little, as drift does: so the places must be
    found again before their colours are compared, and found whatever tint lies over them.
    """
    way = (0, 0)
    for step, reach in ((2, REACH // 2), (1, 1)):  # roughly over the whole reach, then to the pixel
        around = itertools.product(*(range(c - step * reach, c + step * reach + 1, step) for c in way))
        rows, columns = (max(1, side // 2) for side in now.shape[:2])  # half of the place stays in view
        ways = [(y, x) for y, x in around if abs(y) < rows and abs(x) < columns]
        way = min(ways, key=lambda w: (_misfit(*_overlap(first, now, *w)), abs(w[0]) + abs(w[1])))
    return way


def _overlap(first: np.ndarray, now: np.ndarray, y: int, x: int) -> tuple[np.ndarray, np.ndarray]:
    """The parts of two pictures that show the same, the second taken ``y, x`` further on."""
    return _moved(first, y, x), _moved(now, -y, -x)


def _moved(picture: np.ndarray, y: int, x: int) -> np.ndarray:
    """A picture without what lies beyond the border of another one that is ``y, x`` further on."""
    rows, columns = picture.shape[:2]
    return picture[max(y, 0) : rows + min(y, 0), max(x, 0) : columns + min(x, 0)]


def _misfit(one: np.ndarray, other: np.ndarray) -> float:
    """How far two pictures are apart beside a common tint, in grey levels."""
    difference = one[::2, ::2] - other[::2, ::2]
    return float(np.median(np.abs(difference - np.median(difference, axis=(0, 1))).max(-1)))
