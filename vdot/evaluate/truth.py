"""Whether a video of the procedural world contains what its scene says: each thing, its colour, shape and motion.

No weights: pixels are labelled by the colours the known renderer would give them, and what is labelled is measured.
Robust to blur and mild noise, calibrated on rendered clips (tests/evaluate/test_truth.py holds the numbers). It does
not see patterns, shading or the background, and not what hides behind something else.
"""

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from vdot.data.sprites.render import Clip
from vdot.data.sprites.scene import COLOUR_NAMES, SHAPES, Scene, Thing
from vdot.errors import InputError
from vdot.evaluate.fields import check_clip, lab
from vdot.evaluate.outlines import normalised, shape_overlaps
from vdot.evaluate.palette import BACKGROUND, BINS, OTHER, Palette, colour_bins, recoloured
from vdot.evaluate.tracks import Fit, Trail, fit, hypotheses, turns

SEEN = 0.3  # share of a thing that must show for a frame to count
SMALLEST, LARGEST = 0.3, 2.5  # area of what is taken for a thing, of the smallest and largest that it ever has
PIECE = 0.2  # of the largest piece's area: smaller ones are specks, not parts behind something else
ENOUGH = 0.5  # share of frames that a thing must be found in to be there
SPECK = 0.01  # short sides squared: what is smaller is no surplus thing
TIE = 0.02  # of overlap: a small ball and a small hexagon differ by less than the pixels allow to see
TRACKED = 5  # frames needed to say how something moves


@dataclass(frozen=True)
class Found:
    """What was found of one thing. ``None`` is "not measured": the thing was not found, or in too few frames.

    ``share``: of the frames where it should show, those with something of its size, 0..1, higher is better.
    ``found``: that is at least half of them. ``colour``, ``shape``, ``motion``: whether each is the one asked for.
    ``colour_error``: CIE76 between mean colours, 0 is best, 2.3 just noticeable. ``shape_overlap``: with the shape
    asked for, in its best rotation, 0..1, higher is better. ``motion_error``: from the best path of the motion asked
    for, root mean square in short sides, 0 is best. ``size_ratio``: of the radius to the one drawn, 1 is best.
    ``place_overlap``: with the place in the scene, 0..1, higher is better; ``place_error``: between centroids in short
    sides, 0 is best. The two mean something only where the task fixes the place.
    """

    share: float
    found: bool
    colour: bool | None = None
    shape: bool | None = None
    motion: bool | None = None
    colour_error: float | None = None
    shape_overlap: float | None = None
    motion_error: float | None = None
    size_ratio: float | None = None
    place_overlap: float | None = None
    place_error: float | None = None
    seen_colour: str = ""
    seen_shape: str = ""
    seen_motion: tuple[str, str] = ("", "")

    @property
    def present(self) -> bool:
        """Found, and in its colour."""
        return bool(self.found and self.colour)

    @property
    def right(self) -> bool:
        """Present, in its shape and motion."""
        return bool(self.present and self.shape and self.motion)


@dataclass(frozen=True)
class Verdict:
    """On a whole clip. ``surplus`` is the number of things that nobody asked for, in the median frame."""

    things: tuple[Found, ...]
    surplus: int

    @property
    def count_right(self) -> bool:
        return self.surplus == 0 and all(thing.present for thing in self.things)

    @property
    def right(self) -> float:
        """Share of the things that are there with everything asked of them, 0..1, higher is better."""
        return float(np.mean([thing.right for thing in self.things]))


def judge(frames: np.ndarray, scene: Scene | Clip) -> Verdict:
    """uint8 ``[T, H, W, 3]`` against the scene it should show.

    Raises:
        InputError: the frames are not of the scene's size and count.
    """
    return Judge(scene)(frames)


class Judge:
    """:func:`judge` for several videos of one scene."""

    def __init__(self, scene: Scene | Clip) -> None:
        self.clip = scene if isinstance(scene, Clip) else Clip(scene)
        self.scene = self.clip.scene
        self.palette = Palette(self.clip)

    @cached_property
    def _alone(self) -> np.ndarray:
        """Pixels of each thing without what hides it, ``[N, T]``."""
        return (self.clip.coverage >= 128).sum((2, 3))

    def masks(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each thing was found, bool ``[N, T, H, W]``; and all that is not background, bool ``[T, H, W]``."""
        check_clip(frames)
        expected = self.clip.frames.shape
        if frames.shape != expected:
            raise InputError(f"the video is {list(frames.shape)}, its scene {list(expected)}")
        labels = self.palette.label(frames)
        found = np.stack([self._pieces(labels == i + 1, i) for i in range(len(self.scene.things))])
        strange = labels == OTHER
        for i in range(len(found)):
            if self._share(found[i], i) < ENOUGH:
                other = self._pieces(strange, i)
                # Something else of its size is in its stead: the wrong colour, but perhaps the right shape and motion.
                if self._share(other, i) >= ENOUGH:
                    found[i] = other
                    strange = strange & ~other
        return found, labels != BACKGROUND

    def _pieces(self, mask: np.ndarray, thing: int) -> np.ndarray:
        """The largest component of each frame with the pieces near it, holes closed; nothing where the size is off."""
        areas = self._alone[thing]
        low, high = SMALLEST * areas[areas > 0].min(initial=areas.max()), LARGEST * areas.max()
        reach = 2.5 * np.sqrt(areas.max() / np.pi)
        out = np.zeros(mask.shape, bool)
        for t, frame in enumerate(mask):
            closed = cv2.morphologyEx(frame.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
            count, names, stats, centres = cv2.connectedComponentsWithStats(closed)
            if count < 2:
                continue
            area = stats[1:, cv2.CC_STAT_AREA]
            largest = int(area.argmax())
            near = np.hypot(*(centres[1:] - centres[1 + largest]).T) < reach
            kept = 1 + np.flatnonzero(near & (area >= PIECE * area[largest]))
            if low <= area[kept - 1].sum() <= high:
                out[t] = np.isin(names, kept) & frame  # closed to join pieces, not to fill a star's corners
        return out

    def _visible(self, thing: int) -> np.ndarray:
        """Frames in which enough of it should show, bool ``[T]``."""
        shown = (self.clip.masks == thing + 1).sum((1, 2))
        return shown >= SEEN * np.maximum(self._alone[thing], 1)

    def _share(self, mask: np.ndarray, thing: int) -> float:
        visible = self._visible(thing)
        found = np.asarray(mask.any(axis=(1, 2)))
        return float(found[visible].mean()) if visible.any() else 0.0

    def __call__(self, frames: np.ndarray) -> Verdict:
        return self.weigh(frames, *self.masks(frames))

    def weigh(self, frames: np.ndarray, masks: np.ndarray, foreground: np.ndarray) -> Verdict:
        """The verdict on what :meth:`masks` found."""
        found = tuple(self._measure(frames, masks, foreground, i) for i in range(len(masks)))
        return Verdict(found, self._surplus(masks, foreground))

    def _surplus(self, masks: np.ndarray, foreground: np.ndarray) -> int:
        kernel = np.ones((5, 5), np.uint8)
        smallest = SPECK * self.scene.unit**2
        counts = []
        for t, frame in enumerate(foreground):
            taken = cv2.dilate(masks[:, t].max(axis=0).astype(np.uint8), kernel) > 0
            rest = cv2.morphologyEx((frame & ~taken).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
            areas = cv2.connectedComponentsWithStats(rest)[2][1:, cv2.CC_STAT_AREA]
            counts.append(int((areas >= smallest).sum()))
        return int(np.median(counts))

    def _measure(self, frames: np.ndarray, masks: np.ndarray, foreground: np.ndarray, thing: int) -> Found:
        mask = masks[thing]
        share = self._share(mask, thing)
        if share < ENOUGH:
            return Found(share, False)
        at = np.flatnonzero(mask.any((1, 2)))
        asked = self.scene.things[thing]
        person = asked.shape == "person"
        colour, error = self._colour(frames, _clothed(masks, foreground, thing) if person else mask, thing)
        shape, overlap = self._shape(masks, at, thing)
        wanted = Judge._asked(asked)
        seen, asked_fit = self._motion(frames[at], mask[at], at, thing)
        sizes = mask[at].sum((1, 2)) / np.maximum(self._alone[thing][at], 1)
        expected = self.clip.masks[at] == thing + 1
        return Found(
            share, True,
            colour == asked.colour, shape == asked.shape, None if seen is None else seen.motion == wanted,
            error, overlap, None if asked_fit is None else asked_fit.error, float(np.median(np.sqrt(sizes))),
            _overlap(mask, self.clip.masks == thing + 1), self._distance(mask[at], expected),
            colour, shape, ("", "") if seen is None else seen.motion,
        )  # fmt: skip

    @staticmethod
    def _asked(thing: Thing) -> tuple[str, str]:
        return thing.motion.kind, thing.motion.direction

    def _distance(self, mask: np.ndarray, expected: np.ndarray) -> float | None:
        both = expected.any((1, 2))
        if not both.any():
            return None
        gaps = _centroids(mask[both]) - _centroids(expected[both])
        return float(np.hypot(*gaps.T).mean() / self.scene.unit)

    # --- colour ---

    def _colour(self, frames: np.ndarray, mask: np.ndarray, thing: int) -> tuple[str, float]:
        """The named colour that, on this thing and its pattern, explains the pixels best; and the error of the mean."""
        inside = frames[mask]
        likely = self._recoloured[thing] @ np.bincount(colour_bins(inside), minlength=BINS**3)
        drawn = self.clip.frames[self.clip.masks == thing + 1]
        gap = lab(inside).mean(0) - lab(drawn).mean(0) if len(drawn) else np.zeros(3)
        return COLOUR_NAMES[int(likely.argmax())], float(np.linalg.norm(gap))

    @cached_property
    def _recoloured(self) -> list[np.ndarray]:
        # The floor keeps a few strange pixels from outvoting the rest.
        return [np.log(recoloured(thing, self.scene.unit) + 0.1 / BINS**3) for thing in self.scene.things]

    # --- shape ---

    def _shape(self, masks: np.ndarray, at: np.ndarray, thing: int) -> tuple[str, float]:
        """Of the frames in which nothing touches it, or of all: larger pictures of it count for more."""
        mask = masks[thing]
        rest = np.asarray(np.delete(masks, thing, 0).any(axis=0))
        border = np.ones(mask.shape[1:], bool)
        border[1:-1, 1:-1] = False
        free = [t for t in at if not (cv2.dilate(mask[t].astype(np.uint8), _CROSS) > 0)[rest[t] | border].any()]
        chosen = np.array(free if free else at)
        scores = shape_overlaps(mask[chosen])
        mean = np.average(scores, axis=0, weights=mask[chosen].sum((1, 2)))
        asked = SHAPES.index(self.scene.things[thing].shape)
        best = asked if mean[asked] >= mean.max() - TIE else int(mean.argmax())
        return SHAPES[best], float(mean[asked])

    # --- motion ---

    def trail(self, frames: np.ndarray, mask: np.ndarray, at: np.ndarray) -> Trail:
        """Of the frames ``at``: ``frames [n, H, W, 3]`` and ``mask [n, H, W]`` are those alone."""
        u = self.scene.times[at]
        place = _centroids(mask) / self.scene.unit + self.scene.pan(u)
        size = np.sqrt(mask.sum((1, 2)))
        outlines = np.stack([normalised(m) for m in mask]).astype(np.float32)
        limbs = float(np.abs(np.diff(outlines, axis=0)).sum(1).mean() / outlines.sum(1).mean())
        return Trail(u, place, size / size.mean(), turns(frames, mask), limbs)

    def _motion(
        self, frames: np.ndarray, mask: np.ndarray, at: np.ndarray, thing: int
    ) -> tuple[Fit | None, Fit | None]:
        """What fits best, and how what was asked for fits."""
        if len(at) < TRACKED:
            return None, None
        asked = self.scene.things[thing]
        person = asked.shape == "person"
        trail = self.trail(frames, mask, at)
        fits = [fit(trail, kind, way, person) for kind, way in hypotheses(person)]
        return min(fits, key=lambda f: f.misfit), next(f for f in fits if f.motion == Judge._asked(asked))


_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


def _centroids(masks: np.ndarray) -> np.ndarray:
    """Bool ``[n, H, W]``, none empty -> ``[n, 2]`` x, y in pixels."""
    area = masks.sum((1, 2))
    rows, cols = (np.arange(side) + 0.5 for side in masks.shape[1:])
    return np.stack([masks.sum(1) @ cols / area, masks.sum(2) @ rows / area], -1)


def _clothed(masks: np.ndarray, foreground: np.ndarray, thing: int) -> np.ndarray:
    """A person's mask with what is inside its convex hull: a shirt of another colour is no part of the mask itself."""
    out = np.zeros(foreground.shape, bool)
    others = np.asarray(np.delete(masks, thing, 0).any(axis=0))
    for t in np.flatnonzero(masks[thing].any((1, 2))):
        points = np.argwhere(masks[thing][t])[:, ::-1].astype(np.int32)
        hull = cv2.fillConvexPoly(np.zeros(out.shape[1:], np.uint8), cv2.convexHull(points), 1) > 0
        out[t] = masks[thing][t] | (hull & foreground[t] & ~others[t])
    return out


def _overlap(mask: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of bool ``[T, H, W]``, of the whole clip."""
    return float((mask & other).sum() / max((mask | other).sum(), 1))
