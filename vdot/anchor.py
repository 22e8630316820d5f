"""Colours of a long clip, held to those of its first chunk by optimal transport between Gaussians of pixels.

What a chunk makes of pixels that are known (the overlap, and what the mask keeps) shows its colour error exactly, pixel
for pixel. Beyond them only the colours of the first chunk are there to compare with; a difference that is small counts
as drift and is taken back, a large one is another scene and stays.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

SAMPLED = 2**16  # pixels of a frame that are measured, at most about as many
FLOOR = 4.0  # grey levels squared, added to each variance: flat colours have no direction to stretch
SEAM_GAIN, SEAM_SHIFT = 1.25, 32.0  # largest correction by known pixels: contrast, and grey levels
DRIFT_GAIN, DRIFT_SHIFT = 1.1, 12.0  # and by the first chunk's colours
SAME_SCENE, OTHER_SCENE = 16.0, 32.0  # grey levels between mean colours: up to here drift, from here on no drift at all
ENOUGH_KNOWN = 0.05  # of the new pixels: then these, not the first chunk, say what the colours should be


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


def moments(frames: np.ndarray, where: np.ndarray | None = None) -> Moments | None:
    """Of uint8 ``[T, H, W, 3]`` where ``where [T, H, W]``; None without a pixel there."""
    total, square, count = np.zeros(3), np.zeros((3, 3)), 0
    for pixels in _samples(frames, where):
        total += pixels.sum(0)
        square += pixels.T @ pixels
        count += len(pixels)
    if not count:
        return None
    mean = total / count
    return Moments(mean, square / count - np.outer(mean, mean))


def _samples(frames: np.ndarray, where: np.ndarray | None) -> Iterator[np.ndarray]:
    step = max(1, round((frames.shape[1] * frames.shape[2] / SAMPLED) ** 0.5))
    for i, frame in enumerate(frames[:, ::step, ::step]):
        chosen = frame.reshape(-1, 3) if where is None else frame[where[i, ::step, ::step]]
        yield chosen.astype(np.float64)


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


class ColourAnchor:
    """Remembers the first chunk's colours and holds later ones to them."""

    def __init__(self) -> None:
        self._first: Moments | None = None

    def learn(self, frames: np.ndarray) -> None:
        """``frames`` uint8 ``[T, H, W, 3]``: the first chunk as it is shown."""
        self._first = moments(frames)

    def hold(self, decoded: np.ndarray, known: np.ndarray, where: np.ndarray, overlap: int) -> np.ndarray:
        """The new frames of a later chunk, those after the first ``overlap``, with corrected colours.

        ``decoded`` and ``known`` are uint8 ``[T, H, W, 3]``, ``where [T, H, W]`` says which pixels are known. The
        correction begins as the known pixels say, so that nothing jumps at the seam, and ends at the first chunk's
        colours, where the next chunk goes on.
        """
        new, free = decoded[overlap:], ~where[overlap:]
        made, shown = moments(decoded, where), moments(known, where)
        seam = IDENTITY if made is None or shown is None else transport(made, shown, SEAM_GAIN, SEAM_SHIFT)
        if free.mean() > 1 - ENOUGH_KNOWN:
            end = seam.then(self._drift(seam, new[len(new) // 2 :]))
        else:
            end = seam
        shares = np.arange(1, len(new) + 1) / len(new)
        return np.concatenate([seam.towards(end, s)(new[i : i + 1]) for i, s in enumerate(shares)])

    def _drift(self, seam: ColourMap, frames: np.ndarray) -> ColourMap:
        """From the colours of ``frames``, corrected by ``seam``, to the first chunk's."""
        found, first = moments(frames), self._first
        if found is None or first is None:
            return IDENTITY
        found = Moments(seam.matrix @ found.mean + seam.offset, seam.matrix @ found.covariance @ seam.matrix.T)
        apart = float(np.linalg.norm(found.mean - first.mean))
        trust = np.clip((OTHER_SCENE - apart) / (OTHER_SCENE - SAME_SCENE), 0, 1)
        return IDENTITY.towards(transport(found, first, DRIFT_GAIN, DRIFT_SHIFT), float(trust))
