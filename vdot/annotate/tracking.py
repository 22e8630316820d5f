"""A thing followed through a clip from its mask in the first frame, without a model.

The thing as the first frame shows it is looked for in each frame: moved, turned, scaled. Where found, it is there, less
what covers it; where not (it bends, or turns away), the last frame's picture of it is looked for instead. GrabCut
then draws the edge. So the thing is known roughly, and from where it is not the ground behind it. A second walk through
the clip knows the ground: it sees where the first picture no longer fits, finds limbs by their colours, and keeps to
its course while the thing is hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from vdot.annotate.ground import Ground
from vdot.annotate.masks import grow
from vdot.annotate.plate import SEEN
from vdot.annotate.salient import grab_cut

Track = Callable[[np.ndarray, np.ndarray], np.ndarray]
SIZE = 40.0  # pixels that the thing has at work, square root of its area
MOST = 4.0  # the most that small frames are enlarged to get there
FINE_SIZE = 160.0  # pixels of it when its edge is drawn at last
REACH = 0.25  # of the frame's short side that a thing may move off its course from one frame to the next
# Degrees and factors tried around the expected ones, coarsely and then finely.
COARSE = tuple((turn, scale) for turn in (0.0, -8.0, 8.0, -16.0, 16.0) for scale in (1.0, 0.95, 1.05))
FINE = tuple((turn, scale) for turn in (0.0, -3.0, 3.0) for scale in (1.0, 0.98, 1.02))
# Costs are squared levels, summed over the channels. Straying from the course costs as well.
COURSE, TURN, SCALE = 60.0, 0.08, 2500.0
GOOD = 300.0  # so well met that no other turn need be tried
FOUND = 25.0  # levels, median: above, it is not the thing as it was
HIDDEN = 60.0  # levels: something else is in front here
HIDDEN_SHARE = 0.6  # of the last mask's area: where less is left, the thing is hidden rather than bent
AGREE = 0.85  # overlap of two masks of it, one moved from the first frame, one by colours; below, colours are right
BAND, EDGE_BAND = 0.15, 0.1  # of the thing's size, in which GrabCut may move the edge: of an old picture, of the first


@dataclass(frozen=True)
class _Place:
    """Where the thing is: turned by degrees, scaled, its centre; and the map from its picture to the frame."""

    turn: float
    scale: float
    centre: np.ndarray
    matrix: np.ndarray | None = None
    cost: float = np.inf


def by_template() -> Track:
    """uint8 ``[T, H, W, 3]`` and the first frame's bool ``[H, W]`` -> bool ``[T, H, W]``."""
    return follow


def follow(frames: np.ndarray, mask: np.ndarray) -> np.ndarray:
    scale = min(MOST, SIZE / np.sqrt(mask.sum()))
    small = np.stack([_resize(frame, scale) for frame in frames])
    start = _resize_mask(mask, small.shape[1:3])
    out = np.zeros(frames.shape[:3], bool)
    out[0] = mask
    if not start.any():  # a speck
        out[:] = mask
        return out
    roughly = _walk(small, start)
    found = _walk(small, start, Ground.behind(small, roughly, scale)) if len(frames) >= SEEN else roughly
    for t in range(1, len(frames)):
        if found[t].any():
            out[t] = _full_size(frames[t], found[t], scale)
    return out


@dataclass(frozen=True)
class _State:
    """What is known after a frame: where the thing is, how it moves, and the last picture and mask that showed it."""

    place: _Place
    picture: np.ndarray
    mask: np.ndarray
    speed: np.ndarray
    spin: float = 0.0


def _walk(small: np.ndarray, start: np.ndarray, ground: Ground | None = None) -> np.ndarray:
    """From frame to frame: uint8 ``[T, H, W, 3]``, bool ``[H, W]`` in the first -> bool ``[T, H, W]``."""
    out = np.zeros(small.shape[:3], bool)
    out[0] = start
    first = small[0].astype(np.float32)
    state = _State(_Place(0.0, 1.0, _centre(start)), first, start, np.zeros(2))
    for t in range(1, len(small)):
        met = _as_first(first, start, small[t], state, t, ground)
        if met is None:
            met = _as_last(small[t], state) if ground is None else _by_colours(small[t], state, t, ground)
        out[t], state = met
        if not state.mask.any():
            break
    return out


def _as_first(
    first: np.ndarray, start: np.ndarray, frame: np.ndarray, state: _State, t: int, ground: Ground | None
) -> tuple[np.ndarray, _State] | None:
    """The thing as the first frame shows it, moved; None where that is not what is there."""
    image, last = frame.astype(np.float32), state.place
    found = _search(first, start, image, replace(last, turn=last.turn + state.spin, centre=last.centre + state.speed))
    body = _seen(first, start, image, found)
    if body is None or not body.any():
        return None
    if ground is not None and ground.shines_through(t, image, _warp_mask(start, found)):
        return None
    mask = redraw(frame, body, EDGE_BAND * np.sqrt(body.sum()), 0.75)
    found = _as_drawn(found, body, mask)
    if ground is not None:
        told = ground.tell(t, image, body)
        if told.any() and _overlap(told, mask) < AGREE and ground.knows(t, told ^ mask):  # a limb has moved
            mask = told
    return mask, _State(found, image, mask, found.centre - last.centre, (found.turn - last.turn) / 2)


def _as_last(frame: np.ndarray, state: _State) -> tuple[np.ndarray, _State]:
    """The thing as the last frame showed it, moved."""
    image, last = frame.astype(np.float32), state.place
    step = _step(image, state)
    moved = _warp_mask(state.mask, step)
    mask = redraw(frame, moved, BAND * np.sqrt(moved.sum()), 0.6) if moved.any() else moved
    place = replace(step, turn=last.turn + step.turn, scale=last.scale * step.scale)
    return mask, _State(place, image, mask, place.centre - last.centre)


def _by_colours(frame: np.ndarray, state: _State, t: int, ground: Ground) -> tuple[np.ndarray, _State]:
    """What is near the last mask and neither ground nor something else; if too little of it is left, it is hidden.

    A hidden thing keeps its course, its picture and its shape until it is met again.
    """
    image, last = frame.astype(np.float32), state.place
    step = _step(image, state)
    told = ground.tell(t, image, _warp_mask(state.mask, step))
    if told.sum() >= HIDDEN_SHARE * state.mask.sum():
        speed = step.centre - _centre(state.mask)
        place = replace(last, centre=last.centre + speed, turn=last.turn + step.turn, scale=last.scale * step.scale)
        return told, _State(place, image, told, speed)
    ahead = _shifted(state.mask.astype(np.float32), state.speed, cv2.BORDER_CONSTANT) >= 0.5
    told_ahead = ground.tell(t, image, ahead)
    place = replace(last, centre=last.centre + state.speed)
    if told_ahead.sum() >= HIDDEN_SHARE * state.mask.sum():
        return told_ahead, _State(place, image, told_ahead, state.speed)
    best = told_ahead if told_ahead.sum() > told.sum() else told
    return best, _State(place, _shifted(state.picture, state.speed), ahead, state.speed)


def _step(image: np.ndarray, state: _State) -> _Place:
    """Where the last picture of the thing went."""
    expected = _Place(0.0, 1.0, _centre(state.mask) + state.speed)
    return _search(state.picture, state.mask, image, expected, finely=False)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


def _shifted(picture: np.ndarray, by: np.ndarray, border: int = cv2.BORDER_REPLICATE) -> np.ndarray:
    matrix = np.array([[1, 0, by[0]], [0, 1, by[1]]])
    return cv2.warpAffine(picture, matrix, picture.shape[1::-1], borderMode=border)


# --- looking for it --------------------------------------------------------------------------------------------------


def _search(picture: np.ndarray, mask: np.ndarray, image: np.ndarray, expected: _Place, finely: bool = True) -> _Place:
    """Where ``picture`` under ``mask`` lies in ``image``, both float32 ``[H, W, 3]``, near what is expected."""
    reach = max(4, round(REACH * min(mask.shape)))
    found = _best(picture, mask, image, expected, COARSE, reach)
    return _best(picture, mask, image, found, FINE, 3) if finely else found


def _best(
    picture: np.ndarray,
    mask: np.ndarray,
    image: np.ndarray,
    expected: _Place,
    tries: Sequence[tuple[float, float]],
    reach: int,
) -> _Place:
    best = replace(expected, cost=np.inf)
    middle = _centre(mask)
    for turn, scale in tries:
        matrix = cv2.getRotationMatrix2D(middle.tolist(), expected.turn + turn, expected.scale * scale)
        matrix[:, 2] += expected.centre - middle
        tried = _Place(expected.turn + turn, expected.scale * scale, expected.centre, matrix)
        shape = _warp_mask(mask, tried)
        if not shape.any():
            continue
        shift, cost = _shift(_warp(picture, tried), shape, image, reach)
        cost += TURN * turn**2 + SCALE * (scale - 1) ** 2
        if cost < best.cost:
            matrix[:, 2] += shift
            best = replace(tried, centre=tried.centre + shift, cost=cost)
        if (turn, scale) == (0.0, 1.0) and cost < GOOD:
            break
    return best


def _shift(picture: np.ndarray, mask: np.ndarray, image: np.ndarray, reach: int) -> tuple[np.ndarray, float]:
    """The move (x, y) by at most ``reach`` that lays the masked picture best onto ``image``, and its cost."""
    rows, cols = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    top, bottom, left, right = rows[0], rows[-1] + 1, cols[0], cols[-1] + 1
    wide = cv2.copyMakeBorder(image, reach, reach, reach, reach, cv2.BORDER_REPLICATE)
    window = wide[top : bottom + 2 * reach, left : right + 2 * reach]
    weights = np.repeat(mask[top:bottom, left:right, None], 3, -1).astype(np.float32)
    cost = cv2.matchTemplate(window, picture[top:bottom, left:right], cv2.TM_SQDIFF, mask=weights) / weights.sum()
    away = np.arange(-reach, reach + 1) / reach
    cost = cost + COURSE * (away[:, None] ** 2 + away**2)
    row, col = np.unravel_index(int(cost.argmin()), cost.shape)
    return np.array([col - reach, row - reach], float), float(cost[row, col])


def _seen(picture: np.ndarray, mask: np.ndarray, image: np.ndarray, place: _Place) -> np.ndarray | None:
    """What of the thing at ``place`` is to be seen, bool ``[H, W]``; None if it is not the thing that is there."""
    if place.matrix is None:
        return None
    shape = _warp_mask(mask, place)
    gap = np.abs(_warp(picture, place) - image).mean(-1)
    if not shape.any() or np.median(gap[shape]) >= FOUND:
        return None
    other = cv2.morphologyEx((gap > HIDDEN).astype(np.uint8), cv2.MORPH_OPEN, np.ones((5, 5), np.uint8)) > 0
    return shape & ~other


def _as_drawn(place: _Place, body: np.ndarray, drawn: np.ndarray) -> _Place:
    """A plain picture fits anywhere inside a larger one of its colour: the edge that was drawn says if it is larger."""
    growth = float(np.clip(np.sqrt(drawn.sum() / body.sum()), 1.0, 1.05))
    return replace(place, scale=place.scale * growth)


def _warp(picture: np.ndarray, place: _Place) -> np.ndarray:
    assert place.matrix is not None
    size = (picture.shape[1], picture.shape[0])
    return cv2.warpAffine(picture, place.matrix, size, borderMode=cv2.BORDER_REPLICATE)


def _warp_mask(mask: np.ndarray, place: _Place) -> np.ndarray:
    if place.matrix is None:
        return np.zeros_like(mask)
    return cv2.warpAffine(mask.astype(np.float32), place.matrix, mask.shape[::-1]) >= 0.5


def _centre(mask: np.ndarray) -> np.ndarray:
    rows, cols = np.nonzero(mask)
    return np.array([cols.mean(), rows.mean()])


# --- its edge --------------------------------------------------------------------------------------------------------


def redraw(image: np.ndarray, mask: np.ndarray, band: float, trust: float) -> np.ndarray:
    """The edge of bool ``mask`` moved by at most about ``band`` pixels to where the colours of uint8 ``image`` change.

    What comes out and overlaps ``mask`` by less than ``trust`` is not believed.
    """
    width = max(3, round(band))
    around = grow(mask, 3 * width)
    rows, cols = (np.flatnonzero(around.any(axis)) for axis in (1, 0))
    here = np.s_[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    trimap = np.where(mask, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    trimap[grow(mask, -width)] = cv2.GC_FGD
    trimap[~grow(mask, width)] = cv2.GC_BGD
    drawn = np.zeros_like(mask)
    drawn[here] = grab_cut(image[here], trimap[here].copy(), mask[here], rounds=2)
    return drawn if _overlap(drawn, mask) > trust else mask


def _full_size(frame: np.ndarray, mask: np.ndarray, scale: float) -> np.ndarray:
    """A mask of the scaled frame at the frame's own size; what was found small gets its edge drawn anew."""
    if scale < 1:
        fine = min(1.0, scale * FINE_SIZE / SIZE)
        image = _resize(frame, fine)
        large = _resize_mask(mask, image.shape[:2])
        mask = redraw(image, large, 1.5 * fine / scale, 0.8) if large.any() else large
    return _resize_mask(mask, frame.shape[:2])


def _resize(frame: np.ndarray, scale: float) -> np.ndarray:
    how = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    size = (max(8, round(frame.shape[1] * scale)), max(8, round(frame.shape[0] * scale)))
    return cv2.resize(frame, size, interpolation=how)


def _resize_mask(mask: np.ndarray, size: Sequence[int]) -> np.ndarray:
    how = cv2.INTER_AREA if size[0] < mask.shape[0] else cv2.INTER_LINEAR
    return cv2.resize(mask.astype(np.float32), (size[1], size[0]), interpolation=how) >= 0.5
