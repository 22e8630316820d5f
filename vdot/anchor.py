"""Colours of a long clip, held to those of its first chunk by optimal transport between Gaussians of pixels.

What a chunk makes of pixels that are known (the overlap, and what the mask keeps) shows its colour error exactly, pixel
for pixel. Beyond them only the first chunk is there to compare with: places that look nearly alike in both are taken
for the same things and their difference for drift; where few are, it is another scene and stays as it comes.
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
SMALL, REACH = 64, 16  # longer side of the pictures in which a camera's way is looked for, and how far it may be
OTHER_SCENE, SAME_SCENE = 0.25, 0.5  # share of places that look alike: up to here none of it is drift, from here on all
RECENT = 4  # last frames of the overlap that say how to go on from it
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
        self._first = np.median(sampled(frames), axis=0)  # of each place; what moves through it does not count

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
        colours = sampled(frames) @ seam.matrix.T + seam.offset
        alike = (np.abs(colours - self._first) < ALIKE).all(-1)
        trust = float(np.clip((alike.mean() - OTHER_SCENE) / (SAME_SCENE - OTHER_SCENE), 0, 1))
        if not trust:
            return IDENTITY
        wanted = np.broadcast_to(self._first, colours.shape)[alike]
        back = transport(moments(colours[alike]), moments(wanted), DRIFT_GAIN, DRIFT_SHIFT)
        now = np.median(colours, axis=0)
        if camera_moved(self._first, now, now @ back.matrix.T + back.offset):
            return IDENTITY
        return IDENTITY.towards(back, trust)


def camera_moved(first: np.ndarray, now: np.ndarray, corrected: np.ndarray) -> bool:
    """Whether ``now`` is better explained as ``first`` seen from elsewhere, its colours as they are, than as
    ``corrected`` is: from the same place, its colours drifted. Pictures ``[H, W, 3]``.

    A camera that moves over a sky changes the colours of every place a little, as drift does.
    """
    misfit, at = math.inf, (0, 0)
    for size, reach in ((SMALL // 2, REACH // 2), (SMALL, 1)):  # roughly over the whole reach, then to the pixel
        before, after, still = (_small(picture, size) for picture in (first, now, corrected))
        rows, columns = before.shape[:2]
        around = itertools.product(*(range(2 * c - reach, 2 * c + reach + 1) for c in at))
        shifts = [(y, x) for y, x in around if (y or x) and abs(y) < rows // 2 and abs(x) < columns // 2]
        fits = [(_misfit(_moved(before, y, x), _moved(after, -y, -x)), (y, x)) for y, x in shifts]
        misfit, at = min(fits, default=(math.inf, (0, 0)))
    return misfit < _misfit(before, still)


def _small(picture: np.ndarray, longest: int) -> np.ndarray:
    rows, columns = picture.shape[:2]
    scale = min(1.0, longest / max(rows, columns))
    size = (max(1, round(columns * scale)), max(1, round(rows * scale)))
    return cv2.resize(picture.astype(np.float32), size, interpolation=cv2.INTER_AREA)


def _moved(picture: np.ndarray, y: int, x: int) -> np.ndarray:
    """The part of a picture that another, moved by ``-y, -x``, has too."""
    rows, columns = picture.shape[:2]
    return picture[max(y, 0) : rows + min(y, 0), max(x, 0) : columns + min(x, 0)]


def _misfit(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.median(np.abs(one[::2, ::2] - other[::2, ::2]).max(-1)))
