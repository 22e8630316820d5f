"""More frames, or more picture: what is given is kept, the rest is unknown."""

from collections.abc import Sequence

import numpy as np

from vdot.annotate.material import UNKNOWN
from vdot.errors import InputError
from vdot.video import fit_frames

DIRECTIONS = ("left", "right", "up", "down")
EXPAND_NUM = 80  # unknown frames, so that one frame more is the 81 of the published models
EXPAND_RATIO = 0.3
SIDE = 16  # a grown frame has sides in multiples of it, or resizing would move the border
Pair = tuple[np.ndarray, np.ndarray]  # source uint8 [T, H, W, 3], bool [T, H, W] where it is unknown


def extend(first: np.ndarray | None, last: np.ndarray | None, unknown: int) -> Pair:
    """So many unknown frames after ``first`` and before ``last`` (clips ``[T, H, W, 3]``)."""
    if unknown < 1 or unknown > 2**16:
        raise InputError(f"expand_num must be from 1 to {2**16}, got {unknown}")
    ends = [clip for clip in (first, last) if clip is not None]
    height, width = ends[0].shape[1:3]
    fitted = [fit_frames(clip, height, width) for clip in ends]  # the second takes the first one's size
    before, after = fitted[:1] if first is not None else [], fitted[-1:] if last is not None else []
    parts = [*before, np.full((unknown, height, width, 3), UNKNOWN, np.uint8), *after]
    white = np.zeros((sum(len(part) for part in parts), height, width), bool)
    start = sum(len(part) for part in before)
    white[start : start + unknown] = True
    return np.concatenate(parts), white


def parse_directions(direction: Sequence[str] | str | None) -> tuple[str, ...]:
    """ "left,right", a list, or None for all four. ``InputError`` for another word."""
    if direction is None:
        return DIRECTIONS
    words = direction.replace(" ", ",").split(",") if isinstance(direction, str) else list(direction)
    words = [word.strip().lower() for word in words if word.strip()]
    wrong = [word for word in words if word not in DIRECTIONS]
    if wrong or not words:
        raise InputError(f"unknown direction {(wrong or [''])[0]!r}: use any of {', '.join(DIRECTIONS)}")
    return tuple(words)


def check_ratio(ratio: float | None, most: float) -> float:
    share = EXPAND_RATIO if ratio is None else float(ratio)
    if not 0 < share <= most:
        raise InputError(f"expand_ratio must be a number above 0 and up to {most:g}, got {ratio!r}")
    return share


def outpaint(frames: np.ndarray, directions: Sequence[str], ratio: float) -> Pair:
    """The frame grown by ``ratio`` of its width (left, right) or height (up, down) on each side named.

    The new sides are multiples of :data:`SIDE` (rounded up at the last of left and right, and of up and down), if one
    of them changes.
    """
    count, height, width = frames.shape[:3]
    left, right = _margins(width, ratio, ("left" in directions, "right" in directions))
    top, bottom = _margins(height, ratio, ("up" in directions, "down" in directions))
    out = np.full((count, top + height + bottom, left + width + right, 3), UNKNOWN, np.uint8)
    white = np.ones(out.shape[:3], bool)
    inside = (slice(None), slice(top, top + height), slice(left, left + width))
    out[inside], white[inside] = frames, False
    return out, white


def _margins(length: int, ratio: float, asked: tuple[bool, bool]) -> tuple[int, int]:
    if not any(asked):
        return 0, 0
    before, after = (round(length * ratio) if wanted else 0 for wanted in asked)
    surplus = -(length + before + after) % SIDE
    return (before, after + surplus) if asked[1] else (before + surplus, after)


def inner_margin(frames: np.ndarray, directions: Sequence[str], ratio: float) -> np.ndarray:
    """The size stays: where ``ratio`` of the frame at each side named is unknown, bool ``[1, H, W]``."""
    height, width = frames.shape[1:3]
    white = np.zeros((1, height, width), bool)
    across, down = max(1, round(width * ratio)), max(1, round(height * ratio))
    for direction, where in (
        ("left", np.s_[:, :, :across]),
        ("right", np.s_[:, :, width - across :]),
        ("up", np.s_[:, :down]),
        ("down", np.s_[:, height - down :]),
    ):
        if direction in directions:
            white[where] = True
    if white.all():
        raise InputError(
            f"expand_ratio {ratio:g} in {', '.join(directions)} leaves nothing of the picture: make it less"
        )
    return white
