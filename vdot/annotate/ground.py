"""Which pixels are the thing rather than the ground behind it or something else, by what each of them looks like."""

from dataclasses import dataclass

import cv2
import numpy as np

from vdot.annotate.masks import box_of, grow
from vdot.annotate.plate import Plate, gather

COLOURS = 12  # of the thing, and of everything else that is not ground
SAMPLES = 4000  # pixels that they are learned from
FEW = 8  # pixels that are no thing
LIKE, UNLIKE = 20.0, 40.0  # levels from the ground: below it is the ground, above something else
SHOWN = 0.15  # of the thing's area that may show the ground where the thing should be
CERTAIN = 60.0  # levels of difference, beyond which a pixel says no more
GUESSED = 0.5  # weight of a colour where the ground itself is not known, but only that around it
PRIOR = 10.0  # levels that the expected shape is worth, well inside or outside of it
SOFT, REACH = 0.1, 0.8  # of the thing's size: where the shape is worth that much, and how far from it the thing may be
SWOLLEN = 1.7  # times its area that the thing does not grow to from one frame to the next


@dataclass(frozen=True)
class Ground:
    """The ground of a clip, the thing's colours ``own [n, 3]``, and those of what else the first frame shows."""

    plate: Plate
    scale: float  # of the frames at work over those of the plate
    own: np.ndarray
    other: np.ndarray | None

    @classmethod
    def behind(cls, small: np.ndarray, roughly: np.ndarray, scale: float) -> "Ground":
        """From uint8 ``[T, H, W, 3]``, which are ``scale`` times as large as the clip, and where the thing is about,
        bool ``[T, H, W]``, exact in the first frame."""
        frames, masks = small, roughly
        if scale > 1:  # enlarged frames show no more, and take more time
            size = (round(small.shape[2] / scale), round(small.shape[1] / scale))
            frames = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in small])
            masks = np.stack(
                [cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA) for mask in roughly]
            )
            masks = masks > 0.2
        if not masks[0].any():  # nothing is left of it
            masks = masks.copy()
            masks[0, 0, 0] = True
        reach = np.sqrt(masks[0].sum())
        around = np.stack([grow(mask, max(1, round(SOFT * reach))) for mask in masks])
        around[0] = masks[0]
        plate = gather(frames, around)
        own = _palette(frames[0][masks[0]])
        off = np.linalg.norm(plate.behind(0, frames.shape[1:3], 1.0)[0] - frames[0], axis=-1) > UNLIKE
        off = cv2.erode(off.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0  # edges mix with the ground
        others = frames[0][off & ~grow(masks[0], max(1, round(SOFT / 2 * reach)))]
        others = others[_nearest(others[None].astype(np.float32), own)[0] > LIKE]
        return cls(plate, max(scale, 1.0), own, _palette(others) if len(others) > FEW else None)

    def shines_through(self, t: int, image: np.ndarray, shape: np.ndarray) -> bool:
        """Whether the ground shows in frame ``t`` where the thing is said to be, bool ``[H, W]``."""
        picture, known = self.plate.behind(t, shape.shape, self.scale)
        off = np.linalg.norm(picture - image, axis=-1)
        shown = shape & known & (off < LIKE)
        shown[shown] = _nearest(image[shown][None], self.own)[0] > off[shown]
        return bool(shown.sum() > SHOWN * shape.sum())

    def knows(self, t: int, region: np.ndarray) -> bool:
        """Whether most of the ground behind a region of frame ``t``, bool ``[H, W]``, was seen in other frames."""
        _, known = self.plate.behind(t, region.shape, self.scale)
        return bool(known[region].sum() > region.sum() / 2)

    def tell(self, t: int, image: np.ndarray, shape: np.ndarray) -> np.ndarray:
        """What is of the thing in frame ``t``, float32 ``[H, W, 3]``, expected about at ``shape``; bool ``[H, W]``."""
        if not shape.any():
            return shape
        size = max(4.0, np.sqrt(shape.sum()))
        near = _around(shape, round(REACH * size))
        here, expected = image[near], shape[near]
        picture, known = (layer[near] for layer in self.plate.behind(t, shape.shape, self.scale))
        mine = _nearest(here, self.own)
        score = np.linalg.norm(picture - here, axis=-1)
        if self.other is not None:
            score = np.minimum(score, _nearest(here, self.other))
        score = np.clip(score - mine, -CERTAIN, CERTAIN) * np.where(known, 1.0, GUESSED).astype(np.float32)
        score = cv2.GaussianBlur(score, (0, 0), 0.5 * self.scale)
        inside = cv2.distanceTransform(np.pad(expected.astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
        outside = cv2.distanceTransform((~expected).astype(np.uint8), cv2.DIST_L2, 5)
        score += PRIOR * np.clip((inside - outside) / (SOFT * size), -1, 1)
        found = _touching((score > 0) & (outside < REACH * size), expected)
        if found.sum() > SWOLLEN * expected.sum():  # it runs into something of its colours
            found &= outside < SOFT * size
        out = np.zeros_like(shape)
        out[near] = found
        return out


def _around(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    left, top, right, bottom = box_of(mask)
    return slice(max(0, top - margin), bottom + margin), slice(max(0, left - margin), right + margin)


def _touching(mask: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """The pieces of ``mask`` that reach into ``shape``."""
    _, labels = cv2.connectedComponents(mask.astype(np.uint8))
    kept = np.unique(labels[shape & mask])
    return mask & np.isin(labels, kept)


def _palette(samples: np.ndarray) -> np.ndarray:
    """The main colours of uint8 ``[n, 3]``, float32 ``[k, 3]``."""
    cv2.setRNGSeed(0)
    samples = samples[:: max(1, len(samples) // SAMPLES)].astype(np.float32)
    count = min(COLOURS, len(np.unique(samples, axis=0)))
    stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 1.0)
    _, _, centres = cv2.kmeans(samples, count, None, stop, 1, cv2.KMEANS_PP_CENTERS)  # type: ignore[call-overload]
    return centres


def _nearest(image: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """How far each pixel is from the nearest of the colours, levels ``[H, W]``."""
    out = np.full(image.shape[:2], np.inf, np.float32)
    for colour in colours:
        out = np.minimum(out, ((image - colour) ** 2).sum(-1))
    return np.sqrt(out)
